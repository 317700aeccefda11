"""How sure a difference is: paired over images, over groups, over runs; percentile bootstraps (Efron 1979)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from scipy.stats import binomtest, wilcoxon
from torch import Tensor

RESAMPLES = 10_000
LEVEL = 0.95


class Difference(NamedTuple):
    """A mean difference with the ends of its interval."""

    mean: float
    low: float
    high: float


class Gains(NamedTuple):
    """Differences of many runs or groups taken together.

    Attributes:
        number: how many there are.
        mean: with `low` and `high`, its interval over resampled differences.
        median: of the differences.
        share_better: that are above zero.
        share_worse: that are below zero.
        sign_p: two-sided sign test, ties left out; 1 where there are only ties.
        wilcoxon_p: two-sided signed-rank test, ties left out; 1 where there are only ties.
    """

    number: int
    mean: float
    low: float
    high: float
    median: float
    share_better: float
    share_worse: float
    sign_p: float
    wilcoxon_p: float


def paired_difference(
    right: Bool[Tensor, " N"], other: Bool[Tensor, " N"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Accuracy less the other accuracy on the same images, with its 95 % interval over resampled images.

    Resampling N images with replacement draws how many of them only one of the two had right from a multinomial, so
    that is what is drawn.

    Args:
        right: which images one has right.
        other: which the other has right.
        resamples: of the images.
        seed: of the draws.

    Example:
        >>> import torch
        >>> one = torch.tensor([True, True, True, False])
        >>> paired_difference(one, one)
        Difference(mean=0.0, low=0.0, high=0.0)
    """
    images = len(right)
    gained, lost = int((right & ~other).sum()), int((other & ~right).sum())
    shares = np.array([gained, lost, images - gained - lost]) / images
    drawn = np.random.default_rng(seed).multinomial(images, shares, size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / images, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference((gained - lost) / images, float(low), float(high))


def gains(differences: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Gains:
    """Mean, median, shares and tests of paired differences, with a bootstrap over them.

    They are taken as independent; runs of one parent, measured on the same images, are not quite.

    Args:
        differences: one a run or a group.
        resamples: of the differences.
        seed: of the draws.

    Raises:
        ValueError: if there is none, or one is not finite.

    Example:
        >>> gains([0.01, 0.02, 0.0, 0.01]).share_better
        0.75
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"{values.size} differences; expected at least one, all finite")
    drawn = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    low, high = np.quantile(values[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    better, worse = int((values > 0).sum()), int((values < 0).sum())
    signs = binomtest(better, better + worse).pvalue if better + worse else 1.0
    ranks = wilcoxon(values, method="asymptotic").pvalue if better + worse else 1.0
    return Gains(
        int(values.size),
        float(values.mean()),
        float(low),
        float(high),
        float(np.median(values)),
        better / values.size,
        worse / values.size,
        float(signs),
        float(ranks),
    )
