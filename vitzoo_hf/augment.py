"""Random views of a batch of images, drawn per image, on whatever device the images are.

Images are float `[B, C, H, W]` in [0, 1]; every draw comes from the generator given, so a view is reproducible.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from vitzoo_hf.schema import ZooError, did_you_mean

Batch = Float[Tensor, "B C H W"]
Crop = Callable[[Tensor, float, torch.Generator], Tensor]
CROPPED_SHARE = {"crop": 0.6, "crop-flip": 0.08, "simclr": 0.2, "simclr-no-flip": 0.2}
"""The least share of the area that the random resized crop of a policy keeps."""
PLACED_CROP = ("random-crop-flip",)
"""Policies that take the crop of preparation at a random place; cut before `augment`, from the original images."""


def augment(images: Batch, policy: str, generator: torch.Generator, *, cropped: bool = False) -> Batch:
    """One random view of every image.

    Args:
        images: float `[B, C, H, W]` in [0, 1].
        policy: `none`; `crop` (random resized crop of 60–100 % of the area); `crop-flip` (8–100 %, horizontal
            flip, as in ImageNet training); `random-crop-flip` (the crop of preparation at a random place, flip),
            for images that are `cropped`; `simclr` (Chen et al. 2020: 20–100 % crop, flip, colour jitter,
            greyscale, blur); `simclr-no-flip` for images whose mirror image means something else, such as digits.
        generator: on the images' device.
        cropped: whether the images are random crops already: then the rest of the policy is applied.

    Raises:
        ZooError: for an unknown policy.

    Example:
        >>> batch = torch.rand(4, 1, 16, 16)
        >>> augment(batch, "crop", torch.Generator().manual_seed(0)).shape
        torch.Size([4, 1, 16, 16])
    """
    if policy not in POLICIES:
        raise ZooError(f"unknown augmentation {policy!r}: {did_you_mean(policy, POLICIES)}")
    return POLICIES[policy](images, generator, _whole if cropped else _resized_crop)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def _resized_crop(images: Batch, smallest: float, generator: torch.Generator) -> Batch:
    """A crop of `smallest` to 1 of the area with aspect ratio 3/4 to 4/3, stretched back to the full size."""
    count = len(images)
    side = _uniform(count, smallest, 1.0, generator).sqrt()
    aspect = _uniform(count, -0.2877, 0.2877, generator).exp().sqrt()
    width, height = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    theta = torch.zeros(count, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2] = _uniform(count, -1.0, 1.0, generator) * (1 - width)
    theta[:, 1, 2] = _uniform(count, -1.0, 1.0, generator) * (1 - height)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _whole(images: Batch, smallest: float, generator: torch.Generator) -> Batch:
    return images


def _flip(images: Batch, generator: torch.Generator) -> Batch:
    chosen = _uniform(len(images), 0.0, 1.0, generator) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def _jitter(images: Batch, generator: torch.Generator) -> Batch:
    """Brightness, contrast and saturation by up to 50 % for 80 % of the images."""
    count = len(images)
    bright, contrast, colour = (_uniform(count, 0.5, 1.5, generator).view(-1, 1, 1, 1) for _ in range(3))
    view = (images * bright).clamp(0, 1)
    mean = view.mean((1, 2, 3), keepdim=True)
    view = ((view - mean) * contrast + mean).clamp(0, 1)
    grey = view.mean(1, keepdim=True)
    view = ((view - grey) * colour + grey).clamp(0, 1)
    chosen = _uniform(count, 0.0, 1.0, generator) < 0.8
    return torch.where(chosen.view(-1, 1, 1, 1), view, images)


def _greyscale(images: Batch, generator: torch.Generator) -> Batch:
    chosen = _uniform(len(images), 0.0, 1.0, generator) < 0.2
    return torch.where(chosen.view(-1, 1, 1, 1), images.mean(1, keepdim=True).expand_as(images), images)


def _blur(images: Batch, generator: torch.Generator) -> Batch:
    """A 3×3 Gaussian of standard deviation 0.1 to 1 pixel for half of the images."""
    count, channels = images.shape[:2]
    sigma = _uniform(count, 0.1, 1.0, generator)
    sigma = torch.where(_uniform(count, 0.0, 1.0, generator) < 0.5, sigma, torch.full_like(sigma, 0.05))
    taps = torch.arange(-1, 2, device=images.device)
    line = torch.exp(-(taps**2) / (2 * sigma[:, None] ** 2))
    line = (line / line.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    kernel = (line[:, :, None] * line[:, None, :]).unsqueeze(1)
    flat = pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1).unsqueeze(0)
    return conv2d(flat, kernel, groups=count * channels).view_as(images)


def _simclr_no_flip(images: Batch, generator: torch.Generator, crop: Crop) -> Batch:
    view = _jitter(crop(images, CROPPED_SHARE["simclr"], generator), generator)
    if images.shape[1] > 1:
        view = _greyscale(view, generator)
    return _blur(view, generator)


POLICIES: dict[str, Callable[[Tensor, torch.Generator, Crop], Tensor]] = {
    "none": lambda images, generator, crop: images,
    "crop": lambda images, generator, crop: crop(images, CROPPED_SHARE["crop"], generator),
    "crop-flip": lambda images, generator, crop: _flip(
        crop(images, CROPPED_SHARE["crop-flip"], generator), generator
    ),
    "random-crop-flip": lambda images, generator, crop: _flip(images, generator),
    "simclr": lambda images, generator, crop: _simclr_no_flip(_flip(images, generator), generator, crop),
    "simclr-no-flip": _simclr_no_flip,
}
