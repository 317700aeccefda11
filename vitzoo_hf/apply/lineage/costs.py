"""Weights of a zoo -> distances and kurtosis from which lineage is recovered; all pairs, out of core, trunks only.

MoTHer (Horwitz et al., Unsupervised Model Tree Heritage Recovery, ICLR 2025) compares square matrices: timm's `qkv`
is split into the matrices of queries, keys and values that it stacks. One reading of all weights gives distances and
kurtosis, a second one MoTHer's distances; absolute differences cost P² operations a weight, without matrix products.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vitzoo_hf.format.layout import Layout, is_head
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.blocks import Scratch, column_pieces
from vitzoo_hf.metrics.squared_distances import SquaredDistances
from vitzoo_hf.metrics.weight_statistics import Moments, statistics_of
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo.weight_columns import WeightColumns

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SquareMatrix(NamedTuple):
    """A square matrix of the trunk: its name, its columns of the flat vector, and its kind in attention."""

    name: str
    place: slice
    kind: str


def square_matrices(layout: Layout) -> list[SquareMatrix]:
    """Square matrices of the trunk in the order of the layout; `kind` is q, k, v, proj or other.

    Example:
        >>> layout = Layout(("blocks.0.attn.qkv.weight", "norm.weight"), ((6, 2), (2,)))
        >>> [(matrix.name, matrix.kind, matrix.place.start) for matrix in square_matrices(layout)]
        [('blocks.0.attn.qkv.weight[q]', 'q', 0), ('blocks.0.attn.qkv.weight[k]', 'k', 4),
         ('blocks.0.attn.qkv.weight[v]', 'v', 8)]
    """
    matrices = []
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        if is_head(name) or len(shape) != 2:
            continue
        rows, columns = shape
        size = columns * columns
        # timm stacks the three matrices; MoTHer compares them one by one
        if name.endswith("attn.qkv.weight") and rows == 3 * columns:
            for number, kind in enumerate("qkv"):
                start = offset + number * size
                matrices.append(SquareMatrix(f"{name}[{kind}]", slice(start, start + size), kind))
        elif rows == columns:
            kind = "proj" if name.endswith("attn.proj.weight") else "other"
            matrices.append(SquareMatrix(name, slice(offset, offset + size), kind))
    return matrices


@dataclass(frozen=True)
class TrunkMeasures:
    """Measurements of P trunks from one reading of their weights.

    Attributes:
        model_ids: ids of the models, in order.
        distance: Euclidean distance between trunks.
        mean_absolute: MoTHer's distance for clustering: mean absolute difference, summed over square matrices.
        kurtosis: MoTHer's kurtosis: excess kurtosis of attention's output matrix, summed over blocks.
    """

    model_ids: list[str]
    distance: Float64[np.ndarray, "P P"]
    mean_absolute: Float64[np.ndarray, "P P"]
    kurtosis: Float64[np.ndarray, " P"]


def measure_trunks(columns: WeightColumns, *, precision: str = "float32", progress: bool = False) -> TrunkMeasures:
    """Distances and kurtosis of all trunks; memory is a few blocks of columns and P × P matrices.

    Args:
        columns: the weights of the models.
        precision: type to which weights are rounded first: float32 (no change), bfloat16 or float16.
        progress: show a bar.

    Raises:
        ZooError: for an unknown precision, or weights that are not finite.
    """
    count, device, scratch = len(columns.model_ids), columns.device, Scratch()
    matrices = square_matrices(columns.layout)
    trunk = trunk_places(columns.layout)
    distances = SquaredDistances(count, torch.float32, device, scratch=scratch)
    absolute = torch.zeros(count, count, dtype=torch.float64, device=device)
    moments = {matrix.name: Moments(count, device, scratch=scratch) for matrix in matrices if matrix.kind == "proj"}
    first = True
    # A further pass takes the distances again whose digits cancelled in the first; the other measures take one pass.
    while distances.is_pending:
        for part, block in _blocks(columns, trunk, precision, progress):
            for place in trunk:
                if (piece := _overlap(place, part, block)) is not None:
                    distances.add(piece)
            # further passes repeat only distances whose digits cancelled, and must not add to sums twice
            for matrix in matrices if first else ():
                if (piece := _overlap(matrix.place, part, block)) is not None:
                    size = matrix.place.stop - matrix.place.start
                    for short in column_pieces(piece):
                        # float64 from piece to piece, because a piece is short but a matrix has many
                        absolute += torch.cdist(short, short, p=1).double() / size
                    if matrix.name in moments:
                        moments[matrix.name].add(piece)
        distances.finish_pass()
        first = False
    kurtosis = torch.zeros(count, dtype=torch.float64)
    if moments:
        kurtosis = statistics_of(list(moments.values())).excess_kurtosis.sum(1).cpu()
    absolute = (absolute + absolute.T) / 2  # rounding of float32 sums differs between (i, j) and (j, i)
    # exactly 0, because Ward's linkage takes a zero diagonal
    absolute.fill_diagonal_(0)
    distance = distances.squared.sqrt().cpu().numpy()
    return TrunkMeasures(columns.model_ids, distance, absolute.cpu().numpy(), kurtosis.numpy())


def mother_distances(
    columns: WeightColumns,
    trees: Sequence[Int64[np.ndarray, " _"]],
    *,
    precision: str = "float32",
    progress: bool = False,
) -> list[Float64[np.ndarray, "_ _"]]:
    """MoTHer's distance of models within each tree, `max_t max(W_i - W_j - m_t) / (M_t - m_t)`, i before j.

    t goes over the query, key, value and output matrices of all blocks; m_t and M_t are the least and largest entry
    of all differences of that matrix within the tree. The distance serves both directions, and the diagonal is 0. A
    matrix in which the models of a tree do not differ counts as 0.

    Args:
        columns: the weights of all models.
        trees: positions of the members of each tree.
        precision: see `measure_trunks`.
        progress: show a bar.

    Raises:
        ZooError: for an unknown precision, weights that are not finite, or a layout without attention matrices.
    """
    matrices = [matrix for matrix in square_matrices(columns.layout) if matrix.kind != "other"]
    if not matrices:
        raise ZooError("MoTHer compares attention's matrices, and this layout has none: use --method hubs")
    # The model whose id comes first is i; the published code takes the model that it loaded first.
    ordered = [np.array(sorted(members, key=lambda row: columns.model_ids[row]), dtype=np.int64) for members in trees]
    all_maxima = [_TreeMaxima(members, columns.device) for members in ordered]
    for part, block in _blocks(columns, [matrix.place for matrix in matrices], precision, progress):
        for matrix in matrices:
            if (piece := _overlap(matrix.place, part, block)) is not None:
                for maxima in (maxima for maxima in all_maxima if len(maxima.members) > 1):
                    maxima.add(piece)
                    if part.stop >= matrix.place.stop:
                        maxima.finish_matrix()
    distances = []
    for members, maxima in zip(trees, all_maxima, strict=True):  # back from the order of ids to that of `trees`
        places = np.searchsorted(np.sort(maxima.members), members)
        places = np.argsort(maxima.members)[places]
        distances.append(maxima.normalized.cpu().numpy()[np.ix_(places, places)])
    return distances


class _TreeMaxima:
    """Largest differences of the models of one tree, matrix after matrix."""

    def __init__(self, members: np.ndarray, device: torch.device) -> None:
        self.members, self.rows = members, torch.as_tensor(members, device=device)
        self.normalized = torch.zeros(len(members), len(members), dtype=torch.float64, device=device)
        self._start()

    def _start(self) -> None:
        self.largest = torch.full_like(self.normalized, -torch.inf)
        self.least = torch.inf

    def add(self, block: Tensor) -> None:
        for piece in column_pieces(block):
            weights = piece[self.rows]
            # The least W_i - W_j with i before j is that of the running minimum over i: O(P) instead of O(P²).
            least_before = weights[:-1].cummin(0).values
            self.least = min(self.least, (least_before - weights[1:]).min().item())
            for row in range(len(weights) - 1):
                difference = (weights[row] - weights[row + 1 :]).amax(1).double()
                self.largest[row, row + 1 :] = self.largest[row, row + 1 :].maximum(difference)

    def finish_matrix(self) -> None:
        """Include the matrix that is complete in the maximum over matrices."""
        # the published distance looks at i before j alone; the entries below the diagonal are infinite
        upper = self.largest.triu(1).where(self.largest.isfinite(), 0)
        most = self.largest[self.largest.isfinite()].max().item()
        # a matrix that does not differ within the tree would divide by zero
        if most > self.least:
            scaled = ((upper - self.least) / (most - self.least)).triu(1)
            self.normalized = self.normalized.maximum(scaled + scaled.T)
        self._start()


def mother_costs(
    distance: Float64[np.ndarray, "P P"],
    kurtosis: Float64[np.ndarray, " P"],
    *,
    weight: float = 0.3,
    reverse: bool = False,
) -> Float64[np.ndarray, "P P"]:
    """MoTHer's cost of an edge from row to column: its distance, plus `weight` times the mean distance if it goes up.

    An edge goes up if the kurtosis of its target is above that of its source; with `reverse`, if it is below. The
    diagonal of the result is infinite.

    Example:
        >>> mother_costs(np.array([[0.0, 2.0], [2.0, 0.0]]), np.array([1.0, 3.0])).tolist()
        [[inf, 2.3], [2.0, inf]]
    """
    up = kurtosis[None, :] < kurtosis[:, None] if reverse else kurtosis[None, :] > kurtosis[:, None]
    cost = distance + weight * distance.mean() * up  # as published, the mean includes the zero diagonal
    np.fill_diagonal(cost, np.inf)
    return cost


def trunk_places(layout: Layout) -> list[slice]:
    """Columns of everything but the head; adjacent tensors are joined."""
    places: list[slice] = []
    for name, place in layout.items():
        if is_head(name) or place.start == place.stop:
            continue
        if places and places[-1].stop == place.start:
            # joined, so that fewer and longer spans are read
            places[-1] = slice(places[-1].start, place.stop)
        else:
            places.append(place)
    return places


def _blocks(
    columns: WeightColumns, wanted: Sequence[slice], precision: str, progress: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks that overlap the wanted columns, rounded."""
    if precision not in PRECISIONS:
        raise ZooError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    with progress_bar("reading weights", "block", shown=progress, total=len(columns.blocks(wanted))) as bar:
        for part, block in columns.read(wanted):
            if not block.isfinite().all():
                row = int((~block.isfinite()).any(1).nonzero()[0])
                raise ZooError(f"{columns.model_ids[row]} has NaN or infinite weights: leave it out by a filter")
            # rounded, then float32 again, because sums in half precision would lose digits
            yield part, block.to(PRECISIONS[precision]).float()
            bar.update()


def _overlap(place: slice, part: slice, block: Tensor) -> Tensor | None:
    """The columns of a block that lie in `place`; None if there are none."""
    first, last = max(place.start, part.start), min(place.stop, part.stop)
    return block[:, first - part.start : last - part.start] if first < last else None
