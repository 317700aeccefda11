import subprocess
import sys

import numpy as np
import pytest
import torch
from gram_oracle import cka_oracle, hsic_oracle, randn, related
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config

from vitzoo_hf.metrics import cka as cka_module
from vitzoo_hf.metrics import features as centred_features
from vitzoo_hf.metrics.cka import MinibatchCKA, both_cka, cka, cka_between, hsic
from vitzoo_hf.metrics.features import FeatureFile

LINEAR, DEBIASED, RBF = 0.55761, 0.51346, 0.65483  # google-research/representation_similarity, its notebook


@pytest.fixture
def unchecked():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def notebook():
    random = np.random.RandomState(1337)
    x = random.randn(100, 10)
    y = random.randn(100, 10) + x
    return torch.tensor(np.stack([x, y]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_notebook_of_kornblith(notebook, dtype):
    features = notebook.to(dtype)
    assert cka(features, debiased=False)[0, 1].item() == pytest.approx(LINEAR, abs=5e-6)
    assert cka(features)[0, 1].item() == pytest.approx(DEBIASED, abs=5e-6)
    rbf = cka(features, debiased=False, kernel="rbf", bandwidth=0.5)
    assert rbf[0, 1].item() == pytest.approx(RBF, abs=5e-6)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize(
    "change",
    [lambda x: x / 1000, lambda x: x * 1e-15, lambda x: x * 1e15, lambda x: x + 100, lambda x: -2 * x + 3000],
    ids=["/1000", "1e-15", "1e15", "+100", "+3000"],
)
def test_scale_and_offset_where_peers_break(notebook, change, kernel):
    truth = cka(notebook, kernel=kernel)[0, 1].item()
    features = change(notebook.float())
    assert cka(features, kernel=kernel)[0, 1].item() == pytest.approx(truth, abs=1e-4 if kernel == "rbf" else 2e-5)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(("P", "N", "F"), [(1, 4, 1), (3, 5, 2), (4, 40, 3), (4, 33, 100), (6, 65, 17)])
def test_cka_and_hsic_equal_their_oracles(P, N, F, debiased, kernel):
    features = related(P, N, F)
    options = {"debiased": debiased, "kernel": kernel, "bandwidth": 0.8}
    result = cka(features, **options)
    assert result.dtype == torch.float64
    assert torch.equal(result, result.T)
    assert torch.equal(result.diagonal(), torch.ones(P, dtype=torch.float64))
    np.testing.assert_allclose(result, cka_oracle(features, **options), atol=2e-5)
    expected = hsic_oracle(features, **options)
    size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(hsic(features, **options).numpy() / size, expected / size, atol=2e-5)
    assert torch.equal(hsic(features, **options), hsic(features, **options).T)


def test_many_features_keep_the_debiased_estimate_accurate():
    """With F >> N the diagonal dwarfs what HSIC_1 measures; it is left out rather than subtracted."""
    features = randn(3, 12, 2000) + randn(1, 12, 2000, seed=1)
    np.testing.assert_allclose(cka(features), cka_oracle(features, True), atol=1e-5)


@pytest.mark.parametrize(("N", "F"), [(1500, 130), (400, 900)], ids=["feature", "sample"])
def test_float32_is_exact_to_seven_digits(N, F):
    features = randn(1, N, F) + randn(3, N, F, seed=1) + 5
    for debiased in (True, False):
        exact = cka(features.double(), debiased=debiased)
        assert (cka(features, debiased=debiased) - exact).abs().max() < 1e-7


def test_pytorch_cka_agrees_on_centred_features():
    peer = pytest.importorskip("cka")
    features = related(4, 60, 8)
    features = (features - features.mean(1, keepdim=True)).double()
    expected = peer.cka_from_features(list(features), list(features))
    np.testing.assert_allclose(cka(features).clamp(0, 1), expected, atol=1e-5)


def test_closed_forms_of_orthonormal_columns():
    q, _ = torch.linalg.qr(randn(100, 9).double() - randn(100, 9).double().mean(0))
    q, _ = torch.linalg.qr(q - q.mean(0))
    s, t = torch.arange(1.0, 10).double(), torch.arange(9.0, 0, -1).double()
    pair = [q, q[:, :4]]
    assert cka(pair, debiased=False)[0, 1].item() == pytest.approx(2 / 3, abs=1e-9)
    assert cka([m.float() for m in pair])[0, 1].item() == pytest.approx(0.64606, abs=5e-3)
    spectra = cka(torch.stack([q * s, q * t]), debiased=False)[0, 1].item()
    assert spectra == pytest.approx(((s * t) ** 2).sum().item() / (s**4).sum().item(), abs=1e-9)


def test_independent_gaussians():
    pairs = torch.stack([cka(randn(2, 64, 256, seed=s), debiased=False)[0, 1] for s in range(20)])
    assert pairs.mean().item() == pytest.approx(0.8, abs=2e-3)  # sqrt(pq / ((n+p)(n+q))), Wishart
    debiased = torch.stack([cka(randn(2, 64, 256, seed=s))[0, 1] for s in range(60)])
    assert abs(debiased.mean().item()) < 3 * debiased.std().item() / 60**0.5 + 1e-3
    assert (debiased < 0).any()


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_invariances(debiased, kernel):
    features = related(5, 50, 6)
    options = {"debiased": debiased, "kernel": kernel}
    result = cka(features, **options)
    rotation, _ = torch.linalg.qr(randn(6, 6))
    images, models = torch.randperm(50), torch.randperm(5)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(cka(features @ rotation, **options), result, **close)
    torch.testing.assert_close(cka(-3 * features, **options), result, **close)
    torch.testing.assert_close(cka(features[:, images], **options), result, **close)
    torch.testing.assert_close(cka(features[models], **options), result[models][:, models], **close)
    copies = torch.stack([features[0], features[0] * 5 - 1, features[0] @ rotation])
    torch.testing.assert_close(cka(copies, **options), torch.ones(3, 3).double(), **close)
    paired = torch.cat([features[:, :, :3], features[:, :, :3] + 1], 2)
    assert cka(torch.cat([features, paired]), **options).shape == (10, 10)


def test_a_change_of_one_model_changes_only_its_row():
    features = related(4, 30, 5)
    other = features.clone()
    other[2] = randn(30, 5, seed=9)
    kept = [0, 1, 3]
    difference = (cka(features) - cka(other))[kept][:, kept]
    assert difference.abs().max() < 1e-6


def test_widths_may_differ():
    models = [randn(40, width, seed=width) for width in (1, 5, 12)]
    for options in ({"debiased": True}, {"debiased": False, "kernel": "rbf"}):
        np.testing.assert_allclose(cka(models, **options), cka_oracle(models, **options), atol=1e-5)
    torch.testing.assert_close(cka(list(related(3, 20, 4))), cka(related(3, 20, 4)))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("F", [4, 90])
def test_constant_models_are_nan(debiased, kernel, F):
    features = randn(5, 37, F)
    features[1] = 0
    features[2] = 1e3 + 0.1
    features[3] = torch.linspace(-7.7, 1e5, F)
    features[3, ::2] = torch.nextafter(features[3, ::2], torch.tensor(torch.inf))
    result = cka(features, debiased=debiased, kernel=kernel)
    nan = torch.zeros(5, dtype=bool).index_fill(0, torch.tensor([1, 2, 3]), True)
    assert torch.equal(result.isnan(), nan[:, None] | nan)
    assert torch.equal(hsic(features, debiased=debiased, kernel=kernel) == 0, nan[:, None] | nan)


def test_a_small_variation_upon_a_large_offset_is_no_constant():
    signal = randn(1, 50, 4)
    features = torch.cat([signal, signal * 0.01 + 1000])
    assert cka(features)[0, 1].item() == pytest.approx(1, abs=1e-3)


def test_debiased_cka_of_equidistant_images_is_nan_rather_than_noise():
    one_outlier = torch.zeros(12, 3)
    one_outlier[4] = 2.3
    simplex = torch.eye(12)
    result = cka([one_outlier, simplex, randn(12, 5)])
    assert result.isnan().tolist() == [[True, True, True], [True, True, True], [True, True, False]]
    assert cka([one_outlier, simplex, randn(12, 5)], debiased=False).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_on_the_stored_values(dtype):
    features = randn(3, 40, 7).to(dtype)
    np.testing.assert_allclose(cka(features), cka_oracle(features, True), atol=1e-6)


def test_strided_features_are_read_and_not_written():
    features = related(3, 40, 7).permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    before = features.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kernel in ("linear", "rbf"):
            result = cka(features, kernel=kernel)
            np.testing.assert_allclose(result, cka_oracle(before, True, kernel), atol=1e-5)
            assert not result.requires_grad
    assert torch.equal(features, before)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_drawn_shapes_equal_the_oracle(data):
    N = data.draw(st.integers(4, 60))
    widths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    debiased, kernel = data.draw(st.booleans()), data.draw(st.sampled_from(["linear", "rbf"]))
    seed = data.draw(st.integers(0, 99))
    shared = randn(N, 40, seed=seed)
    models = [shared[:, :width] + randn(N, width, seed=seed + p + 1) for p, width in enumerate(widths)]
    biased = np.diag(hsic_oracle(models, False, kernel))
    size = np.sqrt(np.outer(biased, biased))
    expected = hsic_oracle(models, debiased, kernel)
    result = hsic(models, debiased=debiased, kernel=kernel).numpy()
    np.testing.assert_allclose(result / size, expected / size, atol=5e-5)
    kept = np.diag(expected) > 1e-3 * biased
    aligned = cka(models, debiased=debiased, kernel=kernel).numpy()[kept][:, kept]
    own = np.diag(expected)[kept]
    np.testing.assert_allclose(aligned, expected[kept][:, kept] / np.sqrt(np.outer(own, own)), rtol=1e-2, atol=1e-3)


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_between_is_a_block_of_all_pairs(data):
    N = data.draw(st.sampled_from([4, 9, 33, 300]))
    first, second = (data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)) for _ in range(2))
    shared = randn(N, 30, seed=data.draw(st.integers(0, 99)))
    models = [shared[:, :width] + randn(N, width, seed=p) for p, width in enumerate([*first, *second])]
    for debiased in (True, False):
        block = cka_between(models[: len(first)], models[len(first) :], debiased=debiased)
        assert block.shape == (len(first), len(second))
        whole = cka(models, debiased=debiased)[: len(first), len(first) :]
        torch.testing.assert_close(block, whole, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_between_refuses_other_images_and_keeps_nan(unchecked):
    with pytest.raises(ValueError, match=r"models have features of \[8, 9\] images"):
        cka_between([randn(8, 2)], [randn(9, 2)])
    block = cka_between([randn(8, 2), torch.ones(8, 2)], [randn(8, 3, seed=1)])
    assert block.isnan().tolist() == [[False], [True]]


def test_layers_of_models_are_a_flat_sequence():
    layers = randn(2, 3, 30, 4) + randn(1, 1, 30, 4, seed=1)
    every = cka(layers.flatten(0, 1)).unflatten(0, (2, 3)).unflatten(2, (2, 3))
    torch.testing.assert_close(every[0, :, 1], cka_between(layers[0], layers[1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_of_features_are_read_in_blocks(tmp_path, monkeypatch, dtype, kernel):
    models = [*related(3, 60, 5).numpy().astype(dtype), randn(60, 8).numpy().astype(dtype)]
    for p, model in enumerate(models):
        np.save(tmp_path / f"{p}.npy", model)
    files = [FeatureFile(tmp_path / f"{p}.npy") for p in range(4)]
    expected = cka([torch.from_numpy(model) for model in models], kernel=kernel)
    assert torch.equal(cka(files, kernel=kernel), expected)
    monkeypatch.setattr(centred_features, "BLOCK_BYTES", 1000)
    torch.testing.assert_close(cka(files, kernel=kernel), expected, atol=1e-6, rtol=0)
    mixed = [files[0], torch.from_numpy(models[1]), *files[2:]]
    torch.testing.assert_close(cka(mixed, kernel=kernel), expected, atol=1e-6, rtol=0)
    if kernel == "linear":
        torch.testing.assert_close(cka_between(files[:1], files[1:]), expected[:1, 1:], atol=1e-6, rtol=0)


def test_files_take_less_memory_than_their_features(tmp_path):
    """40 MB of features, blocks of 4 MB: the peak of a process of its own grows by far less than the features."""
    for p in range(10):
        np.save(tmp_path / f"{p}.npy", np.random.default_rng(p).standard_normal((2000, 500), np.float32))
    code = f"""
import resource, torch, vitzoo_hf as vz
from vitzoo_hf.metrics import features as centred_features, gram_products
torch.set_num_threads(1)
centred_features.BLOCK_BYTES, gram_products.TILE_ELEMENTS = 2**22, 2**19
vz.cka(torch.randn(10, 300, 100))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vz.cka([vz.FeatureFile(f"{tmp_path}/{{p}}.npy") for p in range(10)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(printed) * unit < 25e6


@pytest.mark.parametrize("debiased", [True, False])
def test_identical_models_one_model_and_four_images(debiased):
    model = randn(4, 3)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(cka([model], debiased=debiased), torch.ones(1, 1).double(), **close)
    torch.testing.assert_close(cka([model] * 3, debiased=debiased), torch.ones(3, 3).double(), **close)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(("N", "F"), [(600, 20), (300, 200)], ids=["feature", "sample"])
def test_cuda_agrees_with_the_processor(N, F, debiased, kernel):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    features = related(6, N, F)
    options = {"debiased": debiased, "kernel": kernel}
    result = cka(features.cuda(), **options)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), cka(features, **options), atol=1e-4, rtol=0)
    block = cka_between(features[:2].cuda(), features[2:].cuda(), debiased=debiased)
    torch.testing.assert_close(block.cpu(), cka(features, debiased=debiased)[:2, 2:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cka(x[:, :3]), "features of 3 images; expected at least 4 for debiased HSIC"),
        (lambda x: cka(x[:, :1], debiased=False), "features of 1 images; expected at least 2 for biased HSIC"),
        (lambda x: hsic(x, kernel="cosine"), "kernel='cosine', bandwidth=1.0; expected 'linear' or 'rbf'"),
        (lambda x: cka(x, kernel="rbf", bandwidth=0.0), "bandwidth=0.0; expected .* a bandwidth above 0"),
        (lambda x: cka(x[0]), r"features are floating \[6, 3\]; expected non-empty floating \[P, N, F\]"),
        (lambda x: cka(x[..., None]), r"\[4, 6, 3, 1\]; expected .*tokens: flatten or pool them"),
        (lambda x: cka(x.int()), r"features are not floating \[4, 6, 3\]"),
        (lambda x: cka(x[:0]), "expected non-empty floating"),
        (lambda x: cka(x[..., :0]), "expected non-empty floating"),
        (lambda x: cka([x[0], x[1, :5]]), r"features of \[5, 6\] images; expected the same images"),
        (
            lambda x: cka(x.index_put((torch.tensor([0, 2]), torch.tensor([1, 5])), torch.tensor(torch.nan))),
            r"NaN or infinite features in 2 of 4 models \(positions 0, 2\): drop these models",
        ),
        (lambda x: hsic(x.index_fill(0, torch.tensor(3), torch.inf)), r"1 of 4 models \(positions 3\)"),
        (lambda x: cka(x.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(-torch.inf))), r"positions 1\)"),
    ],
)
def test_refusals(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call(randn(4, 6, 3))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("factor", [1, 1e2, 316, 1e3, 3162, 1e4])
def test_one_image_much_longer_than_all_others(factor, kernel):
    """Massive activations: sums of the debiased HSIC nearly cancel, and float32 would keep two digits."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(200, 64, generator=generator)
        second = first + torch.randn(200, 64, generator=generator)
        first[7] *= factor
        features = torch.stack([first, second])
        single, double = (cka(x, kernel=kernel)[0, 1].item() for x in (features, features.double()))
        assert single == pytest.approx(double, abs=1e-5, nan_ok=True), seed
        assert cka_between([first], [second])[0, 0].item() == pytest.approx(cka(features)[0, 1].item(), abs=1e-8)
        width = None if kernel == "linear" else 8.0
        batches, exact = (MinibatchCKA(kernel=kernel, bandwidth=width) for _ in range(2))
        batches.update(features)
        exact.update(features.double())
        assert batches.cka()[0, 1].item() == pytest.approx(exact.cka()[0, 1].item(), abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("offset", [0, 5, 100])
@pytest.mark.parametrize("N", [8, 50, 300])
def test_images_equally_far_apart_have_no_debiased_cka(N, offset):
    """Float64 sums must not take the rounding of float32 features for a signal."""
    corners = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(N), dtype=torch.float64))[0]
    features = [(3 * corners + offset).float(), torch.randn(N, 4, generator=torch.Generator().manual_seed(1))]
    result = cka(features)
    assert result[0].isnan().all()
    assert result[1, 1] == 1


def test_both_estimators_come_from_one_set_of_products(monkeypatch):
    features = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0))
    expected = cka(features), cka(features, debiased=False)
    calls = []
    products = cka_module.linear_products
    monkeypatch.setattr(cka_module, "linear_products", lambda centred: calls.append(centred) or products(centred))
    for result, value in zip(both_cka(features), expected, strict=True):
        assert torch.equal(result, value)
    assert len(calls) == 1
