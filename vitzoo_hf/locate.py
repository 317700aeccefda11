"""Where the files of a zoo are: in a folder, or in a dataset on the Hub, through its cache."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitzoo_hf import schema
from vitzoo_hf.checkpoint import read_json
from vitzoo_hf.flatten import Layout
from vitzoo_hf.schema import ZooError

REPAIR = "pack the zoo again, or download this file again"


def read_manifest(file: Path) -> dict[str, Any]:
    """What `zoo.json` says, checked for what every reader needs.

    Raises:
        ZooError: if it is damaged, or of a newer format.
    """
    manifest = read_json(file)
    kinds = {"format": int, "name": str, "factors": dict, "images": dict, "files": dict, "missing_runs": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            raise ZooError(f"{file} is damaged: it lacks {key!r}; {REPAIR}")
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
        if layout.fingerprint != key:
            raise ZooError(f"{file} is damaged: layout {key} has the fingerprint {layout.fingerprint}; {REPAIR}")
    return layouts


def locator(path: str | Path, revision: str | None) -> Callable[[str], Path]:
    """A function from the name of a zoo's file to a local path, which fetches it if the zoo is on the Hub.

    Raises:
        ZooError: if `path` is neither a zoo's folder nor looks like a dataset id; later, if a file cannot be fetched.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / schema.MANIFEST).is_file():
            raise ZooError(f"{folder} is not a zoo: it has no {schema.MANIFEST}; `vitzoo pack` writes zoos")
        return lambda name: folder / name
    repository = str(path).removeprefix("hf://").removeprefix("datasets/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ZooError(f"no zoo at {str(path)!r}: neither a folder nor a dataset id like ORG/NAME")

    def fetch(name: str) -> Path:
        import huggingface_hub

        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset", revision=revision))
        except Exception as error:
            raise ZooError(
                f"cannot get {name} of {repository!r}, which is no folder here: {one_line(error)}"
            ) from None

    return fetch


def one_line(error: Exception) -> str:
    """The message of an error on one line, cut to 200 characters."""
    return " ".join(str(error).split())[:200]
