"""Metrics on a CUDA device: the CPU's results, and kernels and syncs that do not grow with pairs, models or images.

Budgets of paper size (250 models, 10,000 images) are counted on tensors without values.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from simulated_kernels import DeviceTensor
from torch import Tensor
from weight_zoo import LAYOUT, draw

import vitzoo_hf as vz
from vitzoo_hf.metrics.cka import hsic
from vitzoo_hf.metrics.features import CentredFeatures
from vitzoo_hf.metrics.gram_products import median_distances
from vitzoo_hf.metrics.weight_distances import norms
from vitzoo_hf.metrics.weight_statistics import matrices_of, spectral_norm


@dataclass(frozen=True)
class Inputs:
    """Inputs of metrics on a device."""

    device: str
    models: int = 4
    images: int = 30

    def drawn(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    @property
    def logits(self) -> Tensor:
        return self.drawn(self.models, self.images, 5, seed=0)

    @property
    def predicted(self) -> Tensor:
        return self.logits.argmax(-1)

    @property
    def labels(self) -> Tensor:
        return self.labels_of_cpu.to(self.device)

    @property
    def labels_of_cpu(self) -> Tensor:
        return torch.randint(5, (self.images,), generator=torch.Generator().manual_seed(1))

    @property
    def features(self) -> Tensor:
        return self.drawn(self.models, self.images, 6, seed=2)

    @property
    def weights(self) -> Tensor:
        return draw(self.models).to(self.device)


def in_batches(at):
    similarity = vz.MinibatchCKA()
    for batch in at.features.split(12, dim=1):
        similarity.update(batch)
    return similarity.cka()


def in_rbf_batches(at):
    similarity = vz.MinibatchCKA(kernel="rbf", bandwidth=2.0)
    similarity.update(at.features)
    return similarity.cka()


def of_unequal_widths(at):
    return vz.cka([*at.features, at.features[0, :, :3]])


def statistics(at):
    measured = vz.weight_statistics(at.weights, LAYOUT)
    return torch.stack([measured.norm, measured.mean, measured.std, measured.sparsity, measured.excess_kurtosis])


def with_duplicates(at):
    vectors = at.weights
    return vz.weight_distances(torch.cat([vectors, vectors[:2], vectors[:1] * (1 + 1e-6)]))


METRICS = {
    "agreement": lambda at: vz.agreement(at.predicted),
    "cohen_kappa": lambda at: vz.cohen_kappa(at.predicted),
    "error_consistency": lambda at: vz.error_consistency(at.predicted, at.labels),
    "error_overlap": lambda at: vz.error_overlap(at.predicted, at.labels),
    "error_overlap of classes": lambda at: vz.error_overlap(at.predicted, at.labels, same_class=True),
    "jensen_shannon": lambda at: vz.jensen_shannon(at.logits),
    "jensen_shannon in float64": lambda at: vz.jensen_shannon(at.logits.double()),
    "predictions": lambda at: vz.predictions(at.logits),
    "accuracy": lambda at: vz.accuracy(at.logits, at.labels),
    "accuracy of predictions": lambda at: vz.accuracy(at.predicted, at.labels),
    "accuracy in the top 3": lambda at: vz.accuracy(at.logits, at.labels, k=3),
    "labels of the CPU": lambda at: vz.accuracy(at.logits, at.labels_of_cpu),
    "labels of the CPU, top 3": lambda at: vz.accuracy(at.logits, at.labels_of_cpu, k=3),
    "class_accuracy": lambda at: vz.class_accuracy(at.logits, at.labels),
    "cross_entropy": lambda at: vz.cross_entropy(at.logits, at.labels),
    "cross_entropy, labels of the CPU": lambda at: vz.cross_entropy(at.logits, at.labels_of_cpu),
    "brier_score": lambda at: vz.brier_score(at.logits, at.labels),
    "prediction_entropy": lambda at: vz.prediction_entropy(at.logits),
    "calibration": lambda at: vz.expected_calibration_error(at.logits, at.labels),
    "cka": lambda at: vz.cka(at.features),
    "cka in float64": lambda at: vz.cka(at.features.double()),
    "cka, biased": lambda at: vz.cka(at.features, debiased=False),
    "cka, rbf": lambda at: vz.cka(at.features, kernel="rbf", bandwidth=0.5),
    "cka of many features": lambda at: vz.cka(replace(at, images=5).features),
    "cka of unequal widths": of_unequal_widths,
    "cka_between": lambda at: vz.cka_between(at.features[:2], at.features),
    "hsic": lambda at: hsic(at.features),
    "MinibatchCKA": in_batches,
    "MinibatchCKA, rbf": in_rbf_batches,
    "weight_distances": lambda at: vz.weight_distances(at.weights),
    "weight_distances of duplicates": with_duplicates,
    "weight_distances, normalised": lambda at: vz.weight_distances(at.weights, "normalized_l2"),
    "part_distances": lambda at: vz.part_distances(at.weights, LAYOUT),
    "part_distances of tensors": lambda at: vz.part_distances(at.weights, LAYOUT, per="tensor"),
    "cosine_similarity": lambda at: vz.cosine_similarity(at.weights),
    "task_vectors": lambda at: vz.task_vectors(at.weights, at.weights[:1].expand(at.models, -1) + 1),
    "norms": lambda at: norms(at.weights),
    "weight_statistics": statistics,
    "weight_quantiles": lambda at: vz.weight_quantiles(at.weights, LAYOUT, [0.1, 0.5]),
    "singular_values": lambda at: vz.singular_values(matrices_of(at.weights, LAYOUT)["head.weight"]),
    "spectral_norm": lambda at: spectral_norm(matrices_of(at.weights, LAYOUT)["head.weight"]),
    "stable_rank": lambda at: vz.stable_rank(matrices_of(at.weights, LAYOUT)["blocks.0.attn.q.weight"]),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_results_are_those_of_the_cpu(simulated_cuda, metric):
    result, expected = metric(Inputs("cuda")), metric(Inputs("cpu"))
    assert isinstance(result, DeviceTensor)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_features_of_two_devices_are_refused(simulated_cuda):
    with pytest.raises(ValueError, match="features are on cpu, cuda:0; expected one device"):
        vz.cka([Inputs("cpu").features[0], Inputs("cuda").features[0]])


GROWS = {  # kernels that a model more may cost: features of models may have any widths
    "cka": 10,
    "cka in float64": 10,
    "cka, biased": 10,
    "cka, rbf": 18,
    "cka of many features": 10,
    "cka of unequal widths": 10,
    "cka_between": 10,
    "hsic": 10,
    "MinibatchCKA": 30,  # in three batches
    "MinibatchCKA, rbf": 10,
}


def cost(device, metric, **size):
    inputs = Inputs("cuda", **size)
    device.reset()
    metric(inputs)
    return device.kernels, device.syncs


@pytest.mark.parametrize("name", METRICS)
def test_more_models_cost_no_more_kernels(simulated_cuda, name):
    kernels, syncs = cost(simulated_cuda, METRICS[name], models=4)
    more_kernels, more_syncs = cost(simulated_cuda, METRICS[name], models=7)
    assert more_kernels - kernels <= 3 * GROWS.get(name, 0)
    assert more_syncs == syncs


OF_IMAGES = [*METRICS][: [*METRICS].index("MinibatchCKA")]  # others are of weights, or of batches


@pytest.mark.parametrize("name", OF_IMAGES)
def test_more_images_cost_no_more_kernels(simulated_cuda, name):
    kernels, syncs = cost(simulated_cuda, METRICS[name], images=30)
    more_kernels, more_syncs = cost(simulated_cuda, METRICS[name], images=50)
    assert more_kernels <= kernels
    assert more_syncs <= syncs


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def paper_logits():
    return empty(250, 10_000, 100)


def paper_predictions():
    return empty(250, 10_000, dtype=torch.int64)


def paper_labels():
    return empty(10_000, dtype=torch.int64)


PAPER = {  # what is measured, kernels, syncs: most of the syncs are checks of the inputs
    "agreement": (lambda: vz.agreement(paper_predictions()), 100, 0),
    "cohen_kappa": (lambda: vz.cohen_kappa(paper_predictions()), 100, 2),
    "error_consistency": (
        lambda: vz.error_consistency(paper_predictions(), paper_labels()),
        100,
        2,
    ),
    "accuracy": (lambda: vz.accuracy(paper_logits(), paper_labels()), 100, 3),
    "accuracy in the top 5": (lambda: vz.accuracy(paper_logits(), paper_labels(), k=5), 500, 3),
    "cross_entropy": (lambda: vz.cross_entropy(paper_logits(), paper_labels()), 500, 3),
    "brier_score": (lambda: vz.brier_score(paper_logits(), paper_labels()), 500, 3),
    "prediction_entropy": (lambda: vz.prediction_entropy(paper_logits()), 500, 1),
    "calibration": (lambda: vz.expected_calibration_error(paper_logits(), paper_labels()), 500, 3),
    "jensen_shannon": (lambda: vz.jensen_shannon(paper_logits()), 500, 1),
    "cka": (lambda: vz.cka(empty(250, 10_000, 384)), 3000, 5),
    "cka, biased": (lambda: vz.cka(empty(250, 10_000, 384), debiased=False), 3000, 5),
    "medians": (lambda: median_distances(CentredFeatures(empty(250, 600, 384), 4)), 2000, 10),
    "weight_distances": (lambda: vz.weight_distances(empty(250, 21_700_000)), 3000, 10),
    "cosine_similarity": (lambda: vz.cosine_similarity(empty(250, 21_700_000)), 3000, 10),
    "task_vectors": (lambda: vz.task_vectors(empty(250, 21_700_000), empty(250, 21_700_000)), 10, 0),
}


@pytest.mark.parametrize("name", PAPER)
def test_budgets_of_250_models_and_10_000_images(simulated_cuda, name):
    measure, kernels, syncs = PAPER[name]
    with (
        simulated_cuda.without_values(0, squared_lengths_of_piece=1, _connected=1, norms=1, weight_distances=1),
        simulated_cuda.budget(kernels=kernels, syncs=syncs),
    ):
        measure()
