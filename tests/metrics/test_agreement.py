import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import cohen_kappa_score

from vitzoo_hf.metrics import agreement as behavior_pairs
from vitzoo_hf.metrics import inputs as behavior_inputs
from vitzoo_hf.metrics.agreement import agreement, cohen_kappa, error_consistency, error_overlap, jensen_shannon
from vitzoo_hf.metrics.behavior import accuracy, predictions


@pytest.fixture
def unchecked():
    """Annotations off, as outside the tests: mistakes must be caught by the functions themselves."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def random_logits(P, N, C, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(P, N, C, generator=generator), torch.randint(C, (N,), generator=generator)


def random_predictions(P, N, C, seed=0, skill=0.6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (N,), generator=generator)
    noise = torch.randint(C, (P, N), generator=generator)
    return torch.where(torch.rand(P, N, generator=generator) < skill, labels, noise), labels


def softmax(logits):
    z = logits.double().numpy()
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def of_all_pairs(measure, models):
    with np.errstate(invalid="ignore"):
        return np.array([[measure(a, b) for b in models] for a in models])


def agreement_oracle(predicted):
    return of_all_pairs(lambda a, b: np.mean(a == b), predicted.numpy())


def kappa_oracle(predicted):
    """From the confusion matrix of each pair."""
    classes, codes = np.unique(predicted.numpy(), return_inverse=True)

    def kappa(a, b):
        confusion = np.zeros((len(classes), len(classes)))
        np.add.at(confusion, (a, b), 1 / len(a))
        by_chance = (confusion.sum(0) * confusion.sum(1)).sum()
        return (np.trace(confusion) - by_chance) / np.float64(1 - by_chance)

    return of_all_pairs(kappa, codes.reshape(predicted.shape))


def consistency_oracle(predicted, labels):
    """As Geirhos et al. (2020) write it, with accuracies."""

    def consistency(a, b):
        observed, p, q = (a == b).mean(), a.mean(), b.mean()
        by_chance = p * q + (1 - p) * (1 - q)
        return (observed - by_chance) / (1 - by_chance)

    return of_all_pairs(consistency, (predicted == labels).numpy())


def overlap_oracle(predicted, labels, same_class):
    """From sets of images, or of images with their wrong class."""
    errors = [
        {(n, row[n]) for n in range(len(row)) if row[n] != labels[n]} for row in predicted.numpy().astype(object)
    ]

    def overlap(a, b):
        images_a, images_b = {n for n, _ in a}, {n for n, _ in b}
        shared = a & b if same_class else images_a & images_b
        return np.float64(len(shared)) / len(images_a | images_b) if images_a | images_b else np.nan

    return of_all_pairs(overlap, errors)


def divergence_oracle(logits):
    def divergence(p, q):
        roots = jensenshannon(p, q, axis=-1)
        return np.where(np.isnan(roots), 0, roots**2).mean()  # scipy takes the root of -1e-17 of an equal pair

    return of_all_pairs(divergence, softmax(logits))


OF_PREDICTIONS = {
    "agreement": lambda predicted, labels: agreement(predicted),
    "cohen_kappa": lambda predicted, labels: cohen_kappa(predicted),
    "error_consistency": error_consistency,
    "error_overlap": error_overlap,
    "error_overlap, same class": lambda predicted, labels: error_overlap(predicted, labels, same_class=True),
}
SHAPES = {"P": st.integers(1, 5), "N": st.integers(1, 80), "C": st.integers(1, 9), "seed": st.integers(0, 99)}


@pytest.mark.parametrize("block", [7, 64, 2**20])
@pytest.mark.parametrize("N", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("C", [1, 2, 256, 257, 1000])
def test_agreement_is_exact(monkeypatch, block, N, C):
    monkeypatch.setattr(behavior_pairs, "EXACT_IMAGES", block)
    _, labels = random_logits(1, N, C)
    noise = torch.randint(C, (5, N), generator=torch.Generator().manual_seed(N))
    predicted = torch.where(torch.rand(5, N) < 0.6, labels, noise)
    expected = agreement_oracle(predicted)
    assert np.array_equal(agreement(predicted), expected)
    assert np.array_equal(behavior_pairs._matches_by_comparison(predicted).double() / N, expected)


@pytest.mark.parametrize("values", [[-1, 0, 3], [0, 2**16 - 1], [0, 2**16], [-(2**63), 0, 2**63 - 1]])
def test_agreement_of_any_integers(values):
    predicted = torch.tensor(values)[torch.randint(len(values), (4, 70))]
    assert np.array_equal(agreement(predicted), agreement_oracle(predicted))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_agreement_of_small_integers_and_strides(dtype):
    predicted = torch.randint(100, (70, 6)).to(dtype).T
    assert np.array_equal(agreement(predicted), agreement_oracle(predicted))
    assert agreement(predicted[:1]).tolist() == [[1.0]]
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    assert torch.equal(agreement(predicted[order]), agreement(predicted)[order][:, order])


def test_agreement_with_a_perfect_model_is_accuracy():
    logits, labels = random_logits(4, 90, 10)
    both = torch.cat([predictions(logits), labels[None]])
    assert torch.equal(agreement(both)[-1, :-1], accuracy(logits, labels))


def test_agreement_tells_more_than_65536_classes_apart():
    """Their codes need more than 16 bits."""
    predicted = torch.arange(70_000) * 10
    predicted = torch.stack([predicted, predicted.roll(2**16), predicted.where(predicted % 20 == 0, 0)])
    assert np.array_equal(agreement(predicted), agreement_oracle(predicted))
    assert agreement(predicted)[0].tolist() == [1, 0, 0.5]


@settings(deadline=None, max_examples=60)
@given(**SHAPES, skill=st.sampled_from([0.0, 0.6, 0.9, 1.0]))
def test_kappa_and_errors_equal_their_oracles(P, N, C, seed, skill):
    predicted, labels = random_predictions(P, N, C, seed, skill)
    close = {"rtol": 1e-12, "atol": 1e-14}
    right = (predicted == labels).float()
    constant = {
        cohen_kappa: (predicted == predicted[:, :1]).all(1),  # 0 / 0 in numpy may miss 0 by rounding
        error_consistency: (right == right[:, :1]).all(1),
    }
    for metric, expected in (
        (cohen_kappa, kappa_oracle(predicted)),
        (error_consistency, consistency_oracle(predicted, labels)),
    ):
        result = metric(predicted) if metric is cohen_kappa else metric(predicted, labels)
        same = predicted[:, None] == predicted if metric is cohen_kappa else right[:, None] == right
        undefined = constant[metric] & constant[metric][:, None] & same.all(-1)
        assert torch.equal(result.isnan(), undefined)
        np.testing.assert_allclose(result[~undefined], expected[~undefined.numpy()], **close)
    for same_class in (False, True):
        result = error_overlap(predicted, labels, same_class=same_class)
        np.testing.assert_array_equal(result, overlap_oracle(predicted, labels.numpy(), same_class))


def test_kappa_equals_sklearn():
    predicted, labels = random_predictions(4, 300, 7)
    expected = of_all_pairs(cohen_kappa_score, predicted.numpy())
    np.testing.assert_allclose(cohen_kappa(predicted), expected, rtol=1e-12)
    right = (predicted == labels).numpy()
    expected = of_all_pairs(cohen_kappa_score, right)
    np.testing.assert_allclose(error_consistency(predicted, labels), expected, rtol=1e-12)


@pytest.mark.parametrize("block", [1, 300, 2**20])
@pytest.mark.parametrize("values", [[-1, 0, 3], [0, 2**16 - 1], [-(2**63), 0, 2**63 - 1], list(range(0, 10**6, 999))])
def test_kappa_of_any_integers_in_any_blocks(monkeypatch, block, values):
    monkeypatch.setattr(behavior_pairs, "BLOCK_ELEMENTS", block)
    choices = torch.randint(len(values), (4, 70), generator=torch.Generator().manual_seed(0))
    choices[1, :50] = choices[0, :50]
    predicted = torch.tensor(values)[choices]
    np.testing.assert_allclose(cohen_kappa(predicted), kappa_oracle(predicted), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32])
@pytest.mark.parametrize("name", OF_PREDICTIONS)
def test_small_integers_and_strides(name, dtype):
    predicted, labels = random_predictions(6, 70, 100)
    strided = predicted.T.contiguous().to(dtype).T
    assert torch.equal(OF_PREDICTIONS[name](strided, labels.int()), OF_PREDICTIONS[name](predicted, labels))


@settings(deadline=None, max_examples=40)
@given(**SHAPES)
def test_invariances_of_predictions(P, N, C, seed):
    predicted, labels = random_predictions(P, N, C, seed)
    generator = torch.Generator().manual_seed(seed)
    models, images, names = (torch.randperm(size, generator=generator) for size in (P, N, C))
    for metric in OF_PREDICTIONS.values():
        result = metric(predicted, labels)
        assert same_bits(result, result.T)
        assert same_bits(metric(predicted[models], labels), result[models][:, models])
        assert same_bits(metric(predicted[:, images], labels[images]), result)
        assert same_bits(metric(names[predicted], names[labels]), result)
        assert same_bits(metric(predicted[:1], labels), result[:1, :1])
        assert (result.diagonal().isnan() | (result.diagonal() == 1)).all()


def same_bits(a, b):
    return torch.equal(a.nan_to_num(nan=-7), b.nan_to_num(nan=-7))


def test_where_nothing_is_left_to_explain():
    labels = torch.tensor([0, 0, 1, 1])
    constant = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    nan = torch.nan
    assert same_bits(cohen_kappa(constant), torch.tensor([[nan, nan, 0], [nan, nan, 0], [0, 0, nan]]).double())
    perfect_and_hopeless = torch.stack([labels, labels, 1 - labels])
    expected = torch.tensor([[nan, nan, 0], [nan, nan, 0], [0, 0, nan]]).double()
    assert same_bits(error_consistency(perfect_and_hopeless, labels), expected)
    expected = torch.tensor([[nan, nan, 0], [nan, nan, 0], [0, 0, 1]]).double()
    assert same_bits(error_overlap(perfect_and_hopeless, labels), expected)


def test_error_overlap_in_closed_form():
    labels = torch.zeros(6, dtype=torch.int64)
    predicted = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 2, 2, 0]])
    assert error_overlap(predicted, labels)[0, 1].item() == 2 / 4
    assert error_overlap(predicted, labels, same_class=True)[0, 1].item() == 1 / 4
    binary = predicted.clamp(max=1)
    assert torch.equal(error_overlap(binary, labels), error_overlap(binary, labels, same_class=True))


@settings(deadline=None, max_examples=40)
@given(**SHAPES, scale=st.sampled_from([0.1, 3.0, 40.0]))
def test_divergence_equals_scipy(P, N, C, seed, scale):
    logits, _ = random_logits(P, N, C, seed, scale)
    expected = divergence_oracle(logits)
    np.testing.assert_allclose(jensen_shannon(logits.double()), expected, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(jensen_shannon(logits), expected, atol=5e-7)


@pytest.mark.parametrize("block", [1, 2000, 2**20])
@pytest.mark.parametrize("cached", [1, 40, 2**17])
def test_divergence_in_blocks_and_by_torch_is_the_same(monkeypatch, block, cached):
    logits = random_logits(5, 30, 11)[0].double()
    expected = jensen_shannon(logits)
    monkeypatch.setattr(behavior_inputs, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(behavior_pairs, "CACHED_ELEMENTS", cached)
    torch.testing.assert_close(jensen_shannon(logits), expected, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(behavior_pairs, "_mixture_sums", behavior_pairs._mixture_sums_by_torch)
    torch.testing.assert_close(jensen_shannon(logits), expected, rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=30)
@given(**SHAPES)
def test_invariances_of_divergence(P, N, C, seed):
    logits = random_logits(P, N, C, seed)[0].double()
    generator = torch.Generator().manual_seed(seed)
    models, images, classes = (torch.randperm(size, generator=generator) for size in (P, N, C))
    result = jensen_shannon(logits)
    kept = {"rtol": 1e-11, "atol": 1e-14}
    assert torch.equal(result, result.T)
    assert result.diagonal().eq(0).all()
    assert (result <= np.log(2) + 1e-14).all()
    torch.testing.assert_close(jensen_shannon(logits[models]), result[models][:, models], **kept)
    torch.testing.assert_close(jensen_shannon(logits[:, images]), result, **kept)
    torch.testing.assert_close(jensen_shannon(logits[..., classes]), result, **kept)
    torch.testing.assert_close(jensen_shannon(logits + torch.randn(P, N, 1).double()), result, **kept)
    strided = logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    torch.testing.assert_close(jensen_shannon(strided), result, **kept)


@pytest.mark.parametrize("N", [1, 7, 333])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_models_have_no_divergence_at_all(N, dtype):
    logits, _ = random_logits(7, N, 13)
    logits[2] = logits[5] = logits[0]
    logits = logits.to(dtype)
    result = jensen_shannon(logits)
    assert result.dtype == torch.float64
    equal = torch.zeros(7, 7, dtype=torch.bool)
    equal[torch.tensor([[0], [2], [5]]), torch.tensor([0, 2, 5])] = True
    assert torch.equal(result == 0, equal | torch.eye(7, dtype=torch.bool))
    torch.testing.assert_close(result, jensen_shannon(logits.double()), rtol=0, atol=2e-7)


def test_close_models_keep_their_divergence():
    base, _ = random_logits(1, 500, 100)
    noise, _ = random_logits(1, 500, 100, seed=1)
    near = torch.cat([base, base + 1e-3 * noise])
    (expected,) = jensen_shannon(near.double())[:1, 1]
    assert 5e-8 < expected < 5e-6
    assert jensen_shannon(near)[0, 1].item() == pytest.approx(expected.item(), abs=1e-7)


def test_divergence_of_disjoint_and_impossible_classes():
    certain = 1000 * torch.eye(3)[:, None]
    np.testing.assert_allclose(jensen_shannon(certain), np.log(2) * (1 - np.eye(3)), rtol=1e-7)
    assert jensen_shannon(certain.double())[0, 1].item() == pytest.approx(np.log(2), rel=1e-15)
    masked = torch.tensor([[[1.0, 2.0, -torch.inf]], [[2.0, 1.0, -torch.inf]]]).double()
    torch.testing.assert_close(jensen_shannon(masked), jensen_shannon(masked[..., :2]), rtol=1e-12, atol=0)
    assert jensen_shannon(torch.randn(3, 4, 1)).eq(0).all()


def test_divergence_over_many_classes_and_threads():
    logits, _ = random_logits(3, 2, 70_000)
    expected = divergence_oracle(logits)
    np.testing.assert_allclose(jensen_shannon(logits), expected, atol=5e-7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = jensen_shannon(logits.double())
        torch.set_num_threads(1)
        assert torch.equal(jensen_shannon(logits.double()), again)
    finally:
        torch.set_num_threads(threads)
    assert threading.active_count() <= threads + 3  # none is left behind


def test_inputs_are_left_alone():
    logits, labels = random_logits(3, 50, 6)
    logits.requires_grad_()
    predicted = predictions(logits)
    before = [tensor.detach().clone() for tensor in (logits, predicted, labels)]
    assert not jensen_shannon(logits).requires_grad
    for metric in OF_PREDICTIONS.values():
        metric(predicted, labels)
    for tensor, kept in zip((logits, predicted, labels), before, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OF_PREDICTIONS)
def test_cuda_counts_as_the_cpu_does(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for classes in (1, 2, 20, 100_000):
        predicted, labels = random_predictions(6, 500, classes)
        there = OF_PREDICTIONS[name](predicted.cuda(), labels)
        assert there.is_cuda
        assert same_bits(there.cpu(), OF_PREDICTIONS[name](predicted, labels))


@pytest.mark.gpu
def test_cuda_diverges_as_the_cpu_does():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logits, _ = random_logits(6, 300, 20)
    logits[3] = logits[1]
    there = jensen_shannon(logits.cuda())
    assert there.is_cuda
    assert there.diagonal().eq(0).all()
    assert there[1, 3].item() == pytest.approx(0, abs=2e-7)
    torch.testing.assert_close(there.cpu(), jensen_shannon(logits), rtol=0, atol=1e-6)
    exact = jensen_shannon(logits.double())
    torch.testing.assert_close(jensen_shannon(logits.double().cuda()).cpu(), exact, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: agreement(z[..., 0]), "take the argmax first"),
        (lambda z, y: agreement(z), "take the argmax first"),
        (lambda z, y: agreement(y), r"predictions are int64 \[20\]; expected non-empty integers \[P, N\]"),
        (lambda z, y: agreement(z.argmax(-1)[:, :0]), "expected non-empty integers"),
        (lambda z, y: agreement(z[..., 0] > 0), r"predictions are bool \[2, 20\]"),
        (lambda z, y: cohen_kappa(z), "take the argmax first"),
        (lambda z, y: cohen_kappa(z.argmax(-1)[:0]), r"predictions are int64 \[0, 20\]"),
        (lambda z, y: error_consistency(z, y), "take the argmax first"),
        (lambda z, y: error_consistency(z.argmax(-1), y[:-1]), "expected one integer for each of the 20"),
        (lambda z, y: error_overlap(z.argmax(-1), y.float()), r"labels are float32 \[20\]"),
        (lambda z, y: error_overlap(z.argmax(-1), y - 1), "labels run from -1 to 3"),
        (lambda z, y: jensen_shannon(z * torch.nan), "NaN, .inf or -inf throughout in 40 rows of 2 of 2"),
        (lambda z, y: jensen_shannon(z / 0), r"positions 0, 1\): drop these models"),
        (lambda z, y: jensen_shannon(z[0]), r"logits are float32 \[20, 5\].*one model: logits\[None\]"),
        (lambda z, y: jensen_shannon(z.argmax(-1)), r"logits are int64 \[2, 20\]"),
        (lambda z, y: jensen_shannon(z[..., :0]), r"\[2, 20, 0\]"),
    ],
)
def test_refusals(unchecked, call, message):
    logits, _ = random_logits(2, 20, 5)
    with pytest.raises(ValueError, match=message):
        call(logits, torch.arange(20) % 5)


@pytest.mark.parametrize("classes", [3, 2**16, 2**17])
def test_agreement_counts_every_one_of_many_images(classes):
    """A share of a million images must not be rounded to another count."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(classes, (1, 1_200_000), generator=generator).repeat(3, 1)
    predicted[1, 7] += 1
    predicted[2, [0, 1_100_000]] += 1
    shares = agreement(predicted)
    assert ((1 - shares) * 1_200_000).round().tolist() == [[0, 1, 2], [1, 0, 3], [2, 3, 0]]


def test_subnormal_numbers_stay():
    """Old versions of NumKong switch the whole process to flushing them to zero."""
    agreement(torch.tensor([[0, 1], [0, 300]]))
    assert np.float32(1e-40) * np.ones(1, np.float32) != 0
