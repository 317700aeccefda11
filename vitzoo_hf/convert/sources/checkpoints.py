"""Plan the conversion of checkpoint files and model folders on this machine, with or without a factor table.

A model folder is the output of `save_pretrained`: config.json beside the weights, which may be in several files.
Checkpoints are loaded during the conversion; links that leave the folder are refused, hidden files are ignored.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

from torch import Tensor

from vitzoo_hf.convert.factor_table import Line, Table, read_table
from vitzoo_hf.convert.names import to_timm
from vitzoo_hf.convert.pickles import read_state_dict
from vitzoo_hf.convert.rows import Found, LoadedModel, SourceError, SourcePlan, planned_rows
from vitzoo_hf.convert.sources.places import NOT_SHOWN, is_shown
from vitzoo_hf.format.messages import one_line
from vitzoo_hf.format.schema import ZooError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
BARE_NAME = "checkpoints"
TABLE = "factors.csv"
CONFIG = "config.json"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MODEL_FILES = ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1])
"""Weights of a model folder; the first that exists is used."""

BESIDE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "training_args.bin", "rng_state.pth")
"""Files that trainers write beside a model's weights."""

LINK = "it is a link that leaves the folder, or leads nowhere: copy what it means"
# deep enough for run/epoch/model; a mistaken home folder ends soon
MAX_LEVELS = 3
# a config of a ViT has a few kilobytes
MAX_CONFIG_BYTES = 10_000_000
SMALLEST = 1000
"""Bytes below which the size of a file does not estimate its parameters."""


def plan_checkpoints(
    source: Path,
    *,
    table: Path | None = None,
    architecture: str | None = None,
    architecture_args: Mapping[str, object] | None = None,
    name: str | None = None,
) -> SourcePlan:
    """Plan a checkpoint file, a model folder, or a folder of both, up to three levels deep.

    Args:
        source: the file or folder.
        table: CSV with run, epoch and factors of each checkpoint; by default `factors.csv` of the folder, if it
            exists. Without a table, run and epoch follow from the paths.
        architecture: timm name, where no config.json and no column names it.
        architecture_args: arguments of `timm.create_model` that do not follow from the shapes.
        name: name of the zoo; by default the name of the file or folder.

    Raises:
        ZooError: if there is no such file or folder, it is no checkpoint, or the table has a mistake in its header.
    """
    place = source.resolve() if source.is_dir() else source.absolute()
    label = place.stem if place.is_file() else place.name or "checkpoints"
    folder = _folder_of(place, source)
    if place.is_dir() and table is None and (place / TABLE).is_file():
        table = place / TABLE
        # a table that leaves the folder would read a file elsewhere without being named
        if TABLE in folder.refused:
            raise ZooError(f"{table} is a link that leaves the folder: give the table itself")
    factors = None if table is None else folder.matched(read_table(table, "file"))
    planned = planned_rows(
        folder.checkpoints(), factors, architecture=architecture, architecture_args=architecture_args, fallback=label
    )
    return SourcePlan(
        name=name or label,
        rows=planned.rows,
        factor_types={} if factors is None else factors.factor_types,
        refused=planned.refused | folder.refused,
        notes=planned.notes + ([] if factors is None else factors.notes),
    )


def _folder_of(place: Path, source: Path) -> "_Folder":
    """Search a folder for checkpoints, or wrap a single file."""
    if place.is_dir():
        folder = _Folder(place)
        folder.search()
        if not folder.models and not folder.refused:
            suffixes = ", ".join(SUFFIXES)
            raise ZooError(f"{source} has no checkpoint ({suffixes} or {BARE_NAME}) in {MAX_LEVELS} levels")
        return folder
    if not place.is_file():
        raise ZooError(f"{source} is neither a file nor a folder: give checkpoints, or a folder of them")
    if not _is_checkpoint(place.name):
        raise ZooError(f"{source} is no checkpoint by its name: known are {', '.join(SUFFIXES)} and {BARE_NAME}")
    folder = _Folder(place.parent)
    folder.take(place)
    return folder


@dataclass(frozen=True)
class _Model:
    """The file of a checkpoint's weights, or their index, and the config.json beside it."""

    weights: Path
    config: Path | None


