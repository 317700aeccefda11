"""Sampling from latents."""

import pytest
import torch

from vitzoo_hf.apply.autoencoder.model import Sizes
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.sampling import MODES, bootstrapped, decoded, encoded, sample
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def known(tiny_zoo):
    zoo = Zoo(tiny_zoo).filter(stage="finetune", head="mlp")
    recipe = AutoencoderRecipe(
        structure=1.0, steps=30, batch_size=2, sizes=Sizes(width=16, latent=4, heads=2, blocks=1)
    )
    return train_autoencoder(zoo, recipe), torch.stack([torch.from_numpy(row["weights"]) for row in zoo.rows()])


@pytest.mark.parametrize("mode", MODES)
def test_samples_differ_from_each_other_and_are_those_of_the_seed(known, mode):
    trained, anchors = known
    first = sample(trained, anchors, 5, mode=mode, seed=1)
    assert first.weights.shape == (5, anchors.shape[1])
    assert first.weights.isfinite().all()
    assert torch.equal(first.weights, sample(trained, anchors, 5, mode=mode, seed=1).weights)
    assert not torch.equal(first.weights, sample(trained, anchors, 5, mode=mode, seed=2).weights)
    assert len(first.weights.unique(dim=0)) == 5


def test_every_number_has_a_noise_of_its_own(known, monkeypatch):
    """A generator seeded anew for each number would add one constant to all of them."""
    trained, anchors = known
    latents, caught = encoded(trained, anchors), {}

    def caught_decode(latents):
        caught["latents"] = latents
        return original(latents)

    original = trained.decode
    monkeypatch.setattr(trained, "decode", caught_decode)
    drawn = sample(trained, anchors, 1, bandwidth=0.5)
    noise = (caught["latents"][0] - latents[drawn.anchors[0]]) / (0.5 * latents.std(0))
    assert noise.std() == pytest.approx(1, abs=0.15)
    assert abs(noise.mean()) < 0.2


def test_without_bandwidth_a_sample_is_its_decoded_anchor(known):
    trained, anchors = known
    drawn = sample(trained, anchors, 6, bandwidth=0.0)
    torch.testing.assert_close(drawn.weights, decoded(trained, encoded(trained, anchors))[drawn.anchors])


def test_bootstrapping_climbs_and_gives_the_best_first(known):
    trained, anchors = known

    def score(weights):
        return -(weights - anchors[0]).norm(dim=1).double()

    once = score(bootstrapped(trained, anchors, 20, score, rounds=1, keep=3).weights)
    later = score(bootstrapped(trained, anchors, 20, score, rounds=4, keep=3).weights)
    assert (once.diff() <= 0).all()
    assert later.mean() > once.mean()


def test_what_cannot_be_sampled_is_one_line(known):
    trained, anchors = known
    for changes, message in (
        ({"mode": "both"}, "unknown mode 'both'"),
        ({"count": 0}, "0 samples"),
        ({"bandwidth": -1.0}, "no negative bandwidth"),
        ({"anchors": anchors[:1]}, "1 anchors; a density over latents needs at least two"),
    ):
        arguments = {"anchors": anchors, "count": 3} | changes
        with pytest.raises(ZooError, match=message):
            sample(trained, **arguments)
    with pytest.raises(ZooError, match="1 rounds that keep 1 models"):
        bootstrapped(trained, anchors, 3, lambda weights: weights.sum(1), rounds=1, keep=1)
