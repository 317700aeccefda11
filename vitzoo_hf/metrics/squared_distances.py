"""Squared distances and lengths of many vectors that arrive in blocks of columns, in as few passes as accuracy takes.

`d_ij^2 = G_ii + G_jj - 2 G_ij` of the Gram matrix G of the vectors less their mean costs one matrix product, and
loses digits where two vectors are much closer to each other than to the mean. So a first pass takes the Gram matrix
of all vectors. Where its error bound is not met, another pass takes groups of close vectors, each less its mean.
A group that does not fall apart is subtracted pair by pair. float32 products obey
`torch.set_float32_matmul_precision`. P vectors, c columns of a block, K pairs.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from vitzoo_hf.format.layout import Layout

RELATIVE_ERROR = 5e-7
BLOCK_ELEMENTS = 2**18  # values of a piece: 1 MB, which stays in a core's cache
MAX_COLUMNS = 4096  # longer float32 sums would lose a digit
TILE = 64  # rows of a product that are taken at a time, of its lower triangle only
CANCELLED = 0.1  # share of two summands below which their difference has lost a digit
COMMON_SHARE = 0.25  # share of the mean in the squares of vectors, from which on the mean is subtracted
SAMPLED_COLUMNS = 32
SAFE_SQUARES = (1e-24, 1e30)  # float32 sums of squares outside of this may have lost digits or overflown


class Scratch:
    """Memory of temporaries that is taken once: fresh memory of their size costs more than filling it."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def like(self, piece: Float[Tensor, "P c"], number: int = 0) -> Float[Tensor, "P c"]:
        """Uninitialised memory of the shape of `piece`; the next call with this number overwrites it."""
        size, kind = piece.numel(), (piece.dtype, piece.device)
        buffer = self._buffers.get(number)
        if buffer is None or buffer.numel() < size or (buffer.dtype, buffer.device) != kind:
            buffer = self._buffers[number] = torch.empty(size, dtype=piece.dtype, device=piece.device)
        return buffer[:size].view(piece.shape)


@dataclass(frozen=True)
class _Group:
    """Models that share a centred Gram matrix."""

    models: Tensor
    sums: Float64[Tensor, "P P"]

    def empty(self) -> "_Group":
        return _Group(self.models, torch.zeros_like(self.sums))


@dataclass(frozen=True)
class _Direct:
    """Pairs of models that are subtracted."""

    first: Tensor
    second: Tensor
    sums: Float64[Tensor, " K"]

    def empty(self) -> "_Direct":
        return _Direct(self.first, self.second, torch.zeros_like(self.sums))


