"""Intervals and tests of differences: percentile bootstraps (Efron 1979) over images, groups, runs or pairs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64
from scipy.stats import binomtest, wilcoxon
from torch import Tensor

RESAMPLES = 10_000
LEVEL = 0.95
# In floating point this is 0.025000000000000022. Published tables rest on it, and others on 0.025: a caller states
# which, as the two may differ in the last bit.
TAIL = (1 - LEVEL) / 2


class Difference(NamedTuple):
    """A mean difference with the ends of its interval."""

    mean: float
    low: float
    high: float


class Gains(NamedTuple):
    """A summary of the differences of many runs or groups.

    Attributes:
        number: how many differences there are.
        mean: the mean difference.
        low: lower end of the interval of the mean over resampled differences.
        high: upper end of that interval.
        median: the median difference.
        share_better: the share of differences above zero.
        share_worse: the share of differences below zero.
        sign_p: p-value of the two-sided sign test without ties; 1 where there are only ties.
        wilcoxon_p: p-value of the two-sided signed-rank test without ties; 1 where there are only ties.
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


def resampled_places(count: int, resamples: int, seed: int) -> Int64[np.ndarray, "R N"]:
    """Draw positions with replacement: each row is one bootstrap sample of `count` values."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def percentile_interval(
    draws: Float[np.ndarray, " R"] | Sequence[float], *, tail: float = TAIL
) -> tuple[float, float]:
    """The quantiles `tail` and 1 - `tail` of draws, by default the ends of a 95 % interval.

    Args:
        draws: a statistic of every resample.
        tail: the share of draws below the interval, and of draws above it.

    Example:
        >>> percentile_interval([0.0, 1.0, 2.0, 3.0, 4.0], tail=0.25)
        (1.0, 3.0)
    """
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(
    right: Bool[Tensor, " N"], other: Bool[Tensor, " N"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Accuracy of one model less that of another on the same images, with its 95 % interval over resampled images.

    Args:
        right: images that the first model classifies rightly.
        other: images that the second model classifies rightly.
        resamples: how many times images are resampled.
        seed: seed of the draws.

    Example:
        >>> import torch
        >>> one = torch.tensor([True, True, True, False])
        >>> paired_difference(one, one)
        Difference(mean=0.0, low=0.0, high=0.0)
    """
    images = len(right)
    gained, lost = int((right & ~other).sum()), int((other & ~right).sum())
    shares = np.array([gained, lost, images - gained - lost]) / images
    # Resampling N images with replacement makes the counts of gained and lost images multinomial, so the counts are
    # drawn directly: R draws of three numbers, not of N images.
    counts = np.random.default_rng(seed).multinomial(images, shares, size=resamples)
    low, high = percentile_interval((counts[:, 0] - counts[:, 1]) / images)
    return Difference((gained - lost) / images, low, high)


def gains(differences: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Gains:
    """Mean, median, shares and tests of paired differences, with a bootstrap over them.

    The differences are treated as independent. Runs of one parent that are measured on the same images are not quite.

    Args:
        differences: one number a run or a group.
        resamples: how many times differences are resampled.
        seed: seed of the draws.

    Raises:
        ValueError: if there is no difference, or one is not finite.

    Example:
        >>> gains([0.01, 0.02, 0.0, 0.01]).share_better
        0.75
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"{values.size} differences; expected at least one, all finite")
    low, high = percentile_interval(values[resampled_places(values.size, resamples, seed)].mean(1))
    better, worse = int((values > 0).sum()), int((values < 0).sum())
    signs = binomtest(better, better + worse).pvalue if better + worse else 1.0
    # "asymptotic", because the exact null distribution does not allow ties of absolute values
    ranks = wilcoxon(values, method="asymptotic").pvalue if better + worse else 1.0
    return Gains(
        int(values.size),
        float(values.mean()),
        low,
        high,
        float(np.median(values)),
        better / values.size,
        worse / values.size,
        float(signs),
        float(ranks),
    )
