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


def augment(images: Batch, policy: str, *generators: torch.Generator) -> Batch:
    """One random view of every image.

    Args:
        images: float `[B, C, H, W]` in [0, 1].
        policy: `none`; `crop` (random resized crop of 60–100 % of the area); `crop-flip` (8–100 %, horizontal
            flip, as in ImageNet training); `simclr` (Chen et al. 2020: 20–100 % crop, flip, colour jitter,
            greyscale, blur); `simclr-no-flip` for images whose mirror image means something else, such as digits.
        generators: on the images' device; several draw for equal shares of the batch, one behind the other, and each
            draws what it would draw alone.

    Raises:
        ZooError: for an unknown policy, or a batch that has no equal shares.

    Example:
        >>> batch = torch.rand(4, 1, 16, 16)
        >>> augment(batch, "crop", torch.Generator().manual_seed(0)).shape
        torch.Size([4, 1, 16, 16])
    """
    if policy not in POLICIES:
        raise ZooError(f"unknown augmentation {policy!r}: {did_you_mean(policy, POLICIES)}")
    if len(images) % len(generators):
        raise ZooError(f"{len(images)} images cannot be shared equally among {len(generators)} generators")
    return POLICIES[policy](images, *generators)


def _uniform(count: int, low: float, high: float, *generators: torch.Generator) -> Tensor:
    """`count` draws from [low, high), equally many from each generator."""
    share = count // len(generators)
    draws = [torch.rand(share, generator=generator, device=generator.device) for generator in generators]
    return low + (high - low) * torch.cat(draws)


def _resized_crop(images: Batch, smallest: float, *generators: torch.Generator) -> Batch:
    """A crop of `smallest` to 1 of the area with aspect ratio 3/4 to 4/3, stretched back to the full size."""
    count = len(images)
    side = _uniform(count, smallest, 1.0, *generators).sqrt()
    aspect = _uniform(count, -0.2877, 0.2877, *generators).exp().sqrt()
    width, height = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    theta = torch.zeros(count, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2] = _uniform(count, -1.0, 1.0, *generators) * (1 - width)
    theta[:, 1, 2] = _uniform(count, -1.0, 1.0, *generators) * (1 - height)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _flip(images: Batch, *generators: torch.Generator) -> Batch:
    chosen = _uniform(len(images), 0.0, 1.0, *generators) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def _jitter(images: Batch, *generators: torch.Generator) -> Batch:
    """Brightness, contrast and saturation by up to 50 % for 80 % of the images."""
    count = len(images)
    bright, contrast, colour = (_uniform(count, 0.5, 1.5, *generators).view(-1, 1, 1, 1) for _ in range(3))
    view = (images * bright).clamp(0, 1)
    mean = view.mean((1, 2, 3), keepdim=True)
    view = ((view - mean) * contrast + mean).clamp(0, 1)
    grey = view.mean(1, keepdim=True)
    view = ((view - grey) * colour + grey).clamp(0, 1)
    chosen = _uniform(count, 0.0, 1.0, *generators) < 0.8
    return torch.where(chosen.view(-1, 1, 1, 1), view, images)


def _greyscale(images: Batch, *generators: torch.Generator) -> Batch:
    chosen = _uniform(len(images), 0.0, 1.0, *generators) < 0.2
    return torch.where(chosen.view(-1, 1, 1, 1), images.mean(1, keepdim=True).expand_as(images), images)


def _blur(images: Batch, *generators: torch.Generator) -> Batch:
    """A 3×3 Gaussian of standard deviation 0.1 to 1 pixel for half of the images."""
    count, channels = images.shape[:2]
    sigma = _uniform(count, 0.1, 1.0, *generators)
    sigma = torch.where(_uniform(count, 0.0, 1.0, *generators) < 0.5, sigma, torch.full_like(sigma, 0.05))
    taps = torch.arange(-1, 2, device=images.device)
    line = torch.exp(-(taps**2) / (2 * sigma[:, None] ** 2))
    line = (line / line.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    kernel = (line[:, :, None] * line[:, None, :]).unsqueeze(1)
    flat = pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1).unsqueeze(0)
    return conv2d(flat, kernel, groups=count * channels).view_as(images)


def _simclr_no_flip(images: Batch, *generators: torch.Generator) -> Batch:
    view = _jitter(_resized_crop(images, 0.2, *generators), *generators)
    if images.shape[1] > 1:
        view = _greyscale(view, *generators)
    return _blur(view, *generators)


POLICIES: dict[str, Callable[..., Tensor]] = {
    "none": lambda images, *generators: images,
    "crop": lambda images, *generators: _resized_crop(images, 0.6, *generators),
    "crop-flip": lambda images, *generators: _flip(_resized_crop(images, 0.08, *generators), *generators),
    "simclr": lambda images, *generators: _simclr_no_flip(_flip(images, *generators), *generators),
    "simclr-no-flip": _simclr_no_flip,
}
