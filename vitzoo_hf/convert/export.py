"""Export rows as safetensors files with timm's names, as folders that transformers loads, or as a smaller zoo."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file

from vitzoo_hf.convert.names import to_timm
from vitzoo_hf.convert.transformers import (
    CONFIG,
    WEIGHTS,
    check_known_to_transformers,
    check_replaceable,
    write_transformers_folder,
)
from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import write_atomically
from vitzoo_hf.format.layout import flatten, unflatten
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.rebuild import checked_vector
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.publish.folder import Rows, write_zoo
from vitzoo_hf.zoo import Zoo

FORMATS = ("timm", "transformers")


def export_row(row: RowLike, place: Path, *, format: str = "timm") -> None:
    """Write a row's model, atomically; the row's other columns become metadata of the safetensors file, as text.

    Args:
        row: a row of `Zoo.rows()` or `load_dataset(…)`.
        place: the .safetensors file to write; for transformers, the folder.
        format: `timm`, or `transformers` for a folder that `ViTForImageClassification.from_pretrained` loads.

    Raises:
        ZooError: if the row cannot be rebuilt, transformers has no such model, or the place cannot be written.
    """
    _check_format(format)
    if format == "timm" and place.suffix != ".safetensors":
        raise ZooError(f"{place} does not end in .safetensors, which is what is written")
    if format == "transformers" and place.suffix == ".safetensors":
        raise ZooError(f"{place} is the name of a file; transformers reads a folder: leave .safetensors out")
    row = Row.of(row)
    vector, layout = checked_vector(row)
    # safetensors refuses views that are not contiguous
    tensors = {name: tensor.contiguous() for name, tensor in unflatten(vector, layout).items()}
    metadata = {
        # safetensors metadata holds text only
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in row.items()
        if name != "weights" and value is not None
    }
    if format == "transformers":
        architecture = Architecture.of(row)
        write_transformers_folder(place, tensors, architecture=architecture, metadata=metadata)
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooError(f"cannot write into {place.parent}: {error.strerror}") from None
    write_atomically(place, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def export_zoo(zoo: Zoo, folder: Path, *, format: str = "timm", progress: bool = True) -> list[Path]:
    """Write every row of a zoo to `folder / <model_id>.safetensors`; files with the right weights are kept.

    Args:
        zoo: the rows.
        folder: the folder for the files.
        format: `timm`, or `transformers` for a folder `<model_id>` a model, with config.json and model.safetensors.
        progress: show a bar.

    Raises:
        ZooError: if there is no row, the folder cannot be written, or transformers lacks one of these models; nothing
            is written then.
    """
    _check_format(format)
    if len(zoo) == 0:
        raise ZooError("there is no model to export: the filter matches none")
    hashes = dict(zip(zoo.model_ids, zoo.index["weights_sha256"], strict=True))
    suffix = ".safetensors" if format == "timm" else ""
    places = {model_id: folder / f"{model_id}{suffix}" for model_id in hashes}
    if format == "transformers":
        _check_all_known(zoo)
        # all places are checked before the first is written
        for place in places.values():
            check_replaceable(place)
    model_ids = [model_id for model_id, place in places.items() if _exported_hash(place, zoo) != hashes[model_id]]
    with progress_bar("exporting", "model", shown=progress, total=len(places)) as bar:
        # models of an earlier export count as done
        bar.update(len(places) - len(model_ids))
        for row in zoo.filter(model_id=model_ids).rows() if model_ids else ():
            export_row(row, places[row["model_id"]], format=format)
            bar.update(1)
    return list(places.values())


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ZooError(f"unknown format {format!r}: {did_you_mean(format, FORMATS)}")


def _check_all_known(zoo: Zoo) -> None:
    """Refuse a zoo with a model that transformers lacks."""
    mlp = sum(head == schema.HEADS.index("mlp") for head in zoo.index["head"])
    if mlp:
        raise ZooError(
            f"{mlp} of {len(zoo)} models have an MLP head, which transformers' ViT has not:"
            " leave them out with --where head=linear"
        )
    # each distinct architecture once: a check builds its skeleton
    for architecture, args in dict.fromkeys(
        zip(zoo.index["architecture"], zoo.index["architecture_args"], strict=True)
    ):
        check_known_to_transformers(architecture, json.loads(args), "linear")


def export_subset(zoo: Zoo, folder: Path, *, selection_of: Sequence[str] | None = None) -> Path:
    """Write the rows of a filtered zoo as a zoo of their own, with their splits and held-out images.

    Args:
        zoo: the rows to write.
        folder: the new zoo.
        selection_of: datasets whose selection images are included, by default all; test images always are.

    Raises:
        ZooError: if there is no row, or the folder cannot be written.
    """
    if len(zoo) == 0:
        raise ZooError("there is no model to export: the filter matches none")
    datasets = set(zoo.index["dataset"])
    datasets_of = {"selection": datasets if selection_of is None else datasets & set(selection_of), "test": datasets}
    parts = {split: zoo.filter(split=split) for split in zoo.splits}
    splits = {
        split: Rows(len(part), max(part.index["num_parameters"], default=0), part.rows())
        for split, part in parts.items()
    }
    probes = {
        role: [row for row in zoo.probe_rows(role) if row["dataset"] in names] for role, names in datasets_of.items()
    }
    manifest = {name: value for name, value in zoo.manifest.items() if name != "files"}
    # a subset is not the zoo of its blueprint: `is_packed` would otherwise take it for complete
    manifest |= {"blueprint_fingerprint": None, "subset_of": zoo.manifest["blueprint_fingerprint"]}
    write_zoo(folder, manifest, splits, probes, zoo.blueprint_text, dtype=zoo.index["dtype"][0])
    return folder


def _exported_hash(place: Path, zoo: Zoo) -> str | None:
    """Hash the weights of an earlier export; None if there is none that can be read completely."""
    try:
        with safe_open(place / WEIGHTS if place.is_dir() else place, framework="pt") as opened:
            layout = zoo.layouts[(opened.metadata() or {})["layout"]]
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        if place.is_dir():
            tensors = to_timm(tensors, name=place.name, config=json.loads((place / CONFIG).read_text())).tensors
        # in the order of the layout: the hash is of the flat vector, and a file has an order of its own
        return schema.weights_sha256(flatten({name: tensors[name] for name in layout.names}).numpy())
    except (OSError, SafetensorError, KeyError, ValueError, ZooError):
        return None
