"""Predictions of each model of a population, and their quality: accuracy, losses, calibration, certainty.

Pure functions of tensors. P models, N images, C classes; the result lies on the input's device, and inputs are
never written to. Everything is computed in blocks of images, so temporaries stay near 8 MB a block whatever N is.
Losses and probabilities come from float32 exponentials (float64 for float64 logits) summed in float64. NaN logits
are refused by name, and nothing hides them.
"""

import torch
from jaxtyping import Float, Float64, Int64, Integer, Num
from torch import Tensor

from vitzoo_hf.format.messages import describe
from vitzoo_hf.metrics.inputs import (
    check_logits,
    check_predictions,
    checked_labels,
    image_blocks,
    refuse_rows,
    softmax_blocks,
)


@torch.no_grad()
def predictions(logits: Float[Tensor, "*P N C"]) -> Int64[Tensor, "*P N"]:
    """The class with the largest logit; the lowest index wins a tie.

    Args:
        logits: any floating dtype; leading axes are free.

    Raises:
        ValueError: if a logit is NaN, or there are no images or no classes.

    Example:
        >>> predictions(torch.tensor([[[0.1, 0.7], [0.5, 0.5]]]))
        tensor([[1, 0]])
    """
    if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"logits are {describe(logits)}; expected non-empty floating [..., N, C]: "
            "models, then images, then classes"
        )
    largest, classes = logits.max(-1)
    refuse_rows(largest.isnan(), "NaN logits")
    return classes


@torch.no_grad()
def accuracy(
    predictions_or_logits: Num[Tensor, "P N"] | Float[Tensor, "P N C"], labels: Integer[Tensor, " N"], k: int = 1
) -> Float64[Tensor, " P"]:
    """Share of images whose label is the predicted class, or among the `k` classes with the largest logits.

    A label is in the top k where fewer than k classes beat it: by a larger logit, or by an equal one and a lower
    index. So k=1 is the accuracy of `predictions`, and a constant model does not pass for a good one.

    Args:
        predictions_or_logits: integer predictions `[P, N]` or floating logits `[P, N, C]`.
        labels: true classes, any integer dtype.
        k: 1 for predictions; 1 to C for logits.

    Raises:
        ValueError: on float predictions, NaN logits, labels that do not fit, no images, or such a k.

    Example:
        >>> accuracy(torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1]]), torch.tensor([0, 1, 1, 1]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
        >>> logits = torch.tensor([[[0.1, 0.3, 0.6], [0.1, 0.2, 0.7]]])
        >>> accuracy(logits, torch.tensor([1, 0]), k=2)
        tensor([0.5000], dtype=torch.float64)
    """
    if k != 1:
        counts = _labels_in_top_k(predictions_or_logits, labels, k)
    else:
        predicted, classes = _predictions_of(predictions_or_logits)
        counts = (predicted == checked_labels(labels, predicted, classes)).sum(-1)
    return counts.double() / torch.full_like(counts, len(labels))


@torch.no_grad()
def class_accuracy(
    predictions_or_logits: Num[Tensor, "P N"] | Float[Tensor, "P N C"],
    labels: Integer[Tensor, " N"],
    num_classes: int | None = None,
) -> Float64[Tensor, "P C"]:
    """Share of each class's images that are predicted right: the recall of every class.

    Args:
        predictions_or_logits: integer predictions `[P, N]` or floating logits `[P, N, C]`.
        labels: true classes, any integer dtype.
        num_classes: C, which must be given with predictions; the last axis of logits says it.

    Returns:
        NaN for a class without images. The mean weighted by the images of each class is `accuracy`.

    Raises:
        ValueError: on float predictions, NaN logits, labels that do not fit, no images, or a `num_classes` that is
            missing for predictions or differs from that of the logits.

    Example:
        >>> class_accuracy(torch.tensor([[0, 1, 1, 0]]), torch.tensor([0, 1, 1, 1]), num_classes=3)
        tensor([[1.0000, 0.6667,    nan]], dtype=torch.float64)
    """
    predicted, classes = _predictions_of(predictions_or_logits)
    if classes is None and (num_classes is None or num_classes < 1):
        raise ValueError(f"num_classes={num_classes} for predictions; expected how many classes the models know")
    if None not in (classes, num_classes) and classes != num_classes:
        raise ValueError(f"num_classes={num_classes}, but the logits have {classes}: leave it out")
    labels = checked_labels(labels, predicted, classes or num_classes)
    images = torch.bincount(labels, minlength=classes or num_classes or 0)
    right = torch.zeros(len(predicted), len(images), dtype=torch.int64, device=predicted.device)
    for block in image_blocks(len(labels), len(predicted), predicted.device):
        hits = predicted[:, block] == labels[block]
        right.scatter_add_(1, labels[block].expand(len(predicted), -1), hits.long())
    return right.double() / images


