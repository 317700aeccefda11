"""Store soups as rows of a zoo of their own, with their ingredients as provenance."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vitzoo_hf.apply.made_zoos import check_folder, derived_row, write_derived
from vitzoo_hf.apply.soup.averaging import Soup
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.zoo import Zoo


def soup_row(
    zoo: Zoo, soup: Soup, *, name: str = "", test_loss: float | None = None, test_accuracy: float | None = None
) -> Row:
    """A soup as a row: the columns of the zoo, and a provenance that names every ingredient.

    Columns in which all ingredients agree, such as the parent or a factor, keep their value. Other columns are null,
    and so are results on training images. `epoch` is the latest among the ingredients.

    Args:
        zoo: holds the ingredients.
        soup: the soup to store.
        name: name of the group, a part of the id; other characters than letters, digits and `._=+-` are replaced.
        test_loss: cross-entropy on test images, measured by the caller.
        test_accuracy: accuracy on test images, measured by the caller.

    Raises:
        ZooError: if an ingredient is not in the zoo.
    """
    table = zoo.filter(model_id=soup.ingredients).to_pandas()
    # a filter drops unknown ids without an error, so the numbers are compared
    if len(table) != len(soup.ingredients):
        raise ZooError(f"{zoo.name} holds {len(table)} of the {len(soup.ingredients)} ingredients of this soup")
    rows = records(table)
    run_id = f"soup-{soup.method}" + (f"--{name}" if name else "")
    provenance = _provenance(soup, rows)
    return derived_row(zoo, rows, run_id, soup.weights, provenance, test_loss=test_loss, test_accuracy=test_accuracy)


def write_soups(zoo: Zoo, rows: Sequence[Row], folder: str | Path) -> Path:
    """Write soups as a zoo, with the held-out images of the zoo of their ingredients.

    A soup goes into the split of its ingredients. Of ingredients from several splits, `test` goes before `validation`
    and `validation` before `train`, so that no soup with a test model is trained on.

    Args:
        zoo: the zoo of the ingredients.
        rows: results of `soup_row`.
        folder: the new zoo; an earlier zoo of soups is replaced.

    Raises:
        ZooError: if there is no row, two rows have one id, or `check_folder` refuses the folder.
    """
    if not rows:
        raise ZooError("there is no soup to write: give at least one row of `soup_row`")
    check_folder(Path(folder), zoo, "soups_of")
    ids = [row.model_id for row in rows]
    # the id is the key of every table, and `safe_id` may map two names to one
    twice = sorted({model_id for model_id in ids if ids.count(model_id) > 1})
    if twice:
        raise ZooError(f"{len(twice)} ids belong to several soups, {twice[0]} the first: give every soup a name")
    return write_derived(zoo, rows, folder, "soups")


def _provenance(soup: Soup, rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    images = {"dataset": rows[0]["dataset"], "role": "selection", "images": soup.num_selection_images}
    return {
        "soup": soup.method,
        "ingredients": [
            {
                "model_id": row["model_id"],
                "weights_sha256": row["weights_sha256"],
                "coefficient": soup.coefficients[str(row["model_id"])],
            }
            for row in rows
        ],
        "chosen_on": images if soup.num_selection_images else None,
        "selection_accuracy": soup.selection_accuracy,
        "details": dict(soup.details or {}),
    }
