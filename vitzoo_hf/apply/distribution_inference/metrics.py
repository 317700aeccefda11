"""Measures of an attack: area under the curve, leaked samples, and intervals over targets, seeds and worlds."""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def area_under_curve(scores: Float64[Tensor, " P"], positive: Bool[Tensor, " P"]) -> float:
    """Probability that a positive scores above a negative, ties counted half (Mann and Whitney, 1947).

    Raises:
        ValueError: if all are positive, or none is.

    Example:
        >>> area_under_curve(torch.tensor([0.1, 0.4, 0.4], dtype=torch.float64), torch.tensor([False, False, True]))
        0.75
    """
    if positive.all() or not positive.any():
        raise ValueError("an area under the curve needs positives and negatives")
    # two searches in a sorted list count ties half, in n log n steps
    low = scores[~positive].sort().values
    high = scores[positive].contiguous()
    below = torch.searchsorted(low, high, right=False)
    through = torch.searchsorted(low, high, right=True)
    return ((below + through).double() / 2).mean().item() / len(low)


def leaked_samples(accuracy: float, ratios: tuple[float, float]) -> float:
    """n_leaked: number of training samples that separate two ratios with this accuracy; infinite for accuracy 1.

    With `rho = max(min(r0, r1) / max(r0, r1), (1 - max) / (1 - min))` it is `ln(1 - (2 accuracy - 1)^2) / ln rho`; an
    accuracy at or below one half leaks none.

    Source: Suri and Evans, "Formalizing and Estimating Distribution Inference Risks", PETS 2022.

    Raises:
        ValueError: for ratios that are equal or outside 0 to 1, or an accuracy outside 0 to 1.

    Example:
        >>> round(leaked_samples(0.9, (0.5, 0.3)), 2)
        3.04
    """
    low, high = sorted(ratios)
    if not 0 <= low < high <= 1 or not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy {accuracy} and ratios {ratios}; expected two different ratios, all from 0 to 1")
    if accuracy == 1:
        return math.inf
    overlap = max(low / high, (1 - high) / (1 - low))
    # an attack below chance leaks nothing
    gain = max(2 * accuracy - 1, 0.0)
    return math.log(1 - gain**2) / math.log(overlap) if gain and overlap > 0 else 0.0


def leaked_samples_of_errors(ratios: Float64[Tensor, " P"], guesses: Float64[Tensor, " P"]) -> float:
    """n_leaked of a regression: number of samples that estimate the ratio as well, mean `r (1 - r)` over mean square.

    Raises:
        ValueError: for ratios outside 0 to 1.

    Example:
        >>> ratios = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> leaked_samples_of_errors(ratios, ratios + 0.25)
        4.0
    """
    if not ((ratios >= 0) & (ratios <= 1)).all():
        raise ValueError("n_leaked is of ratios; some secrets are outside 0 to 1")
    error = (ratios - guesses).square().mean().item()
    return (ratios * (1 - ratios)).mean().item() / error if error > 0 else math.inf


def nested_interval(values: Float64[Tensor, "W S T"], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean over draws of the world, seeds and targets, with a bootstrap interval that resamples the three in turn.

    Within a draw of the world, all seeds get equal resampled targets. An axis of length 1 adds no spread: one draw of
    the world says nothing about other draws. One draw and one seed give the percentile interval over targets (Efron,
    1979).

    Args:
        values: hits or losses of each target (T) under each seed (S) in each world (W).
        resamples: number of resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: for an empty axis or values that are not finite.
    """
    if 0 in values.shape or not values.isfinite().all():
        raise ValueError(f"values {list(values.shape)}; expected finite ones with at least one along each axis")
    W, S, T = values.shape
    random = np.random.default_rng(seed)
    array = values.numpy()
    means = np.empty(resamples)
    for number in range(resamples):
        worlds = random.integers(W, size=W)
        total = 0.0
        for world in worlds:
            by_seed = array[world]
            # no draw for one seed: resampling it adds no spread
            per_target = by_seed[random.integers(S, size=S)].mean(0) if S > 1 else by_seed[0]
            total += per_target[random.integers(T, size=T)].mean()
        means[number] = total / W
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(array.mean()), float(low), float(high))
