"""Crops of many images of one size, resized at once on whatever device they are: two products a batch."""

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor


def resized_crops(
    images: UInt8[Tensor, "n C h w"], boxes: Float64[Tensor, "n 4"], size: int, interpolation: str
) -> UInt8[Tensor, "n C S S"]:
    """The box of each image, resized to `size` × `size` with antialiasing, rounded to uint8.

    The same as Pillow's `Image.resize((size, size), resample, box)`, up to rounding: pixels around the box count
    where the filter reaches them.

    Args:
        images: uint8 `[n, C, h, w]`.
        boxes: float64 `[n, 4]`, (left, top, right, bottom) within the images, in pixels.
        size: of the result.
        interpolation: `bilinear` or `bicubic`.

    Example:
        >>> images = torch.full((1, 3, 8, 8), 7, dtype=torch.uint8)
        >>> resized_crops(images, torch.tensor([[0.0, 0, 4, 4]]).double(), 16, "bicubic").unique().tolist()
        [7]
    """
    boxes = boxes.to(images.device)
    across = _weights(boxes[:, 0], boxes[:, 2], images.shape[3], size, interpolation)
    down = _weights(boxes[:, 1], boxes[:, 3], images.shape[2], size, interpolation)
    crops = down.unsqueeze(1) @ images.float() @ across.unsqueeze(1).mT
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
