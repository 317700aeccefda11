"""The forward pass of many plain ViTs at once: one timm model with P sets of weights.

Written for the pre-norm ViT that timm builds for names like `vit_small_patch16_224`: patch embedding, class token,
learned positions, blocks of LayerNorm, attention and GELU MLP, class token through the last norm to a linear or MLP
head. `BatchedViT.of` gives None for any other architecture, which then runs as a module.

P models, B images of a batch, t patches and T tokens an image, n = B T tokens, L blocks, F features, C classes. A
linear layer is one batched product for all models.

Cost: measuring overwrites activations, which halves their memory; training keeps them for autograd.
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
    """Outputs of a forward: logits, features before the head and, on request, one vector a block."""

    logits: Float[Tensor, "P B C"]
    features: Float[Tensor, "P B F"]
    blocks: Float[Tensor, "P L B F"] | None

    def of(self, model: int) -> "Outputs":
        """Outputs of a single model, P = 1."""
        one = slice(model, model + 1)
        return Outputs(self.logits[one], self.features[one], None if self.blocks is None else self.blocks[one])

    def room_for(self, num_images: int) -> "Outputs":
        """Empty float32 outputs of these models on so many images."""

        def room(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            shape = [*values.shape[:-2], num_images, values.shape[-1]]
            # results are float32 whatever the precision of the forward
            return torch.empty(shape, dtype=torch.float32, device=values.device)

        return Outputs(*map(room, self))  # type: ignore[arg-type]

    def fill(self, part: "Outputs", start: int) -> None:
        """Write outputs on some of the images, from image `start` on."""
        for room, values in zip(self, part, strict=True):
            if room is not None and values is not None:
                room[..., start : start + values.shape[-2], :] = values


@dataclass(frozen=True)
class BatchedViT:
    """The sizes of a plain ViT that do not follow from its weights alone.

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
        """The sizes of a timm model that is a plain ViT, else None."""
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

    @classmethod
    def trainable(cls, model: nn.Module) -> "BatchedViT | None":
        """The sizes of a plain ViT that draws nothing in training (no dropout, no stochastic depth), else None."""
        sizes = cls.of(model)
        if sizes is None or any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules()):
            return None
        vit: Any = model
        paths = [path for block in vit.blocks for path in (block.drop_path1, block.drop_path2)]
        # timm puts an identity where stochastic depth is off
        return sizes if all(type(path) is nn.Identity for path in paths) else None

    def patches(self, images: Float[Tensor, "*P B channels H W"]) -> Float[Tensor, "*P B t values"]:
        """Images cut into patches, each in the order of the patch embedding's weights."""
        *lead, channels, height, width = images.shape
        rows, columns = self.patch
        cut = images.reshape(-1, channels, height // rows, rows, width // columns, columns).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(*lead, (height // rows) * (width // columns), channels * rows * columns)

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        patches: Float[Tensor, "*P B t values"],
        readout: str | None = None,
        *,
        in_place: bool = True,
    ) -> Outputs:
        """Outputs of P models; no operation mixes two of them, so gradients of one do not depend on the others.

        Args:
            tensors: timm's names -> `[P, …]`, all of the dtype to compute in.
            patches: patches of the images, of the same dtype: `[B, t, values]`, shared by all models, or
                `[P, B, t, values]`, images of each model.
            readout: vector to keep of each block: `token`, the class token, or `mean`, the mean of all other tokens.
            in_place: overwrite activations, which takes less memory; give False to differentiate.
        """
        P, B, T = len(tensors["cls_token"]), patches.shape[-3], self.tokens
        stream = self._embedded(tensors, patches, in_place)
        d = stream.shape[-1]
        readouts = None if readout is None else stream.new_empty(P, self.depth, B, d)
        for number in range(self.depth):
            stream = self._block(tensors, f"blocks.{number}.", stream, in_place)
            if readouts is not None:
                tokens = stream.view(P, B, T, d)
                readouts[:, number] = tokens[:, :, 0] if readout == "token" else tokens[:, :, 1:].mean(2)
        features = batched_norm(stream.view(P, B, T, d)[:, :, 0], tensors, "norm", self.eps)
        return Outputs(batched_head(features, tensors), features, readouts)

    def logits(
        self, tensors: Mapping[str, Tensor], images: Float[Tensor, "P B channels H W"]
    ) -> Float[Tensor, "P B C"]:
        """Logits of P models, each on separate images, differentiable.

        Example:
            >>> from vitzoo_hf.models.vit import create
            >>> args = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=3)
            >>> model = create("vit_tiny_patch16_224", args)
            >>> stacked = {name: torch.stack([value, value]) for name, value in model.state_dict().items()}
            >>> BatchedViT.trainable(model).logits(stacked, torch.zeros(2, 5, 1, 8, 8)).shape
            torch.Size([2, 5, 3])
        """
        return self(tensors, self.patches(images), in_place=False).logits

    def _embedded(
        self, tensors: Mapping[str, Tensor], patches: Float[Tensor, "*P B t values"], in_place: bool
    ) -> Float[Tensor, "P n F"]:
        """Embedded patches behind the class token, with their positions."""
        B, t = patches.shape[-3:-1]
        weight, bias = tensors["patch_embed.proj.weight"].flatten(2), tensors["patch_embed.proj.bias"]
        P, d, _ = weight.shape
        flat = patches.flatten(-3, -2)
        if not in_place:
            embedded = torch.baddbmm(bias[:, None], flat.expand(P, *flat.shape[-2:]), weight.transpose(1, 2))
            token = tensors["cls_token"].expand(P, B, 1, d)
            return (torch.cat([token, embedded.view(P, B, t, d)], 2) + tensors["pos_embed"]).flatten(1, 2)
        # One buffer, filled twice: a concatenation would hold the embedding a second time.
        position = tensors["pos_embed"].squeeze(1)
        stream = patches.new_empty(P, B, t + 1, d)
        stream[:, :, 0] = (tensors["cls_token"].flatten(1) + position[:, 0])[:, None]
        embedded = torch.matmul(flat, weight.transpose(1, 2))
        torch.add(embedded.view(P, B, t, d), (position[:, 1:] + bias[:, None])[:, None], out=stream[:, :, 1:])
        return stream.view(P, B * (t + 1), d)

    def _block(
        self, tensors: Mapping[str, Tensor], prefix: str, stream: Float[Tensor, "P n F"], in_place: bool
    ) -> Float[Tensor, "P n F"]:
        """Attention and MLP, added to the stream."""
        P, n, d = stream.shape
        T, heads = self.tokens, self.heads
        # the gradient of a norm needs the stream as it entered
        add = Tensor.add_ if in_place else Tensor.add
        inner = batched_norm(stream, tensors, f"{prefix}norm1", self.eps)
        projected = batched_linear(inner, tensors, f"{prefix}attn.qkv")
        # timm's qkv gives all queries, then all keys, then all values, head by head
        query, key, value = projected.view(P * n // T, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(P, n, d)
        stream = add(stream, batched_linear(attention, tensors, f"{prefix}attn.proj"))
        inner = batched_norm(stream, tensors, f"{prefix}norm2", self.eps)
        hidden = functional.gelu(batched_linear(inner, tensors, f"{prefix}mlp.fc1"))
        return add(stream, batched_linear(hidden, tensors, f"{prefix}mlp.fc2"))


def outputs_of_module(
    model: Any, tensors: Mapping[str, Tensor], images: Float[Tensor, "B channels H W"], readout: str | None = None
) -> Outputs:
    """Outputs of one timm ViT of any kind, P = 1, computed by the module with `tensors` as weights."""
    blocks: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, inputs, result: blocks.append(result))
        for block in (model.blocks if readout is not None else ())
    ]
    try:
        named = {f"model.{name}": value for name, value in tensors.items()}
        features, logits = functional_call(_FeaturesAndLogits(model), named, (images,))
    finally:
        # the module is shared by every caller: a hook that stays would fire in their forwards
        for handle in handles:
            handle.remove()
    prefix = model.num_prefix_tokens
    readouts = [block[:, 0] if readout == "token" else block[:, prefix:].mean(1) for block in blocks]
    return Outputs(logits[None], features[None], torch.stack(readouts)[None] if readouts else None)


