"""Inputs of the metrics of behaviour: checks of logits, predictions and labels, and softmax in blocks of images."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.format.messages import describe
from vitzoo_hf.metrics.blocks import block_bytes

BLOCK_ELEMENTS = 2**20


class SoftmaxBlock(NamedTuple):
    """Some images of all models; the probabilities are `exps / partition`."""

    images: slice
    shifted: Float[Tensor, "P n C"]  # logits less the largest of their image, float32 or float64
    exps: Float[Tensor, "P n C"]  # exp(shifted)
    partition: Float64[Tensor, "P n"]  # sum of exps


def image_blocks(count: int, elements_each: int, device: torch.device) -> Iterator[slice]:
    """`count` images in blocks of about BLOCK_ELEMENTS, or of what an accelerator's block holds in float64."""
    step = max(1, block_bytes(device, 8 * BLOCK_ELEMENTS) // (8 * elements_each))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def softmax_blocks(logits: Float[Tensor, "P N C"]) -> Iterator[SoftmaxBlock]:
    """Softmax of checked logits: float32 exponentials (float64 for float64 logits), summed in float64.

    Raises:
        ValueError: where an image has no softmax: a NaN or +inf logit, or nothing but -inf.
    """
    P, N, C = logits.shape
    refuse_rows(~logits.amax(-1).isfinite(), "logits that are NaN, +inf or -inf throughout")
    for images in image_blocks(N, P * C, logits.device):
        block = logits[:, images]
        block = block if block.dtype == torch.float64 else block.float()
        shifted = block - block.amax(-1, keepdim=True)
        exps = shifted.exp()
        yield SoftmaxBlock(images, shifted, exps, exps.double().sum(-1))


def refuse_rows(bad: Tensor, what: str) -> None:
    """Name the models that have bad rows `[..., N]`, and refuse them."""
    if bad.any():
        affected = bad.reshape(-1, bad.shape[-1])
        models = affected.any(1).nonzero().flatten().tolist()
        shown = ", ".join(map(str, models[:8])) + (", …" if len(models) > 8 else "")
        raise ValueError(
            f"{what} in {int(affected.sum())} rows of {len(models)} of {len(affected)} models "
            f"(positions {shown}): drop these models, or look for a diverged run"
        )


def check_logits(logits: Tensor) -> None:
    """Refuse anything but non-empty floating `[P, N, C]`."""
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"logits are {describe(logits)}; expected non-empty floating [P, N, C]: models, images, classes "
            "(one model: logits[None])"
        )


def check_predictions(predicted: Tensor) -> None:
    """Refuse anything but non-empty integers `[P, N]`."""
    if isinstance(predicted, Tensor) and predicted.is_floating_point():
        raise ValueError(
            f"predictions are {describe(predicted)}; expected integers [P, N]: take the argmax first, "
            "predictions(logits)"
        )
    if (
        not isinstance(predicted, Tensor)
        or predicted.ndim != 2
        or predicted.dtype == torch.bool
        or 0 in predicted.shape
    ):
        raise ValueError(
            f"predictions are {describe(predicted)}; expected non-empty integers [P, N] "
            "(one model: predictions[None])"
        )


def checked_labels(labels: Tensor, predicted: Tensor, classes: int | None) -> Tensor:
    """The labels as int64 on the device of `predicted`."""
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.dtype == torch.bool
        or labels.shape != predicted.shape[1:]
    ):
        raise ValueError(
            f"labels are {describe(labels)}; expected one integer for each of the {predicted.shape[1]} images"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or (classes is not None and highest >= classes):
        raise ValueError(
            f"labels run from {lowest} to {highest}; expected 0 to "
            f"{'the last class' if classes is None else classes - 1}: check that they belong to these models' classes"
        )
    return labels.to(predicted.device, torch.int64)
