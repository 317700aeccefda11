"""Convert foreign checkpoints to a zoo, shard by shard, so that an interrupted conversion continues.

A source is planned first, from listings and small files; then its checkpoints are loaded, checked and written in
order. Finished shards lie beside the zoo in a hidden folder, with a record of each; the zoo appears once it is
complete. Checkpoints that cannot be converted are named with the reason, and the conversion goes on. At most
`workers + 1` checkpoints and a row group are in memory.
"""

import json
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vitzoo_hf.convert.rows import PlannedRow, SourcePlan, unless_refused
from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import absolute, read_json, write_json
from vitzoo_hf.format.encoding import check_dtype, check_finite, rounded
from vitzoo_hf.format.layout import Layout, flatten
from vitzoo_hf.format.messages import one_line
from vitzoo_hf.format.schema import FORMAT_VERSION, ZooError
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.publish.folder import Shard, Storage, assemble, refuse_to_replace, shard_name, write_shard
from vitzoo_hf.publish.place import held, swap
from vitzoo_hf.publish.viewer import chosen_default
from vitzoo_hf.read_ahead import mapped_ahead

LICENCE = r"[a-z0-9][a-z0-9._-]{1,60}"
ANOTHER = "a zoo that is not of this source and these options: choose another folder, or replace=True (--replace)"
DEFAULT_SPLITS: dict[str, str | int | float] = {
    "by": "lineage",
    "seed": 0,
    "train": 1.0,
    "validation": 0.0,
    "test": 0.0,
}


class NothingTakenError(ZooError):
    """No checkpoint of a source can be converted.

    Attributes:
        refused: path in the source -> reason.
    """

    def __init__(self, name: str, refused: Mapping[str, str]) -> None:
        first = next(iter(refused.items()), None)
        example = f" ({len(refused)} refused; {first[0]}: {first[1]})" if first else ": there is none"
        super().__init__(f"{name}: no checkpoint can be taken{example}")
        self.refused = dict(refused)


@dataclass
class Conversion:
    """Result of a conversion.

    Attributes:
        folder: the zoo.
        rows: number of converted checkpoints.
        refused: path in the source -> reason why that checkpoint was not converted.
        notes: sentences on the source for users of the zoo.
    """

    folder: Path
    rows: int
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert(
    plan: SourcePlan,
    folder: str | Path,
    *,
    dtype: str = "float32",
    splits: Mapping[str, str | int | float] | None = None,
    licence: str = "unknown",
    default_config: str | None = None,
    workers: int = 2,
    replace: bool = False,
    progress: bool = True,
) -> Conversion:
    """Write the checkpoints of a planned source as a zoo.

    After an interruption the same call continues with the first unfinished shard, and gives the same zoo.

    Args:
        plan: result of `plan_source`.
        folder: the zoo.
        dtype: number format of the stored weights: float32 is exact, float16 and bfloat16 take half the size.
        splits: `by` (`lineage` or `run`), `seed` and the shares of `train`, `validation`, `test`; all in train by
            default.
        licence: licence of the weights by its name on the Hub, such as `cc-by-4.0`.
        default_config: config that `load_dataset` and the viewer open, `weights` or `index`; by default by size.
        workers: number of checkpoints that are loaded at the same time.
        replace: replace another zoo in `folder`, once the new one is complete.
        progress: show a bar.

    Returns:
        The number of rows, and the refused checkpoints.

    Raises:
        NothingTakenError: if no checkpoint can be converted.
        ZooError: if the folder holds another zoo, the source has changed since the conversion began, another process
            converts into the same folder, or the folder cannot be written.
    """
    check_dtype(dtype)
    _check_options(workers, licence)
    shares = dict(DEFAULT_SPLITS if splits is None else splits)
    job = _Job(plan, dtype, shares, licence, chosen_default(default_config))
    _check_splits(job)
    folder = absolute(Path(folder))
    refuse_to_replace(folder)
    if (conversion := _earlier_conversion(job, folder)) is not None:
        return conversion
    if (folder / schema.MANIFEST).is_file() and not replace:
        raise ZooError(f"{folder} holds {ANOTHER}")
    if not plan.rows:
        raise NothingTakenError(plan.name, plan.refused)
    staging = folder.parent / f".{folder.name}.converting"
    try:
        with held(folder):
            staging.mkdir(exist_ok=True)
            return _run(job, staging, folder, workers, progress)
    except OSError as error:
        reason = error.strerror or error
        raise ZooError(f"cannot write the zoo {folder} ({reason}); the same command continues later") from None


def _check_options(workers: int, licence: str) -> None:
    if workers < 1:
        raise ZooError(f"workers is {workers}; it must be at least 1")
    if re.fullmatch(LICENCE, licence) is None:
        raise ZooError(f"licence {licence!r} is no name of a licence as the Hub has them, such as cc-by-4.0 or other")


def _check_splits(job: "_Job") -> None:
    if job.splits["by"] not in ("lineage", "run"):
        raise ZooError(f"splits by {job.splits['by']!r}: expected lineage or run")
    shares = list(job.shares.values())
    # 0.7 + 0.2 + 0.1 is not exactly 1 in floating point
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ZooError(f"splits of {', '.join(f'{share:g}' for share in shares)}: shares are 0 or more and sum to 1")


