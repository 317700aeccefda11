"""Hash every file of a zoo again, in a folder or on the Hub, and name what is damaged, down to the row."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vitzoo_hf.format import schema
from vitzoo_hf.format.files import FolderFiles, HubFiles
from vitzoo_hf.format.gate.card import ROOT_HASH
from vitzoo_hf.format.manifest import (
    Manifest,
    OpenedZoo,
    open_files,
    read_bytes,
    read_layouts,
    read_manifest,
    read_shards,
    root_hash,
)
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.weight_reader import RowTable, WeightReader
from vitzoo_hf.progress import progress_bar

CHUNK_BYTES = 16_000_000


@dataclass
class Verification:
    """Result of comparing the files of a zoo with their hashes.

    Attributes:
        files: number of files hashed.
        size: bytes hashed.
        damaged: file -> description of the damage.
        rows: damaged file of weights -> the lost models in it, if the index is intact; all other rows can be read.
        notes: sentences on what could not be compared.
    """

    files: int = 0
    size: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged


def verify(path: str | Path, *, revision: str | None = None, progress: bool = True) -> Verification:
    """Compare every file of a zoo with the hash in its manifest.

    The files of a dataset on the Hub are read once, in ranges, and not stored.

    Args:
        path: a folder, or a dataset id.
        revision: branch, tag or commit of a dataset.
        progress: show a bar.

    Raises:
        ZooError: if there is no zoo, or its manifest or its list of shards cannot be read.
    """
    files = open_files(path, revision)
    manifest = read_manifest(files)
    shards = read_shards(files, manifest)
    listed = manifest["files"] | shards
    listed = {name: entry for name, entry in listed.items() if name != "README.md"}  # cards are there to be edited
    verification = Verification()
    with progress_bar(
        "verifying", "B", shown=progress, total=sum(entry["bytes"] for entry in listed.values())
    ) as bar:
        for name, entry in listed.items():
            reason = _damage(files, name, entry, bar)
            verification.files += 1
            verification.size += entry["bytes"]
            if reason is not None:
                verification.damaged[name] = reason
    verification.damaged |= _odd_files(files, listed)
    _compare_root(files, verification)
    lost = [name for name in verification.damaged if name in shards]
    if lost and not any(name.startswith("index/") for name in verification.damaged):
        verification.rows = _lost_rows(files, manifest, shards, lost)
    return verification


def _compare_root(files: FolderFiles | HubFiles, verification: Verification) -> None:
    """Compare `zoo.json`, which no other file lists, with the hash in the card's header."""
    try:
        expected = root_hash(files)
    except ZooError as error:
        verification.damaged.setdefault(schema.CARD, str(error))
        return
    if expected is None:
        verification.notes.append(
            f"{schema.MANIFEST} is covered by no hash: the card's header has no {ROOT_HASH}, as in zoos of earlier"
            " versions"
        )
    elif hashlib.sha256(read_bytes(files, schema.MANIFEST)).hexdigest() != expected:
        verification.damaged[schema.MANIFEST] = f"its content does not match {ROOT_HASH} in the card's header"


def _odd_files(files: FolderFiles | HubFiles, listed: Collection[str]) -> dict[str, str]:
    """Faults beside the listed files: a card that is missing, and files that `datasets` would read too."""
    odd = {} if files.exists("README.md") else {"README.md": "missing: `load_dataset` needs the configs in it"}
    if isinstance(files, FolderFiles):
        folder = files.folder
        configs = {name.split("/")[0] for name in listed if "/" in name}
        present = {
            file.relative_to(folder).as_posix() for config in configs for file in (folder / config).glob("*.parquet")
        }
        odd |= dict.fromkeys(
            sorted(present.difference(listed)), "not a file of this zoo, and `load_dataset` would read it"
        )
    return odd


def _damage(files: FolderFiles | HubFiles, name: str, entry: Mapping[str, Any], bar: tqdm) -> str | None:
    """Description of the damage of a file, or None."""
    if not files.exists(name):
        return "missing"
    local = files.local(name)
    if local is not None and local.stat().st_size != entry["bytes"]:
        return f"{local.stat().st_size} bytes, not {entry['bytes']}"
    digest = hashlib.sha256()
    # one buffer: reading a whole shard of the Hub would take gigabytes
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


def _lost_rows(
    files: FolderFiles | HubFiles, manifest: Manifest, shards: Mapping[str, Mapping[str, Any]], damaged: Iterable[str]
) -> dict[str, list[str]]:
    """Damaged file of weights -> the models in it that do not match their hash or cannot be read."""
    try:
        rows = RowTable.of(OpenedZoo(files, manifest, read_layouts(files), shards).index)
        reader = WeightReader(files, shards, rows, keep=False)
    except ZooError:
        return {}
    numbers = {name: number for number, name in enumerate(shards)}
    return {
        name: [
            rows.model_id(position)
            for position in np.flatnonzero(reader.places.file == numbers[name]).tolist()
            if not _is_readable(reader, position)
        ]
        for name in damaged
    }


def _is_readable(reader: WeightReader, position: int) -> bool:
    try:
        reader.read_into(position, np.empty(int(reader.rows.num_parameters[position]), np.float32))
    except ZooError:
        return False
    return True
