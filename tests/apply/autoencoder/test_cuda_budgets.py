"""The weight autoencoder on a CUDA device: training, decoded batches, samples and fine-tuning as on the CPU."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from same_results import assert_same
from secret_zoo import secret_zoo
from small_autoencoder import SMALL

from vitzoo_hf.apply.autoencoder.evaluation import evaluate_autoencoder
from vitzoo_hf.apply.autoencoder.fine_tuning import FineTuning, fine_tuned
from vitzoo_hf.apply.autoencoder.metrics import Networks
from vitzoo_hf.apply.autoencoder.recipe import ARMS
from vitzoo_hf.apply.autoencoder.rows import write_reconstructions
from vitzoo_hf.apply.autoencoder.sampling import decoded, encoded, sample
from vitzoo_hf.apply.autoencoder.trained import load_autoencoder
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.zoo import SAMPLE, Zoo

RECIPE = replace(SMALL, steps=2, queries=4, pool=8)


@pytest.fixture(scope="module")
def zoo():
    return Zoo.sample().filter(stage="finetune", head="mlp")


@pytest.fixture(scope="module")
def vectors(zoo):
    return torch.stack([torch.from_numpy(row["weights"]) for row in zoo.rows()])


@pytest.fixture(scope="module")
def folder(zoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    train_autoencoder(zoo, RECIPE, folder)
    return folder


@pytest.fixture
def both(simulated_cuda, folder):
    """The autoencoder on the device and on the CPU."""
    return tuple(load_autoencoder(folder, device=device) for device in ("cuda", "cpu"))


@pytest.mark.parametrize("arm", ARMS)
def test_training_is_that_of_the_cpu(simulated_cuda, zoo, arm):
    losses = {"cuda": [], "cpu": []}
    for device, values in losses.items():
        train_autoencoder(zoo, RECIPE.arm(arm), device=device, on_step=lambda step, loss, v=values: v.append(loss))
    for loss, expected in zip(losses["cuda"], losses["cpu"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_latents_and_decoded_batches_are_those_of_the_cpu(both, vectors):
    latents, expected = (encoded(trained, vectors) for trained in both)
    torch.testing.assert_close(latents.cpu(), expected, rtol=1e-4, atol=1e-4)
    weights, expected_weights = (decoded(trained, expected) for trained in both)
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-4, atol=1e-4)


def test_samples_are_those_of_the_cpu(both, vectors):
    samples, expected = (sample(trained, vectors, 2, seed=1) for trained in both)
    torch.testing.assert_close(samples.weights.cpu(), expected.weights, rtol=1e-4, atol=1e-4)


def test_fine_tuning_is_that_of_the_cpu(simulated_cuda, zoo, vectors):
    row = next(zoo.rows())
    images, labels = zoo.probes("digits")
    how = FineTuning(epochs=1, batch_size=16)
    results = [
        list(fine_tuned(Networks.like(row), vectors[:2], images[:32], labels[:32], how, device=device))
        for device in ("cuda", "cpu")
    ]
    for tensor, other in zip(*results, strict=True):
        torch.testing.assert_close(tensor.cpu(), other, rtol=0, atol=5e-3)


@pytest.mark.slow
def test_evaluation_is_that_of_the_cpu(simulated_cuda, tmp_path):
    zoo = secret_zoo(tmp_path / "zoo", SAMPLE, models=5).filter(stage="finetune")
    train_autoencoder(zoo, RECIPE, tmp_path / "trained")
    results = [
        evaluate_autoencoder(zoo, load_autoencoder(tmp_path / "trained", device=device), split="train", device=device)
        for device in ("cuda", "cpu")
    ]
    assert_same(*results)


def test_reconstructions_are_those_of_the_cpu(both, zoo, tmp_path):
    tables = [
        write_reconstructions(zoo, trained, tmp_path / device, device=device)
        for trained, device in zip(both, ("cuda", "cpu"), strict=True)
    ]
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-3)
