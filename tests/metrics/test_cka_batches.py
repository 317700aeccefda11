from itertools import combinations

import numpy as np
import pytest
import torch
from gram_oracle import aligned, cka_oracle, hsic_of_grams, randn, related
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from sklearn.metrics.pairwise import rbf_kernel

from vitzoo_hf.metrics.cka import MinibatchCKA, cka


@pytest.fixture
def unchecked():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def counted(features, sizes, **options):
    similarity = MinibatchCKA(**options)
    for batch in zip(*(model.split(sizes) for model in features), strict=True):
        similarity.update(list(batch))
    return similarity


def summed_hsic(features, sizes, bandwidth=None, debiased=True):
    total = 0
    for batch in zip(*(model.double().split(sizes) for model in features), strict=True):
        arrays = [model.numpy() for model in batch]
        if bandwidth is None:
            grams = [x @ x.T for x in arrays]
        else:
            grams = [rbf_kernel(x, gamma=1 / (2 * width**2)) for x, width in zip(arrays, bandwidth, strict=True)]
        total = total + len(arrays[0]) * hsic_of_grams(grams, debiased)
    return total


def summed_oracle(*args):
    return aligned(summed_hsic(*args))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_weighted_sums_of_hsic_equal_the_oracle(data):
    sizes = data.draw(st.lists(st.integers(4, 12), min_size=1, max_size=4))
    widths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    signal = randn(sum(sizes), 9, seed=data.draw(st.integers(0, 99)))
    features = [signal[:, :width] * 10.0**p + p + randn(sum(sizes), width, seed=p) for p, width in enumerate(widths)]
    for bandwidth in (None, [1.5 * 10.0**p for p in range(len(widths))]):
        options = {} if bandwidth is None else {"kernel": "rbf", "bandwidth": bandwidth}
        biased = summed_hsic(features, sizes, bandwidth, False).diagonal()
        result = counted(features, sizes, **options).state_dict()["hsic"].numpy()
        size = np.sqrt(np.outer(biased, biased))
        np.testing.assert_allclose(result / size, summed_hsic(features, sizes, bandwidth) / size, atol=2e-4)


def test_batches_of_every_kind_equal_the_oracle():
    features = [*related(3, 50, 6), randn(50, 9)]
    for sizes in ([50], [16, 16, 18], [32, 14, 4], [4] * 11 + [6]):
        np.testing.assert_allclose(counted(features, sizes).cka(), summed_oracle(features, sizes), atol=2e-5)


def test_hsic_1_is_unbiased_for_batches_of_four():
    """HSIC_1 is a U-statistic of degree 4: its mean over all sets of 4 images is that of all images, exactly."""
    features = related(3, 8, 4).double()
    similarity = MinibatchCKA()
    for images in combinations(range(8), 4):
        similarity.update(features[:, list(images)])
    assert (similarity.num_batches, similarity.num_images) == (70, 280)
    torch.testing.assert_close(similarity.cka(), cka(features), atol=1e-9, rtol=0)


def test_one_batch_is_debiased_cka():
    features = related(4, 40, 6)
    torch.testing.assert_close(counted(features, [40]).cka(), cka(features), atol=1e-12, rtol=0)
    np.testing.assert_allclose(counted(features, [40]).cka(), cka_oracle(features, True), atol=1e-5)


def test_batches_estimate_the_whole_where_means_of_biased_batches_do_not():
    signal = randn(1, 2048, 192)
    features = torch.cat([signal, 0.7 * signal @ randn(192, 192, seed=1) / 192**0.5 + randn(1, 2048, 192, seed=2)])
    independent = randn(2, 2048, 192, seed=3)
    for pair, truth in ((features, cka(features)[0, 1].item()), (independent, 0)):
        for size, tolerance in ((16, 0.015), (64, 0.01), (256, 0.005)):
            batches = pair.split(size, dim=1)
            similarity = counted(pair, size)
            assert similarity.cka()[0, 1].item() == pytest.approx(truth, abs=tolerance)
            biased = np.mean([cka(batch, debiased=False)[0, 1] for batch in batches])
            assert biased > truth + 0.15
    assert abs(cka(independent)[0, 1].item()) < 2e-3


