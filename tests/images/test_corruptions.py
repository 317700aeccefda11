import pytest
import torch

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.corruptions import LEVELS, SEVERITIES, corrupted, parse_corruption

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LEVELS)
def test_corruptions_grow_with_severity_and_stay_in_range(name):
    changes = []
    for severity in SEVERITIES:
        images = corrupted(IMAGES, name, severity)
        assert images.shape == IMAGES.shape
        assert 0 <= images.min() <= images.max() <= 1
        assert torch.equal(images, corrupted(IMAGES, name, severity))
        changes.append(float((images - IMAGES).square().mean()))
    assert changes[0] > 0
    if name not in ("rotation", "translation"):  # of noise images, which lose all likeness at once
        assert changes == sorted(changes)


def test_noise_has_the_deviation_it_says_and_follows_the_seed():
    grey = torch.full((50, 1, 32, 32), 0.5)
    noisy = corrupted(grey, "gaussian_noise", 5, seed=1)
    assert float((noisy - grey).std()) == pytest.approx(0.1, rel=0.02)
    assert not torch.equal(noisy, corrupted(grey, "gaussian_noise", 5, seed=2))


def test_contrast_and_brightness_are_what_they_say():
    images = torch.tensor([0.25, 0.5]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert torch.allclose(corrupted(images, "brightness", 3), images * 1.3)
    assert torch.allclose(corrupted(images, "contrast", 2), 0.375 + 0.5 * (images - 0.375), atol=1e-3)


def test_a_translation_moves_every_pixel():
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, 10, 10] = 1
    moved = corrupted(image, "translation", 5)
    assert moved[0, 0, 18, 18] == 1
    assert moved.sum() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gaussian_nois", "unknown corruption 'gaussian_nois': did you mean 'gaussian_noise'"),
        ("contrast:9", "severity"),
    ],
)
def test_unknown_corruptions_are_named(text, message):
    with pytest.raises(ZooError, match=message):
        parse_corruption(text)


def test_normalised_images_are_refused():
    with pytest.raises(ZooError, match=r"lie outside \[0, 1\]"):
        corrupted(IMAGES * 4 - 2, "contrast", 1)
