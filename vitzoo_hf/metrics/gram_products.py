"""Inner products of the Gram matrices of many models, without any N x N matrix.

P models, N images, F features. The inner products `<K,L>` come from tiles of the Gram matrices, of which each pair of
models takes one product (N^2 (P F + P^2) operations), or, for the linear kernel, from products of the features of two
models (N P^2 F^2 operations): whichever is fewer. By symmetry both need half of that. Sums over tiles are float64;
products obey `torch.set_float32_matmul_precision`.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from itertools import combinations_with_replacement, product
from math import isqrt
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.metrics.blocks import block_bytes
from vitzoo_hf.metrics.features import CentredFeatures

TILE_ELEMENTS = 2**23
TILE_IMAGES = 192
DIAGONAL_IMAGES = 64
MEDIAN_TILE = 1024
FEATURE_COLUMNS = 2048
MODEL_BLOCK = 64
DIGITS = 2**16
CUDA_TILE_IMAGES, CUDA_DIAGONAL_IMAGES, CUDA_FEATURE_COLUMNS = 2048, 512, 16384
PRODUCT_COLUMNS = 2**15
"""Columns of a product on CUDA that are added up in the working precision; the rest is added in float64."""

Kernel = Callable[[Tensor, slice, slice], Tensor]


class Products(NamedTuple):
    """Sums over the scaled Gram matrices from which both estimators of HSIC follow."""

    inner: Float64[Tensor, "P P"]  # <K,L> without the diagonals; only of the pairs asked for, with p <= q
    rows: Float64[Tensor, "P N"]  # row sums without the diagonal
    diagonal: Float64[Tensor, "P N"]
    scales: Float64[Tensor, " P"]  # a Gram matrix is scales^2 times the scaled one; 1 for RBF
    ulps: Float64[Tensor, " P"]  # rounding of the features as they were given, in units of the scaled ones
    eps: float  # of the precision that the Gram matrices are computed in


def linear_products(centred: CentredFeatures, num_first: int | None = None) -> Products:
    """Products of all pairs; or, with `num_first`, of each model with itself and of the first with all others."""
    P, N, width = len(centred), centred.num_images, sum(centred.widths)
    first = sum(centred.widths[:num_first])
    # columns of the products of features that each route would take: the route with fewer operations is taken
    pairs = width**2 if num_first is None else 2 * first * (width - first) + 2 * sum(F * F for F in centred.widths)
    models = P**2 if num_first is None else 2 * num_first * (P - num_first) + 2 * P
    diagonal = centred.squares
    with torch.autocast(centred.device.type, enabled=False):
        if pairs < N * (width + models):
            inner = _feature_route(centred, num_first) - diagonal @ diagonal.T
        else:
            inner, _ = _sample_route(centred, num_first)
    eps = torch.finfo(centred.dtype).eps
    return Products(
        inner, -diagonal, diagonal, centred.scales, centred.ulps, eps
    )  # rows of a centred Gram matrix sum to 0


def rbf_products(centred: CentredFeatures, rates: Float64[Tensor, " P"], typical: Float64[Tensor, " P"]) -> Products:
    """Products of `exp(-rate |x - y|^2)`, less the value at a `typical` distance: HSIC ignores a constant."""
    squares, rates = centred.squares.to(centred.dtype), rates.to(centred.dtype)
    level = torch.expm1(-rates * typical.to(centred.dtype))

    def kernel(tile: Float[Tensor, "P n m"], i: slice, j: slice) -> Float[Tensor, "P n m"]:
        tile.mul_(2).sub_(squares[:, i, None]).sub_(squares[:, None, j]).clamp_(max=0)
        return tile.mul_(rates[:, None, None]).expm1_().sub_(level[:, None, None])

    with torch.autocast(centred.device.type, enabled=False):
        inner, rows = _sample_route(centred, None, kernel)
    diagonal = -level.double()[:, None].expand_as(rows)
    scales, eps = torch.ones_like(centred.scales), torch.finfo(centred.dtype).eps
    return Products(inner, rows, diagonal, scales, centred.ulps, eps)


def median_distances(centred: CentredFeatures) -> Float64[Tensor, " P"]:
    """Median of all N^2 squared distances within each model, images with themselves included."""
    images = slice(0, centred.num_images)
    squares = centred.squares.to(centred.dtype)
    tile = min(images.stop, MEDIAN_TILE)
    # a tile of distances takes 8 bytes a value for its digits; on the CPU one model at a time stays in the cache
    step = max(1, block_bytes(centred.device, 1) // (8 * tile**2))
    return torch.cat(
        [
            _medians(centred.read(slice(p, min(p + step, run.stop)), images), squares[p : min(p + step, run.stop)])
            for run in centred.runs
            for p in range(run.start, run.stop, step)
        ]
    ).double()


def _block_pairs(blocks: list[slice], num_first: int | None) -> list[tuple[slice, slice]]:
    """Pairs of blocks of models: all, or, with `num_first`, of the first ones with the others."""
    if num_first is None:
        return list(combinations_with_replacement(blocks, 2))
    first = [block for block in blocks if block.start < num_first]
    return list(product(first, blocks[len(first) :]))


def _split(run: slice, size: int, num_first: int | None) -> Iterator[slice]:
    """Blocks of at most `size` models, none across the border between first and others."""
    border = run.start if num_first is None else min(max(num_first, run.start), run.stop)
    for start, stop in ((run.start, border), (border, run.stop)):
        for p in range(start, stop, size):
            yield slice(p, min(p + size, stop))


def _tiles(first: slice, second: slice, height: int, width: int, diagonal: int) -> Iterator[tuple[slice, slice]]:
    """Tiles that cover two ranges of images, or the upper triangle of one, its diagonal in squares of `diagonal`."""
    for start in range(first.start, first.stop, height):
        i = slice(start, min(start + height, first.stop))
        if first == second and height > diagonal:
            yield from _tiles(i, i, diagonal, height, diagonal)
        elif first == second:
            yield i, i
        for other in range(i.stop if first == second else second.start, second.stop, width):
            yield i, slice(other, min(other + width, second.stop))


def _sample_route(
    centred: CentredFeatures, num_first: int | None, kernel: Kernel | None = None
) -> tuple[Float64[Tensor, "P P"], Float64[Tensor, "P N"]]:
    """Inner products of the Gram matrices off their diagonals, and, of a kernel that is not linear, row sums."""
    P, N, on_cuda = len(centred), centred.num_images, centred.device.type == "cuda"
    pairs = _block_pairs(list(_split(slice(0, P), P if on_cuda else MODEL_BLOCK, num_first)), num_first)
    inner = torch.zeros(P, P, dtype=torch.float64, device=centred.device)
    rows = torch.zeros(P, N, dtype=torch.float64, device=centred.device)
    elements = block_bytes(centred.device, 4 * TILE_ELEMENTS) // 4
    images, diagonal = (CUDA_TILE_IMAGES, CUDA_DIAGONAL_IMAGES) if on_cuda else (TILE_IMAGES, DIAGONAL_IMAGES)
    height = min(images, max(16, isqrt(elements // (2 * P)) // 16 * 16))
    width = max(height, min(5 * images, elements // (P * height) // 16 * 16))
    memory = torch.empty(P * min(height, N) * min(width, N), dtype=centred.dtype, device=centred.device)
    for first, second, left, right in centred.block_pairs():
        for i, j in _tiles(first, second, height, width, diagonal):
            shape = (P, i.stop - i.start, j.stop - j.start)
            tile = memory[: P * shape[1] * shape[2]].view(shape)
            rows_i, rows_j = (slice(s.start - b.start, s.stop - b.start) for s, b in ((i, first), (j, second)))
            for run, a, b in zip(centred.runs, left, right, strict=True):
                torch.bmm(a[:, rows_i], b[:, rows_j].transpose(1, 2), out=tile[run])
            if kernel is not None:
                kernel(tile, i, j)
            if i == j:
                tile.diagonal(dim1=1, dim2=2).zero_()
            if kernel is not None:
                rows[:, i] += tile.sum(2)
                rows[:, j] += tile.sum(1) * (i != j)
            # the tile below the diagonal is the transpose: it adds as much and is not computed
            flat, copies = tile.flatten(1), 1 if i == j else 2
            for p, q in pairs:
                inner[p, q] += copies * _product(flat[p], flat[q])
            if num_first is not None:
                inner.diagonal().add_(copies * torch.linalg.vector_norm(flat, dim=1).double().square())
    return inner, rows


def _product(first: Float[Tensor, "P c"], second: Float[Tensor, "Q c"]) -> Float[Tensor, "P Q"]:
    """`first @ second.T`; on CUDA with sums of at most PRODUCT_COLUMNS terms in the working precision."""
    whole = first.shape[1] // PRODUCT_COLUMNS * PRODUCT_COLUMNS
    # a BLAS of the CPU adds up in pieces that fit its cache; one of CUDA may add millions of terms in a row
    if first.device.type != "cuda" or not whole:
        return first @ second.T
    parts = [part[:, :whole].unflatten(1, (-1, PRODUCT_COLUMNS)).transpose(0, 1) for part in (first, second)]
    product = torch.bmm(parts[0], parts[1].transpose(1, 2)).sum(0, dtype=torch.float64)
    return product if whole == first.shape[1] else product + first[:, whole:] @ second[:, whole:].T


def _feature_route(centred: CentredFeatures, num_first: int | None = None) -> Float64[Tensor, "P P"]:
    """`|X_p^T X_q|^2`, the inner products of whole Gram matrices, for blocks of models side by side."""
    P = len(centred)
    inner = torch.zeros(P, P, dtype=torch.float64, device=centred.device)
    blocks: list[slice] = []
    columns = CUDA_FEATURE_COLUMNS if centred.device.type == "cuda" else FEATURE_COLUMNS
    for run in centred.runs:
        blocks += _split(run, max(1, columns // centred.widths[run.start]), num_first)
    pairs = _block_pairs(blocks, num_first)
    if num_first is not None:
        pairs += [(slice(p, p + 1), slice(p, p + 1)) for p in range(P)]
    for p, q in pairs:
        parts = (
            _side_by_side(centred.read(p, images)).T @ _side_by_side(centred.read(q, images))
            for images in centred.blocks()
        )
        products = reduce(torch.add, parts)
        split = products.unflatten(0, (p.stop - p.start, -1)).unflatten(2, (q.stop - q.start, -1))
        inner[p, q] = split.double().square().sum((1, 3))
    return inner


def _side_by_side(models: Float[Tensor, "P n F"]) -> Float[Tensor, "n PF"]:
    return models.transpose(0, 1).flatten(1)


def _medians(models: Float[Tensor, "P N F"], squares: Float[Tensor, "P N"]) -> Float[Tensor, " P"]:
    """Median of all N^2 squared distances of each model, by the digits of their float32 bits.

    Exact, without any N x N matrix, and without a result that the host waits for.
    """
    N = models.shape[1]
    ranks = torch.tensor([(N**2 - 1) // 2, N**2 // 2], device=models.device).expand(len(models), 2).contiguous()
    coarse = _digit_counts(models, squares, None)
    digits = torch.searchsorted(coarse.cumsum(1), ranks, right=True)
    ranks = ranks - (coarse.cumsum(1) - coarse).gather(1, digits)
    rest = [
        torch.searchsorted(
            _digit_counts(models, squares, digits[:, k : k + 1]).cumsum(1),
            ranks[:, k : k + 1].contiguous(),
            right=True,
        )
        for k in range(2)
    ]
    return (digits << 16 | torch.cat(rest, 1)).int().view(torch.float32).mean(1).to(models.dtype)


def _digit_counts(
    models: Float[Tensor, "P N F"], squares: Float[Tensor, "P N"], leading: Int64[Tensor, "P 1"] | None
) -> Int64[Tensor, "P digits"]:
    """Counts of the values of the upper 16 bits, or of the lower 16 bits where the upper are `leading`."""
    P = len(models)
    # one more digit than there are, for the values that are not counted: dropping them would take a sync
    counts = torch.zeros(P, DIGITS + 1, dtype=torch.int64, device=models.device)
    images = slice(0, models.shape[1])
    for i, j in _tiles(images, images, MEDIAN_TILE, MEDIAN_TILE, MEDIAN_TILE):
        distances = squares[:, i, None] + squares[:, None, j] - 2 * (models[:, i] @ models[:, j].transpose(1, 2))
        if i == j:
            distances.diagonal(dim1=1, dim2=2).zero_()
        # the bits of floats that are not negative are in the order of the floats
        bits = distances.clamp(min=0).float().abs().flatten(1).view(torch.int32)
        upper = bits >> 16
        digits = upper if leading is None else torch.where(upper == leading, bits & 0xFFFF, DIGITS)
        copies = torch.full((1, 1), 1 if i == j else 2, dtype=torch.int64, device=models.device)
        counts.scatter_add_(1, digits.long(), copies.expand(digits.shape))
    return counts[:, :DIGITS]
