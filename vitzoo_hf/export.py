"""Rows -> safetensors files with timm's tensor names, folders that transformers loads, or a smaller zoo."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file
from torch import Tensor

from vitzoo_hf.checkpoint import write_atomically, write_json
from vitzoo_hf.flatten import unflatten
from vitzoo_hf.foreign.names import to_transformers
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.rebuild import architecture_of, checked_vector
from vitzoo_hf.schema import ZooError, did_you_mean
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo_folder import Rows, swap, write_zoo

FORMATS = ("timm", "transformers")


def export_row(row: Mapping[str, Any], place: Path, *, format: str = "timm") -> None:
    """Write a row's tensors, atomically; the row's other columns become metadata of the file, as text.

    Args:
        row: from `Zoo.rows()` or `load_dataset(…)`.
        place: a `.safetensors` file with timm's names; for transformers a folder that
            `ViTForImageClassification.from_pretrained` loads, with config.json and model.safetensors.
        format: `timm` or `transformers`.

    Raises:
        ZooError: if the row cannot be rebuilt, transformers has no such model, or the place cannot be written.
    """
    _check_place(place, format)
    vector, layout = checked_vector(row)
    tensors = {name: tensor.contiguous() for name, tensor in unflatten(vector, layout).items()}
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in row.items()
        if name != "weights" and value is not None
    }
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if format == "timm":
            write_atomically(place, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        else:
            _write_transformers(row, tensors, metadata, place)
    except OSError as error:
        raise ZooError(f"cannot write {place}: {error.strerror or error}") from None


def _check_place(place: Path, format: str) -> None:
    if format not in FORMATS:
        raise ZooError(f"unknown format {format!r}: {did_you_mean(format, FORMATS)}")
    if format == "timm" and place.suffix != ".safetensors":
        raise ZooError(f"{place} does not end in .safetensors, which is what is written")
    if format == "transformers" and place.exists() and not (place / "config.json").is_file():
        raise ZooError(f"{place} is there already and no model of transformers: give a new folder")


def _write_transformers(
    row: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], folder: Path
) -> None:
    architecture, args, head, _ = architecture_of(row)
    config, renamed = to_transformers(tensors, architecture=architecture, architecture_args=args, head=head)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-", suffix=".tmp"))
    try:
        temporary.chmod(0o755)
        write_json(temporary / "config.json", config)
        save_file(renamed, temporary / "model.safetensors", metadata={**metadata, "format": "pt"})
        swap(temporary, folder)
    except SafetensorError as error:
        raise ZooError(f"cannot write {folder}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_zoo(zoo: Zoo, folder: Path, *, format: str = "timm", progress: bool = True) -> list[Path]:
    """Write every row of a zoo into a folder, named by its id; what holds the same weights already is kept.

    Args:
        zoo: the rows.
        folder: for `<model_id>.safetensors`, or for folders `<model_id>` of transformers.
        format: `timm` or `transformers`.
        progress: show a bar.

    Raises:
        ZooError: if there is no row, a row cannot be of that format, or the folder cannot be written.
    """
    if len(zoo) == 0:
        raise ZooError("there is no model to export: the filter matches none")
    if format == "transformers" and len(zoo.filter(head="linear")) < len(zoo):
        raise ZooError("transformers has no ViT with an MLP head: choose rows with --where head=linear")
    suffix, held = (".safetensors", "") if format == "timm" else ("", "model.safetensors")
    hashes = dict(zip(zoo.model_ids, zoo.index["weights_sha256"], strict=True))
    places = {model_id: folder / f"{model_id}{suffix}" for model_id in hashes}
    missing = [model_id for model_id, place in places.items() if _exported_hash(place / held) != hashes[model_id]]
    with progress_bar("exporting", "model", shown=progress, total=len(places)) as bar:
        bar.update(len(places) - len(missing))
        for row in zoo.filter(model_id=missing).rows() if missing else ():
            export_row(row, places[row["model_id"]], format=format)
            bar.update(1)
    return list(places.values())


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
