"""Metrics on a CUDA device: the CPU's results, and kernels and syncs that do not grow with pairs, models or images.

Budgets of paper size (250 models, 10,000 images) are counted on tensors without values.
"""

import pytest
import torch
from simulated_kernels import DeviceTensor
from weight_zoo import LAYOUT, draw

import vitzoo_hf as vz
from vitzoo_hf.metrics.cka import hsic
from vitzoo_hf.metrics.weight_distances import norms
from vitzoo_hf.metrics.weight_statistics import matrices_of, spectral_norm

MODELS, IMAGES, CLASSES, WIDTH = 4, 30, 5, 6


def logits(device, models=MODELS, images=IMAGES):
    drawn = torch.randn(models, images, CLASSES, generator=torch.Generator().manual_seed(0))
    return drawn.to(device)


def predicted(device, **size):
    return logits(device, **size).argmax(-1)


def labels(device, images=IMAGES):
    return torch.randint(CLASSES, (images,), generator=torch.Generator().manual_seed(1)).to(device)


def features(device, models=MODELS, images=IMAGES, dtype=torch.float32):
    drawn = torch.randn(models, images, WIDTH, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return drawn.to(device)


def weights(device, models=MODELS):
    return draw(models).to(device)


def in_batches(device):
    similarity = vz.MinibatchCKA()
    for batch in features(device).split(12, dim=1):
        similarity.update(batch)
    return similarity.cka()


def in_rbf_batches(device):
    similarity = vz.MinibatchCKA(kernel="rbf", bandwidth=2.0)
    similarity.update(features(device))
    return similarity.cka()


def of_unequal_widths(device):
    return vz.cka([*features(device), features(device)[0, :, :3]])


def statistics(device):
    found = vz.weight_statistics(weights(device), LAYOUT)
    return torch.stack([found.norm, found.mean, found.std, found.sparsity, found.excess_kurtosis])


def with_duplicates(device):
    vectors = weights(device)
    return vz.weight_distances(torch.cat([vectors, vectors[:2], vectors[:1] * (1 + 1e-6)]))


METRICS = {
    "agreement": lambda device: vz.agreement(predicted(device)),
    "cohen_kappa": lambda device: vz.cohen_kappa(predicted(device)),
    "error_consistency": lambda device: vz.error_consistency(predicted(device), labels(device)),
    "error_overlap": lambda device: vz.error_overlap(predicted(device), labels(device)),
    "error_overlap of classes": lambda device: vz.error_overlap(predicted(device), labels(device), same_class=True),
    "jensen_shannon": lambda device: vz.jensen_shannon(logits(device)),
    "jensen_shannon in float64": lambda device: vz.jensen_shannon(logits(device).double()),
    "predictions": lambda device: vz.predictions(logits(device)),
    "accuracy": lambda device: vz.accuracy(logits(device), labels(device)),
    "accuracy of predictions": lambda device: vz.accuracy(predicted(device), labels(device)),
    "accuracy in the top 3": lambda device: vz.accuracy(logits(device), labels(device), k=3),
    "labels of the CPU": lambda device: vz.accuracy(logits(device), labels("cpu")),
    "labels of the CPU, top 3": lambda device: vz.accuracy(logits(device), labels("cpu"), k=3),
    "class_accuracy": lambda device: vz.class_accuracy(logits(device), labels(device)),
    "cross_entropy": lambda device: vz.cross_entropy(logits(device), labels(device)),
    "cross_entropy, labels of the CPU": lambda device: vz.cross_entropy(logits(device), labels("cpu")),
    "brier_score": lambda device: vz.brier_score(logits(device), labels(device)),
    "prediction_entropy": lambda device: vz.prediction_entropy(logits(device)),
    "calibration": lambda device: vz.expected_calibration_error(logits(device), labels(device)),
    "cka": lambda device: vz.cka(features(device)),
    "cka in float64": lambda device: vz.cka(features(device, dtype=torch.float64)),
    "cka, biased": lambda device: vz.cka(features(device), debiased=False),
    "cka, rbf": lambda device: vz.cka(features(device), kernel="rbf", bandwidth=0.5),
    "cka of many features": lambda device: vz.cka(features(device, images=5)),
    "cka of unequal widths": of_unequal_widths,
    "cka_between": lambda device: vz.cka_between(features(device)[:2], features(device)),
    "hsic": lambda device: hsic(features(device)),
    "MinibatchCKA": in_batches,
    "MinibatchCKA, rbf": in_rbf_batches,
    "weight_distances": lambda device: vz.weight_distances(weights(device)),
    "weight_distances of duplicates": with_duplicates,
    "weight_distances, normalised": lambda device: vz.weight_distances(weights(device), "normalized_l2"),
    "part_distances": lambda device: vz.part_distances(weights(device), LAYOUT),
    "part_distances of tensors": lambda device: vz.part_distances(weights(device), LAYOUT, per="tensor"),
    "cosine_similarity": lambda device: vz.cosine_similarity(weights(device)),
    "task_vectors": lambda device: vz.task_vectors(weights(device), weights(device)[:1].expand(MODELS, -1) + 1),
    "norms": lambda device: norms(weights(device)),
    "weight_statistics": statistics,
    "weight_quantiles": lambda device: vz.weight_quantiles(weights(device), LAYOUT, [0.1, 0.5]),
    "singular_values": lambda device: vz.singular_values(matrices_of(weights(device), LAYOUT)["head.weight"]),
    "spectral_norm": lambda device: spectral_norm(matrices_of(weights(device), LAYOUT)["head.weight"]),
    "stable_rank": lambda device: vz.stable_rank(matrices_of(weights(device), LAYOUT)["blocks.0.attn.q.weight"]),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_results_are_those_of_the_cpu(simulated_cuda, metric):
    result, expected = metric("cuda"), metric("cpu")
    assert isinstance(result, DeviceTensor)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_features_of_two_devices_are_refused(simulated_cuda):
    with pytest.raises(ValueError, match="features are on cpu, cuda:0; expected one device"):
        vz.cka([features("cpu")[0], features("cuda")[0]])
