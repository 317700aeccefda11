"""Plan the rows of a source of foreign checkpoints, in the order of their lineage, before any is loaded.

Run and epoch of a checkpoint come from a factor table, or from its path.
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
    """The source as a whole cannot be read: nothing is refused, and the same command continues later."""


def unless_refused(read: Callable[[Item], Result], item: Item) -> Result | ZooError:
    """Return the result of `read` for an item, or the error for which this one item is refused.

    Raises:
        SourceError: if the source as a whole cannot be read.
    """
    try:
        return read(item)
    # a source that is gone is no property of one item: nothing is refused for it
    except SourceError:
        raise
    except ZooError as error:
        return error


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint under timm's names.

    Attributes:
        tensors: tensor name -> float32 tensor, in timm's `state_dict` order.
        architecture: timm name.
        architecture_args: keyword arguments of `timm.create_model`.
        head: `linear` or `mlp`.
        head_hidden: hidden width of an MLP head.
        flags: changes to the checkpoint, and facts that its users must know.
    """

    tensors: dict[str, Tensor]
    architecture: str
    architecture_args: Mapping[str, object]
    head: str
    head_hidden: int | None
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PlannedRow:
    """A checkpoint that becomes a row.

    Attributes:
        source: path of the checkpoint within the source.
        columns: light columns but those that follow from the weights; `provenance` is a dictionary.
        split_group: name of the rows that must stay in one split: the root of the lineage.
        load: reads the checkpoint; raises `ZooError` if it is refused, `SourceError` if the source is gone.
        size: number of bytes of the file, where known.
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
        name: name of the zoo.
        rows: the planned rows, parents before children, epochs ascending.
        factor_types: generating factor -> `string`, `float`, `int` or `bool`.
        images: dataset -> licence and preprocessing, in the form of `zoo.json`.
        refused: path in the source -> reason why that checkpoint is not converted.
        notes: sentences on the source for users of the zoo.
    """

    name: str
    rows: list[PlannedRow]
    factor_types: dict[str, str]
    images: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# at most 10 digits, none behind them: longer numbers are hashes or dates, not epochs
EPOCH = re.compile(r"(?:epoch[-_]?|checkpoint[-_])(\d{1,10})(?!\d)", re.ASCII | re.IGNORECASE)
# a run id becomes a file name, which most file systems limit to 255 bytes
LONGEST_RUN_ID = 120
UNTOLD = "The epoch of {} checkpoints is not told, {} the first: it counts as 1; a table's column `epoch` tells it."
Load = Callable[[str | None, Mapping[str, object] | None], LoadedModel]


@dataclass(frozen=True)
class Found:
    """A checkpoint of a source.

    Attributes:
        source: path of the checkpoint within the source.
        load: reads the checkpoint, given the architecture and its arguments where they are known.
        provenance: origin of the checkpoint, for the column `provenance`.
        size: number of bytes of the weights, where known.
    """

    source: str
    load: Load
    provenance: Mapping[str, object]
    size: int | None = None


@dataclass(frozen=True)
class Rows:
    """The planned rows of a source, and the refused checkpoints with their reasons."""

    rows: list[PlannedRow]
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def planned_rows(
    found: Iterable[Found],
    table: Table | None,
    *,
    architecture: str | None = None,
    architecture_args: Mapping[str, object] | None = None,
    fallback: str = "model",
) -> Rows:
    """Plan the rows of checkpoints, parents before children, epochs ascending.

    Args:
        found: checkpoints of the source.
        table: the factor table; without one, run and epoch are read from the paths.
        architecture: timm name for checkpoints whose line does not name one.
        architecture_args: arguments for checkpoints whose line does not give them.
        fallback: run id of a checkpoint whose path has none.
    """
    checkpoints = list(found)
    refused: dict[str, str] = {}
    if table is None:
        lines = _guessed([checkpoint.source for checkpoint in checkpoints], fallback)
    else:
        lines = _completed(table, fallback)
        refused |= _family_mistakes(lines, table.unread)
        unlisted = [checkpoint.source for checkpoint in checkpoints if checkpoint.source not in lines]
        refused |= dict.fromkeys(unlisted, f"it is not in {table.name}")
        refused |= table.refused
    accepted = {checkpoint.source: checkpoint for checkpoint in checkpoints if checkpoint.source not in refused}
    final: dict[str, int] = {}
    for source in accepted:
        run, epoch = lines[source].values["run_id"], lines[source].values["epoch"]
        # over accepted checkpoints only: the last one that can be converted counts as final
        final[run] = max(epoch, final.get(run, 0))
    groups, depths = _groups(lines), _depths(lines)
    assumed = [source for source in accepted if _named_epoch(source) is None and not _tells_epoch(table, source)]
    for source in assumed:
        # recorded in the row, so that a guess is never taken for a fact
        provenance = {**accepted[source].provenance, "assumed": {"epoch": 1}}
        accepted[source] = replace(accepted[source], provenance=provenance)
    rows = [
        _row(accepted[source], lines[source], final, groups, architecture, architecture_args)
        # parents first, then by name: the order does not depend on how the source lists its files
        for source in sorted(accepted, key=lambda source: (depths[source], *_order(lines[source])))
    ]
    return Rows(rows, refused, [UNTOLD.format(len(assumed), min(assumed))] if assumed else [])


def _tells_epoch(table: Table | None, source: str) -> bool:
    return table is not None and source in table.lines and "epoch" in table.lines[source].values


