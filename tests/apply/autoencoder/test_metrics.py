"""Measures of reconstructions, and the report that a prototype cannot pass."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from vitzoo_hf.apply.autoencoder import metrics
from vitzoo_hf.apply.autoencoder.evaluation import Reconstruction, evaluate_autoencoder
from vitzoo_hf.apply.autoencoder.model import Sizes
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

LAYOUT = Layout(("norm.weight", "norm.bias", "head.weight", "head.bias"), ((4,), (4,), (3, 4), (3,)))


def test_layer_r2_is_that_of_numpy_and_ignores_other_layers():
    tokenizer = Tokenizer.of(LAYOUT)
    decoded, original = torch.randn(5, 23), torch.randn(5, 23)
    mean = original.mean(0)
    found = metrics.layer_r2(decoded, original, mean, tokenizer)
    a, b, m = (values.double().numpy() for values in (decoded, original, mean))
    for number, columns in enumerate((slice(0, 8), slice(8, 23))):
        expected = 1 - ((a - b)[:, columns] ** 2).sum() / ((b - m)[:, columns] ** 2).sum()
        assert float(found[number]) == pytest.approx(expected)
    assert torch.equal(metrics.layer_r2(original, original, mean, tokenizer), torch.ones(2, dtype=torch.float64))
    still = torch.ones(5, 23)
    assert metrics.layer_r2(still, still, still[0], tokenizer).isnan().all()


def test_a_prototype_has_no_specificity_and_copies_have_all():
    generator = torch.Generator().manual_seed(0)
    original = torch.randint(0, 10, (6, 500), generator=generator)
    prototype = original[:1].expand(6, -1)
    assert metrics.specificity(original, original).min() > 0.85
    assert abs(metrics.specificity(prototype, original)[1:].mean()) < 0.25
    same = original[:1].expand(6, -1)
    assert metrics.specificity(same, same).abs().max() == 0
    expected = [
        (original[i] == original[i]).double().mean()
        - np.mean([(original[i] == original[j]).double().mean() for j in range(6) if j != i])
        for i in range(6)
    ]
    torch.testing.assert_close(metrics.specificity(original, original), torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least two models"):
        metrics.specificity(original[:1], original[:1])


def test_retention_and_rank_correlation():
    original, decoded = torch.tensor([0.9, 0.8, 0.7]).double(), torch.tensor([0.5, 0.4, 0.6]).double()
    assert float(metrics.retention(decoded, original, 0.1)) == pytest.approx(0.4 / 0.7)
    assert float(metrics.retention(original, original, 0.1)) == 1
    assert metrics.rank_correlation(decoded, original) == pytest.approx(spearmanr(decoded, original).statistic)
    assert metrics.rank_correlation(torch.full((3,), 0.9).double(), original) == 0
    with pytest.raises(ValueError, match=r"accuracy 0\.800 are no better than chance"):
        metrics.retention(decoded, original, 0.9)


def test_diversity_and_nearest_distances_are_those_of_cdist():
    a, b = torch.randn(5, 30).double(), torch.randn(7, 30).double()
    pairs = [float((a[i] - a[j]).norm()) for i in range(5) for j in range(i)]
    others = [float((b[i] - b[j]).norm()) for i in range(7) for j in range(i)]
    assert metrics.diversity(a, b) == pytest.approx(np.mean(pairs) / np.mean(others))
    found, expected = metrics.nearest(a, b), torch.cdist(a, b).min(1)
    torch.testing.assert_close(found.distance, expected.values)
    assert torch.equal(found.position, expected.indices)
    assert metrics.nearest(b[2:3], b) == (torch.tensor([0.0]).double(), torch.tensor([2]))
    assert metrics.diversity(a[:1].expand(5, -1), a) == 0


def test_shared_errors_by_hand():
    labels = torch.tensor([0, 0, 0, 0])
    decoded, original = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]), torch.tensor([[1, 0, 2, 0], [0, 0, 0, 0]])
    found = metrics.shared_errors(decoded, original, labels)
    assert float(found[0]) == pytest.approx(1 / 3)
    assert found[1].isnan()


@pytest.fixture(scope="module")
def report(tiny_zoo) -> dict[str, Reconstruction]:
    zoo = Zoo(tiny_zoo).filter(stage="finetune", head="mlp")
    recipe = AutoencoderRecipe(
        structure=1.0, steps=5, batch_size=2, sizes=Sizes(width=16, latent=4, heads=2, blocks=1)
    )
    trained = train_autoencoder(zoo, recipe)
    return {found.name: found for found in evaluate_autoencoder(zoo, trained, split="train")}


def test_baselines_are_what_they_are_called(report):
    assert list(report) == [
        "autoencoder",
        "constant best",
        "mean weights",
        "nearest training model",
        "untrained",
        "pca",
    ]
    for name in ("constant best", "mean weights"):
        assert report[name].values["diversity"] == 0
        assert report[name].values["rank_correlation"] == 0
    assert report["mean weights"].values["r2_beyond_mean"] == pytest.approx(0, abs=1e-6)
    assert report["nearest training model"].values["nearest_training"] == pytest.approx(0, abs=1e-6)
    assert report["pca"].values["r2_beyond_mean"] > 0
    assert set(report["pca"].layers) >= {"0 pos_embed", "1 attn.q", "2 head.0"}


def test_a_prototype_fails_whatever_its_accuracy(report):
    constant = report["constant best"]
    failures = constant.failures(constant)
    assert any("is not above a constant's" in text for text in failures)
    assert any("diversity 0.00 is below 0.7" in text for text in failures)
    assert any("rank correlation" in text for text in failures)
    good = {"agreement": 1.0, "specificity": 0.2, "specificity_low": 0.1, "rank_correlation": 1.0, "diversity": 1.0}
    assert Reconstruction("perfect", constant.values | good, {}, {}).failures(constant) == []


def test_too_few_models_are_refused(tiny_zoo):
    zoo = Zoo(tiny_zoo).filter(stage="finetune", head="mlp")
    trained = train_autoencoder(zoo, AutoencoderRecipe(structure=1.0, steps=1, batch_size=2))
    with pytest.raises(ZooError, match="0 models in split 'test'; reconstructions are judged on at least 4"):
        evaluate_autoencoder(zoo, trained)


def test_models_of_two_tasks_are_not_judged_on_the_images_of_one():
    zoo = Zoo.sample().filter(head="linear", layout="796c1d0bb9bf2b6c")
    trained = train_autoencoder(zoo.filter(dataset="digits"), AutoencoderRecipe(structure=1.0, steps=1, batch_size=2))
    with pytest.raises(ZooError, match="models of digits, mnist5k: no images test all of them"):
        evaluate_autoencoder(zoo, trained, split="train")
