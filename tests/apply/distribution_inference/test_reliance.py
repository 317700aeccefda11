"""Colour reliance of models whose reliance is known, and of trained ones."""

import numpy as np
import pytest
import torch
from packed_zoo import packed_zoo

from vitzoo_hf.apply.distribution_inference.reliance import colour_reliance, recoloured, world_behaviour
from vitzoo_hf.apply.distribution_inference.zoo_views import world_queries
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

TEXT = """\
name: reliance
architecture:
  name: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 4, in_chans: 3, embed_dim: 8, depth: 1, num_heads: 2}
images:
  digits: {size: 8, selection: 0.4, world: two-colour, queries: 40, tests: 200}
stages:
  pretrain:
    images: digits
    epochs: 3
    settings: {lr: 0.01, batch_size: 24, epoch_steps: 20, num_images: 480, label_noise: 0.25, colour_agreement: 0.95}
    factors: {learner: [erm, causal, colour-randomised]}
    replicas: 1
splits: {by: run, seed: 3, train: 0.6, validation: 0.2, test: 0.2}
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Zoo:
    return packed_zoo(tmp_path_factory.mktemp("reliance"), TEXT, together=8)


def test_reliance_of_known_probabilities():
    first, second = np.array([[0.1, 0.6], [0.5, 0.5]]), np.array([[0.4, 0.9], [0.5, 0.5]])
    logits = [torch.tensor(np.stack([np.log(1 - p), np.log(p)], 2), dtype=torch.float32) for p in (first, second)]
    torch.testing.assert_close(colour_reliance(*logits), torch.tensor([0.3, 0.0]))
    with pytest.raises(ZooError, match=r"expected two of \[P, N, 2\]"):
        colour_reliance(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


def test_recoloured_twice_is_the_same():
    images = torch.rand(5, 3, 4, 4)
    assert torch.equal(recoloured(recoloured(images)), images)
    assert not torch.equal(recoloured(images), images)


def test_behaviour_of_a_zoo_is_that_of_its_models_one_by_one(zoo):
    table = world_behaviour(zoo, progress=False).set_index("model_id")
    images, labels = zoo.probes("digits")
    other, other_labels = zoo.probes("digits-flipped")
    for model_id, found in table.iterrows():
        model = zoo.model(model_id)
        with torch.no_grad():
            here, there = model(images).softmax(1)[:, 1], model(images[:, [1, 0, 2]]).softmax(1)[:, 1]
            elsewhere = model(other).argmax(1)
        assert found["colour_reliance"] == pytest.approx(float((here - there).abs().mean()), abs=1e-5)
        assert found["accuracy"] == pytest.approx(float(((here > 0.5) == labels).double().mean()), abs=0.006)
        assert found["flipped_accuracy"] == pytest.approx(
            float((elsewhere == other_labels).double().mean()), abs=0.006
        )


def test_a_learner_that_sees_colour_relies_on_it_and_pays_elsewhere(zoo):
    ids = {row["factor_learner"]: row["model_id"] for row in zoo.index}
    table = world_behaviour(zoo, progress=False).set_index("model_id")
    erm, causal, randomised = (table.loc[ids[name]] for name in ("erm", "causal", "colour-randomised"))
    assert causal["colour_reliance"] < 1e-5
    assert erm["colour_reliance"] > 0.3 > randomised["colour_reliance"]
    assert erm["accuracy"] > 0.85
    assert erm["flipped_accuracy"] < 0.35


def test_a_zoo_without_worlds_says_so():
    with pytest.raises(ZooError, match="has these worlds: none"):
        world_behaviour(Zoo.sample(), progress=False)


def test_queries_tell_the_world_they_are_drawn_from(tmp_path):
    """Labels tell the worlds apart; of three, two are chosen."""
    text = TEXT.replace("learner: [erm, causal, colour-randomised]", "label_ratio: [0.0, 0.5, 1.0]")
    text = text.replace("label_noise: 0.25, ", "").replace("epochs: 3", "epochs: 1")
    queries = world_queries(packed_zoo(tmp_path, text))
    assert queries.origins.bincount().tolist() == [14, 13, 13]
    assert (queries.labels[queries.origins == 0] == 0).all()
    assert (queries.labels[queries.origins == 2] == 1).all()
    chosen = queries.of(label_ratio=[0.0, 1.0])
    assert chosen.labels.tolist() == chosen.origins.tolist() == [0] * 14 + [1] * 13
    assert [world["label_ratio"] for world in chosen.worlds] == [0.0, 1.0]
    with pytest.raises(ZooError, match="have no setting 'ratio'"):
        queries.of(ratio=1)
    with pytest.raises(ZooError, match="no world of the queries has"):
        queries.of(label_ratio=0.7)
