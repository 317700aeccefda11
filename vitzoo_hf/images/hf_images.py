"""Labelled images of a Hugging Face dataset or of a folder, still encoded."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.on_demand import OnDemandImages
from vitzoo_hf.images.pixels import Source

PARTS = ("train", "test", "validation", "valid")


def read_folder(spec: ImagesSpec) -> Source:
    """A folder with one subfolder a class.

    Raises:
        ZooError: if it is not there, has one class only, or a class without images.
    """
    if spec.path is None or not Path(spec.path).is_dir():
        raise ZooError(f"images 'folder' need `path`, a folder with one subfolder a class; given {spec.path!r}")
    _check_classes(Path(spec.path))
    return read_dataset(spec)


def _check_classes(folder: Path) -> None:
    """Refuse folders of which `datasets` would quietly make fewer classes than there are."""
    parts = [folder / name for name in PARTS if (folder / name).is_dir()] or [folder]
    members: dict[str, list[Path]] = {}
    for part in parts:
        for place in part.iterdir():
            if place.is_dir() and not place.name.startswith("."):
                members.setdefault(place.name, []).append(place)
    if len(members) == 1:
        raise ZooError(f"{folder} has one class, {next(iter(members))!r}; expected a subfolder for each of several")
    empty = sorted(name for name, places in members.items() if not any(_has_files(place) for place in places))
    if empty:
        raise ZooError(f"class {empty[0]!r} in {folder} has no images: add some, or remove its folder")


def _has_files(folder: Path) -> bool:
    return any(not place.is_dir() for place in folder.rglob("*"))


def read_dataset(spec: ImagesSpec) -> Source:
    """Training images, then those of the first held-out part whose labels are not hidden.

    Raises:
        ZooError: if the dataset cannot be loaded, or has no images, no labels, or several kinds of labels.
    """
    import datasets

    identifier = spec.source.removeprefix("hf:")
    try:
        if spec.source == "folder":
            parts = datasets.load_dataset("imagefolder", data_dir=spec.path)
        else:
            parts = datasets.load_dataset(identifier)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ZooError(f"cannot load the image dataset {spec.path or identifier!r}: {reason}") from None
    train = parts["train"] if "train" in parts else parts[next(iter(parts))]
    image_column = _columns(train, datasets.Image, identifier)[0]
    label_column = _label_column(_columns(train, datasets.ClassLabel, identifier), spec.label, identifier)
    held_out = [parts[name] for name in PARTS[1:] if name in parts]
    # a label of -1 is hidden, as are all those of ImageNet's test set
    test = next((part for part in held_out if min(part[label_column][:], default=-1) >= 0), None)
    used = [train] if test is None else [train, test]
    files = pa.chunked_array(
        [chunk for part in used for chunk in part.data.column(image_column).chunks],
        type=datasets.Image.pa_type,
    )
    labels = torch.tensor([label for part in used for label in part[label_column][:]], dtype=torch.int64)
    names = tuple(train.features[label_column].names)
    licence = train.info.license or "see the dataset"
    return Source(OnDemandImages(files, spec), labels, names, licence, 0 if test is None else len(test))


def _columns(dataset: Any, kind: type, identifier: str) -> list[str]:
    names = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if not names:
        raise ZooError(f"{identifier!r} has no {kind.__name__} column; its columns are {list(dataset.features)}")
    return names


def _label_column(names: list[str], wanted: str | None, identifier: str) -> str:
    if wanted is not None:
        if wanted not in names:
            raise ZooError(f"{identifier!r} has no label column {wanted!r}: {did_you_mean(wanted, names)}")
        return wanted
    if len(names) > 1:
        raise ZooError(f"{identifier!r} has several label columns: {names}; set `label` of the images to one of them")
    return names[0]
