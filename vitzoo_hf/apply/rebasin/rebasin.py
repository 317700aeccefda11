"""Re-basin: rows moved by symmetries of their architecture towards another row, their functions unchanged.

`rebasin` aligns one row to another; `rebasin_zoo` writes a zoo of rows that are all aligned to one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.apply.candidates import check_images
from vitzoo_hf.apply.made_zoos import check_folder, made_manifest
from vitzoo_hf.apply.rebasin.by_activations import align_by_activations
from vitzoo_hf.apply.rebasin.by_weights import align_by_weights, squared_distance
from vitzoo_hf.apply.rebasin.canonical import prepare
from vitzoo_hf.apply.rebasin.symmetries import (
    FAMILIES,
    Symmetry,
    check_families,
    sizes_of,
    to_tensors,
    to_vector,
    transform,
)
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError, weights_sha256
from vitzoo_hf.models.rebuild import checked_vector
from vitzoo_hf.publish.folder import Rows, write_zoo
from vitzoo_hf.zoo import Zoo

WAYS = ("weights", "activations", "both")
"""`both` descends by weights from where activations lead."""
MATCHING_IMAGES = 512
NARROWING = ("head", "stage", "dataset", "head_hidden", "architecture")
"""Columns to tell layouts apart by, best known first."""


@dataclass(frozen=True)
class Rebasin:
    """A row aligned to another.

    Attributes:
        target: weights to which was aligned, float32: those of the row, or its canonical form where `invertible` or
            `rotation` is among the families.
        aligned: weights of the other row's function, close to the target.
        symmetry: that was applied to the other row's weights, or to their canonical form.
        distance_before: ‖target row − other row‖ of weights as stored.
        distance_unaligned: the same of both in the form that is aligned, before alignment: where `invertible` or
            `rotation` is among the families, `distance` compares with this one, not with `distance_before`.
        distance: ‖target − aligned‖.
    """

    target: Float[Tensor, " D"]
    aligned: Float[Tensor, " D"]
    symmetry: Symmetry
    distance_before: float
    distance_unaligned: float
    distance: float


def rebasin(
    target_row: Mapping[str, Any],
    row: Mapping[str, Any],
    *,
    families: Sequence[str] = FAMILIES,
    by: str = "weights",
    images: Float[Tensor, "N C H W"] | None = None,
    restarts: int = 0,
    sweeps: int = 50,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Rebasin:
    """Align a row to another of the same layout; the functions of both stay as they are.

    Args:
        target_row: to which is aligned.
        row: to be changed.
        families: of symmetries to use, out of `FAMILIES`.
        by: `weights`; `activations` on images; or `both`, by weights from where activations lead.
        images: as the models are fed them, for activations; take selection images.
        restarts: further descents by weights from random starts; the closest is kept.
        sweeps: of a descent at most.
        seed: of the order of parts and of random starts.
        device: where it is computed.

    Raises:
        ZooError: if layouts differ, a weight is not finite, families or the way are unknown, restarts are below 0,
            there are no images where they are needed, or the architecture's symmetries are not known.

    Example:
        >>> zoo = Zoo.sample().filter(stage="finetune", head="linear")
        >>> row, other = list(zoo.rows())[:2]
        >>> found = rebasin(row, other, families=("mlp", "heads", "maps"))
        >>> found.distance <= found.distance_before
        True
    """
    chosen = check_families(families)
    if restarts < 0:
        raise ZooError(f"{restarts} restarts: expected 0 or more")
    check_same_layout(target_row, row)
    _check_way_and_images(by, target_row, images)
    sizes, layout = sizes_of(target_row)
    vectors = [finite_weights(values) for values in (target_row, row)]
    target, source = (to_tensors(vector.to(device), layout) for vector in vectors)
    before = squared_distance(target, source) ** 0.5
    for tensors in (target, source):
        prepare(tensors, sizes, chosen)
    unaligned = squared_distance(target, source) ** 0.5
    symmetry: Symmetry | None = None
    if by != "weights":
        assert images is not None
        symmetry = align_by_activations(target, source, target_row, sizes, chosen, images, device=device)
    if by != "activations":
        symmetry = align_by_weights(
            target, source, sizes, chosen, seed=seed, restarts=restarts, sweeps=sweeps, start=symmetry
        ).symmetry
    assert symmetry is not None
    transform(source, symmetry)
    distance = squared_distance(target, source) ** 0.5
    moved = [to_vector(tensors, like) for tensors, like in ((target, vectors[0]), (source, vectors[1]))]
    return Rebasin(moved[0], moved[1], symmetry, before, unaligned, distance)


def check_way(by: str) -> None:
    """Refuse an unknown way of alignment.

    Raises:
        ZooError: if it is none of `WAYS`.
    """
    if by not in WAYS:
        raise ZooError(f"unknown way of alignment {by!r}: {did_you_mean(by, WAYS)}")


def _check_way_and_images(by: str, like: Mapping[str, Any], images: Tensor | None) -> None:
    check_way(by)
    if by != "weights":
        if images is None:
            raise ZooError(f"alignment by {by} needs images; none were given")
        check_images(like, images)


def finite_weights(row: Mapping[str, Any]) -> Float[Tensor, " D"]:
    """The vector of a row.

    Raises:
        ZooError: if a weight is not finite, naming the row.
    """
    vector = checked_vector(row)[0]
    bad = int((~vector.isfinite()).sum())
    if bad:
        raise ZooError(
            f"{row.get('model_id')} has {bad} weights that are not finite: name another model, or leave this one out"
            " with --where"
        )
    return vector


def check_same_layout(target: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Refuse two rows of several architectures or heads.

    Raises:
        ZooError: with the first column in which they differ.
    """
    names = ("architecture", "architecture_args", "head", "head_hidden")
    for name in names:
        if target.get(name) != row.get(name):
            raise ZooError(
                f"{row.get('model_id')} has {name} {row.get(name)}, {target.get('model_id')} has {target.get(name)}:"
                " re-basin aligns models of one architecture and head"
            )
    if target.get("layout") != row.get("layout"):
        raise ZooError(
            f"{row.get('model_id')} has layout {row.get('layout')}, {target.get('model_id')} {target.get('layout')}:"
            " re-basin aligns models of one layout"
        )


