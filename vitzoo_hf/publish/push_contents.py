"""What of a zoo's folder goes to the Hub, checked before anything is sent.

That is `zoo.json`, the card, and the files they list. Hidden, temporary and other files stay where they are.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import read_json
from vitzoo_hf.format.manifest import REPAIR, read_manifest
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish.card_sections import repository_name

CARD = "README.md"
UNLISTED = (schema.MANIFEST, CARD, ".gitattributes")
"""Sent as they are: the manifest cannot list itself, and the other two may be edited by hand."""


@dataclass(frozen=True)
class LocalFile:
    """A file to publish.

    Attributes:
        size: in bytes.
        sha256: what it must be.
        source: where it is.
        content: what to send, if it is one of `UNLISTED`.
    """

    size: int
    sha256: str
    source: Path
    content: bytes | None = None

    def git_id(self) -> str:
        """The name git gives to the content, by which the Hub knows small files."""
        content = self.source.read_bytes() if self.content is None else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Attributes:
        name: of the zoo.
        format_tag: names its format version.
        files: path -> file to publish.
        left_out: other files that are not hidden.
    """

    name: str
    format_tag: str
    files: Mapping[str, LocalFile]
    left_out: list[str]


def read_contents(folder: Path, repository: str) -> Contents:
    """What of a zoo goes to the Hub; sizes are compared with the manifest, nothing large is read.

    Args:
        folder: the zoo.
        repository: the dataset's id, which takes the place of the invented one in the card's examples.

    Raises:
        ZooError: if the folder is no zoo, a file is missing or has another size, the card lacks `configs`, or a file
            would keep everybody from loading the dataset.
    """
    if not (folder / schema.MANIFEST).is_file():
        raise ZooError(f"{folder} is not a zoo: it has no {schema.MANIFEST}; `vitzoo pack` writes zoos")
    manifest = read_manifest(folder / schema.MANIFEST)
    files: dict[str, LocalFile] = {}
    for path, entry in listed_files(folder).items():
        source = folder / path
        if path in UNLISTED:
            continue
        if not source.is_file():
            raise ZooError(f"{path} of {folder} is missing; {REPAIR}")
        size = source.stat().st_size
        if size != entry["bytes"]:
            raise ZooError(
                f"{path} of {folder} has {size} bytes, not {entry['bytes']}: it was cut or changed; {REPAIR}"
            )
        files[path] = LocalFile(size, entry["sha256"], source)
    for path in UNLISTED:
        if (folder / path).is_file():
            content = (folder / path).read_bytes()
            if path == CARD:
                content = _with_id(content, repository_name(manifest["name"]), repository)
            files[path] = LocalFile(len(content), hashlib.sha256(content).hexdigest(), folder / path, content)
    _check_card(folder, files)
    visible = _visible_files(folder)
    script = f"{repository.split('/')[1]}.py"
    if script in visible:
        raise ZooError(f"{script} in {folder} is named like the dataset, which could not be loaded: rename it")
    return Contents(
        manifest["name"], f"format-{manifest['format']}", files, [path for path in visible if path not in files]
    )


def _with_id(card: bytes, invented: str, repository: str) -> bytes:
    return re.sub(rb"(?<![\w-])" + re.escape(invented.encode()) + rb"(?![\w-])", repository.encode(), card)


def listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    """What a zoo says its files are: path -> `bytes` and `sha256`, from `zoo.json` and, if listed, `shards.json`.

    Raises:
        ZooError: if either is damaged, or names what cannot be a file of a zoo.
    """
    listed = dict(read_manifest(folder / schema.MANIFEST)["files"])
    if schema.SHARDS in listed:
        shards = read_json(folder / schema.SHARDS)
        if not isinstance(shards, dict):
            raise ZooError(f"{folder / schema.SHARDS} is damaged: expected an object of files; {REPAIR}")
        listed |= shards
    for path, entry in listed.items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise ZooError(f"{folder} is damaged: size or hash of {path} is not listed; {REPAIR}")
        if not re.fullmatch(r"(?!\.)[^/\\]+(/(?!\.)[^/\\]+)*", path):
            raise ZooError(f"{folder} is damaged: it lists {path!r}, which is no file of a zoo; {REPAIR}")
    return {path: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for path, entry in listed.items()}


def _check_card(folder: Path, files: Mapping[str, LocalFile]) -> None:
    """Without `configs` in the card, `load_dataset` would guess the layout of the folder."""
    content = files[CARD].content or b"" if CARD in files else b""
    header = re.match(rb"---\r?\n(.*?)\n---", content, re.DOTALL)
    try:
        told = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        told = None
    if not isinstance(told, dict) or not told.get("configs"):
        raise ZooError(f"{folder / CARD} must begin with a YAML header that has `configs`; {REPAIR}")


def _visible_files(folder: Path) -> list[str]:
    held = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(file.as_posix() for file in held if not any(part.startswith(".") for part in file.parts))
