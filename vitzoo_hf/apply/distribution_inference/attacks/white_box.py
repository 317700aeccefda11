"""Attacks on weights, by features of the module `features`; the set encoder lies in `set_encoder`."""

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
    """Select features of shadows and targets by name.

    Raises:
        ZooError: if the features are missing.
    """
    if name not in shadows.views.features or name not in targets.features:
        raise ZooError(f"this attack reads {name!r} off weights, which were not taken: give access to weights")
    return shadows.views.features[name], targets.features[name]


def ridge_on(name: str, shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Guess from features of weights (`head`, `components` or `statistics`) by ridge regression."""
    return guess_by_ridge(shadows, *features_of(name, shadows, targets))


def mlp_on(name: str, shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Guess from features of weights by an MLP: the baselines `flat` and `sorted`, for small models.

    Raises:
        ZooError: for more than 200,000 weights.
    """
    of_shadows, of_targets = features_of(name, shadows, targets)
    # the first layer alone has 128 weights a number, and Adam two moments of each
    if of_shadows.shape[1] > LARGEST_FLAT:
        raise ZooError(
            f"an MLP on {of_shadows.shape[1]:,} flat weights: expected at most {LARGEST_FLAT:,}; use components"
        )
    return guess_by_mlp(shadows, of_shadows, of_targets, seed)


def log_odds_estimate(shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Estimate the share of class 1 from the biases of the head: the logistic of their difference.

    At the optimum of cross-entropy without informative features, the biases differ by `ln(r / (1 - r))`. No shadow is
    used: the guessed class is the candidate ratio nearest to the estimate.

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
    # the nearest candidate, so no shadow sets a threshold
    distance = torch.from_numpy(np.abs(ratios - np.asarray(shadows.secret.values, dtype=np.float64)))
    # grows as the estimate comes nearer to the second class
    scores = distance[:, 0] - distance[:, 1] if distance.shape[1] == 2 else None
    return Guesses(distance.argmin(1), scores)


def label_ratio(bias: Float64[np.ndarray, "P 2"]) -> Float64[np.ndarray, "P 1"]:
    """Share of class 1 by the biases of a classifier.

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
