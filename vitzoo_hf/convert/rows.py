"""Checkpoints that were found, and what a table says of them -> rows in the order of their lineage.

What a source of foreign checkpoints holds, before any of them is loaded.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from vitzoo_hf.convert.factor_table import LARGEST_EPOCH, Line, Table
from vitzoo_hf.format import schema
from vitzoo_hf.format.schema import ZooError

Item = TypeVar("Item")
Result = TypeVar("Result")


class SourceError(ZooError):
    """The source as a whole cannot be read any more: nothing is refused, and the same command continues later."""


def unless_refused(read: Callable[[Item], Result], item: Item) -> Result | ZooError:
    """What `read` returns for an item, or the error for which this one item is refused.

    Raises:
        SourceError: if the source as a whole cannot be read.
    """
    try:
        return read(item)
    except SourceError:
        raise
    except ZooError as error:
        return error


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


EPOCH = re.compile(r"(?:epoch[-_]?|checkpoint[-_])(\d{1,10})(?!\d)", re.ASCII | re.IGNORECASE)
LONGEST_RUN_ID = 120
UNTOLD = "The epoch of {} checkpoints is not told, {} the first: it counts as 1; a table's column `epoch` tells it."
Load = Callable[[str | None, dict[str, Any] | None], LoadedModel]


@dataclass(frozen=True)
class Found:
    """A checkpoint of a source.

    Attributes:
        source: its path within the source.
        load: reads it, given the architecture and its arguments where they are known.
        provenance: where it comes from.
        size: bytes of its weights, where known.
    """

    source: str
    load: Load
    provenance: dict[str, Any]
    size: int | None = None


@dataclass(frozen=True)
class Rows:
    """What can be taken of a source, and what cannot."""

    rows: list[PlannedRow]
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def planned_rows(
    found: Iterable[Found],
    table: Table | None,
    *,
    architecture: str | None = None,
    architecture_args: Mapping[str, Any] | None = None,
    fallback: str = "model",
) -> Rows:
    """Rows of the checkpoints, parents before children, epochs ascending.

    Args:
        found: checkpoints of the source.
        table: what is known of them; without one, run and epoch are seen from their paths.
        architecture: of those whose line does not name it.
        architecture_args: of those whose line does not give them.
        fallback: run id of a checkpoint whose path tells none.
    """
    found = list(found)
    refused: dict[str, str] = {}
    if table is None:
        lines = _guessed([one.source for one in found], fallback)
    else:
        lines = _completed(table, fallback)
        refused |= _family_mistakes(lines, table.unread)
        refused |= {one.source: f"it is not in {table.name}" for one in found if one.source not in lines}
        refused |= table.refused
    kept = {one.source: one for one in found if one.source not in refused}
    final: dict[str, int] = {}
    for source in kept:
        run, epoch = lines[source].values["run_id"], lines[source].values["epoch"]
        final[run] = max(epoch, final.get(run, 0))
    groups, depths = _groups(lines), _depths(lines)
    untold = [source for source in kept if _named_epoch(source) is None and not _tells_epoch(table, source)]
    for source in untold:
        kept[source] = replace(kept[source], provenance=kept[source].provenance | {"assumed": {"epoch": 1}})
    rows = [
        _row(kept[source], lines[source], final, groups, architecture, architecture_args)
        for source in sorted(kept, key=lambda source: (depths[source], *_order(lines[source].values)))
    ]
    return Rows(rows, refused, [UNTOLD.format(len(untold), min(untold))] if untold else [])


def _tells_epoch(table: Table | None, source: str) -> bool:
    return table is not None and source in table.lines and "epoch" in table.lines[source].values


def _row(
    one: Found,
    line: Line,
    final: Mapping[str, int],
    groups: Mapping[str, str],
    architecture: str | None,
    args: Mapping[str, Any] | None,
) -> PlannedRow:
    values = dict(line.values)
    told = {
        "architecture": values.pop("architecture", architecture),
        "architecture_args": values.pop("architecture_args", None if args is None else dict(args)),
        "head": values.pop("head", None),
        "head_hidden": values.pop("head_hidden", None),
    }
    parent = values.get("parent_id")
    columns = {
        "parent_id": parent,
        "stage": "finetune" if parent else "pretrain",
        "dataset": "unknown",
        "is_final": values["epoch"] == final[values["run_id"]],
        **values,
        **{f"factor_{name}": value for name, value in line.factors.items()},
    }
    given = {name: value for name, value in told.items() if value is not None}
    columns["provenance"] = one.provenance | ({"given": given} if given else {})
    load = partial(_load, one, line.where, **told)
    return PlannedRow(one.source, columns, groups[values["run_id"]], load, one.size)


def _load(
    one: Found,
    where: str,
    *,
    architecture: str | None,
    architecture_args: dict[str, Any] | None,
    head: str | None,
    head_hidden: int | None,
) -> LoadedModel:
    """Load a checkpoint, and compare its head with what the table says."""
    model = one.load(architecture, architecture_args)
    for name, told, seen in (("head", head, model.head), ("head_hidden", head_hidden, model.head_hidden)):
        if told is not None and told != seen:
            raise ZooError(f"{one.source} has {name} {seen!r}, {where} says {told!r}: correct the table")
    return model


def _order(values: Mapping[str, Any]) -> tuple[str, int]:
    return values["run_id"], values["epoch"]


def _completed(table: Table, fallback: str) -> dict[str, Line]:
    """Lines with run, epoch and model id: from their checkpoint's path where they do not say them."""
    guessed = _guessed(list(table.lines), fallback)
    lines = {}
    for source, line in table.lines.items():
        values = {name: guessed[source].values[name] for name in ("run_id", "epoch")} | line.values
        values["model_id"] = schema.model_id(values["run_id"], values["epoch"])
        lines[source] = Line(line.where, values, line.factors)
    return lines


