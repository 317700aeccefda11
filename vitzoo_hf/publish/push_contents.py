"""Choose and check the files of a zoo's folder that are pushed to the Hub, before any is sent.

These are `zoo.json`, the card, and the files they list. Hidden, temporary and other files are left out. Sizes are
checked here; hashes are compared when a file is uploaded, so that an unchanged shard is never read.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vitzoo_hf.format import schema
from vitzoo_hf.format.gate.card import ROOT_HASH, card_header
from vitzoo_hf.format.manifest import open_zoo, root_hash
from vitzoo_hf.format.messages import REPAIR
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish.card_sections import repository_name

CARD = schema.CARD
UNLISTED = (schema.MANIFEST, CARD, ".gitattributes")
"""Files that are pushed without a listed hash: the manifest cannot list itself; the others may be edited by hand."""


@dataclass(frozen=True)
class LocalFile:
    """A file to publish.

    Attributes:
        size: number of bytes.
        sha256: hash that the content must have.
        source: path on this machine.
        content: the bytes to push, for the files of `UNLISTED`; otherwise `source` is read.
    """

    size: int
    sha256: str
    source: Path
    content: bytes | None = None

    def git_id(self) -> str:
        """Compute the id that git gives to the content, by which the Hub names small files."""
        content = self.source.read_bytes() if self.content is None else self.content
        # git's format of a blob: type, length, a zero byte, then the content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Contents:
    """Files of a zoo's folder.

    Attributes:
        name: name of the zoo.
        format_tag: tag of its format version, such as `format-1`.
        files: path -> file to publish.
        left_out: other files that are not hidden.
    """

    name: str
    format_tag: str
    files: Mapping[str, LocalFile]
    left_out: list[str]


def read_contents(folder: Path, repository: str) -> Contents:
    """List the files of a zoo to push; sizes are compared with the manifest, and nothing large is read.

    Args:
        folder: the zoo.
        repository: the dataset's id, which replaces the placeholder `ORG/NAME` in the card's examples.

    Raises:
        ZooError: if the folder is no zoo, a file is missing or has another size, the card lacks `configs`, or a file
            would keep everybody from loading the dataset.
    """
    opened = open_zoo(folder)
    manifest = opened.manifest
    files: dict[str, LocalFile] = {}
    for path, entry in opened.listed.items():
        if path in UNLISTED:
            continue
        source = opened.files.path(path)
        size = source.stat().st_size
        # the cheap half of the check; the hash is compared at the upload
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
    if root_hash(opened.files) not in (None, files[schema.MANIFEST].sha256):
        raise ZooError(
            f"{folder / schema.MANIFEST} does not match {ROOT_HASH} in the card's header: it was changed; {REPAIR}"
        )
    visible = _visible_files(folder)
    script = f"{repository.split('/')[1]}.py"
    if script in visible:
        raise ZooError(f"{script} in {folder} is named like the dataset, which could not be loaded: rename it")
    return Contents(
        manifest["name"], f"format-{manifest['format']}", files, [path for path in visible if path not in files]
    )


def _with_id(card: bytes, placeholder: str, repository: str) -> bytes:
    # whole ids only: a placeholder may be the beginning of a longer name
    return re.sub(rb"(?<![\w-])" + re.escape(placeholder.encode()) + rb"(?![\w-])", repository.encode(), card)


def _check_card(folder: Path, files: Mapping[str, LocalFile]) -> None:
    """Refuse a card without `configs`: `load_dataset` would guess the layout of the folder."""
    # the card with the dataset's id in it, which is what readers get
    content = files[CARD].content or b"" if CARD in files else b""
    try:
        has_configs = bool(card_header(content, CARD).get("configs"))
    except ZooError:
        has_configs = False
    if not has_configs:
        raise ZooError(f"{folder / CARD} must begin with a YAML header that has `configs`; {REPAIR}")


def _visible_files(folder: Path) -> list[str]:
    paths = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(file.as_posix() for file in paths if not any(part.startswith(".") for part in file.parts))
