"""An architecture as a value: the timm name, its arguments and the head; builds modules and tells their layout."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError, canonical_json
from vitzoo_hf.models.batched import BatchedViT
from vitzoo_hf.models.vit import create, module_with, skeleton_and_layout


@dataclass(frozen=True)
class Architecture:
    """What rebuilds a network but for its weights.

    Attributes:
        name: timm name, such as `vit_small_patch16_224`.
        args: keyword arguments of `timm.create_model`, `num_classes` among them.
        head: `linear`, or `mlp` for Linear–ReLU–Linear.
        head_hidden: width of the MLP head's hidden layer; None with a linear head.

    Example:
        >>> args = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=3)
        >>> architecture = Architecture("vit_tiny_patch16_224", args)
        >>> architecture.layout.num_parameters, architecture.batched.depth
        (3731, 1)
    """

    name: str
    args: Mapping[str, Any]
    head: str = "linear"
    head_hidden: int | None = None

    @classmethod
    def of(cls, row: RowLike) -> "Architecture":
        """The architecture of a row, which may come without its weights.

        Raises:
            ZooError: if an architecture column is missing or damaged.
        """
        row = Row.of(row)
        for column in ("architecture", "architecture_args", "head"):
            if column not in row:
                raise ZooError(f"the row has no column {column!r}: take whole rows, `load_dataset(id, 'weights')`")
        try:
            args = json.loads(row["architecture_args"])
        except (TypeError, json.JSONDecodeError):
            raise ZooError(f"architecture_args is {row['architecture_args']!r}; expected a JSON object") from None
        return cls(row["architecture"], args, row.head, row.head_hidden)

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def key(self) -> str:
        """Text that two architectures share exactly when they are equal."""
        return canonical_json([self.name, dict(self.args), self.head, self.head_hidden])

    @property
    def layout(self) -> Layout:
        """The layout of the flat weights.

        Raises:
            ZooError: if timm cannot build the architecture.
        """
        return self._shared[1]

    @property
    def skeleton(self) -> nn.Module:
        """A module without weights in eval mode, shared by every caller: use it through `functional_call` only."""
        return self._shared[0]

    @property
    def batched(self) -> BatchedViT | None:
        """The forward of many models at once; None for an architecture that it does not know."""
        return BatchedViT.of(self.skeleton)

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the head."""
        return int(self.args["num_classes"])

    def build(self, *, init: str = "timm", seed: int | None = None) -> nn.Module:
        """A module with fresh weights, in training mode; see `vitzoo_hf.models.vit.create`."""
        return create(self.name, self.args, head=self.head, head_hidden=self.head_hidden, init=init, seed=seed)

    def module(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A module in eval mode whose parameters are these tensors themselves.

        Raises:
            ZooError: if names or shapes differ from the architecture's.
        """
        return module_with(*self._shared, tensors)

    @property
    def _shared(self) -> tuple[nn.Module, Layout]:
        return skeleton_and_layout(self.name, canonical_json(dict(self.args)), self.head, self.head_hidden)
