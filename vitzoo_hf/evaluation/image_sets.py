"""Labelled images to evaluate a zoo on: its own, another source's, and each of them corrupted.

Whatever the source, images are prepared as the models were fed in training: size, channels, mean and deviation are
those of the dataset the models know.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitzoo_hf.blueprint.blueprint import ImagesSpec
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.corruptions import corrupted, parse_corruption
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.zoo import Zoo

Labelled = tuple[Float[Tensor, "N C H W"], Int64[Tensor, " N"]]


def image_sets(
    zoo: Zoo, dataset: str, *, data: str | None = None, corruptions: Sequence[str] = (), seed: int = 0
) -> dict[str, Labelled]:
    """Name -> images as the models of a dataset are fed them, and labels.

    Args:
        zoo: says how images of the dataset are prepared.
        dataset: a `dataset` of the zoo.
        data: a source of images, as blueprints name them, such as `digits` or `hf:ORG/NAME`, or a folder with one
            subfolder a class: its test images. None takes those the zoo carries.
        corruptions: `NAME` or `NAME:SEVERITY`; each gives a set of its own beside the clean one.
        seed: of the noise.

    Raises:
        ZooError: if the zoo does not say how images are prepared, the source is unknown or has another number of
            classes, or a corruption is unknown.

    Example:
        >>> [name for name in image_sets(Zoo.sample(), "digits", corruptions=["contrast", "gaussian_noise:5"])]
        ['digits', 'digits, contrast 3', 'digits, gaussian_noise 5']
    """
    chosen = [parse_corruption(text) for text in corruptions]
    record = zoo.manifest["images"].get(dataset)
    if record is None:
        raise ZooError(f"{zoo.name} does not say how images of {dataset!r} are prepared")
    if data is None:
        normalised, labels = zoo.probes(dataset, "test")
        mean, std = statistics_of(record)
        plain, name = (normalised * std + mean).clamp(0, 1), dataset
    else:
        pixels, labels = _of_source(data, record, dataset)
        plain, name = pixels.float() / 255, data
    mean, std = statistics_of(record)
    sets = {name: plain}
    sets |= {f"{name}, {kind} {severity}": corrupted(plain, kind, severity, seed=seed) for kind, severity in chosen}
    return {title: ((images - mean) / std, labels) for title, images in sets.items()}


def statistics_of(record: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a dataset's channels `[C or 1, 1, 1]`, by its record in the manifest."""
    mean, std = (torch.tensor(record[name], dtype=torch.float32).view(-1, 1, 1) for name in ("mean", "std"))
    return mean, std


def _of_source(
    data: str, record: dict[str, Any], dataset: str
) -> tuple[UInt8[Tensor, "N C H W"], Int64[Tensor, " N"]]:
    """The test images of a source, prepared as those of the record."""
    is_folder = Path(data).is_dir()
    spec = ImagesSpec(
        source="folder" if is_folder else data,
        path=data if is_folder else None,
        size=record["size"],
        resize=record.get("resize"),
        crop=record.get("crop"),
        channels=record["channels"],
        interpolation=record.get("interpolation", "bilinear"),
    )
    found = load_images(data, spec)
    known = record.get("class_names", [])
    if len(found.class_names) != len(known):
        raise ZooError(f"{data!r} has {len(found.class_names)} classes; the models of {dataset!r} know {len(known)}")
    other = [(a, b) for a, b in zip(found.class_names, known, strict=True) if a != b]
    if other:
        raise ZooError(
            f"a class of {data!r} is {other[0][0]!r} where the models of {dataset!r} have {other[0][1]!r}: give"
            " images with the same classes in the same order"
        )
    return found.part("test")
