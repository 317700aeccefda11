"""The pixels of training batches: random views of images in memory, or of crops that are decoded ahead."""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.augment import CROPPED_SHARE, PLACED_CROP, augment
from vitzoo_hf.images.crops import placed_crop_boxes, resized_crop_boxes
from vitzoo_hf.images.on_demand import OnDemandImages
from vitzoo_hf.images.pixels import PreparedImages, SmallImages
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.read_ahead import mapped_ahead


class PreparedFeed:
    """Views of prepared images, which lie on the device: the crop is cut from the prepared image there.

    Raises:
        ZooError: if the augmentation crops at a random place, which prepared images have lost.
    """

    def __init__(self, images: Tensor, augmentation: str, device: str) -> None:
        if augmentation in PLACED_CROP:
            raise ZooError(
                f"augmentation {augmentation!r} cuts from images before preparation: set decode: on_demand"
            )
        self._images = images.to(device)
        self._augmentation = augmentation

    def batches(
        self, batches: Iterable[Int64[Tensor, " _"]], crops: torch.Generator
    ) -> Iterator[Int64[Tensor, " _"]]:
        """The batches as they are."""
        yield from batches

    def view(self, batch: Int64[Tensor, " B"], generator: torch.Generator) -> Float[Tensor, "B C S S"]:
        """A random view of the images at these positions, in [0, 1]."""
        return augment(self._images[batch].float() / 255, self._augmentation, generator)


class CroppingFeed:
    """Views of images that are made on demand: crops are cut from the original images, a batch ahead where decoded.

    Args:
        pixels: small images, which move to the device, or images to decode.
        positions: of the images that batches count through.
        views: how many views a batch will be asked for.
    """

    def __init__(
        self,
        pixels: SmallImages | OnDemandImages,
        positions: Int64[Tensor, " N"],
        augmentation: str,
        device: str,
        *,
        views: int,
    ) -> None:
        if isinstance(pixels, SmallImages):
            pixels = SmallImages(pixels.images.to(device), pixels.spec)
        self._pixels = pixels
        self._positions = positions
        self._augmentation = augmentation
        self._device = device
        self._num_views = views
        self._ready: deque[UInt8[Tensor, "B C S S"]] = deque()

    def batches(
        self, batches: Iterable[Int64[Tensor, " _"]], crops: torch.Generator
    ) -> Iterator[Int64[Tensor, " _"]]:
        """The batches, each once its crops are made; `crops`, a generator on the CPU, draws where they lie."""
        announced = [batch.cpu() for batch in batches]
        make = partial(self._crops, generator=crops)
        made = mapped_ahead(make, announced) if isinstance(self._pixels, OnDemandImages) else map(make, announced)
        for batch, views in zip(announced, made, strict=True):
            self._ready = deque(views)
            yield batch.to(self._device)

    def view(self, batch: Int64[Tensor, " B"], generator: torch.Generator) -> Float[Tensor, "B C S S"]:
        """The next random view of the batch that `batches` gave last, in [0, 1]."""
        crops = self._ready.popleft().to(self._device)
        return augment(crops.float() / 255, self._augmentation, generator, cropped=True)

    def _crops(self, batch: Int64[Tensor, " B"], generator: torch.Generator) -> list[UInt8[Tensor, "B C S S"]]:
        positions = self._positions[batch]
        return [self._crop(positions, generator) for _ in range(self._num_views)]

    def _crop(self, positions: Int64[Tensor, " B"], generator: torch.Generator) -> UInt8[Tensor, "B C S S"]:
        pixels = self._pixels
        if self._augmentation in CROPPED_SHARE:
            share = CROPPED_SHARE[self._augmentation]
            return pixels.crops(positions, resized_crop_boxes(pixels.sizes(positions), share, generator))
        if self._augmentation in PLACED_CROP:
            return pixels.crops(positions, placed_crop_boxes(pixels.sizes(positions), pixels.spec, generator))
        return pixels.evaluation(positions)


def make_feed(
    images: ImageSet, augmentation: str, device: str, *, role: str = "train", views: int = 1
) -> PreparedFeed | CroppingFeed:
    """The feed of one role of an image set; batches are positions among the images of that role."""
    if isinstance(images.pixels, PreparedImages):
        return PreparedFeed(images.part(role)[0], augmentation, device)
    return CroppingFeed(images.pixels, images.positions(role), augmentation, device, views=views)
