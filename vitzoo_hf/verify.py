"""Hash every file of a zoo again, in a folder or on the Hub, and name what is damaged, down to the row."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitzoo_hf import schema
from vitzoo_hf.encoding import vector_of
from vitzoo_hf.hub_files import FolderFiles, HubFiles
from vitzoo_hf.locate import open_files, read_layouts, read_manifest, read_shards
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.schema import ZooError

CHUNK_BYTES = 16_000_000


@dataclass
class Verification:
    """What was compared.

    Attributes:
        files: number of files hashed.
        size: bytes hashed.
        damaged: file -> what is wrong with it.
        rows: damaged file of weights -> the models in it that are lost; the others can still be read. All of them
            where it is no longer readable as Parquet, if the index says which they are.
    """

    files: int = 0
    size: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged


def verify(path: str | Path, *, revision: str | None = None, progress: bool = True) -> Verification:
    """Compare every file of a zoo with the hash in its manifest.

    Of a dataset on the Hub every file is read in ranges, a damaged one a second time, and no weights are kept.

    Args:
        path: a folder, or a dataset id.
        revision: branch, tag or commit of a dataset.
        progress: show a bar.

    Raises:
        ZooError: if there is no zoo, or its manifest or its list of shards cannot be read.
    """
    files = open_files(path, revision)
    manifest = read_manifest(files.path(schema.MANIFEST))
    shards = read_shards(files, manifest)
    listed = manifest["files"] | shards
    found = Verification()
    with progress_bar(
        "verifying", "B", shown=progress, total=sum(entry["bytes"] for entry in listed.values())
    ) as bar:
        for name, entry in listed.items():
            reason = _damage(files, name, entry, bar)
            found.files += 1
            found.size += entry["bytes"]
            if reason is not None:
                found.damaged[name] = reason
    for name in (damaged for damaged in found.damaged if damaged in shards):
        lost = _lost_rows(files, name, listed[name]["bytes"])
        found.rows[name] = _indexed_rows(files, manifest, shards, name) if lost is None else lost
    if schema.LAYOUTS not in found.damaged:
        read_layouts(files.path(schema.LAYOUTS))
    return found


def _damage(files: FolderFiles | HubFiles, name: str, entry: Mapping[str, Any], bar: Any) -> str | None:
    """What is wrong with a file, or None."""
    if not files.exists(name):
        return "missing"
    local = files.local(name)
    if local is not None and local.stat().st_size != entry["bytes"]:
        return f"{local.stat().st_size} bytes, not {entry['bytes']}"
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, entry["bytes"]))))
    for start in range(0, entry["bytes"], CHUNK_BYTES):
        part = buffer[: min(CHUNK_BYTES, entry["bytes"] - start)]
        try:
            files.read_into(name, start, part)
        except ZooError as error:
            return str(error)
        digest.update(part)
        bar.update(len(part))
    return None if digest.hexdigest() == entry["sha256"] else "its content does not match its hash"


class _Ranges(io.RawIOBase):
    """A file of a zoo for pyarrow, which asks for a few ranges of it."""

    def __init__(self, files: FolderFiles | HubFiles, name: str, size: int) -> None:
        self.files, self.name, self.size, self.position = files, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, out: Any) -> int:
        part = memoryview(out).cast("B")[: max(0, self.size - self.position)]
        self.files.read_into(self.name, self.position, part)
        self.position += len(part)
        return len(part)


def _lost_rows(files: FolderFiles | HubFiles, name: str, size: int) -> list[str] | None:
    """The models of a damaged shard that do not match their own hash; None if it is not readable as Parquet."""
    try:
        checked = pq.ParquetFile(_Ranges(files, name, size), page_checksum_verification=True)
        light = checked.read(columns=["model_id", "num_parameters", "dtype", "weights_sha256"]).to_pylist()
        opened = pq.ParquetFile(_Ranges(files, name, size))
        groups = range(opened.num_row_groups)
        counts = [opened.metadata.row_group(group).num_rows for group in groups]
    except (OSError, pa.ArrowException, ZooError):
        return None
    lost = []
    start = 0
    for group, count in zip(groups, counts, strict=True):
        rows = light[start : start + count]
        start += count
        try:
            weights = opened.read_row_group(group, columns=["weights"])["weights"].combine_chunks()
            weights.validate(full=False)
        except (OSError, pa.ArrowException, ZooError):
            lost += [row["model_id"] for row in rows]
            continue
        lost += [row["model_id"] for number, row in enumerate(rows) if not _matches(weights.slice(number, 1), row)]
    return lost


def _indexed_rows(
    files: FolderFiles | HubFiles, manifest: Mapping[str, Any], shards: Mapping[str, Mapping[str, Any]], name: str
) -> list[str]:
    """The models of a shard as index and list of shards tell them; none where either does not."""
    split = name.split("/")[1].split("-")[0]
    members = [shard for shard in shards if shard.startswith(f"weights/{split}-")]
    before = [shards[shard].get("rows", 0) for shard in members[: members.index(name)]]
    try:
        tables = [
            pq.read_table(files.path(file), columns=["model_id"])
            for file in sorted(manifest["files"])
            if file.startswith(f"index/{split}-")
        ]
    except (OSError, pa.ArrowException, ZooError):
        return []
    ids = pa.concat_tables(tables)["model_id"].to_pylist() if tables else []
    return ids[sum(before) : sum(before) + shards[name].get("rows", 0)]


def _matches(weights: pa.Array, row: Mapping[str, Any]) -> bool:
    try:
        vector = vector_of(weights, name="", num_parameters=row["num_parameters"], dtype=row["dtype"])
    except ZooError:
        return False
    return schema.weights_sha256(vector) == row["weights_sha256"]
