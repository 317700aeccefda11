"""Checkpoint files and model folders on this machine, with or without a factor table -> a plan.

A model folder is what `save_pretrained` writes: config.json beside the weights, which may be in several files.
Nothing is loaded before its turn; links that leave the folder are refused, and hidden files are not looked at.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from vitzoo_hf.foreign.files import read_state_dict
from vitzoo_hf.foreign.names import to_timm
from vitzoo_hf.foreign.plan import LoadedModel, SourceError, SourcePlan
from vitzoo_hf.foreign.planned_rows import Found, planned_rows
from vitzoo_hf.foreign.table import Table, read_table
from vitzoo_hf.hub_files import one_line
from vitzoo_hf.schema import ZooError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
BARE_NAME = "checkpoints"
TABLE = "factors.csv"
CONFIG = "config.json"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MODEL_FILES = ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1])
"""Weights of a model folder, the first that is there counting."""

BESIDE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "training_args.bin", "rng_state.pth")
"""What trainers write beside a model's weights."""

MAX_LEVELS = 3
MAX_CONFIG_BYTES = 10_000_000
SMALLEST = 1000
"""Bytes below which the size of a file says nothing of its model."""


def plan_checkpoints(
    source: Path,
    *,
    table: Path | None = None,
    architecture: str | None = None,
    architecture_args: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> SourcePlan:
    """Plan a checkpoint file, a model folder, or a folder of both, up to three levels deep.

    Args:
        source: the file or folder.
        table: CSV that says of each checkpoint which run and epoch it is, and its factors; by default `factors.csv`
            of the folder, if it is there. Without one, run and epoch follow from the paths.
        architecture: timm name, where no config.json and no column tells it.
        architecture_args: arguments of `timm.create_model` that do not follow from the shapes.
        name: of the zoo; that of the file or folder by default.

    Raises:
        ZooError: if there is no such file or folder, it is no checkpoint, or the table has a mistake in its header.
    """
    place = source.absolute()
    own_name = place.name.partition(".")[0] if place.is_file() else place.name
    label = own_name or "checkpoints"
    folder = _Folder(place if place.is_dir() else place.parent)
    if place.is_dir():
        folder.search()
        if table is None and (place / TABLE).is_file():
            table = place / TABLE
    elif not place.is_file():
        raise ZooError(f"{source} is neither a file nor a folder: give checkpoints, or a folder of them")
    elif not _is_checkpoint(place.name):
        known = ", ".join(SUFFIXES)
        raise ZooError(f"{source} is no checkpoint by its name; known are {known} and {BARE_NAME}")
    else:
        folder.models[place.name] = [place]
    if table is None and not folder.models and not folder.refused:
        raise ZooError(f"{source} has no checkpoint ({', '.join(SUFFIXES)} or {BARE_NAME}) in {MAX_LEVELS} levels")
    told = read_table(table, "file") if table is not None else None
    if told is not None:
        told = folder.matched(told)
    planned = planned_rows(
        [folder.found(path, files) for path, files in folder.models.items()],
        told,
        architecture=architecture,
        architecture_args=architecture_args,
        fallback=label,
    )
    return SourcePlan(
        name=name or label,
        rows=planned.rows,
        factor_types={} if told is None else told.factor_types,
        refused=folder.refused | ({} if told is None else told.refused) | planned.refused,
        notes=[] if told is None else told.notes,
    )


@dataclass
class _Folder:
    """The checkpoints below a folder: path in it -> the files of its weights."""

    place: Path
    models: dict[str, list[Path]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def search(self) -> None:
        """Find every checkpoint and model folder."""
        self._search(self.place, 1)

    def _search(self, folder: Path, level: int) -> None:
        try:
            entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            if folder == self.place:
                raise ZooError(f"{folder} cannot be read: {error.strerror}") from None
            self.refused[self._path(folder)] = f"it cannot be read: {error.strerror}"
            return
        files = [entry for entry in entries if self._is_inside(entry) and entry.is_file()]
        used = self._model_folder(folder, {file.name: file for file in files})
        for file in files:
            if _is_checkpoint(file.name) and file.name not in used:
                self.models[self._path(file)] = [file]
        for entry in entries:
            if entry.is_dir() and entry.is_symlink() and self._is_inside(entry):
                self.refused[self._path(entry)] = "it is a link to a folder: put the folder itself there"
            elif entry.is_dir() and not entry.is_symlink() and level < MAX_LEVELS:
                self._search(entry, level + 1)
            elif entry.is_dir() and not entry.is_symlink():
                self.refused[self._path(entry)] = f"it is below {MAX_LEVELS} levels: give a folder nearer to it"

    def _is_inside(self, entry: Path) -> bool:
        """Whether an entry leads to something in the folder; one that does not is refused if it matters."""
        if not entry.is_symlink():
            return True
        target = Path(os.path.realpath(entry))
        inside = target.is_relative_to(os.path.realpath(self.place)) and target.exists()
        if not inside and (_is_checkpoint(entry.name) or entry.is_dir() or entry.name in (CONFIG, TABLE, *INDEXES)):
            self.refused[self._path(entry)] = (
                "it is a link that leaves the folder, or leads nowhere: copy what it means"
            )
        return inside

    def _model_folder(self, folder: Path, files: Mapping[str, Path]) -> set[str]:
        """Note the folder's model, if it is a model folder; the names that belong to it."""
        weights = [name for name in MODEL_FILES if name in files]
        if CONFIG not in files or not weights:
            return set()
        path = self._path(folder) if folder != self.place else weights[0]
        belonging = {*MODEL_FILES, *BESIDE} | {name for name in files if name.startswith("rng_state_")}
        self.models[path] = [files[weights[0]]]
        for index in (name for name in weights if name in INDEXES):
            try:
                shards = set(_weight_map(files[index], path).values())
            except ZooError:
                shards = set()  # said when the model is loaded
            belonging |= shards
        return belonging

    def _path(self, entry: Path) -> str:
        return entry.relative_to(self.place).as_posix()

    def found(self, path: str, files: list[Path]) -> Found:
        """A checkpoint, to be loaded later."""
        size = sum(file.stat().st_size for file in files)
        if files[0].name in INDEXES:
            size = _sharded_size(files[0])
        provenance = {"kind": "checkpoint", "bytes": size}
        load = partial(_load, self.place, files[0], path)
        return Found(path, load, provenance, size if size >= SMALLEST else None)

    def matched(self, table: Table) -> Table:
        """The table with its lines under the paths of the checkpoints; lines about something else are refused."""
        aliases = {path: path for path in self.models}
        for path, files in self.models.items():
            aliases[self._path(files[0])] = path
        if len(self.models) == 1 and (self.place / CONFIG).is_file():
            aliases["."] = next(iter(self.models))
        lines, refused = {}, {}
        for given, line in table.lines.items():
            path = aliases.get(str(PurePosixPath(given)))
            if path is None:
                refused[given] = f"{line.where}: {self._why_not(given)}"
            elif path in lines:
                refused[given] = f"{line.where}: {path} is already in {lines[path].where}"
            else:
                lines[path] = line
        named = {aliases.get(str(PurePosixPath(given)), given): reason for given, reason in table.refused.items()}
        return Table(table.name, lines, table.factor_types, named | refused, table.notes)

    def _why_not(self, given: str) -> str:
        path = PurePosixPath(given)
        if path.is_absolute() or ".." in path.parts:
            return f"{given!r} leaves the folder; paths are relative to it"
        if str(path) in self.refused:
            return self.refused[str(path)]
        if not (self.place / path).exists():
            return f"there is no file {given!r} in {self.place.name}"
        return f"{given!r} is no checkpoint by its name, is hidden, or belongs to a model folder"


def _is_checkpoint(name: str) -> bool:
    return name.endswith(SUFFIXES) or name == BARE_NAME


def _load(
    place: Path, file: Path, path: str, architecture: str | None, architecture_args: dict[str, Any] | None
) -> LoadedModel:
    """Read a checkpoint, from one file or from those its index names."""
    try:
        tensors = _sharded(file, path) if file.name in INDEXES else read_state_dict(file, path)
        config = read_config(file.parent / CONFIG, path) if (file.parent / CONFIG).is_file() else None
    except ZooError:
        if not place.is_dir():
            raise SourceError(f"{place} is gone: is its disk still there? The same command continues later") from None
        raise
    return to_timm(tensors, name=path, architecture=architecture, architecture_args=architecture_args, config=config)


def read_config(file: Path, name: str) -> dict[str, Any]:
    """The config.json beside a checkpoint.

    Args:
        file: the config.json.
        name: of the checkpoint, for messages.

    Raises:
        ZooError: if it is damaged.
    """
    return _json_object(file, f"{file.name} of {name}")


def _json_object(file: Path, what: str) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ZooError(f"{what} has {file.stat().st_size} bytes: it is no description of a model")
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ZooError(f"{what} cannot be read ({one_line(error)})") from None
    if not isinstance(held, dict):
        raise ZooError(f"{what} is damaged: expected a JSON object")
    return held


def _weight_map(index: Path, name: str) -> dict[str, str]:
    """Tensor -> file of a model in several files, all of them beside the index.

    Raises:
        ZooError: if the index is damaged, or names a file elsewhere.
    """
    listed = _json_object(index, f"{index.name} of {name}").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ZooError(f"{index.name} of {name} is damaged: it has no weight_map")
    for file in listed.values():
        if not isinstance(file, str) or not _is_checkpoint(file) or PurePosixPath(file).name != file:
            raise ZooError(f"{index.name} of {name} names {file!r}, which is no checkpoint file beside it")
    return listed


def _shard_files(index: Path, name: str) -> Iterator[Path]:
    for file in dict.fromkeys(_weight_map(index, name).values()):
        shard = index.parent / file
        if not shard.is_file():
            raise ZooError(f"{name} lacks {file}, which {index.name} names")
        if shard.is_symlink():
            raise ZooError(f"{file} of {name} is a link: copy what it means")
        yield shard


def _sharded_size(index: Path) -> int:
    try:
        return sum(shard.stat().st_size for shard in _shard_files(index, index.name))
    except ZooError:
        return index.stat().st_size


def _sharded(index: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a model in several files, each from the file that the index says.

    Raises:
        ZooError: if a file is missing or damaged, or has other tensors than the index says.
    """
    listed = _weight_map(index, name)
    tensors: dict[str, Tensor] = {}
    for shard in _shard_files(index, name):
        held = read_state_dict(shard, f"{shard.name} of {name}")
        expected = {tensor for tensor, file in listed.items() if file == shard.name}
        if held.keys() != expected:
            odd = sorted(held.keys() ^ expected)[0]
            raise ZooError(f"{shard.name} of {name} does not have the tensors that {index.name} says: {odd} differs")
        tensors |= held
    return tensors
