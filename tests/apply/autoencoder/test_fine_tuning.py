"""Generated networks that are trained on."""

import json

import pytest
import torch
from torch.nn import functional

from vitzoo_hf.apply.autoencoder.fine_tuning import FineTuning, fine_tuned, training_images
from vitzoo_hf.apply.autoencoder.metrics import Networks
from vitzoo_hf.apply.autoencoder.model import Sizes
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.sampled_rows import Sampling, write_samples
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.apply.candidates import candidate_scores
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo).filter(stage="finetune", head="mlp")


@pytest.fixture(scope="module")
def rows(zoo):
    return list(zoo.rows())[:3]


@pytest.fixture(scope="module")
def vectors(rows) -> torch.Tensor:
    return torch.stack([torch.from_numpy(row["weights"].copy()) for row in rows])


def some_images(zoo, count=24):
    images, labels = training_images(zoo, zoo.index["dataset"][0])
    return images[:count], labels[:count]


def test_training_images_are_those_of_the_blueprint_and_no_test_images(zoo):
    dataset = zoo.index["dataset"][0]
    images, labels = training_images(zoo, dataset)
    tested, _ = zoo.probes(dataset)
    assert len(images) == len(labels) > len(tested) / 2
    assert images.shape[1:] == tested.shape[1:]
    assert torch.cdist(images.flatten(1), tested.flatten(1)).min() > 0
    with pytest.raises(ZooError, match="has images"):
        training_images(zoo, "cats")


def moved_alike(found, expected, start):
    """Adam divides by the gradient, so where that is nearly zero a weight may move either way."""
    return (found - expected).norm() < 1e-2 * (expected - start).norm()


def test_two_epochs_are_those_of_plain_adam_on_a_module(zoo, rows, vectors):
    images, labels = some_images(zoo)
    how = FineTuning(epochs=2, lr=1e-3, batch_size=8, seed=4)
    found = list(fine_tuned(Networks.like(rows[0]), vectors, images, labels, how))
    for place, row in enumerate(rows):
        model = reconstruct(row).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=how.lr, weight_decay=how.weight_decay)
        generator = torch.Generator().manual_seed(how.seed)
        for epoch in range(2):
            for chosen in torch.randperm(len(labels), generator=generator).split(8):
                optimizer.zero_grad()
                functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
            expected = torch.cat([value.flatten() for value in model.state_dict().values()])
            assert moved_alike(found[epoch][place], expected.detach(), vectors[place])


def test_no_network_depends_on_the_others_and_the_vectors_stay(zoo, rows, vectors):
    images, labels = some_images(zoo)
    networks, before = Networks.like(rows[0]), vectors.clone()
    *_, together = fine_tuned(networks, vectors, images, labels, FineTuning(1))
    *_, alone = fine_tuned(networks, vectors[1:2], images, labels, FineTuning(1))
    assert moved_alike(together[1], alone[0], vectors[1])
    assert torch.equal(vectors, before)


def test_what_cannot_be_is_one_line(zoo, rows, vectors):
    with pytest.raises(ZooError, match="epochs of fine-tuning is 0"):
        FineTuning(0)
    images, labels = some_images(zoo)
    broken = vectors.clone()
    broken[2, 0] = float("nan")
    with pytest.raises(ZooError, match=r"networks \[2\] are not finite after epoch 1"):
        list(fine_tuned(Networks.like(rows[0]), broken, images, labels))


def test_samples_are_trained_on_and_say_so(zoo, tmp_path):
    recipe = AutoencoderRecipe(steps=5, batch_size=4, queries=8, pool=20, sizes=Sizes(width=8, latent=2, blocks=1))
    trained = train_autoencoder(zoo, recipe)
    how = Sampling(count=4, keep=None)
    plain = write_samples(zoo, trained, tmp_path / "plain", how)
    tuned = write_samples(zoo, trained, tmp_path / "tuned", how, tuning=FineTuning(3, lr=2e-3))
    before, after = Zoo(tmp_path / "plain"), Zoo(tmp_path / "tuned")
    assert json.loads(after.index["provenance"][0])["fine_tuned"]["epochs"] == 3
    images, labels = training_images(zoo, zoo.index["dataset"][0])
    losses = [
        candidate_scores(
            torch.stack([torch.from_numpy(row["weights"]) for row in part.rows()]), next(part.rows()), images, labels
        ).loss.mean()
        for part in (before, after)
    ]
    assert losses[1] < losses[0]
    assert list(plain.table["model_id"]) == list(tuned.table["model_id"])
