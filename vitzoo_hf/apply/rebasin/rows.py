"""Write rows that are aligned to one row as a zoo of their own."""

import json
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from vitzoo_hf.apply.made_zoos import check_folder, made_manifest
from vitzoo_hf.apply.rebasin.rebasin import matching_images, rebasin
from vitzoo_hf.apply.rebasin.symmetries import FAMILIES, check_families
from vitzoo_hf.format.gate.values import parse_provenance
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError, weights_sha256
from vitzoo_hf.publish.folder import Rows, write_zoo
from vitzoo_hf.zoo import Zoo

NARROWING = ("head", "stage", "dataset", "head_hidden", "architecture")
"""Columns that may distinguish layouts, the most familiar first."""


def aligned_row(target_row: RowLike, row: RowLike, **options: Any) -> dict[str, object]:
    """Align a row to another row, with a new hash, and a provenance that states the options.

    The target row itself comes back in the form in which the families are aligned.

    Args:
        target_row: the row to align to.
        row: the row to move.
        options: options of `rebasin`.

    Raises:
        ZooError: if `rebasin` refuses the rows or options.
    """
    target_row, row = Row.of(target_row), Row.of(row)
    result = rebasin(target_row, row, **options)
    # the target's form changes with the families, so it is stored like the rows aligned to it
    is_target = row.model_id == target_row.model_id
    weights = (result.target if is_target else result.aligned).numpy()
    # images are too large for a provenance, and the device is no property of the result
    settings = {name: value for name, value in options.items() if name not in ("images", "device")}
    note = {"reference": target_row.model_id, **settings}
    provenance = json.dumps({**parse_provenance(row["provenance"], row["model_id"]), "rebasin": note})
    # the weights differ from those of the source, so its hash would fail at the next reading
    columns = {"weights": weights, "weights_sha256": weights_sha256(weights), "dtype": "float32"}
    return {**row, **columns, "provenance": provenance}


def _narrowing(table: pd.DataFrame, reference: str) -> str:
    """The fewest conditions that leave the layout of the reference alone, as options of the command line."""
    target = table[table["model_id"] == reference].iloc[0]
    differing = [name for name in NARROWING if table[name].nunique(dropna=False) > 1 and pd.notna(target[name])]
    for count in range(1, len(differing) + 1):
        for names in combinations(differing, count):
            matching = (table[list(names)] == target[list(names)]).all(axis=1)
            if table.loc[matching, "layout"].nunique() == 1:
                return " ".join(f"--where {name}={target[name]}" for name in names)
    return f"--where layout={target['layout']}"


def rebasin_zoo(
    zoo: Zoo,
    reference: str,
    folder: Path,
    *,
    families: Sequence[str] = FAMILIES,
    by: str = "weights",
    restarts: int = 0,
    sweeps: int = 50,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Path:
    """Write the rows of a filtered zoo, all aligned to one of them, as a zoo of their own.

    One row is in memory at a time. The function of every row is unchanged to rounding; its hash is new, and its
    provenance states the options.

    Args:
        zoo: the rows, of one architecture and head.
        reference: id of the row of `zoo` to align to; its weights change only to the canonical form of `invertible`
            and `rotation`.
        folder: the new zoo; an earlier zoo of aligned models is replaced.
        families: see `rebasin`.
        by: see `rebasin`; selection images are drawn by the seed.
        restarts: see `rebasin`.
        sweeps: see `rebasin`.
        seed: see `rebasin`.
        device: see `rebasin`.
        progress: show a bar.

    Raises:
        ZooError: if a row does not fit the reference, or `check_folder` refuses the folder.
    """
    families = check_families(families)
    check_folder(folder, zoo, "rebasin_of")
    target = zoo.row(reference)
    layouts = set(zoo.index["layout"])
    if len(layouts) > 1:
        raise ZooError(
            f"the rows have {len(layouts)} layouts; re-basin aligns models of one: narrow them down by"
            f" {_narrowing(zoo.to_pandas(), reference)}"
        )
    # drawn once, so that all rows are matched on equal images
    images = matching_images(zoo, str(target.dataset), seed) if by != "weights" else None
    align = partial(aligned_row, target, families=families, by=by, images=images, restarts=restarts)
    align = partial(align, sweeps=sweeps, seed=seed, device=device)
    splits = {split: zoo.filter(split=split) for split in zoo.splits}
    parts = {
        split: Rows(len(part), int(target["num_parameters"]), map(align, part.rows()))
        for split, part in splits.items()
        if len(part)
    }
    datasets = set(zoo.index["dataset"])
    probes = {
        role: [row for row in zoo.probe_rows(role) if row["dataset"] in datasets] for role in ("selection", "test")
    }
    # rows stay runs of the blueprint, so the zoo is also a subset of its source
    manifest = made_manifest(zoo, "rebasin_of") | {"subset_of": zoo.manifest["blueprint_fingerprint"]}
    write_zoo(folder, manifest, parts, probes, zoo.blueprint_text, progress=progress)
    return folder
