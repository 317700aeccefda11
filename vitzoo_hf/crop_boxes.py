"""Which part of an image a random crop takes, drawn from sizes alone, before anything is decoded.

A box is (left, top, right, bottom) in pixels of the original image, float64. All draws come from the generator given
and are as many for every image, so a box depends on the image's place in the batch and on nothing else.
"""

import math

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vitzoo_hf.images_spec import ImagesSpec
from vitzoo_hf.preparation import crop_size, resized_size

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
    found = fits.any(1, keepdim=True)
    wide = torch.where(found, wide.gather(1, first), torch.minimum(width, (height * ASPECT[1]).round()))
    high_ = torch.where(found, high_.gather(1, first), torch.minimum(height, (width / ASPECT[0]).round()))
    left, top = ((width - wide) // 2, (height - high_) // 2)
    left = torch.where(found, (draws[:, -2:-1] * (width - wide + 1)).floor(), left)
    top = torch.where(found, (draws[:, -1:] * (height - high_ + 1)).floor(), top)
    return torch.cat([left, top, left + wide, top + high_], dim=1)


def placed_crop_boxes(sizes: Sizes, spec: ImagesSpec, generator: torch.Generator) -> Boxes:
    """The crop of `preparation.prepare` at a random place instead of the centre: Resize, then RandomCrop.

    Raises:
        ZooError: if `spec.crop` is larger than a resized image.
    """
    draws = torch.rand(len(sizes), 2, generator=generator, dtype=torch.float64).tolist()
    boxes = []
    for (height, width), (across, down) in zip(sizes.tolist(), draws, strict=True):
        tall, wide = resized_size(height, width, spec)
        crop = crop_size(tall, wide, spec)
        left, top = math.floor(across * (wide - crop + 1)), math.floor(down * (tall - crop + 1))
        x, y = width / wide, height / tall
        boxes.append([left * x, top * y, (left + crop) * x, (top + crop) * y])
    return torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
