"""Learn secrets from features of shadows, by ridge regression or an MLP.

Features are standardised by the shadows alone; targets change nothing. Ridge regression predicts one number a class.
"""

import warnings

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.game import Guesses, Shadows
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret
from vitzoo_hf.format.schema import ZooError

PENALTIES = tuple(10.0**power for power in range(-3, 8))
HIDDEN = (128, 64)
MAX_EPOCHS = 1024
FEWEST_SHADOWS = 8
INTERRUPTED = "Training interrupted by user"


def standardised(
    shadows: Float64[np.ndarray, "S F"], targets: Float64[np.ndarray, "T F"]
) -> tuple[Float64[np.ndarray, "S F"], Float64[np.ndarray, "T F"]]:
    """Standardise features by the mean and deviation of the shadows; columns without spread become zeros.

    Raises:
        ZooError: for features that are not finite, or too few shadows.

    Example:
        >>> standardised(np.array([[0.0, 1.0]] * 4 + [[2.0, 1.0]] * 4), np.array([[1.0, 5.0]]))[1]
        array([[0., 0.]])
    """
    _check_features(shadows, targets)
    mean, spread = shadows.mean(0), shadows.std(0)
    # relative: below, a spread is rounding of the mean, and dividing by it would make noise
    varies = spread > 1e-12 * np.abs(mean).clip(1e-300)
    scale = np.where(varies, 1 / np.where(varies, spread, 1), 0.0)
    return (shadows - mean) * scale, (targets - mean) * scale


def _check_features(shadows: np.ndarray, targets: np.ndarray) -> None:
    if len(shadows) < FEWEST_SHADOWS:
        raise ZooError(f"{len(shadows)} shadows are too few to learn from: expected at least {FEWEST_SHADOWS}")
    if not np.isfinite(shadows).all() or not np.isfinite(targets).all():
        raise ZooError("features of some model are NaN or infinite: leave diverged models out, and count them")


def guess_by_ridge(
    shadows: Shadows, features: Float64[np.ndarray, "S F"], targets: Float64[np.ndarray, "T F"]
) -> Guesses:
    """Guess by ridge regression; the penalty is selected by leaving single shadows out."""
    from sklearn.linear_model import RidgeCV

    inputs, target_inputs = standardised(features, targets)
    truth = _as_numbers(shadows)
    # without folds, RidgeCV leaves single rows out in closed form
    model = RidgeCV(alphas=PENALTIES).fit(inputs, truth)
    return _guesses(shadows, np.asarray(model.predict(target_inputs)).reshape(len(target_inputs), -1))


def guess_by_mlp(
    shadows: Shadows, features: Float64[np.ndarray, "S F"], targets: Float64[np.ndarray, "T F"], seed: int
) -> Guesses:
    """Guess by an MLP with layers of 128 and 64 units, stopped early on a tenth of the shadows.

    Source: the meta-classifier of the published experiment, on standardised features.

    Raises:
        ZooError: if the MLP did not converge in 1024 epochs.
    """
    inputs, target_inputs = standardised(features, targets)
    # early stopping holds some shadows out, and each class must remain in both parts
    check_classes(shadows, 2)
    if isinstance(shadows.secret, ClassSecret):
        return _guesses(shadows, _values_by_mlp(shadows, inputs, target_inputs, shadows.secrets.numpy(), seed))
    mean, spread = _centre(shadows)
    values = _values_by_mlp(shadows, inputs, target_inputs, (shadows.secrets.numpy() - mean) / spread, seed)
    return _guesses(shadows, values * spread + mean)


