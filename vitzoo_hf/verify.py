"""Hash every file of a zoo again, in a folder or on the Hub, and name what is damaged, down to the row."""

import hashlib
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
        rows: damaged file of weights -> the models in it that are lost; the others can still be read.
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

    Of a dataset on the Hub every file is read once, in ranges, and nothing is kept.

    Args:
        path: a folder, or a dataset id.
        revision: branch, tag or commit of a dataset.
        progress: show a bar.

    Raises:
        ZooError: if there is no zoo, or its manifest or its list of shards cannot be read.
    """
    files = open_files(path, revision)
    manifest = read_manifest(files.path(schema.MANIFEST))
    listed = manifest["files"] | read_shards(files, manifest)
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
                if name.startswith("weights/"):
                    found.rows[name] = _lost_rows(files, name)
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


def _lost_rows(files: FolderFiles | HubFiles, name: str) -> list[str]:
    """The models of a damaged shard that do not match their own hash, or all that can be named."""
    try:
        opened = pq.ParquetFile(files.path(name), page_checksum_verification=True)
        light = opened.read(columns=["model_id", "num_parameters", "dtype", "weights_sha256"]).to_pylist()
        groups = range(opened.num_row_groups)
        counts = [opened.metadata.row_group(group).num_rows for group in groups]
    except (OSError, pa.ArrowException, ZooError):
        return ["all of its rows: it is not readable as Parquet"]
    lost = []
    start = 0
    for group, count in zip(groups, counts, strict=True):
        rows = light[start : start + count]
        start += count
        try:
            weights = opened.read_row_group(group, columns=["weights"])["weights"].combine_chunks()
            weights.validate(full=False)
        except (OSError, pa.ArrowException):
            lost += [row["model_id"] for row in rows]
            continue
        lost += [row["model_id"] for number, row in enumerate(rows) if not _matches(weights.slice(number, 1), row)]
    return lost


def _matches(weights: pa.Array, row: Mapping[str, Any]) -> bool:
    try:
        vector = vector_of(weights, name="", num_parameters=row["num_parameters"], dtype=row["dtype"])
    except ZooError:
        return False
    return schema.weights_sha256(vector) == row["weights_sha256"]
