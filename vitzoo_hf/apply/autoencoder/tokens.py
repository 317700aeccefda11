"""Convert a flat vector of weights to a sequence of tokens and back; every parameter lies in exactly one token.

Row-wise, a token holds what makes one output of a layer: a row of the weight matrix with its bias. Queries, keys and
values are three layers. A LayerNorm is one token `[weight | bias]`; the class token and every position are a token
each. Dense, the numbers of a layer are concatenated and cut into tokens. Either way tokens are gathered by index and
scattered back, so the round trip is exact to the bit and has gradients.

B models of D weights become T tokens of width W; numbers beyond the last weight of a row are padding.

The module also stacks the weights of rows and refuses weights that are not finite.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
FUSED = "attn.qkv"
DENSE_WIDTH = 64
# no index of a vector is negative
PADDING = -1


@dataclass(frozen=True)
class Tokenizer:
    """Rule by which the vectors of one layout become tokens.

    Attributes:
        layout: layout of the vectors.
        places: index in the vector of every number of a token, -1 for padding.
        layers: layer of each token: 0 before the blocks, then one a block, then one more after the blocks.
        roles: role of each token, a position in `role_names`.
        role_names: names such as `attn.q`, `norm1`, `mlp.fc2`, `pos_embed`.

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
    places: Int64[Tensor, "T W"]
    layers: Int64[Tensor, " T"]
    roles: Int64[Tensor, " T"]
    role_names: tuple[str, ...]

    @classmethod
    def of(cls, layout: Layout, *, width: int | None = None, dense: bool = False) -> "Tokenizer":
        """Make the tokenizer of a layout.

        Args:
            layout: layout of a timm model.
            width: W, at most the longest row; longer rows are cut into several tokens. The default is the longest
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
        W = min(longest, width or (DENSE_WIDTH if dense else longest))
        # in the order of the layout: positions in this tuple index a table of the stored model
        names = tuple(dict.fromkeys(part.role for part in parts))
        places, layers, roles = [], [], []
        for part in parts:
            cut = _cut(part.rows.reshape(1, -1) if dense else part.rows, W)
            places.append(cut)
            layers.append(torch.full((len(cut),), part.layer))
            roles.append(torch.full((len(cut),), names.index(part.role)))
        return cls(layout, torch.cat(places), torch.cat(layers), torch.cat(roles), names)

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens of a model."""
        return self.places.shape[0]

    @property
    def width(self) -> int:
        """W, the numbers in a token."""
        return self.places.shape[1]

    @cached_property
    def mask(self) -> Bool[Tensor, "T W"]:
        """True where a token has a weight, false at padding."""
        return self.places != PADDING

    @cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each layer and role, in the order of the tokens; the numbers sum to T."""
        return self._keys.unique_consecutive(return_counts=True)[1].tolist()

    @cached_property
    def layer_names(self) -> list[str]:
        """Layer and role, such as `3 attn.q`, of each of `groups`."""
        roles = self.role_names
        return [f"{key // len(roles)} {roles[key % len(roles)]}" for key in self._keys.unique().tolist()]

    @cached_property
    def groups(self) -> Int64[Tensor, " D"]:
        """Layer and role of each weight as one number, for statistics by layer."""
        _, numbers = self._keys.unique(return_inverse=True)
        return numbers[self._inverse // self.width]

    def layer_means(self, values: Float64[Tensor, " D"]) -> Float64[Tensor, " D"]:
        """Replace every value by the mean over its layer and role."""
        sizes = self.groups.bincount().double()
        return (torch.zeros_like(sizes).index_add_(0, self.groups, values) / sizes)[self.groups]

    @cached_property
    def _keys(self) -> Int64[Tensor, " T"]:
        """Layer and role of each token as one number."""
        return self.layers * len(self.role_names) + self.roles

    @cached_property
    def _inverse(self) -> Int64[Tensor, " D"]:
        """Index of each weight among the numbers of all tokens."""
        inverse = torch.empty(self.layout.num_parameters, dtype=torch.int64)
        has_weight = self.mask.flatten()
        inverse[self.places.flatten()[has_weight]] = has_weight.nonzero().flatten()
        return inverse

    def tokens(self, vectors: Float[Tensor, "*B D"]) -> Float[Tensor, "*B T W"]:
        """Gather the tokens of vectors; padding is 0."""
        self._check(vectors.shape[-1], self.layout.num_parameters, "weights")
        places, mask = self.places.to(vectors.device), self.mask.to(vectors.device)
        # clamped, since -1 would read the last weight; the mask then sets padding to 0
        gathered = vectors[..., places.clamp(min=0)]
        return gathered.masked_fill(~mask, 0.0)

    def vectors(self, tokens: Float[Tensor, "*B T W"]) -> Float[Tensor, "*B D"]:
        """Scatter tokens back into vectors; padding is ignored."""
        self._check(tokens.shape[-2], self.num_tokens, "tokens")
        self._check(tokens.shape[-1], self.width, "numbers a token")
        return tokens.flatten(-2)[..., self._inverse.to(tokens.device)]

    def _check(self, count: int, expected: int, what: str) -> None:
        if count != expected:
            raise ZooError(f"{count} {what} were given; layout {self.layout.fingerprint} makes {expected}")


@dataclass(frozen=True)
class _Part:
    """One role of a layer, with the indices of its rows in the vector, all of one length."""

    layer: int
    role: str
    rows: Int64[Tensor, "n r"]


def _parts(layout: Layout) -> Iterator[_Part]:
    """Split a layout into layers and roles, in its order."""
    places = dict(layout.items())
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    depth = 1 + max((int(match[1]) for name in layout.names if (match := BLOCK.match(name))), default=-1)
    is_past_block = False
    for name in layout.names:
        module, _, kind = name.rpartition(".")
        if kind == "bias" and f"{module}.weight" in places:
            continue  # a bias is part of the tokens of its weight
        match = BLOCK.match(module or name)
        # timm puts the final norm and the head behind the blocks: they are the last layer
        is_past_block = is_past_block or bool(match)
        layer = 1 + int(match[1]) if match else (1 + depth if is_past_block else 0)
        rows = _rows(places[name], shapes[name])
        if kind == "weight" and f"{module}.bias" in places:
            bias = torch.arange(places[f"{module}.bias"].start, places[f"{module}.bias"].stop)
            rows = torch.cat([rows, bias.view(len(rows), -1)], 1)
        role = match[2] if match else module if kind in ("weight", "bias") else name
        if role == FUSED:
            for letter, third in zip("qkv", rows.chunk(3), strict=True):
                yield _Part(layer, f"attn.{letter}", third)
        else:
            yield _Part(layer, role, rows)


def _rows(place: slice, shape: tuple[int, ...]) -> Int64[Tensor, "n r"]:
    """Rows of a tensor: one of a vector, one an output of a matrix, n of class token and positions `[1, n, d]`."""
    numbers = torch.arange(place.start, place.stop)
    if len(shape) < 2:
        return numbers.view(1, -1)
    return numbers.view(-1, shape[-1]) if shape[0] == 1 and len(shape) == 3 else numbers.view(shape[0], -1)


def _cut(rows: Int64[Tensor, "n r"], width: int) -> Int64[Tensor, "m W"]:
    """Cut rows into tokens; the last token of a row is padded."""
    n, length = rows.shape
    # division rounded up, in integers
    pieces = -(-length // width)
    padded = torch.full((n, pieces * width), PADDING)
    padded[:, :length] = rows
    return padded.view(n * pieces, width)


def vectors_of(rows: Iterable[Row]) -> Float[Tensor, "P D"]:
    """Stack the weights of rows.

    Raises:
        ZooError: naming the first row with a weight that is NaN or infinite; or if there is no row.
    """
    models = list(rows)
    if not models:
        raise ZooError("there is no model among those chosen: loosen the filter")
    vectors = torch.stack([torch.from_numpy(row.weights) for row in models])
    check_finite(vectors, [row.model_id for row in models])
    return vectors


def check_finite(vectors: Float[Tensor, "P D"], model_ids: Sequence[str]) -> None:
    """Refuse weights that are not finite.

    Raises:
        ZooError: naming the first model with a weight that is NaN or infinite.
    """
    broken = ~vectors.isfinite().all(1)
    if broken.any():
        name = model_ids[int(broken.int().argmax())]
        raise ZooError(f"{name} has weights that are NaN or infinite: leave it out, by --where or Zoo.filter")
