import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from sklearn.metrics.pairwise import cosine_distances, euclidean_distances

from vitzoo_hf.format.layout import Layout
from vitzoo_hf.metrics.weight_distances import (
    cosine_similarity,
    norms,
    part_distances,
    task_vectors,
    weight_distances,
)
from vitzoo_hf.metrics.weight_statistics import weight_quantiles

gram = importlib.import_module("vitzoo_hf.metrics.squared_distances")
blocks = importlib.import_module("vitzoo_hf.metrics.blocks")


@pytest.fixture
def unchecked():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def l2_oracle(weights):
    w = weights.double().numpy()
    return np.array([[np.sqrt(((a - b) ** 2).sum()) for b in w] for a in w])


def assert_accurate(weights, tolerance=1e-6):
    """Relative error at most `tolerance`, identical models exactly 0 apart, symmetric to the bit."""
    result, expected = weight_distances(weights), l2_oracle(weights)
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=0)
    assert torch.equal(result, result.T)


@pytest.mark.parametrize("epsilon", [1, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("D", [1, 300, 5000])
def test_l2_of_a_base_and_noise(generator, epsilon, D):
    base = torch.randn(1, D, generator=generator)
    assert_accurate(base + epsilon * torch.randn(30, D, generator=generator))


def test_base_and_noise_and_families_need_no_direct_differences(monkeypatch, generator):
    """Else a population around one pretrained model would take as long as a loop over its pairs."""
    monkeypatch.setattr(gram, "_add_direct", None)
    noise = 1e-3 * torch.randn(12, 800, generator=generator)
    assert_accurate(torch.randn(800, generator=generator) + noise)
    assert_accurate(torch.randn(4, 1, 800, generator=generator).expand(4, 3, 800).reshape(12, 800) + noise)


def test_the_error_does_not_grow_with_the_number_of_weights(generator):
    assert_accurate(torch.randn(5, 1, generator=generator) + torch.randn(5, 300_000, generator=generator), 2e-7)


def test_l2_equals_scikit_learn(generator):
    weights = torch.randn(7, 1000, generator=generator)
    expected = euclidean_distances(weights.double().numpy())
    np.testing.assert_allclose(weight_distances(weights), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        "outlier",
        "families",
        "nested",
        "trajectory",
        "identical",
        "all identical",
        "one pair",
        "overflow",
        "underflow",
    ],
)
def test_l2_where_the_gram_matrix_cancels(generator, case):
    noise = torch.randn(12, 800, generator=generator)
    roots = torch.randn(4, 1, 800, generator=generator).expand(4, 3, 800).reshape(12, 800)
    weights = {
        "outlier": torch.cat([noise[:1] + 1e-3 * noise, torch.full((1, 800), 1e4)]),
        "families": roots + 1e-3 * noise,
        "nested": torch.cat([roots + 1e-2 * noise, roots + 1e-2 * noise + 1e-5 * noise.flip(0), 1e3 + noise]),
        "trajectory": torch.cumsum(noise * torch.logspace(0, -4, 12)[:, None], 0),
        "identical": torch.cat([noise, noise[:5], noise[:2]]),
        "all identical": noise[:1].expand(5, -1) + 0.1,
        "one pair": torch.cat([noise, noise[3:4] * (1 + 1e-6)]),
        "overflow": noise * 1e25,
        "underflow": noise * 1e-25,
    }[case]
    assert_accurate(weights)


def test_identical_models_are_exactly_zero_apart(generator):
    weights = torch.randn(6, 5000, generator=generator)[[0, 1, 0, 2, 3, 1, 4, 5, 0]] + 3
    same = torch.tensor([[a == b for b in [0, 1, 0, 2, 3, 1, 4, 5, 0]] for a in [0, 1, 0, 2, 3, 1, 4, 5, 0]])
    assert torch.equal(weight_distances(weights) == 0, same)
    assert torch.equal(weight_distances(weights, "cosine") == 0, same)
    assert torch.equal(cosine_similarity(weights) == 1, same)


def test_float64_weights_are_measured_in_float64(generator):
    weights = torch.randn(1, 500, generator=generator).double()
    weights = weights + 1e-9 * torch.randn(20, 500, generator=generator).double()
    assert_accurate(weights, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_on_the_stored_values(generator, dtype):
    weights = (torch.randn(1, 900, generator=generator) + 0.1 * torch.randn(9, 900, generator=generator)).to(dtype)
    assert_accurate(weights)


@pytest.mark.parametrize("columns", [256, 257, 999, 1000, 1001])
def test_blocks_of_columns_change_nothing(monkeypatch, generator, columns):
    weights = torch.randn(6, 1000, generator=generator)
    weights[1] = weights[0] + 1e-5
    monkeypatch.setattr(gram, "GRAM_ELEMENTS", 6 * columns)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 6 * columns)
    assert_accurate(weights)
    np.testing.assert_allclose(norms(weights), np.linalg.norm(weights.double(), axis=1), rtol=1e-12)


def test_strided_weights_are_read_and_not_written(generator):
    weights = torch.randn(400, 8, generator=generator).T.requires_grad_()
    before = weights.detach().clone()
    assert_accurate(weights.detach())
    assert not weight_distances(weights).requires_grad
    assert torch.equal(weights, before)


def test_autocast_does_not_reach_the_products(generator):
    weights = torch.randn(8, 400, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_accurate(weights)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_invariances(generator, metric):
    weights = torch.randn(7, 600, generator=generator)
    result = weight_distances(weights, metric)
    order = torch.randperm(7, generator=generator)
    torch.testing.assert_close(weight_distances(weights[order], metric), result[order][:, order], rtol=1e-6, atol=0)
    columns = torch.randperm(600, generator=generator)
    torch.testing.assert_close(weight_distances(weights[:, columns], metric), result, rtol=1e-6, atol=0)
    scaled = weight_distances(4 * weights, metric) / (4 if metric == "l2" else 1)
    torch.testing.assert_close(scaled, result, rtol=1e-12, atol=0)
    assert weight_distances(weights[:1], metric).tolist() == [[0]]


@given(st.integers(1, 9), st.integers(1, 700), st.sampled_from([1, 1e-4]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_shape(P, D, epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    assert_accurate(torch.randn(1, D, generator=generator) + epsilon * torch.randn(P, D, generator=generator), 1e-5)


def test_epochs_of_a_run_beside_other_runs(generator):
    """Close to each other, far from the rest: 1e-4 of the norm within, 1 between."""
    runs = torch.randn(5, 1, 3000, generator=generator)
    steps = 1e-4 * torch.randn(5, 4, 3000, generator=generator).cumsum(1)
    assert_accurate((runs + steps).flatten(0, 1), 1e-5)


def test_tiles_of_rows_change_nothing(monkeypatch, generator):
    weights = torch.randn(150, 600, generator=generator)
    assert_accurate(weights)
    monkeypatch.setattr(gram, "TILE", 7)
    assert_accurate(weights)


@pytest.mark.parametrize("epsilon", [1, 1e-4])
def test_normalized_l2_is_the_distance_over_the_mean_length(generator, epsilon):
    weights = torch.randn(1, 900, generator=generator) + epsilon * torch.randn(10, 900, generator=generator)
    lengths = np.linalg.norm(weights.double().numpy(), axis=1)
    expected = l2_oracle(weights) / np.sqrt(np.outer(lengths, lengths))
    result = weight_distances(weights, "normalized_l2")
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    torch.testing.assert_close(weight_distances(1024 * weights, "normalized_l2"), result, rtol=1e-6, atol=0)
    zeroed = weight_distances(weights.index_fill(0, torch.tensor(2), 0), "normalized_l2")
    assert zeroed[2].isnan().all()
    assert zeroed[3, :2].isfinite().all()


def by_block():
    shapes = {
        "cls_token": (1, 1, 4),
        "patch_embed.proj.bias": (4,),
        "blocks.0.norm1.weight": (4,),
        "blocks.0.attn.qkv.weight": (12, 4),
        "blocks.1.mlp.fc1.weight": (300, 4),
        "norm.weight": (4,),
        "head.weight": (3, 4),
        "pos_embed": (1, 5, 4),
    }
    return Layout(tuple(shapes), tuple(shapes.values()))


@pytest.mark.parametrize("metric", ["l2", "normalized_l2", "cosine"])
@pytest.mark.parametrize("per", ["model", "block", "tensor"])
def test_distances_of_parts_are_those_of_their_columns(generator, per, metric):
    layout = by_block()
    weights = torch.randn(6, layout.num_parameters, generator=generator)
    weights[1] = weights[0] + 1e-4 * weights[1]
    weights[3, layout.place("norm.weight")] = 0
    result = part_distances(weights, layout, per=per, metric=metric)
    parts = layout.parts(per)
    assert len(result) == len(parts)
    for part, names in zip(result, parts.values(), strict=True):
        columns = torch.cat([weights[:, layout.place(name)] for name in names], 1)
        torch.testing.assert_close(part, weight_distances(columns, metric), rtol=1e-6, atol=1e-12, equal_nan=True)


def test_squared_distances_of_parts_add_up(generator):
    layout = by_block()
    weights = torch.randn(6, layout.num_parameters, generator=generator)
    for per in ("block", "tensor"):
        total = part_distances(weights, layout, per=per).square().sum(0)
        torch.testing.assert_close(total.sqrt(), weight_distances(weights), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_task_vectors_are_differences(generator, dtype):
    parents = torch.randn(2, 500, generator=generator).to(dtype)[[0, 0, 1]]
    children = (parents.float() + 0.05 * torch.randn(3, 500, generator=generator)).to(dtype)
    result = task_vectors(children, parents)
    expected = (children.double() - parents.double()).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    np.testing.assert_allclose(cosine_similarity(result), 1 - cosine_distances(expected), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["l2", "normalized_l2", "cosine"])
def test_cpu_and_cuda_agree(generator, metric):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layout = by_block()
    weights = torch.randn(90, layout.num_parameters, generator=generator)
    weights[1:5] = weights[0] + 1e-4 * weights[1:5]
    there = part_distances(weights.cuda(), layout, metric=metric)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), part_distances(weights, layout, metric=metric), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("epsilon", [1, 1e-2, 1e-4])
def test_cosine_equals_scikit_learn(generator, epsilon):
    weights = torch.randn(1, 900, generator=generator) + epsilon * torch.randn(10, 900, generator=generator)
    expected = cosine_distances(weights.double().numpy())
    result = weight_distances(weights, "cosine")
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-15)
    np.testing.assert_allclose(cosine_similarity(weights), 1 - expected, atol=1e-6)


def test_cosine_of_parallel_opposite_and_zero_vectors(generator):
    base = torch.randn(500, generator=generator)
    similarity = cosine_similarity(torch.stack([base, 3 * base, -base, 0 * base]))
    expected = [[1, 1, -1, np.nan], [1, 1, -1, np.nan], [-1, -1, 1, np.nan], [np.nan] * 4]
    np.testing.assert_allclose(similarity, expected, atol=1e-6)
    assert similarity.nan_to_num().abs().max() <= 1
    assert weight_distances(torch.stack([base, 0 * base])).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: weight_distances(w, "l1"), "metric='l1'; expected 'l2', 'normalized_l2' or 'cosine'"),
        (lambda w: weight_distances(w[0]), r"weights are float32 \[9\]; expected .*one model: weights\[None\]"),
        (lambda w: weight_distances(w.int()), r"weights are int32 \[5, 9\]"),
        (lambda w: part_distances(w, by_block()), "weights have 9 columns and the layout 1296 values; expected the"),
        (
            lambda w: task_vectors(w, w[:1]),
            r"children are \[5, 9\] and parents \[1, 9\]; expected one parent a child",
        ),
        (lambda w: norms(w[:, :0]), r"weights are float32 \[5, 0\]; expected non-empty"),
        (lambda w: cosine_similarity(w[:0]), r"weights are float32 \[0, 9\]"),
        (
            lambda w: weight_distances(
                w.index_put((torch.tensor([1, 4]), torch.tensor([0, 8])), torch.tensor(torch.nan))
            ),
            r"NaN or infinite weights in 2 of 5 models \(positions 1, 4\): drop these models",
        ),
        (lambda w: norms(w.index_fill(0, torch.tensor(2), -torch.inf)), r"1 of 5 models \(positions 2\)"),
        (lambda w: norms(w.repeat(3, 1) * torch.nan), r"positions 0, 1, 2, 3, 4, 5, 6, 7, …\)"),
    ],
)
def test_refusals(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 9))


def test_no_result_keeps_the_graph_of_the_weights(generator):
    weights = torch.randn(3, 20, generator=generator, requires_grad=True)
    layout = Layout.of({"w": torch.zeros(20)})
    results = (task_vectors(weights, weights), weight_quantiles(weights, layout, [0.5]), weight_distances(weights))
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("metric", ["l2", "normalized_l2", "cosine"])
@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_float64_weights_of_any_size(generator, scale, metric):
    weights = torch.randn(4, 30, generator=generator).double()
    factor = scale if metric == "l2" else 1
    torch.testing.assert_close(weight_distances(weights * scale, metric) / factor, weight_distances(weights, metric))
    torch.testing.assert_close(norms(weights * scale) / scale, norms(weights))
    layout = Layout.of({"w": torch.zeros(10), "head.bias": torch.zeros(20)})
    parts = part_distances(weights * scale, layout, metric=metric) / factor
    torch.testing.assert_close(parts, part_distances(weights, layout, metric=metric))
