"""How alike two models represent the same images: HSIC and centred kernel alignment for all pairs.

Pure functions of tensors. P models, N images, F features; the result is float64 on the input's device and inputs
are never written to. With `L` and `K` the Gram matrices of two models, off their diagonals, and `r` their row sums,

    N(N-3) HSIC_1 = <K,L> - 2/(N-2) r_K.r_L + (sum r_K)(sum r_L)/((N-1)(N-2))       (Song et al. 2012)

so both estimators need one expensive term, <K,L> for all pairs. It comes from tiles of the Gram matrices
(P N^2 F + P^2 N^2 operations) or, for the linear kernel, from feature products (P^2 F^2 N), whichever is cheaper; no
N x N matrix ever exists. Each model is centred twice in float32, which removes any offset, and scaled to unit peak,
which no kernel alignment sees; sums over tiles are float64. Products obey `torch.set_float32_matmul_precision`.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement
from math import isqrt
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

TILE_ELEMENTS = 2**24
MAX_TILE = 128
FEATURE_COLUMNS = 2048
MODEL_BLOCK = 64

Features = Float[Tensor, "P N F"] | Sequence[Float[Tensor, "N _"]]
Kernel = Literal["linear", "rbf"]


class Products(NamedTuple):
    """What HSIC needs of the scaled Gram matrices."""

    inner: Float64[Tensor, "P P"]  # <K,L> without the diagonals; only the upper triangle counts
    rows: Float64[Tensor, "P N"]  # row sums without the diagonal
    diagonal: Float64[Tensor, "P N"]
    scales: Float64[Tensor, " P"]  # a Gram matrix is scales^2 times the scaled one; 1 for RBF
    eps: float  # of the precision that the Gram matrices are computed in


@torch.no_grad()
def cka(
    features: Features, *, debiased: bool = True, kernel: Kernel = "linear", bandwidth: float = 1.0
) -> Float64[Tensor, "P P"]:
    """Centred kernel alignment of all pairs of models, `HSIC(K,L) / sqrt(HSIC(K,K) HSIC(L,L))`.

    Debiased CKA (HSIC_1 of Song et al. 2012; Nguyen et al. 2021) is 0 on average for independent features, and may
    be negative; biased CKA (Kornblith et al. 2019) is in [0, 1] and grows with F / N. Neither is clamped. A constant
    representation has no CKA and gives NaN in its whole row and column, diagonal included. So does one whose own
    HSIC is within rounding of zero, as debiased HSIC is when all images are equally far apart.

    Args:
        features: `[P, N, F]`, or one `[N, F_p]` a model where widths differ; any floating dtype. Below float32
            computed in float32, float64 in float64. A column that varies by less than 4 ulp of its largest value
            counts as constant.
        debiased: the unbiased estimator, for N >= 4; else the biased one, for N >= 2.
        kernel: "linear", or "rbf": `exp(-|x - y|^2 / (2 bandwidth^2 median))`.
        bandwidth: of "rbf", as a fraction of the root of the median squared distance over all N^2 pairs, each image
            with itself included: `threshold` in the notebook of Kornblith et al., who report 0.2 to 0.8.

    Returns:
        A symmetric matrix with ones on the diagonal.

    Raises:
        ValueError: on too few images, features that are not finite or do not fit together, or another kernel.

    Example:
        >>> x = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
        >>> similarity = cka(torch.stack([x[0], 3 * x[0] + 7, x[1]]))
        >>> similarity[0, 1].item() > 0.9999, abs(similarity[0, 2].item()) < 0.2
        (True, True)
    """
    products = _products(features, debiased, kernel, bandwidth)
    values = _hsic(products, debiased)
    rounding = 16 * products.eps * (products.inner.diagonal() + products.diagonal.square().sum(1))
    own = values.diagonal().where(values.diagonal() > rounding, torch.nan)
    return values / torch.outer(own, own).sqrt()


@torch.no_grad()
def hsic(
    features: Features, *, debiased: bool = True, kernel: Kernel = "linear", bandwidth: float = 1.0
) -> Float64[Tensor, "P P"]:
    """Hilbert-Schmidt independence criterion of all pairs of models; arguments and errors as `cka`.

    Biased `tr(KHLH) / (N-1)^2` (Gretton et al. 2005) or unbiased HSIC_1. A constant representation gives 0.

    Example:
        >>> hsic(torch.tensor([[[0.0], [1.0], [2.0]]]), debiased=False)
        tensor([[1.]], dtype=torch.float64)
    """
    products = _products(features, debiased, kernel, bandwidth)
    N = products.rows.shape[1]
    scales = torch.outer(products.scales, products.scales).square()
    return _hsic(products, debiased) * scales / (N * (N - 3) if debiased else (N - 1) ** 2)


def _hsic(products: Products, debiased: bool) -> Float64[Tensor, "P P"]:
    """HSIC of the scaled Gram matrices, without its constant factor."""
    inner, rows, diagonal, _, _ = products
    N = rows.shape[1]
    if not debiased:
        inner, rows = inner + diagonal @ diagonal.T, rows + diagonal
    total = rows.sum(1)
    linear, constant = (2 / (N - 2), (N - 1) * (N - 2)) if debiased else (2 / N, N**2)
    values = inner - linear * (rows @ rows.T) + torch.outer(total, total) / constant
    return values.triu() + values.triu(1).T


def _products(features: Features, debiased: bool, kernel: str, bandwidth: float) -> Products:
    if kernel not in ("linear", "rbf") or not bandwidth > 0:
        raise ValueError(
            f"kernel={kernel!r}, bandwidth={bandwidth}; expected 'linear' or 'rbf' and a bandwidth above 0"
        )
    _check(features, 4 if debiased else 2)
    centred, scales = _centred(features)
    P, N, F = centred.shape
    eps = torch.finfo(centred.dtype).eps
    squares = torch.stack([model.square().sum(1) for model in centred])
    diagonal = squares.double()
    with torch.autocast(centred.device.type, enabled=False):
        if kernel == "rbf":
            medians = torch.stack([_median(*model) for model in zip(centred, squares, strict=True)])
            rates = torch.where(medians > 0, 0.5 / bandwidth**2 / medians, 0).to(centred.dtype)
            level = torch.expm1(-rates * medians)  # HSIC ignores a constant: the kernel at the median, less 1
            inner, rows = _sample_route(centred, lambda tile, i, j: _rbf(tile, squares, i, j, rates, level))
            diagonal = -level.double()[:, None].expand(P, N)
            return Products(inner, rows, diagonal, torch.ones_like(scales), eps)
        if P * F * F < N * (F + P):
            inner = _feature_route(centred) - diagonal @ diagonal.T
        else:
            inner, _ = _sample_route(centred)
    return Products(inner, -diagonal, diagonal, scales, eps)  # rows of a centred Gram matrix sum to 0


def _centred(features: Features) -> tuple[Float[Tensor, "P N F"], Float64[Tensor, " P"]]:
    """Columns less their mean, each model divided by its largest entry, narrow models padded with zeros."""
    double = any(model.dtype == torch.float64 for model in features)
    dtype = torch.float64 if double else torch.float32
    N, F = len(features[0]), max(model.shape[1] for model in features)
    centred = torch.zeros(len(features), N, F, dtype=dtype, device=features[0].device)
    peaks = []
    for given, padded in zip(features, centred, strict=True):
        model, out = given.to(padded), padded[:, : given.shape[1]]
        torch.sub(model, model.mean(0), out=out)
        out -= out.mean(0)
        lowest, highest = model.aminmax(dim=0)
        out *= highest - lowest > 4 * torch.finfo(dtype).eps * torch.maximum(-lowest, highest)
        peaks.append(out.abs().amax())
        out /= peaks[-1].where(peaks[-1] > 0, 1)
    scales = torch.stack(peaks).double()
    bad = (~scales.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"NaN or infinite features in {len(bad)} of {len(features)} models (positions {str(bad[:8])[1:-1]}): "
            "drop these models, or look for a diverged run"
        )
    return centred, scales


def _tiles(N: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Pairs of slices that cover the upper triangle of an N x N matrix, diagonal tiles whole."""
    return combinations_with_replacement([slice(start, start + size) for start in range(0, N, size)], 2)


