"""Labelled images to evaluate a zoo on: the probe images, images of another source, and corrupted copies of both.

Images of every source are prepared as in training: with the size, channels, mean and deviation of the dataset that
the models were trained on.
"""

from collections.abc import Mapping, Sequence
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

Labelled = tuple[Float[Tensor, "N channels H W"], Int64[Tensor, " N"]]


def image_sets(
    zoo: Zoo, dataset: str, *, data: str | None = None, corruptions: Sequence[str] = (), seed: int = 0
) -> dict[str, Labelled]:
    """Name -> normalised images for the models of a dataset, and labels.

    Args:
        zoo: the zoo, whose manifest records how images of the dataset are prepared.
        dataset: a `dataset` of the zoo.
        data: a source whose test images are taken: a name of a blueprint, such as `digits` or `hf:ORG/NAME`, or a
            folder with one subfolder a class. None takes the probe images of the zoo.
        corruptions: `NAME` or `NAME:SEVERITY`; each gives a further set beside the clean one.
        seed: the seed of the noise.

    Raises:
        ZooError: if the zoo does not say how images are prepared, the source is unknown or has another number of
            classes, or a corruption is unknown.

    Example:
        >>> [name for name in image_sets(Zoo.sample(), "digits", corruptions=["contrast", "gaussian_noise:5"])]
        ['digits', 'digits, contrast 3', 'digits, gaussian_noise 5']
    """
    kinds = [parse_corruption(text) for text in corruptions]
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
    sets |= {f"{name}, {kind} {severity}": corrupted(plain, kind, severity, seed=seed) for kind, severity in kinds}
    return {title: ((images - mean) / std, labels) for title, images in sets.items()}


def statistics_of(record: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels of a dataset, `[channels or 1, 1, 1]`, from its record in the manifest."""
    mean, std = (torch.tensor(record[name], dtype=torch.float32).view(-1, 1, 1) for name in ("mean", "std"))
    return mean, std


def _of_source(
    data: str, record: Mapping[str, Any], dataset: str
) -> tuple[UInt8[Tensor, "N channels H W"], Int64[Tensor, " N"]]:
    """The test images of a source, prepared as the record says."""
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
    images = load_images(data, spec)
    class_names = record.get("class_names", [])
    if len(images.class_names) != len(class_names):
        raise ZooError(
            f"{data!r} has {len(images.class_names)} classes; the models of {dataset!r} know {len(class_names)}"
        )
    # names decide, not numbers: with the classes in another order every prediction would count as wrong
    for name, expected in zip(images.class_names, class_names, strict=True):
        if name != expected:
            raise ZooError(
                f"a class of {data!r} is {name!r} where the models of {dataset!r} have {expected!r}: give"
                " images with the same classes in the same order"
            )
    return images.part("test")