class SquaredDistances:
    """Squared distances of all pairs of P vectors.

    While `is_pending`, call `add` with every block of columns and then `finish_pass`.

    Args:
        count: P.
        dtype: dtype of the blocks; products are in float64 for float64, else in float32.
        device: device of the blocks.
        relative_error: bound on the relative error of a squared distance, which decides on another pass.
        scratch: memory to share with other sums of the same thread.

    Attributes:
        squared: float64 `[P, P]`, symmetric with a zero diagonal; complete when nothing is pending.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> distances = SquaredDistances(2, points.dtype, points.device)
        >>> while distances.is_pending:
        ...     distances.add(points)
        ...     distances.finish_pass()
        >>> distances.squared.tolist()
        [[0.0, 25.0], [25.0, 0.0]]
    """

    def __init__(
        self,
        count: int,
        dtype: torch.dtype,
        device: torch.device,
        relative_error: float = RELATIVE_ERROR,
        scratch: Scratch | None = None,
    ) -> None:
        self.scratch = scratch or Scratch()
        self.dtype, self.device = working(dtype), device
        self.tolerance = torch.finfo(self.dtype).eps / relative_error
        self.squared = torch.zeros(count, count, dtype=torch.float64, device=device)
        self._pending: list[_Group | _Direct] = [self._group(torch.arange(count, device=device))]

    @torch.no_grad()
    def add(self, block: Float[Tensor, "P c"], lengths: Float64[Tensor, " P"] | None = None) -> None:
        """Take in these columns of all vectors; add their squared lengths, to six digits, to `lengths` if given."""
        with torch.autocast(block.device.type, enabled=False):
            for piece in column_pieces(block):
                squares = None
                for task in self._pending:
                    if isinstance(task, _Direct):
                        _add_direct(task, piece)
                        continue
                    of_all = len(task.models) == len(piece)
                    members = piece if of_all else piece[task.models]
                    mean = _mean_model(members) if _has_common_part(members) else None
                    vectors = members if mean is None else torch.sub(members, mean, out=self.scratch.like(members))
                    diagonal = _add_gram(task.sums, vectors)
                    if of_all and lengths is not None:
                        # the product has the lengths on its diagonal already
                        squares = _lengths_of(diagonal, vectors, mean)
                if lengths is not None:
                    lengths += squared_lengths_of_piece(piece) if squares is None else squares

    def fork(self, scratch: Scratch) -> "SquaredDistances":
        """Sums of other columns of the same pass, for another thread, to be joined to these."""
        twin = copy(self)
        twin.scratch = scratch
        twin._pending = [task.empty() for task in self._pending]
        return twin

    def join(self, twin: "SquaredDistances") -> None:
        """Add the sums of a fork of this pass."""
        for task, twin_task in zip(self._pending, twin._pending, strict=True):
            task.sums.add_(twin_task.sums)

    @property
    def is_pending(self) -> bool:
        """Whether a pass, or another one, is needed."""
        return bool(self._pending)

    def finish_pass(self) -> None:
        """Put what is accurate into `squared`, and leave pairs that are too close to another pass."""
        finished, self._pending = self._pending, []
        for task in finished:
            if isinstance(task, _Direct):
                self.squared[task.first, task.second] = self.squared[task.second, task.first] = task.sums
            else:
                self._settle(task)

    def _group(self, models: Tensor) -> _Group:
        return _Group(models, torch.zeros(len(models), len(models), dtype=torch.float64, device=self.device))

    def _settle(self, group: _Group) -> None:
        models, gram = group.models, group.sums.tril() + group.sums.tril(-1).T
        scale = gram.diagonal()[:, None] + gram.diagonal()
        squared = (scale - 2 * gram).fill_diagonal_(0)
        self.squared[models[:, None], models] = squared
        accurate = (squared >= self.tolerance * scale) & squared.isfinite()
        if self.dtype != torch.float64:
            accurate &= scale > SAFE_SQUARES[0]
        close = (~accurate).fill_diagonal_(False)
        for members in _connected(close):
            if len(members) < len(models):
                self._pending.append(self._group(models[members]))
            else:
                first, second = close.triu().nonzero().T
                zeros = torch.zeros(len(first), dtype=torch.float64, device=self.device)
                self._pending.append(_Direct(models[first], models[second], zeros))


def check_weights(weights: Tensor, layout: Layout | None = None) -> None:
    """Refuse a tensor that is not a population of flat vectors, or not of this layout."""
    if weights.ndim != 2 or not weights.is_floating_point() or 0 in weights.shape:
        raise ValueError(
            f"weights are {str(weights.dtype).removeprefix('torch.')} {list(weights.shape)}; expected non-empty "
            "floating [P, D]: one flat vector a model (one model: weights[None])"
        )
    if layout is not None and layout.num_parameters != weights.shape[1]:
        raise ValueError(
            f"weights have {weights.shape[1]} columns and the layout {layout.num_parameters} values; expected the "
            "layout of these very vectors (zoo.layouts[row['layout']])"
        )


@torch.no_grad()
def squared_lengths(block: Float[Tensor, "P c"]) -> Float64[Tensor, " P"]:
    """Sums of squares of the rows, accurate to the working precision; NaN or infinite where the weights are.

    Example:
        >>> squared_lengths(torch.tensor([[3.0, 4.0], [0.0, 1e-30]]))
        tensor([2.5000e+01, 1.0000e-60], dtype=torch.float64)
    """
    return sum(
        (torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64).square() for piece in column_pieces(block)),
        torch.zeros(len(block), dtype=torch.float64, device=block.device),
    )


