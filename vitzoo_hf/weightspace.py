"""Where models lie in weight space: norms, distances and cosines of all pairs of a population.

Pure functions of tensors. P models, D weights; the result is float64 on the input's device and inputs are never
written to. Weights are read in blocks of columns, so a memory-mapped population larger than memory works, and
temporaries stay near 16 MB whatever D is. float32 products obey `torch.set_float32_matmul_precision`.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

BLOCK_ELEMENTS = 2**20
MAX_COLUMNS = 4096  # longer float32 sums would lose a digit
RELATIVE_ERROR = 5e-7


@torch.no_grad()
def norms(weights: Float[Tensor, "P D"]) -> Float64[Tensor, " P"]:
    """Euclidean norm of every model, accumulated in float64.

    Raises:
        ValueError: on weights that are empty, not floating, or NaN or infinite somewhere.

    Example:
        >>> norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.], dtype=torch.float64)
    """
    _check(weights)
    squares = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    for block in _column_blocks(weights):
        squares += block.double().square().sum(1)
    if not squares.isfinite().all():
        models = (~squares.isfinite()).nonzero().flatten().tolist()
        shown = ", ".join(map(str, models[:8])) + (", …" if len(models) > 8 else "")
        raise ValueError(
            f"NaN or infinite weights in {len(models)} of {len(weights)} models (positions {shown}): "
            "drop these models, or look for a diverged run"
        )
    return squares.sqrt()


@torch.no_grad()
def weight_distances(weights: Float[Tensor, "P D"], metric: Literal["l2", "cosine"] = "l2") -> Float64[Tensor, "P P"]:
    """Distance of all pairs of models in weight space.

    "l2" is the Euclidean distance from the Gram matrix of the weights less their mean,
    `d_ij^2 = G_ii + G_jj - 2 G_ij`, relative error below 1e-6 for float32: where models lie so close together that
    the difference would cancel, groups of close models are centred anew on their own mean, and what that cannot
    separate is subtracted directly. Identical models are exactly 0 apart. "cosine" is 1 - cosine similarity,
    `(d_ij^2 - (|w_i| - |w_j|)^2) / (2 |w_i| |w_j|)`, which stays accurate for nearly equal models; a zero vector has
    no direction and gives NaN in its whole row and column.

    Args:
        weights: any floating dtype; below float32 computed in float32, float64 in float64.
        metric: "l2" or "cosine".

    Returns:
        A symmetric matrix with a zero diagonal.

    Raises:
        ValueError: on another metric, or weights that are empty, not floating, or NaN or infinite somewhere.

    Example:
        >>> weight_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]))
        tensor([[ 0.,  5., 10.],
                [ 5.,  0.,  5.],
                [10.,  5.,  0.]], dtype=torch.float64)
        >>> weight_distances(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), metric="cosine")
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric={metric!r}; expected 'l2' or 'cosine'")
    lengths = norms(weights)
    with torch.autocast(weights.device.type, enabled=False):
        squared = _squared_distances(weights, torch.arange(len(weights), device=weights.device))
    if metric == "l2":
        return squared.sqrt()
    lengths = lengths.where(lengths > 0, torch.nan)
    radial = (lengths[:, None] - lengths).square()
    return ((squared - radial) / (2 * torch.outer(lengths, lengths))).clamp(0, 2)


def cosine_similarity(weights: Float[Tensor, "P D"]) -> Float64[Tensor, "P P"]:
    """Cosine of the angle between all pairs of models, 1 - `weight_distances(weights, "cosine")`.

    Args:
        weights: any floating dtype. A zero vector gives NaN in its whole row and column.

    Returns:
        A symmetric matrix, in [-1, 1], with ones on the diagonal.

    Raises:
        ValueError: as `weight_distances`.

    Example:
        >>> cosine_similarity(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])).round(decimals=4).abs()
        tensor([[1., 0., 1.],
                [0., 1., 0.],
                [1., 0., 1.]], dtype=torch.float64)
    """
    return 1 - weight_distances(weights, "cosine")


def _squared_distances(weights: Float[Tensor, "P D"], models: Tensor) -> Float64[Tensor, "M M"]:
    """Squared distances of the chosen models, by their centred Gram matrix where its error bound allows."""
    gram = torch.zeros(len(models), len(models), dtype=torch.float64, device=weights.device)
    for block in _column_blocks(weights, models):
        centred = block - block.mean(0)
        gram += centred @ centred.T
    scale = gram.diagonal()[:, None] + gram.diagonal()
    squared = (scale - (gram + gram.T)).fill_diagonal_(0)
    tolerance = torch.finfo(_working(weights.dtype)).eps / RELATIVE_ERROR
    close = ~((squared >= tolerance * scale) & squared.isfinite())  # infinite or NaN where float32 overflows
    close.fill_diagonal_(False)
    if not close.any():
        return squared
    for group in _groups(close):
        if len(group) < len(models):
            squared[group[:, None], group] = _squared_distances(weights, models[group])
        else:
            _measure_directly(squared, weights, models, close)
    return squared


def _groups(close: Bool[Tensor, "M M"]) -> Iterator[Tensor]:
    """Connected components, of two models or more, of the graph of close pairs."""
    labels = torch.arange(len(close), device=close.device)
    while True:
        spread = torch.minimum(labels, labels.expand_as(close).where(close, len(close)).amin(1))
        if torch.equal(spread, labels):
            break
        labels = spread
    for label, size in zip(*labels.unique(return_counts=True), strict=True):
        if size > 1:
            yield (labels == label).nonzero().flatten()


def _measure_directly(
    squared: Float64[Tensor, "M M"], weights: Float[Tensor, "P D"], models: Tensor, close: Bool[Tensor, "M M"]
) -> None:
    """Replace the entries of close pairs by sums of squared differences, in float64."""
    first, second = close.triu().nonzero().T
    for start in range(0, len(first), len(models)):
        i, j = first[start : start + len(models)], second[start : start + len(models)]
        sums = torch.zeros(len(i), dtype=torch.float64, device=weights.device)
        for block in _column_blocks(weights, models):
            sums += (block[i].double() - block[j].double()).square().sum(1)
        squared[i, j] = squared[j, i] = sums


def _column_blocks(weights: Float[Tensor, "P D"], models: Tensor | None = None) -> Iterator[Tensor]:
    """Blocks of columns, in the working precision."""
    rows = len(weights) if models is None else len(models)
    for block in weights.split(max(256, min(MAX_COLUMNS, BLOCK_ELEMENTS // rows)), dim=1):
        yield (block if models is None else block[models]).to(_working(weights.dtype))


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(weights: Tensor) -> None:
    if weights.ndim != 2 or not weights.is_floating_point() or 0 in weights.shape:
        raise ValueError(
            f"weights are {str(weights.dtype).removeprefix('torch.')} {list(weights.shape)}; expected non-empty "
            "floating [P, D]: one flat vector a model (one model: weights[None])"
        )
