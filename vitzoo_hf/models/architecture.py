"""An architecture as a value: the timm name, its arguments and the head; it builds modules and has a layout."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitzoo_hf.format.gate.architecture_args import check_size, parse_args
from vitzoo_hf.format.gate.values import shown
from vitzoo_hf.format.layout import MOST_VALUES, Layout
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError, canonical_json, weights_sha256
from vitzoo_hf.models.batched import BatchedViT
from vitzoo_hf.models.vit import bounded, create, module_with, skeleton_and_layout


@dataclass(frozen=True)
class Architecture:
    """All that rebuilds a network except its weights.

    Attributes:
        name: timm name, such as `vit_small_patch16_224`.
        args: keyword arguments of `timm.create_model`, `num_classes` among them.
        head: `linear`, or `mlp` for Linear–ReLU–Linear.
        head_hidden: width of the MLP head's hidden layer; None with a linear head.
        most_parameters: number of weights beyond which building is refused; None for no limit.

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
    most_parameters: int | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, row: RowLike) -> "Architecture":
        """The architecture of a row, which may come without its weights.

        Raises:
            ZooError: if an architecture column is missing or damaged.
        """
        row = Row.of(row)
        name, args_json = row.required("architecture"), row.required("architecture_args")
        if not isinstance(name, str):
            raise ZooError(f"architecture is {shown(name)}; expected a name of timm")
        args = parse_args(args_json)
        most = MOST_VALUES if row.num_parameters is None else row.num_parameters
        # before anything is built: a stranger's depth of 100 million would build until memory ends
        check_size(args, "architecture_args", num_parameters=most)
        return cls(name, args, row.head, row.head_hidden, most)

    def __hash__(self) -> int:
        # args are a dict, which has no hash
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
        """Number of outputs of the head.

        Raises:
            ZooError: if the arguments do not say it.
        """
        if "num_classes" not in self.args:
            raise ZooError("architecture_args lacks `num_classes`, the number of outputs of the head")
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

    def vector_of(self, row: Row, *, verify: bool = True) -> Tensor:
        """The flat weights of a row of this architecture, float32 `[D]`, which may be written to.

        Raises:
            ZooError: for a layout of another architecture, a wrong length and, with `verify`, weights that are not
                finite or do not match the row's `weights_sha256`.
        """
        layout = self.layout
        if row.layout is not None and row.layout != layout.fingerprint:
            raise ZooError(
                f"{row.name} has layout {row.layout}, but its architecture gives layout {layout.fingerprint}:"
                " one of the two columns is not of this row"
            )
        stored = row.stored_weights if "weights" in row else row.required("weights")
        if isinstance(stored, Tensor):  # stays on its device
            vector = stored.detach().float()
        else:
            # memory that may not be written to, as of a memory-mapped table, is copied: torch cannot mark it
            vector = torch.from_numpy(row.vector if row.vector.flags.writeable else row.vector.copy())
        if vector.shape != (layout.num_parameters,):
            raise ZooError(
                f"{row.name} has weights of shape {tuple(vector.shape)}; its layout wants [{layout.num_parameters}]"
            )
        if verify and not row.verified:
            _verify(vector, row.weights_sha256, row.name)
        return vector

    @property
    def _shared(self) -> tuple[nn.Module, Layout]:
        with bounded(self.most_parameters):
            return skeleton_and_layout(self.name, canonical_json(dict(self.args)), self.head, self.head_hidden)


def _verify(vector: Tensor, sha256: str | None, name: str) -> None:
    values = vector.cpu().numpy()
    # 6 ms for a ViT-S; isfinite().sum() of torch took 150
    finite = np.isfinite(values)
    if not finite.all():
        raise ZooError(f"{name} has {(~finite).sum()} weights that are not finite: it cannot be rebuilt")
    # a row whose weights were changed on purpose comes without a hash
    if sha256 and weights_sha256(values) != sha256:
        raise ZooError(f"the weights of {name} do not match their hash: they were changed, or belong to another row")
