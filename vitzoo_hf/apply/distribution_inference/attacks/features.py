"""What an adversary reads off weights: features of flat vectors, all of them in one pass over models or columns.

Vectors are the weights of M models, or their differences to the checkpoint they were fine-tuned from, of one layout:
of a timm ViT, or of a small MLP with one hidden layer.
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


def head_features(vectors: Float[Tensor, "M D"], layout: Layout) -> Float64[Tensor, "M F"]:
    """Of the last layer: bias, norm and mean of each class's weights, and the weights where they are few."""
    weight, bias = last_layer(vectors, layout)
    parts = [bias, weight.norm(dim=2), weight.mean(2)]
    if weight[0].numel() <= LARGEST_HEAD:
        parts.append(weight.flatten(1))
    return torch.cat(parts, 1).double()


def last_layer(vectors: Float[Tensor, "M D"], layout: Layout) -> tuple[Float[Tensor, "M K E"], Float[Tensor, "M K"]]:
    """Weight and bias of the last linear layer.

    Raises:
        ZooError: if the layout does not end with one.
    """
    if len(layout.names) < 2 or not layout.names[-1].endswith("bias") or len(layout.shapes[-2]) != 2:
        raise ZooError(f"layout {layout.fingerprint} does not end with the weight and bias of a linear layer")
    parts = unflatten(vectors, Layout(layout.names, layout.shapes))
    return parts[layout.names[-2]], parts[layout.names[-1]]


def tensor_features(vectors: Float[Tensor, "M D"], layout: Layout) -> Float64[Tensor, "M F"]:
    """Of each tensor mean, standard deviation and norm; of each matrix the eight largest singular values.

    Queries, keys and values are matrices of their own. Source of the singular values: Salama et al., "Dataset Size
    Recovery from Fine-Tuned Weights", 2025.
    """
    found = weight_statistics(vectors, layout)
    parts = [found.mean, found.std, found.norm]
    for matrix in matrices_of(vectors, layout).values():
        parts.append(singular_values(matrix, min(TOP_SINGULAR_VALUES, *matrix.shape[1:])))
    return torch.cat(parts, 1)


def sorted_neurons(vectors: Float[Tensor, "M P"], layout: Layout) -> Float[Tensor, "M P"]:
    """Weights of MLPs with hidden units in the order of the sum of their incoming weights.

    Raises:
        ZooError: for any other layout.

    Example:
        >>> layout = Layout(MLP_NAMES, ((2, 1), (2,), (1, 2), (1,)))
        >>> sorted_neurons(torch.tensor([[5.0, 1.0, 0.5, 0.1, 7.0, 8.0, 9.0]]), layout)
        tensor([[1.0000, 5.0000, 0.1000, 0.5000, 8.0000, 7.0000, 9.0000]])
    """
    parts = unflatten(vectors, _of_mlp(layout))
    order = parts["hidden.weight"].sum(2).argsort(1)
    taken = [
        parts["hidden.weight"].take_along_dim(order[..., None], 1).flatten(1),
        parts["hidden.bias"].take_along_dim(order, 1),
        parts["output.weight"].take_along_dim(order[:, None], 2).flatten(1),
        parts["output.bias"],
    ]
    return torch.cat(taken, 1)


def mlp_sets(vectors: Float[Tensor, "M P"], layout: Layout) -> dict[str, Tensor]:
    """Hidden units of MLPs as rows of incoming weights, bias and outgoing weight; the rest as a plain vector.

    Returns:
        `neurons` `[M, 1, n, r]` and `plain` `[M, p]`.

    Raises:
        ZooError: for any other layout.
    """
    parts = unflatten(vectors, _of_mlp(layout))
    rows = [parts["hidden.weight"], parts["hidden.bias"][..., None], parts["output.weight"].mT]
    return {"neurons": torch.cat(rows, 2)[:, None], "plain": parts["output.bias"]}