def matching_images(zoo: Zoo, dataset: str, seed: int = 0) -> Float[Tensor, "N C H W"]:
    """Selection images to match activations on: at most `MATCHING_IMAGES`, drawn by a seed."""
    return some_images(*zoo.probes(dataset, "selection"), MATCHING_IMAGES, seed)[0]


def some_images(images: Tensor, labels: Tensor, most: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """At most so many labelled images, drawn by a seed and in their order; None for all.

    Raises:
        ZooError: for fewer than 1.
    """
    if most is not None and most < 1:
        raise ZooError(f"{most} images: expected at least 1")
    if most is None or len(images) <= most:
        return images, labels
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:most].sort().values
    return images[chosen], labels[chosen]


def aligned_row(target_row: Mapping[str, Any], row: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """A row aligned to another, with its new hash, and in its provenance what was done.

    The target row itself comes back in the form that the families are aligned in.

    Args:
        target_row: to which is aligned.
        row: to be changed.
        options: of `rebasin`.

    Raises:
        ZooError: as `rebasin` does.
    """
    found = rebasin(target_row, row, **options)
    is_target = row["model_id"] == target_row["model_id"]
    weights = (found.target if is_target else found.aligned).numpy()
    noted = {name: value for name, value in options.items() if name not in ("images", "device")}
    note = {"reference": target_row["model_id"], **noted}
    about = json.dumps({**json.loads(row["provenance"] or "{}"), "rebasin": note})
    fresh = {"weights": weights, "weights_sha256": weights_sha256(weights), "dtype": "float32", "provenance": about}
    return {**row, **fresh}


def _narrowing(table: pd.DataFrame, reference: str) -> str:
    """The fewest conditions after which rows are of one layout with the reference, as they are typed."""
    wanted = table[table["model_id"] == reference].iloc[0]
    differing = [name for name in NARROWING if table[name].nunique(dropna=False) > 1 and pd.notna(wanted[name])]
    for count in range(1, len(differing) + 1):
        for names in combinations(differing, count):
            kept = (table[list(names)] == wanted[list(names)]).all(axis=1)
            if table.loc[kept, "layout"].nunique() == 1:
                return " ".join(f"--where {name}={wanted[name]}" for name in names)
    return f"--where layout={wanted['layout']}"


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

    One row is in memory at a time.

    Each row computes what it did before, to rounding; its hash is new, and its provenance says what was done.

    Args:
        zoo: the rows, of one architecture and head.
        reference: id of the row to align to, which is among them; its own weights change only to the canonical form
            of `invertible` and `rotation`.
        folder: for the new zoo; an earlier one of aligned models is replaced.
        families: see `rebasin`; so are `by`, `restarts`, `sweeps`, `seed` and `device`.
        progress: show a bar.

    Raises:
        ZooError: if a row does not fit the reference, or as `check_folder`.
    """
    chosen = check_families(families)
    check_folder(folder, zoo, "rebasin_of")
    target = zoo.row(reference)
    layouts = set(zoo.index["layout"])
    if len(layouts) > 1:
        raise ZooError(
            f"the rows have {len(layouts)} layouts; re-basin aligns models of one: narrow them down by"
            f" {_narrowing(zoo.to_pandas(), reference)}"
        )
    images = matching_images(zoo, target["dataset"], seed) if by != "weights" else None
    options: dict[str, Any] = {"families": chosen, "by": by, "images": images, "restarts": restarts}
    options |= {"sweeps": sweeps, "seed": seed, "device": device}
    splits = {split: zoo.filter(split=split) for split in zoo.splits}
    parts = {
        split: Rows(
            len(part), int(target["num_parameters"]), (aligned_row(target, row, **options) for row in part.rows())
        )
        for split, part in splits.items()
        if len(part)
    }
    used = set(zoo.index["dataset"])
    probes = {role: [row for row in zoo.probe_rows(role) if row["dataset"] in used] for role in ("selection", "test")}
    manifest = made_manifest(zoo, "rebasin_of") | {"subset_of": zoo.manifest["blueprint_fingerprint"]}
    write_zoo(folder, manifest, parts, probes, zoo.blueprint_text, progress=progress)
    return folder
