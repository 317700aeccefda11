import contextlib
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import brier_score_loss, log_loss, top_k_accuracy_score

import vitzoo_hf as vz
import vitzoo_hf.metrics.inputs as inputs
from vitzoo_hf.metrics.behavior import (
    accuracy,
    brier_score,
    class_accuracy,
    cross_entropy,
    expected_calibration_error,
    prediction_entropy,
    predictions,
)


@pytest.fixture
def unchecked():
    """Annotations off, as outside the tests: mistakes must be caught by the functions themselves."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def torchmetrics():
    """`torchmetrics.functional.classification`, with the two torchvision ops that a CPU torch lacks declared."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):  # already there: the real extension loaded
            library.define(schema)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchmetrics.functional.classification")


OF_LOGITS_AND_LABELS = {
    accuracy: "accuracy",
    lambda logits, labels: accuracy(logits, labels, k=2): "accuracy, k=2",
    lambda logits, labels: class_accuracy(logits, labels): "class_accuracy",
    cross_entropy: "cross_entropy",
    expected_calibration_error: "expected_calibration_error",
    brier_score: "brier_score",
    lambda logits, labels: prediction_entropy(logits): "prediction_entropy",
}


def random_logits(P, N, C, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(P, N, C, generator=generator), torch.randint(C, (N,), generator=generator)


def softmax(logits):
    z = logits.double().numpy()
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def ece_oracle(logits, labels, bins):
    """One bin at a time, in numpy float64."""
    errors = []
    for p in softmax(logits):
        confidence, correct = p.max(-1), p.argmax(-1) == labels.numpy()
        error = 0.0
        for b in range(bins):
            inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
            if inside.any():
                error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
        errors.append(error)
    return np.array(errors)


def test_predictions_take_the_lowest_index_of_a_tie():
    assert predictions(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]
    assert predictions(torch.full((2, 5, 7), -torch.inf)).eq(0).all()


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (5, 2, 4, 3), (1, 1, 1)])
def test_predictions_keep_leading_axes(shape):
    logits = torch.randn(shape)
    result = predictions(logits)
    assert result.dtype == torch.int64
    assert np.array_equal(result.numpy(), logits.numpy().argmax(-1))


@pytest.mark.parametrize(("P", "N", "C"), [(1, 1, 1), (1, 7, 2), (3, 101, 10), (2, 33, 1000)])
def test_accuracy_of_logits_and_of_predictions_is_exact(P, N, C):
    logits, labels = random_logits(P, N, C)
    expected = [(row == labels.numpy()).mean() for row in logits.numpy().argmax(-1)]
    assert accuracy(logits, labels).tolist() == expected
    assert accuracy(predictions(logits), labels.int()).tolist() == expected
    assert accuracy(predictions(logits).to(torch.int32), labels).tolist() == expected


def test_accuracy_equals_torchmetrics(torchmetrics):
    logits, labels = random_logits(3, 200, 10)
    expected = [torchmetrics.multiclass_accuracy(model, labels, num_classes=10, average="micro") for model in logits]
    torch.testing.assert_close(accuracy(logits, labels).float(), torch.stack(expected))


@pytest.mark.parametrize("block", [1, 50, 2**20])
@pytest.mark.parametrize(("P", "N", "C"), [(1, 5, 2), (3, 37, 10), (2, 19, 1000)])
def test_cross_entropy_and_ece_equal_their_oracles(monkeypatch, block, P, N, C):
    monkeypatch.setattr(inputs, "BLOCK_ELEMENTS", block)
    logits, labels = random_logits(P, N, C)
    with warnings.catch_warnings():  # scikit-learn 1.7 takes many classes of few images for a mistake
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        losses = [log_loss(labels, model, labels=range(C)) for model in softmax(logits)]
    np.testing.assert_allclose(cross_entropy(logits, labels), losses, rtol=1e-6)
    for bins in (1, 10, 15):
        result = expected_calibration_error(logits, labels, bins)
        np.testing.assert_allclose(result, ece_oracle(logits, labels, bins), atol=1e-6)


