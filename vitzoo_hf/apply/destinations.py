"""Where applications write: zoos made from zoos, which replace only an earlier one of their kind."""

import json
import tempfile
from pathlib import Path
from typing import Any

from vitzoo_hf import schema
from vitzoo_hf.schema import ZooError
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo_folder import refuse_to_replace

KINDS = {
    "soups_of": "soups",
    "rebasin_of": "models aligned by re-basin",
    "reconstructions_of": "reconstructions",
    "samples_of": "samples",
}
"""What the manifest of a made zoo has, and what the zoo is of."""


def made_manifest(zoo: Zoo, kind: str) -> dict[str, Any]:
    """The manifest of a zoo that is made from another: without files, and with what it was made of under `kind`."""
    left_out = {"files", "subset_of", *KINDS}
    manifest = {name: value for name, value in zoo.manifest.items() if name not in left_out}
    return manifest | {kind: zoo.manifest["blueprint_fingerprint"], "blueprint_fingerprint": None}


def check_folder(folder: Path, zoo: Zoo, kind: str) -> None:
    """Refuse a folder for a made zoo before anything is computed.

    Args:
        folder: that is to be written.
        zoo: that it is made from.
        kind: one of `KINDS`.

    Raises:
        ZooError: if it is the folder of `zoo`, holds files that are no zoo or a zoo of another kind, or cannot be
            written.
    """
    if folder.resolve() == Path(zoo.name).resolve():
        raise ZooError(f"{folder} is the zoo that is read, and would be replaced: give another folder for the output")
    refuse_to_replace(folder)
    manifest = folder / schema.MANIFEST
    if manifest.is_file() and kind not in _keys(manifest):
        raise ZooError(
            f"{folder} holds a zoo that is not of {KINDS[kind]}, and would be replaced: give another folder, or"
            " remove it yourself"
        )
    check_writable(folder)


def check_writable(path: Path) -> None:
    """Refuse a file or folder that could not be made.

    Raises:
        ZooError: if the closest folder above it that exists is none, or takes no files.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise ZooError(f"cannot write {path}: {above}: {error.strerror}; give another place") from None


def check_file(path: Path) -> None:
    """Refuse a file that could not be written.

    Raises:
        ZooError: if it is a folder, or as `check_writable`.
    """
    if path.is_dir():
        raise ZooError(f"cannot write {path}: it is a folder; give the name of a file")
    check_writable(path)


def _keys(manifest: Path) -> set[str]:
    try:
        return set(json.loads(manifest.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()
