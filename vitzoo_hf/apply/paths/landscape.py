"""Loss and accuracy on the plane through any three rows of one layout (Garipov et al. 2018, Izmailov et al. 2018)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.apply.candidates import candidate_scores
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import checked_vector

CHUNK_BYTES = 2**28
SAME = ("architecture", "head", "head_hidden", "dataset", "layout")


@dataclass(frozen=True, eq=False)
class Plane:
    """The plane through three vectors, with orthonormal axes by Gram–Schmidt.

    Attributes:
        origin: the first vector.
        axes: unit vectors; the first points from the first vector to the second.
        corners: coordinates of the three vectors, in units of L2 distance.
    """

    origin: Float64[Tensor, " D"]
    axes: Float64[Tensor, "2 D"]
    corners: Float64[Tensor, "3 2"]

    def at(self, places: Float64[Tensor, "M 2"]) -> Float[Tensor, "M D"]:
        """The vectors at these coordinates, computed in float64 and rounded once."""
        return (self.origin + places @ self.axes).float()


@dataclass(frozen=True, eq=False)
class LandscapeSlice:
    """Loss and accuracy on a grid of a plane.

    Attributes:
        x: coordinates along the first axis, in units of L2 distance between weights.
        y: along the second.
        loss: mean cross-entropy in nats.
        accuracy: share of right predictions.
        corners: coordinates of the three rows.
        model_ids: of the three rows.
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
        ZooError: if they lie on one line, or two are the same.

    Example:
        >>> plane_through(torch.tensor([[0.0, 0, 0], [3, 0, 0], [1, 2, 0]])).corners
        tensor([[0., 0.],
                [3., 0.],
                [1., 2.]], dtype=torch.float64)
    """
    origin, second, third = vectors.double()
    first = second - origin
    length = first.norm()
    rest = third - origin
    across = first / length if length > 0 else first
    along = rest @ across
    rest = rest - along * across
    along = along + rest @ across  # a second sweep: of nearly parallel vectors the first leaves rounding behind
    rest = rest - (rest @ across) * across
    height = rest.norm()
    if not length > 0 or height <= 1e-6 * length:
        raise ZooError("these three models lie on one line of weight space, or two are the same: take other rows")
    zero = torch.zeros_like(length)
    corners = torch.stack([torch.stack(pair) for pair in ((zero, zero), (length, zero), (along, height))])
    return Plane(origin, torch.stack([across, rest / height]), corners)


def landscape_slice(
    rows: Sequence[Mapping[str, Any]],
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
        images: normalised as the models are fed them.
        labels: of `images`.
        resolution: points a side.
        margin: how far the grid goes beyond the rows, as a share of their extent.
        device: where models run.

    Raises:
        ZooError: for other than three rows, rows of several layouts or datasets or on one line, or a resolution
            below 2.

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
    for column in SAME:
        values = {str(row[column]) for row in rows}
        if len(values) > 1:
            raise ZooError(f"a plane takes rows of one {column}, and these have {', '.join(sorted(values))}")
    plane = plane_through(torch.stack([checked_vector(row)[0] for row in rows]))
    low, high = plane.corners.min(0).values, plane.corners.max(0).values
    extent = margin * (high - low)
    steps = torch.linspace(0, 1, resolution, dtype=torch.float64)
    x, y = ((low - extent)[axis] + steps * (high - low + 2 * extent)[axis] for axis in (0, 1))
    places = torch.stack([x.repeat(resolution), y.repeat_interleave(resolution)], 1)
    chunk = max(1, CHUNK_BYTES // (12 * len(plane.origin)))
    scores = [
        candidate_scores(plane.at(part), rows[0], images, labels, device=device) for part in places.split(chunk)
    ]
    shape = (resolution, resolution)
    loss, accuracy = (torch.cat([getattr(part, name) for part in scores]).cpu() for name in ("loss", "accuracy"))
    ids = [row["model_id"] for row in rows]
    return LandscapeSlice(x, y, loss.view(shape), accuracy.view(shape), plane.corners, ids)


def draw_slice(slice: LandscapeSlice, path: str | Path, *, title: str, names: Sequence[str] | None = None) -> Path:
    """Loss (log scale) and accuracy side by side as a PNG, with the three rows marked.

    Args:
        slice: of `landscape_slice`.
        path: the file.
        title: of the figure.
        names: of the three rows; by default their ids.

    Raises:
        ZooError: if the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from vitzoo_hf.report.style import INK, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11, weight="bold")
        panels = (
            ("log10 of cross-entropy", slice.loss.log10(), "viridis_r"),
            ("accuracy", slice.accuracy, "viridis"),
        )
        for axes, (told, values, colours) in zip(figure.subplots(1, 2), panels, strict=True):
            drawn = axes.contourf(slice.x.numpy(), slice.y.numpy(), values.numpy(), 24, cmap=colours)
            figure.colorbar(drawn, ax=axes, label=told)
            axes.plot(*slice.corners.T.numpy(), "o", color="white", markeredgecolor=INK)
            for place, name in zip(slice.corners.tolist(), names or slice.model_ids, strict=True):
                axes.annotate(name, place, (4, 5), textcoords="offset points", fontsize=7, color="white")
            axes.grid(False)
            axes.set(xlabel="L2 distance", ylabel="L2 distance", aspect="equal")
        try:
            figure.savefig(path, dpi=110)
        except OSError as error:
            raise ZooError(f"cannot write {path}: {error.strerror}") from None
    return Path(path)
