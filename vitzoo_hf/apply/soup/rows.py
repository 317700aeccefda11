"""Soups as rows of a zoo of their own, with their ingredients as provenance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitzoo_hf.apply.made_zoos import check_folder, derived_row, write_derived
from vitzoo_hf.apply.soup.averaging import Soup
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.zoo import Zoo


def soup_row(
    zoo: Zoo, soup: Soup, *, name: str = "", test_loss: float | None = None, test_accuracy: float | None = None
) -> dict[str, Any]:
    """A soup as a row: the columns of the zoo, and a provenance that names every ingredient.

    Columns that all ingredients share keep their value: parent, factors. Others are null, as are results on training
    images; `epoch` is the latest of the ingredients'.

    Args:
        zoo: holds the ingredients.
        soup: of them.
        name: of the group, part of the id: letters, digits and `._=+-`; others are replaced.
        test_loss: on test images, measured by the caller.
        test_accuracy: likewise.

    Raises:
        ZooError: if an ingredient is not in the zoo.
    """
    table = zoo.filter(model_id=soup.ingredients).to_pandas()
    if len(table) != len(soup.ingredients):
        raise ZooError(f"{zoo.name} holds {len(table)} of the {len(soup.ingredients)} ingredients of this soup")
    rows = records(table)
    own = f"soup-{soup.method}" + (f"--{name}" if name else "")
    provenance = _provenance(soup, rows)
    return derived_row(zoo, rows, own, soup.weights, provenance, test_loss=test_loss, test_accuracy=test_accuracy)


def write_soups(zoo: Zoo, rows: Sequence[Mapping[str, Any]], folder: str | Path) -> Path:
    """Write soups as a zoo, with the held-out images of the zoo that their ingredients are from.

    A soup goes into the split of its ingredients; where they are from several, into `test` before `validation` before
    `train`, so that nothing of a test model is ever trained on.

    Args:
        zoo: of the ingredients.
        rows: of `soup_row`.
        folder: the new zoo; earlier soups that are there are replaced.

    Raises:
        ZooError: if there is no row, two have one id, or as `check_folder`.
    """
    if not rows:
        raise ZooError("there is no soup to write")
    check_folder(Path(folder), zoo, "soups_of")
    ids = [row["model_id"] for row in rows]
    twice = sorted({model_id for model_id in ids if ids.count(model_id) > 1})
    if twice:
        raise ZooError(f"{len(twice)} ids are those of several soups, {twice[0]} the first: give each a name")
    return write_derived(zoo, rows, folder, "soups")


def _provenance(soup: Soup, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    chosen_on = {"dataset": rows[0]["dataset"], "role": "selection", "images": soup.num_selection_images}
    return {
        "soup": soup.method,
        "ingredients": [
            {
                "model_id": row["model_id"],
                "weights_sha256": row["weights_sha256"],
                "coefficient": soup.coefficients[row["model_id"]],
            }
            for row in rows
        ],
        "chosen_on": chosen_on if soup.num_selection_images else None,
        "selection_accuracy": soup.selection_accuracy,
        "details": dict(soup.details or {}),
    }
