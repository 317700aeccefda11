"""Random views of a batch of images, drawn per image, on whatever device the images are.

Images are float `[B, C, H, W]` in [0, 1]; every draw comes from the generators given, so a view is reproducible.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError

Batch = Float[Tensor, "B C H W"]
Crop = Callable[..., Tensor]
CROPPED_SHARE = {"crop": 0.6, "crop-flip": 0.08, "simclr": 0.2, "simclr-no-flip": 0.2, "simclr-imagenet": 0.08}
"""The least share of the area that the random resized crop of a policy keeps."""
PLACED_CROP = ("random-crop-flip", "random-crop-flip-rotate")
"""Policies that take the crop of preparation at a random place; cut before `augment`, from the original images."""
MOST_DEGREES = 10.0


def augment(images: Batch, policy: str, *generators: torch.Generator, cropped: bool = False) -> Batch:
    """One random view of every image.

    Args:
        images: float `[B, C, H, W]` in [0, 1].
        policy: `none`; `crop` (random resized crop of 60–100 % of the area); `crop-flip` (8–100 %, horizontal
            flip, as in ImageNet training); `random-crop-flip` (the crop of preparation at a random place, flip),
            for images that are `cropped`; `random-crop-flip-rotate` (the same, then by up to 10 degrees, as the ViT
            model zoo fine-tunes); `shift` (by whole pixels, up to an eighth of the side either way, black beyond);
            `simclr` (Chen et al. 2020: 20–100 % crop, flip, colour jitter, greyscale, blur),
            in the strength that small images bear; `simclr-no-flip` for images whose mirror image means something
            else, such as digits; `simclr-imagenet` (flip, 8–100 % crop, jitter of brightness, contrast and
            saturation by half and of hue by a tenth, greyscale, 9×9 blur, as the ViT model zoo pre-trains).
        generators: on the images' device; several draw for equal shares of the batch, one behind the other, and each
            draws what it would draw alone.
        cropped: whether the images are random crops already: then the rest of the policy is applied.

    Raises:
        ZooError: for an unknown policy, a batch that has no equal shares, or prepared images where the policy cuts
            from those before preparation.

    Example:
        >>> batch = torch.rand(4, 1, 16, 16)
        >>> augment(batch, "crop", torch.Generator().manual_seed(0)).shape
        torch.Size([4, 1, 16, 16])
    """
    if policy not in POLICIES:
        raise ZooError(f"unknown augmentation {policy!r}: {did_you_mean(policy, POLICIES)}")
    if len(images) % len(generators):
        raise ZooError(f"{len(images)} images cannot be shared equally among {len(generators)} generators")
    if policy in PLACED_CROP and not cropped:
        raise ZooError(f"augmentation {policy!r} cuts from images before preparation: set decode: on_demand")
    return POLICIES[policy](images, _whole if cropped else _resized_crop, *generators)


def _uniform(count: int, low: float, high: float, *generators: torch.Generator) -> Tensor:
    """`count` draws from [low, high), equally many from each generator."""
    share = count // len(generators)
    draws = [torch.rand(share, generator=generator, device=generator.device) for generator in generators]
    return low + (high - low) * torch.cat(draws)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


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


def _whole(images: Batch, smallest: float, *generators: torch.Generator) -> Batch:
    return images


def _flip(images: Batch, *generators: torch.Generator) -> Batch:
    is_chosen = _uniform(len(images), 0.0, 1.0, *generators) < 0.5
    return torch.where(_per_image(is_chosen), images.flip(-1), images)


def _rotate(images: Batch, *generators: torch.Generator) -> Batch:
    """By up to `MOST_DEGREES` either way about the centre; what comes into view is black."""
    height, width = images.shape[-2:]
    angle = _uniform(len(images), -1.0, 1.0, *generators) * math.radians(MOST_DEGREES)
    cosine, sine = angle.cos(), angle.sin()
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = cosine
    theta[:, 0, 1], theta[:, 1, 0] = -sine * height / width, sine * width / height
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _shift(images: Batch, *generators: torch.Generator) -> Batch:
    """By whole pixels, up to an eighth of the side either way; what comes into view is black."""
    count, _, height, width = images.shape
    most = max(height // 8, 1)
    down, right = (_uniform(count, float(-most), most + 1.0, *generators).floor().long() for _ in range(2))
    padded = pad(images, (most,) * 4)
    rows = torch.arange(height, device=images.device) + most - down[:, None]
    columns = torch.arange(width, device=images.device) + most - right[:, None]
    picture = torch.arange(count, device=images.device)
    return padded[picture[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _jitter(images: Batch, *generators: torch.Generator) -> Batch:
    """Brightness, contrast and saturation by up to 50 % for 80 % of the images."""
    count = len(images)
    bright, contrast, colour = (_per_image(_uniform(count, 0.5, 1.5, *generators)) for _ in range(3))
    view = (images * bright).clamp(0, 1)
    mean = view.mean((1, 2, 3), keepdim=True)
    view = ((view - mean) * contrast + mean).clamp(0, 1)
    grey = view.mean(1, keepdim=True)
    view = ((view - grey) * colour + grey).clamp(0, 1)
    is_chosen = _uniform(count, 0.0, 1.0, *generators) < 0.8
    return torch.where(_per_image(is_chosen), view, images)


def _jitter_with_hue(images: Batch, *generators: torch.Generator) -> Batch:
    """Torchvision's ColorJitter(0.5, 0.5, 0.5, 0.1) in this order, for 80 % of the images."""
    count = len(images)
    bright, contrast, colour = (_per_image(_uniform(count, 0.5, 1.5, *generators)) for _ in range(3))
    turn = _uniform(count, -0.1, 0.1, *generators).view(-1, 1, 1)
    view = (images * bright).clamp(0, 1)
    mean = _luma(view).mean((1, 2, 3), keepdim=True)
    view = ((view - mean) * contrast + mean).clamp(0, 1)
    grey = _luma(view)
    view = ((view - grey) * colour + grey).clamp(0, 1)
    is_chosen = _uniform(count, 0.0, 1.0, *generators) < 0.8
    if images.shape[1] == 3:
        view = turned_hue(view, turn)
    return torch.where(_per_image(is_chosen), view, images)


