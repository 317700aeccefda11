"""Evaluation on a CUDA device: the CPU's tables, measured where the outputs are."""

import numpy as np
import pandas as pd
import pytest
import torch
import weight_zoo

import vitzoo_hf as vz
from vitzoo_hf.evaluation.precision import precision_effect
from vitzoo_hf.evaluation.weight_metrics import zoo_task_vectors, zoo_weight_metrics
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def models():
    return Zoo.sample().filter(stage="finetune", is_final=True)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A parent, its children, and a duplicate."""
    vectors = weight_zoo.draw(5)
    vectors[4] = vectors[3]
    parents = [None, *["m0@1"] * 4]
    return weight_zoo.write(tmp_path_factory.mktemp("family") / "zoo", vectors, parents=parents)


@pytest.fixture(scope="module")
def expected(models):
    return vz.evaluate(models, progress=False)


def assert_same_tables(table, expected):
    pd.testing.assert_frame_equal(table, expected, rtol=1e-4, atol=1e-5)


def assert_same(tensor, expected):
    torch.testing.assert_close(torch.as_tensor(tensor).cpu(), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def test_reports_are_those_of_the_cpu(simulated_cuda, models, expected):
    report = vz.evaluate(models, device="cuda", progress=False)
    assert simulated_cuda.kernels > 100
    assert_same_tables(report.evaluations, expected.evaluations)
    assert_same_tables(report.pairs, expected.pairs)


def test_pairs_are_measured_on_the_device(simulated_cuda, models):
    vz.evaluate(models, device="cuda", progress=False)
    used = {line.partition(":")[0] for line, _ in simulated_cuda.lines("kernel")}
    assert used >= {"metrics/agreement.py", "metrics/squared_distances.py"}


def test_cka_is_measured_on_the_device(simulated_cuda, models):
    vz.evaluate(models, device="cuda", progress=False)
    assert any(line.startswith("metrics/gram_products.py") for line, _ in simulated_cuda.lines("kernel"))


def test_behaviour_is_measured_on_the_device(simulated_cuda, models):
    vz.evaluate(models, device="cuda", progress=False)
    assert any(line.startswith("metrics/behavior.py:1") for line, _ in simulated_cuda.lines("kernel"))


def test_precision_effect_is_that_of_the_cpu(simulated_cuda, models):
    images, labels = models.probes("digits")
    rows = list(models.rows())
    effects = [
        precision_effect(rows, images, labels, precision="bfloat16", device=device) for device in ("cuda", "cpu")
    ]
    for name, value in effects[1].items():
        np.testing.assert_allclose(effects[0][name], value, rtol=0.2, atol=0.02)


OPTIONS = {
    "statistics": {},
    "tensors": {"per": "tensor", "statistics": False},
    "quantiles": {"quantiles": [0.5], "statistics": False},
    "spectra": {"spectra": 2, "statistics": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_weight_metrics_are_those_of_the_cpu(simulated_cuda, family, options):
    metrics, expected = (
        zoo_weight_metrics(family, device=device, progress=False, **options) for device in ("cuda", "cpu")
    )
    for name in ("l2", "normalized_l2", "cosine", "norms"):
        assert_same(getattr(metrics, name), getattr(expected, name))
    assert_same_tables(metrics.table, expected.table)
    assert_same_tables(metrics.spectra, expected.spectra)


def test_task_vectors_are_those_of_the_cpu(simulated_cuda, family):
    vectors, expected = (zoo_task_vectors(family, device=device, progress=False) for device in ("cuda", "cpu"))
    assert_same(vectors.cosine, expected.cosine)
    assert_same_tables(vectors.table, expected.table)