def test_ece_equals_torchmetrics(torchmetrics):
    logits, labels = random_logits(2, 500, 10)
    expected = [
        torchmetrics.multiclass_calibration_error(model, labels, num_classes=10, n_bins=15) for model in logits
    ]
    np.testing.assert_allclose(expected_calibration_error(logits, labels), torch.stack(expected), atol=1e-6)


def test_ece_never_takes_logits_for_probabilities():
    """The peer torchmetrics reads logits that happen to lie in [0, 1] as probabilities."""
    logits, labels = torch.rand(2, 100, 4), torch.randint(4, (100,))
    np.testing.assert_allclose(expected_calibration_error(logits, labels), ece_oracle(logits, labels, 15), atol=1e-6)
    shifted = expected_calibration_error(logits + 50, labels)
    torch.testing.assert_close(shifted, expected_calibration_error(logits, labels), atol=1e-5, rtol=0)


def test_ece_closed_forms():
    labels = torch.tensor([0, 1, 2, 3, 4])
    # Uniform over five classes: confidence 0.2 lies on the edge (2/15, 3/15], all in one bin, accuracy 0.2.
    assert expected_calibration_error(torch.zeros(1, 5, 5), labels).item() == pytest.approx(0, abs=1e-15)
    # Confidences 1/5 and 1/2 split only at the edge: two bins (0, .5] and (.5, 1].
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0]])[None]
    assert expected_calibration_error(logits, torch.tensor([0, 1]), 2).item() == pytest.approx((0.5 + 1) / 2)
    assert expected_calibration_error(logits, torch.tensor([0, 1]), 1).item() == pytest.approx(0.25)
    assert expected_calibration_error(torch.randn(1, 4, 1), torch.zeros(4, dtype=int)).item() == 0