@torch.no_grad()
def squared_lengths_of_piece(piece: Float[Tensor, "P c"]) -> Float64[Tensor, " P"]:
    """Sums of squares of the rows of a piece of `column_pieces`, to six digits, several times faster."""
    quick = torch.linalg.vecdot(piece, piece).double()
    if ((quick > SAFE_SQUARES[0]) & (quick < SAFE_SQUARES[1])).all():
        return quick
    return squared_lengths(piece)


def column_pieces(block: Float[Tensor, "P c"]) -> Iterator[Tensor]:
    """The block in pieces of columns that fit the cache, in the working precision."""
    width = max(256, min(MAX_COLUMNS, BLOCK_ELEMENTS // len(block)))
    for piece in block.split(width, dim=1):
        yield piece.to(working(block.dtype))


def working(dtype: torch.dtype) -> torch.dtype:
    """The precision that weights of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _has_common_part(piece: Float[Tensor, "P c"]) -> bool:
    """Whether the mean is large relative to the spread, so that it must be subtracted to avoid cancellation.

    Estimated from the first columns. The answer changes accuracy alone: subtracting one vector from both ends of a
    distance does not change the distance.
    """
    if piece.device.type != "cpu":
        return True  # reading the estimate would wait for the device
    few = piece[:, :SAMPLED_COLUMNS]
    mean = _mean_model(few)
    return not len(piece) * torch.dot(mean, mean) < COMMON_SHARE * few.square().sum()


def _mean_model(piece: Float[Tensor, "P c"]) -> Float[Tensor, " c"]:
    return (piece.new_full((1, len(piece)), 1 / len(piece)) @ piece)[0]  # half the time of `mean(0)`


def _add_gram(gram: Float64[Tensor, "P P"], vectors: Float[Tensor, "P c"]) -> Float[Tensor, " P"]:
    """Add the lower triangle, by tiles, of the product of vectors with themselves; returns its diagonal."""
    diagonals = []
    for start in range(0, len(vectors), TILE):
        stop = start + TILE
        product = vectors[start:stop] @ vectors[:stop].T
        gram[start:stop, :stop] += product
        diagonals.append(product[:, start:].diagonal())
    return torch.cat(diagonals)


def _lengths_of(
    diagonal: Float[Tensor, " P"], vectors: Float[Tensor, "P c"], mean: Float[Tensor, " c"] | None
) -> Float64[Tensor, " P"] | None:
    """Squared lengths from the squared lengths of the vectors less their mean; None where digits were lost."""
    lengths = terms = diagonal.double()
    if mean is not None:
        middle = torch.dot(mean, mean).double()
        lengths, terms = lengths + 2 * (vectors @ mean).double() + middle, terms + middle
    low, high = SAFE_SQUARES
    return lengths if ((lengths > CANCELLED * terms) & (lengths > low) & (lengths < high)).all() else None


def _add_direct(task: _Direct, piece: Float[Tensor, "P c"]) -> None:
    for start in range(0, len(task.first), len(piece)):
        part = slice(start, start + len(piece))
        differences = piece[task.first[part]].double() - piece[task.second[part]].double()
        task.sums[part] += differences.square().sum(1)


def _connected(close: Bool[Tensor, "P P"]) -> Iterator[Tensor]:
    """Connected components, of two models or more, of the graph of close pairs."""
    labels = torch.arange(len(close), device=close.device)
    while True:  # each model takes the smallest label among its neighbours, until none changes
        spread = torch.minimum(labels, labels.expand_as(close).where(close, len(close)).amin(1))
        if torch.equal(spread, labels):
            break
        labels = spread
    for label, size in zip(*labels.unique(return_counts=True), strict=True):
        if size > 1:
            yield (labels == label).nonzero().flatten()
