"""Attacks on weights, on features of `weight_features`; the set encoder has a module of its own."""

from functools import partial

import numpy as np
import torch
from jaxtyping import Float64

from vitzoo_hf.apply.distribution_inference.attacks.meta_models import clamped, guess_by_mlp, guess_by_ridge
from vitzoo_hf.apply.distribution_inference.game import Attack, Guesses, Shadows, Views
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret
from vitzoo_hf.format.schema import ZooError

LARGEST_FLAT = 200_000


def features_of(name: str, shadows: Shadows, targets: Views) -> tuple[np.ndarray, np.ndarray]:
    """Features of shadows and targets by name.

    Raises:
        ZooError: if they were not taken.
    """
    if name not in shadows.views.features or name not in targets.features:
        raise ZooError(f"this attack reads {name!r} off weights, which were not taken: give access to weights")
    return shadows.views.features[name], targets.features[name]


def ridge_on(name: str, shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Ridge regression from features of weights: `head`, `components` or `statistics`."""
    return guess_by_ridge(shadows, *features_of(name, shadows, targets))


def mlp_on(name: str, shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """An MLP on features of weights: the baselines `flat` and `sorted`, for small models.

    Raises:
        ZooError: for more than 200,000 weights.
    """
    own, seen = features_of(name, shadows, targets)
    if own.shape[1] > LARGEST_FLAT:
        raise ZooError(f"an MLP on {own.shape[1]:,} flat weights: expected at most {LARGEST_FLAT:,}; use components")
    return guess_by_mlp(shadows, own, seen, seed)


def log_odds_estimate(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """The share of class 1 as the head's bias says it: the logistic of the difference of the two biases.

    At the optimum of cross-entropy with features that say nothing, the biases differ by `ln(r / (1 - r))`. No shadow
    is used: the guess of a class is the candidate ratio nearest to that share.

    Raises:
        ZooError: for models without exactly two classes, or a secret that is no ratio.
    """
    bias = targets.features.get("head_bias")
    if bias is None or bias.shape[1] != 2:
        raise ZooError("the log-odds of the head need weights of models with two classes")
    ratios = label_ratio(bias)
    if not isinstance(shadows.secret, ClassSecret):
        if ratios.shape[1] != len(shadows.secret.bounds):
            raise ZooError(f"a ratio is one number; this secret has {len(shadows.secret.bounds)}")
        return Guesses(clamped(shadows, torch.from_numpy(ratios)))
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in shadows.secret.values):
        raise ZooError(f"the log-odds of the head tell ratios, not classes such as {shadows.secret.values[0]!r}")
    distance = torch.from_numpy(np.abs(ratios - np.asarray(shadows.secret.values, dtype=np.float64)))
    scores = distance[:, 0] - distance[:, 1] if distance.shape[1] == 2 else None
    return Guesses(distance.argmin(1), scores)


def label_ratio(bias: Float64[np.ndarray, "M 2"]) -> Float64[np.ndarray, "M 1"]:
    """Share of class 1 that the biases of a classifier tell.

    >>> label_ratio(np.array([[0.0, 0.0], [0.0, np.log(3.0)]]))[:, 0].round(4).tolist()
    [0.5, 0.75]
    """
    return np.asarray(1 / (1 + np.exp(bias[:, :1] - bias[:, 1:])))


WHITE_BOX: dict[str, Attack] = {
    "log_odds": log_odds_estimate,
    "head": partial(ridge_on, "head"),
    "components": partial(ridge_on, "components"),
    "statistics": partial(ridge_on, "statistics"),
    "sorted_mlp": partial(mlp_on, "sorted"),
    "flat_mlp": partial(mlp_on, "flat"),
}
