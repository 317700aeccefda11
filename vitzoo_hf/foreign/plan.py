"""What a source of foreign checkpoints holds, before any of them is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitzoo_hf.schema import ZooError


class SourceError(ZooError):
    """The source as a whole cannot be read any more: nothing is refused, and the same command continues later."""


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint under timm's names.

    Attributes:
        tensors: float32, in timm's `state_dict` order.
        architecture: timm name.
        architecture_args: keyword arguments of `timm.create_model`.
        head: `linear` or `mlp`.
        head_hidden: hidden width of an MLP head.
        flags: what was done to the checkpoint, or is to be known of it.
    """

    tensors: dict[str, Tensor]
    architecture: str
    architecture_args: dict[str, Any]
    head: str
    head_hidden: int | None
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PlannedRow:
    """A checkpoint that is to become a row.

    Attributes:
        source: its path within the source.
        columns: light columns but those that follow from the weights; `provenance` is a dictionary.
        split_group: what must stay in one split: the root of its lineage.
        load: reads the checkpoint; raises `ZooError` if it cannot be taken, `SourceError` if nothing can be read.
        size: bytes of its file, where known.
    """

    source: str
    columns: dict[str, Any]
    split_group: str
    load: Callable[[], LoadedModel]
    size: int | None = None


@dataclass(frozen=True)
class SourcePlan:
    """All checkpoints of a source.

    Attributes:
        name: of the zoo.
        rows: parents before children, epochs ascending.
        factor_types: generating factor -> `string`, `float`, `int` or `bool`.
        images: dataset -> licence and preprocessing, as `zoo.json` holds them.
        refused: path in the source -> why it is not taken.
        notes: what a user must know of the source, in sentences.
    """

    name: str
    rows: list[PlannedRow]
    factor_types: dict[str, str]
    images: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
