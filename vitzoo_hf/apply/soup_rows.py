"""Soups as rows of a zoo of their own, with their ingredients as provenance."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vitzoo_hf import schema
from vitzoo_hf.apply.destinations import check_folder, made_manifest
from vitzoo_hf.apply.soup import Soup
from vitzoo_hf.rebuild import VerifiedRow
from vitzoo_hf.row_tables import records
from vitzoo_hf.schema import ZooError
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo_folder import Rows, write_zoo

SHARED = ("parent_id", "stage", "dataset", "architecture", "architecture_args", "head", "head_hidden", "layout")


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
    own = re.sub(r"[^A-Za-z0-9._=+-]+", ".", f"soup-{soup.method}" + (f"--{name}" if name else ""))
    epoch = max(row["epoch"] for row in rows)
    vector = soup.weights.cpu().numpy()
    results = dict.fromkeys(schema.RESULTS) | {"test_loss": test_loss, "test_accuracy": test_accuracy}
    row = {"model_id": schema.model_id(own, epoch), "run_id": own, "epoch": epoch, "is_final": True}
    row |= {column: _shared(rows, column) for column in (*SHARED, *zoo.factors)}
    row |= results | {"num_parameters": len(vector), "weights_sha256": schema.weights_sha256(vector)}
    row |= {"dtype": "float32", "provenance": _provenance(zoo, soup, rows), "weights": vector}
    order = [*schema.row_features(zoo.manifest["factors"])]
    return VerifiedRow({column: row[column] for column in order} | {"split": _split(list(table["split"]))})


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
    members = {split: [row for row in rows if row["split"] == split] for split in schema.SPLITS}
    splits = {
        split: Rows(
            len(part),
            max((row["num_parameters"] for row in part), default=0),
            iter([{name: value for name, value in row.items() if name != "split"} for row in part]),
        )
        for split, part in members.items()
    }
    used = {row["dataset"] for row in rows}
    probes = {role: [row for row in zoo.probe_rows(role) if row["dataset"] in used] for role in ("selection", "test")}
    manifest = made_manifest(zoo, "soups_of")
    manifest |= {"name": f"{manifest['name']}-soups", "missing_runs": {}}
    write_zoo(Path(folder), manifest, splits, probes, zoo.blueprint_text)
    return Path(folder)


def _shared(rows: Sequence[Mapping[str, Any]], column: str) -> Any:
    """The value that all rows have in a column, or None."""
    values = {row[column] for row in rows}
    return values.pop() if len(values) == 1 else None


def _split(splits: Sequence[str]) -> str:
    return max(splits, key=schema.SPLITS.index)


def _provenance(zoo: Zoo, soup: Soup, rows: Sequence[Mapping[str, Any]]) -> str:
    chosen_on = {"dataset": rows[0]["dataset"], "role": "selection", "images": soup.num_selection_images}
    record: dict[str, Any] = {
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
        "zoo": {"name": zoo.manifest["name"], "blueprint_fingerprint": zoo.manifest["blueprint_fingerprint"]},
        "versions": {"vitzoo_hf": schema.VERSION, "torch": torch.__version__},
    }
    return schema.canonical_json(record)