def _row(
    checkpoint: Found,
    line: Line,
    final: Mapping[str, int],
    groups: Mapping[str, str],
    architecture: str | None,
    args: Mapping[str, object] | None,
) -> PlannedRow:
    """Plan the row of a checkpoint from its line of the table."""
    values = dict(line.values)
    expected = {
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
    options = {name: value for name, value in expected.items() if value is not None}
    columns["provenance"] = dict(checkpoint.provenance) | ({"given": options} if options else {})
    load = partial(_load, checkpoint, line.where, **expected)
    return PlannedRow(checkpoint.source, columns, groups[values["run_id"]], load, checkpoint.size)


def _load(
    checkpoint: Found,
    where: str,
    *,
    architecture: str | None,
    architecture_args: Mapping[str, object] | None,
    head: str | None,
    head_hidden: int | None,
) -> LoadedModel:
    """Load a checkpoint, and compare its head with the table."""
    model = checkpoint.load(architecture, architecture_args)
    for name, listed, actual in (("head", head, model.head), ("head_hidden", head_hidden, model.head_hidden)):
        if listed is not None and listed != actual:
            raise ZooError(f"{checkpoint.source} has {name} {actual!r}, {where} says {listed!r}: correct the table")
    return model


def _order(line: Line) -> tuple[str, int]:
    return line.values["run_id"], line.values["epoch"]


def _completed(table: Table, fallback: str) -> dict[str, Line]:
    """Complete lines with run, epoch and model id, from the checkpoint's path where a line lacks them."""
    guessed = _guessed(list(table.lines), fallback)
    lines = {}
    for source, line in table.lines.items():
        values = {name: guessed[source].values[name] for name in ("run_id", "epoch")} | line.values
        values["model_id"] = schema.model_id(values["run_id"], values["epoch"])
        lines[source] = Line(line.where, values, line.factors)
    return lines


def _family_mistakes(lines: Mapping[str, Line], unread: frozenset[str]) -> dict[str, str]:
    """Find checkpoints whose id another one has, or whose parent does not exist or descends from them."""
    refused = {}
    holders = defaultdict(list)
    for line in lines.values():
        holders[line.values["model_id"]].append(line.where)
    parents = {line.values["model_id"]: line.values.get("parent_id") for line in lines.values()}
    for source, line in lines.items():
        model_id, parent = line.values["model_id"], line.values.get("parent_id")
        if len(holders[model_id]) > 1:
            duplicates = _other_lines(holders[model_id], line)
            refused[source] = (
                f"{line.where}: {model_id!r} is also in {duplicates}: tell them apart by run_id or epoch"
            )
        # a parent whose line has a mistake is known, though its row is refused
        elif parent is not None and parent not in parents and parent not in unread:
            refused[source] = f"{line.where}: parent_id {parent!r} is no model of the table"
        elif _ancestors(model_id, parents)[1]:
            refused[source] = f"{line.where}: the parents of {model_id!r} go in a circle"
    return refused


def _other_lines(places: list[str], line: Line) -> str:
    return ", ".join(place.rpartition(" ")[2] for place in places if place != line.where).join(("line ", ""))


def _ancestors(model_id: str | None, parents: Mapping[str, str | None]) -> tuple[set[str], bool]:
    """Follow a checkpoint's parents: the ids on the way, the first included, and whether they form a circle."""
    path: set[str] = set()
    # ends at a repeated id: a table may describe a circle
    while model_id is not None and model_id not in path:
        path.add(model_id)
        model_id = parents.get(model_id)
    return path, model_id is not None


def _depths(lines: Mapping[str, Line]) -> dict[str, int]:
    """Count the known ancestors of each checkpoint."""
    parents = {line.values["model_id"]: line.values.get("parent_id") for line in lines.values()}
    return {source: len(_ancestors(line.values.get("parent_id"), parents)[0]) for source, line in lines.items()}


def _groups(lines: Mapping[str, Line]) -> dict[str, str]:
    """Run -> name of its tree, whose runs stay in one split: the first of the runs with the fewest ancestors."""
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
    """Read run, epoch and model id from paths; paths that give the same ones get a hash in their run id."""
    guesses = {source: (_run_id(source, fallback), _epoch(source)) for source in sources}
    holders = defaultdict(list)
    for source, pair in guesses.items():
        holders[pair].append(source)
    lines = {}
    for source, (run, epoch) in guesses.items():
        if len(holders[run, epoch]) > 1:
            # of the path, not a counter: the id does not change when the source gets further files
            run = f"{run[:LONGEST_RUN_ID]}-{schema.fingerprint(source, 8)}"
        values = {"run_id": run, "epoch": epoch, "model_id": schema.model_id(run, epoch)}
        lines[source] = Line(source, values, {})
    return lines


def _epoch(source: str) -> int:
    """Read the last epoch that a path names; 1 if it names none."""
    epoch = _named_epoch(source)
    return 1 if epoch is None else epoch


def _named_epoch(source: str) -> int | None:
    epochs = [int(number) for number in EPOCH.findall(source)]
    return epochs[-1] if epochs and epochs[-1] <= LARGEST_EPOCH else None


def _run_id(source: str, fallback: str) -> str:
    """Make a run id of a path: without epoch and suffix, in characters that are safe in a file name."""
    bare = re.sub(r"(^|/)(checkpoints|(pytorch_)?model(\.(safetensors|pt|pth|bin|ckpt|index|json))+)$", "", source)
    bare = re.sub(r"\.(safetensors|pt|pth|bin|ckpt)$", "", bare)
    matches = list(EPOCH.finditer(bare))
    if matches and int(matches[-1][1]) <= LARGEST_EPOCH:
        bare = bare[: matches[-1].start()] + bare[matches[-1].end() :]
    names = (schema.safe_id(text).strip("-_.=+") for text in (bare, fallback))
    run = next(filter(None, names), "model")
    if len(run) > LONGEST_RUN_ID:
        # a hash: two long paths may differ only behind the cut
        run = f"{run[:LONGEST_RUN_ID]}-{schema.fingerprint(run, 8)}"
    return run