def test_cross_entropy_closed_forms():
    labels = torch.tensor([0, 1])
    assert cross_entropy(torch.zeros(1, 2, 8), labels).item() == pytest.approx(np.log(8), rel=1e-15)
    assert cross_entropy(torch.tensor([[[0.0, -torch.inf], [0.0, -torch.inf]]]), labels).item() == torch.inf
    # A confident model keeps a loss that a float32 log-softmax rounds to 0.
    confident = torch.tensor([[[20.0, 0.0], [0.0, 20.0]]])
    assert cross_entropy(confident, labels).item() == pytest.approx(np.log1p(np.exp(-20.0)), rel=1e-6)
    torch.testing.assert_close(cross_entropy(confident + 1e4, labels), cross_entropy(confident, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_and_strides(dtype):
    logits, labels = random_logits(2, 50, 6)
    logits = logits.to(dtype)
    strided = logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for metric in OF_LOGITS_AND_LABELS:
        result = metric(strided, labels)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, metric(logits.double(), labels), atol=1e-6, rtol=1e-6)


def test_inputs_are_left_alone():
    logits, labels = random_logits(2, 50, 6)
    logits.requires_grad_()
    before = logits.detach().clone(), labels.clone()
    for metric in OF_LOGITS_AND_LABELS:
        assert not metric(logits, labels).requires_grad
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


def top_k_oracle(logits, labels, k):
    """A stable sort puts equal logits in the order of their classes."""
    order = np.argsort(-logits.numpy(), axis=-1, kind="stable")[..., :k]
    return (order == labels.numpy()[:, None]).any(-1).mean(-1)


def brier_oracle(logits, labels):
    return [((p - (np.arange(p.shape[-1]) == labels.numpy()[:, None])) ** 2).sum(-1).mean() for p in softmax(logits)]


SHAPES = {"P": st.integers(1, 4), "N": st.integers(1, 40), "C": st.integers(1, 9), "seed": st.integers(0, 99)}


@settings(deadline=None, max_examples=40)
@given(**SHAPES, levels=st.integers(1, 9), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_top_k_accuracy_is_exact_whatever_the_ties(P, N, C, seed, levels, dtype):
    logits, labels = random_logits(P, N, C, seed)
    logits = (logits.sigmoid() * levels).floor().to(dtype)
    for k in range(1, C + 1):
        assert accuracy(logits, labels, k).tolist() == top_k_oracle(logits.double(), labels, k).tolist()
    assert accuracy(logits, labels, C).eq(1).all()
    assert torch.equal(accuracy(logits, labels, 1), accuracy(predictions(logits), labels))


@pytest.mark.parametrize("block", [1, 500, 2**20])
def test_top_k_accuracy_equals_sklearn_and_torchmetrics(monkeypatch, torchmetrics, block):
    monkeypatch.setattr(inputs, "BLOCK_ELEMENTS", block)
    logits, labels = random_logits(3, 200, 10)
    for k in (2, 5, 9):
        result = accuracy(logits, labels, k)
        assert result.tolist() == [top_k_accuracy_score(labels, z, k=k, labels=range(10)) for z in logits.numpy()]
        peer = [torchmetrics.multiclass_accuracy(z, labels, num_classes=10, average="micro", top_k=k) for z in logits]
        torch.testing.assert_close(result.float(), torch.stack(peer))


def test_infinite_logits_have_an_order_too():
    logits = torch.tensor([[[torch.inf, torch.inf, -torch.inf, 0]]])
    assert [accuracy(logits, torch.tensor([label]), 2).item() for label in range(4)] == [1, 1, 0, 0]
    assert [accuracy(logits, torch.tensor([label]), 3).item() for label in range(4)] == [1, 1, 0, 1]


@pytest.mark.parametrize("block", [1, 50, 2**20])
@pytest.mark.parametrize(("P", "N", "C"), [(1, 1, 1), (1, 5, 2), (3, 37, 10), (2, 19, 1000)])
def test_brier_score_and_entropy_equal_their_oracles(monkeypatch, block, P, N, C):
    monkeypatch.setattr(inputs, "BLOCK_ELEMENTS", block)
    logits, labels = random_logits(P, N, C)
    np.testing.assert_allclose(brier_score(logits, labels), brier_oracle(logits, labels), rtol=1e-6)
    np.testing.assert_allclose(brier_score(logits.double(), labels), brier_oracle(logits, labels), rtol=1e-13)
    entropies = [scipy_entropy(p, axis=-1).mean() for p in softmax(logits)]
    np.testing.assert_allclose(prediction_entropy(logits), entropies, rtol=1e-6)
    np.testing.assert_allclose(prediction_entropy(logits.double()), entropies, rtol=1e-13)


def test_brier_score_equals_sklearn():
    logits, labels = random_logits(2, 300, 6)
    expected = [brier_score_loss(labels, p, labels=range(6)) for p in softmax(logits)]
    np.testing.assert_allclose(brier_score(logits, labels), expected, rtol=1e-6)
    binary = [brier_score_loss(labels % 2, p[:, 1]) for p in softmax(logits[..., :2])]
    np.testing.assert_allclose(brier_score(logits[..., :2], labels % 2), 2 * np.array(binary), rtol=1e-6)


def test_brier_score_and_entropy_closed_forms():
    zero_and_one = torch.tensor([0, 1])
    sure = 1000 * torch.eye(2)[None]
    assert brier_score(sure, zero_and_one).item() == 0
    assert brier_score(sure, 1 - zero_and_one).item() == 2
    assert prediction_entropy(sure).item() == 0
    assert brier_score(torch.zeros(1, 2, 8), zero_and_one).item() == pytest.approx(7 / 8)
    assert prediction_entropy(torch.zeros(1, 2, 8)).item() == pytest.approx(np.log(8), rel=1e-15)
    # Nearly sure: 1 - p rounds to 0 in float32, and the square of the difference would vanish.
    p = 1 / (1 + np.exp(-20.0))
    nearly = torch.tensor([[[20.0, 0.0], [0.0, 20.0]]])
    assert brier_score(nearly, zero_and_one).item() == pytest.approx(2 * np.exp(-40.0) * p**2, rel=1e-6)
    assert prediction_entropy(nearly).item() == pytest.approx(scipy_entropy([p, np.exp(-20.0) * p]), rel=1e-6)
    # -inf is a probability of 0
    masked = torch.tensor([[[1.0, 2.0, -torch.inf]]])
    assert torch.equal(prediction_entropy(masked), prediction_entropy(masked[..., :2]))
    label = torch.tensor([0])
    assert torch.equal(brier_score(masked, label), brier_score(masked[..., :2], label))


@pytest.mark.parametrize("block", [1, 50, 2**20])
def test_class_accuracy_is_exact(monkeypatch, block):
    monkeypatch.setattr(inputs, "BLOCK_ELEMENTS", block)
    logits, labels = random_logits(3, 200, 12)
    labels[labels == 4] = 5
    result = class_accuracy(logits, labels)
    expected = [
        [(row[labels == c] == c).mean() if c != 4 else np.nan for c in range(12)] for row in logits.numpy().argmax(-1)
    ]
    np.testing.assert_array_equal(result, expected)
    assert torch.equal(torch.isnan(result), torch.isnan(torch.tensor(expected)))
    for dtype in (torch.uint8, torch.int64):
        again = class_accuracy(predictions(logits).to(dtype), labels.to(dtype), num_classes=12)
        assert again.numpy().tobytes() == result.numpy().tobytes()
    weights = torch.bincount(labels, minlength=12).double() / len(labels)
    torch.testing.assert_close((result.nan_to_num() * weights).sum(1), accuracy(logits, labels))


def test_class_accuracy_equals_torchmetrics(torchmetrics):
    logits, labels = random_logits(2, 400, 5)
    peer = [torchmetrics.multiclass_accuracy(z, labels, num_classes=5, average=None) for z in logits]
    torch.testing.assert_close(class_accuracy(logits, labels).float(), torch.stack(peer))


@settings(deadline=None, max_examples=40)
@given(**SHAPES)
def test_invariances(P, N, C, seed):
    logits, labels = random_logits(P, N, C, seed)
    logits = logits.double()
    generator = torch.Generator().manual_seed(seed)
    models, images, classes = (torch.randperm(size, generator=generator) for size in (P, N, C))
    renamed = classes.argsort()[labels]
    for metric, name in OF_LOGITS_AND_LABELS.items():
        if name == "accuracy, k=2" and C == 1:
            continue
        result = metric(logits, labels)
        kept = {"rtol": 1e-10, "atol": 1e-12, "equal_nan": True}
        torch.testing.assert_close(metric(logits[models], labels), result[models], **kept)
        torch.testing.assert_close(metric(logits[:, images], labels[images]), result, **kept)
        torch.testing.assert_close(metric(logits + torch.randn(P, N, 1).double(), labels), result, **kept)
        by_class = result[:, classes] if name == "class_accuracy" else result
        torch.testing.assert_close(metric(logits[..., classes], renamed), by_class, **kept)
        torch.testing.assert_close(metric(logits[:1], labels), result[:1], **kept)


@pytest.mark.parametrize("C", [65_537, 70_000])
def test_many_classes(C):
    logits, labels = random_logits(2, 3, C)
    labels[0], labels[1] = C - 1, logits[0, 1].argmax()
    assert accuracy(logits, labels, 5).tolist() == top_k_oracle(logits, labels, 5).tolist()
    np.testing.assert_allclose(brier_score(logits, labels), brier_oracle(logits, labels), rtol=1e-6)
    np.testing.assert_allclose(
        prediction_entropy(logits), scipy_entropy(softmax(logits), axis=-1).mean(-1), rtol=1e-6
    )
    assert class_accuracy(logits, labels).isfinite().sum() == 2 * len(set(labels.tolist()))


@pytest.mark.gpu
@pytest.mark.parametrize("metric", OF_LOGITS_AND_LABELS, ids=OF_LOGITS_AND_LABELS.values())
def test_cuda_answers_as_the_cpu_does(metric):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logits, labels = random_logits(5, 300, 20)
    there = metric(logits.cuda(), labels)  # labels follow
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), metric(logits, labels), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda z, y: predictions(z.index_fill(1, torch.tensor([3, 5]), torch.nan)),
            "NaN logits in 4 rows of 2 of 2",
        ),
        (lambda z, y: accuracy(torch.cat([z, z * torch.nan]), y), r"in 40 rows of 2 of 4 models \(positions 2, 3\)"),
        (lambda z, y: cross_entropy(torch.cat([z, z / 0]), y), r"positions 2, 3\): drop these models"),
        (lambda z, y: expected_calibration_error(z - torch.inf, y), "NaN, .inf or -inf throughout in 40 rows"),
        (lambda z, y: predictions(z.int()), r"logits are int32 \[2, 20, 5\]; expected non-empty floating"),
        (lambda z, y: predictions(z[..., :0]), r"\[2, 20, 0\]"),
        (lambda z, y: cross_entropy(z[0], y), r"logits are float32 \[20, 5\].*one model: logits\[None\]"),
        (lambda z, y: accuracy(z[:, :0], y[:0]), r"logits are float32 \[2, 0, 5\]"),
        (lambda z, y: accuracy(z.argmax(-1)[:, :0], y[:0]), "expected non-empty integers"),
        (lambda z, y: accuracy(z.argmax(-1)[0], y), r"one model: predictions\[None\]"),
        (lambda z, y: accuracy(z, y[:-1]), r"labels are int64 \[19\]; expected one integer for each of the 20"),
        (lambda z, y: cross_entropy(z, y.float()), r"labels are float32 \[20\]; expected one integer"),
        (lambda z, y: accuracy(z, y + 1), "labels run from 1 to 5; expected 0 to 4"),
        (lambda z, y: accuracy(z.argmax(-1), y - 1), "labels run from -1 to 3; expected 0 to the last class"),
        (lambda z, y: expected_calibration_error(z, y, 0), "bins=0; expected at least 1"),
        (lambda z, y: accuracy(z, y, 0), "k=0; expected 1 to 5, the number of classes"),
        (lambda z, y: accuracy(z, y, 6), "k=6; expected 1 to 5, the number of classes"),
        (lambda z, y: accuracy(z.argmax(-1), y, 2), r"k=2 needs logits .*; predictions are int64 \[2, 20\]"),
        (lambda z, y: accuracy(z * torch.nan, y, 2), "NaN logits in 40 rows of 2 of 2"),
        (lambda z, y: accuracy(z, y + 1, 2), "labels run from 1 to 5; expected 0 to 4"),
        (lambda z, y: brier_score(z / 0, y), r"NaN, .inf or -inf throughout in 40 rows of 2 of 2"),
        (lambda z, y: brier_score(z, y + 1), "labels run from 1 to 5"),
        (lambda z, y: prediction_entropy(z * torch.nan), "NaN, .inf or -inf throughout in 40 rows"),
        (lambda z, y: prediction_entropy(z[0]), r"one model: logits\[None\]"),
        (lambda z, y: class_accuracy(z.argmax(-1), y), "num_classes=None for predictions; expected how many"),
        (lambda z, y: class_accuracy(z.argmax(-1), y, 0), "num_classes=0 for predictions; expected how many"),
        (lambda z, y: class_accuracy(z.argmax(-1), y, 4), "labels run from 0 to 4; expected 0 to 3"),
        (lambda z, y: class_accuracy(z, y, 6), "num_classes=6, but the logits have 5: leave it out"),
        (lambda z, y: class_accuracy(z * torch.nan, y), "NaN logits in 40 rows"),
        (lambda z, y: class_accuracy(z[..., 0], y), "expected non-empty floating"),
    ],
)
def test_refusals(unchecked, call, message):
    logits, _ = random_logits(2, 20, 5)
    labels = torch.arange(20) % 5
    with pytest.raises(ValueError, match=message):
        call(logits, labels)


NUMPY = np.zeros((2, 5, 3), np.float32)
OF_NUMPY = {
    "predictions": lambda: vz.predictions(NUMPY),
    "accuracy": lambda: vz.accuracy(NUMPY, torch.zeros(5, dtype=torch.int64)),
    "accuracy of labels": lambda: vz.accuracy(torch.zeros(2, 5, 3), np.zeros(5, np.int64)),
    "cross_entropy": lambda: vz.cross_entropy(NUMPY, torch.zeros(5, dtype=torch.int64)),
    "agreement": lambda: vz.agreement(np.zeros((2, 5), np.int64)),
    "jensen_shannon": lambda: vz.jensen_shannon(NUMPY),
    "cka": lambda: vz.cka(NUMPY),
    "weight_distances": lambda: vz.weight_distances(NUMPY[0]),
}


@pytest.mark.parametrize("measure", OF_NUMPY.values(), ids=OF_NUMPY)
def test_arrays_that_are_no_tensors_are_one_line(unchecked, measure):
    with pytest.raises(ValueError, match=r"numpy\.ndarray, not torch\.Tensor") as error:
        measure()
    assert "\n" not in str(error.value)
