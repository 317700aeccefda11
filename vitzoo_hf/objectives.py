"""Losses, soft targets, mixing and erasing, and the seeds they are drawn from."""

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from vitzoo_hf.blueprint import Recipe
from vitzoo_hf.vit import import_timm


def derive_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A seed for one purpose and epoch, unrelated to those of the others.

    >>> derive_seed(42, "order", 1) != derive_seed(42, "views", 1)
    True
    """
    digest = hashlib.sha256(f"{seed}:{purpose}:{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
    similarity.fill_diagonal_(-math.inf)
    half = len(outputs) // 2
    positives = torch.arange(2 * half, device=outputs.device).roll(half)
    return cross_entropy(similarity, positives)


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global generators that timm's Mixup and RandomErasing draw from; put them back afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
