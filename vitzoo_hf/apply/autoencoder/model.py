"""Autoencoders of weights: transformers over the tokens of one model, which never see another model of the batch.

Encoder: token -> width, plus position -> blocks -> latent numbers a token. Decoder: the same the other way round.
Positions are three learned tables: of the token's index, its layer and its role. Sequences longer than a window are
taken in windows with a halo of context on both sides (SANE, Schürholt et al. 2024). Beside each transformer may go a
linear map of each layer's tokens, which begins at the principal components of training tokens; the transformers then
begin at nothing.
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
    """Of an autoencoder.

    Attributes:
        width: of tokens inside the transformer.
        latent: numbers a token is encoded in.
        heads: of attention.
        blocks: in the encoder, and as many in the decoder.
        hidden: width of the MLPs over `width`.
        projection: outputs of the projection head of the contrastive loss.
        window: tokens that are encoded or decoded together; 0 takes all.
        halo: tokens of context on each side of a window.
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
    """Tokens `[B, N, T]` -> latents `[B, N, latent]` -> tokens.

    Padding is set to 0 on the way in and on the way out.

    Args:
        tokenizer: of the models.
        sizes: of the autoencoder.
        components: where linear maps begin, see `components.layer_components`; at random if not given.

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
        self, tokenizer: Tokenizer, sizes: Sizes, components: Float[Tensor, "G T latent"] | None = None
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.lengths = tokenizer.lengths
        N, T = tokenizer.num_tokens, tokenizer.width
        self.register_buffer("padding", ~tokenizer.mask, persistent=False)
        self.register_buffer("layers", tokenizer.layers, persistent=False)
        self.register_buffer("roles", tokenizer.roles, persistent=False)
        self.index_table = nn.Parameter(torch.empty(N, sizes.width))
        self.layer_table = nn.Parameter(torch.empty(int(tokenizer.layers.max()) + 1, sizes.width))
        self.role_table = nn.Parameter(torch.empty(len(tokenizer.role_names), sizes.width))
        self.enter_encoder, self.leave_encoder = nn.Linear(T, sizes.width), nn.Linear(sizes.width, sizes.latent)
        self.enter_decoder, self.leave_decoder = nn.Linear(sizes.latent, sizes.width), nn.Linear(sizes.width, T)
        self.encoder, self.decoder = _transformer(sizes), _transformer(sizes)
        self.seen = min(N, sizes.window) if sizes.window else N
        self.projection = nn.Sequential(
            nn.Flatten(),
            nn.Linear(self.seen * sizes.latent, sizes.projection, bias=False),
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
            start = torch.randn(len(self.lengths), T, sizes.latent) / T**0.5 if components is None else components
            self.down = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
            self.up = nn.Parameter(start.mT.contiguous())
            nn.init.zeros_(self.leave_encoder.weight)
            nn.init.zeros_(self.leave_decoder.weight)

    def forward(self, tokens: Float[Tensor, "B N T"]) -> tuple[Float[Tensor, "B N latent"], Float[Tensor, "B N T"]]:
        """Latents of models, and what is decoded from them."""
        latents = self.encode(tokens)
        return latents, self.decode(latents)

    def encode(self, tokens: Float[Tensor, "B N T"]) -> Float[Tensor, "B N latent"]:
        """Latents of models."""
        held = tokens.masked_fill(self.padding, 0.0)
        latents = self.leave_encoder(self._through(self.encoder, self.enter_encoder(held) + self._positions()))
        return latents + self._by_layer(held, self.down) if self.sizes.linear else latents

    def decode(self, latents: Float[Tensor, "B N latent"]) -> Float[Tensor, "B N T"]:
        """Tokens of models."""
        inside = self.enter_decoder(latents) + self._positions()
        tokens = self.leave_decoder(self._through(self.decoder, inside))
        if self.sizes.linear:
            tokens = tokens + self._by_layer(latents, self.up)
        return tokens.masked_fill(self.padding, 0.0)

    def project(self, latents: Float[Tensor, "B n latent"]) -> Float[Tensor, "B projection"]:
        """What the contrastive loss compares, of all tokens or of one window."""
        return self.projection(latents)

    def _by_layer(self, values: Float[Tensor, "B N a"], maps: Float[Tensor, "G a b"]) -> Float[Tensor, "B N b"]:
        parts = values.split(self.lengths, 1)
        return torch.cat([part @ map for part, map in zip(parts, maps, strict=True)], 1)

    def _positions(self) -> Float[Tensor, "N width"]:
        return self.index_table + self.layer_table[self.layers] + self.role_table[self.roles]

    def _through(self, transformer: nn.Module, inside: Float[Tensor, "B N width"]) -> Float[Tensor, "B N width"]:
        if not self.sizes.window or inside.shape[1] <= self.sizes.window + 2 * self.sizes.halo:
            return transformer(inside)
        parts = [
            transformer(inside[:, seen])[:, kept]
            for seen, kept in windows(inside.shape[1], self.sizes.window, self.sizes.halo)
        ]
        return torch.cat(parts, 1)


def embedding(latents: Float[Tensor, "B N latent"]) -> Float[Tensor, "B latent"]:
    """One vector a model: the mean over its tokens, as published (SANE)."""
    return latents.mean(1)


def embedding_by_layer(latents: Float[Tensor, "B N latent"], lengths: list[int]) -> Float[Tensor, "B E"]:
    """One vector a model: mean and deviation of each latent number over the tokens of each layer, `E = 2 G latent`.

    Args:
        latents: of models.
        lengths: tokens of each of the G layers, `Tokenizer.lengths`.
    """
    parts = latents.split(lengths, 1)
    return torch.cat([value for part in parts for value in (part.mean(1), part.std(1, correction=0))], 1)


def windows(length: int, window: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """What each window sees of the sequence, and what is kept of what it sees.

    Every window sees `window + 2 halo` tokens: at the ends of the sequence, all context lies on the inner side.

    Example:
        >>> [(seen.start, seen.stop, kept.start, kept.stop) for seen, kept in windows(10, 4, 1)]
        [(0, 6, 0, 4), (3, 9, 1, 5), (4, 10, 4, 6)]
    """
    wide = min(length, window + 2 * halo)
    for start in range(0, length, window):
        stop = min(start + window, length)
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
    return nn.TransformerEncoder(block, sizes.blocks, norm=norm, enable_nested_tensor=False)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=INIT_STD)
        nn.init.zeros_(module.in_proj_bias)
