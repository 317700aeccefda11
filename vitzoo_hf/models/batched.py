"""The training forward of many plain ViTs at once: M sets of weights, each on images of its own.

The same products as `BatchedViT`, which shares its images and writes in place; here nothing is overwritten, so that
autograd finds what it needs. No operation mixes two models: gradients of one do not depend on the others.

The forward pass of many plain ViTs at once: the same timm model with M sets of weights, on the same images.

Written for the pre-norm ViT that timm builds for names like `vit_small_patch16_224`: patch embedding, class token,
learned positions, blocks of LayerNorm, attention and GELU MLP, class token through the last norm to a linear or MLP
head. `BatchedViT.of` gives None for any other, which is then run as the module that it is.

M models, B images, T tokens, d features. Linear layers are one batched product a layer; the images are shared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from vitzoo_hf.models.vit import is_plain

READOUTS = ("token", "mean")


class Outputs(NamedTuple):
    """What a forward gives: logits, features before the head, and one vector a block where they were asked for."""

    logits: Float[Tensor, "M B K"]
    features: Float[Tensor, "M B d"]
    blocks: Float[Tensor, "M L B d"] | None

    def of(self, model: int) -> "Outputs":
        """The outputs of one of the models alone, M = 1."""
        one = slice(model, model + 1)
        return Outputs(self.logits[one], self.features[one], None if self.blocks is None else self.blocks[one])

    def room_for(self, num_images: int) -> "Outputs":
        """Empty float32 outputs of these models on so many images."""

        def room(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            shape = [*values.shape[:-2], num_images, values.shape[-1]]
            return torch.empty(shape, dtype=torch.float32, device=values.device)

        return Outputs(*map(room, self))  # type: ignore[arg-type]

    def fill(self, part: "Outputs", start: int) -> None:
        """Put in outputs on some of the images, from `start` on."""
        for to, values in zip(self, part, strict=True):
            if to is not None and values is not None:
                to[..., start : start + values.shape[-2], :] = values


@dataclass(frozen=True)
class BatchedViT:
    """The sizes of a plain ViT that its weights alone do not tell.

    Example:
        >>> from vitzoo_hf.models.vit import create
        >>> args = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=3)
        >>> model = create("vit_tiny_patch16_224", args).eval()
        >>> vit = BatchedViT.of(model)
        >>> stacked = {name: torch.stack([value, value]) for name, value in model.state_dict().items()}
        >>> vit(stacked, vit.patches(torch.zeros(5, 1, 8, 8))).logits.shape
        torch.Size([2, 5, 3])
    """

    patch: tuple[int, int]
    heads: int
    depth: int
    eps: float
    image: tuple[int, int, int]
    hidden: int

    @classmethod
    def of(cls, model: nn.Module) -> "BatchedViT | None":
        """Its sizes if a timm model is a plain ViT, else None."""
        if not is_plain(model):
            return None
        vit: Any = model
        block, embed = vit.blocks[0], vit.patch_embed
        return cls(
            patch=tuple(embed.patch_size),
            heads=block.attn.num_heads,
            depth=len(vit.blocks),
            eps=block.norm1.eps,
            image=(embed.proj.in_channels, *embed.img_size),
            hidden=block.mlp.fc1.out_features,
        )

    @property
    def tokens(self) -> int:
        """Tokens an image, the class token among them."""
        return 1 + (self.image[1] // self.patch[0]) * (self.image[2] // self.patch[1])

    @property
    def widest(self) -> int:
        """Numbers in the widest activation of one image."""
        return self.tokens * self.hidden

    def patches(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B t c"]:
        """Images cut into patches, each in the order of the patch embedding's weights."""
        B, C, H, W = images.shape
        down, across = self.patch
        cut = images.reshape(B, C, H // down, down, W // across, across).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(B, (H // down) * (W // across), C * down * across)

    def __call__(
        self, tensors: Mapping[str, Tensor], patches: Float[Tensor, "B t c"], readout: str | None = None
    ) -> Outputs:
        """Outputs of M models.

        Args:
            tensors: timm's names -> `[M, …]`, all of the dtype to compute in.
            patches: of the images, of the same dtype.
            readout: what to keep of each block: `token`, the class token, or `mean`, that of all other tokens.
        """
        M, B, T = len(tensors["cls_token"]), len(patches), self.tokens
        stream = self._embedded(tensors, patches)
        d = stream.shape[-1]
        kept = None if readout is None else stream.new_empty(M, self.depth, B, d)
        for number in range(self.depth):
            self._block(tensors, f"blocks.{number}.", stream)
            if kept is not None:
                tokens = stream.view(M, B, T, d)
                kept[:, number] = tokens[:, :, 0] if readout == "token" else tokens[:, :, 1:].mean(2)
        features = batched_norm(stream.view(M, B, T, d)[:, :, 0], tensors, "norm", self.eps)
        return Outputs(batched_head(features, tensors), features, kept)

    def _embedded(self, tensors: Mapping[str, Tensor], patches: Float[Tensor, "B t c"]) -> Float[Tensor, "M n d"]:
        """Embedded patches behind the class token, with their positions."""
        B, t, c = patches.shape
        weight, bias = tensors["patch_embed.proj.weight"].flatten(2), tensors["patch_embed.proj.bias"]
        M, d, _ = weight.shape
        position = tensors["pos_embed"].squeeze(1)
        stream = patches.new_empty(M, B, t + 1, d)
        stream[:, :, 0] = (tensors["cls_token"].flatten(1) + position[:, 0])[:, None]
        embedded = torch.matmul(patches.reshape(B * t, c), weight.transpose(1, 2))
        torch.add(embedded.view(M, B, t, d), (position[:, 1:] + bias[:, None])[:, None], out=stream[:, :, 1:])
        return stream.view(M, B * (t + 1), d)

    def _block(self, tensors: Mapping[str, Tensor], prefix: str, stream: Float[Tensor, "M n d"]) -> None:
        """Attention and MLP, added to the stream in place."""
        M, n, d = stream.shape
        T, heads = self.tokens, self.heads
        inner = batched_norm(stream, tensors, f"{prefix}norm1", self.eps)
        projected = batched_linear(inner, tensors, f"{prefix}attn.qkv")
        query, key, value = projected.view(M * n // T, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(M, n, d)
        stream += batched_linear(attended, tensors, f"{prefix}attn.proj")
        inner = batched_norm(stream, tensors, f"{prefix}norm2", self.eps)
        hidden = functional.gelu(batched_linear(inner, tensors, f"{prefix}mlp.fc1"))
        stream += batched_linear(hidden, tensors, f"{prefix}mlp.fc2")


def outputs_of_module(
    model: Any, tensors: Mapping[str, Tensor], images: Float[Tensor, "B C H W"], readout: str | None = None
) -> Outputs:
    """Outputs of one timm ViT of any kind, M = 1, by the module itself with these tensors as its weights."""
    blocks: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, given, result: blocks.append(result))
        for block in (model.blocks if readout is not None else ())
    ]
    try:
        named = {f"model.{name}": value for name, value in tensors.items()}
        features, logits = functional_call(_FeaturesAndLogits(model), named, (images,))
    finally:
        for handle in handles:
            handle.remove()
    prefix = model.num_prefix_tokens
    read = [block[:, 0] if readout == "token" else block[:, prefix:].mean(1) for block in blocks]
    return Outputs(logits[None], features[None], torch.stack(read)[None] if read else None)


