"""Predictions against what is true: R², Kendall's tau, errors, accuracies, with intervals over held-out groups."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int64
from scipy.stats import kendalltau

LEVEL = 0.95
LEAST_GROUPS = 5
Predictions = Float64[np.ndarray, "R M"]
Metric = Callable[[np.ndarray, np.ndarray], float]


def r2(true: np.ndarray, predicted: np.ndarray) -> float:
    """1 less the squared error over that of the mean of these values."""
    return float(1 - np.square(true - predicted).sum() / np.square(true - true.mean()).sum())


def kendall_tau(true: np.ndarray, predicted: np.ndarray) -> float:
    """Tau-b: pairs in the same order less pairs in the opposite one; 0 where all predictions are equal."""
    return 0.0 if np.ptp(predicted) == 0 else float(kendalltau(true, predicted).statistic)


def mae(true: np.ndarray, predicted: np.ndarray) -> float:
    """Mean absolute error, in units of the values."""
    return float(np.abs(true - predicted).mean())


def accuracy(true: np.ndarray, predicted: np.ndarray) -> float:
    """Share of the models whose class is right."""
    return float((true == predicted).mean())


def balanced_accuracy(true: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that are there of the share of their models that is right."""
    return float(np.mean([(predicted[true == label] == label).mean() for label in np.unique(true)]))


NUMBERS: dict[str, Metric] = {"r2": r2, "kendall_tau": kendall_tau, "mae": mae}
CLASSES: dict[str, Metric] = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy}


def scores(true: Float64[np.ndarray, " M"], predicted: Predictions, *, classes: bool) -> dict[str, float]:
    """Each metric over all held-out predictions of one repeat, and the mean over repeats.

    Args:
        true: of M models.
        predicted: of the same models, in R repeats, each time by a model that had not seen their group.
        classes: whether the values are numbers of classes: `accuracy` and `balanced_accuracy`; else `r2` (1 is
            exact, 0 what the mean of all gives), `kendall_tau` (tau-b) and `mae` in units of the target.

    Example:
        >>> scores(np.array([0.0, 1, 2]), np.array([[0.0, 1, 2]]), classes=False)
        {'r2': 1.0, 'kendall_tau': 1.0, 'mae': 0.0}
    """
    metrics = CLASSES if classes else NUMBERS
    return {name: float(np.mean([metric(true, each) for each in predicted])) for name, metric in metrics.items()}


def intervals(
    true: Float64[np.ndarray, " M"],
    predicted: Predictions,
    groups: Int64[np.ndarray, " M"],
    *,
    classes: bool,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap over held-out groups: what other runs, or lineages, would have given.

    Groups are drawn with replacement, with all their models and all repeats of their predictions; the models that
    predict are not trained again. An interval from the spread between folds would be too narrow, as folds share most
    of their training models. NaN where there are fewer than five groups.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.

    Args:
        true: see `scores`.
        predicted: see `scores`.
        groups: of the models: runs or lineages.
        classes: see `scores`.
        resamples: how often groups are drawn.
        seed: of the draws.
    """
    metrics = CLASSES if classes else NUMBERS
    names, codes = np.unique(groups, return_inverse=True)
    if len(names) < LEAST_GROUPS:
        return dict.fromkeys(metrics, (np.nan, np.nan))
    members = [np.flatnonzero(codes == code) for code in range(len(names))]
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(resamples):
        places = np.concatenate([members[code] for code in random.integers(0, len(names), len(names))])
        if np.ptp(true[places]) == 0:
            continue
        for name, metric in metrics.items():
            drawn[name].append(float(np.mean([metric(true[places], each[places]) for each in predicted])))
    ends = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    found = {name: np.percentile(values, ends) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}
