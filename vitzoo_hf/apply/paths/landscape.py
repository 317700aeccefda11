"""Loss and accuracy on the plane through any three rows of one layout (Garipov et al. 2018, Izmailov et al. 2018).

A slice of resolution R costs R × R evaluations of a network on all images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.apply.candidates import candidate_scores
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import checked_vector

CHUNK_BYTES = 2**28
# Columns that decide what the numbers of a vector mean: a plane through rows that differ in one means nothing.
SAME = ("architecture", "head", "head_hidden", "dataset", "layout")


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane through three vectors, with orthonormal axes by Gram–Schmidt.

    Attributes:
        origin: the first vector.
        axes: two unit vectors; the first points from the first vector to the second.
        corners: coordinates of the three vectors, in units of L2 distance.
    """

    origin: Float64[Tensor, " D"]
    axes: Float64[Tensor, "2 D"]
    corners: Float64[Tensor, "3 2"]

    def at(self, places: Float64[Tensor, "P 2"]) -> Float[Tensor, "P D"]:
        """The vectors at some coordinates, computed in float64 and rounded once."""
        return (self.origin + places @ self.axes).float()


@dataclass(frozen=True, eq=False)
class LandscapeSlice:
    """Loss and accuracy on a grid of a plane.

    Attributes:
        x: coordinates along the first axis, in units of L2 distance between weights.
        y: coordinates along the second axis.
        loss: mean cross-entropy in nats at every point.
        accuracy: share of right predictions at every point.
        corners: coordinates of the three rows.
        model_ids: ids of the three rows.
    """

    x: Float64[Tensor, " W"]
    y: Float64[Tensor, " H"]
    loss: Float64[Tensor, "H W"]
    accuracy: Float64[Tensor, "H W"]
    corners: Float64[Tensor, "3 2"]
    model_ids: list[str]


def plane_through(vectors: Float[Tensor, "3 D"]) -> Plane:
    """The plane through three points of weight space.

    Raises:
        ZooError: if the points lie on one line, or two are equal.

    Example:
        >>> plane_through(torch.tensor([[0.0, 0, 0], [3, 0, 0], [1, 2, 0]])).corners
        tensor([[0., 0.],
                [3., 0.],
                [1., 2.]], dtype=torch.float64)
    """
    # float64, because nearly parallel differences of float32 weights cancel
    origin, second, third = vectors.double()
    first = second - origin
    length = first.norm()
    rest = third - origin
    axis = first / length if length > 0 else first
    along = rest @ axis
    rest = rest - along * axis
    along = along + rest @ axis  # a second sweep: of nearly parallel vectors the first leaves rounding behind
    rest = rest - (rest @ axis) * axis
    height = rest.norm()
    # below this share the height is rounding of float32 weights, and its direction is noise
    if not length > 0 or height <= 1e-6 * length:
        raise ZooError("these three models lie on one line of weight space, or two are equal: take other rows")
    zero = torch.zeros_like(length)
    corners = torch.stack([torch.stack(pair) for pair in ((zero, zero), (length, zero), (along, height))])
    return Plane(origin, torch.stack([axis, rest / height]), corners)


def landscape_slice(
    rows: Sequence[RowLike],
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    *,
    resolution: int = 21,
    margin: float = 0.25,
    device: str | torch.device = "cpu",
) -> LandscapeSlice:
    """Loss and accuracy on a grid over the plane through three rows.

    Args:
        rows: three rows of `Zoo.rows()` with one layout and dataset.
        images: normalised images, ready for the models.
        labels: one class an image.
        resolution: number of points a side.
        margin: distance of the grid's border from the rows, as a share of their extent.
        device: where models run.

    Raises:
        ZooError: if there are not three rows, they differ in layout or dataset or lie on one line, or the
            resolution is below 2.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> zoo = Zoo.sample().filter(stage="finetune", head="linear")
        >>> images, labels = zoo.probes("digits")
        >>> landscape_slice(list(zoo.rows()), images[:32], labels[:32], resolution=3).loss.shape
        torch.Size([3, 3])
    """
    if len(rows) != 3 or resolution < 2:
        raise ZooError(
            f"{len(rows)} rows and resolution {resolution}; a plane takes 3 rows, and 2 points a side or more"
        )
    members = [Row.of(row) for row in rows]
    for column in SAME:
        values = {str(row[column]) for row in members}
        if len(values) > 1:
            raise ZooError(f"a plane takes rows of one {column}, and these have {', '.join(sorted(values))}")
    plane = plane_through(torch.stack([checked_vector(row)[0] for row in members]))
    low, high = plane.corners.min(0).values, plane.corners.max(0).values
    extent = margin * (high - low)
    steps = torch.linspace(0, 1, resolution, dtype=torch.float64)
    x, y = ((low - extent)[axis] + steps * (high - low + 2 * extent)[axis] for axis in (0, 1))
    places = torch.stack([x.repeat(resolution), y.repeat_interleave(resolution)], 1)
    chunk = max(1, CHUNK_BYTES // (12 * len(plane.origin)))  # a point in float64 and its copy in float32
    scores = [
        candidate_scores(plane.at(part), members[0], images, labels, device=device) for part in places.split(chunk)
    ]
    shape = (resolution, resolution)
    loss, accuracy = (torch.cat([getattr(part, name) for part in scores]).cpu() for name in ("loss", "accuracy"))
    ids = [row.model_id for row in members]
    return LandscapeSlice(x, y, loss.view(shape), accuracy.view(shape), plane.corners, ids)
