import contextlib
import warnings

import numpy as np
import pytest
import torch
from jaxtyping import config
from sklearn.metrics import log_loss

import vitzoo_hf.behavior_inputs as inputs
import vitzoo_hf.behavior_pairs as behavior
from vitzoo_hf.behavior import accuracy, cross_entropy, expected_calibration_error, predictions
from vitzoo_hf.behavior_pairs import agreement


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


def agreement_oracle(predicted):
    p = predicted.numpy()
    return np.array([[np.mean(a == b) for b in p] for a in p])


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
    for metric in (accuracy, cross_entropy, expected_calibration_error):
        result = metric(strided, labels)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, metric(logits.double(), labels), atol=1e-6, rtol=1e-6)


def test_inputs_are_left_alone():
    logits, labels = random_logits(2, 50, 6)
    logits.requires_grad_()
    before = logits.detach().clone(), labels.clone()
    for metric in (accuracy, cross_entropy, expected_calibration_error):
        assert not metric(logits, labels).requires_grad
    predicted = predictions(logits)
    kept = predicted.clone()
    agreement(predicted)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])
    assert torch.equal(predicted, kept)


@pytest.mark.parametrize("block", [1, 64, 2**20])
@pytest.mark.parametrize("N", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("C", [1, 2, 100, 1000])
def test_agreement_is_exact(monkeypatch, block, N, C):
    monkeypatch.setattr(behavior, "BLOCK_ELEMENTS", block)
    _, labels = random_logits(1, N, C)
    noise = torch.randint(C, (5, N), generator=torch.Generator().manual_seed(N))
    predicted = torch.where(torch.rand(5, N) < 0.6, labels, noise)
    expected = agreement_oracle(predicted)
    assert np.array_equal(agreement(predicted), expected)
    assert np.array_equal(behavior._matches_by_comparison(predicted).double() / N, expected)


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
        (lambda z, y: agreement(z[..., 0]), "take the argmax first"),
        (lambda z, y: agreement(z), "take the argmax first"),
        (lambda z, y: agreement(y), r"predictions are int64 \[20\]; expected non-empty integers \[P, N\]"),
        (lambda z, y: agreement(z.argmax(-1)[:, :0]), "expected non-empty integers"),
        (lambda z, y: agreement(z[..., 0] > 0), r"predictions are bool \[2, 20\]"),
    ],
)
def test_refusals(unchecked, call, message):
    logits, _ = random_logits(2, 20, 5)
    labels = torch.arange(20) % 5
    with pytest.raises(ValueError, match=message):
        call(logits, labels)
