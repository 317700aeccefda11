"""Where the files of a zoo are: in a folder, or in a dataset on the Hub, through its cache."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import read_json
from vitzoo_hf.format.files import FolderFiles, HubFiles
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.messages import REPAIR
from vitzoo_hf.format.schema import ZooError

Manifest = Mapping[str, Any]
"""What `zoo.json` holds, checked by `read_manifest`."""


def read_manifest(file: Path) -> Manifest:
    """What `zoo.json` says, checked for what every reader needs.

    Raises:
        ZooError: if it is damaged, or of a newer format.
    """
    manifest = read_json(file)
    kinds = {"format": int, "name": str, "factors": dict, "images": dict, "files": dict, "missing_runs": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            raise ZooError(f"{file} is damaged: it lacks {key!r}; {REPAIR}")
    # after the keys: a newer format promises to keep these, so its number can be read
    if manifest["format"] > schema.FORMAT_VERSION:
        raise ZooError(
            f"{file} says format {manifest['format']}, this version reads up to {schema.FORMAT_VERSION}:"
            " run `pip install -U vitzoo-hf`"
        )
    return manifest


def read_layouts(file: Path) -> dict[str, Layout]:
    """Fingerprint -> layout, from `layouts.json`.

    Raises:
        ZooError: if it is damaged.
    """
    entries = read_json(file)
    if not isinstance(entries, dict):
        raise ZooError(f"{file} is damaged: expected an object of layouts; {REPAIR}")
    layouts = {key: Layout.from_json(held) for key, held in entries.items()}
    for key, layout in layouts.items():
        # rows name layouts by fingerprint: a layout under a wrong key would give wrong tensors silently
        if layout.fingerprint != key:
            raise ZooError(f"{file} is damaged: layout {key} has the fingerprint {layout.fingerprint}; {REPAIR}")
    return layouts


def read_shards(files: FolderFiles | HubFiles, manifest: Manifest) -> dict[str, Mapping[str, Any]]:
    """Weight shards in the order of the index's rows: path -> bytes, sha256 and, where known, rows and row groups.

    Zoos written before `shards.json` list their shards in `zoo.json`, without rows and row groups.

    Raises:
        ZooError: if the list is damaged.
    """
    listed = manifest["files"]
    if schema.SHARDS in listed:
        data = files.path(schema.SHARDS).read_bytes()
        # byte offsets come from this file: a damaged one would read plausible numbers from wrong places
        if hashlib.sha256(data).hexdigest() != listed[schema.SHARDS]["sha256"]:
            raise ZooError(f"{schema.SHARDS} of {files.name} does not match its hash: it is damaged; {REPAIR}")
        listed = json.loads(data)
    names = [name for name in listed if name.startswith("weights/")]
    for name in names:
        if not isinstance(listed[name], dict) or not {"bytes", "sha256"} <= listed[name].keys():
            raise ZooError(f"{files.name} is damaged: size or hash of {name} is not listed; {REPAIR}")
    # rows of the index run split by split, and shards in the order of their numbers
    order = {f"weights/{split}": rank for rank, split in enumerate(schema.SPLITS)}
    return {name: listed[name] for name in sorted(names, key=lambda name: (order[name.split("-")[0]], name))}


def check_sizes(files: FolderFiles | HubFiles, manifest: Manifest) -> None:
    """Compare the length of every Parquet file of a folder with what the manifest says.

    Raises:
        ZooError: naming the first file that is missing or was cut.
    """
    for name, entry in (manifest["files"] | read_shards(files, manifest)).items():
        file = files.path(name)
        # lengths only: hashing a terabyte at each opening is `vitzoo verify`, not this
        if file.suffix == ".parquet" and file.stat().st_size != entry["bytes"]:
            raise ZooError(f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}: it was cut; {REPAIR}")


def open_files(path: str | Path, revision: str | None) -> FolderFiles | HubFiles:
    """The files of a zoo.

    Raises:
        ZooError: if `path` is neither a zoo's folder nor looks like a dataset id; later, if a file cannot be fetched.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / schema.MANIFEST).is_file():
            raise ZooError(f"{folder} is not a zoo: it has no {schema.MANIFEST}; `vitzoo pack` writes zoos")
        if revision is not None:
            raise ZooError(f"revision {revision!r} of a folder: only datasets on the Hub have revisions")
        return FolderFiles(folder)
    # pandas and fsspec write these prefixes; users paste them
    repository = str(path).removeprefix("hf://").removeprefix("datasets/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ZooError(f"no zoo at {str(path)!r}: neither a folder nor a dataset id like ORG/NAME")
    return HubFiles(repository, revision)
