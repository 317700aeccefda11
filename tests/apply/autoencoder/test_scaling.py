"""Principal components of tokens, and the linear maps that begin there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vitzoo_hf.apply.autoencoder.evaluation import HeldOut, baselines
from vitzoo_hf.apply.autoencoder.metrics import Networks
from vitzoo_hf.apply.autoencoder.model import Sizes, WeightAutoencoder
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.scaling import Scaling, layer_components
from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.apply.autoencoder.trained import load_autoencoder
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

LATENT = 3
RECIPE = AutoencoderRecipe(
    steps=4, batch_size=4, queries=8, pool=16, sizes=Sizes(width=8, latent=LATENT, blocks=1, linear=True)
)


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo).filter(stage="finetune", head="mlp")


@pytest.fixture(scope="module")
def vectors(zoo) -> torch.Tensor:
    return torch.stack([torch.from_numpy(row["weights"]) for row in zoo.filter(split="train").rows()])


@pytest.fixture(scope="module")
def tokenizer(zoo) -> Tokenizer:
    return Tokenizer.of(Networks.like(next(zoo.rows())).layout)


def test_tokens_of_a_layer_lie_one_behind_the_other(tokenizer):
    assert sum(tokenizer.lengths) == tokenizer.num_tokens
    kinds = tokenizer.layers * 1000 + tokenizer.roles
    parts = kinds.split(tokenizer.lengths)
    assert all(len(part.unique()) == 1 for part in parts)
    assert len(parts) == len(kinds.unique())


def test_components_are_the_singular_vectors_of_all_tokens_of_a_layer(tokenizer, vectors):
    scaling = Scaling.fit([vectors], tokenizer, "entry")
    found = layer_components(vectors.split(3), tokenizer, scaling, LATENT).double().numpy()
    parts = tokenizer.tokens(scaling.normalised(vectors)).split(tokenizer.lengths, 1)
    for ours, part in zip(found, parts, strict=True):
        rows = part.flatten(0, 1).double().numpy()
        _, values, axes = np.linalg.svd(rows, full_matrices=False)
        kept = min(LATENT, int((values > 1e-5 * values[0]).sum())) if values[0] > 0 else 0
        expected = axes[:kept].T @ axes[:kept]
        np.testing.assert_allclose(ours @ ours.T, expected, atol=1e-4)


def test_directions_beyond_what_a_layer_spans_are_zero(tokenizer, vectors):
    none = Scaling(torch.zeros(vectors.shape[1]), torch.ones(vectors.shape[1]))
    found = layer_components([vectors[:1]], tokenizer, none, tokenizer.width + 2)
    assert found.shape[2] == tokenizer.width + 2
    for ours, length in zip(found, tokenizer.lengths, strict=True):
        assert int((ours.norm(dim=0) > 0.5).sum()) <= min(length, tokenizer.width)


def test_no_model_is_one_line(tokenizer, vectors):
    scaling = Scaling.fit([vectors], tokenizer, "entry")
    with pytest.raises(ZooError, match="no model"):
        layer_components([], tokenizer, scaling, LATENT)


def test_a_linear_autoencoder_begins_as_the_projection_on_components(tokenizer, vectors):
    scaling = Scaling.fit([vectors], tokenizer, "entry")
    components = layer_components([vectors], tokenizer, scaling, LATENT)
    model = WeightAutoencoder(tokenizer, RECIPE.sizes, components)
    tokens = tokenizer.tokens(scaling.normalised(vectors))
    found = model.decode(model.encode(tokens))
    parts = zip(tokens.split(tokenizer.lengths, 1), components, strict=True)
    expected = torch.cat([part @ axes @ axes.T for part, axes in parts], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_it_is_trained_saved_and_loaded_with_its_beginning(zoo, vectors, tmp_path):
    trained = train_autoencoder(zoo, RECIPE, tmp_path)
    loaded = load_autoencoder(tmp_path)
    torch.testing.assert_close(loaded.encode(vectors[:2]), trained.encode(vectors[:2]))
    assert torch.equal(loaded.components, trained.components)
    start = WeightAutoencoder(trained.tokenizer, RECIPE.sizes, trained.components)
    assert not torch.equal(start.down, trained.model.down)
    held = HeldOut.of(zoo, "train")
    before = {found.name: found for found in baselines(held, loaded)}["untrained"]
    plain = {
        found.name: found
        for found in baselines(held, train_autoencoder(zoo, replace(RECIPE, sizes=Sizes(linear=False))))
    }
    assert before.values["r2_beyond_mean"] > 0.5 > plain["untrained"].values["r2_beyond_mean"]
