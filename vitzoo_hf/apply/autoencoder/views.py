"""Views of models for an autoencoder: weights of the same function, a fresh one for each model of a batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.batched_vit import BatchedViT
from vitzoo_hf.flatten import Layout, unflatten


def random_views(
    vectors: Float[Tensor, "B D"],
    layout: Layout,
    vit: BatchedViT,
    families: Sequence[str],
    generator: torch.Generator,
) -> Float[Tensor, "B D"]:
    """Weights of the same functions: units of MLPs and heads of attention in random orders.

    Args:
        vectors: weights of plain ViTs of one layout; they are not written to.
        layout: of the vectors.
        vit: sizes of the ViT.
        families: `mlp`, `heads`, both or none.
        generator: of the orders.
    """
    if not families:
        return vectors
    views = vectors.clone()
    named = unflatten(views, layout)
    B = len(vectors)
    for number in range(vit.depth):
        block = f"blocks.{number}."
        if "mlp" in families:
            order = _orders(B, vit.hidden, generator, vectors.device)
            for name, axis in (("mlp.fc1.weight", 1), ("mlp.fc1.bias", 1), ("mlp.fc2.weight", 2)):
                _reorder(named[block + name], order, axis)
        if "heads" in families:
            order = _orders(B, vit.heads, generator, vectors.device)
            for name in ("attn.qkv.weight", "attn.qkv.bias"):
                if block + name in named:
                    _reorder(named[block + name].unflatten(1, (3, vit.heads, -1)), order, 2)
            _reorder(named[block + "attn.proj.weight"].unflatten(2, (vit.heads, -1)), order, 2)
    return views


def _orders(models: int, size: int, generator: torch.Generator, device: torch.device) -> Int64[Tensor, "B size"]:
    return torch.rand(models, size, generator=generator).argsort(1).to(device)


def _reorder(tensor: Tensor, order: Int64[Tensor, "B size"], axis: int) -> None:
    """Bring entry `order[b, i]` of model b to place i of an axis, in place."""
    shape = [1] * tensor.ndim
    shape[0], shape[axis] = order.shape
    tensor.copy_(tensor.gather(axis, order.view(shape).expand_as(tensor)))
