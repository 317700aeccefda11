"""Features of weights that attacks read, computed in one pass over models or over columns of weights.

Vectors are the weights of P models of one layout (a timm ViT, or a small MLP with one hidden layer), or the
differences of these weights to the checkpoint that was fine-tuned.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.weight_statistics import matrices_of, singular_values, weight_statistics

TOP_SINGULAR_VALUES = 8
WIDEST_ROW = 96
WIDEST_VECTOR = 1024
LARGEST_HEAD = 16_384
MLP_NAMES = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def head_features(vectors: Float[Tensor, "P D"], layout: Layout) -> Float64[Tensor, "P F"]:
    """Features of the last layer: bias, norm and mean of the weights of a class; all weights if at most 16,384."""
    weight, bias = last_layer(vectors, layout)
    parts = [bias, weight.norm(dim=2), weight.mean(2)]
    if weight[0].numel() <= LARGEST_HEAD:
        parts.append(weight.flatten(1))
    return torch.cat(parts, 1).double()


def last_layer(vectors: Float[Tensor, "P D"], layout: Layout) -> tuple[Float[Tensor, "P C E"], Float[Tensor, "P C"]]:
    """Select weight and bias of the last linear layer.

    Raises:
        ZooError: if the layout does not end with one.
    """
    if len(layout.names) < 2 or not layout.names[-1].endswith("bias") or len(layout.shapes[-2]) != 2:
        raise ZooError(f"layout {layout.fingerprint} does not end with the weight and bias of a linear layer")
    parts = unflatten(vectors, Layout(layout.names, layout.shapes))
    return parts[layout.names[-2]], parts[layout.names[-1]]


def tensor_features(vectors: Float[Tensor, "P D"], layout: Layout) -> Float64[Tensor, "P F"]:
    """Mean, standard deviation and norm of each tensor; the eight largest singular values of each matrix.

    Queries, keys and values are three matrices. Source of the singular values: Salama et al., "Dataset Size
    Recovery from Fine-Tuned Weights", 2025.
    """
    statistics = weight_statistics(vectors, layout)
    parts = [statistics.mean, statistics.std, statistics.norm]
    for matrix in matrices_of(vectors, layout).values():
        parts.append(singular_values(matrix, min(TOP_SINGULAR_VALUES, *matrix.shape[1:])))
    return torch.cat(parts, 1)


def sorted_neurons(vectors: Float[Tensor, "P D"], layout: Layout) -> Float[Tensor, "P D"]:
    """Sort the hidden units of MLPs by the sum of their incoming weights.

    Raises:
        ZooError: for any other layout.

    Example:
        >>> layout = Layout(MLP_NAMES, ((2, 1), (2,), (1, 2), (1,)))
        >>> sorted_neurons(torch.tensor([[5.0, 1.0, 0.5, 0.1, 7.0, 8.0, 9.0]]), layout)
        tensor([[1.0000, 5.0000, 0.1000, 0.5000, 8.0000, 7.0000, 9.0000]])
    """
    parts = unflatten(vectors, _of_mlp(layout))
    # sums move with their units, so models that differ in the order alone get one vector
    order = parts["hidden.weight"].sum(2).argsort(1)
    ordered = [
        parts["hidden.weight"].take_along_dim(order[..., None], 1).flatten(1),
        parts["hidden.bias"].take_along_dim(order, 1),
        parts["output.weight"].take_along_dim(order[:, None], 2).flatten(1),
        parts["output.bias"],
    ]
    return torch.cat(ordered, 1)


def mlp_sets(vectors: Float[Tensor, "P D"], layout: Layout) -> dict[str, Tensor]:
    """Hidden units of MLPs as rows of incoming weights, bias and outgoing weight; output biases as a plain vector.

    Returns:
        `neurons` `[P, 1, n, r]` and `plain` `[P, p]`.

    Raises:
        ZooError: for any other layout.
    """
    parts = unflatten(vectors, _of_mlp(layout))
    rows = [parts["hidden.weight"], parts["hidden.bias"][..., None], parts["output.weight"].mT]
    return {"neurons": torch.cat(rows, 2)[:, None], "plain": parts["output.bias"]}


def vit_sets(vectors: Float[Tensor, "P D"], layout: Layout, heads: int) -> dict[str, Tensor]:
    """Sets of a ViT, which do not depend on the order of its neurons, its heads, or the maps within a head.

    Rows longer than 96 are sketched to 96 numbers, plain vectors longer than 1,024 to 1,024, by equal signs and
    places for every model.

    Args:
        vectors: weights of P models.
        layout: layout of a plain timm ViT.
        heads: number of attention heads.

    Returns:
        `neurons` `[P, L, n, r]`: of each block, incoming weights, bias and outgoing weights of a hidden unit;
        `query_key` `[P, L, H, k, r]`: of each head, a row of queries and its row of keys, with biases;
        `value_output` `[P, L, H, k, r]`: a row of values with its bias and its column of the projection;
        `plain` `[P, p]`: all other tensors: LayerNorms, position embedding, class token, patches, biases, head.

    Raises:
        ZooError: for a layout without such blocks.
    """
    parts = unflatten(vectors, layout)
    depth = 1 + max((int(match[1]) for name in layout.names if (match := BLOCK.match(name))), default=-1)
    in_sets: set[str] = set()
    neurons, query_key, value_output = [], [], []
    for block in range(depth):
        names = [f"blocks.{block}.{rest}" for rest in _IN_SETS]
        if any(name not in parts for name in names):
            raise ZooError(f"block {block} of layout {layout.fingerprint} is not that of a plain ViT")
        in_sets |= set(names)
        fc1, fc1_bias, fc2, qkv, qkv_bias, proj = (parts[name] for name in names)
        neurons.append(sketch(torch.cat([fc1, fc1_bias[..., None], fc2.mT], 2), WIDEST_ROW))
        # a row of queries with its row of keys: their products do not change when both are reordered
        query, key, value = torch.cat([qkv, qkv_bias[..., None]], 2).unflatten(1, (3, heads, -1)).unbind(1)
        query_key.append(sketch(torch.cat([query, key], 3), WIDEST_ROW))
        output = proj.unflatten(2, (heads, -1)).permute(0, 2, 3, 1)
        value_output.append(sketch(torch.cat([value, output], 3), WIDEST_ROW))
    if not depth:
        raise ZooError(f"layout {layout.fingerprint} has no blocks of a ViT")
    plain = [sketch(parts[name].flatten(1), WIDEST_VECTOR) for name in layout.names if name not in in_sets]
    sets = {"neurons": neurons, "query_key": query_key, "value_output": value_output}
    return {name: torch.stack(rows, 1) for name, rows in sets.items()} | {"plain": torch.cat(plain, 1)}


_IN_SETS = (
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "attn.qkv.weight",
    "attn.qkv.bias",
    "attn.proj.weight",
)


def sketch(values: Float[Tensor, "*B r"], width: int) -> Float[Tensor, "*B w"]:
    """Sum values of the last axis into `width` places with random signs, which are equal for every caller.

    A sketch preserves inner products in expectation (Charikar et al., "Finding frequent items in data streams",
    2002). An axis of at most `width` numbers is returned unchanged.

    Example:
        >>> sketch(torch.ones(2, 3), 8).shape, sketch(torch.ones(2, 30), 8).shape
        (torch.Size([2, 3]), torch.Size([2, 8]))
    """
    length = values.shape[-1]
    if length <= width:
        return values
    # seeded by the length alone, so that shadows and targets share signs and places
    generator = torch.Generator().manual_seed(length)
    places = torch.randint(width, (length,), generator=generator).to(values.device)
    signs = (2 * torch.randint(2, (length,), generator=generator) - 1).to(values)
    return values.new_zeros(*values.shape[:-1], width).index_add_(-1, places, values * signs)


def difference_components(
    blocks: Iterable[Float[Tensor, "P _"]],
    shadows: Bool[Tensor, " P"],
    members: Int64[Tensor, " M"],
    bases: Int64[Tensor, " P"],
    *,
    components: int | None = None,
) -> Float64[np.ndarray, "M k"]:
    """Principal components of differences to the base, computed from and standardised by shadows alone.

    Blocks of columns are read once, and only inner products of models stay in memory. Where no weight differs, as in
    a frozen trunk, the only component is zero.

    Args:
        blocks: columns of all P models: shadows, targets and bases.
        shadows: true for shadows.
        members: places of the models whose components are returned, in order.
        bases: place of the model that a model was fine-tuned from, or its own place if there is none.
        components: number of components, at most a quarter of the shadows, which is the default.

    Raises:
        ZooError: for fewer than eight shadows, or weights that are not finite.
    """
    count = int(shadows.sum())
    if count < 8:
        raise ZooError(f"{count} shadows are too few for components: expected at least 8")
    places = shadows.nonzero()[:, 0]
    # a model without a base in the zoo is its own base, and keeps its weights
    based = bases != torch.arange(len(bases))
    projections = torch.zeros(len(members), count, dtype=torch.float64)
    products = torch.zeros(count, count, dtype=torch.float64)
    for block in blocks:
        if not block.isfinite().all():
            raise ZooError("NaN or infinite weights among these models: leave diverged models out, and count them")
        values = block.double()
        differences = values - torch.where(based[:, None].to(block.device), values[bases.to(block.device)], 0)
        of_shadows = differences[places.to(block.device)]
        # a spread below rounding error, as in a frozen layer, would only be noise after scaling
        mean, spread = of_shadows.mean(0), of_shadows.std(0, correction=0)
        scale = torch.where(spread > 1e-10 * of_shadows.abs().amax(0).clamp(min=1e-300), 1 / spread, 0)
        centred = (of_shadows - mean) * scale
        products += (centred @ centred.mT).cpu()
        projections += (((differences[members.to(block.device)] - mean) * scale) @ centred.mT).cpu()
    squares, axes = torch.linalg.eigh(products)
    # at most a quarter: more components than that would fit the shadows, not the secret
    most = min(components or count // 4, count // 4)
    squares, axes = squares.flip(0)[:most], axes.flip(1)[:, :most]
    # below rounding of the largest, a component is noise that the division would blow up
    is_useful = squares > 1e-10 * squares[0].clamp(min=1e-300)
    if not is_useful.any():
        return np.zeros((len(members), 1))
    return (projections @ axes[:, is_useful] / squares[is_useful].sqrt()).numpy()


def _of_mlp(layout: Layout) -> Layout:
    if layout.names != MLP_NAMES:
        raise ZooError(f"layout {layout.fingerprint} is not that of an MLP with one hidden layer")
    return layout


def views_of_mlps(
    vectors: Float[Tensor, "P D"], layout: Layout
) -> tuple[Mapping[str, np.ndarray], Mapping[str, Tensor]]:
    """Features and sets of small MLPs: `flat`, `sorted`, and the sets of the encoder."""
    features = {"flat": vectors.double().numpy(), "sorted": sorted_neurons(vectors, layout).double().numpy()}
    return features, mlp_sets(vectors, layout)
