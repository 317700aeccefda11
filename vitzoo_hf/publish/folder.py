"""Write a zoo as a folder of weight shards, light tables, card and manifest, whole or not at all.

`write_shard` writes one file of weights; `write_zoo` writes a zoo from rows in a temporary folder, which is renamed
at the end; `write_config` adds tables to a finished zoo. Every written byte is read once more, for the hashes.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import json_text, write_json
from vitzoo_hf.format.encoding import ITEM_BYTES, encoding_of
from vitzoo_hf.format.gate.card import with_root_hash
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.manifest import Manifest, open_files, open_zoo
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.shards import ROW_GROUP_BYTES, write_parquet
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.publish.card import card_text
from vitzoo_hf.publish.place import fresh_folder, held, swap

if TYPE_CHECKING:
    import datasets

# in bytes of weights, before compression
SHARD_BYTES, MOST_SHARD_BYTES = 500_000_000, 10_000_000_000
MOST_SHARDS = 150
"""Files of weights that a zoo grows to before its files grow, as the Hub advises against many: a terabyte has files
of 7 GB, of which single rows are read as ranges."""


@dataclass(frozen=True)
class Rows:
    """Rows that are still to be read.

    Attributes:
        count: number of rows.
        largest: number of parameters of the largest row.
        rows: the rows with their weights, read one at a time while they are written.
    """

    count: int
    largest: int
    rows: Iterator[Mapping[str, object]]


@dataclass(frozen=True)
class Storage:
    """How the weights of a whole zoo are stored; every shard of a config has the same columns.

    Attributes:
        dtype: `float32`, `float16` or `bfloat16`.
        largest: number of parameters of the largest row.
        count: number of rows.
    """

    dtype: str
    largest: int
    count: int = 0

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
        """Number of rows in a row group; a large model has a row group of its own."""
        return max(1, ROW_GROUP_BYTES // self.row_bytes) if self.largest <= schema.LIST_LIMIT else 1

    @property
    def gap(self) -> int:
        """Bytes between the weights of two rows in a row group."""
        # Parquet writes a length of four bytes before each binary value
        return 0 if self.encoding == "list" else 4

    @property
    def shard_rows(self) -> int:
        """Number of rows in a file of weights: about 0.5 GB, and more in zoos above 75 GB."""
        size = min(max(SHARD_BYTES, self.count * self.row_bytes // MOST_SHARDS), MOST_SHARD_BYTES)
        # whole row groups, so that only the last group of a split is short
        return max(1, size // self.row_bytes // self.group_rows) * self.group_rows


@dataclass(frozen=True)
class Shard:
    """A written file of weights.

    Attributes:
        entry: what `shards.json` says of the file.
        light: the columns of its rows, without weights.
        layouts: fingerprint -> layout of the rows' weights.
    """

    entry: dict[str, object]
    light: list[dict[str, object]]
    layouts: dict[str, Layout]


def write_zoo(
    folder: Path,
    manifest: Manifest,
    splits: Mapping[str, Rows],
    probes: Mapping[str, Sequence[Mapping[str, object]]],
    blueprint_text: str,
    *,
    dtype: str = "float32",
    progress: bool = False,
) -> None:
    """Write a zoo from rows, in a temporary folder that replaces `folder` at the end.

    Args:
        folder: the zoo.
        manifest: entries of `zoo.json` but for `files`.
        splits: split -> its rows in their final order, with weights rounded to `dtype` (see `encoding.rounded`).
        probes: role -> rows of held-out images.
        blueprint_text: the YAML that the zoo was made from.
        dtype: number format of the stored weights.
        progress: show a bar.

    Raises:
        ZooError: if the folder cannot be written, another process writes it, or what stands there is not a zoo.
    """
    refuse_to_replace(folder)
    count = sum(part.count for part in splits.values())
    storage = Storage(dtype, max(part.largest for part in splits.values()), count)
    try:
        with held(folder), fresh_folder(folder) as fresh:
            shards: dict[str, Shard] = {}
            with progress_bar("packing", "row", shown=progress, total=count) as bar:
                for split, part in splits.items():
                    # rounded up; file names carry the number of shards, which is needed before the first is written
                    num_shards = -(-part.count // storage.shard_rows)
                    for name in [shard_name(split, number, num_shards) for number in range(num_shards)]:
                        rows, most = part.rows, storage.shard_rows
                        shards[name] = write_shard(fresh / name, rows, most, manifest["factors"], storage, bar)
            assemble(fresh, manifest, shards, probes, blueprint_text)
            swap(fresh, folder)
    except OSError as error:
        raise ZooError(f"cannot write the zoo {folder}: {error.strerror or error}") from None


def assemble(
    folder: Path,
    manifest: Manifest,
    shards: Mapping[str, Shard],
    probes: Mapping[str, Sequence[Mapping[str, object]]],
    blueprint_text: str,
) -> None:
    """Write every file of a zoo but its weight shards, which are in `folder` already.

    Args:
        folder: the zoo.
        manifest: entries of `zoo.json` but for `files`.
        shards: path in the folder -> result of `write_shard`, in the order of the rows.
        probes: role -> rows of held-out images.
        blueprint_text: the YAML that the zoo was made from.
    """
    features = schema.row_features(manifest["factors"], weights=None)
    light: dict[str, list[dict[str, object]]] = {}
    layouts: dict[str, Layout] = {}
    for name, shard in shards.items():
        light.setdefault(_split_of(name), []).extend(shard.light)
        layouts |= shard.layouts
    for split, rows in light.items():
        write_parquet(_only_shard(folder, "index", split), features, [rows], {})
    for role, images in probes.items():
        if images:
            write_parquet(_only_shard(folder, "probes", role), schema.probe_features(), [images], {})
    write_json(folder / schema.LAYOUTS, {key: layout.to_json() for key, layout in layouts.items()})
    write_json(folder / schema.SHARDS, {name: shard.entry for name, shard in shards.items()}, indent=None)
    (folder / "blueprint.yaml").write_text(blueprint_text, encoding="utf-8")
    _finish(folder, dict(manifest))


def write_shard(
    file: Path,
    rows: Iterator[Mapping[str, object]],
    count: int,
    factors: Mapping[str, str],
    storage: Storage,
    bar: tqdm | None = None,
) -> Shard:
    """Write the next `count` rows as one file of weights.

    Args:
        file: the Parquet file.
        rows: rows with weights as float32 `[D]`; there may be fewer than `count`.
        count: largest number of rows in the file.
        factors: generating factor -> type.
        storage: how the whole zoo stores its weights.
        bar: advances by every row.
    """
    light: list[dict[str, object]] = []
    layouts: dict[str, Layout] = {}
    features = schema.row_features(factors, weights=storage.encoding)
    groups = _row_groups(itertools.islice(rows, count), storage.group_rows, light, layouts, bar)
    ends = write_parquet(file, features, groups, layouts)
    entry: dict[str, object] = {
        "rows": len(light),
        **_file_entry(file),
        "gap": storage.gap,
        "groups": [list(pair) for pair in ends],
    }
    return Shard(entry, light, layouts)


def shard_name(split: str, number: int, shards: int) -> str:
    """Path of a weight shard within the zoo's folder."""
    return f"weights/{split}-{number:05d}-of-{shards:05d}.parquet"


