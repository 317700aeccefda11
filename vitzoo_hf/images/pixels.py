"""The pixels of an image set by position: prepared in memory, small ones in memory as they are, or on demand.

All three have `sizes`, `evaluation` (images as models are evaluated on them) and `crops` (boxes of the original
images), uint8.
"""

import hashlib
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.images.crops import resized_crops
from vitzoo_hf.images.on_demand import OnDemandImages
from vitzoo_hf.images.preparation import prepare, with_channels
from vitzoo_hf.read_ahead import mapped_ahead

PREPARED_LIMIT = 4_000_000_000
"""Bytes; where prepared images would take more, `decode: auto` makes them on demand."""


@dataclass(frozen=True)
class PreparedImages:
    """Images prepared once, in memory: what a crop can be cut from is the prepared image."""

    images: UInt8[Tensor, "N C S S"]
    spec: ImagesSpec

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """Channels of the images a model is fed."""
        return self.images.shape[1]

    def signature(self) -> bytes:
        """Changes with any pixel."""
        return _digest(self.images)

    def sizes(self, positions: Int64[Tensor, " n"]) -> Int64[Tensor, "n 2"]:
        """Height and width of the images that crops are cut from."""
        return torch.tensor(self.images.shape[2:]).expand(len(positions), 2)

    def evaluation(self, positions: Int64[Tensor, " n"]) -> UInt8[Tensor, "n C S S"]:
        """Images as models are evaluated on them."""
        return self.images[positions]

    def crops(self, positions: Int64[Tensor, " n"], boxes: Float64[Tensor, "n 4"]) -> UInt8[Tensor, "n C S S"]:
        """The box (left, top, right, bottom) of each image, resized to the size of the set."""
        return resized_crops(self.images[positions], boxes, self.spec.size, self.spec.interpolation)


@dataclass(frozen=True)
class SmallImages:
    """Images of one size, in memory as they came; prepared or cropped for each batch on the device they are on."""

    images: UInt8[Tensor, "N C h w"]
    spec: ImagesSpec

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """Channels of the images a model is fed."""
        return self.spec.channels or self.images.shape[1]

    def signature(self) -> bytes:
        """Changes with any pixel."""
        return _digest(self.images)

    def sizes(self, positions: Int64[Tensor, " n"]) -> Int64[Tensor, "n 2"]:
        """Height and width of the images that crops are cut from."""
        return torch.tensor(self.images.shape[2:]).expand(len(positions), 2)

    def evaluation(self, positions: Int64[Tensor, " n"]) -> UInt8[Tensor, "n C S S"]:
        """Images as `preparation.prepare` makes them."""
        return prepare(self.images[positions], self.spec)

    def crops(self, positions: Int64[Tensor, " n"], boxes: Float64[Tensor, "n 4"]) -> UInt8[Tensor, "n C S S"]:
        """The box (left, top, right, bottom) of each image, resized to the size of the set."""
        images = with_channels(self.images[positions], self.spec)
        return resized_crops(images, boxes, self.spec.size, self.spec.interpolation)


def _digest(images: Tensor) -> bytes:
    """Hash shape and pixels, without another copy of them."""
    sha = hashlib.sha256(f"{tuple(images.shape)}".encode())
    # in parts: only one part at a time is handled beside the images
    for part in images.contiguous().flatten(1).split(1024):
        sha.update(part.numpy().data)
    return sha.digest()


Pixels = PreparedImages | SmallImages | OnDemandImages


@dataclass(frozen=True)
class Source:
    """Images as a source gives them, uint8 `[N, C, H, W]` or encoded, and labels `[N]`; a test set comes last.

    `origin` names the place that images came from, and `sha256` the hashes of their arrays, for a source that can
    come from several places.
    """

    images: UInt8[Tensor, "N C H W"] | OnDemandImages
    labels: Int64[Tensor, " N"]
    class_names: tuple[str, ...]
    licence: str
    num_official_test: int = 0
    origin: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)


def pixels_of(source: Source, spec: ImagesSpec) -> Pixels:
    """The images of a source, kept as `spec.decode` says.

    Raises:
        ZooError: if an image cannot be decoded or prepared.
    """
    images = source.images
    if not _on_demand(images, spec):
        if isinstance(images, OnDemandImages):
            return PreparedImages(images.evaluation(torch.arange(len(images))), spec)
        return PreparedImages(prepare(images, spec), spec)
    if isinstance(images, OnDemandImages):
        return _small(images, spec) or images
    prepare(images[:1], spec)  # what cannot be prepared is told now
    return SmallImages(images, spec)


def _on_demand(images: Tensor | OnDemandImages, spec: ImagesSpec) -> bool:
    if spec.decode != "auto":
        return spec.decode == "on_demand"
    channels = images.channels if isinstance(images, OnDemandImages) else spec.channels or images.shape[1]
    return len(images) * channels * spec.size**2 > PREPARED_LIMIT


def _small(images: OnDemandImages, spec: ImagesSpec) -> SmallImages | None:
    """All images at their own size, if all have the same, no larger than the prepared one, and memory has room."""
    if len(images) == 0:
        return None
    # about 64 headers rule out most sets of mixed sizes before anything is decoded
    sample = torch.arange(len(images))[:: max(len(images) // 64, 1)]
    height, width = images.sizes(sample[:1])[0].tolist()
    shape = (len(images), images.channels, height, width)
    too_large = len(images) * images.channels * height * width > PREPARED_LIMIT
    if too_large or height * width > spec.size**2 or len(images.sizes(sample).unique(dim=0)) > 1:
        return None
    pixels = torch.empty(shape, dtype=torch.uint8)
    threads = images.num_threads
    originals = mapped_ahead(images.original, range(len(images)), threads=threads, ahead=2 * threads)
    for position, image in enumerate(originals):
        # the sample may have missed the one image of another size
        if image.shape[:2] != (height, width):
            return None
        # a copy: arrays of Pillow are read-only, which torch warns about
        pixels[position] = torch.from_numpy(image.copy()).permute(2, 0, 1)
    return SmallImages(pixels, spec)