@dataclass
class _Folder:
    """Checkpoints below a folder, and refused paths with their reasons, by path in the folder."""

    place: Path
    models: dict[str, _Model] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def search(self) -> None:
        """Find every checkpoint and model folder."""
        self._search(self.place, 1)

    def take(self, file: Path) -> None:
        """Add one file, which the user named, with the config.json beside it."""
        config = file.parent / CONFIG
        self.models[self.path(file)] = _Model(file, config if config.is_file() else None)

    def _search(self, folder: Path, level: int) -> None:
        try:
            entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            if folder == self.place:
                raise ZooError(f"{folder} cannot be read: {error.strerror}") from None
            self.refused[self.path(folder)] = f"it cannot be read: {error.strerror}"
            return
        self.refused |= {ascii(self.path(entry)): NOT_SHOWN for entry in entries if not is_shown(entry.name)}
        entries = [entry for entry in entries if is_shown(entry.name)]
        leaving = {entry.name for entry in entries if self._leaves(entry)}
        # links are judged before anything is opened: a source must not name files elsewhere on this machine
        self.refused |= {self.path(folder / name): LINK for name in leaving if self._matters(folder / name)}
        files = {entry.name: entry for entry in entries if entry.name not in leaving and entry.is_file()}
        self._take_all(folder, files, config_leaves=CONFIG in leaving)
        for entry in entries:
            if entry.name in leaving or not entry.is_dir():
                continue
            # a link to a folder could lead into a circle, or list its checkpoints twice
            if entry.is_symlink():
                self.refused[self.path(entry)] = "it is a link to a folder: put the folder itself there"
            elif level == MAX_LEVELS:
                self.refused[self.path(entry)] = f"it is below {MAX_LEVELS} levels: give a folder nearer to it"
            else:
                self._search(entry, level + 1)

    def _leaves(self, entry: Path) -> bool:
        """Return whether an entry is a link that leads out of the folder, or nowhere."""
        if not entry.is_symlink():
            return False
        # realpath, not resolve: it gives an answer for links in a circle too
        target = Path(os.path.realpath(entry))
        return not (target.is_relative_to(os.path.realpath(self.place)) and target.exists())

    def _matters(self, entry: Path) -> bool:
        return _is_checkpoint(entry.name) or entry.is_dir() or entry.name in (CONFIG, TABLE, *INDEXES)

    def _take_all(self, folder: Path, files: Mapping[str, Path], *, config_leaves: bool) -> None:
        """Add the model of a model folder, and the checkpoints that do not belong to it."""
        config = files.get(CONFIG)
        weights = [name for name in MODEL_FILES if name in files] if config else []
        belonging = {*MODEL_FILES, *BESIDE} | {name for name in files if name.startswith("rng_state_")}
        for index in (name for name in weights if name in INDEXES):
            with contextlib.suppress(ZooError):  # reported when the model is loaded
                belonging |= set(_weight_map(files[index], index).values())
        if weights:
            # a folder that is itself a model has no name below itself
            path = weights[0] if folder == self.place else self.path(folder)
            self.models[path] = _Model(files[weights[0]], config)
        for name, file in files.items():
            if _is_checkpoint(name) and not (weights and name in belonging):
                self.models[self.path(file)] = _Model(file, config)
                self.refused |= {self.path(file): f"its {CONFIG} is a link that leaves"} if config_leaves else {}

    def path(self, entry: Path) -> str:
        """Return the path of an entry within the folder."""
        return entry.relative_to(self.place).as_posix()

    def checkpoints(self) -> list[Found]:
        """List the checkpoints that are not refused, to be loaded later."""
        checkpoints = []
        for path, model in self.models.items():
            if path in self.refused:
                continue
            size = _sharded_size(model.weights) if model.weights.name in INDEXES else model.weights.stat().st_size
            load = partial(_load, self.place, model, path)
            provenance = {"kind": "checkpoint", "bytes": size}
            checkpoints.append(Found(path, load, provenance, size if size >= SMALLEST else None))
        return checkpoints

    def matched(self, table: Table) -> Table:
        """Put the lines of a table under the paths of the checkpoints; refuse lines about anything else."""
        aliases = {path: path for path in self.models}
        # a table may name the weights of a model folder instead of the folder
        aliases |= {self.path(model.weights): path for path, model in self.models.items()}
        if len(self.models) == 1 and (self.place / CONFIG).is_file():
            aliases["."] = next(iter(self.models))
        refused = {aliases.get(str(PurePosixPath(cell)), cell): why for cell, why in table.refused.items()}
        lines: dict[str, Line] = {}
        for cell, line in table.lines.items():
            path = aliases.get(str(PurePosixPath(cell)), cell)
            if path not in self.models:
                refused[path] = f"{line.where}: {self._why_not(cell)}"
            elif path in lines:
                refused[path] = f"{line.where}: {path} is also in {lines[path].where}: keep one"
            lines[path] = line
        return replace(table, lines=lines, refused=refused)

    def _why_not(self, cell: str) -> str:
        path = PurePosixPath(cell)
        if path.is_absolute() or ".." in path.parts:
            return f"{cell!r} leaves the folder; paths are relative to it"
        if str(path) in self.refused:
            return self.refused[str(path)]
        if not (self.place / path).exists():
            return f"there is no file {cell!r} in {self.place.name}"
        return f"{cell!r} is no checkpoint by its name, is hidden, or belongs to a model folder"


