"""The training forward of many plain ViTs at once: M sets of weights, each on images of its own.

The same products as `BatchedViT`, which shares its images and writes in place; here nothing is overwritten, so that
autograd finds what it needs. No operation mixes two models: gradients of one do not depend on the others.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vitzoo_hf.batched_vit import BatchedViT, batched_head, batched_linear, batched_norm


def trainable_vit(model: nn.Module) -> BatchedViT | None:
    """The sizes of a plain ViT that draws nothing while it trains (no dropout, no stochastic depth), else None."""
    vit: Any = model
    sizes = BatchedViT.of(model)
    if sizes is None or any(isinstance(part, nn.Dropout) and part.p > 0 for part in vit.modules()):
        return None
    paths = [path for block in vit.blocks for path in (block.drop_path1, block.drop_path2)]
    return sizes if all(type(path) is nn.Identity for path in paths) else None


def stacked_patches(vit: BatchedViT, images: Float[Tensor, "M B C H W"]) -> Float[Tensor, "M B t c"]:
    """Images of every model cut into patches."""
    return vit.patches(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def stacked_logits(
    vit: BatchedViT, tensors: Mapping[str, Tensor], patches: Float[Tensor, "M B t c"]
) -> Float[Tensor, "M B K"]:
    """Outputs of M models, each on its own images, differentiable.

    Args:
        vit: the sizes that the models share.
        tensors: timm's names -> `[M, …]`.
        patches: from `stacked_patches`, of the same dtype.

    Example:
        >>> from vitzoo_hf.vit import create
        >>> args = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=3)
        >>> model = create("vit_tiny_patch16_224", args)
        >>> vit = trainable_vit(model)
        >>> stacked = {name: torch.stack([value, value]) for name, value in model.state_dict().items()}
        >>> stacked_logits(vit, stacked, stacked_patches(vit, torch.zeros(2, 5, 1, 8, 8))).shape
        torch.Size([2, 5, 3])
    """
    M, B = patches.shape[:2]
    weight, bias = tensors["patch_embed.proj.weight"].flatten(2), tensors["patch_embed.proj.bias"]
    embedded = torch.baddbmm(bias[:, None], patches.flatten(1, 2), weight.transpose(1, 2))
    token = tensors["cls_token"].expand(M, B, 1, -1)
    stream = (torch.cat([token, embedded.unflatten(1, (B, -1))], 2) + tensors["pos_embed"]).flatten(1, 2)
    for number in range(vit.depth):
        stream = _block(vit, tensors, f"blocks.{number}.", stream)
    features = batched_norm(stream.unflatten(1, (B, -1))[:, :, 0], tensors, "norm", vit.eps)
    return batched_head(features, tensors)


def _block(
    vit: BatchedViT, tensors: Mapping[str, Tensor], prefix: str, stream: Float[Tensor, "M n d"]
) -> Float[Tensor, "M n d"]:
    """Attention and MLP, added to the stream."""
    M, n, d = stream.shape
    inner = batched_norm(stream, tensors, f"{prefix}norm1", vit.eps)
    projected = batched_linear(inner, tensors, f"{prefix}attn.qkv")
    query, key, value = projected.view(M * n // vit.tokens, vit.tokens, 3, vit.heads, -1).permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(M, n, d)
    stream = stream + batched_linear(attended, tensors, f"{prefix}attn.proj")
    inner = batched_norm(stream, tensors, f"{prefix}norm2", vit.eps)
    hidden = functional.gelu(batched_linear(inner, tensors, f"{prefix}mlp.fc1"))
    return stream + batched_linear(hidden, tensors, f"{prefix}mlp.fc2")
