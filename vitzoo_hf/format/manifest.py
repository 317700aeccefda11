"""Open a zoo: its manifest, shards, layouts and index, parsed once into one checked value.

The files of a zoo lie in a folder, or in a dataset on the Hub, read through its cache.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from vitzoo_hf.format import schema
from vitzoo_hf.format.files import FolderFiles, HubFiles
from vitzoo_hf.format.gate.card import ROOT_HASH, card_header
from vitzoo_hf.format.gate.index_columns import check_index
from vitzoo_hf.format.gate.paths import check_path
from vitzoo_hf.format.gate.values import Field, damaged, parse_json, shown
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.messages import REPAIR, one_line
from vitzoo_hf.format.schema import MissingFileError, ZooError
from vitzoo_hf.format.tables import LightTables

Manifest = Mapping[str, Any]
"""What `zoo.json` holds, checked by `parse_manifest`."""
FACTOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}", re.ASCII)
SHARD_NAME = re.compile(rf"weights/(?:{'|'.join(schema.SPLITS)})-\d{{5,9}}-of-\d{{5,9}}\.parquet", re.ASCII)
LARGEST_JSON = 256_000_000
LARGEST_CARD = 20_000_000


@dataclass(frozen=True)
class OpenedZoo:
    """A zoo whose manifest, shards and layouts were parsed and checked, once; readers and writers take it.

    Attributes:
        files: the files of the zoo.
        manifest: content of `zoo.json`.
        layouts: fingerprint -> layout.
        known_shards: what `shards` is, where it is known already.
        rows: the index, where it is no config of its own; for zoos without `zoo.json`.
    """

    files: FolderFiles | HubFiles
    manifest: Manifest
    layouts: Mapping[str, Layout]
    known_shards: Mapping[str, Mapping[str, Any]] | None = None
    rows: pa.Table | None = None

    @cached_property
    def shards(self) -> Mapping[str, Mapping[str, Any]]:
        """Path of a file of weights -> bytes, sha256 and, where known, rows, gap and row groups, in the rows' order.

        Raises:
            ZooError: if the list is damaged.
        """
        # only when it is asked for: of a terabyte on the Hub it is as large as the index
        return read_shards(self.files, self.manifest) if self.known_shards is None else self.known_shards

    @cached_property
    def tables(self) -> LightTables:
        """The reader of its light tables."""
        return LightTables(self.files, self.manifest)

    @cached_property
    def index(self) -> pa.Table:
        """The checked index of all splits, one behind the other, with a column `split`.

        Raises:
            ZooError: if there is none, or a column holds what no zoo holds.
        """
        table = (self.tables.index() if self.rows is None else self.rows).unify_dictionaries()
        check_index(table, self.manifest["factors"], self.layouts, f"the index of {self.files.name}")
        return table

    @property
    def listed(self) -> dict[str, Mapping[str, Any]]:
        """Path -> bytes and sha256 of every file of the zoo."""
        return {**self.manifest["files"], **self.shards}


def open_zoo(path: str | Path, revision: str | None = None) -> OpenedZoo:
    """Open a zoo: parse and check its manifest, shards and layouts, and compare sizes in a folder.

    Args:
        path: a folder, or a dataset id such as `ORG/NAME` or `ORG/NAME@REVISION`.
        revision: branch, tag or commit of a dataset on the Hub.

    Raises:
        ZooError: if there is no zoo, it has a newer format, or a file is missing, has the wrong length, or says what
            no zoo says.
    """
    files = open_files(path, revision)
    opened = OpenedZoo(files, read_manifest(files), read_layouts(files))
    if isinstance(files, FolderFiles):
        _check_sizes(files, opened.listed)
    return opened


def read_bytes(files: FolderFiles | HubFiles, name: str, most: int = LARGEST_JSON) -> bytes:
    """The content of a small file.

    Raises:
        ZooError: if it is missing, cannot be read, or is larger than `most` bytes.
    """
    try:
        file = files.path(name)
        if (size := file.stat().st_size) > most:
            raise ZooError(f"{name} of {files.name} has {size} bytes; expected at most {most}; {REPAIR}")
        return file.read_bytes()
    except OSError as error:
        raise ZooError(f"{name} of {files.name} cannot be read ({one_line(error)}); {REPAIR}") from None


def root_hash(files: FolderFiles | HubFiles) -> str | None:
    """The hash of `zoo.json` in the header of the card; None where there is no card, or no hash in it.

    Raises:
        ZooError: if the card's header cannot be read.
    """
    what = f"{files.name}/{schema.CARD}"
    if not files.exists(schema.CARD):
        return None
    header = Field(card_header(read_bytes(files, schema.CARD, LARGEST_CARD), what), what)
    return None if header.value.get(ROOT_HASH) is None else header.get(ROOT_HASH).sha256()


def read_manifest(files: FolderFiles | HubFiles) -> dict[str, Any]:
    """What `zoo.json` says, checked for what every reader needs.

    Raises:
        MissingFileError: if there is none.
        ZooError: if it is damaged, or of a newer format.
    """
    what = f"{files.name}/{schema.MANIFEST}"
    if isinstance(files, FolderFiles) and not files.exists(schema.MANIFEST):
        raise MissingFileError(f"{files.name} is not a zoo: it has no {schema.MANIFEST}; `vitzoo pack` writes zoos")
    return parse_manifest(read_bytes(files, schema.MANIFEST), what)


def parse_manifest(data: bytes, what: str) -> dict[str, Any]:
    """Parse `zoo.json` and check its fields.

    Args:
        data: content of the file.
        what: name of the file, for messages.

    Raises:
        ZooError: if it is damaged, or of a newer format.
    """
    parsed = parse_json(data, what)
    root = Field(parsed if isinstance(parsed, dict) else {}, what)
    for key in ("format", "name", "factors", "images", "files", "missing_runs"):
        root.get(key)
    # after the keys: a newer format promises to keep these, so its number can be read
    number = root.get("format").integer(1)
    if number > schema.FORMAT_VERSION:
        raise ZooError(
            f"{what} says format {number}, this version reads up to {schema.FORMAT_VERSION}:"
            " run `pip install -U vitzoo-hf`"
        )
    root.get("name").text()
    for name, field in root.get("factors").entries().items():
        if FACTOR_NAME.fullmatch(name) is None:
            raise damaged(what, f"`factors` has the name {shown(name)}, which no column can have")
        kinds = "|".join(schema.FACTOR_TYPES)
        field.text(re.compile(kinds), f"one of {', '.join(schema.FACTOR_TYPES)}")
    for name, field in root.get("files").entries().items():
        check_path(name, what)
        _check_entry(field)
    for field in root.get("images").entries().values():
        check_images(field)
    _check_descriptions(root)
    manifest: dict[str, Any] = root.value
    return {"blueprint_fingerprint": None} | manifest


def _check_entry(field: Field) -> None:
    """Check size and hash of a file."""
    if not isinstance(field.value, dict) or not {"bytes", "sha256"} <= field.value.keys():
        name = field.place.removeprefix("files.")
        raise ZooError(f"{field.file} is damaged: size or hash of {name} is not listed; {REPAIR}")
    field.get("bytes").integer(0)
    field.get("sha256").sha256()


def _check_descriptions(root: Field) -> None:
    """Check the entries that describe a zoo, each of which may be absent."""
    entries = root.entries()
    for key in ("missing_runs", "refused"):
        for field in entries[key].entries().values() if key in entries else ():
            field.text()
    for key in ("blueprint_fingerprint", "subset_of", "licence", "default_config"):
        if key in entries and entries[key].value is not None:
            entries[key].text()
    for field in entries["notes"].items() if entries.get("notes") and entries["notes"].value is not None else ():
        field.text()
    for key in ("splits", "measured"):
        if key in entries and entries[key].value is not None:
            entries[key].entries()
    if "measured" in entries:
        for field in entries["measured"].entries().values():
            field.entries()


def check_images(record: Field) -> None:
    """Check how images of a dataset are prepared: the statistics that probes are normalised by, sizes and names.

    Raises:
        ZooError: naming the first field that holds something else.
    """
    entries = record.entries()
    for key in ("mean", "std"):
        if key in entries:
            values = list(entries[key].items()) if isinstance(entries[key].value, list) else [entries[key]]
            channels = record.value.get("channels")
            if not values or (len(values) > 1 and type(channels) is int and len(values) != channels):
                raise entries[key].refused(f"a number, or one for each of {channels} channels")
            if key == "std" and any(value.number() <= 0 for value in values):
                raise entries[key].refused("numbers above 0")
            [value.number() for value in values]
    for key in ("size", "crop", "resize", "channels"):
        if key in entries and entries[key].value is not None:
            entries[key].integer(1, 1_000_000)
    for key in ("source", "licence", "interpolation"):
        if key in entries and entries[key].value is not None:
            entries[key].text()
    for field in entries["class_names"].items() if "class_names" in entries else ():
        field.text()


def read_layouts(files: FolderFiles | HubFiles) -> dict[str, Layout]:
    """Fingerprint -> layout, from `layouts.json`.

    Raises:
        ZooError: if it is damaged.
    """
    what = f"{files.name}/{schema.LAYOUTS}"
    return parse_layouts(read_bytes(files, schema.LAYOUTS), what)


def parse_layouts(data: bytes | str, what: str) -> dict[str, Layout]:
    """Parse layouts, and compare each with the fingerprint that it stands under.

    Args:
        data: JSON of fingerprint -> tensors.
        what: name of the file, for messages.

    Raises:
        ZooError: if it is damaged.
    """
    layouts = {}
    for key, field in Field(parse_json(data, what), what).entries().items():
        try:
            layout = Layout.from_json(field.value)
        except ZooError as error:
            raise damaged(what, f"`{field.place}`: {error}") from None
        # rows name layouts by fingerprint: a layout under a wrong key would give wrong tensors silently
        if layout.fingerprint != key:
            raise damaged(what, f"layout {field.place} has the fingerprint {layout.fingerprint}")
        layouts[key] = layout
    return layouts


def read_shards(files: FolderFiles | HubFiles, manifest: Manifest) -> dict[str, Mapping[str, Any]]:
    """Weight shards in the order of the index's rows: path -> bytes, sha256 and, where known, rows and row groups.

    Zoos written before `shards.json` list their shards in `zoo.json`, without rows and row groups.

    Raises:
        ZooError: if the list is damaged.
    """
    what, listed = f"{files.name}/{schema.MANIFEST}", manifest["files"]
    if schema.SHARDS in listed:
        what = f"{files.name}/{schema.SHARDS}"
        data = read_bytes(files, schema.SHARDS)
        # byte offsets come from this file: a damaged one would read plausible numbers from wrong places
        if hashlib.sha256(data).hexdigest() != listed[schema.SHARDS]["sha256"]:
            raise ZooError(f"{schema.SHARDS} of {files.name} does not match its hash: it is damaged; {REPAIR}")
        listed = parse_json(data, what)
    names = []
    for name, field in Field(listed, what).entries().items():
        check_path(name, what)
        if name.startswith("weights/"):
            if SHARD_NAME.fullmatch(name) is None:
                raise damaged(
                    what, f"it lists {shown(name)}; expected names like weights/train-00000-of-00001.parquet"
                )
            _check_entry(field)
            _check_groups(field)
            names.append(name)
    # rows of the index run split by split, and shards in the order of their numbers
    order = {f"weights/{split}": rank for rank, split in enumerate(schema.SPLITS)}
    return {name: listed[name] for name in sorted(names, key=lambda name: (order[name.split("-")[0]], name))}


def _check_groups(shard: Field) -> None:
    """Check rows, gap and row groups of a file of weights, which are bounded by its size."""
    entries, size = shard.entries(), shard.value["bytes"]
    if "gap" in entries:
        entries["gap"].integer(0, 4)
    # a row takes at least two bytes
    rows = entries["rows"].integer(0, size) if "rows" in entries else size
    if "groups" not in entries:
        return
    groups = entries["groups"].value
    if not isinstance(groups, list) or not all(
        type(pair) is list and len(pair) == 2 and type(pair[0]) is int and type(pair[1]) is int for pair in groups
    ):
        raise entries["groups"].refused("a list of pairs [rows, end]")
    if any(not (0 < count <= rows and 0 <= end <= size) for count, end in groups):
        raise entries["groups"].refused(f"pairs of at most {rows} rows, ending within {size} bytes")
    if (total := sum(count for count, _ in groups)) != entries.get("rows", Field(total, "")).value:
        raise entries["rows"].refused(f"{total}, the rows of its groups")


def _check_sizes(files: FolderFiles, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the length of every Parquet file of a folder with what the manifest says.

    Raises:
        ZooError: naming the first file that is missing or was cut.
    """
    for name, entry in listed.items():
        # lengths only: hashing a terabyte at each opening is `vitzoo verify`, not this
        if name.endswith(".parquet") and (size := files.path(name).stat().st_size) != entry["bytes"]:
            raise ZooError(f"{name} has {size} bytes, not {entry['bytes']}: it was cut; {REPAIR}")


def open_files(path: str | Path, revision: str | None) -> FolderFiles | HubFiles:
    """The files of a zoo.

    Raises:
        ZooError: if `path` is neither a zoo's folder nor looks like a dataset id; later, if a file cannot be fetched.
    """
    # `~` of a user without a home stays as it is, and is then no folder
    folder = Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises where there is no home
    if folder.is_dir():
        if revision is not None:
            raise ZooError(f"revision {revision!r} of a folder: only datasets on the Hub have revisions")
        return FolderFiles(folder)
    # pandas and fsspec write these prefixes; users paste them
    repository = str(path).removeprefix("hf://").removeprefix("datasets/")
    # branches may have slashes; names of datasets have no @
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", repository)
    if match is None:
        raise ZooError(
            f"no zoo at {str(path)!r}: neither a folder nor a dataset id like ORG/NAME or ORG/NAME@REVISION"
        )
    if match[2] is not None and revision is not None:
        raise ZooError(f"{str(path)!r} and revision {revision!r}: give the revision once")
    return HubFiles(match[1], match[2] or revision)