def _luma(images: Batch) -> Float[Tensor, "B 1 H W"]:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor([0.2989, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def turned_hue(images: Float[Tensor, "B 3 H W"], turn: Float[Tensor, "B 1 1"]) -> Float[Tensor, "B 3 H W"]:
    """Hue turned by a share of the circle, in HSV: the same lightest and darkest channel, another one between.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
        >>> turned_hue(red, torch.full((1, 1, 1), 1 / 3)).flatten().round(decimals=4).abs()
        tensor([0., 1., 0.])
    """
    red, green, blue = images.unbind(1)
    value, lowest = images.amax(1), images.amin(1)
    chroma = value - lowest
    safe = chroma.where(chroma > 0, torch.ones_like(chroma))
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + 6 * turn
    channels = [((hue + shift) % 6 - 3).abs().sub(1).clamp(0, 1) for shift in (0, 4, 2)]
    return torch.stack([lowest + chroma * channel for channel in channels], 1)


def _greyscale(images: Batch, *generators: torch.Generator) -> Batch:
    is_chosen = _uniform(len(images), 0.0, 1.0, *generators) < 0.2
    return torch.where(_per_image(is_chosen), images.mean(1, keepdim=True).expand_as(images), images)


def _blur(images: Batch, *generators: torch.Generator) -> Batch:
    """A 3×3 Gaussian of standard deviation 0.1 to 1 pixel for half of the images."""
    sigma = _uniform(len(images), 0.1, 1.0, *generators)
    is_chosen = _uniform(len(images), 0.0, 1.0, *generators) < 0.5
    return _gaussian(images, torch.where(is_chosen, sigma, torch.full_like(sigma, 0.05)), 1)


def _wide_blur(images: Batch, *generators: torch.Generator) -> Batch:
    """Torchvision's GaussianBlur(9): every image, standard deviation 0.1 to 2 pixels."""
    return _gaussian(images, _uniform(len(images), 0.1, 2.0, *generators), 4)


def _gaussian(images: Batch, sigma: Float[Tensor, " B"], radius: int) -> Batch:
    count, channels = images.shape[:2]
    taps = torch.arange(-radius, radius + 1, device=images.device)
    line = torch.exp(-(taps**2) / (2 * sigma[:, None] ** 2))
    line = (line / line.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    kernel = (line[:, :, None] * line[:, None, :]).unsqueeze(1)
    flat = pad(images, (radius,) * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
    return conv2d(flat, kernel, groups=count * channels).view_as(images)


def _crop(images: Batch, crop: Crop, *generators: torch.Generator) -> Batch:
    return crop(images, CROPPED_SHARE["crop"], *generators)


def _crop_flip(images: Batch, crop: Crop, *generators: torch.Generator) -> Batch:
    return _flip(crop(images, CROPPED_SHARE["crop-flip"], *generators), *generators)


def _simclr_no_flip(images: Batch, crop: Crop, *generators: torch.Generator) -> Batch:
    view = _jitter(crop(images, CROPPED_SHARE["simclr"], *generators), *generators)
    if images.shape[1] > 1:
        view = _greyscale(view, *generators)
    return _blur(view, *generators)


def _simclr_imagenet(images: Batch, crop: Crop, *generators: torch.Generator) -> Batch:
    view = crop(_flip(images, *generators), CROPPED_SHARE["simclr-imagenet"], *generators)
    return _wide_blur(_greyscale(_jitter_with_hue(view, *generators), *generators), *generators)


POLICIES: dict[str, Callable[..., Tensor]] = {
    "none": lambda images, crop, *generators: images,
    "shift": lambda images, crop, *generators: _shift(images, *generators),
    "crop": _crop,
    "crop-flip": _crop_flip,
    "random-crop-flip": lambda images, crop, *generators: _flip(images, *generators),
    "random-crop-flip-rotate": lambda images, crop, *generators: _rotate(_flip(images, *generators), *generators),
    "simclr": lambda images, crop, *generators: _simclr_no_flip(_flip(images, *generators), crop, *generators),
    "simclr-no-flip": _simclr_no_flip,
    "simclr-imagenet": _simclr_imagenet,
}
