"""Boxes of random crops, drawn from image sizes alone before anything is decoded; and the crops, cut and resized.

Many images of one size are resized at once on whatever device they are: two products a batch.

A box is (left, top, right, bottom) in pixels of the original image, float64. All draws come from the generator given
and are as many for every image, so a box depends on the image's place in the batch and on nothing else.
"""

import math

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.images.preparation import crop_size, resized_size

TRIES = 10
ASPECT = (3 / 4, 4 / 3)
Sizes = Int64[Tensor, "n 2"]
Boxes = Float64[Tensor, "n 4"]


def resized_crop_boxes(sizes: Sizes, smallest: float, generator: torch.Generator) -> Boxes:
    """`smallest` to 1 of the area at an aspect ratio of 3/4 to 4/3, as ImageNet training does.

    Szegedy et al. 2015 (Going deeper with convolutions, section 6), by the rules of torchvision's RandomResizedCrop:
    the first of ten draws that fits, else the largest centred crop with an aspect ratio in bounds.

    Args:
        sizes: int64 `[n, 2]`, height and width.
        smallest: share of the area, above 0 and at most 1.
        generator: on the CPU.

    Example:
        >>> resized_crop_boxes(torch.tensor([[30, 40]]), 1.0, torch.Generator().manual_seed(0)).tolist()
        [[0.0, 0.0, 40.0, 30.0]]
    """
    draws = torch.rand(len(sizes), 2 * TRIES + 2, generator=generator, dtype=torch.float64)
    height, width = sizes.double().unsqueeze(-1).unbind(1)
    area = height * width * (smallest + (1 - smallest) * draws[:, :TRIES])
    low, high = (math.log(bound) for bound in ASPECT)
    aspect = (low + (high - low) * draws[:, TRIES : 2 * TRIES]).exp()
    wide, high_ = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (wide >= 1) & (high_ >= 1) & (wide <= width) & (high_ <= height)
    first = fits.long().argmax(1, keepdim=True)
    any_fits = fits.any(1, keepdim=True)
    wide = torch.where(any_fits, wide.gather(1, first), torch.minimum(width, (height * ASPECT[1]).round()))
    high_ = torch.where(any_fits, high_.gather(1, first), torch.minimum(height, (width / ASPECT[0]).round()))
    left, top = ((width - wide) // 2, (height - high_) // 2)
    left = torch.where(any_fits, (draws[:, -2:-1] * (width - wide + 1)).floor(), left)
    top = torch.where(any_fits, (draws[:, -1:] * (height - high_ + 1)).floor(), top)
    return torch.cat([left, top, left + wide, top + high_], dim=1)


def placed_crop_boxes(sizes: Sizes, spec: ImagesSpec, generator: torch.Generator) -> Boxes:
    """The crop of `preparation.prepare` at a random place instead of the centre: Resize, then RandomCrop.

    Raises:
        ZooError: if `spec.crop` is larger than a resized image.
    """
    draws = torch.rand(len(sizes), 2, generator=generator, dtype=torch.float64).tolist()
    boxes = []
    for (height, width), (right_share, down_share) in zip(sizes.tolist(), draws, strict=True):
        tall, wide = resized_size(height, width, spec)
        crop = crop_size(tall, wide, spec)
        left, top = math.floor(right_share * (wide - crop + 1)), math.floor(down_share * (tall - crop + 1))
        x, y = width / wide, height / tall
        boxes.append([left * x, top * y, (left + crop) * x, (top + crop) * y])
    return torch.tensor(boxes, dtype=torch.float64).view(-1, 4)


def resized_crops(
    images: UInt8[Tensor, "n C h w"], boxes: Float64[Tensor, "n 4"], size: int, interpolation: str
) -> UInt8[Tensor, "n C S S"]:
    """The box of each image, resized to `size` × `size` with antialiasing, rounded to uint8.

    Equal to Pillow's `Image.resize((size, size), resample, box)`, up to rounding: pixels around the box count
    where the filter reaches them.

    Args:
        images: uint8 `[n, C, h, w]`.
        boxes: float64 `[n, 4]`, (left, top, right, bottom) within the images, in pixels.
        size: height and width of the result.
        interpolation: `bilinear` or `bicubic`.

    Example:
        >>> images = torch.full((1, 3, 8, 8), 7, dtype=torch.uint8)
        >>> resized_crops(images, torch.tensor([[0.0, 0, 4, 4]]).double(), 16, "bicubic").unique().tolist()
        [7]
    """
    boxes = boxes.to(images.device)
    horizontal = _weights(boxes[:, 0], boxes[:, 2], images.shape[3], size, interpolation)
    vertical = _weights(boxes[:, 1], boxes[:, 3], images.shape[2], size, interpolation)
    crops = vertical.unsqueeze(1) @ images.float() @ horizontal.unsqueeze(1).mT
    return crops.round_().clamp_(0, 255).to(torch.uint8)


def _weights(
    start: Float64[Tensor, " n"], end: Float64[Tensor, " n"], length: int, size: int, interpolation: str
) -> Float[Tensor, "n S length"]:
    """What each of `length` pixels in a row gives to each of `size` new ones between `start` and `end`."""
    scale = ((end - start) / size).view(-1, 1, 1)
    places = torch.arange(size, device=start.device, dtype=torch.float64).view(1, -1, 1) + 0.5
    pixels = torch.arange(length, device=start.device, dtype=torch.float64) + 0.5
    distance = ((pixels - start.view(-1, 1, 1) - places * scale) / scale.clamp(min=1)).abs()
    weights = FILTERS[interpolation](distance)
    return (weights / weights.sum(-1, keepdim=True)).float()


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = −0.5 (Keys 1981), Pillow's and torch's antialiased bicubic."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0))


FILTERS = {"bilinear": _triangle, "bicubic": _cubic}
