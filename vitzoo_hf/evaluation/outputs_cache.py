"""Logits and features of models on images, kept on disk, so that an evaluation continues and is not done twice.

An entry is found by what determines it: the hash of the weights, the architecture, the precision and the hash of the
images. It appears whole or not at all, and is compared with its own hashes when it is read.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.format.schema import ZooError, fingerprint

PARTS = ("logits", "features")
RECORD = "record.json"


def digest_of(images: Float[Tensor, "N C H W"]) -> str:
    """Hash of images as models are fed them: dtype, shape and values.

    >>> digest_of(torch.zeros(1, 1, 2, 2)) == digest_of(torch.zeros(1, 1, 4, 1))
    False
    """
    values = np.ascontiguousarray(images.cpu().numpy())
    return hashlib.sha256(f"{values.dtype.str}{values.shape}".encode() + values.tobytes()).hexdigest()


class OutputsCache:
    """Outputs of models in a folder.

    Args:
        folder: made where it is missing.
        precision: that the models run in.
    """

    def __init__(self, folder: Path, precision: str) -> None:
        self.folder, self.precision = folder, precision

    @classmethod
    @contextmanager
    def opened(cls, folder: Path | None, precision: str) -> Iterator["OutputsCache"]:
        """A cache in a folder, which stays, or in a temporary one for None."""
        if folder is not None:
            yield cls(folder, precision)
            return
        with tempfile.TemporaryDirectory(prefix="vitzoo-evaluate-") as temporary:
            yield cls(Path(temporary), precision)

    def place(self, row: Mapping[str, Any], digest: str) -> Path:
        """Where the outputs of a row's model on images of this hash are."""
        kind = [row[name] for name in ("weights_sha256", "architecture", "architecture_args", "head", "head_hidden")]
        return self.folder / digest[:32] / fingerprint([*map(str, kind), self.precision], 32)

    def has(self, row: Mapping[str, Any], digest: str) -> bool:
        """Whether whole outputs are there."""
        place = self.place(row, digest)
        try:
            record = json.loads((place / RECORD).read_text())
            return all(_sha256(place / f"{part}.npy") == record[part] for part in PARTS)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def read(self, row: Mapping[str, Any], digest: str, part: str) -> Tensor:
        """`logits` `[N, K]` or `features` `[N, F]`, float32."""
        return torch.from_numpy(np.load(self.place(row, digest) / f"{part}.npy"))

    def write(self, row: Mapping[str, Any], digest: str, parts: Mapping[str, np.ndarray]) -> None:
        """Keep the outputs of a model.

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
    """Images as models are fed them, with labels and the hash by which a cache finds their outputs."""

    images: Float[Tensor, "N C H W"]
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
        whole = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
        if not whole or labels.shape != images.shape[:1] or int(labels.min()) < 0:
            raise ZooError(
                f"labels are {_described(labels)}; expected a tensor of {len(images)} integers from 0, one an image"
            )
        return cls(images, labels.long(), digest_of(images))

    def check_classes(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse labels that a classifier does not know.

        Raises:
            ZooError: naming the first such model.
        """
        highest = int(self.labels.max())
        for row in rows:
            outputs = json.loads(row["architecture_args"]).get("num_classes")
            if outputs is not None and highest >= outputs:
                raise ZooError(
                    f"labels go up to {highest}, but {row['model_id']} knows {outputs} classes: give images of those"
                )


def _described(values: Any) -> str:
    if not isinstance(values, Tensor):
        return f"a {type(values).__name__}"
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
