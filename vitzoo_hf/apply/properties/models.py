"""Ridge regression along a path of penalties, chosen inside the training models; gradient-boosted trees beside it.

Pure functions of arrays. A class is predicted as scikit-learn's `RidgeClassifier` does: ridge on -1 and 1 for each
class, and the class whose value is largest.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from sklearn.model_selection import GroupKFold
from torch import Tensor

from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError

SHARES = tuple(10.0**power for power in range(-8, 2))
"""Penalties, as shares of the largest squared singular value of the training features."""
INNER_FOLDS = 4
TREE_SETTINGS: dict[str, Any] = {"max_iter": 100, "learning_rate": 0.1, "leaves": 15, "min_samples": 10}
TREES = ("lightgbm", "hist_gradient_boosting")
MODELS = ("ridge", *TREES)


def prepare(
    train: Float64[Tensor, "n F"], test: Float64[Tensor, "m F"], components: int | None
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "m k"]]:
    """Features centred and scaled by what the training rows say, and nothing else.

    Args:
        train: of the models that are learned from.
        test: of the others.
        components: None divides each column by its standard deviation (columns that are constant in training are
            dropped); else the scores of so many principal components of the training rows, not scaled.

    Example:
        >>> train, test = prepare(torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[3.0]]).double(), None)
        >>> train.flatten().tolist(), test.item()
        ([-1.0, 1.0], 2.0)
    """
    mean = train.mean(0)
    train, test = train - mean, test - mean
    if components is not None:
        axes = torch.linalg.svd(train, full_matrices=False).Vh[:components].mT
        return train @ axes, test @ axes
    scale = train.square().mean(0).sqrt()
    kept = scale > 1e-10 * mean.abs().clamp(min=1e-30)
    return train[:, kept] / scale[kept], test[:, kept] / scale[kept]


def ridge_path(
    train: Float64[Tensor, "n k"],
    targets: Float64[Tensor, "n T"],
    test: Float64[Tensor, "m k"],
    shares: Sequence[float] = SHARES,
) -> Float64[Tensor, "A m T"]:
    """Predictions of ridge regression with intercept, for every penalty and every target at once.

    From one singular value decomposition of the centred features, U S V^T: w = V S / (S² + alpha) U^T (y - mean).
    Hoerl and Kennard, "Ridge regression", 1970.

    Args:
        train: features of the training rows.
        targets: of the training rows, one a column.
        test: features of the rows to predict.
        shares: penalties alpha, as shares of the largest squared singular value.
    """
    mean, offset = train.mean(0), targets.mean(0)
    u, s, vh = torch.linalg.svd(train - mean, full_matrices=False)
    if not s.numel() or s[0] == 0:
        return offset.expand(len(shares), len(test), -1)
    alphas = s.new_tensor(list(shares))[:, None] * s[0] ** 2
    shrunk = (s / (s**2 + alphas))[..., None] * (u.mT @ (targets - offset))
    return offset + ((test - mean) @ vh.mT) @ shrunk


def ridge_predictions(
    train: Float64[Tensor, "n k"],
    targets: Float64[Tensor, "n T"],
    test: Float64[Tensor, "m k"],
    groups: Int64[np.ndarray, " n"],
    blocks: Int64[np.ndarray, " T"],
    shares: Sequence[float] = SHARES,
) -> Float64[Tensor, "m T"]:
    """Ridge whose penalty is chosen by cross-validation over groups of the training rows.

    Args:
        train: features of the training rows.
        targets: of the training rows.
        test: features of the rows to predict.
        groups: of the training rows; rows of a group are never on both sides.
        blocks: columns of one number share a penalty, that with the least squared error: the classes of one target.
        shares: penalties to choose from.

    Raises:
        ZooError: if all training rows are of one group.
    """
    if len(np.unique(groups)) < 2:
        raise ZooError(
            "ridge chooses its penalty over training runs, so at least three runs are needed, here two, "
            "or but one outside a lineage: give a zoo with more runs, or choose another model"
        )
    errors = torch.zeros(len(shares), int(blocks.max()) + 1, dtype=torch.float64, device=train.device)
    columns = torch.from_numpy(blocks).to(train.device)
    folds = GroupKFold(min(INNER_FOLDS, len(np.unique(groups))))
    for learned, held in folds.split(groups, groups=groups):
        found = ridge_path(train[learned], targets[learned], train[held], shares)
        errors.index_add_(1, columns, (found - targets[held]).square().sum(1))
    best = errors.argmin(0)[columns]
    path = ridge_path(train, targets, test, shares)
    return path.gather(0, best.expand(1, len(test), -1))[0]


def tree_predictions(
    train: Float64[np.ndarray, "n k"],
    target: Float64[np.ndarray, " n"],
    test: Float64[np.ndarray, "m k"],
    *,
    model: str,
    classes: bool,
    seed: int = 0,
) -> Float64[np.ndarray, " m"]:
    """Gradient-boosted trees with fixed settings (`TREE_SETTINGS`), which nothing is tuned on.

    Args:
        train: features of the training rows.
        target: of the training rows; numbers of classes where `classes`.
        test: features of the rows to predict.
        model: `lightgbm` (Ke et al., 2017) or scikit-learn's `hist_gradient_boosting`.
        classes: predict classes, not values.
        seed: of the trees.

    Raises:
        ZooError: for another model, or LightGBM where it is not installed.
    """
    check_model(model)
    if train.shape[1] == 0 or len(np.unique(target)) == 1:
        constant = np.bincount(target.astype(int)).argmax() if classes else target.mean()
        return np.full(len(test), float(constant))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*valid feature names")
        return np.asarray(_trees(model, classes, seed).fit(train, target).predict(test), dtype=np.float64)


def check_model(model: str) -> None:
    """Raise `ZooError` for a model that is unknown or not installed."""
    if model not in MODELS:
        raise ZooError(f"unknown model {model!r}: {did_you_mean(model, MODELS)}")
    if model == "lightgbm" and importlib.util.find_spec("lightgbm") is None:
        raise ZooError(
            "LightGBM is not installed: `pip install 'vitzoo-hf[properties]'`, or ask for hist_gradient_boosting"
        )


def _trees(model: str, classes: bool, seed: int) -> Any:
    shared = {"learning_rate": TREE_SETTINGS["learning_rate"], "random_state": seed}
    if model == "lightgbm":
        import lightgbm

        kind = lightgbm.LGBMClassifier if classes else lightgbm.LGBMRegressor
        exact = {"n_jobs": 1, "deterministic": True, "force_row_wise": True, "verbosity": -1}
        sizes = {"n_estimators": TREE_SETTINGS["max_iter"], "num_leaves": TREE_SETTINGS["leaves"]}
        return kind(**shared, **exact, **sizes, min_child_samples=TREE_SETTINGS["min_samples"])
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    sizes = {"max_iter": TREE_SETTINGS["max_iter"], "max_leaf_nodes": TREE_SETTINGS["leaves"]}
    return kind(**shared, **sizes, early_stopping=False, min_samples_leaf=TREE_SETTINGS["min_samples"])
