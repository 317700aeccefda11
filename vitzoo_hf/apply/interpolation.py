"""Loss and accuracy of networks along a path between weight vectors.

A path of T points costs T evaluations of a network on all images.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.apply.candidates import candidate_scores, check_vectors
from vitzoo_hf.format.row import RowLike
from vitzoo_hf.format.schema import ZooError

TOGETHER = 100_000_000
"""Most weights of points in memory at once: 400 MB of float32."""


class PathScores(NamedTuple):
    """Mean cross-entropy in nats and accuracy at positions from 0 to 1 along a path."""

    positions: Float64[Tensor, " T"]
    loss: Float64[Tensor, " T"]
    accuracy: Float64[Tensor, " T"]

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the line between its values at the ends, in nats; 0 without a rise."""
        return barrier(self.loss, self.positions)

    @property
    def accuracy_barrier(self) -> float:
        """Largest fall of the accuracy below the line between its values at the ends; 0 without a fall."""
        return barrier(1 - self.accuracy, self.positions)

    @property
    def connectivity(self) -> float:
        """The mode connectivity of the error rates; see `mode_connectivity`."""
        return mode_connectivity(1 - self.accuracy)

    @property
    def midpoint(self) -> int:
        """Index of the position closest to ½."""
        # an even number of points has no position at 1/2; of two equally close the first counts
        return int((self.positions - 0.5).abs().argmin())


def positions(count: int) -> Float64[Tensor, " T"]:
    """Positions at equal steps from 0 to 1, both ends included.

    Raises:
        ZooError: for fewer than 3 positions, which would leave out the middle.
    """
    if count < 3:
        raise ZooError(f"a path of {count} points has no middle: give at least 3")
    return torch.linspace(0, 1, count, dtype=torch.float64)


def barrier(values: Float64[Tensor, " T"], positions: Float64[Tensor, " T"]) -> float:
    """Largest rise of values above the line between the first and the last value; never below 0.

    Example:
        >>> t = positions(3)
        >>> barrier(torch.tensor([1.0, 5.0, 3.0]).double(), t)
        3.0
    """
    line = (1 - positions) * values[0] + positions * values[-1]
    # rounding of the line may lie below 0 at its ends, where the rise is 0 by definition
    return float((values - line).max().clamp_min(0))


def mode_connectivity(errors: Float64[Tensor, " T"]) -> float:
    """The measure ½ (e(0) + e(1)) − e(t*), with t* where the error is farthest from the mean of the ends.

    Source: Yang et al. 2021. A measure below 0 means a barrier, 0 means that the ends are connected, and above 0 the
    path goes through better networks. Exchanging the ends does not change the measure.

    Args:
        errors: error rates at positions along a path, both ends included.

    Raises:
        ZooError: for fewer than 3 errors, because then no position lies between the ends.

    Example:
        >>> mode_connectivity(torch.tensor([0.25, 0.75, 0.25]).double())
        -0.5
    """
    if len(errors) < 3:
        raise ZooError(f"{len(errors)} errors have none between the ends of a path: give at least 3")
    # The ends are left out: both are equally far from their mean, so as t* they would depend on their order. Of
    # interior points that are equally far, the one with the higher error counts.
    rises = errors[1:-1] - (errors[0] + errors[-1]) / 2
    farthest = rises[rises.abs() == rises.abs().max()].max()
    return -float(farthest)


def straight_points(
    first: Float[Tensor, " D"], last: Float[Tensor, " D"], positions: Float64[Tensor, " T"]
) -> Float[Tensor, "T D"]:
    """The points (1 − t) first + t last."""
    t = positions.to(first)[:, None]
    return (1 - t) * first + t * last


def bezier_points(
    first: Float[Tensor, " D"],
    control: Float[Tensor, " D"],
    last: Float[Tensor, " D"],
    positions: Float64[Tensor, " T"],
) -> Float[Tensor, "T D"]:
    """The points (1 − t)² first + 2 t (1 − t) control + t² last."""
    t = positions.to(first)[:, None]
    return (1 - t) ** 2 * first + 2 * t * (1 - t) * control + t**2 * last


def path_scores(
    first: Float[Tensor, " D"],
    last: Float[Tensor, " D"],
    like: RowLike,
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    *,
    control: Float[Tensor, " D"] | None = None,
    points: int = 11,
    device: str | torch.device = "cpu",
) -> PathScores:
    """Loss and accuracy along the straight path between two networks, or along a Bézier curve.

    Args:
        first: weights at t = 0, float32.
        last: weights at t = 1, in the same layout.
        like: a row with the architecture and head of the networks.
        images: normalised images, ready for the networks.
        labels: one class an image.
        control: control point of a Bézier curve; None for the straight path.
        points: number of positions at equal steps, both ends included.
        device: where the networks run.

    Raises:
        ZooError: for fewer than 3 points, or weights or images that do not fit `like`.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> zoo = Zoo.sample().filter(stage="finetune", head="linear")
        >>> row, other = list(zoo.rows())[:2]
        >>> ends = [torch.from_numpy(values["weights"]) for values in (row, other)]
        >>> path = path_scores(*ends, row, *zoo.probes("digits"), points=5)
        >>> path.loss.shape, path.barrier >= 0
        (torch.Size([5]), True)
    """
    at = positions(points)
    check_vectors(like, *(vector for vector in (first, last, control) if vector is not None))
    # at least one point, for networks beyond the bound
    step = max(1, TOGETHER // len(first))
    parts = []
    for part in at.split(step):
        ends = (first, last)
        weights = straight_points(*ends, part) if control is None else bezier_points(first, control, last, part)
        parts.append(candidate_scores(weights, like, images, labels, device=device))
    loss, accuracy = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    return PathScores(at, loss, accuracy)
