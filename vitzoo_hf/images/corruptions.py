"""Corrupted images: a handful of corruptions and shifts at five severities, computed by torchvision.

Every corruption takes and gives float images in [0, 1] and follows from its name, its severity and a seed alone.
Noise and contrast have the severities of Hendrycks and Dietterich (2019) for small images; the others are ours.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.timm_import import import_timm

SEVERITIES = (1, 2, 3, 4, 5)
LEVELS: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "gaussian_blur": (0.6, 0.9, 1.2, 1.6, 2.2),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "brightness": (1.1, 1.2, 1.3, 1.5, 1.8),
    "rotation": (5, 10, 15, 20, 30),
    "translation": (0.04, 0.08, 0.12, 0.16, 0.24),
}
"""Corruption -> its strength by severity: deviation, sigma in pixels (of 32 for larger images), factors, degrees,
shares of the width."""


def parse_corruption(text: str) -> tuple[str, int]:
    """`NAME` or `NAME:SEVERITY`; severity 3 by default.

    >>> parse_corruption("gaussian_noise:5"), parse_corruption("contrast")
    (('gaussian_noise', 5), ('contrast', 3))

    Raises:
        ZooError: for an unknown corruption or severity.
    """
    name, colon, severity = text.partition(":")
    if name not in LEVELS:
        raise ZooError(f"unknown corruption {name!r}: {did_you_mean(name, LEVELS)}")
    if colon and severity not in map(str, SEVERITIES):
        raise ZooError(f"severity {severity!r} of {name}: expected one of 1 to 5")
    return name, int(severity) if colon else 3


def corrupted(
    images: Float[Tensor, "N C H W"], name: str, severity: int, *, seed: int = 0
) -> Float[Tensor, "N C H W"]:
    """Corrupted images.

    Args:
        images: float32 in [0, 1], as they are before normalisation.
        name: a key of `LEVELS`.
        severity: 1 to 5.
        seed: seed of the noise.

    Raises:
        ZooError: for an unknown corruption or severity, or images outside [0, 1].

    Example:
        >>> images = torch.full((2, 1, 8, 8), 0.5)
        >>> bool((corrupted(images, "gaussian_noise", 3) == images).any())
        False
    """
    parse_corruption(f"{name}:{severity}")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ZooError("images to be corrupted lie outside [0, 1]: give them before they are normalised")
    level = LEVELS[name][severity - 1]
    return _functions()[name](images, level, seed).clamp(0, 1)


def _functions() -> dict[str, Callable[[Tensor, float, int], Tensor]]:
    import_timm()  # which lets torchvision load beside a CPU build of torch
    from torchvision.transforms.v2 import InterpolationMode, functional

    def noise(images: Tensor, level: float, seed: int) -> Tensor:
        drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return images + level * drawn.to(images.device)

    def blur(images: Tensor, level: float, seed: int) -> Tensor:
        sigma = level * max(1.0, images.shape[-1] / 32)
        return functional.gaussian_blur(images, [2 * max(1, round(3 * sigma)) + 1] * 2, [sigma] * 2)

    def shift(images: Tensor, level: float, seed: int) -> Tensor:
        pixels = [round(level * images.shape[-1]), round(level * images.shape[-2])]
        return functional.affine(images, angle=0, translate=pixels, scale=1, shear=[0, 0])

    return {
        "gaussian_noise": noise,
        "gaussian_blur": blur,
        "contrast": lambda images, level, seed: functional.adjust_contrast(images, level),
        "brightness": lambda images, level, seed: functional.adjust_brightness(images, level),
        "rotation": lambda images, level, seed: functional.rotate(images, level, InterpolationMode.BILINEAR),
        "translation": shift,
    }
