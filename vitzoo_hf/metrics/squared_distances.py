"""Squared distances and lengths of many vectors that arrive in blocks of columns, in as few passes as accuracy takes.

`d_ij^2 = G_ii + G_jj - 2 G_ij` of the Gram matrix G of the vectors less their mean costs one matrix product, and
loses digits where two vectors are much closer to each other than to the mean. The product is taken in float32, and
in float64 from the first piece on of which float32 would not meet the error bound. Vectors that are closer than
float64 tells are compared with one of them, as copies are common; other ones form groups, each less its mean, and
a group that does not fall apart is subtracted pair by pair. float32 products obey
`torch.set_float32_matmul_precision`. P vectors, c columns of a block, K pairs.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.messages import describe
from vitzoo_hf.metrics.blocks import MAX_COLUMNS, Scratch, column_pieces, working

RELATIVE_ERROR = 5e-7
GRAM_ELEMENTS = 2**20  # values of a piece of a product, which reads each of them many times
TILE = 128  # rows of a product that are taken at a time, of its lower triangle only
CANCELLED = 0.1  # share of two summands below which their difference has lost a digit
COMMON_SHARE = 0.25  # share of the mean in the squares of vectors, from which on the mean is subtracted
SAMPLED_COLUMNS = 32
SAFE_SQUARES = (1e-24, 1e30)  # float32 sums of squares outside of this may have lost digits or overflown
PIECES_A_LOOK = 16
"""Pieces on the CPU between two looks at the accuracy so far: a look costs about an eighth of a piece."""
ROUNDINGS = {torch.float32: 2, torch.float64: 4}
"""Rounding errors of a sum of squares: up to 12 were seen of 800 terms; unrelated float32 vectors have room for 4."""
COPIES = 16  # a squared distance of two equal vectors stays below this many bounds on its float64 error


@dataclass
class _Group:
    """Models that share a centred Gram matrix.

    Attributes:
        models: positions of the models.
        gram: sums of products so far, the lower triangle.
        errors: bound on the rounding error of `gram`: of a squared distance by the sum of both models' bounds.
        in_float64: whether the next piece is multiplied in float64.
        is_exact: whether all pieces were, so that nothing can have under- or overflown.
        pieces: number of pieces so far.
    """

    models: Tensor
    gram: Float64[Tensor, "P P"]
    errors: Float64[Tensor, " P"]
    in_float64: bool
    is_exact: bool = True
    pieces: int = 0

    def empty(self) -> "_Group":
        return _Group(self.models, torch.zeros_like(self.gram), torch.zeros_like(self.errors), self.in_float64)

    def clear(self) -> None:
        """Forget all pieces so far."""
        self.gram.zero_()
        self.errors.zero_()
        self.is_exact, self.pieces = True, 0

    def join(self, twin: "_Group") -> None:
        self.gram += twin.gram
        self.errors += twin.errors
        self.is_exact &= twin.is_exact

    def squared(self) -> Float64[Tensor, "P P"]:
        """Squared distances so far."""
        gram = self.gram.tril() + self.gram.tril(-1).T
        return (gram.diagonal()[:, None] + gram.diagonal() - 2 * gram).fill_diagonal_(0)

    def close(self, squared: Float64[Tensor, "P P"], relative_error: float) -> Bool[Tensor, "P P"]:
        """Pairs whose squared distance misses the bound on its relative error."""
        accurate = (squared * relative_error >= self.errors[:, None] + self.errors) & squared.isfinite()
        if not self.is_exact:
            lengths = self.gram.diagonal()
            accurate &= lengths[:, None] + lengths > SAFE_SQUARES[0]
        return (~accurate).fill_diagonal_(False)


@dataclass
class _Direct:
    """Pairs of models that are subtracted.

    Attributes:
        comparisons: pairs that compare the first model of a group with all others of it, because some seem to be
            equal; and the pairs of the group that are not accurate yet.
    """

    first: Tensor
    second: Tensor
    sums: Float64[Tensor, " K"]
    comparisons: list[tuple[slice, Bool[Tensor, "_ _"]]]

    def empty(self) -> "_Direct":
        return _Direct(self.first, self.second, torch.zeros_like(self.sums), self.comparisons)

    def join(self, twin: "_Direct") -> None:
        self.sums += twin.sums


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
        self.dtype, self.device, self.relative_error = working(dtype), device, relative_error
        self.squared = torch.zeros(count, count, dtype=torch.float64, device=device)
        self._pending: list[_Group | _Direct] = [
            self._group(torch.arange(count, device=device), dtype == torch.float64)
        ]

    @torch.no_grad()
    def add(self, block: Float[Tensor, "P c"], lengths: Float64[Tensor, " P"] | None = None) -> None:
        """Take in these columns of all vectors; add their squared lengths, to six digits, to `lengths` if given."""
        with torch.autocast(block.device.type, enabled=False):
            for piece in column_pieces(block, GRAM_ELEMENTS):
                squares = None
                for task in self._pending:
                    if isinstance(task, _Direct):
                        _add_direct(task, piece)
                    else:
                        of_piece = self._add_to(task, piece)
                        squares = of_piece if len(task.models) == len(piece) else squares
                if lengths is not None:
                    lengths += squared_lengths_of_piece(piece) if squares is None else squares

    def _add_to(self, group: _Group, piece: Float[Tensor, "R c"]) -> Float64[Tensor, " P"] | None:
        """Add the products of a piece of all R vectors; returns lengths of the group's P where they follow."""
        members = piece if len(group.models) == len(piece) else piece[group.models]
        if group.in_float64:
            return self._add_products(group, members, torch.float64)
        squares = self._add_products(group, members, torch.float32)
        is_first = group.pieces == 1
        if is_first or (group.pieces % PIECES_A_LOOK == 0 and piece.device.type == "cpu"):  # a look takes a sync
            group.in_float64 = bool(group.close(group.squared(), self.relative_error).any())
            if group.in_float64 and is_first:  # nothing of the first piece was of use: it is taken again
                group.clear()
                return self._add_products(group, members, torch.float64)
        return squares

    def _add_products(
        self, group: _Group, members: Float[Tensor, "P c"], dtype: torch.dtype
    ) -> Float64[Tensor, " P"] | None:
        vectors = members
        if members.dtype != dtype:
            vectors = self.scratch.like(members, 3, dtype).copy_(members)
        mean = _mean_model(vectors) if _has_common_part(vectors) else None
        if mean is not None:
            vectors = torch.sub(vectors, mean, out=self.scratch.like(vectors, 0 if vectors is members else 3))
        diagonal = _add_gram(group.gram, vectors)
        group.errors += ROUNDINGS[dtype] * torch.finfo(dtype).eps * diagonal
        group.is_exact &= dtype == torch.float64
        group.pieces += 1
        # the product has the lengths on its diagonal already; on CUDA, looking whether they are accurate takes a sync
        return _lengths_of(diagonal, vectors, mean) if members.device.type == "cpu" else None

    def fork(self, scratch: Scratch) -> "SquaredDistances":
        """Sums of other columns of the same pass, for another thread, to be joined to these."""
        twin = copy(self)
        twin.scratch = scratch
        twin._pending = [task.empty() for task in self._pending]
        return twin

    def join(self, twin: "SquaredDistances") -> None:
        """Add the sums of a fork of this pass."""
        for task, twin_task in zip(self._pending, twin._pending, strict=True):
            task.join(twin_task)  # type: ignore[arg-type]  # a fork has the tasks of its origin

    @property
    def is_pending(self) -> bool:
        """Whether a pass, or another one, is needed."""
        return bool(self._pending)

    def finish_pass(self) -> None:
        """Put what is accurate into `squared`, and leave pairs that are too close to another pass."""
        finished, self._pending = self._pending, []
        pairs: list[_Direct] = []
        for task in finished:
            if isinstance(task, _Group):
                pairs += self._settle(task)
                continue
            self.squared[task.first, task.second] = self.squared[task.second, task.first] = task.sums
            for part, close in task.comparisons:
                self._settle_copies(task.first[part], task.second[part], task.sums[part], close)
        if pairs:
            self._pending.append(_joined(pairs))

    def _group(self, models: Tensor, in_float64: bool) -> _Group:
        zeros = torch.zeros(len(models), len(models), dtype=torch.float64, device=self.device)
        return _Group(models, zeros, zeros[0].clone(), in_float64)

    def _settle(self, group: _Group) -> Iterator[_Direct]:
        """Put the distances of a group into place; leaves groups to the next pass, and gives pairs to subtract."""
        squared = group.squared()
        self.squared[group.models[:, None], group.models] = squared
        close = group.close(squared, self.relative_error)
        like_copies = close & (squared <= COPIES * (group.errors[:, None] + group.errors))
        for members in _connected(close):
            models, pairs = group.models[members], close[members[:, None], members]
            if group.is_exact and bool(like_copies[members].any()):
                first, second = models[:1].expand(len(models) - 1), models[1:]
                yield _Direct(first, second, squared.new_zeros(len(second)), [(slice(0, len(second)), pairs)])
            elif len(members) < len(close) or not group.is_exact:
                self._pending.append(self._group(models, True))
            else:
                first, second = models[pairs.triu().nonzero().T]
                yield _Direct(first, second, squared.new_zeros(len(second)), [])

    def _settle_copies(self, first: Tensor, second: Tensor, sums: Tensor, close: Bool[Tensor, "P P"]) -> None:
        """Give models that are equal to the first its distances; leave close pairs of the others to another pass."""
        models = torch.cat([first[:1], second])
        equal = torch.cat([sums.new_zeros(1), sums]) == 0
        copies, others = models[equal], models[~equal]
        row = self.squared[copies[0]].clone()
        self.squared[copies], self.squared[:, copies] = row, row[:, None]
        if bool(close[~equal][:, ~equal].any()):
            self._pending.append(self._group(others, True))