@dataclass(frozen=True)
class _Job:
    """Everything that determines the zoo: the plan and the options."""

    plan: SourcePlan
    dtype: str
    splits: dict[str, str | int | float]
    licence: str
    opened: dict[str, str]

    @property
    def shares(self) -> dict[str, float]:
        """Split -> share of the groups."""
        return {split: float(self.splits[split]) for split in schema.SPLITS}

    @property
    def fingerprint(self) -> str:
        """Hash of the source's plan, the storage type, the splits and the licence."""
        rows = [[row.source, row.columns] for row in self.plan.rows]
        options = [self.dtype, self.splits, self.licence, FORMAT_VERSION, *self.opened.values()]
        return schema.fingerprint([self.plan.name, rows, self.plan.refused, options])


def _run(job: _Job, staging: Path, folder: Path, workers: int, progress: bool) -> Conversion:
    """Write the shards that are not finished, then put the zoo together."""
    storage = _begin(job, staging)
    refused = dict(job.plan.refused)
    shards: dict[str, Shard] = {}
    with progress_bar("converting", "row", shown=progress, total=len(job.plan.rows)) as bar:
        for name, rows in _parts(job, storage).items():
            part = _finished(staging, name) or _write(job, staging, name, rows, storage, workers)
            bar.update(len(rows))
            refused |= part.refused
            # a shard whose checkpoints were all refused has no file
            if part.shard.light:
                shards[name] = part.shard
    if not shards:
        shutil.rmtree(staging, ignore_errors=True)
        raise NothingTakenError(job.plan.name, refused)
    notes = job.plan.notes + _orphans(shards)
    assemble(staging / "zoo", _manifest(job, refused, notes), shards, {}, "")
    swap(staging / "zoo", folder)
    shutil.rmtree(staging, ignore_errors=True)
    return Conversion(folder, sum(len(shard.light) for shard in shards.values()), refused, notes)


def _earlier_conversion(job: _Job, folder: Path) -> Conversion | None:
    """Return the result of this very conversion if an earlier call finished it; else None."""
    try:
        manifest = read_json(folder / schema.MANIFEST)
        shards = read_json(folder / schema.SHARDS)
        is_same = manifest["conversion"]["fingerprint"] == job.fingerprint
        # sizes only: hashes would mean reading the whole zoo
        is_complete = all((folder / name).stat().st_size == entry["bytes"] for name, entry in shards.items())
    except (ZooError, OSError, KeyError, TypeError):
        return None
    if not (is_same and is_complete):
        return None
    rows = sum(entry["rows"] for entry in shards.values())
    return Conversion(folder, rows, manifest["refused"], manifest["notes"])


def _begin(job: _Job, staging: Path) -> Storage:
    """Prepare the staging folder of this job, or continue with the one that is there.

    Raises:
        ZooError: if the folder holds a finished shard of another conversion.
    """
    record = staging / "job.json"
    if record.exists():
        begun_job = read_json(record)
        # without a finished shard nothing is lost by starting again with other options
        if begun_job["fingerprint"] != job.fingerprint and not any((staging / "shards").iterdir()):
            shutil.rmtree(staging)
        elif begun_job["fingerprint"] != job.fingerprint:
            raise ZooError(
                f"{staging} holds an unfinished conversion of another source, or with other options: finish that,"
                " delete it, or choose another folder"
            )
        else:
            # not `_largest` again: all shards of a zoo need the encoding that the first was written with
            return Storage(job.dtype, begun_job["largest"], len(job.plan.rows))
    (staging / "shards").mkdir(parents=True, exist_ok=True)
    largest = _largest(job.plan)
    write_json(record, {"fingerprint": job.fingerprint, "largest": largest})
    return Storage(job.dtype, largest, len(job.plan.rows))