@torch.no_grad()
def cross_entropy(logits: Float[Tensor, "P N C"], labels: Integer[Tensor, " N"]) -> Float64[Tensor, " P"]:
    """Mean negative log-likelihood of the labels, in nats: `mean(log sum_c exp(z_c) - z_label)`.

    Args:
        logits: any floating dtype. A label whose logit is -inf costs infinity.
        labels: true classes, any integer dtype.

    Raises:
        ValueError: on NaN or +inf logits, labels that do not fit, or no images.

    Example:
        >>> cross_entropy(torch.zeros(1, 3, 10), torch.tensor([0, 4, 9])).exp()
        tensor([10.0000], dtype=torch.float64)
    """
    check_logits(logits)
    labels = checked_labels(labels, logits[..., 0], logits.shape[-1])
    loss = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for images, shifted, _, partition in softmax_blocks(logits):
        target = labels[images].expand(len(logits), -1).unsqueeze(-1)
        loss += (partition.log() - shifted.gather(-1, target).squeeze(-1)).sum(1)
    return loss / len(labels)


@torch.no_grad()
def brier_score(logits: Float[Tensor, "P N C"], labels: Integer[Tensor, " N"]) -> Float64[Tensor, " P"]:
    """Mean squared distance between the softmax and the one-hot label, over all classes (Brier 1950).

    `mean(sum_c (p_c - [c = label])^2)`: 0 for certain and right, 2 for certain and wrong. Of two classes it is twice
    the binary score.

    Args:
        logits: any floating dtype.
        labels: true classes, any integer dtype.

    Raises:
        ValueError: on NaN or +inf logits, labels that do not fit, or no images.

    Example:
        >>> brier_score(torch.zeros(1, 3, 4), torch.tensor([0, 1, 3]))
        tensor([0.7500], dtype=torch.float64)
    """
    check_logits(logits)
    labels = checked_labels(labels, logits[..., 0], logits.shape[-1])
    score = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for images, _, exps, partition in softmax_blocks(logits):
        target = labels[images].expand(len(logits), -1).unsqueeze(-1)
        # summed over the wrong classes: 1 - p of a label that is almost certain would cancel
        wrong = exps.double().scatter_(-1, target, 0)
        score += ((wrong.sum(-1).square() + wrong.square().sum(-1)) / partition.square()).sum(1)
    return score / len(labels)


@torch.no_grad()
def prediction_entropy(logits: Float[Tensor, "P N C"]) -> Float64[Tensor, " P"]:
    """Mean entropy of the softmax, in nats: 0 for a model that is always certain, `log C` for one that never is.

    Args:
        logits: any floating dtype. A logit of -inf is a probability of 0 and adds nothing.

    Raises:
        ValueError: on NaN or +inf logits, no classes, or no images.

    Example:
        >>> prediction_entropy(torch.zeros(1, 3, 10)).exp()
        tensor([10.0000], dtype=torch.float64)
    """
    check_logits(logits)
    entropy = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for _, shifted, exps, partition in softmax_blocks(logits):
        # 0 * -inf is NaN, but p log p is 0 in the limit
        weighted = (exps * shifted).masked_fill_(exps == 0, 0)
        entropy += (partition.log() - weighted.double().sum(-1) / partition).sum(1)
    return entropy / logits.shape[1]