def test_resuming_and_merging_count_every_batch_once(tmp_path):
    features = related(3, 64, 5)
    batches = features.split(20, dim=1)
    whole = counted(features, 20)
    first, second = MinibatchCKA(), MinibatchCKA()
    for batch in batches[:2]:
        first.update(batch)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = MinibatchCKA()
    resumed.update(randn(7, 9, 2))  # forgotten
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in batches[2:]:
        resumed.update(batch)
        second.update(batch)
    assert torch.equal(resumed.cka(), whole.cka())
    first.merge(second)
    first.merge(MinibatchCKA())
    empty = MinibatchCKA()
    empty.merge(first)
    for merged in (first, empty):
        torch.testing.assert_close(merged.cka(), whole.cka(), atol=1e-14, rtol=0)
        assert (merged.num_images, merged.num_batches) == (64, 4)
    state = first.state_dict()
    first.update(batches[0])
    assert state["num_batches"] == 4
    torch.testing.assert_close(empty.cka(), whole.cka(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("options", [{}, {"kernel": "rbf", "bandwidth": 2.0}])
def test_invariances(options):
    features = related(4, 48, 6) / torch.logspace(-2, 2, 4)[:, None, None]
    result = counted(features, 16, **options).cka()
    rotation, _ = torch.linalg.qr(randn(6, 6))
    models = torch.tensor([2, 0, 3, 1])
    batches = features.unflatten(1, (3, 16)).flip(1).flip(2).flatten(1, 2)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(counted(features @ rotation + 100, 16, **options).cka(), result, atol=1e-3, rtol=0)
    torch.testing.assert_close(counted(batches, 16, **options).cka(), result, **close)
    torch.testing.assert_close(counted(features[models], 16, **options).cka(), result[models][:, models], **close)
    torch.testing.assert_close(result.diagonal(), torch.ones(4).double())
    if not options:
        torch.testing.assert_close(counted(features * 1e-15, 16).cka(), result, **close)


def test_a_model_constant_in_one_batch_counts_and_constant_in_all_is_nan():
    features = randn(3, 40, 5)
    features[1] = 7
    features[2, :20] = 3
    result = counted(features, 20).cka()
    assert result.isnan().tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    expected = summed_oracle(features[[0, 2]], 20)
    np.testing.assert_allclose(result[[0, 2]][:, [0, 2]], expected, atol=1e-5)


def test_half_precision_and_strided_batches():
    features = related(2, 40, 6)[:, :, ::2].transpose(0, 1).contiguous().transpose(0, 1).half()
    np.testing.assert_allclose(counted(features, 20).cka(), summed_oracle(features, 20), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.update(randn(3, 3, 2)), "features of 3 images; expected at least 4 for debiased HSIC"),
        (lambda s: s.update(randn(2, 8, 2)), "features of 2 models; expected 3, as in earlier batches"),
        (lambda s: s.update(randn(3, 8, 2) * torch.inf), "NaN or infinite features in 3 of 3 models"),
        (lambda s: s.update([randn(8, 2), randn(8, 3), randn(7, 2)]), r"features of \[7, 8\] images"),
        (lambda s: s.merge(counted(randn(2, 8, 2), 8)), "state of 2 models; expected 3, the same as here"),
        (lambda s: s.merge(MinibatchCKA(kernel="rbf", bandwidth=1.0)), r"\('rbf', \[1.0\]\); expected \('linear'"),
        (lambda s: s.load_state_dict(MinibatchCKA(kernel="rbf", bandwidth=1).state_dict()), "make both alike"),
        (lambda s: MinibatchCKA(kernel="rbf"), "kernel='rbf', bandwidth=None; expected 'linear' without bandwidth"),
        (lambda s: MinibatchCKA(bandwidth=1.0), "kernel='linear', bandwidth=1.0"),
        (lambda s: MinibatchCKA(kernel="rbf", bandwidth=[1.0, 0.0]), "a bandwidth above 0, in units of the features"),
        (lambda s: MinibatchCKA(kernel="rbf", bandwidth=float("nan")), "bandwidth=nan"),
        (lambda s: MinibatchCKA(kernel="cosine"), "kernel='cosine'"),
        (lambda s: MinibatchCKA().cka(), "no batch was counted yet"),
        (
            lambda s: MinibatchCKA(kernel="rbf", bandwidth=[1.0, 2.0]).update(randn(3, 8, 2)),
            "features of 3 models, but 2 bandwidths",
        ),
    ],
)
def test_refusals_count_nothing(unchecked, call, message):
    similarity = counted(randn(3, 8, 2), 8)
    before = similarity.state_dict()
    with pytest.raises(ValueError, match=message):
        call(similarity)
    after = similarity.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value) if isinstance(value, torch.Tensor) else after[key] == value


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"kernel": "rbf", "bandwidth": 3.0}])
def test_cuda_agrees_with_the_processor(options):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    features = related(5, 300, 24) / torch.logspace(-2, 2, 5)[:, None, None]
    result = counted(features.cuda(), 100, **options).cka()
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), counted(features, 100, **options).cka(), atol=1e-4, rtol=0)


def test_an_incomplete_state_is_told():
    with pytest.raises(ValueError, match="state lacks bandwidth, hsic, kernel"):
        MinibatchCKA().load_state_dict({})
