"""The one route of an image from its set to a training step: positions of a batch, and random views of its images.

Costs: prepared images lie on the device and are gathered there; images on demand are decoded one batch ahead.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.augment import CROPPED_SHARE, PLACED_CROP, augment
from vitzoo_hf.images.crops import placed_crop_boxes, resized_crop_boxes
from vitzoo_hf.images.on_demand import OnDemandImages
from vitzoo_hf.images.pixels import PreparedImages, SmallImages
from vitzoo_hf.images.preparation import standardize
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.read_ahead import mapped_ahead
from vitzoo_hf.training.seeds import GlobalDraws, derive_seed

Positions = Int64[Tensor, "P _"]
"""Positions `[P, B]` of the images of one batch, for each of P models; the last batch of an epoch may be smaller."""


@dataclass
class Draws:
    """The random generators of P models during one epoch, each seeded as if its run trained alone.

    Attributes:
        views: P generators of random views, on the training device.
        crops: P generators of crop boxes, on the CPU.
        mixing: P states of the global generators where models share a process and mix or erase images; else empty.
    """

    views: list[torch.Generator]
    crops: list[torch.Generator]
    mixing: list[GlobalDraws]

    @classmethod
    def of(cls, seeds: Sequence[int], epoch: int, device: str, *, mixes: bool = False) -> "Draws":
        """The generators of runs with these seeds in one epoch; `mixes` adds states of the global generators."""
        return cls(
            # a seed for each purpose: a policy that draws more views moves neither crops nor mixing
            views=[torch.Generator(device).manual_seed(derive_seed(seed, "views", epoch)) for seed in seeds],
            crops=[torch.Generator().manual_seed(derive_seed(seed, "crops", epoch)) for seed in seeds],
            mixing=[GlobalDraws(derive_seed(seed, "mix", epoch), device) for seed in seeds if mixes],
        )

    @classmethod
    def fixed(cls, device: str) -> "Draws":
        """The generators of one model whose views are to be equal in every epoch and run."""
        seed = derive_seed(0, "fixed views")
        views, crops = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)
        return cls(views=[views], crops=[crops], mixing=[])


class FedBatch(NamedTuple):
    """A batch of images for each of P models, as the models are fed it.

    Attributes:
        positions: int64 `[P, B]`, positions among the images of the feed.
        inputs: float32 `[P, VB, C, S, S]`, V standardized views of every image: all first views, then all second.
    """

    positions: Tensor
    inputs: Tensor


class Feed(ABC):
    """Random, standardized views of the images at given positions.

    Args:
        spec: mean and standard deviation of the images.
        augmentation: the policy of `vitzoo_hf.images.augment.augment`.
        views: number of views of every image.
    """

    cropped = False
    """Whether `_images` gives random crops, so that augmentation must not crop again."""
    ahead = False
    """Whether the images of the next batch are made in a thread while a batch trains."""

    def __init__(self, spec: ImagesSpec, augmentation: str, views: int) -> None:
        self._spec, self._augmentation, self._num_views = spec, augmentation, views

    def batches(self, batches: Sequence[Positions], draws: Draws) -> Iterator[FedBatch]:
        """Feed these batches in order.

        Args:
            batches: int64 `[P, B]` on the training device, one tensor a batch.
            draws: generators of the P models; batches draw from them in order, so that views can be repeated.

        Raises:
            ZooError: if an image cannot be decoded.
        """
        make = partial(self._images, draws=draws)
        # one thread, so that batches draw in their order
        all_images = mapped_ahead(make, batches) if self.ahead else map(make, batches)
        for positions, images in zip(batches, all_images, strict=True):
            # as uint8, a quarter of the bytes of floats
            pixels = images.to(positions.device)
            pixels = pixels if pixels.is_floating_point() else pixels.float() / 255
            views = [self._view(view, draws).unflatten(0, positions.shape) for view in pixels]
            # concatenating copies, which a single view need not
            yield FedBatch(positions, views[0] if len(views) == 1 else torch.cat(views, 1))

    def _view(self, pixels: Float[Tensor, "PB C S S"], draws: Draws) -> Float[Tensor, "PB C S S"]:
        if len(pixels) > 0:  # a Poisson sample may be empty, which convolutions of policies refuse
            pixels = augment(pixels, self._augmentation, *draws.views, cropped=self.cropped)
        return standardize(pixels, self._spec.mean, self._spec.std)

    # no sequence among the types of `_images`: beartype draws from `random` to check one, and so does erasing
    @abstractmethod
    def _images(self, positions: Positions, draws: Draws) -> Shaped[Tensor, "V PB C S S"]:
        """The images that the V views of a batch are made of: uint8, or floats in [0, 1]."""


class PreparedFeed(Feed):
    """Views of prepared images on the device, from which augmentation cuts its crops.

    Args:
        images: uint8 `[N, C, S, S]`.
        spec: how the images were prepared.
        augmentation: the policy of `vitzoo_hf.images.augment.augment`.
        device: where to train.
        views: number of views of every image.

    Raises:
        ZooError: if the augmentation cuts from images before preparation, which prepared images no longer have.
    """

    def __init__(
        self, images: UInt8[Tensor, "N C S S"], spec: ImagesSpec, augmentation: str, device: str, views: int
    ) -> None:
        if augmentation in PLACED_CROP:
            raise ZooError(
                f"augmentation {augmentation!r} cuts from images before preparation: set decode: on_demand"
            )
        super().__init__(spec, augmentation, views)
        self._pixels = images.to(device)

    def _images(self, positions: Positions, draws: Draws) -> UInt8[Tensor, "V PB C S S"]:
        pixels = self._pixels[positions.flatten()]
        return pixels.expand(self._num_views, *pixels.shape)


class CroppingFeed(Feed):
    """Views of images that are made on demand: every view is cut from the original image.

    Args:
        pixels: small images, which move to the device, or images to decode.
        positions: int64 `[N]`, positions in `pixels` of the images that batches count through.
        augmentation: the policy of `vitzoo_hf.images.augment.augment`.
        device: where to train.
        views: number of views of every image.
    """

    cropped = True

    def __init__(
        self,
        pixels: SmallImages | OnDemandImages,
        positions: Int64[Tensor, " N"],
        augmentation: str,
        device: str,
        views: int,
    ) -> None:
        super().__init__(pixels.spec, augmentation, views)
        if isinstance(pixels, SmallImages):
            pixels = SmallImages(pixels.images.to(device), pixels.spec)
        self._pixels, self._positions = pixels, positions
        # only decoding is worth a thread: small images are cut on the training device
        self.ahead = isinstance(pixels, OnDemandImages)

    def _images(self, positions: Positions, draws: Draws) -> UInt8[Tensor, "V PB C S S"]:
        places = self._positions[positions.cpu()]
        views = []
        for _ in range(self._num_views):
            models = zip(places, draws.crops, strict=True)
            views.append(torch.cat([self._crop(model_places, generator) for model_places, generator in models]))
        return torch.stack(views)

    def _crop(self, positions: Int64[Tensor, " B"], generator: torch.Generator) -> UInt8[Tensor, "B C S S"]:
        pixels = self._pixels
        if self._augmentation in CROPPED_SHARE:
            share = CROPPED_SHARE[self._augmentation]
            return pixels.crops(positions, resized_crop_boxes(pixels.sizes(positions), share, generator))
        if self._augmentation in PLACED_CROP:
            return pixels.crops(positions, placed_crop_boxes(pixels.sizes(positions), pixels.spec, generator))
        return pixels.evaluation(positions)


def make_feed(images: ImageSet, augmentation: str, device: str, *, role: str = "train", views: int = 1) -> Feed:
    """The feed of one role of an image set; batches are positions among the images of that role."""
    if isinstance(images.pixels, PreparedImages):
        return PreparedFeed(images.part(role)[0], images.spec, augmentation, device, views)
    return CroppingFeed(images.pixels, images.positions(role), augmentation, device, views)