def vit_sets(vectors: Float[Tensor, "M D"], layout: Layout, heads: int) -> dict[str, Tensor]:
    """A ViT as sets that do not change with the order of its neurons, its heads, or the maps within a head.

    Rows longer than 96 are sketched to 96 numbers, plain vectors longer than 1,024 to that, by the same signs and
    places for every model.

    Args:
        vectors: of the layout.
        layout: of a plain ViT; names as timm gives them.
        heads: of attention.

    Returns:
        `neurons` `[M, L, n, r]`: of each block, incoming weights, bias and outgoing weights of a hidden unit;
        `query_key` `[M, L, H, k, r]`: of each head, a row of queries and its row of keys, with biases;
        `value_output` `[M, L, H, k, r]`: a row of values with its bias and its column of the projection;
        `plain` `[M, p]`: everything else: LayerNorms, position embedding, class token, patches, biases, head.

    Raises:
        ZooError: for a layout without such blocks.
    """
    parts = unflatten(vectors, layout)
    depth = 1 + max((int(found[1]) for name in layout.names if (found := BLOCK.match(name))), default=-1)
    used: set[str] = set()
    neurons, query_key, value_output = [], [], []
    for block in range(depth):
        names = [f"blocks.{block}.{rest}" for rest in _IN_SETS]
        if any(name not in parts for name in names):
            raise ZooError(f"block {block} of layout {layout.fingerprint} is not that of a plain ViT")
        used |= set(names)
        fc1, fc1_bias, fc2, qkv, qkv_bias, proj = (parts[name] for name in names)
        neurons.append(sketch(torch.cat([fc1, fc1_bias[..., None], fc2.mT], 2), WIDEST_ROW))
        query, key, value = torch.cat([qkv, qkv_bias[..., None]], 2).unflatten(1, (3, heads, -1)).unbind(1)
        query_key.append(sketch(torch.cat([query, key], 3), WIDEST_ROW))
        output = proj.unflatten(2, (heads, -1)).permute(0, 2, 3, 1)
        value_output.append(sketch(torch.cat([value, output], 3), WIDEST_ROW))
    if not depth:
        raise ZooError(f"layout {layout.fingerprint} has no blocks of a ViT")
    plain = [sketch(parts[name].flatten(1), WIDEST_VECTOR) for name in layout.names if name not in used]
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
    """Values of the last axis summed into so many places with random signs, the same for every caller.

    It keeps inner products in expectation (Charikar et al., "Finding frequent items in data streams", 2002). Axes
    that are short enough stay as they are.

    Example:
        >>> sketch(torch.ones(2, 3), 8).shape, sketch(torch.ones(2, 30), 8).shape
        (torch.Size([2, 3]), torch.Size([2, 8]))
    """
    length = values.shape[-1]
    if length <= width:
        return values
    generator = torch.Generator().manual_seed(length)
    places = torch.randint(width, (length,), generator=generator).to(values.device)
    signs = (2 * torch.randint(2, (length,), generator=generator) - 1).to(values)
    return values.new_zeros(*values.shape[:-1], width).index_add_(-1, places, values * signs)


def difference_components(
    blocks: Iterable[Float[Tensor, "P _"]],
    shadows: Bool[Tensor, " P"],
    wanted: Int64[Tensor, " M"],
    bases: Int64[Tensor, " P"],
    *,
    components: int | None = None,
) -> Float64[np.ndarray, "M k"]:
    """Principal components of differences to the base, standardised by shadows, which alone decide the components.

    Weights arrive in blocks of columns, each read once; only inner products of models are kept. Where nothing
    differs, as in a frozen trunk, there is one component, of zeros.

    Args:
        blocks: columns of all P models, shadows, targets and bases among them.
        shadows: which models are shadows.
        wanted: models whose components are returned, in order.
        bases: the place of the model that each was fine-tuned from, or its own place for none.
        components: at most a quarter of the shadows, which is the default.

    Raises:
        ZooError: for fewer than eight shadows, or weights that are not finite.
    """
    count = int(shadows.sum())
    if count < 8:
        raise ZooError(f"{count} shadows are too few for components: expected at least 8")
    known = shadows.nonzero()[:, 0]
    based = bases != torch.arange(len(bases))
    total = torch.zeros(len(wanted), count, dtype=torch.float64)
    own = torch.zeros(count, count, dtype=torch.float64)
    for block in blocks:
        if not block.isfinite().all():
            raise ZooError("NaN or infinite weights among these models: leave diverged models out, and count them")
        values = block.double()
        moved = values - torch.where(based[:, None].to(block.device), values[bases.to(block.device)], 0)
        held = moved[known.to(block.device)]
        mean, spread = held.mean(0), held.std(0, correction=0)
        scale = torch.where(spread > 1e-10 * held.abs().amax(0).clamp(min=1e-300), 1 / spread, 0)
        centred = (held - mean) * scale
        own += (centred @ centred.mT).cpu()
        total += (((moved[wanted.to(block.device)] - mean) * scale) @ centred.mT).cpu()
    squares, axes = torch.linalg.eigh(own)
    kept = min(components or count // 4, count // 4)
    squares, axes = squares.flip(0)[:kept], axes.flip(1)[:, :kept]
    useful = squares > 1e-10 * squares[0].clamp(min=1e-300)
    if not useful.any():
        return np.zeros((len(wanted), 1))
    return (total @ axes[:, useful] / squares[useful].sqrt()).numpy()


def _of_mlp(layout: Layout) -> Layout:
    if layout.names != MLP_NAMES:
        raise ZooError(f"layout {layout.fingerprint} is not that of an MLP with one hidden layer")
    return layout


def views_of_mlps(
    vectors: Float[Tensor, "M P"], layout: Layout
) -> tuple[Mapping[str, np.ndarray], Mapping[str, Tensor]]:
    """Features and sets of small MLPs: `flat`, `sorted`, and the sets of the encoder."""
    features = {"flat": vectors.double().numpy(), "sorted": sorted_neurons(vectors, layout).double().numpy()}
    return features, mlp_sets(vectors, layout)