def _is_checkpoint(name: str) -> bool:
    return name.endswith(SUFFIXES) or name == BARE_NAME


def _load(
    place: Path, model: _Model, path: str, architecture: str | None, architecture_args: Mapping[str, object] | None
) -> LoadedModel:
    """Read a checkpoint from one file, or from the files of its index."""
    file = model.weights
    try:
        tensors = _sharded(file, path) if file.name in INDEXES else read_state_dict(file, path)
        config = None if model.config is None else read_config(model.config, path)
    except ZooError:
        # a disk that was unplugged must not refuse all remaining checkpoints one by one
        if not place.is_dir():
            raise SourceError(f"{place} is gone: is its disk still there? The same command continues later") from None
        raise
    return to_timm(tensors, name=path, architecture=architecture, architecture_args=architecture_args, config=config)


def read_config(file: Path, name: str) -> dict[str, object]:
    """Read the config.json beside a checkpoint.

    Args:
        file: the config.json.
        name: name of the checkpoint in messages.

    Raises:
        ZooError: if it is damaged.
    """
    return _json_object(file, f"{file.name} of {name}")


def _json_object(file: Path, what: str) -> dict[str, object]:
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ZooError(f"{what} has {file.stat().st_size} bytes: it is no description of a model")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ZooError(f"{what} cannot be read ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ZooError(f"{what} is damaged: expected a JSON object")
    return content


def _weight_map(index: Path, name: str) -> dict[str, str]:
    """Read tensor -> file from the index of a model in several files, all beside the index.

    Raises:
        ZooError: if the index is damaged, or names a file elsewhere.
    """
    weight_map = _json_object(index, f"{index.name} of {name}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ZooError(f"{index.name} of {name} is damaged: it has no weight_map")
    for file in weight_map.values():
        # an index must not name files outside its folder
        if not isinstance(file, str) or not _is_checkpoint(file) or PurePosixPath(file).name != file:
            raise ZooError(f"{index.name} of {name} names {file!r}, which is no checkpoint file beside it")
    return weight_map


def _shard_files(index: Path, name: str) -> Iterator[Path]:
    # each file once, in the order of the index: many tensors share a file
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
    """Read all tensors of a model in several files, each from the file in the index.

    Raises:
        ZooError: if a file is missing or damaged, or its tensors are not those of the index.
    """
    weight_map = _weight_map(index, name)
    tensors: dict[str, Tensor] = {}
    for shard in _shard_files(index, name):
        part = read_state_dict(shard, f"{shard.name} of {name}")
        expected = {tensor for tensor, file in weight_map.items() if file == shard.name}
        # a tensor in two files would silently be that of the last one read
        if part.keys() != expected:
            odd = sorted(part.keys() ^ expected)[0]
            raise ZooError(f"{shard.name} of {name} does not have the tensors that {index.name} says: {odd} differs")
        tensors |= part
    return tensors
