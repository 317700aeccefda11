import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from scipy.stats import kurtosis

from vitzoo_hf.format.layout import Layout
from vitzoo_hf.metrics.weight_statistics import Moments, statistics_of, weight_quantiles, weight_statistics

gram = importlib.import_module("vitzoo_hf.metrics.squared_distances")
blocks = importlib.import_module("vitzoo_hf.metrics.blocks")
LAYOUT = Layout(("a", "b.weight", "c"), ((7,), (30, 20), (1,)))


@pytest.fixture
def unchecked():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def draw(models=5, seed=0, layout=LAYOUT):
    return torch.randn(models, layout.num_parameters, generator=torch.Generator().manual_seed(seed))


def assert_equals_scipy(weights, layout, found, threshold=0.0, tolerance=1e-5):
    for number, (_, place) in enumerate(layout.items()):
        values = weights[:, place].double().numpy()
        spread = values.std(1) + 1e-300
        np.testing.assert_allclose(found.norm[:, number], np.linalg.norm(values, axis=1), rtol=tolerance)
        np.testing.assert_array_less(abs(found.mean[:, number].numpy() - values.mean(1)), tolerance * spread + 1e-300)
        np.testing.assert_allclose(found.std[:, number], values.std(1), rtol=tolerance)
        np.testing.assert_array_equal(found.sparsity[:, number], (abs(values) <= threshold).mean(1))
        if values.shape[1] > 1:
            expected = kurtosis(values, axis=1)
            np.testing.assert_allclose(found.excess_kurtosis[:, number], expected, rtol=10 * tolerance, atol=1e-4)


@given(
    st.integers(1, 5),
    st.lists(st.integers(2, 40), min_size=1, max_size=4),
    st.sampled_from([0, 1, 1000]),
    st.sampled_from([1e-15, 1, 1e12]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_statistics_equal_scipy(models, sizes, offset, scale, seed):
    layout = Layout(tuple(f"t{number}" for number in range(len(sizes))), tuple((size,) for size in sizes))
    weights = (draw(models, seed, layout) + offset) * scale
    assert_equals_scipy(weights, layout, weight_statistics(weights, layout))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    weights = draw().to(dtype)
    assert_equals_scipy(weights, LAYOUT, weight_statistics(weights, LAYOUT), tolerance=1e-6)


@pytest.mark.parametrize("cuts", [[1, 2, 300], [599], [256, 512], []])
def test_moments_of_pieces_are_those_of_the_whole(cuts, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1)
    weights = (draw() * torch.logspace(-2, 3, 608))[:, LAYOUT.place("b.weight")]
    moments = Moments(5, weights.device)
    for start, stop in zip([0, *cuts], [*cuts, 600], strict=True):
        moments.add(weights[:, start:stop])
    assert_equals_scipy(weights, Layout(("b",), ((600,),)), statistics_of([moments]))


def test_zeros_constants_and_thresholds():
    weights = torch.zeros(4, 608)
    weights[1] = 0.1
    weights[2] = torch.linspace(-1, 1, 608)
    weights[3, ::2] = 1e-3
    found = weight_statistics(weights, LAYOUT, threshold=1e-3)
    assert found.sparsity[0].tolist() == found.sparsity[3].tolist() == [1, 1, 1]
    assert found.sparsity[1].tolist() == [0, 0, 0]
    assert found.std[:2].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert found.norm[0].tolist() == [0, 0, 0]
    assert found.mean[1].tolist() == [torch.tensor(0.1).item()] * 3
    assert found.excess_kurtosis[:2].isnan().all()
    assert weight_statistics(weights, LAYOUT).sparsity[3, 1] == 0.5
    constant = torch.full((2, 9000), 0.1, dtype=torch.float64)
    assert weight_statistics(constant, Layout(("c",), ((9000,),))).std.tolist() == [[0], [0]]


def test_kurtosis_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    uniform, normal = torch.rand(1, 200_000, generator=generator), torch.randn(1, 200_000, generator=generator)
    layout = Layout(("w",), ((200_000,),))
    assert abs(weight_statistics(uniform, layout).excess_kurtosis.item() + 1.2) < 0.02
    assert abs(weight_statistics(normal, layout).excess_kurtosis.item()) < 0.05


def test_statistics_do_not_depend_on_other_models_or_on_strides():
    weights = draw(8)
    whole = weight_statistics(weights, LAYOUT)
    order = torch.randperm(8)
    assert torch.equal(weight_statistics(weights[order], LAYOUT).std, whole.std[order])
    strided = weights.T.contiguous().T
    torch.testing.assert_close(weight_statistics(strided, LAYOUT).norm, whole.norm, rtol=1e-6, atol=0)
    broken = weights.index_fill(0, torch.tensor(3), torch.nan)
    assert weight_statistics(broken, LAYOUT).mean[3].isnan().all()
    assert torch.equal(weight_statistics(broken, LAYOUT).mean[:3], whole.mean[:3])


@given(st.integers(1, 30), st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_quantiles_equal_numpy(size, quantiles, seed):
    layout = Layout(("w", "v"), ((size,), (3,)))
    weights = draw(3, seed, layout)
    found = weight_quantiles(weights, layout, quantiles)
    for number, (_, place) in enumerate(layout.items()):
        expected = np.quantile(weights[:, place].double().numpy(), quantiles, axis=1).T
        np.testing.assert_allclose(found[:, number], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: weight_statistics(w[:, 1:], LAYOUT), "weights have 607 columns and the layout 608 values"),
        (lambda w: weight_statistics(w, LAYOUT, threshold=-1.0), r"threshold=-1.0; expected 0 or more"),
        (lambda w: weight_quantiles(w, LAYOUT, [0.5, 1.5]), r"quantiles=\[0.5, 1.5\]; expected numbers between 0"),
        (lambda w: weight_quantiles(w[0], LAYOUT, [0.5]), r"weights are float32 \[608\]; expected non-empty"),
    ],
)
def test_refusals(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call(draw())


@pytest.mark.gpu
def test_cpu_and_cuda_agree():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    here, there = weight_statistics(draw(), LAYOUT), weight_statistics(draw().cuda(), LAYOUT)
    for name, values in vars(here).items():
        torch.testing.assert_close(getattr(there, name).cpu(), values, rtol=1e-5, atol=1e-6, equal_nan=True)
    quantiles = weight_quantiles(draw(), LAYOUT, [0.1, 0.5])
    torch.testing.assert_close(weight_quantiles(draw().cuda(), LAYOUT, [0.1, 0.5]).cpu(), quantiles)
