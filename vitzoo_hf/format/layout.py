"""state_dict <-> flat vector `[D]`: the layout of a row's weights, with a fingerprint.

The order is the `state_dict` order of timm and each tensor is row-major, so a tensor is a slice of the
vector and rebuilding a model copies nothing. Only float32 tensors are accepted: a round trip is exact to the bit.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.format.schema import ZooError, fingerprint

EMBEDDING = ("cls_token", "reg_token", "dist_token", "pos_embed", "patch_embed")


MOST_TENSORS, MOST_AXES = 100_000, 16
MOST_VALUES = 2**30
"""A model has at most 2 GB of weights, of at least two bytes each."""
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,299}", re.ASCII)


class TensorEntry(TypedDict):
    """One tensor of a layout, as `layouts.json` holds it."""

    name: str
    shape: list[int]
    offset: int


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of the tensors in a flat vector.

    Example:
        >>> layout = Layout.of({"w": torch.zeros(2, 3), "b": torch.zeros(3)})
        >>> layout.num_parameters, layout.place("b")
        (9, slice(6, 9, None))
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor]) -> "Layout":
        """The layout of a state dict, in its own order.

        Raises:
            ZooError: if a tensor is not float32.
        """
        for name, tensor in state_dict.items():
            if tensor.dtype != torch.float32:
                # rounding here would make a round trip inexact without a word
                raise ZooError(f"tensor {name!r} is {tensor.dtype}; a zoo stores float32: call .float() first")
        return cls(tuple(state_dict), tuple(tuple(tensor.shape) for tensor in state_dict.values()))

    @classmethod
    def from_json(cls, entries: Any) -> "Layout":
        """The layout read from `layouts.json`, with its offsets checked.

        Args:
            entries: what a stranger's file says; expected are `TensorEntry`s.

        Raises:
            ZooError: if an entry is incomplete, or offsets are not those of tensors lying one behind the other.
        """
        if not isinstance(entries, list) or len(entries) > MOST_TENSORS:
            raise ZooError(f"a layout is no list of at most {MOST_TENSORS} tensors: layouts.json is damaged")
        for entry in entries:
            if not isinstance(entry, dict) or {"name", "shape", "offset"} - set(entry):
                raise ZooError("a layout lacks a name, shape or offset: layouts.json is damaged")
            name, shape = entry["name"], entry["shape"]
            if not isinstance(name, str) or TENSOR_NAME.fullmatch(name) is None:
                raise ZooError(f"a layout has the tensor name {ascii(name)[:80]}: layouts.json is damaged")
            # type, not isinstance: True is an int in Python, and equal to 1
            if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n <= MOST_VALUES for n in shape):
                raise ZooError(f"tensor {name!r} of a layout has no shape of sizes: layouts.json is damaged")
            if len(shape) > MOST_AXES or math.prod(shape) > MOST_VALUES or type(entry["offset"]) is not int:
                raise ZooError(f"tensor {name!r} of a layout has too large a shape, or no offset: it is damaged")
        if len({entry["name"] for entry in entries}) != len(entries):
            raise ZooError("a layout has two tensors of one name: layouts.json is damaged")
        layout = cls(tuple(entry["name"] for entry in entries), tuple(tuple(entry["shape"]) for entry in entries))
        # offsets are redundant: a reader in another language uses them, so both must agree
        if [entry["offset"] for entry in entries] != list(layout.offsets):
            raise ZooError("a layout's offsets do not follow from its shapes: layouts.json is damaged")
        if layout.num_parameters > MOST_VALUES:
            raise ZooError(f"a layout has {layout.num_parameters} weights; format 1 holds models of up to 2 GB")
        return layout

    def to_json(self) -> list[TensorEntry]:
        """`[{name, shape, offset}, …]`, as `layouts.json` holds it."""
        return [
            {"name": name, "shape": list(shape), "offset": offset}
            for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=True)
        ]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the vector."""
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + size)
        return tuple(starts[:-1])

    @cached_property
    def num_parameters(self) -> int:
        """D, the length of the vector."""
        return sum(self.sizes)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that two layouts share exactly when names, order and shapes agree."""
        return fingerprint([[name, list(shape)] for name, shape in zip(self.names, self.shapes, strict=True)])

    def place(self, name: str) -> slice:
        """Where tensor `name` lies in the vector."""
        return dict(self.items())[name]

    def trunk(self) -> Tensor:
        """Positions in the vector of everything but the head: int64 `[trunk parameters]`."""
        kept = [torch.arange(part.start, part.stop) for name, part in self.items() if not is_head(name)]
        return torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64)

    def parts(self, per: Literal["model", "block", "tensor"]) -> dict[str, list[str]]:
        """Names of parts of the network -> the tensors of each, both in order.

        "block" makes `embedding` (tokens, positions, patches), `blocks.0` …, `norm` and `head`; any other tensor goes
        by the first word of its name. "model" makes one part, "tensor" one of each.

        Raises:
            ValueError: for another `per`.

        Example:
            >>> layout = Layout(("cls_token", "pos_embed", "blocks.0.norm1.bias"), ((1,), (1,), (1,)))
            >>> layout.parts("block")
            {'embedding': ['cls_token', 'pos_embed'], 'blocks.0': ['blocks.0.norm1.bias']}
        """
        if per not in ("model", "block", "tensor"):
            raise ValueError(f"per={per!r}; expected 'model', 'block' or 'tensor'")
        parts: dict[str, list[str]] = {}
        for name in self.names:
            part = {"model": "model", "block": _block_of(name), "tensor": name}[per]
            parts.setdefault(part, []).append(name)
        return parts

    def items(self) -> Iterator[tuple[str, slice]]:
        """`(name, slice)` of each tensor, in order."""
        for name, offset, size in zip(self.names, self.offsets, self.sizes, strict=True):
            yield name, slice(offset, offset + size)


def _block_of(name: str) -> str:
    first, *rest = name.split(".")
    if first in EMBEDDING:
        return "embedding"
    return f"blocks.{rest[0]}" if first == "blocks" and rest else first


def is_head(name: str) -> bool:
    """Whether a timm tensor name belongs to the classifier or projection head."""
    return name.startswith("head.")


def trunk_layout(layout: Layout) -> Layout:
    """The layout of everything but the head.

    Example:
        >>> trunk_layout(Layout(("norm.bias", "head.bias"), ((4,), (10,)))).names
        ('norm.bias',)
    """
    tensors = [(name, shape) for name, shape in zip(layout.names, layout.shapes, strict=True) if not is_head(name)]
    return Layout(tuple(name for name, _ in tensors), tuple(shape for _, shape in tensors))


def trunk_key(layout: Layout) -> str:
    """A string that two layouts share exactly when their trunks have equal names, order and shapes.

    Example:
        >>> linear = Layout(("norm.bias", "head.bias"), ((4,), (10,)))
        >>> trunk_key(linear) == trunk_key(Layout(("norm.bias", "head.0.bias"), ((4,), (8,))))
        True
    """
    return trunk_layout(layout).fingerprint


def flatten(state_dict: Mapping[str, Tensor]) -> Float[Tensor, " D"]:
    """All tensors of a state dict as one float32 vector, in its order.

    Example:
        >>> flatten({"w": torch.ones(2, 2), "b": torch.zeros(1)})
        tensor([1., 1., 1., 1., 0.])

    Raises:
        ZooError: if a tensor is not float32.
    """
    Layout.of(state_dict)
    # torch.cat refuses an empty list
    if not state_dict:
        return torch.empty(0)
    return torch.cat([tensor.detach().reshape(-1) for tensor in state_dict.values()])


def unflatten(vector: Float[Tensor, "*P D"], layout: Layout) -> dict[str, Tensor]:
    """The tensors of a flat vector, as views: no value is copied.

    Args:
        vector: `[D]`, or `[P, D]` for a population; then every tensor gains a leading P.
        layout: what the vector holds.

    Example:
        >>> layout = Layout.of({"w": torch.zeros(2, 2), "b": torch.zeros(1)})
        >>> unflatten(torch.arange(5.0), layout)["w"]
        tensor([[0., 1.],
                [2., 3.]])

    Raises:
        ZooError: if the length does not match the layout.
    """
    if vector.shape[-1] != layout.num_parameters:
        raise ZooError(
            f"a vector of {vector.shape[-1]} values does not fit layout {layout.fingerprint},"
            f" which has {layout.num_parameters}; was it truncated, or stored with another head?"
        )
    # view, not reshape: it raises where it would have to copy
    lead = tuple(vector.shape[:-1])
    return {
        name: vector[..., part].view((*lead, *shape))
        for (name, part), shape in zip(layout.items(), layout.shapes, strict=True)
    }
