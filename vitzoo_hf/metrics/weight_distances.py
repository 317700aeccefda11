"""Geometry of models in weight space: norms, distances and cosines of all pairs of a population.

Pure functions of tensors. P models, D weights; the result is float64 on the input's device and inputs are never
written to. Weights are read in blocks of columns, so a memory-mapped population larger than memory works, and
temporaries stay near 16 MB whatever D is. float32 products obey `torch.set_float32_matmul_precision`.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.format.layout import Layout
from vitzoo_hf.metrics.blocks import working
from vitzoo_hf.metrics.squared_distances import SquaredDistances, check_weights, squared_lengths

Metric = Literal["l2", "normalized_l2", "cosine"]


def norms(weights: Float[Tensor, "P D"]) -> Float64[Tensor, " P"]:
    """Euclidean norm of every model, accumulated in float64.

    Raises:
        ValueError: on weights that are empty, not floating, or NaN or infinite somewhere.

    Example:
        >>> norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.], dtype=torch.float64)
    """
    check_weights(weights)
    scale = _scale(weights)
    squares = squared_lengths(weights / scale if scale != 1 else weights)
    if not squares.isfinite().all():
        models = (~squares.isfinite()).nonzero().flatten().tolist()
        shown = ", ".join(map(str, models[:8])) + (", …" if len(models) > 8 else "")
        raise ValueError(
            f"NaN or infinite weights in {len(models)} of {len(weights)} models (positions {shown}): "
            "drop these models, or look for a diverged run"
        )
    return squares.sqrt() * scale


def _scale(weights: Float[Tensor, "P D"]) -> float:
    """A power of two that float64 weights of extreme size are divided by, as their squares would leave the range.

    Float32 weights need none: their squares are float64 wherever they would leave the range.
    """
    if weights.dtype != torch.float64:
        return 1.0
    largest = float(weights.abs().amax())
    if not math.isfinite(largest) or largest == 0 or 1e-100 < largest < 1e100:
        return 1.0
    return 2.0 ** min(max(math.floor(math.log2(largest)), -1000), 1000)


def weight_distances(weights: Float[Tensor, "P D"], metric: Metric = "l2") -> Float64[Tensor, "P P"]:
    """Distance of all pairs of models in weight space.

    "l2" is the Euclidean distance from the Gram matrix of the weights less their mean,
    `d_ij^2 = G_ii + G_jj - 2 G_ij`, relative error below 1e-6 for float32: where models lie so close together that
    the difference would cancel, groups of close models are centred again on the mean of the group, and models that
    this does not separate are subtracted directly. Identical models are exactly 0 apart. "normalized_l2" is
    `d_ij / sqrt(|w_i| |w_j|)`, which no common scale of the weights changes. "cosine" is 1 - cosine similarity,
    `(d_ij^2 - (|w_i| - |w_j|)^2) / (2 |w_i| |w_j|)`, which stays accurate for nearly equal models; its absolute error
    is below 1e-6 times the ratio of the two norms, which matters where they differ a thousandfold. For the last two
    a zero vector has no length to divide by and gives NaN in its whole row and column.

    Args:
        weights: any floating dtype; below float32 computed in float32, float64 in float64.
        metric: "l2", "normalized_l2" or "cosine".

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
    _check_metric(metric)
    check_weights(weights)
    scale = _scale(weights)
    if scale != 1:
        distance = weight_distances(weights / scale, metric)
        return distance * scale if metric == "l2" else distance  # the other two do not change with a common scale
    distances = SquaredDistances(len(weights), weights.dtype, weights.device)
    lengths = None
    while distances.is_pending:
        distances.add(weights)
        distances.finish_pass()
        if lengths is None and (metric != "l2" or len(weights) == 1 or not distances.squared.isfinite().all()):
            lengths = norms(weights)
    return distances.squared.sqrt() if lengths is None else distances_of(distances.squared, lengths, metric)


