"""Fashion-MNIST: the same bytes from the user's folder, Debian's package or the Hub, checked by their hashes."""

import gzip
import hashlib
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.format.messages import one_line
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.pixels import Source

PACKAGE = "dataset-fashion-mnist"
PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts the idx files."""
HUB_ID = "zalando-datasets/fashion_mnist"
SHA256 = {
    "train images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "train labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "test images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    "test labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
"""Of the uint8 values, images `[60000 or 10000, 28, 28]` and labels `[60000 or 10000]`, without the header of idx."""
CLASSES = (
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

Arrays = Mapping[str, UInt8[np.ndarray, "..."]]


def read_fashion_mnist(spec: ImagesSpec) -> Source:
    """Fashion-MNIST from `path` alone if that is given, else from Debian's package if installed, else from the Hub.

    Raises:
        ZooError: if it is in none of these places, damaged, or other images than Fashion-MNIST.
    """
    if spec.path:
        arrays, place = _read_folder(Path(spec.path), "choose another `path`, or drop it"), "path"
        advice = (
            f"for images of your own set `source: folder` or `source: hf:<id or path>`; else drop `path: {spec.path}`"
        )
    elif PACKAGE_FOLDER.is_dir():
        advice = f"install Debian's `{PACKAGE}` again"
        arrays, place = _read_folder(PACKAGE_FOLDER, advice), f"Debian's {PACKAGE}"
    else:
        advice = f"run `apt install {PACKAGE}`, or set `path` to a folder with its four idx .gz files"
        arrays, place = _read_hub(advice), f"the Hub's {HUB_ID}"
    _check(arrays, place, advice)
    images = np.concatenate([arrays["train images"], arrays["test images"]])
    labels = np.concatenate([arrays["train labels"], arrays["test labels"]])
    return Source(
        torch.from_numpy(images).unsqueeze(1),
        torch.from_numpy(labels).long(),
        CLASSES,
        "MIT",
        len(arrays["test labels"]),
        origin=place,
        sha256=dict(SHA256),
    )


def _check(arrays: Arrays, place: str, advice: str) -> None:
    """Refuse other bytes than those of Fashion-MNIST, whichever way they came."""
    for part, expected in SHA256.items():
        digest = hashlib.sha256(np.ascontiguousarray(arrays[part]).data).hexdigest()
        if digest != expected:
            raise ZooError(
                f"images 'fashion-mnist': the {part} from {place} are not those of Fashion-MNIST (SHA-256"
                f" {digest[:12]}…, expected {expected[:12]}…): {advice}"
            )


def _read_folder(folder: Path, advice: str) -> dict[str, UInt8[np.ndarray, "..."]]:
    """The arrays by the names in `SHA256`, from four idx files."""
    arrays = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        for kind, ending in (("images", "images-idx3"), ("labels", "labels-idx1")):
            file = folder / f"{stem}-{ending}-ubyte.gz"
            if not file.is_file():
                raise ZooError(f"images 'fashion-mnist' need {file.name} in {folder}: {advice}")
            arrays[f"{part} {kind}"] = read_idx(file)
        count, labelled = len(arrays[f"{part} images"]), len(arrays[f"{part} labels"])
        if count != labelled:
            raise ZooError(f"the {part} files in {folder} have {count} images and {labelled} labels: get them again")
    return arrays


def read_idx(file: Path) -> UInt8[np.ndarray, "..."]:
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


def _read_hub(advice: str) -> dict[str, UInt8[np.ndarray, "..."]]:
    """The arrays by the names in `SHA256`, decoded from the PNG files of the Hub's dataset, or its cached copy."""
    import datasets

    try:
        parts = datasets.load_dataset(HUB_ID)
        arrays = {}
        for part in ("train", "test"):
            arrays[f"{part} images"] = np.stack([np.asarray(image) for image in parts[part]["image"]])
            arrays[f"{part} labels"] = np.array(parts[part]["label"][:], dtype=np.uint8)
    except Exception as error:  # of `datasets`, the Hub's client, pyarrow and Pillow, which share no base class
        raise ZooError(
            f"images 'fashion-mnist' are neither in {PACKAGE_FOLDER} nor to be had from the Hub's {HUB_ID!r}"
            f" ({type(error).__name__}: {one_line(error)}): {advice}, or run once with a connection to the Hub"
        ) from None
    return arrays