class _FeaturesAndLogits(nn.Module):
    """Features before the head and the logits that are read from them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return features, self.model.head(features)


def batched_head(features: Float[Tensor, "M B d"], tensors: Mapping[str, Tensor]) -> Float[Tensor, "M B K"]:
    """The linear or MLP head of each model on its own features."""
    if "head.weight" in tensors:
        return batched_linear(features, tensors, "head")
    return batched_linear(functional.relu(batched_linear(features, tensors, "head.0")), tensors, "head.2")


def batched_linear(
    inputs: Float[Tensor, "M n i"], tensors: Mapping[str, Tensor], name: str
) -> Float[Tensor, "M n o"]:
    """The linear layer `name` of each model on its own inputs."""
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if len(inputs) == 1:
        return functional.linear(inputs[0], weight[0], bias[0])[None]
    return torch.baddbmm(bias[:, None], inputs, weight.transpose(1, 2))


def batched_norm(
    inputs: Float[Tensor, "M n d"], tensors: Mapping[str, Tensor], name: str, eps: float
) -> Float[Tensor, "M n d"]:
    """The LayerNorm `name` of each model on its own inputs."""
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if len(inputs) == 1:
        return functional.layer_norm(inputs, inputs.shape[-1:], weight[0], bias[0], eps)
    return torch.addcmul(bias[:, None], functional.layer_norm(inputs, inputs.shape[-1:], eps=eps), weight[:, None])


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
        >>> from vitzoo_hf.models.vit import create
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