def _family_mistakes(lines: Mapping[str, Line], unread: frozenset[str]) -> dict[str, str]:
    """Checkpoints whose id is taken, or whose parent does not exist or descends from them."""
    refused = {}
    holders = defaultdict(list)
    for line in lines.values():
        holders[line.values["model_id"]].append(line.where)
    parents = {line.values["model_id"]: line.values.get("parent_id") for line in lines.values()}
    for source, line in lines.items():
        model_id, parent = line.values["model_id"], line.values.get("parent_id")
        if len(holders[model_id]) > 1:
            others = _others(holders[model_id], line)
            refused[source] = f"{line.where}: {model_id!r} is also in {others}: tell them apart by run_id or epoch"
        elif parent is not None and parent not in parents and parent not in unread:
            refused[source] = f"{line.where}: parent_id {parent!r} is no model of the table"
        elif _in_circle(model_id, parents):
            refused[source] = f"{line.where}: the parents of {model_id!r} go in a circle"
    return refused


def _others(places: list[str], line: Line) -> str:
    return ", ".join(place.rpartition(" ")[2] for place in places if place != line.where).join(("line ", ""))


def _in_circle(model_id: str, parents: Mapping[str, str | None]) -> bool:
    seen: set[str] = set()
    step: str | None = model_id
    while step is not None and step not in seen:
        seen.add(step)
        step = parents.get(step)
    return step is not None


def _depths(lines: Mapping[str, Line]) -> dict[str, int]:
    """How many parents are before each checkpoint, as far as they are known."""
    parents = {line.values["model_id"]: line.values.get("parent_id") for line in lines.values()}
    depths = {}
    for source, line in lines.items():
        seen: set[str] = set()
        step = line.values.get("parent_id")
        while step is not None and step not in seen:
            seen.add(step)
            step = parents.get(step)
        depths[source] = len(seen)
    return depths


def _groups(lines: Mapping[str, Line]) -> dict[str, str]:
    """Run -> the name of its family: runs that are joined by parents stay in one split."""
    depths: dict[str, int] = {}
    for source, depth in _depths(lines).items():
        run = lines[source].values["run_id"]
        depths[run] = min(depth, depths.get(run, depth))
    pairs = []
    for line in lines.values():
        run, parent_run = line.values["run_id"], (line.values.get("parent_id") or "").rpartition("@")[0]
        pairs.append((run, parent_run if parent_run in depths else run))
    return schema.union_find(pairs, key=lambda run: (depths[run], run))


def _guessed(sources: list[str], fallback: str) -> dict[str, Line]:
    """Run, epoch and model id as the paths tell them; two that tell the same get names of their own."""
    told = {source: (_run_id(source, fallback), _epoch(source)) for source in sources}
    holders = defaultdict(list)
    for source, pair in told.items():
        holders[pair].append(source)
    lines = {}
    for source, (run, epoch) in told.items():
        if len(holders[run, epoch]) > 1:
            run = f"{run[:LONGEST_RUN_ID]}-{schema.fingerprint(source, 8)}"
        values = {"run_id": run, "epoch": epoch, "model_id": schema.model_id(run, epoch)}
        lines[source] = Line(source, values, {})
    return lines


def _epoch(source: str) -> int:
    """The last epoch that a path names; 1 if it names none."""
    named = _named_epoch(source)
    return 1 if named is None else named


def _named_epoch(source: str) -> int | None:
    named = [int(number) for number in EPOCH.findall(source)]
    return named[-1] if named and named[-1] <= LARGEST_EPOCH else None


def _run_id(source: str, fallback: str) -> str:
    """A path without its epoch and ending, in characters that are safe in a file name."""
    bare = re.sub(r"(^|/)(checkpoints|(pytorch_)?model(\.(safetensors|pt|pth|bin|ckpt|index|json))+)$", "", source)
    bare = re.sub(r"\.(safetensors|pt|pth|bin|ckpt)$", "", bare)
    matches = list(EPOCH.finditer(bare))
    if matches and int(matches[-1][1]) <= LARGEST_EPOCH:
        bare = bare[: matches[-1].start()] + bare[matches[-1].end() :]
    names = (schema.safe_id(text).strip("-_.=+") for text in (bare, fallback))
    run = next(filter(None, names), "model")
    if len(run) > LONGEST_RUN_ID:
        run = f"{run[:LONGEST_RUN_ID]}-{schema.fingerprint(run, 8)}"
    return run