def _sample_route(
    centred: Float[Tensor, "P N F"], kernel: Callable[[Tensor, slice, slice], Tensor] | None = None
) -> tuple[Float64[Tensor, "P P"], Float64[Tensor, "P N"]]:
    """Inner products of the Gram matrices off their diagonals, for models p <= q, and their row sums."""
    P, N, _ = centred.shape
    inner = torch.zeros(P, P, dtype=torch.float64, device=centred.device)
    rows = torch.zeros(P, N, dtype=torch.float64, device=centred.device)
    for i, j in _tiles(N, max(16, min(MAX_TILE, isqrt(TILE_ELEMENTS // P)))):
        tile = torch.bmm(centred[:, i], centred[:, j].transpose(1, 2))
        if kernel is not None:
            tile = kernel(tile, i, j)
        if i == j:
            tile.diagonal(dim1=1, dim2=2).zero_()
        if kernel is not None:
            rows[:, i] += tile.sum(2)
            rows[:, j] += tile.sum(1) * (i != j)
        flat, copies = tile.flatten(1), 1 if i == j else 2
        for start in range(0, P, MODEL_BLOCK):
            block = slice(start, start + MODEL_BLOCK)
            inner[block, start:] += copies * (flat[block] @ flat[start:].T)
    return inner, rows


def _feature_route(centred: Float[Tensor, "P N F"]) -> Float64[Tensor, "P P"]:
    """`|X_p^T X_q|^2`, the inner products of whole Gram matrices, for blocks of models side by side."""
    P, N, F = centred.shape
    inner = torch.zeros(P, P, dtype=torch.float64, device=centred.device)
    for p, q in _tiles(P, max(1, FEATURE_COLUMNS // F)):
        left, right = (centred[block].transpose(0, 1).reshape(N, -1) for block in (p, q))
        products = (left.T @ right).unflatten(0, (-1, F)).unflatten(2, (-1, F))
        inner[p, q] = products.double().square().sum((1, 3))
    return inner


def _rbf(
    tile: Float[Tensor, "P n m"], squares: Float[Tensor, "P N"], i: slice, j: slice, rates: Tensor, level: Tensor
) -> Float[Tensor, "P n m"]:
    """`exp(-rate |x - y|^2) - 1 - level`, written over a tile of inner products."""
    tile.mul_(2).sub_(squares[:, i, None]).sub_(squares[:, None, j]).clamp_(max=0)
    return tile.mul_(rates[:, None, None]).expm1_().sub_(level[:, None, None])


def _median(model: Float[Tensor, "N F"], squares: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """Median of all N^2 squared distances, by the digits of their float32 bits: exact, and no N x N matrix."""
    ranks = torch.tensor([(len(model) ** 2 - 1) // 2, len(model) ** 2 // 2], device=model.device)
    coarse = _digit_counts(model, squares, None)
    digits = torch.searchsorted(coarse.cumsum(0), ranks, right=True)
    ranks -= (coarse.cumsum(0) - coarse)[digits]
    fine = torch.stack([_digit_counts(model, squares, digit) for digit in digits.unique()])[[0, -1]]
    rest = torch.searchsorted(fine.cumsum(1), ranks[:, None], right=True).squeeze(1)
    return (digits << 16 | rest).int().view(torch.float32).mean().to(model.dtype)


def _digit_counts(model: Float[Tensor, "N F"], squares: Float[Tensor, " N"], leading: Tensor | None) -> Tensor:
    """How often each value of the upper 16 bits occurs, or of the lower 16 where the upper are `leading`."""
    counts = torch.zeros(2**16, dtype=torch.int64, device=model.device)
    for i, j in _tiles(len(model), 8 * MAX_TILE):
        distances = squares[i, None] + squares[j] - 2 * (model[i] @ model[j].T)
        if i == j:
            distances.fill_diagonal_(0)
        bits = distances.clamp(min=0).float().abs().flatten().view(torch.int32)
        digits = bits >> 16 if leading is None else (bits & 0xFFFF)[bits >> 16 == leading]
        counts += digits.bincount(minlength=2**16) * (1 if i == j else 2)
    return counts


def _check(features: Features, minimum: int) -> None:
    shapes = [tuple(model.shape) for model in features]
    floating = all(model.is_floating_point() for model in features)
    if not shapes or not floating or any(len(shape) != 2 or 0 in shape for shape in shapes):
        given = list(features.shape) if isinstance(features, Tensor) else shapes[:4]
        raise ValueError(
            f"features are {'floating' if floating else 'not floating'} {given}; expected non-empty floating "
            "[P, N, F], or a sequence of [N, F] (tokens: flatten or pool them to one row an image)"
        )
    sizes = sorted({shape[0] for shape in shapes})
    if len(sizes) > 1:
        raise ValueError(f"models have features of {sizes} images; expected the same images for every model")
    if sizes[0] < minimum:
        raise ValueError(
            f"features of {sizes[0]} images; expected at least {minimum} for "
            f"{'debiased' if minimum == 4 else 'biased'} HSIC: pass more images"
        )
