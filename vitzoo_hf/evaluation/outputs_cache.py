"""Logits and features of models on images, kept on disk, so that an evaluation continues and is not done twice.

The name of an entry is a hash of all that determines it: the weights, the architecture, the precision and the images.
An entry appears whole or not at all, and is compared with its hashes before it counts as present.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError, fingerprint
from vitzoo_hf.models.architecture import Architecture

PARTS = ("logits", "features")
RECORD = "record.json"


def digest_of(images: Float[Tensor, "N channels H W"]) -> str:
    """Hash of normalised images: dtype, shape and values.

    >>> digest_of(torch.zeros(1, 1, 2, 2)) == digest_of(torch.zeros(1, 1, 4, 1))
    False
    """
    values = np.ascontiguousarray(images.cpu().numpy())
    return hashlib.sha256(f"{values.dtype.str}{values.shape}".encode() + values.tobytes()).hexdigest()


class OutputsCache:
    """Outputs of models in a folder.

    Args:
        folder: the folder, created with the first entry.
        precision: the precision that the models run in.
    """

    def __init__(self, folder: Path, precision: str) -> None:
        self.folder, self.precision = folder, precision

    @classmethod
    @contextmanager
    def opened(cls, folder: Path | None, precision: str) -> Iterator["OutputsCache"]:
        """A cache in a folder, which stays, or for None in a folder that is deleted at the end."""
        if folder is not None:
            yield cls(folder, precision)
            return
        with tempfile.TemporaryDirectory(prefix="vitzoo-evaluate-") as temporary:
            yield cls(Path(temporary), precision)

    def place(self, row: RowLike, digest: str) -> Path:
        """The folder of the outputs of a row's model on images of this hash."""
        row = Row.of(row)
        kind = [row[name] for name in ("weights_sha256", "architecture", "architecture_args", "head", "head_hidden")]
        return self.folder / digest[:32] / fingerprint([*map(str, kind), self.precision], 32)

    def has(self, row: RowLike, digest: str) -> bool:
        """Whether the outputs of a row's model on images of this hash are present and undamaged."""
        place = self.place(row, digest)
        try:
            record = json.loads((place / RECORD).read_text())
            return all(_sha256(place / f"{part}.npy") == record[part] for part in PARTS)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def read(self, row: RowLike, digest: str, part: str) -> Tensor:
        """`logits` `[N, C]` or `features` `[N, F]`, float32."""
        return torch.from_numpy(np.load(self.place(row, digest) / f"{part}.npy"))

    def write(self, row: RowLike, digest: str, parts: Mapping[str, np.ndarray]) -> None:
        """Write the outputs of a row's model on images of this hash.

        Raises:
            ZooError: if the folder cannot be written.
        """
        place = self.place(row, digest)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(dir=place.parent, prefix=".tmp-"))
            try:
                for name in PARTS:
                    np.save(fresh / f"{name}.npy", parts[name])
                record = {name: _sha256(fresh / f"{name}.npy") for name in PARTS}
                (fresh / RECORD).write_text(json.dumps(record))
                shutil.rmtree(place, ignore_errors=True)
                fresh.rename(place)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        except OSError as error:
            raise ZooError(
                f"cannot keep outputs in {self.folder} ({error.strerror}): make room there, or name another place;"
                " what is measured stays, and the same command continues"
            ) from None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Normalised images with labels, and the hash under which a cache keeps outputs on these images."""

    images: Float[Tensor, "N channels H W"]
    labels: Int64[Tensor, " N"]
    digest: str

    @classmethod
    def of(cls, images: Tensor, labels: Tensor) -> "ImageBatch":
        """Images with their hash.

        Raises:
            ZooError: for images that are not float32 `[N, C, H, W]` and finite, or not one whole label for each.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.float32 or images.ndim != 4 or not len(images):
            raise ZooError(f"images are {_described(images)}; expected a float32 tensor [N, C, H, W], normalised")
        if not images.isfinite().all():
            raise ZooError("NaN or infinite values among the images")
        is_whole = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
        if not is_whole or labels.shape != images.shape[:1] or int(labels.min()) < 0:
            raise ZooError(
                f"labels are {_described(labels)}; expected a tensor of {len(images)} integers from 0, one an image"
            )
        return cls(images, labels.long(), digest_of(images))

    def check_classes(self, rows: Sequence[RowLike]) -> None:
        """Refuse labels that a classifier does not know.

        Raises:
            ZooError: naming the first model that knows fewer classes.
        """
        highest = int(self.labels.max())
        for row in map(Row.of, rows):
            classes = Architecture.of(row).args.get("num_classes")
            if classes is not None and highest >= classes:
                raise ZooError(
                    f"labels go up to {highest}, but {row.model_id} knows {classes} classes: give images of those"
                )


def _described(values: object) -> str:
    if not isinstance(values, Tensor):
        return f"a {type(values).__name__}"
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