def _largest(plan: SourcePlan) -> int:
    """Estimate the parameters of the largest model from file sizes, or from the first checkpoint without any."""
    sizes = [row.size for row in plan.rows if row.size]
    if sizes:
        return max(1, max(sizes) // 4)  # bytes of a float32
    for row in plan.rows:
        try:
            return Layout.of(row.load().tensors).num_parameters
        except ZooError:
            continue
    # no checkpoint can be loaded; above the limit weights are stored as binary, which fits any size
    return schema.LIST_LIMIT + 1


def _parts(job: _Job, storage: Storage) -> dict[str, list[PlannedRow]]:
    """Divide the rows into shards: path -> rows."""
    members: dict[str, list[PlannedRow]] = {split: [] for split in schema.SPLITS}
    for row in job.plan.rows:
        group = row.split_group if job.splits["by"] == "lineage" else row.columns["run_id"]
        split = schema.split_of(row.columns["run_id"], group, fractions=job.shares, seed=int(job.splits["seed"]))
        members[split].append(row)
    parts = {}
    for split, rows in members.items():
        # rounded up; the number is in every file name, so it is known before the first file is written
        count = -(-len(rows) // storage.shard_rows)
        for number in range(count):
            start = number * storage.shard_rows
            parts[shard_name(split, number, count)] = rows[start : start + storage.shard_rows]
    return parts


@dataclass(frozen=True)
class _Part:
    """A finished shard, and its refused checkpoints with their reasons."""

    shard: Shard
    refused: dict[str, str]


def _finished(staging: Path, name: str) -> _Part | None:
    """Return the shard if an earlier call finished it and its file has its full length."""
    try:
        record = read_json(_record(staging, name))
        layouts = {key: Layout.from_json(entries) for key, entries in record["layouts"].items()}
        # a process killed while writing leaves a shorter file
        if record["light"] and (staging / "zoo" / name).stat().st_size != record["entry"]["bytes"]:
            return None
        return _Part(Shard(record["entry"], record["light"], layouts), record["refused"])
    except (ZooError, OSError, KeyError, TypeError):
        return None


def _write(job: _Job, staging: Path, name: str, planned: list[PlannedRow], storage: Storage, workers: int) -> _Part:
    """Write a shard, then the record that it is finished."""
    refused: dict[str, str] = {}
    file = staging / "zoo" / name
    with closing(_loaded_rows(planned, job, refused, workers)) as rows:
        shard = write_shard(file, rows, len(planned), job.plan.factor_types, storage)
    # whether a row is left is known only after loading: Parquet without a row is no shard of a zoo
    if not shard.light:
        file.unlink()
    layouts = {key: layout.to_json() for key, layout in shard.layouts.items()}
    record = {"entry": shard.entry, "light": shard.light, "layouts": layouts, "refused": refused}
    # after the file: a record says that its shard is complete
    write_json(_record(staging, name), record, indent=None)
    return _Part(shard, refused)


def _record(staging: Path, name: str) -> Path:
    return staging / "shards" / f"{Path(name).stem}.json"


def _loaded_rows(
    planned: list[PlannedRow], job: _Job, refused: dict[str, str], workers: int
) -> Generator[dict[str, object], None, None]:
    """Rows with their weights, in order, loaded ahead; why a checkpoint cannot be converted is added to `refused`."""
    load = partial(unless_refused, partial(_row, job=job))
    # closing ends the loading threads when the writer stops early
    with closing(mapped_ahead(load, planned, threads=workers, ahead=workers)) as results:
        for checkpoint, result in zip(planned, results, strict=True):
            if isinstance(result, ZooError):
                # the path is the key of `refused`, so the reason does not repeat it
                reason = str(result).removeprefix(checkpoint.source).lstrip(": ")
                refused[checkpoint.source] = one_line(ZooError(reason))
            else:
                yield result


def _row(planned: PlannedRow, job: _Job) -> dict[str, object]:
    """Load a checkpoint, check it, and return its row."""
    model = planned.load()
    args = schema.canonical_json(model.architecture_args)
    # built from the JSON that the row stores, as a reader will build it
    expected = Architecture(model.architecture, json.loads(args), model.head, model.head_hidden).layout
    layout = Layout.of(model.tensors)
    if layout != expected:
        raise ZooError(f"{planned.source} does not have the tensors of {model.architecture} with a {model.head} head")
    weights = flatten(model.tensors)
    check_finite([weights], [planned.source])
    # the hash below is of the rounded weights, which are what a reader gets
    stored = rounded(weights.numpy(), job.dtype)
    provenance = planned.columns["provenance"] | {"source": planned.source, "flags": model.flags}
    return {
        # null where the source does not know a result or factor
        **dict.fromkeys([*schema.RESULTS, *(f"factor_{name}" for name in job.plan.factor_types)]),
        **planned.columns,
        "architecture": model.architecture,
        "architecture_args": args,
        "head": model.head,
        "head_hidden": model.head_hidden,
        "num_parameters": layout.num_parameters,
        "layout": layout.fingerprint,
        "weights_sha256": schema.weights_sha256(stored),
        "dtype": job.dtype,
        "provenance": schema.canonical_json(provenance),
        "weights": stored,
    }


def _orphans(shards: Mapping[str, Shard]) -> list[str]:
    """Write a note on rows whose parent is not in the zoo."""
    rows = [row for shard in shards.values() for row in shard.light]
    model_ids = {str(row["model_id"]) for row in rows}
    absent = sorted({str(row["parent_id"]) for row in rows if row["parent_id"]} - model_ids)
    return [f"{len(absent)} parents are not in the zoo, {absent[0]} the first."] if absent else []


def _manifest(job: _Job, refused: Mapping[str, str], notes: list[str]) -> dict[str, object]:
    return {
        "format": schema.FORMAT_VERSION,
        "name": job.plan.name,
        "blueprint_fingerprint": None,
        "conversion": {"fingerprint": job.fingerprint},
        "licence": job.licence,
        "factors": job.plan.factor_types,
        "images": job.plan.images,
        "splits": job.splits,
        "missing_runs": {},
        "refused": dict(refused),
        "notes": notes,
        **job.opened,
    }
