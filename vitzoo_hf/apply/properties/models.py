"""Ridge regression with a cross-validated penalty, and gradient-boosted trees.

Pure functions of arrays. Ridge predicts a class like scikit-learn's `RidgeClassifier`: it regresses on -1 and 1 for
every class, and the largest value decides. Ridge costs one singular value decomposition a fold, for all targets.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Protocol, TypedDict, runtime_checkable

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


class TreeSettings(TypedDict):
    """Settings of gradient-boosted trees, by names that neither library owns."""

    max_iter: int
    learning_rate: float
    leaves: int
    min_samples: int


TREE_SETTINGS: TreeSettings = {"max_iter": 100, "learning_rate": 0.1, "leaves": 15, "min_samples": 10}
TREES = ("lightgbm", "hist_gradient_boosting")
MODELS = ("ridge", *TREES)


def prepare(
    train: Float64[Tensor, "n F"], test: Float64[Tensor, "m F"], components: int | None
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "m k"]]:
    """Centre and scale features by statistics of the training rows alone.

    Args:
        train: features of the training models.
        test: features of the test models.
        components: number of principal components of the training rows, whose scores are not scaled. None divides
            every column by its standard deviation instead, and drops columns that are constant in training.

    Example:
        >>> train, test = prepare(torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[3.0]]).double(), None)
        >>> train.flatten().tolist(), test.item()
        ([-1.0, 1.0], 2.0)
    """
    mean = train.mean(0)
    train, test = train - mean, test - mean
    if components is not None:
        # axes of the training rows alone: test rows must not shape their features
        axes = torch.linalg.svd(train, full_matrices=False).Vh[:components].mT
        return train @ axes, test @ axes
    scale = train.square().mean(0).sqrt()
    varying = scale > 1e-10 * mean.abs().clamp(min=1e-30)  # below, a column is constant to rounding
    return train[:, varying] / scale[varying], test[:, varying] / scale[varying]


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
        targets: targets of the training rows, one a column.
        test: features of the rows to predict.
        shares: penalties alpha, as shares of the largest squared singular value.
    """
    mean, offset = train.mean(0), targets.mean(0)
    u, s, vh = torch.linalg.svd(train - mean, full_matrices=False)
    if not s.numel() or s[0] == 0:  # no feature, or constant ones: the intercept alone
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
    """Ridge whose penalty is selected by cross-validation over groups of the training rows.

    Args:
        train: features of the training rows.
        targets: targets of the training rows, one a column.
        test: features of the rows to predict.
        groups: group of every training row; a fold has all rows of a group or none.
        blocks: number of the target of every column; columns of one target share the penalty of least squared error.
        shares: penalties to select from.

    Raises:
        ZooError: if all training rows belong to one group.
    """
    if len(np.unique(groups)) < 2:
        raise ZooError(
            "ridge selects its penalty over training runs, so at least three runs are needed, here two, "
            "or but one outside a lineage: give a zoo with more runs, or take another model"
        )
    # errors are summed over folds before the minimum, so small folds do not decide alone
    errors = torch.zeros(len(shares), int(blocks.max()) + 1, dtype=torch.float64, device=train.device)
    columns = torch.from_numpy(blocks).to(train.device)
    folds = GroupKFold(min(INNER_FOLDS, len(np.unique(groups))))
    for inner, validation in folds.split(groups, groups=groups):
        predicted = ridge_path(train[inner], targets[inner], train[validation], shares)
        errors.index_add_(1, columns, (predicted - targets[validation]).square().sum(1))
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
    """Predictions of gradient-boosted trees with the fixed settings `TREE_SETTINGS`.

    Args:
        train: features of the training rows.
        target: target of the training rows; numbers of classes where `classes`.
        test: features of the rows to predict.
        model: `lightgbm` (Ke et al., 2017) or scikit-learn's `hist_gradient_boosting`.
        classes: predict classes rather than values.
        seed: seed of the trees.

    Raises:
        ZooError: for an unknown model, or LightGBM where it is not installed.
    """
    check_model(model)
    if train.shape[1] == 0 or len(np.unique(target)) == 1:
        # trees need a column to split, and two different values
        constant = np.bincount(target.astype(int)).argmax() if classes else target.mean()
        return np.full(len(test), float(constant))
    with warnings.catch_warnings():  # LightGBM names columns in `fit` and misses the names in `predict`
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


@runtime_checkable  # for checks of annotations at run time
class _Trees(Protocol):
    """The part of scikit-learn's interface of models that is used here."""

    def fit(self, train: np.ndarray, target: np.ndarray) -> "_Trees": ...

    def predict(self, test: np.ndarray) -> np.ndarray: ...


def _trees(model: str, classes: bool, seed: int) -> _Trees:
    shared = {"learning_rate": TREE_SETTINGS["learning_rate"], "random_state": seed}
    if model == "lightgbm":
        # imported late: LightGBM is an extra, which most installations lack
        import lightgbm

        kind = lightgbm.LGBMClassifier if classes else lightgbm.LGBMRegressor
        # one thread and rows in order: equal seeds give equal trees on every machine
        exact = {"n_jobs": 1, "deterministic": True, "force_row_wise": True, "verbosity": -1}
        sizes = {"n_estimators": TREE_SETTINGS["max_iter"], "num_leaves": TREE_SETTINGS["leaves"]}
        return kind(**shared, **exact, **sizes, min_child_samples=TREE_SETTINGS["min_samples"])
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    sizes = {"max_iter": TREE_SETTINGS["max_iter"], "max_leaf_nodes": TREE_SETTINGS["leaves"]}
    # no early stopping, so that both libraries grow the number of trees in TREE_SETTINGS
    return kind(**shared, **sizes, early_stopping=False, min_samples_leaf=TREE_SETTINGS["min_samples"])
