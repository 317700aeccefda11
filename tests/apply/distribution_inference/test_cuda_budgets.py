"""Attacks on a CUDA device give the CPU's guesses."""

import pandas as pd
import pytest
import torch
from same_results import assert_same
from secret_zoo import secret_zoo

from vitzoo_hf.apply.distribution_inference.attacks.stacked_mlps import Training, Widths, train_mlps
from vitzoo_hf.apply.distribution_inference.zoo_attacks import attack_zoo
from vitzoo_hf.apply.distribution_inference.zoo_views import zoo_features
from vitzoo_hf.zoo import SAMPLE


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return secret_zoo(tmp_path_factory.mktemp("secrets") / "zoo", SAMPLE, models=40)


CASES = {
    "weights": ["components", "statistics"],
    "probabilities": ["kl_test", "ridge_on_outputs"],
    "labels": ["kl_test"],
}


def assert_same_attacks(zoo, access, attacks):
    tables = [
        attack_zoo(zoo, "label_ratio", access=access, attacks=attacks, num_queries=20, seeds=1, device=device).table
        for device in ("cuda", "cpu")
    ]
    pd.testing.assert_frame_equal(*tables, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("access", CASES)
def test_attacks_are_those_of_the_cpu(simulated_cuda, zoo, access):
    assert_same_attacks(zoo, access, CASES[access])
    assert simulated_cuda.kernels > 0


@pytest.mark.slow
def test_networks_that_read_weights_are_those_of_the_cpu(simulated_cuda, zoo):
    assert_same_attacks(zoo, "weights", ["set_encoder"])


def test_features_are_those_of_the_cpu(simulated_cuda, zoo):
    models = zoo.filter(stage="finetune")
    shadows = torch.arange(len(models)) % 2 == 1
    names = ["head", "head_bias", "statistics", "components"]
    assert_same(*(zoo_features(models, shadows, names, device=device) for device in ("cuda", "cpu")))


def test_stacked_mlps_are_those_of_the_cpu(simulated_cuda):
    inputs = torch.linspace(-1, 1, 16).expand(2, 1, -1)
    training = Training(lr=0.01, epochs=2, batch_size=8)
    vectors = [
        train_mlps(Widths(1, 4), inputs, 3 * inputs[:, 0], training, device=device) for device in ("cuda", "cpu")
    ]
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-5)
