"""Images in the shapes of Fashion-MNIST that stand in for it, with the hash check pointed at them."""

import gzip
import hashlib
import io
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from vitzoo_hf.images import fashion_mnist

HUB_CLASSES = ["T - shirt / top", *fashion_mnist.CLASSES[1:]]
"""As the Hub's dataset spells them."""

Arrays = dict[str, np.ndarray]


def stand_in(num_train: int, num_test: int) -> Arrays:
    """Deterministic images whose pixels are blocks of 4×4, and as many of every class as can be."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", num_train), ("test", num_test)):
        blocks = generator.integers(0, 256, (count, 7, 7), dtype=np.uint8)
        arrays[f"{part} images"] = blocks.repeat(4, axis=1).repeat(4, axis=2)
        arrays[f"{part} labels"] = (np.arange(count) % 10).astype(np.uint8)
    return arrays


def hashes_of(arrays: Arrays) -> dict[str, str]:
    return {part: hashlib.sha256(values.tobytes()).hexdigest() for part, values in arrays.items()}


def write_idx(file: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    file.write_bytes(gzip.compress(header + values.tobytes(), compresslevel=1))


def write_idx_folder(folder: Path, arrays: Arrays) -> Path:
    """The four files that Debian's package has."""
    folder.mkdir(parents=True)
    for part, stem in (("train", "train"), ("test", "t10k")):
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", arrays[f"{part} images"])
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", arrays[f"{part} labels"])
    return folder


def write_hub_folder(folder: Path, arrays: Arrays) -> Path:
    """The Parquet files that the Hub's dataset has: `image`, a PNG, and `label`, a class."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=HUB_CLASSES)})
    for part in ("train", "test"):
        pictures = [{"bytes": _png(image), "path": None} for image in arrays[f"{part} images"]]
        columns = {"image": pictures, "label": arrays[f"{part} labels"].tolist()}
        file = folder / "fashion_mnist" / f"{part}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
    text = "---\nconfigs:\n- config_name: fashion_mnist\n  default: true\n  data_files:\n"
    for part in ("train", "test"):
        text += f"  - split: {part}\n    path: fashion_mnist/{part}-*\n"
    (folder / "README.md").write_text(f"{text}---\n")
    return folder


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def use(patch: pytest.MonkeyPatch, arrays: Arrays, folder: Path) -> None:
    """Make `folder` the place of Debian's package, and these arrays those that the hashes are of."""
    patch.setattr(fashion_mnist, "PACKAGE_FOLDER", folder)
    patch.setattr(fashion_mnist, "SHA256", hashes_of(arrays))
