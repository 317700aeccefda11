import importlib

import pytest
import torch

from vitzoo_hf.blueprint.recipe import CHOICES
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images import augment as steps
from vitzoo_hf.images.augment import PLACED_CROP, POLICIES, augment, turned_hue
from vitzoo_hf.timm_import import import_timm

RANDOM = ["crop", "crop-flip", "random-crop-flip-rotate", "simclr", "simclr-no-flip", "simclr-imagenet"]


def view_of(images, policy, *generators):
    return augment(images, policy, *generators, cropped=policy in PLACED_CROP)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=16, channels=1, size=12):
    return torch.rand(count, channels, size, size, generator=seeded(99))


def test_every_augmentation_of_a_blueprint_is_there():
    assert set(POLICIES) == set(CHOICES["augmentation"])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", RANDOM)
def test_views_are_images(policy, channels):
    images = batch(64, channels)
    before = images.clone()
    view = view_of(images, policy, seeded())
    assert view.shape == images.shape
    assert view.dtype == torch.float32
    assert view.min() >= -1e-6
    assert view.max() <= 1 + 1e-6
    assert torch.equal(images, before)


@pytest.mark.parametrize("policy", RANDOM)
def test_the_generator_alone_decides(policy):
    images = batch()
    first = view_of(images, policy, seeded(1))
    torch.rand(7)
    before = torch.random.get_rng_state()
    assert torch.equal(first, view_of(images, policy, seeded(1)))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, view_of(images, policy, seeded(2)))
    generator = seeded(1)
    assert not torch.equal(view_of(images, policy, generator), view_of(images, policy, generator))


@pytest.mark.parametrize("policy", RANDOM)
def test_every_image_has_its_own_view(policy):
    view = view_of(batch(1).expand(16, -1, -1, -1), policy, seeded())
    different = {tuple(image.flatten().tolist()) for image in view}
    assert len(different) == 16


def test_none_changes_nothing():
    images = batch()
    assert torch.equal(view_of(images, "none", seeded()), images)


@pytest.mark.parametrize("policy", ["crop", "crop-flip"])
def test_crops_keep_flat_images(policy):
    flat = torch.full((8, 1, 12, 12), 0.3)
    assert torch.allclose(view_of(flat, policy, seeded()), flat)


@pytest.mark.parametrize(("policy", "smallest"), [("crop", 0.6), ("crop-flip", 0.08)])
def test_crops_show_the_announced_share(policy, smallest):
    """In an image of coordinates, a view spans what it shows."""
    line = torch.linspace(0, 1, 64)
    spans = []
    for plane in (line.expand(64, 64), line[:, None].expand(64, 64)):
        view = view_of(plane.expand(400, 1, 64, 64), policy, seeded(3))
        spans.append(view.amax((1, 2, 3)) - view.amin((1, 2, 3)))
    area = spans[0] * spans[1]
    assert 0.8 * smallest < area.min() < smallest + 0.15
    assert area.max() > 0.85


def test_crops_stay_inside_the_image():
    """What lies outside would repeat the border."""
    line = torch.linspace(0, 1, 64)
    for plane, axis in ((line.expand(64, 64), -1), (line[:, None].expand(64, 64), -2)):
        view = view_of(plane.expand(400, 1, 64, 64), "crop", seeded())
        assert view.diff(dim=axis).min() > 1e-3


def test_flips_mirror_about_half_of_the_images():
    line = torch.linspace(0, 1, 32).expand(400, 1, 32, 32)
    for policy, least, most in (("crop-flip", 0.4, 0.6), ("crop", 0, 0)):
        view = view_of(line, policy, seeded())
        mirrored = (view[..., 0] > view[..., -1]).all(-1).float().mean()
        assert least <= mirrored <= most


@pytest.mark.parametrize(("policy", "least", "most"), [("simclr", 0.4, 0.6), ("simclr-no-flip", 0, 0)])
def test_simclr_flips_only_where_told(policy, least, most):
    line = torch.linspace(0.2, 0.8, 32).expand(400, 1, 32, 32)
    view = view_of(line, policy, seeded())
    assert least <= (view.mean(2)[..., 0] > view.mean(2)[..., -1]).float().mean() <= most


