"""Images that are decoded when a batch asks for them, in threads: sets too large for memory."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float64, Int64, UInt8
from PIL import ExifTags, Image
from torch import Tensor

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.preparation import prepare
from vitzoo_hf.read_ahead import mapped_ahead

DETAIL = 2
"""A JPEG is decoded at a half, a quarter or an eighth where a crop still has this many pixels for each it becomes."""
SIDEWAYS = 5
"""From this EXIF orientation on, width and height of the file are exchanged."""
Encoded = bytes | memoryview
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class OnDemandImages:
    """Encoded images as `datasets` keeps them, by position; nothing decoded is kept.

    Pixels depend on positions and boxes alone, whatever the number of threads.

    Args:
        files: Arrow column of `{bytes, path}`, memory-mapped as a rule.
        spec: how images are prepared.
        num_threads: decode in as many; by default one a processor.

    Raises:
        ZooError: for channels that cannot be had.
    """

    def __init__(self, files: pa.ChunkedArray, spec: ImagesSpec, num_threads: int | None = None) -> None:
        if spec.channels not in (None, 1, 3):
            raise ZooError(f"images {spec.source!r} have 3 channels; {spec.channels} cannot be made of them")
        self.channels = spec.channels or 3
        self.num_threads = num_threads or len(os.sched_getaffinity(0))
        self._files = files
        self.spec = spec
        self._mode = "L" if spec.channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self._files)

    def signature(self) -> bytes:
        """Changes with the number and the sizes of the encoded images."""
        # sizes alone: hashing every byte would read a set that is too large for memory
        sizes = pc.fill_null(pc.binary_length(pc.struct_field(self._files, "bytes")), -1)
        return hashlib.sha256(np.asarray(sizes.combine_chunks()).astype("<i8").tobytes()).digest()

    def sizes(self, positions: Int64[Tensor, " n"]) -> Int64[Tensor, "n 2"]:
        """Height and width of the original images, from their headers."""
        sizes = [self._read(position, _upright_size) for position in positions.tolist()]
        return torch.tensor(sizes, dtype=torch.int64).view(-1, 2)

    def evaluation(self, positions: Int64[Tensor, " n"]) -> UInt8[Tensor, "n C S S"]:
        """Images as `preparation.prepare` makes them.

        Raises:
            ZooError: naming the position of an image that cannot be decoded.
        """
        return self._gather(self._prepared, [(position,) for position in positions.tolist()])

    def crops(self, positions: Int64[Tensor, " n"], boxes: Float64[Tensor, "n 4"]) -> UInt8[Tensor, "n C S S"]:
        """The box (left, top, right, bottom) of each original image, resized to the size of the set.

        By Pillow's `Image.resize(size, box=box)`; a JPEG of which far more pixels would be decoded than are needed
        is decoded at a half, a quarter or an eighth (`Image.draft`).

        Raises:
            ZooError: naming the position of an image that cannot be decoded.
        """
        return self._gather(self._cropped, list(zip(positions.tolist(), boxes.tolist(), strict=True)))

    def original(self, position: int) -> UInt8[np.ndarray, "h w C"]:
        """A whole image at its own size.

        Raises:
            ZooError: if it cannot be decoded.
        """
        pixels = self._read(position, lambda encoded: np.asarray(self._in_mode(_decoded(encoded))))
        return np.atleast_3d(pixels)

    def _gather(self, function: Callable[..., Tensor], arguments: Sequence[tuple[object, ...]]) -> Tensor:
        size = self.spec.size
        gathered = torch.empty(len(arguments), self.channels, size, size, dtype=torch.uint8)
        images = mapped_ahead(
            lambda values: function(*values), arguments, threads=self.num_threads, ahead=2 * self.num_threads
        )
        for row, image in zip(gathered, images, strict=True):
            row.copy_(image)
        return gathered

    def _prepared(self, position: int) -> UInt8[Tensor, "C S S"]:
        pixels = torch.from_numpy(self.original(position).transpose(2, 0, 1).copy())
        return prepare(pixels.unsqueeze(0), self.spec)[0]

    def _cropped(self, position: int, box: list[float]) -> UInt8[Tensor, "C S S"]:
        image = self._read(position, partial(self._cut, box=box))
        return torch.from_numpy(np.atleast_3d(np.asarray(image)).copy()).permute(2, 0, 1)

    def _cut(self, encoded: Encoded, box: list[float]) -> Image.Image:
        size = self.spec.size
        image, scale = _reduced(encoded, min(box[2] - box[0], box[3] - box[1]) / (DETAIL * size))
        left, top, right, bottom = (value * scale for value in box)
        # a draft rounds its size, so that a scaled box may reach past the edge
        inside = (left, top, min(right, image.width), min(bottom, image.height))
        return self._in_mode(image).resize((size, size), FILTERS[self.spec.interpolation], inside)

    def _in_mode(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self._mode else _eight_bits(image).convert(self._mode)

    def _read(self, position: int, function: Callable[[Encoded], Any]) -> Any:
        """Apply `function` to an encoded image; errors name the position of the image."""
        entry = self._files[position]
        data, path = entry["bytes"].as_buffer(), entry["path"].as_py()
        try:
            return function(Path(path).read_bytes() if data is None else memoryview(data))
        except ZooError:
            raise
        except Exception as error:  # decoders raise whatever they like
            reason = " ".join(str(error).split("<")[0].split())[:200] or type(error).__name__
            named = f" ({Path(path).name})" if path else ""
            raise ZooError(
                f"image {position}{named} of {self.spec.source!r} cannot be decoded ({reason}):"
                " repair it or leave it out"
            ) from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as its upper 8; Pillow's own conversion makes everything above 255 white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r}, 32 bits without a range; save it with 8 or 16 bits")
    return image


def _opened(encoded: Encoded) -> Image.Image:
    """An image of which only the header is read."""
    return Image.open(io.BytesIO(encoded))


def _decoded(encoded: Encoded) -> Image.Image:
    """As `datasets` decodes it, turned upright."""
    import datasets

    # `datasets` itself, so that pixels are those of `load_dataset`
    return datasets.Image().decode_example({"bytes": encoded, "path": None})


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _upright_size(encoded: Encoded) -> tuple[int, int]:
    with _opened(encoded) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= SIDEWAYS else (height, width)


def _reduced(encoded: Encoded, factor: float) -> tuple[Image.Image, float]:
    """An image decoded at up to `1 / factor` of its size, where the format has that for free, and the scale."""
    if factor >= 2:
        image = _opened(encoded)
        width, height = image.size
        # a draft of an image that is turned would need its box turned too
        if image.format == "JPEG" and _orientation(image) == 1:
            drafted = image.draft(image.mode, (int(width / factor), int(height / factor)))
            return image, (drafted[1][2] / width if drafted else 1.0)
    return _decoded(encoded), 1.0
