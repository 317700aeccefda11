"""Score predictions: R², Kendall's tau, errors and accuracies, with intervals over held-out groups."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int64
from scipy.stats import kendalltau

from vitzoo_hf.apply.intervals import percentile_interval, resampled_places

LEAST_GROUPS = 5  # of fewer groups, resamples are too few and too alike for an interval
Predictions = Float64[np.ndarray, "R P"]
Metric = Callable[[np.ndarray, np.ndarray], float]


def r2(true: np.ndarray, predicted: np.ndarray) -> float:
    """1 less the ratio of the squared error to the squared error of the mean of the true values."""
    return float(1 - np.square(true - predicted).sum() / np.square(true - true.mean()).sum())


def kendall_tau(true: np.ndarray, predicted: np.ndarray) -> float:
    """Kendall's tau-b: the excess of concordant over discordant pairs; 0 where all predictions are equal."""
    return 0.0 if np.ptp(predicted) == 0 else float(kendalltau(true, predicted).statistic)


def mae(true: np.ndarray, predicted: np.ndarray) -> float:
    """Mean absolute error, in units of the values."""
    return float(np.abs(true - predicted).mean())


def accuracy(true: np.ndarray, predicted: np.ndarray) -> float:
    """Share of models whose class is right."""
    return float((true == predicted).mean())


def balanced_accuracy(true: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the true classes of the share of models whose class is right."""
    return float(np.mean([(predicted[true == label] == label).mean() for label in np.unique(true)]))


NUMBERS: dict[str, Metric] = {"r2": r2, "kendall_tau": kendall_tau, "mae": mae}
CLASSES: dict[str, Metric] = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy}


def scores(true: Float64[np.ndarray, " P"], predicted: Predictions, *, classes: bool) -> dict[str, float]:
    """The mean over repeats of every metric over all held-out predictions.

    Args:
        true: true values of P models.
        predicted: predictions of these models in R repeats, by predictors that were not trained on their group.
        classes: whether values are numbers of classes, with metrics `accuracy` and `balanced_accuracy`. Otherwise the
            metrics are `r2` (1 is exact, 0 equals the mean of all values), `kendall_tau` (tau-b) and `mae`.

    Example:
        >>> scores(np.array([0.0, 1, 2]), np.array([[0.0, 1, 2]]), classes=False)
        {'r2': 1.0, 'kendall_tau': 1.0, 'mae': 0.0}
    """
    metrics = CLASSES if classes else NUMBERS
    return {name: float(np.mean([metric(true, repeat) for repeat in predicted])) for name, metric in metrics.items()}


def intervals(
    true: Float64[np.ndarray, " P"],
    predicted: Predictions,
    groups: Int64[np.ndarray, " P"],
    *,
    classes: bool,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the metrics by a percentile bootstrap over held-out groups.

    Groups are drawn with replacement, with all their models and all repeats of their predictions; predictors are not
    trained again. Intervals of fewer than five groups are NaN.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.

    Args:
        true: see `scores`.
        predicted: see `scores`.
        groups: group of every model: its run or lineage.
        classes: see `scores`.
        resamples: how many times groups are resampled.
        seed: seed of the draws.
    """
    metrics = CLASSES if classes else NUMBERS
    names, codes = np.unique(groups, return_inverse=True)
    if len(names) < LEAST_GROUPS:
        return dict.fromkeys(metrics, (np.nan, np.nan))
    members = [np.flatnonzero(codes == code) for code in range(len(names))]
    # Groups, not folds: folds share most of their training models, and their spread would be too narrow an interval.
    draws: dict[str, list[float]] = {name: [] for name in metrics}
    for drawn in resampled_places(len(names), resamples, seed):
        places = np.concatenate([members[code] for code in drawn])
        if np.ptp(true[places]) == 0:  # R² and tau of equal values are not defined
            continue
        for name, metric in metrics.items():
            draws[name].append(float(np.mean([metric(true[places], repeat[places]) for repeat in predicted])))
    return {name: percentile_interval(values) for name, values in draws.items()}