def part_distances(
    weights: Float[Tensor, "P D"],
    layout: Layout,
    *,
    per: Literal["model", "block", "tensor"] = "block",
    metric: Metric = "l2",
) -> Float64[Tensor, "G P P"]:
    """Distance of all pairs of models, for each part of the network alone.

    Args:
        weights: the vectors of models of one layout.
        layout: the layout of the vectors.
        per: the parts, in the order of `layout.parts(per)`: embedding, blocks, norm and head, or every tensor.
        metric: "l2", "normalized_l2" or "cosine"; see `weight_distances`.

    Raises:
        ValueError: on another metric or weights that `weight_distances` refuses, or if weights and layout differ in
            length.

    Example:
        >>> layout = Layout.of({"norm.bias": torch.zeros(1), "head.bias": torch.zeros(2)})
        >>> part_distances(torch.tensor([[1.0, 0.0, 0.0], [3.0, 3.0, 4.0]]), layout)[:, 0, 1]
        tensor([2., 5.], dtype=torch.float64)
    """
    _check_metric(metric)
    check_weights(weights, layout)
    norms(weights)
    scale = _scale(weights)
    if scale != 1:
        distance = part_distances(weights / scale, layout, per=per, metric=metric)
        return distance * scale if metric == "l2" else distance
    places = dict(layout.items())
    matrices = []
    for names in layout.parts(per).values():
        pieces = [weights[:, places[name]] for name in names]
        distances = SquaredDistances(len(weights), weights.dtype, weights.device)
        while distances.is_pending:
            for piece in pieces:
                distances.add(piece)
            distances.finish_pass()
        lengths = torch.stack([squared_lengths(piece) for piece in pieces]).sum(0).sqrt()
        matrices.append(distances_of(distances.squared, lengths, metric))
    return torch.stack(matrices)


def cosine_similarity(weights: Float[Tensor, "P D"]) -> Float64[Tensor, "P P"]:
    """Cosine of the angle between all pairs of models, 1 - `weight_distances(weights, "cosine")`.

    Args:
        weights: any floating dtype. A zero vector gives NaN in its whole row and column.

    Returns:
        A symmetric matrix, in [-1, 1], with ones on the diagonal.

    Raises:
        ValueError: on weights that `weight_distances` refuses.

    Example:
        >>> cosine_similarity(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])).round(decimals=4).abs()
        tensor([[1., 0., 1.],
                [0., 1., 0.],
                [1., 0., 1.]], dtype=torch.float64)
    """
    return 1 - weight_distances(weights, "cosine")


@torch.no_grad()
def task_vectors(children: Float[Tensor, "P D"], parents: Float[Tensor, "P D"]) -> Float[Tensor, "P D"]:
    """The change by training: child less parent, row by row ("Editing models with task arithmetic", Ilharco et al.).

    `norms` of the result says how far each model went, `cosine_similarity` which models went the same way. The result
    of half precision is float32, since the difference of two float16 numbers need not be a float16 number.

    Raises:
        ValueError: on weights that are empty or not floating, or if the two differ in shape.

    Example:
        >>> task_vectors(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([[1., 0.]])
    """
    check_weights(children)
    if children.shape != parents.shape:
        raise ValueError(
            f"children are {list(children.shape)} and parents {list(parents.shape)}; expected one parent a child: "
            "repeat shared parents, and leave heads out where they differ (Layout.trunk)"
        )
    dtype = working(torch.promote_types(children.dtype, parents.dtype))
    return children.to(dtype) - parents.to(dtype)


def distances_of(
    squared: Float64[Tensor, "*G P P"], lengths: Float64[Tensor, "*G P"], metric: Metric
) -> Float64[Tensor, "*G P P"]:
    """A metric of all pairs from squared distances and norms, as `weight_distances` defines it.

    Example:
        >>> distances_of(torch.tensor([[0.0, 4.0], [4.0, 0.0]]).double(), torch.ones(2).double(), "cosine")[0, 1]
        tensor(2., dtype=torch.float64)
    """
    if metric == "l2":
        return squared.sqrt()
    lengths = lengths.where(lengths > 0, torch.nan)
    products = lengths[..., :, None] * lengths[..., None, :]
    if metric == "normalized_l2":
        return (squared / products).sqrt()
    # |x/|x| - y/|y||^2 / 2, written without 1 - cos, which would cancel for nearly equal models
    radial = (lengths[..., :, None] - lengths[..., None, :]).square()
    return ((squared - radial) / (2 * products)).clamp(0, 2)


def _check_metric(metric: str) -> None:
    if metric not in get_args(Metric):
        raise ValueError(f"metric={metric!r}; expected 'l2', 'normalized_l2' or 'cosine'")
