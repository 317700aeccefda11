"""Autoencoder of weights: two transformers over the tokens of one model; models of a batch never see each other.

Encoder: token -> width, plus position -> blocks -> latent numbers of a token. The decoder runs the steps in reverse
order. A position is the sum of three learned tables, indexed by the token, its layer and its role. Sequences longer
than a window are split into windows with a halo of context on both sides (SANE, Schürholt et al. 2024). Optionally a
linear map of each layer's tokens runs beside each transformer: it starts at the principal components of training
tokens, and the output of the transformers starts at zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.format.schema import ZooError

INIT_STD = 0.02


@dataclass(frozen=True)
class Sizes:
    """Sizes of an autoencoder.

    Attributes:
        width: numbers of a token inside the transformer.
        latent: numbers of a token between encoder and decoder.
        heads: number of attention heads.
        blocks: number of transformer blocks in the encoder; the decoder has the same number.
        hidden: width of the MLPs, in multiples of `width`.
        projection: outputs of the projection head of the contrastive loss.
        window: number of tokens that are encoded or decoded together; 0 takes all.
        halo: number of tokens of context on each side of a window.
        linear: put a linear map of each layer's tokens beside each transformer.
    """

    width: int = 48
    latent: int = 10
    heads: int = 2
    blocks: int = 2
    hidden: int = 4
    projection: int = 30
    window: int = 0
    halo: int = 0
    linear: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "latent", "heads", "blocks", "hidden", "projection"):
            if getattr(self, name) < 1:
                raise ZooError(f"{name} of the autoencoder is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise ZooError(f"width {self.width} of the autoencoder does not divide into {self.heads} heads")
        if self.window < 0 or self.halo < 0 or (self.halo and not self.window):
            raise ZooError(f"window {self.window} with a halo of {self.halo}: a halo needs a window")


class WeightAutoencoder(nn.Module):
    """Tokens `[B, T, W]` -> latents `[B, T, latent]` -> tokens.

    Padding is set to 0 in the input and in the output.

    Args:
        tokenizer: tokenizer of the models.
        sizes: sizes of the autoencoder.
        components: initial linear maps, see `layer_components`; random by default.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> tokenizer = Tokenizer.of(next(iter(Zoo.sample().layouts.values())))
        >>> autoencoder = WeightAutoencoder(tokenizer, Sizes(width=8, latent=2, heads=2, blocks=1))
        >>> tokens = tokenizer.tokens(torch.randn(2, tokenizer.layout.num_parameters))
        >>> latents = autoencoder.encode(tokens)
        >>> latents.shape[2], autoencoder.decode(latents).shape == tokens.shape
        (2, True)
    """

    padding: Tensor
    layers: Tensor
    roles: Tensor

    def __init__(
        self, tokenizer: Tokenizer, sizes: Sizes, components: Float[Tensor, "L W latent"] | None = None
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.lengths = tokenizer.lengths
        T, W = tokenizer.num_tokens, tokenizer.width
        # not persistent: the tokenizer determines these buffers, so files need not store them
        self.register_buffer("padding", ~tokenizer.mask, persistent=False)
        self.register_buffer("layers", tokenizer.layers, persistent=False)
        self.register_buffer("roles", tokenizer.roles, persistent=False)
        self.index_table = nn.Parameter(torch.empty(T, sizes.width))
        self.layer_table = nn.Parameter(torch.empty(int(tokenizer.layers.max()) + 1, sizes.width))
        self.role_table = nn.Parameter(torch.empty(len(tokenizer.role_names), sizes.width))
        self.enter_encoder, self.leave_encoder = nn.Linear(W, sizes.width), nn.Linear(sizes.width, sizes.latent)
        self.enter_decoder, self.leave_decoder = nn.Linear(sizes.latent, sizes.width), nn.Linear(sizes.width, W)
        self.encoder, self.decoder = _transformer(sizes), _transformer(sizes)
        # the projection head has a fixed width, so it compares one window of tokens
        self.window_tokens = min(T, sizes.window) if sizes.window else T
        self.projection = nn.Sequential(
            nn.Flatten(),
            nn.Linear(self.window_tokens * sizes.latent, sizes.projection, bias=False),
            nn.LayerNorm(sizes.projection),
            nn.ReLU(),
            nn.Linear(sizes.projection, sizes.projection, bias=False),
            nn.LayerNorm(sizes.projection),
            nn.ReLU(),
        )
        self.apply(_initialise)
        for table in (self.index_table, self.layer_table, self.role_table):
            nn.init.normal_(table, std=INIT_STD)
        if sizes.linear:
            # 1/sqrt(W): outputs of a random map have the variance of its inputs
            start = torch.randn(len(self.lengths), W, sizes.latent) / W**0.5 if components is None else components
            self.down = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
            self.up = nn.Parameter(start.mT.contiguous())
            # the first reconstruction is that of PCA, and training only improves on it
            nn.init.zeros_(self.leave_encoder.weight)
            nn.init.zeros_(self.leave_decoder.weight)

    def forward(self, tokens: Float[Tensor, "B T W"]) -> tuple[Float[Tensor, "B T latent"], Float[Tensor, "B T W"]]:
        """Latents of models, and the tokens decoded from the latents."""
        latents = self.encode(tokens)
        return latents, self.decode(latents)

    def encode(self, tokens: Float[Tensor, "B T W"]) -> Float[Tensor, "B T latent"]:
        """Encode tokens of models."""
        # padding must carry no information, whatever the tokens hold there
        inputs = tokens.masked_fill(self.padding, 0.0)
        latents = self.leave_encoder(self._through(self.encoder, self.enter_encoder(inputs) + self._positions()))
        return latents + self._by_layer(inputs, self.down) if self.sizes.linear else latents

    def decode(self, latents: Float[Tensor, "B T latent"]) -> Float[Tensor, "B T W"]:
        """Decode latents of models."""
        inside = self.enter_decoder(latents) + self._positions()
        tokens = self.leave_decoder(self._through(self.decoder, inside))
        if self.sizes.linear:
            tokens = tokens + self._by_layer(latents, self.up)
        return tokens.masked_fill(self.padding, 0.0)

    def project(self, latents: Float[Tensor, "B t latent"]) -> Float[Tensor, "B projection"]:
        """Projection for the contrastive loss, of all tokens or of one window."""
        return self.projection(latents)

    def _by_layer(self, values: Float[Tensor, "B T a"], maps: Float[Tensor, "L a b"]) -> Float[Tensor, "B T b"]:
        parts = values.split(self.lengths, 1)
        return torch.cat([part @ map for part, map in zip(parts, maps, strict=True)], 1)

    def _positions(self) -> Float[Tensor, "T width"]:
        return self.index_table + self.layer_table[self.layers] + self.role_table[self.roles]

    def _through(self, transformer: nn.Module, inside: Float[Tensor, "B T width"]) -> Float[Tensor, "B T width"]:
        if not self.sizes.window or inside.shape[1] <= self.sizes.window + 2 * self.sizes.halo:
            return transformer(inside)
        parts = [
            transformer(inside[:, context])[:, inner]
            for context, inner in windows(inside.shape[1], self.sizes.window, self.sizes.halo)
        ]
        return torch.cat(parts, 1)


def embedding(latents: Float[Tensor, "B T latent"]) -> Float[Tensor, "B latent"]:
    """Embed a model as the mean over its tokens, as SANE does."""
    return latents.mean(1)


def embedding_by_layer(latents: Float[Tensor, "B T latent"], lengths: list[int]) -> Float[Tensor, "B E"]:
    """Embed a model as mean and deviation of each latent number over the tokens of each layer, `E = 2 L latent`.

    Args:
        latents: latents of B models.
        lengths: number of tokens of each of the L layers, `Tokenizer.lengths`.
    """
    parts = latents.split(lengths, 1)
    return torch.cat([value for part in parts for value in (part.mean(1), part.std(1, correction=0))], 1)


def windows(length: int, window: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """Slices of a sequence that a window reads, and slices of each window that belong to the output.

    Every window reads `window + 2 halo` tokens: at the ends of the sequence, all context lies on the inner side.

    Example:
        >>> [(context.start, context.stop, inner.start, inner.stop) for context, inner in windows(10, 4, 1)]
        [(0, 6, 0, 4), (3, 9, 1, 5), (4, 10, 4, 6)]
    """
    wide = min(length, window + 2 * halo)
    for start in range(0, length, window):
        stop = min(start + window, length)
        # clipped, so that a window at an end of the sequence is as long as the others
        first = max(0, min(start - halo, length - wide))
        yield slice(first, first + wide), slice(start - first, stop - first)


def _transformer(sizes: Sizes) -> nn.Module:
    block = nn.TransformerEncoderLayer(
        sizes.width,
        sizes.heads,
        sizes.hidden * sizes.width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    norm = nn.LayerNorm(sizes.width)
    # torch warns of nested tensors with norm_first; all models have equally many tokens anyway
    return nn.TransformerEncoder(block, sizes.blocks, norm=norm, enable_nested_tensor=False)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=INIT_STD)
        nn.init.zeros_(module.in_proj_bias)
