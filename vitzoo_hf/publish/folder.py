"""A zoo as a folder: weight shards, light tables, card, manifest; written whole or not at all.

`write_shard` writes one file of weights and says what its manifest entry is; `write_zoo` writes all of them from
rows, in a temporary folder that takes its place at the end; `write_config` adds tables to a finished zoo.
"""

import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import read_json, write_json
from vitzoo_hf.format.encoding import ITEM_BYTES, encoding_of
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.shards import ROW_GROUP_BYTES, write_parquet
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.publish.card import card_text

SHARD_BYTES = 500_000_000


@dataclass(frozen=True)
class Rows:
    """Rows still to be read: how many there are, and the parameters of the largest."""

    count: int
    largest: int
    rows: Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Storage:
    """How the weights of a whole zoo are stored; every shard of a config has the same columns.

    Attributes:
        dtype: `float32`, `float16` or `bfloat16`.
        largest: parameters of the largest row.
    """

    dtype: str
    largest: int

    @property
    def encoding(self) -> str:
        """`list` or `binary`."""
        return encoding_of(self.largest, self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of the largest row's weights."""
        return self.largest * ITEM_BYTES[self.dtype]

    @property
    def group_rows(self) -> int:
        """Rows a row group; a large model has one of its own."""
        return max(1, ROW_GROUP_BYTES // self.row_bytes) if self.largest <= schema.LIST_LIMIT else 1

    @property
    def gap(self) -> int:
        """Bytes between two rows of a row group: Parquet writes a length before each value of bytes."""
        return 0 if self.encoding == "list" else 4

    @property
    def shard_rows(self) -> int:
        """Rows a file of about `SHARD_BYTES`."""
        return max(1, SHARD_BYTES // self.row_bytes // self.group_rows) * self.group_rows


@dataclass(frozen=True)
class Shard:
    """A written file of weights: its entry in `shards.json`, the light columns of its rows, their layouts."""

    entry: dict[str, Any]
    light: list[dict[str, Any]]
    layouts: dict[str, Layout]


def write_zoo(
    folder: Path,
    manifest: Mapping[str, Any],
    splits: Mapping[str, Rows],
    probes: Mapping[str, list[dict[str, Any]]],
    blueprint_text: str,
    *,
    dtype: str = "float32",
    progress: bool = False,
) -> None:
    """Write a zoo from rows, in a temporary folder that replaces `folder` at the end.

    Args:
        folder: the zoo.
        manifest: what `zoo.json` says besides the files.
        splits: split -> its rows, with weights as they are stored (see `encoding.rounded`) and in their final order.
        probes: role -> rows of held-out images.
        blueprint_text: what the zoo was made from.
        dtype: that the rows' weights are stored as.
        progress: show a bar.

    Raises:
        ZooError: if the folder cannot be written, or what stands there is not a zoo.
    """
    refuse_to_replace(folder)
    storage = Storage(dtype, max(part.largest for part in splits.values()))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-", suffix=".tmp"))
    except OSError as error:
        raise ZooError(f"cannot write into {folder.parent}: {error.strerror}") from None
    try:
        temporary.chmod(0o755)
        shards: dict[str, Shard] = {}
        with progress_bar("packing", "row", shown=progress, total=sum(part.count for part in splits.values())) as bar:
            for split, part in splits.items():
                shards |= _write_split(temporary, split, part, manifest["factors"], storage, bar)
        assemble(temporary, manifest, shards, probes, blueprint_text)
        swap(temporary, folder)
    except OSError as error:
        raise ZooError(f"cannot write the zoo {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def assemble(
    folder: Path,
    manifest: Mapping[str, Any],
    shards: Mapping[str, Shard],
    probes: Mapping[str, list[dict[str, Any]]],
    blueprint_text: str,
) -> None:
    """Write everything of a zoo but its weight shards, which are in `folder` already.

    Args:
        folder: the zoo.
        manifest: what `zoo.json` says besides the files.
        shards: path in the folder -> what `write_shard` returned, in the order of the rows.
        probes: role -> rows of held-out images.
        blueprint_text: what the zoo was made from.
    """
    features = schema.row_features(manifest["factors"], weights=None)
    light: dict[str, list[dict[str, Any]]] = {}
    layouts: dict[str, Layout] = {}
    for name, shard in shards.items():
        light.setdefault(_split_of(name), []).extend(shard.light)
        layouts |= shard.layouts
    for split, rows in light.items():
        write_parquet(_only_shard(folder, "index", split), features, [rows], {})
    for role, rows in probes.items():
        if rows:
            write_parquet(_only_shard(folder, "probes", role), schema.probe_features(), [rows], {})
    write_json(folder / schema.LAYOUTS, {key: layout.to_json() for key, layout in layouts.items()})
    write_json(folder / schema.SHARDS, {name: shard.entry for name, shard in shards.items()}, indent=None)
    (folder / "blueprint.yaml").write_text(blueprint_text, encoding="utf-8")
    _finish(folder, dict(manifest))


def write_shard(
    file: Path, rows: Iterator[dict[str, Any]], count: int, factors: Mapping[str, str], storage: Storage
) -> Shard:
    """Write the next `count` rows as one file of weights.

    Args:
        file: the Parquet file.
        rows: rows with weights as float32 `[D]`, or fewer than `count` of them.
        count: rows to take at most.
        factors: generating factor -> type.
        storage: of the whole zoo.
    """
    light: list[dict[str, Any]] = []
    layouts: dict[str, Layout] = {}
    features = schema.row_features(factors, weights=storage.encoding)
    groups = _remember(_groups(itertools.islice(rows, count), storage.group_rows), light, layouts)
    ends = write_parquet(file, features, groups, layouts)
    entry = {"rows": len(light), **_file_entry(file), "gap": storage.gap, "groups": [list(pair) for pair in ends]}
    return Shard(entry, light, layouts)


def shard_name(split: str, number: int, shards: int) -> str:
    """Path of a weight shard within the zoo's folder."""
    return f"weights/{split}-{number:05d}-of-{shards:05d}.parquet"


def _split_of(name: str) -> str:
    return name.split("/")[1].split("-")[0]


def refuse_to_replace(folder: Path) -> None:
    """Never delete what is not a zoo."""
    if (
        folder.exists()
        and not (folder / schema.MANIFEST).is_file()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise ZooError(f"{folder} exists and is not a zoo: choose another folder, or remove it yourself")


def _only_shard(folder: Path, config: str, split: str) -> Path:
    return folder / config / f"{split}-00000-of-00001.parquet"


def _write_split(
    folder: Path, split: str, part: Rows, factors: Mapping[str, str], storage: Storage, bar: Any
) -> dict[str, Shard]:
    shards = -(-part.count // storage.shard_rows)
    rows = _counted(part.rows, bar)
    names = [shard_name(split, number, shards) for number in range(shards)]
    return {name: write_shard(folder / name, rows, storage.shard_rows, factors, storage) for name in names}


def _counted(rows: Iterator[dict[str, Any]], bar: Any) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield row
        bar.update(1)


def _remember(
    groups: Iterable[list[dict[str, Any]]], light: list[dict[str, Any]], layouts: dict[str, Layout]
) -> Iterator[list[dict[str, Any]]]:
    """Pass groups on, keeping their light columns and noting their layouts."""
    for group in groups:
        for row in group:
            layouts.setdefault(row["layout"], Architecture.of(row).layout)
            light.append({name: value for name, value in row.items() if name != "weights"})
        yield group


def _groups(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while group := list(itertools.islice(rows, size)):
        yield group


def write_config(folder: Path, config: str, tables: Mapping[str, list[dict[str, Any]]], features: Any) -> None:
    """Add or replace a config of a finished zoo: one file a split, then the manifest and the card's header.

    While the files are exchanged the manifest does not list them: a zoo whose process was killed then opens without
    the config, which is to be written again.

    Raises:
        ZooError: if the folder cannot be written.
    """
    manifest = read_json(folder / schema.MANIFEST)
    try:
        _sweep(folder / config)
        fresh = Path(tempfile.mkdtemp(dir=folder, prefix=f".{config}-", suffix=".tmp"))
        try:
            fresh.chmod(0o755)
            for split, rows in tables.items():
                write_parquet(_only_shard(fresh.parent, fresh.name, split), features, [rows], {})
            kept = {name: entry for name, entry in manifest["files"].items() if not name.startswith(f"{config}/")}
            write_json(folder / schema.MANIFEST, manifest | {"files": kept})
            swap(fresh, folder / config)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        _finish(folder, manifest)
    except OSError as error:
        raise ZooError(f"cannot write into {folder}: {error.strerror or error}") from None


def _sweep(place: Path) -> None:
    """Remove what a killed process left beside `place`."""
    for stale in place.parent.glob(f".{place.name}-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def swap(fresh: Path, place: Path) -> None:
    """Put `fresh` where `place` is, which is removed."""
    old = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-old-", suffix=".tmp"))
    try:
        if place.exists():
            place.replace(old / "it")
        fresh.replace(place)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the card, then the manifest: size and hash of every file but weight shards and the card."""
    files = sorted(file for file in folder.glob("*/*.parquet") if not file.parent.name.startswith("."))
    (folder / "README.md").write_text(card_text(folder, manifest), encoding="utf-8")
    listed = [file for file in files if file.parent.name != "weights" or not (folder / schema.SHARDS).is_file()]
    listed += [folder / name for name in (schema.LAYOUTS, schema.SHARDS, "blueprint.yaml")]
    manifest["files"] = {file.relative_to(folder).as_posix(): _file_entry(file) for file in listed if file.is_file()}
    write_json(folder / schema.MANIFEST, manifest)


def _file_entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
