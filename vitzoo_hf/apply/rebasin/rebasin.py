"""Re-basin: move a row towards another row by symmetries of the architecture, which do not change its function."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.apply.candidates import check_images
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
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import checked_vector
from vitzoo_hf.zoo import Zoo

WAYS = ("weights", "activations", "both")
"""`both` descends by weights from the result of activations."""
MATCHING_IMAGES = 512


@dataclass(frozen=True)
class Rebasin:
    """A row aligned to another row, the target.

    Attributes:
        target: weights of the target row, float32; in canonical form where `invertible` or `rotation` is among the
            families.
        aligned: weights close to the target, with the function of the row.
        symmetry: the symmetry that was applied to the weights of the row, or to their canonical form.
        distance_before: ‖target row − row‖ of weights as stored.
        distance_unaligned: the distance of target and row in the form that is aligned, before alignment. Where
            `invertible` or `rotation` is among the families, compare `distance` with this distance.
        distance: ‖target − aligned‖.
    """

    target: Float[Tensor, " D"]
    aligned: Float[Tensor, " D"]
    symmetry: Symmetry
    distance_before: float
    distance_unaligned: float
    distance: float


def rebasin(
    target_row: RowLike,
    row: RowLike,
    *,
    families: Sequence[str] = FAMILIES,
    by: str = "weights",
    images: Float[Tensor, "N C H W"] | None = None,
    restarts: int = 0,
    sweeps: int = 50,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Rebasin:
    """Align a row to another row of its layout; the functions of both do not change.

    Args:
        target_row: the row to align to.
        row: the row to move.
        families: families of symmetries to use, out of `FAMILIES`.
        by: `weights`; `activations` on images; or `both`, by weights from the result of activations.
        images: selection images, normalised, for activations.
        restarts: number of further descents by weights from random starts; the closest result is returned.
        sweeps: largest number of sweeps of a descent.
        seed: seed of the order of parts and of random starts.
        device: where the alignment is computed.

    Raises:
        ZooError: if layouts differ, a weight is not finite, a family or the way is unknown, restarts are below 0,
            activations have no images, or the symmetries of the architecture are not known.

    Example:
        >>> zoo = Zoo.sample().filter(stage="finetune", head="linear")
        >>> row, other = list(zoo.rows())[:2]
        >>> result = rebasin(row, other, families=("mlp", "heads", "maps"))
        >>> result.distance <= result.distance_before
        True
    """
    families = check_families(families)
    if restarts < 0:
        raise ZooError(f"{restarts} restarts: expected 0 or more")
    check_same_layout(target_row, row)
    _check_way_and_images(by, target_row, images)
    sizes, layout = sizes_of(target_row)
    vectors = [finite_weights(values) for values in (target_row, row)]
    target, source = (to_tensors(vector.to(device), layout) for vector in vectors)
    before = squared_distance(target, source) ** 0.5  # `prepare` changes weights, but no function
    for tensors in (target, source):
        prepare(tensors, sizes, families)
    unaligned = squared_distance(target, source) ** 0.5
    symmetry: Symmetry | None = None
    if by != "weights":
        assert images is not None
        symmetry = align_by_activations(target, source, target_row, sizes, families, images, device=device)
    if by != "activations":
        symmetry = align_by_weights(
            target, source, sizes, families, seed=seed, restarts=restarts, sweeps=sweeps, start=symmetry
        ).symmetry
    assert symmetry is not None
    transform(source, symmetry)  # from the prepared source: the rounding of many steps does not add up
    distance = squared_distance(target, source) ** 0.5
    moved = [to_vector(tensors, like) for tensors, like in ((target, vectors[0]), (source, vectors[1]))]
    return Rebasin(moved[0], moved[1], symmetry, before, unaligned, distance)


def check_way(by: str) -> None:
    """Refuse an unknown way of alignment.

    Raises:
        ZooError: if `by` is none of `WAYS`.
    """
    if by not in WAYS:
        raise ZooError(f"unknown way of alignment {by!r}: {did_you_mean(by, WAYS)}")


def _check_way_and_images(by: str, like: RowLike, images: Tensor | None) -> None:
    check_way(by)
    if by != "weights":
        if images is None:
            raise ZooError(f"no images were given for alignment by {by}: give selection images")
        check_images(like, images)


def finite_weights(row: RowLike) -> Float[Tensor, " D"]:
    """The vector of a row, which must be finite.

    Raises:
        ZooError: if a weight is not finite; the message names the row.
    """
    vector = checked_vector(row)[0]
    # checked here, since NaN would only surface in an assignment deep in the descent
    bad = int((~vector.isfinite()).sum())
    if bad:
        raise ZooError(
            f"{Row.of(row).name} has {bad} weights that are not finite: name another model, or leave this one out"
            " with --where"
        )
    return vector


def check_same_layout(target: RowLike, row: RowLike) -> None:
    """Refuse two rows that differ in architecture, head or layout.

    Raises:
        ZooError: if they differ; the message names the first such column.
    """
    target, row = Row.of(target), Row.of(row)
    for name in ("architecture", "architecture_args", "head", "head_hidden"):
        if target.get(name) != row.get(name):
            raise ZooError(
                f"{row.name} has {name} {row.get(name)}, {target.name} has {target.get(name)}:"
                " re-basin aligns models of one architecture and head"
            )
    if target.layout != row.layout:
        raise ZooError(
            f"{row.name} has layout {row.layout}, {target.name} {target.layout}: re-basin aligns models of one layout"
        )


def matching_images(zoo: Zoo, dataset: str, seed: int = 0) -> Float[Tensor, "N C H W"]:
    """At most `MATCHING_IMAGES` selection images to match activations on, drawn by a seed."""
    return some_images(*zoo.probes(dataset, "selection"), MATCHING_IMAGES, seed)[0]


def some_images(images: Tensor, labels: Tensor, most: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """At most `most` labelled images, drawn by a seed, in their order; None for all.

    Raises:
        ZooError: if `most` is below 1.
    """
    if most is not None and most < 1:
        raise ZooError(f"{most} images: expected at least 1")
    # no draw where all images fit, so results then do not depend on the seed
    if most is None or len(images) <= most:
        return images, labels
    # sorted, because the order of images changes sums by rounding
    places = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:most].sort().values
    return images[places], labels[places]
