"""Losses, soft targets, mixing and erasing; their random draws come from the global generators."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from vitzoo_hf.blueprint.blueprint import Recipe
from vitzoo_hf.timm_import import import_timm


def make_mix(recipe: Recipe, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`(inputs, labels) -> (inputs, soft targets)`: label smoothing always, Mixup and CutMix as the recipe says."""
    if recipe.mixup or recipe.cutmix:
        mixup = import_timm().data.Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            label_smoothing=recipe.label_smoothing,
            num_classes=num_classes,
        )

        def mix(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            # timm's Mixup pairs an image with its mirror in the batch, and refuses an odd number
            even = len(labels) // 2 * 2
            if even == 0:
                return inputs, soften(labels, num_classes, recipe.label_smoothing)
            return mixup(inputs[:even], labels[:even])

        return mix
    return lambda inputs, labels: (inputs, soften(labels, num_classes, recipe.label_smoothing))


def soften(labels: Tensor, num_classes: int, smoothing: float) -> Float[Tensor, "B C"]:
    """One-hot targets with `smoothing` spread evenly over all classes.

    >>> soften(torch.tensor([1]), 2, 0.2)
    tensor([[0.1000, 0.9000]])
    """
    # timm's share too: all classes get smoothing / C, the true one among them
    return one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def make_erase(recipe: Recipe, device: str) -> Callable[[Tensor], Tensor]:
    """Timm's RandomErasing ('pixel' mode), or nothing."""
    if not recipe.random_erase:
        return lambda inputs: inputs
    return import_timm().data.random_erasing.RandomErasing(recipe.random_erase, mode="pixel", device=device)


def info_nce(outputs: Float[Tensor, "B2 K"], temperature: float) -> Tensor:
    """InfoNCE over a batch of two views each: rows i and i + B are the views of image i (Chen et al. 2020).

    >>> info_nce(torch.eye(2).repeat(2, 1), temperature=0.01).item() < 1e-3
    True
    """
    embedded = normalize(outputs, dim=1)
    similarity = embedded @ embedded.T / temperature
    # SimCLR's denominator leaves out the image itself
    similarity.fill_diagonal_(-math.inf)
    half = len(outputs) // 2
    positives = torch.arange(2 * half, device=outputs.device).roll(half)
    return cross_entropy(similarity, positives)


def stacked_info_nce(outputs: Float[Tensor, "P B2 K"], temperature: float) -> Float[Tensor, " P"]:
    """`info_nce` of each of P models on its own batch.

    >>> stacked_info_nce(torch.eye(2).repeat(3, 2, 1), temperature=0.01).shape
    torch.Size([3])
    """
    embedded = normalize(outputs, dim=2)
    count = outputs.shape[1]
    itself = torch.eye(count, dtype=torch.bool, device=outputs.device)
    similarity = (embedded @ embedded.mT / temperature).masked_fill(itself, -math.inf)
    positives = torch.arange(count, device=outputs.device).roll(count // 2).expand(len(outputs), -1)
    return stacked_cross_entropy(similarity, positives)


def stacked_cross_entropy(logits: Float[Tensor, "P B K"], targets: Tensor) -> Float[Tensor, " P"]:
    """The mean cross-entropy of each of P models; targets are labels `[P, B]` or distributions `[P, B, K]`.

    >>> stacked_cross_entropy(torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64))
    tensor([1.3863, 1.3863])
    """
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
    return losses.unflatten(0, logits.shape[:2]).mean(1)
