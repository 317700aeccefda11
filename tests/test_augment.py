import pytest
import torch

from vitzoo_hf.augment import POLICIES, augment
from vitzoo_hf.blueprint import CHOICES
from vitzoo_hf.schema import ZooError

RANDOM = ["crop", "crop-flip", "simclr", "simclr-no-flip"]


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
    view = augment(images, policy, seeded())
    assert view.shape == images.shape
    assert view.dtype == torch.float32
    assert view.min() >= -1e-6
    assert view.max() <= 1 + 1e-6
    assert torch.equal(images, before)


@pytest.mark.parametrize("policy", RANDOM)
def test_the_generator_alone_decides(policy):
    images = batch()
    first = augment(images, policy, seeded(1))
    torch.rand(7)
    before = torch.random.get_rng_state()
    assert torch.equal(first, augment(images, policy, seeded(1)))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, augment(images, policy, seeded(2)))
    generator = seeded(1)
    assert not torch.equal(augment(images, policy, generator), augment(images, policy, generator))


@pytest.mark.parametrize("policy", RANDOM)
def test_every_image_has_its_own_view(policy):
    view = augment(batch(1).expand(16, -1, -1, -1), policy, seeded())
    different = {tuple(image.flatten().tolist()) for image in view}
    assert len(different) == 16


def test_none_changes_nothing():
    images = batch()
    assert torch.equal(augment(images, "none", seeded()), images)


@pytest.mark.parametrize("policy", ["crop", "crop-flip"])
def test_crops_keep_flat_images(policy):
    flat = torch.full((8, 1, 12, 12), 0.3)
    assert torch.allclose(augment(flat, policy, seeded()), flat)


@pytest.mark.parametrize(("policy", "smallest"), [("crop", 0.6), ("crop-flip", 0.08)])
def test_crops_show_the_announced_share(policy, smallest):
    """In an image of coordinates, a view spans what it shows."""
    line = torch.linspace(0, 1, 64)
    spans = []
    for plane in (line.expand(64, 64), line[:, None].expand(64, 64)):
        view = augment(plane.expand(400, 1, 64, 64), policy, seeded(3))
        spans.append(view.amax((1, 2, 3)) - view.amin((1, 2, 3)))
    area = spans[0] * spans[1]
    assert 0.8 * smallest < area.min() < smallest + 0.15
    assert area.max() > 0.85


def test_crops_stay_inside_the_image():
    """What lies outside would repeat the border."""
    line = torch.linspace(0, 1, 64)
    for plane, axis in ((line.expand(64, 64), -1), (line[:, None].expand(64, 64), -2)):
        view = augment(plane.expand(400, 1, 64, 64), "crop", seeded())
        assert view.diff(dim=axis).min() > 1e-3


def test_flips_mirror_about_half_of_the_images():
    line = torch.linspace(0, 1, 32).expand(400, 1, 32, 32)
    for policy, least, most in (("crop-flip", 0.4, 0.6), ("crop", 0, 0)):
        view = augment(line, policy, seeded())
        mirrored = (view[..., 0] > view[..., -1]).all(-1).float().mean()
        assert least <= mirrored <= most


@pytest.mark.parametrize(("policy", "least", "most"), [("simclr", 0.4, 0.6), ("simclr-no-flip", 0, 0)])
def test_simclr_flips_only_where_told(policy, least, most):
    line = torch.linspace(0.2, 0.8, 32).expand(400, 1, 32, 32)
    view = augment(line, policy, seeded())
    assert least <= (view.mean(2)[..., 0] > view.mean(2)[..., -1]).float().mean() <= most


def test_simclr_turns_some_images_grey():
    colour = torch.tensor([0.6, 0.3, 0.1]).view(1, 3, 1, 1).expand(400, 3, 12, 12)
    view = augment(colour, "simclr", seeded())
    grey = ((view.amax(1) - view.amin(1)) < 1e-6).flatten(1).all(1).float().mean()
    assert 0.1 < grey < 0.3


def test_simclr_jitters_most_images():
    flat = torch.full((400, 1, 12, 12), 0.5)
    view = augment(flat, "simclr-no-flip", seeded())
    changed = ((view - 0.5).abs() > 1e-4).flatten(1).any(1).float().mean()
    assert 0.7 < changed < 0.9
    assert view.amin() < 0.3
    assert view.amax() > 0.7


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_several_generators_each_draw_what_they_draw_alone(policy, channels):
    images = batch(15, channels)
    together = augment(images, policy, *(seeded(seed) for seed in (1, 2, 3)))
    alone = [augment(share, policy, seeded(seed)) for share, seed in zip(images.split(5), (1, 2, 3), strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_unequal_shares_are_refused():
    with pytest.raises(ZooError, match="16 images cannot be shared equally among 3 generators"):
        augment(batch(16), "crop", *[seeded()] * 3)


def test_unknown_policies_are_refused():
    with pytest.raises(ZooError, match="unknown augmentation 'simclrr': did you mean 'simclr'"):
        augment(batch(), "simclrr", seeded())


@pytest.mark.gpu
@pytest.mark.parametrize("policy", RANDOM)
def test_cuda_views_are_reproducible(policy):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = batch(channels=3).cuda()
    views = [augment(images, policy, torch.Generator("cuda").manual_seed(1)) for _ in range(2)]
    assert views[0].is_cuda
    assert torch.equal(*views)