def guess_by_published_mlp(
    shadows: Shadows, features: Float64[np.ndarray, "S F"], targets: Float64[np.ndarray, "T F"], seed: int
) -> Guesses:
    """Guess by the MLP as published: on raw features of half of the shadows, another half for each seed.

    Halves have the shares of classes of the whole; guesses of numbers are not clamped to their bounds.

    Raises:
        ZooError: if the MLP did not converge in 1024 epochs; for features that are not finite, or too few shadows.
    """
    from sklearn.model_selection import train_test_split

    # half of the shadows is all that is fitted, so half must be enough
    _check_features(features[: len(features) // 2], targets)
    check_classes(shadows, 4)
    classes = shadows.secrets.numpy() if isinstance(shadows.secret, ClassSecret) else None
    half, _ = train_test_split(np.arange(len(features)), train_size=0.5, random_state=seed, stratify=classes)
    _check_features(features[half], targets)
    values = _values_by_mlp(shadows, features[half], targets, shadows.secrets.numpy()[half], seed)
    return _guesses(shadows, values) if classes is not None else Guesses(torch.from_numpy(values))


def check_classes(shadows: Shadows, fewest: int) -> None:
    """Refuse too few shadows of a class; secrets that are numbers always pass.

    Raises:
        ZooError: naming the class.
    """
    if not isinstance(shadows.secret, ClassSecret):
        return
    counts = shadows.secrets.bincount(minlength=len(shadows.secret.values))
    if int(counts.min()) < fewest:
        rare = shadows.secret.values[int(counts.argmin())]
        raise ZooError(f"{counts.min()} shadows have the secret {rare!r}: expected at least {fewest} of each class")


def _values_by_mlp(
    shadows: Shadows,
    inputs: Float64[np.ndarray, "S F"],
    target_inputs: Float64[np.ndarray, "T F"],
    truth: np.ndarray,
    seed: int,
) -> Float64[np.ndarray, "T V"]:
    """Predict a share for every class, or numbers."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    classes = len(shadows.secret.values) if isinstance(shadows.secret, ClassSecret) else 1
    options = {"hidden_layer_sizes": HIDDEN, "max_iter": MAX_EPOCHS, "early_stopping": True, "random_state": seed}
    # scikit-learn draws the validation part by class, so it must have room for every class
    options["validation_fraction"] = max(0.1, classes / len(inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        warnings.filterwarnings("error", INTERRUPTED)  # scikit-learn would go on with what it has
        try:
            if isinstance(shadows.secret, ClassSecret):
                classifier = MLPClassifier(**options).fit(inputs, truth)
                shares = np.zeros((len(target_inputs), classes))
                # by number, because a class may be missing from the part that was fitted
                shares[:, classifier.classes_] = classifier.predict_proba(target_inputs)
                return shares
            regressor = MLPRegressor(**options).fit(inputs, truth[:, 0] if truth.shape[1] == 1 else truth)
            return np.asarray(regressor.predict(target_inputs)).reshape(len(target_inputs), -1)
        except ConvergenceWarning:
            raise ZooError(
                f"the meta-classifier did not converge in {MAX_EPOCHS} epochs: give more shadows"
            ) from None
        except UserWarning as warning:
            if INTERRUPTED in str(warning):
                raise KeyboardInterrupt from None
            raise


def _centre(shadows: Shadows) -> tuple[np.ndarray, np.ndarray]:
    values = shadows.secrets.numpy()
    # the bound avoids a division by zero where all secrets are equal
    return values.mean(0), values.std(0).clip(1e-12)


def _as_numbers(shadows: Shadows) -> np.ndarray:
    if isinstance(shadows.secret, ClassSecret):
        return np.eye(len(shadows.secret.values))[shadows.secrets.numpy()]
    return np.asarray(shadows.secrets.numpy())


def _guesses(shadows: Shadows, values: Float64[np.ndarray, "T V"]) -> Guesses:
    """Turn a value for every class, or numbers, into guesses; numbers are clamped to their bounds."""
    predictions = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
    if isinstance(shadows.secret, ClassSecret):
        scores = predictions[:, 1] - predictions[:, 0] if predictions.shape[1] == 2 else None
        return Guesses(predictions.argmax(1), scores)
    return Guesses(clamped(shadows, predictions))


def clamped(shadows: Shadows, values: Float64[Tensor, "T V"]) -> Float64[Tensor, "T V"]:
    """Clamp numbers to the intervals of the secret."""
    assert not isinstance(shadows.secret, ClassSecret)
    bounds = torch.tensor(shadows.secret.bounds, dtype=torch.float64)
    return values.maximum(bounds[:, 0]).minimum(bounds[:, 1])