@torch.no_grad()
def expected_calibration_error(
    logits: Float[Tensor, "P N C"], labels: Integer[Tensor, " N"], bins: int = 15
) -> Float64[Tensor, " P"]:
    """Top-label expected calibration error over equal-width bins `(lo, hi]`.

    `sum_b |B_b| / N * |accuracy(B_b) - confidence(B_b)|` with the softmax probability of the predicted class as
    confidence (Naeini et al. 2015; Guo et al. 2017). The input is always taken for logits, even where it happens
    to lie in [0, 1]; for probabilities pass their logarithm.

    Args:
        logits: any floating dtype.
        labels: true classes, any integer dtype.
        bins: number of bins of (0, 1].

    Raises:
        ValueError: on NaN or +inf logits, labels that do not fit, no images, or fewer than one bin.

    Example:
        >>> certain_and_half_right = 100 * torch.eye(2)[None]
        >>> expected_calibration_error(certain_and_half_right, torch.tensor([0, 0]))
        tensor([0.5000], dtype=torch.float64)
    """
    if bins < 1:
        raise ValueError(f"bins={bins}; expected at least 1 (15 is usual)")
    check_logits(logits)
    labels = checked_labels(labels, logits[..., 0], logits.shape[-1])
    inner_edges = torch.arange(1, bins, dtype=torch.float64, device=logits.device) / bins
    # |accuracy - confidence| * |B| / N of a bin is the size of its sum of (correct - confidence), over N
    gaps = torch.zeros(len(logits), bins, dtype=torch.float64, device=logits.device)
    for images, shifted, _, partition in softmax_blocks(logits):
        confidence = partition.reciprocal()
        correct = shifted.argmax(-1) == labels[images]
        gaps.scatter_add_(1, torch.bucketize(confidence, inner_edges), correct.double() - confidence)
    return gaps.abs().sum(1) / len(labels)


def _predictions_of(predictions_or_logits: Tensor) -> tuple[Int64[Tensor, "P N"], int | None]:
    """Predictions `[P, N]`, and the number of classes of logits; None for predictions."""
    if isinstance(predictions_or_logits, Tensor) and predictions_or_logits.is_floating_point():
        check_logits(predictions_or_logits)
        return predictions(predictions_or_logits), predictions_or_logits.shape[-1]
    check_predictions(predictions_or_logits)
    return predictions_or_logits.long(), None


def _labels_in_top_k(logits: Tensor, labels: Tensor, k: int) -> Int64[Tensor, " P"]:
    """Number of labels of each model that fewer than k classes beat."""
    if not logits.is_floating_point():
        raise ValueError(f"k={k} needs logits [P, N, C]; predictions are {describe(logits)} and tell k=1 only")
    check_logits(logits)
    P, N, C = logits.shape
    if not 1 <= k <= C:
        raise ValueError(f"k={k}; expected 1 to {C}, the number of classes")
    labels = checked_labels(labels, logits[..., 0], C)
    refuse_rows(logits.amax(-1).isnan(), "NaN logits")
    counts = torch.zeros(P, dtype=torch.int64, device=logits.device)
    classes = torch.arange(C, device=logits.device)
    for images in image_blocks(N, P * C, logits.device):
        label_logits = logits[:, images].gather(-1, labels[images].expand(P, -1).unsqueeze(-1))
        lower_index = classes < labels[images].unsqueeze(-1)
        beaten_by = (logits[:, images] > label_logits) | ((logits[:, images] == label_logits) & lower_index)
        counts += (beaten_by.sum(-1) < k).sum(-1)
    return counts
