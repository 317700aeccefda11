"""What models predict: accuracy, loss, calibration and agreement of a whole population.

Pure functions of tensors. P models, N images, C classes; the result lies on the input's device, and inputs are
never written to. Everything is computed in blocks of images, so temporaries stay near 8 MB a block whatever N is.
Losses and confidences come from float32 exponentials (float64 for float64 logits) summed in float64.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Integer, Num
from torch import Tensor

BLOCK_ELEMENTS = 2**20


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
    if logits.ndim < 2 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"logits are {_describe(logits)}; expected non-empty floating [..., N, C]: "
            "models, then images, then classes"
        )
    largest, classes = logits.max(-1)
    _refuse_rows(largest.isnan(), "NaN logits")
    return classes


@torch.no_grad()
def accuracy(
    predictions_or_logits: Num[Tensor, "P N"] | Float[Tensor, "P N C"], labels: Integer[Tensor, " N"]
) -> Float64[Tensor, " P"]:
    """Share of images whose predicted class is the label.

    Args:
        predictions_or_logits: integer predictions `[P, N]` or floating logits `[P, N, C]`.
        labels: true classes, any integer dtype.

    Raises:
        ValueError: on float predictions, NaN logits, labels that do not fit, or no images.

    Example:
        >>> accuracy(torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1]]), torch.tensor([0, 1, 1, 1]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    if predictions_or_logits.is_floating_point():
        _check_logits(predictions_or_logits)
        predicted, classes = predictions(predictions_or_logits), predictions_or_logits.shape[-1]
    else:
        _check_predictions(predictions_or_logits)
        predicted, classes = predictions_or_logits, None
    labels = _checked_labels(labels, predicted, classes)
    counts = (predicted == labels).sum(-1)
    return counts.double() / torch.full_like(counts, len(labels))


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
    _check_logits(logits)
    labels = _checked_labels(labels, logits[..., 0], logits.shape[-1])
    loss = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for block, shifted, partition in _softmax_blocks(logits):
        target = labels[block].expand(len(logits), -1).unsqueeze(-1)
        loss += (partition.log() - shifted.gather(-1, target).squeeze(-1)).sum(1)
    return loss / len(labels)


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
    _check_logits(logits)
    labels = _checked_labels(labels, logits[..., 0], logits.shape[-1])
    inner_edges = torch.arange(1, bins, dtype=torch.float64, device=logits.device) / bins
    gaps = torch.zeros(len(logits), bins, dtype=torch.float64, device=logits.device)
    for block, shifted, partition in _softmax_blocks(logits):
        confidence = partition.reciprocal()
        correct = shifted.argmax(-1) == labels[block]
        gaps.scatter_add_(1, torch.bucketize(confidence, inner_edges), correct.double() - confidence)
    return gaps.abs().sum(1) / len(labels)


@torch.no_grad()
def agreement(predictions: Num[Tensor, "P N"]) -> Float64[Tensor, "P P"]:
    """Share of images on which two models predict the same class, for all pairs.

    Classes are compared for equality only, so any integers do. On the CPU each image is one bit of `log2(C)` bit
    planes; two models differ where the OR of the XORed planes is set, and a population count adds up.

    Returns:
        Exact counts / N: symmetric, ones on the diagonal.

    Raises:
        ValueError: on float predictions, a shape other than [P, N], or no images.

    Example:
        >>> agreement(torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    _check_predictions(predictions)
    count = _matches_by_bit_planes if predictions.device.type == "cpu" else _matches_by_comparison
    matches = count(predictions)
    return matches.double() / matches.diagonal()  # a scalar divisor is inverted on GPUs: N / N would not be 1


def _matches_by_bit_planes(predicted: Integer[Tensor, "P N"]) -> Int64[Tensor, "P P"]:
    P, N = predicted.shape
    codes = predicted.numpy()
    lowest, highest = int(codes.min()), int(codes.max())
    if highest - lowest >= 2**16:
        codes = np.unique(codes, return_inverse=True)[1].reshape(P, N)
        lowest, highest = 0, int(codes.max())
    width = (highest - lowest).bit_length()
    matches = np.full((P, P), N, np.int64)
    step = max(64, BLOCK_ELEMENTS * 8 // (P * max(width, 1)) // 64 * 64)
    for start in range(0, N, step):
        block = (codes[:, start : start + step].astype(np.int64, order="C") - lowest).astype(np.uint16)
        block = np.pad(block, ((0, 0), (0, -block.shape[1] % 64)))
        bits = ((block >> bit) & 1 for bit in range(width))
        planes = [np.packbits(plane.astype(bool), axis=1).view(np.uint64) for plane in bits]
        for row in range(P if planes else 0):
            differ = planes[0][row] ^ planes[0][row:]
            for plane in planes[1:]:
                differ |= plane[row] ^ plane[row:]
            matches[row, row:] -= np.bitwise_count(differ).sum(1, dtype=np.int64)
    return torch.from_numpy(np.triu(matches) + np.triu(matches, 1).T)


def _matches_by_comparison(predicted: Integer[Tensor, "P N"]) -> Int64[Tensor, "P P"]:
    P = len(predicted)
    matches = torch.zeros(P, P, dtype=torch.int64, device=predicted.device)
    budget = 64 * BLOCK_ELEMENTS  # of one-byte comparisons
    for block in predicted.split(max(1, budget // P**2), dim=1):
        rows = max(1, budget // block.numel())
        for start in range(0, P, rows):
            same = block[start : start + rows, None] == block[None]
            matches[start : start + rows] += same.sum(-1)
    return matches


def _softmax_blocks(logits: Float[Tensor, "P N C"]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of images: their slice, `z - max(z)` [P, n, C], and `sum_c exp(z_c - max(z))` [P, n] in float64."""
    P, N, C = logits.shape
    _refuse_rows(~logits.amax(-1).isfinite(), "logits that are NaN, +inf or -inf throughout")
    step = max(1, BLOCK_ELEMENTS // (P * C))
    for start in range(0, N, step):
        block = logits[:, start : start + step]
        block = block if block.dtype == torch.float64 else block.float()
        shifted = block - block.amax(-1, keepdim=True)
        yield slice(start, start + step), shifted, shifted.exp().double().sum(-1)


def _refuse_rows(bad: Tensor, what: str) -> None:
    if bad.any():
        affected = bad.reshape(-1, bad.shape[-1])
        models = affected.any(1).nonzero().flatten().tolist()
        shown = ", ".join(map(str, models[:8])) + (", …" if len(models) > 8 else "")
        raise ValueError(
            f"{what} in {int(affected.sum())} rows of {len(models)} of {len(affected)} models "
            f"(positions {shown}): drop these models, or look for a diverged run"
        )


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 3 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"logits are {_describe(logits)}; expected non-empty floating [P, N, C]: models, images, classes "
            "(one model: logits[None])"
        )


def _check_predictions(predicted: Tensor) -> None:
    if predicted.is_floating_point():
        raise ValueError(
            f"predictions are {_describe(predicted)}; expected integers [P, N]: take the argmax first, "
            "predictions(logits)"
        )
    if predicted.ndim != 2 or predicted.dtype == torch.bool or 0 in predicted.shape:
        raise ValueError(
            f"predictions are {_describe(predicted)}; expected non-empty integers [P, N] "
            "(one model: predictions[None])"
        )


def _checked_labels(labels: Tensor, predicted: Tensor, classes: int | None) -> Tensor:
    """The labels as int64 on the device of `predicted`."""
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != predicted.shape[1:]:
        raise ValueError(
            f"labels are {_describe(labels)}; expected one integer for each of the {predicted.shape[1]} images"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or (classes is not None and highest >= classes):
        raise ValueError(
            f"labels run from {lowest} to {highest}; expected 0 to "
            f"{'the last class' if classes is None else classes - 1}: check that they belong to these models' classes"
        )
    return labels.to(predicted.device, torch.int64)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