def test_simclr_turns_some_images_grey():
    colour = torch.tensor([0.6, 0.3, 0.1]).view(1, 3, 1, 1).expand(400, 3, 12, 12)
    view = view_of(colour, "simclr", seeded())
    grey = ((view.amax(1) - view.amin(1)) < 1e-6).flatten(1).all(1).float().mean()
    assert 0.1 < grey < 0.3


def test_simclr_jitters_most_images():
    flat = torch.full((400, 1, 12, 12), 0.5)
    view = view_of(flat, "simclr-no-flip", seeded())
    changed = ((view - 0.5).abs() > 1e-4).flatten(1).any(1).float().mean()
    assert 0.7 < changed < 0.9
    assert view.amin() < 0.3
    assert view.amax() > 0.7


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_several_generators_each_draw_what_they_draw_alone(policy, channels):
    images = batch(15, channels)
    together = view_of(images, policy, *(seeded(seed) for seed in (1, 2, 3)))
    alone = [view_of(share, policy, seeded(seed)) for share, seed in zip(images.split(5), (1, 2, 3), strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_unequal_shares_are_refused():
    with pytest.raises(ZooError, match="16 images cannot be shared equally among 3 generators"):
        view_of(batch(16), "crop", *[seeded()] * 3)


def test_unknown_policies_are_refused():
    with pytest.raises(ZooError, match="unknown augmentation 'simclrr': did you mean 'simclr'"):
        view_of(batch(), "simclrr", seeded())


@pytest.mark.gpu
@pytest.mark.parametrize("policy", RANDOM)
def test_cuda_views_are_reproducible(policy):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = batch(channels=3).cuda()
    views = [view_of(images, policy, torch.Generator("cuda").manual_seed(1)) for _ in range(2)]
    assert views[0].is_cuda
    assert torch.equal(*views)


def torchvision_transforms():
    import_timm()  # lets torchvision load beside a CPU build of torch
    return importlib.import_module("torchvision.transforms.functional")


def test_hue_turns_as_in_torchvision():
    oracle = torchvision_transforms().adjust_hue
    images = batch(5, 3, 6)
    images[0] = 0.5  # grey stays grey
    for turn in (-0.1, 0.0, 0.03, 0.5):
        turned = turned_hue(images, torch.full((5, 1, 1), turn))
        torch.testing.assert_close(turned, oracle(images, turn), rtol=0, atol=1e-5)


def test_images_are_rotated_as_by_torchvision(monkeypatch):
    oracle = torchvision_transforms()
    images = batch(3, 3, 12)
    angles = torch.tensor([-1.0, 0.0, 0.7])
    monkeypatch.setattr(steps, "_uniform", lambda *arguments: angles)
    rotated = steps._rotate(images, seeded())
    bilinear = oracle.InterpolationMode.BILINEAR
    for image, turned, angle in zip(images, rotated, angles.tolist(), strict=True):
        expected = oracle.rotate(image[None], angle * steps.MOST_DEGREES, interpolation=bilinear)[0]
        torch.testing.assert_close(turned, expected, rtol=0, atol=1e-4)


def test_the_wide_blur_is_torchvision_s(monkeypatch):
    images = batch(2, 3, 16)
    monkeypatch.setattr(steps, "_uniform", lambda *arguments: torch.tensor([0.4, 1.9]))
    blurred = steps._wide_blur(images, seeded())
    for image, found, sigma in zip(images, blurred, (0.4, 1.9), strict=True):
        expected = torchvision_transforms().gaussian_blur(image[None], [9, 9], [sigma, sigma])[0]
        inside = (slice(None), slice(4, -4), slice(4, -4))  # edges are padded otherwise
        torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", PLACED_CROP)
def test_a_crop_that_prepared_images_have_lost_is_refused(policy):
    with pytest.raises(ZooError, match="cuts from images before preparation: set decode: on_demand"):
        augment(batch(), policy, seeded())