def _split_of(name: str) -> str:
    return name.split("/")[1].split("-")[0]


def refuse_to_replace(folder: Path) -> None:
    """Refuse a folder that holds anything but a zoo, since writing a zoo there would delete it.

    Raises:
        ZooError: if the folder exists, is not empty, and is not a zoo.
    """
    if (
        folder.exists()
        and not (folder / schema.MANIFEST).is_file()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise ZooError(f"{folder} exists and is not a zoo: choose another folder, or remove it yourself")


def _only_shard(folder: Path, config: str, split: str) -> Path:
    return folder / config / f"{split}-00000-of-00001.parquet"


def _row_groups(
    rows: Iterator[Mapping[str, object]],
    size: int,
    light: list[dict[str, object]],
    layouts: dict[str, Layout],
    bar: tqdm | None,
) -> Iterator[list[Mapping[str, object]]]:
    """Yield row groups of `size` rows; add their light columns to `light` and their layouts to `layouts`."""
    while group := list(itertools.islice(rows, size)):
        for row in group:
            layouts.setdefault(str(row["layout"]), Architecture.of(row).layout)
            # without weights: the light rows of a whole zoo stay in memory until the index is written
            light.append({name: value for name, value in row.items() if name != "weights"})
        yield group
        if bar is not None:
            bar.update(len(group))


def write_config(
    folder: Path,
    config: str,
    tables: Mapping[str, Sequence[Mapping[str, object]]],
    features: "datasets.Features",
    *,
    measured: Mapping[str, object] | None = None,
) -> None:
    """Add or replace a config of a finished zoo: one file a split, then the manifest and the card's header.

    While the files are exchanged the manifest does not list them: after a process was killed here, the zoo opens
    without the config, and the config can be written again.

    Args:
        folder: the zoo.
        config: name of the config.
        tables: split -> rows.
        features: column types of the rows.
        measured: how the rows were measured, for `measured` of the manifest; None for float32.

    Raises:
        ZooError: if the folder cannot be written, or another process writes this zoo.
    """
    open_files(folder, None)  # what is no folder is refused, not made
    with held(folder):
        # its index is not read: rows stay as they are
        manifest = dict(open_zoo(folder).manifest)
        about = {name: entry for name, entry in manifest.pop("measured", {}).items() if name != config}
        about |= {config: measured} if measured is not None else {}
        manifest |= {"measured": about} if about else {}
        try:
            with fresh_folder(folder / config) as fresh:
                for split, rows in tables.items():
                    write_parquet(_only_shard(fresh.parent, fresh.name, split), features, [rows], {})
                unchanged = {
                    name: entry for name, entry in manifest["files"].items() if not name.startswith(f"{config}/")
                }
                # before the exchange: a manifest never lists files that may be half gone
                _write_unchanged(folder, manifest | {"files": unchanged})
                swap(fresh, folder / config)
            _finish(folder, manifest)
        except OSError as error:
            raise ZooError(f"cannot write into {folder}: {error.strerror or error}") from None


def _finish(folder: Path, manifest: dict[str, object]) -> None:
    """Write the card, then the manifest with size and hash of every file but weight shards and the card.

    The card's header has the hash of the manifest, which comes last: without it a folder does not open as a zoo.
    """
    files = sorted(file for file in folder.glob("*/*.parquet") if not file.parent.name.startswith("."))
    # hashes of shards stand in `shards.json`, and the card may be edited by hand
    listed = [file for file in files if file.parent.name != "weights" or not (folder / schema.SHARDS).is_file()]
    listed += [folder / name for name in (schema.LAYOUTS, schema.SHARDS, "blueprint.yaml")]
    manifest["files"] = {file.relative_to(folder).as_posix(): _file_entry(file) for file in listed if file.is_file()}
    card = card_text(folder, manifest, root=hashlib.sha256(json_text(manifest).encode()).hexdigest())
    (folder / schema.CARD).write_text(card, encoding="utf-8")
    write_json(folder / schema.MANIFEST, manifest)


def _write_unchanged(folder: Path, manifest: Mapping[str, object]) -> None:
    """Write a manifest beside a card that stays as it is but for the manifest's hash in its header."""
    card = folder / schema.CARD
    if card.is_file():
        root = hashlib.sha256(json_text(manifest).encode()).hexdigest()
        card.write_text(with_root_hash(card.read_text(encoding="utf-8"), root), encoding="utf-8")
    write_json(folder / schema.MANIFEST, manifest)


def _file_entry(file: Path) -> dict[str, int | str]:
    with file.open("rb") as opened:
        # streamed: a shard is not read into memory at once
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