def _joined(pairs: list[_Direct]) -> _Direct:
    """All pairs as one task, as each task costs time with every piece."""
    comparisons, start = [], 0
    for task in pairs:
        comparisons += [(slice(start + part.start, start + part.stop), close) for part, close in task.comparisons]
        start += len(task.first)
    first, second, sums = (torch.cat([getattr(task, name) for task in pairs]) for name in ("first", "second", "sums"))
    return _Direct(first, second, sums, comparisons)


def check_weights(weights: Tensor, layout: Layout | None = None) -> None:
    """Refuse a tensor that is not a population of flat vectors, or not of this layout."""
    if not isinstance(weights, Tensor) or weights.ndim != 2 or not weights.is_floating_point() or 0 in weights.shape:
        raise ValueError(
            f"weights are {describe(weights)}; expected non-empty "
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
    if piece.device.type == "cuda":  # as fast as its memory, and looking at the quick ones would take a sync
        return squared_lengths(piece)
    quick = torch.linalg.vecdot(piece, piece).double()
    if ((quick > SAFE_SQUARES[0]) & (quick < SAFE_SQUARES[1])).all():
        return quick
    return squared_lengths(piece)


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
    """Add the product of vectors with themselves, of which the lower triangle counts; returns its diagonal."""
    if vectors.device.type == "cuda":
        product = _chunked_product(vectors)
        gram += product
        return product.diagonal()
    diagonals = []
    for start in range(0, len(vectors), TILE):
        stop = start + TILE
        product = vectors[start:stop] @ vectors[:stop].T
        gram[start:stop, :stop] += product
        diagonals.append(product[:, start:].diagonal())
    return torch.cat(diagonals)


def _chunked_product(vectors: Float[Tensor, "P c"]) -> Float64[Tensor, "P P"]:
    """`vectors @ vectors.T`, with sums of at most MAX_COLUMNS terms in the precision of the vectors."""
    whole = vectors.shape[1] // MAX_COLUMNS * MAX_COLUMNS
    parts = vectors[:, :whole].unflatten(1, (-1, MAX_COLUMNS)).transpose(0, 1)
    product = torch.bmm(parts, parts.transpose(1, 2)).sum(0, dtype=torch.float64)
    return product + (vectors[:, whole:] @ vectors[:, whole:].T).double() if whole < vectors.shape[1] else product


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
        first, second = piece.index_select(0, task.first[part]), piece.index_select(0, task.second[part])
        # most pairs are copies, and comparing them costs a third of subtracting them in float64
        if piece.device.type != "cpu" or not torch.equal(first, second):
            task.sums[part] += torch.sub(first.double(), second).square_().sum(1)


def _connected(close: Bool[Tensor, "P P"]) -> Iterator[Tensor]:
    """Connected components, of two models or more, of the graph of close pairs; the host waits once."""
    _, labels = connected_components(close.cpu().numpy(), directed=False)
    order, starts = np.argsort(labels, kind="stable"), np.flatnonzero(np.diff(np.sort(labels))) + 1
    for members in np.split(order, starts):
        if len(members) > 1:
            yield torch.from_numpy(members).to(close.device)
