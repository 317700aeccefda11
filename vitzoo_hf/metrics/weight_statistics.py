"""Statistics of each tensor of each model, norm, mean, spread, sparsity, tails and quantiles; singular values.

Pure functions of tensors. P models, D weights, G tensors of a layout, Q quantiles. Moments are merged from blocks of
columns by the formulas of Pébay (Sandia report SAND2008-6212, 2008), so that vectors need not be in memory at once.

Matrices are tensors of two axes, or of four (the patch embedding, a linear map of patches:
`[out, in * height * width]`), with timm's `qkv` taken apart into the maps of queries, keys and values.

Cost: quantiles sort every tensor; singular values take an eigenvalue or singular value decomposition a matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.format.layout import Layout
from vitzoo_hf.metrics.blocks import Scratch, block_bytes, column_pieces
from vitzoo_hf.metrics.squared_distances import check_weights


@dataclass(frozen=True)
class WeightStatistics:
    """Statistics of every tensor (column) of every model (row).

    Attributes:
        norm: Euclidean norm.
        mean: mean of the values.
        std: standard deviation of the values, divided by their number.
        sparsity: share of the values whose size is at most the threshold.
        excess_kurtosis: fourth central moment over the squared variance, less 3 (Fisher); NaN for a constant tensor.
    """

    norm: Float64[Tensor, "P G"]
    mean: Float64[Tensor, "P G"]
    std: Float64[Tensor, "P G"]
    sparsity: Float64[Tensor, "P G"]
    excess_kurtosis: Float64[Tensor, "P G"]


def weight_statistics(weights: Float[Tensor, "P D"], layout: Layout, *, threshold: float = 0.0) -> WeightStatistics:
    """Statistics of every tensor of every model.

    Args:
        weights: the vectors of models of one layout, any floating dtype.
        layout: the layout of the vectors.
        threshold: values up to this size count as zero.

    Raises:
        ValueError: on weights that are empty, not floating, or of another length than the layout; on a negative
            threshold. NaN and infinite weights give NaN.

    Example:
        >>> layout = Layout.of({"w": torch.zeros(4)})
        >>> found = weight_statistics(torch.tensor([[0.0, 0.0, 1.0, -1.0]]), layout)
        >>> found.sparsity.item(), round(found.std.item(), 4), found.excess_kurtosis.item()
        (0.5, 0.7071, -1.0)
    """
    check_weights(weights, layout)
    scratch = Scratch()
    moments = [Moments(len(weights), weights.device, threshold, scratch) for _ in layout.names]
    for tensor, (_, place) in zip(moments, layout.items(), strict=True):
        tensor.add(weights[:, place])
    return statistics_of(moments)


@torch.no_grad()
def weight_quantiles(
    weights: Float[Tensor, "P D"], layout: Layout, quantiles: Sequence[float | int]
) -> Float64[Tensor, "P G Q"]:
    """Quantiles of every tensor of every model, interpolated linearly as `numpy.quantile` does.

    Args:
        weights: the vectors of models of one layout, any floating dtype.
        layout: the layout of the vectors.
        quantiles: numbers between 0 and 1.

    Raises:
        ValueError: on weights that are empty, not floating, or of another length than the layout; on a quantile that
            is not between 0 and 1.

    Example:
        >>> layout = Layout.of({"w": torch.zeros(3)})
        >>> weight_quantiles(torch.tensor([[3.0, 1.0, 2.0]]), layout, [0, 0.5, 0.75])
        tensor([[[1.0000, 2.0000, 2.5000]]], dtype=torch.float64)
    """
    check_weights(weights, layout)
    shares = torch.tensor(list(quantiles), dtype=torch.float64, device=weights.device)
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"quantiles={list(quantiles)}; expected numbers between 0 and 1")
    values_at = weights.new_empty(len(weights), len(layout.names), len(shares), dtype=torch.float64)
    for tensor, (_, place) in enumerate(layout.items()):
        size = place.stop - place.start
        below = shares * (size - 1)
        # a sort of some models at a time: values and positions of all of them would take three times the weights
        step = max(1, block_bytes(weights.device, 1) // (16 * size))
        for first in range(0, len(weights), step):
            ordered = weights[first : first + step, place].sort(dim=1).values
            low, high = (ordered[:, index.long()].double() for index in (below.floor(), below.ceil()))
            values_at[first : first + step, tensor] = low + (high - low) * (below - below.floor())
    return values_at


class Moments:
    """Statistics of one tensor of P models, from blocks of its columns.

    Args:
        count: P.
        device: device of the blocks.
        threshold: values up to this size count as zero.
        scratch: memory to share with other sums of the same thread.
    """

    def __init__(
        self, count: int, device: torch.device, threshold: float = 0.0, scratch: Scratch | None = None
    ) -> None:
        self.scratch = scratch or Scratch()
        if not threshold >= 0:
            raise ValueError(f"threshold={threshold}; expected 0 or more")
        self.threshold = threshold
        self.count = 0  # columns so far
        zeros = torch.zeros(count, dtype=torch.float64, device=device)
        self.small, self.mean, self.second, self.third, self.fourth = (zeros.clone() for _ in range(5))

    def fork(self, scratch: Scratch) -> "Moments":
        """Empty moments of other columns of the tensor, to be joined to these."""
        return Moments(len(self.mean), self.mean.device, self.threshold, scratch)

    @torch.no_grad()
    def add(self, block: Float[Tensor, "P c"]) -> None:
        """Take in these columns of the tensor."""
        for piece in column_pieces(block):
            x, xx = self.scratch.like(piece, 1), self.scratch.like(piece, 2)
            self.small += torch.le(torch.abs(piece, out=x), self.threshold, out=xx).sum(1)
            low, high = piece.amin(1), piece.amax(1)
            spread = high > low  # a constant stays exactly constant, and nothing under- or overflows
            rough, size = piece.mean(1).where(spread, low), (high - low).where(spread, 1)
            torch.sub(piece, rough[:, None], out=x).div_(size[:, None])
            torch.mul(x, x, out=xx)
            sums = (x.sum(1), xx.sum(1), torch.linalg.vecdot(xx, x), torch.linalg.vecdot(xx, xx))
            self._add_sums(piece.shape[1], rough.double(), size.double(), *(total.double() for total in sums))

    def join(self, other: "Moments") -> None:
        """Add the moments of other columns of the same tensor."""
        if other.count:
            self.small += other.small
            self._merge(other.count, other.mean, other.second, other.third, other.fourth)

    def _add_sums(self, n: int, rough: Tensor, size: Tensor, s1: Tensor, s2: Tensor, s3: Tensor, s4: Tensor) -> None:
        """Merge sums of powers of n values `(w - rough) / size`, made central about the exact mean."""
        off = s1 / n
        second = size**2 * (s2 - n * off**2)
        third = size**3 * (s3 - 3 * off * s2 + 2 * n * off**3)
        fourth = size**4 * (s4 - 4 * off * s3 + 6 * off**2 * s2 - 3 * n * off**4)
        self._merge(n, rough + size * off, second, third, fourth)

    def _merge(self, n: int, mean: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> None:
        # the pairwise updates of Pébay, for two sets of m and n values
        m, total = self.count, self.count + n
        delta = mean - self.mean if m else torch.zeros_like(mean)
        ratio = delta / total
        self.fourth += (
            fourth
            + delta * ratio**3 * m * n * (m * m - m * n + n * n)
            + 6 * ratio**2 * (m * m * second + n * n * self.second)
            + 4 * ratio * (m * third - n * self.third)
        )
        self.third += third + delta * ratio**2 * m * n * (m - n) + 3 * ratio * (m * second - n * self.second)
        self.second += second + delta * ratio * m * n
        self.mean = self.mean + ratio * n if m else mean
        self.count = total


def statistics_of(moments: Sequence[Moments]) -> WeightStatistics:
    """The statistics of tensors of which every column was added."""
    count = torch.tensor([tensor.count for tensor in moments], device=moments[0].mean.device)
    small, mean, second, fourth = (
        torch.stack([getattr(tensor, name) for tensor in moments], 1)
        for name in ("small", "mean", "second", "fourth")
    )
    return WeightStatistics(
        norm=(second + count * mean**2).sqrt(),
        mean=mean,
        std=(second / count).sqrt(),
        sparsity=small / count,
        excess_kurtosis=count * fourth / second**2 - 3,
    )


GRAM_SHARE = 1e-6  # of the largest eigenvalue: smaller ones have lost digits to its rounding


@torch.no_grad()
def singular_values(matrices: Float[Tensor, "*B m n"], top: int | None = None) -> Float64[Tensor, "*B k"]:
    """Singular values, largest first, computed in float64.

    Roots of the eigenvalues of the smaller product of a matrix with itself while all of them are at least 1e-3 of the
    largest, which keeps seven digits; else a singular value decomposition, which is several times slower.

    Args:
        matrices: any floating dtype; one matrix or a stack of them.
        top: number of singular values; all `min(m, n)` by default.

    Raises:
        ValueError: on a matrix that is empty or not floating, has NaN or infinite values, or fewer than `top`
            singular values.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, -5.0]]))
        tensor([5., 3.], dtype=torch.float64)
    """
    if matrices.ndim < 2 or not matrices.is_floating_point() or 0 in matrices.shape:
        raise ValueError(
            f"matrices are {str(matrices.dtype).removeprefix('torch.')} {list(matrices.shape)}; expected non-empty "
            "floating [..., m, n]"
        )
    rank = min(matrices.shape[-2:])
    if top is not None and not 1 <= top <= rank:
        raise ValueError(f"top={top} of matrices {list(matrices.shape)}; expected 1 to {rank}")
    if not matrices.isfinite().all():
        raise ValueError("NaN or infinite values in a matrix: drop this model, or look for a diverged run")
    double, scale = _scaled(matrices)
    gram = double.mT @ double if double.shape[-2] > double.shape[-1] else double @ double.mT
    squares = torch.linalg.eigvalsh(gram).flip(-1)[..., :top]
    if (squares >= GRAM_SHARE * squares[..., :1]).all():
        return squares.sqrt() * scale
    return torch.linalg.svdvals(double)[..., :top] * scale


def _scaled(matrices: Float[Tensor, "*B m n"]) -> tuple[Float64[Tensor, "*B m n"], Float64[Tensor, "*B 1"]]:
    """Matrices in float64 with largest values of 1 to 2, and the powers of two that they were divided by."""
    double = matrices.double()
    # squares of 1e200 overflow, and those of 1e-200 are 0; a power of two changes no digit
    scale = double.abs().amax((-2, -1)).log2().floor().clamp(-1000, 1000).exp2()
    return double / scale[..., None, None], scale[..., None]


def spectral_norm(matrices: Float[Tensor, "*B m n"]) -> Float64[Tensor, "*B"]:
    """Largest singular value.

    Raises:
        ValueError: on matrices that `singular_values` refuses.
    """
    return singular_values(matrices, 1)[..., 0]


@torch.no_grad()
def stable_rank(matrices: Float[Tensor, "*B m n"]) -> Float64[Tensor, "*B"]:
    """Squared Frobenius over squared spectral norm, between 1 and the rank; NaN for a zero matrix.

    Source: Rudelson and Vershynin, "Sampling from large matrices", 2007.

    Raises:
        ValueError: on matrices that `singular_values` refuses.

    Example:
        >>> stable_rank(torch.eye(3))
        tensor(3., dtype=torch.float64)
    """
    largest = spectral_norm(matrices)[..., None, None]
    # divided first, as squares of large values overflow
    return (matrices.double() / largest).square().sum((-2, -1))


def matrices_of(weights: Float[Tensor, "P D"], layout: Layout) -> dict[str, Float[Tensor, "P m n"]]:
    """The matrices in the vectors of models of one layout, as views: name -> `[P, m, n]`.

    `blocks.0.attn.qkv.weight` is there as `blocks.0.attn.q.weight`, `….k.weight` and `….v.weight`.

    Raises:
        ValueError: on weights that are empty, not floating, or of another length than the layout.

    Example:
        >>> layout = Layout.of({"attn.qkv.weight": torch.zeros(6, 2), "attn.qkv.bias": torch.zeros(6)})
        >>> [(name, list(matrix.shape)) for name, matrix in matrices_of(torch.zeros(1, 18), layout).items()]
        [('attn.q.weight', [1, 2, 2]), ('attn.k.weight', [1, 2, 2]), ('attn.v.weight', [1, 2, 2])]
    """
    check_weights(weights, layout)
    matrices: dict[str, Tensor] = {}
    for (name, place), shape in zip(layout.items(), layout.shapes, strict=True):
        if len(shape) not in (2, 4):
            continue
        matrix = weights[:, place].unflatten(1, (shape[0], -1))
        if name.endswith("attn.qkv.weight"):
            stem = name.removesuffix("qkv.weight")
            matrices |= {f"{stem}{kind}.weight": part for kind, part in zip("qkv", matrix.chunk(3, 1), strict=True)}
        else:
            matrices[name] = matrix
    return matrices
