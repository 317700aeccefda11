"""A flat vector of weights <-> a sequence of tokens, every parameter in exactly one of them.

Row-wise, a token is what makes one output of a layer: a row of the weight matrix with its bias; queries, keys and
values are layers of their own, a LayerNorm is one token `[weight | bias]`, and so are the class token and each
position. Dense, the numbers of a layer lie one behind the other and are cut into tokens. Either way tokens are
gathered by index and scattered back, so the round trip is exact to the bit and has gradients.

B models of D weights become N tokens of width T, of which what lies beyond the last weight is padding.

Weights of rows as tensors, refused if one of them is not finite.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.schema import ZooError

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
FUSED = "attn.qkv"
DENSE_WIDTH = 64
PADDING = -1


@dataclass(frozen=True)
class Tokenizer:
    """How the vectors of one layout become tokens.

    Attributes:
        layout: of the vectors.
        places: where each number of a token lies in the vector, -1 for padding.
        layers: the layer of each token: 0 for what comes before the blocks, then one a block, then what follows.
        roles: the role of each token, a position in `role_names`.
        role_names: such as `attn.q`, `norm1`, `mlp.fc2`, `pos_embed`.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> layout = next(iter(Zoo.sample().layouts.values()))
        >>> tokenizer = Tokenizer.of(layout)
        >>> vectors = torch.randn(3, layout.num_parameters)
        >>> tokens = tokenizer.tokens(vectors)
        >>> tokens.shape[1:] == tokenizer.places.shape, torch.equal(tokenizer.vectors(tokens), vectors)
        (True, True)
    """

    layout: Layout
    places: Int64[Tensor, "N T"]
    layers: Int64[Tensor, " N"]
    roles: Int64[Tensor, " N"]
    role_names: tuple[str, ...]

    @classmethod
    def of(cls, layout: Layout, *, width: int | None = None, dense: bool = False) -> "Tokenizer":
        """The tokens of a layout.

        Args:
            layout: names as timm gives them.
            width: T, at most the longest row; longer ones are cut into several tokens. By default the longest
                row, or 64 if dense.
            dense: cut the numbers of a layer without regard to its rows.

        Raises:
            ZooError: if the layout is empty or the width is below 1.
        """
        parts = list(_parts(layout))
        if not parts:
            raise ZooError("a layout without tensors has no tokens")
        if width is not None and width < 1:
            raise ZooError(f"tokens of width {width}; it must be at least 1")
        longest = max(part.rows.numel() if dense else part.rows.shape[1] for part in parts)
        T = min(longest, width or (DENSE_WIDTH if dense else longest))
        names = tuple(dict.fromkeys(part.role for part in parts))
        places, layers, roles = [], [], []
        for part in parts:
            cut = _cut(part.rows.reshape(1, -1) if dense else part.rows, T)
            places.append(cut)
            layers.append(torch.full((len(cut),), part.layer))
            roles.append(torch.full((len(cut),), names.index(part.role)))
        return cls(layout, torch.cat(places), torch.cat(layers), torch.cat(roles), names)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.places.shape[0]

    @property
    def width(self) -> int:
        """T."""
        return self.places.shape[1]

    @cached_property
    def mask(self) -> Bool[Tensor, "N T"]:
        """Where tokens hold weights."""
        return self.places != PADDING

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each layer and role, one behind the other; they sum to N."""
        of_token = self.layers * len(self.role_names) + self.roles
        return of_token.unique_consecutive(return_counts=True)[1].tolist()

    @cached_property
    def groups(self) -> Int64[Tensor, " D"]:
        """The layer and role of each weight as one number, for statistics by layer."""
        of_token = self.layers * len(self.role_names) + self.roles
        _, numbered = of_token.unique(return_inverse=True)
        return numbered[self._inverse // self.width]

    @cached_property
    def _inverse(self) -> Int64[Tensor, " D"]:
        inverse = torch.empty(self.layout.num_parameters, dtype=torch.int64)
        held = self.mask.flatten()
        inverse[self.places.flatten()[held]] = held.nonzero().flatten()
        return inverse

    def tokens(self, vectors: Float[Tensor, "*B D"]) -> Float[Tensor, "*B N T"]:
        """Tokens of vectors; padding is 0."""
        self._check(vectors.shape[-1], self.layout.num_parameters, "weights")
        places, mask = self.places.to(vectors.device), self.mask.to(vectors.device)
        gathered = vectors[..., places.clamp(min=0)]
        return gathered.masked_fill(~mask, 0.0)

    def vectors(self, tokens: Float[Tensor, "*B N T"]) -> Float[Tensor, "*B D"]:
        """The vectors that tokens hold; padding is ignored."""
        self._check(tokens.shape[-2], self.num_tokens, "tokens")
        self._check(tokens.shape[-1], self.width, "numbers a token")
        return tokens.flatten(-2)[..., self._inverse.to(tokens.device)]

    def _check(self, given: int, expected: int, what: str) -> None:
        if given != expected:
            raise ZooError(f"{given} {what} were given; layout {self.layout.fingerprint} makes {expected}")


@dataclass(frozen=True)
class _Part:
    """A layer: its role, and where its rows lie in the vector, all of one length."""

    layer: int
    role: str
    rows: Int64[Tensor, "n r"]


def _parts(layout: Layout) -> Iterator[_Part]:
    """The layers of a layout, in its order."""
    places = dict(layout.items())
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    depth = 1 + max((int(found[1]) for name in layout.names if (found := BLOCK.match(name))), default=-1)
    seen_block = False
    for name in layout.names:
        module, _, kind = name.rpartition(".")
        if kind == "bias" and f"{module}.weight" in places:
            continue
        found = BLOCK.match(module or name)
        seen_block = seen_block or bool(found)
        layer = 1 + int(found[1]) if found else (1 + depth if seen_block else 0)
        rows = _rows(places[name], shapes[name])
        if kind == "weight" and f"{module}.bias" in places:
            bias = torch.arange(places[f"{module}.bias"].start, places[f"{module}.bias"].stop)
            rows = torch.cat([rows, bias.view(len(rows), -1)], 1)
        role = found[2] if found else module if kind in ("weight", "bias") else name
        if role == FUSED:
            for letter, third in zip("qkv", rows.chunk(3), strict=True):
                yield _Part(layer, f"attn.{letter}", third)
        else:
            yield _Part(layer, role, rows)


def _rows(place: slice, shape: tuple[int, ...]) -> Int64[Tensor, "n r"]:
    """One row of a vector; rows by output of a matrix; by the last axis of tokens and positions `[1, n, d]`."""
    numbers = torch.arange(place.start, place.stop)
    if len(shape) < 2:
        return numbers.view(1, -1)
    return numbers.view(-1, shape[-1]) if shape[0] == 1 and len(shape) == 3 else numbers.view(shape[0], -1)


def _cut(rows: Int64[Tensor, "n r"], width: int) -> Int64[Tensor, "m T"]:
    """Rows cut into tokens, the last of each row padded."""
    n, length = rows.shape
    pieces = -(-length // width)
    padded = torch.full((n, pieces * width), PADDING)
    padded[:, :length] = rows
    return padded.view(n * pieces, width)


def vectors_of(rows: Iterable[Mapping[str, Any]]) -> Float[Tensor, "P D"]:
    """Weights of rows, one below the other.

    Raises:
        ZooError: naming the first row with a weight that is NaN or infinite; or if there is no row.
    """
    held = list(rows)
    if not held:
        raise ZooError("there is no model among those chosen: loosen the filter")
    vectors = torch.stack([torch.from_numpy(row["weights"]) for row in held])
    check_finite(vectors, [row["model_id"] for row in held])
    return vectors


def check_finite(vectors: Float[Tensor, "P D"], model_ids: Sequence[str]) -> None:
    """Refuse weights that are not finite.

    Raises:
        ZooError: naming the first model with one.
    """
    broken = ~vectors.isfinite().all(1)
    if broken.any():
        name = model_ids[int(broken.int().argmax())]
        raise ZooError(f"{name} has weights that are NaN or infinite: leave it out, by --where or Zoo.filter")
