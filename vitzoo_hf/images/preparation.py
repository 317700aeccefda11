"""Raw images -> images of one size and number of channels -> the standardized input of a model."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.format.schema import ZooError

Statistic = Any
"""One number, or one a channel; no sequence, for to check one, beartype draws from the generator that mixing uses."""


def prepare(images: UInt8[Tensor, "N C h w"], spec: ImagesSpec) -> UInt8[Tensor, "N C2 H W"]:
    """Resize, centre crop and resize again as `ImagesSpec` says, antialiased, rounded to uint8.

    Raises:
        ZooError: if the crop is larger than the images, or the channels cannot be had.
    """
    images = with_channels(images, spec)
    height, width = resized_size(images.shape[2], images.shape[3], spec)
    images = _resized(images, height, width, spec.interpolation)
    crop = crop_size(height, width, spec)
    top, left = (height - crop) // 2, (width - crop) // 2
    return _resized(images[..., top : top + crop, left : left + crop], spec.size, spec.size, spec.interpolation)


def resized_size(height: int, width: int, spec: ImagesSpec) -> tuple[int, int]:
    """Height and width once the shorter side is `spec.resize`."""
    if not spec.resize:
        return height, width
    scale = spec.resize / min(height, width)
    return round(height * scale), round(width * scale)


def crop_size(height: int, width: int, spec: ImagesSpec) -> int:
    """Side of the square that is cut from an image of this size.

    Raises:
        ZooError: if it is larger than the image.
    """
    crop = spec.crop or min(height, width)
    if crop > min(height, width):
        raise ZooError(
            f"images {spec.source!r} are {height}×{width}; crop {crop} does not fit: use at most their size"
        )
    return crop


def _resized(images: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images.contiguous()
    chunks = [
        torch.nn.functional.interpolate(chunk.float(), size=(height, width), mode=interpolation, antialias=True)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for chunk in images.split(4096)
    ]
    return torch.cat(chunks)


def with_channels(images: UInt8[Tensor, "N C h w"], spec: ImagesSpec) -> UInt8[Tensor, "N C2 h w"]:
    """The number of channels that `spec` asks for: grey repeated, or the luma of colours (ITU-R 601).

    Raises:
        ZooError: if they cannot be had.
    """
    channels, expected = images.shape[1], spec.channels or images.shape[1]
    if channels == expected:
        return images
    if channels == 1:
        return images.expand(-1, expected, -1, -1)
    if expected == 1 and channels == 3:
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
        return (images.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)
    raise ZooError(f"images {spec.source!r} have {channels} channels; {expected} cannot be made of them")


def normalize(images: UInt8[Tensor, "n C H W"], mean: Statistic, std: Statistic) -> Float[Tensor, "n C H W"]:
    """`(x / 255 − mean) / std` in float32; mean and std are one number, or one a channel.

    >>> normalize(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), 0.5, 0.5)
    tensor([[[[-1.,  1.]]]])
    """
    return standardize(images.float() / 255, mean, std)


def standardize(images: Float[Tensor, "n C H W"], mean: Statistic, std: Statistic) -> Float[Tensor, "n C H W"]:
    """`(x − mean) / std` of images in [0, 1]."""
    return (images - _per_channel(mean, images)) / _per_channel(std, images)


def _per_channel(value: Statistic, images: Tensor) -> float | Tensor:
    if isinstance(value, list | tuple):
        return torch.tensor(value, dtype=images.dtype, device=images.device).view(-1, 1, 1)
    return float(value)
