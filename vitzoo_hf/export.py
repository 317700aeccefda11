"""Rows -> safetensors files with timm's tensor names, or a smaller zoo."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file

from vitzoo_hf.checkpoint import write_atomically
from vitzoo_hf.flatten import unflatten
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.rebuild import checked_vector
from vitzoo_hf.schema import ZooError
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo_folder import Rows, write_zoo


def export_row(row: Mapping[str, Any], file: Path) -> None:
    """Write a row's tensors to `file`, atomically; the row's other columns become metadata, as text.

    Raises:
        ZooError: if the row cannot be rebuilt, or the file cannot be written.
    """
    if file.suffix != ".safetensors":
        raise ZooError(f"{file} does not end in .safetensors, which is what is written")
    vector, layout = checked_vector(row)
    tensors = {name: tensor.contiguous() for name, tensor in unflatten(vector, layout).items()}
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in row.items()
        if name != "weights" and value is not None
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooError(f"cannot write into {file.parent}: {error.strerror}") from None
    write_atomically(file, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def export_zoo(zoo: Zoo, folder: Path, *, progress: bool = True) -> list[Path]:
    """Write every row of a zoo to `folder / <model_id>.safetensors`; files of the same weights are kept.

    Raises:
        ZooError: if there is no row, or the folder cannot be written.
    """
    if len(zoo) == 0:
        raise ZooError("there is no model to export: the filter matches none")
    hashes = dict(zip(zoo.model_ids, zoo.index["weights_sha256"], strict=True))
    files = {model_id: folder / f"{model_id}.safetensors" for model_id in hashes}
    missing = [model_id for model_id, file in files.items() if _exported_hash(file) != hashes[model_id]]
    with progress_bar("exporting", "model", shown=progress, total=len(files)) as bar:
        bar.update(len(files) - len(missing))
        for row in zoo.filter(model_id=missing).rows() if missing else ():
            export_row(row, files[row["model_id"]])
            bar.update(1)
    return list(files.values())


def export_subset(zoo: Zoo, folder: Path, *, selection_of: Sequence[str] | None = None) -> Path:
    """Write the rows of a filtered zoo as a zoo of their own, with their splits and held-out images.

    Args:
        zoo: the rows to keep.
        folder: the new zoo.
        selection_of: datasets whose selection images to take along, by default all; test images always are.

    Raises:
        ZooError: if there is no row, or the folder cannot be written.
    """
    if len(zoo) == 0:
        raise ZooError("there is no model to export: the filter matches none")
    used = set(zoo.index["dataset"])
    wanted = {"selection": used if selection_of is None else used & set(selection_of), "test": used}
    parts = {split: zoo.filter(split=split) for split in zoo.splits}
    splits = {
        split: Rows(len(part), max(part.index["num_parameters"], default=0), part.rows())
        for split, part in parts.items()
    }
    probes = {
        role: [row for row in zoo.probe_rows(role) if row["dataset"] in datasets] for role, datasets in wanted.items()
    }
    manifest = {name: value for name, value in zoo.manifest.items() if name != "files"}
    manifest |= {"blueprint_fingerprint": None, "subset_of": zoo.manifest["blueprint_fingerprint"]}
    write_zoo(folder, manifest, splits, probes, zoo.blueprint_text, dtype=zoo.index["dtype"][0])
    return folder


def _exported_hash(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("weights_sha256")
    except (OSError, SafetensorError):
        return None