class _FeaturesAndLogits(nn.Module):
    """Features before the head and the logits that are read from them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return features, self.model.head(features)


def batched_head(features: Float[Tensor, "P B F"], tensors: Mapping[str, Tensor]) -> Float[Tensor, "P B C"]:
    """Logits of each model: its linear or MLP head applied to its features."""
    if "head.weight" in tensors:
        return batched_linear(features, tensors, "head")
    return batched_linear(functional.relu(batched_linear(features, tensors, "head.0")), tensors, "head.2")


def batched_linear(
    inputs: Float[Tensor, "P n i"], tensors: Mapping[str, Tensor], name: str
) -> Float[Tensor, "P n o"]:
    """The linear layer `name` of each model applied to the inputs of the model."""
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if len(inputs) == 1:  # the kernel of a single module, to the bit
        return functional.linear(inputs[0], weight[0], bias[0])[None]
    return torch.baddbmm(bias[:, None], inputs, weight.transpose(1, 2))


def batched_norm(
    inputs: Float[Tensor, "P n F"], tensors: Mapping[str, Tensor], name: str, eps: float
) -> Float[Tensor, "P n F"]:
    """The LayerNorm `name` of each model applied to the inputs of the model."""
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if len(inputs) == 1:
        return functional.layer_norm(inputs, inputs.shape[-1:], weight[0], bias[0], eps)
    # layer_norm takes one weight and one bias, not those of every model
    return torch.addcmul(bias[:, None], functional.layer_norm(inputs, inputs.shape[-1:], eps=eps), weight[:, None])
