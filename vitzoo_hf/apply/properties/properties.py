"""Predict properties of models from features: cross-validation over runs or lineages, controls, one long table.

Every target is fitted once a fold and repeat, and its shuffled labels as often again: ridge fits all of them from one
decomposition, trees one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64, Int64
from sklearn.model_selection import GroupKFold

from vitzoo_hf.apply.intervals import percentile_interval
from vitzoo_hf.apply.properties.features import WEIGHT_FEATURES, Features, table_features
from vitzoo_hf.apply.properties.metrics import intervals, scores
from vitzoo_hf.apply.properties.models import check_model, prepare, ridge_predictions, tree_predictions
from vitzoo_hf.apply.properties.probing import measured_features, probing_features, probing_images
from vitzoo_hf.apply.properties.targets import (
    SPLITS,
    Target,
    column_of,
    predictable,
    predicted_models,
    shuffled,
    targets_of,
)
from vitzoo_hf.evaluation.evaluate import common_dataset
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.report.factors import same_groups
from vitzoo_hf.zoo import Zoo

PROBES = {"probing_16": 16, "probing_64": 64, "measured_64": 64}
LOG = {"epoch": ("epoch",), "training_log": ("epoch", "train_loss", "train_accuracy")}
FEATURES = ("constant", "epoch", "training_log", *WEIGHT_FEATURES, *PROBES)
ABOUT = ("target", "rows", "features", "num_features", "model", "split", "metric")
MEASURED = ("value", "low", "high", "shuffled", "shuffled_low", "shuffled_high", "n_train", "n_test", "n_groups")
COLUMNS = (*ABOUT, *MEASURED)
MOST_FOLDS = 5
# scikit-learn takes no larger random_state
LARGEST_SEED = 2**32 - 1
_Batch = list[tuple[Target, Float64[np.ndarray, "S P"]]]
"""Targets with their labels: true ones in the first row, shuffled ones below."""
_Repeat = tuple[Float64[np.ndarray, "S P"], Float64[np.ndarray, "S P"]]
"""The labels of a target and their predictions in one repeat of the cross-validation."""


@dataclass(frozen=True)
class Plan:
    """Settings of cross-validation.

    Attributes:
        repeats: number of cross-validations, each with new folds.
        shuffles: number of shuffled labels a repeat, predicted like the true ones; 0 for none.
        resamples: how many times held-out groups are resampled, for the intervals.
        seed: seed of folds, shuffles, trees and intervals.
        device: where ridge runs; trees run on the CPU.
    """

    repeats: int = 3
    shuffles: int = 20
    resamples: int = 200
    seed: int = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.shuffles < 0 or self.resamples < 1:
            settings = f"repeats is {self.repeats}, shuffles {self.shuffles} and resamples {self.resamples}"
            raise ZooError(f"{settings}; expected at least 1, 0 and 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ZooError(f"seed is {self.seed}; expected a whole number from 0 to {LARGEST_SEED}")


def predict_properties(
    zoo: Zoo,
    *,
    targets: Sequence[str] | None = None,
    features: Sequence[str | Features] = FEATURES,
    models: Sequence[str] = ("ridge",),
    splits: Sequence[str] = SPLITS,
    repeats: int = 3,
    shuffles: int = 20,
    resamples: int = 200,
    seed: int = 0,
    device: str | torch.device = "cpu",
    num_workers: int = 1,
    progress: bool = False,
) -> pd.DataFrame:
    """Predict accuracy, generalisation gap, epoch and factors of unseen models, and score the predictions.

    Cross-validation is grouped: `run` does not divide the epochs of a run, `lineage` not the descendants of a
    pre-trained run. There are five folds, or one a group if groups are fewer. Standardisation, principal components
    and the penalty depend on training models alone. The penalty is selected in folds over the groups of the split, or
    over runs if the training models have one lineage.

    Args:
        zoo: the models; `predicted_models` selects those of the most common dataset.
        targets: columns of the index; by default all that vary.
        features: names out of `FEATURES`, or `Features` such as an embedding.
        models: some of `ridge`, `lightgbm` (an extra) and `hist_gradient_boosting`.
        splits: some of `run` and `lineage`.
        repeats: see `Plan`.
        shuffles: see `Plan`.
        resamples: see `Plan`.
        seed: seed of `Plan` and of the probing images.
        device: where weights, probing and ridge are computed; trees run on the CPU.
        num_workers: number of threads that read weights.
        progress: show bars.

    Returns:
        One row a target, features, model, split and metric: `value` with the ends of its 95 % interval; mean, 5th and
        95th percentile for shuffled labels; the numbers of training rows (mean), predicted rows and their groups. A
        class that occurs in one group alone is left out of that split. `attrs["notes"]` lists in sentences what was
        left out.

    Raises:
        ZooError: for an unknown name, a zoo with fewer than two runs, or features that are not finite.

    Example:
        >>> table = predict_properties(Zoo.sample(), targets=["test_accuracy"], features=["norm"], splits=["run"])
        >>> list(table["metric"]), int(table["n_test"].iloc[0])
        (['r2', 'kendall_tau', 'mae'], 6)
    """
    plan = Plan(repeats, shuffles, resamples, seed, usable_device(device))
    _check(models, splits)
    classifiers, table = predicted_models(zoo)
    properties = targets_of(table, None if targets is None else list(targets))
    # refuse first: features read all weights
    _splits_that_differ(table, splits)
    check_features(classifiers, table, features, seed=seed)
    take = partial(features_of, seed=seed, device=device, num_workers=num_workers, progress=progress)
    matrices = [take(classifiers, table, name) for name in features]
    return cross_validated(table, properties, matrices, plan, models=models, splits=splits, progress=progress)


def cross_validated(
    table: pd.DataFrame,
    targets: Sequence[Target],
    features: Sequence[Features],
    plan: Plan,
    *,
    models: Sequence[str] = ("ridge",),
    splits: Sequence[str] = SPLITS,
    progress: bool = False,
) -> pd.DataFrame:
    """The table of `predict_properties` for any table of models.

    Args:
        table: table with the columns `model_id`, `run_id`, `lineage` and `epoch`, in which targets have places.
        targets: result of `targets_of`.
        features: features of all models of the targets.
        plan: settings of cross-validation.
        models: see `predict_properties`.
        splits: see `predict_properties`.
        progress: show a bar.

    Raises:
        ZooError: for an unknown name, or if no target occurs in two groups.
    """
    _check(models, splits)
    splits, notes = _splits_that_differ(table, splits)
    lines: list[dict[str, str | float]] = []
    jobs = [(split, matrix, model) for split in splits for matrix in features for model in models]
    with progress_bar("predicting", "fit", shown=progress, total=len(jobs)) as bar:
        for split, matrix, model in jobs:
            for target, rows in _evaluated(table, targets, matrix, model, split, plan):
                job = {"target": target.name, "rows": target.rows, "features": matrix.name, "model": model}
                lines += [{**job, "split": split, "num_features": len(matrix.names), **row} for row in rows]
            bar.update()
    if not lines:
        raise ZooError("no target is in two groups of any split: give a zoo with more runs or lineages")
    order = [target.name for target in targets]
    if plan.shuffles:
        notes += _without_control(table, targets)
    result = pd.DataFrame(lines)[list(COLUMNS)]
    place = result["target"].map(order.index)
    result = result.iloc[np.lexsort([np.arange(len(result)), result["rows"], place])].reset_index(drop=True)
    result.attrs["notes"] = notes
    return result


def _splits_that_differ(table: pd.DataFrame, splits: Sequence[str]) -> tuple[list[str], list[str]]:
    """The splits, without the split by lineage where it equals the split by run, and a note on that."""
    if "lineage" not in splits or not same_groups(table["run_id"], table["lineage"]):
        return list(splits), []
    reason = "no two of these runs are of one lineage, as far as `parent_id` tells, so split lineage equals split run"
    if set(splits) == {"lineage"}:
        raise ZooError(f"{reason}: ask for split run")
    return [split for split in splits if split != "lineage"], [f"{reason} and is left out"]


def _without_control(table: pd.DataFrame, targets: Sequence[Target]) -> list[str]:
    """A note for every target whose values cannot move between runs."""
    lacking = [f"{target.name} of {target.rows} rows" for target in targets if shuffled(target, table, 0) is None]
    why = "has no shuffled control: no two runs are kept at the same epochs"
    return [f"{name} {why}" for name in lacking]


def _check(models: Sequence[str], splits: Sequence[str]) -> None:
    for model in models:
        check_model(model)
    for split in splits:
        column_of(split)


def check_features(zoo: Zoo, table: pd.DataFrame, features: Sequence[str | Features], *, seed: int = 0) -> None:
    """Raise ZooError for features that these models cannot have, before any is computed."""
    for item in features:
        if isinstance(item, Features):
            item.of(list(table["model_id"]))
        elif item not in FEATURES:
            raise ZooError(f"unknown features {item!r}: {did_you_mean(item, FEATURES)}")
        else:
            _check_log(table, item)
    probing = [name for name in features if isinstance(name, str) and name in PROBES]
    if probing:
        try:
            probing_images(zoo, common_dataset(table), max(PROBES[name] for name in probing), seed)
        except ZooError as error:
            raise ZooError(f"{error}: leave out features {', '.join(probing)}, which need them") from None


def _check_log(table: pd.DataFrame, name: str) -> None:
    for column in LOG.get(name, ()):
        if table[column].isna().any():
            raise ZooError(f"column {column!r} has no value for some models: leave features {name!r} out")


def features_of(
    zoo: Zoo,
    table: pd.DataFrame,
    name: str | Features,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    num_workers: int = 1,
    progress: bool = False,
) -> Features:
    """Compute the features of a name for the models of `predicted_models`.

    `constant` has no column and predicts the mean, or the most frequent class. `epoch` and `training_log` (epoch,
    loss and accuracy on training images) come from a training log, without any weights.

    Raises:
        ZooError: for an unknown name, or a column of the log with nulls.
    """
    if isinstance(name, Features):
        return name
    if name in WEIGHT_FEATURES:
        return WEIGHT_FEATURES[name](zoo, device=device, num_workers=num_workers, progress=progress)
    if name in PROBES:
        make = probing_features if name.startswith("probing") else measured_features
        dataset = common_dataset(table)
        return make(zoo, dataset, num_images=PROBES[name], seed=seed, device=device, progress=progress)
    if name == "constant":
        return table_features(name, table.set_index("model_id")[[]])
    if name in LOG:
        _check_log(table, name)
        return table_features(name, table.set_index("model_id")[list(LOG[name])].astype(float))
    raise ZooError(f"unknown features {name!r}: {did_you_mean(name, FEATURES)}")


def _evaluated(
    table: pd.DataFrame, targets: Sequence[Target], features: Features, model: str, split: str, plan: Plan
) -> Iterator[tuple[Target, list[dict[str, str | float]]]]:
    """Scores of every target that the split can test and that is not itself the feature."""
    usable = [predictable(target, table, split) for target in targets]
    by_rows: dict[bytes, list[Target]] = {}  # targets of equal rows share the folds, and ridge the decomposition
    for target in usable:
        if target is None or target.name in features.names:
            continue
        by_rows.setdefault(target.places.tobytes(), []).append(target)
    for members in by_rows.values():
        rows = table.iloc[members[0].places]
        groups = pd.factorize(rows[column_of(split)])[0].astype(np.int64)
        if len(set(groups)) < 2:
            continue
        values = features.of(list(rows["model_id"]))
        runs, sizes = pd.factorize(rows["run_id"])[0].astype(np.int64), []
        repeats_of: list[list[_Repeat]] = [[] for _ in members]
        for repeat in range(plan.repeats):
            batch = [(target, _labels(target, table, plan, repeat)) for target in members]
            outputs, size = _held_out(values, batch, groups, runs, features.components, model, plan, repeat)
            sizes.append(size)
            for repeats, (_, labels), output in zip(repeats_of, batch, outputs, strict=True):
                repeats.append((labels, output))
        for target, repeats in zip(members, repeats_of, strict=True):
            yield target, _rows(target, repeats, groups, float(np.mean(sizes)), plan)


def _labels(target: Target, table: pd.DataFrame, plan: Plan, repeat: int) -> Float64[np.ndarray, "S P"]:
    """The true values, and below them shuffled ones where the target can be shuffled."""
    # one seed a draw, so that more shuffles do not change the earlier ones
    fakes = [shuffled(target, table, [plan.seed, repeat, draw]) for draw in range(plan.shuffles)]
    return np.stack([target.values, *(fake for fake in fakes if fake is not None)])


def _held_out(
    values: Float64[np.ndarray, "P F"],
    batch: _Batch,
    groups: Int64[np.ndarray, " P"],
    runs: Int64[np.ndarray, " P"],
    components: int | None,
    model: str,
    plan: Plan,
    repeat: int,
) -> tuple[list[Float64[np.ndarray, "S P"]], float]:
    """Predictions of all labels of all targets while a model's group was held out; and the mean training size."""
    # seed and repeat as one entropy: seed 0 repeat 1 must not equal seed 1 repeat 0
    seed = int(np.random.default_rng([plan.seed, repeat]).integers(2**31))
    folds = GroupKFold(min(MOST_FOLDS, len(set(groups))), shuffle=True, random_state=seed)
    outputs = [np.empty_like(labels) for _, labels in batch]
    matrix, sizes = torch.from_numpy(values).to(usable_device(plan.device)), []
    for train, test in folds.split(values, groups=groups):
        learned, unseen = prepare(matrix[train], matrix[test], components)
        # with one group the penalty could not be cross-validated
        inner = groups[train] if len(set(groups[train])) > 1 else runs[train]
        sizes.append(len(train))
        if model == "ridge":
            _ridge(learned, unseen, batch, train, test, inner, outputs)
            continue
        ends = learned.cpu().numpy(), unseen.cpu().numpy()
        for (target, labels), output in zip(batch, outputs, strict=True):
            fit = partial(tree_predictions, model=model, classes=bool(target.classes), seed=plan.seed)
            for number, label in enumerate(labels):
                output[number, test] = fit(ends[0], label[train], ends[1])
    return outputs, float(np.mean(sizes))


def _ridge(
    learned: torch.Tensor,
    unseen: torch.Tensor,
    batch: _Batch,
    train: np.ndarray,
    test: np.ndarray,
    inner: Int64[np.ndarray, " n"],
    outputs: list[Float64[np.ndarray, "S P"]],
) -> None:
    """Predict all labels of all targets at once, a column a number or class, and write them into `outputs`."""
    columns, blocks = [], []
    for target, labels in batch:
        for label in labels:
            wide = (
                2 * np.eye(len(target.classes))[label[train].astype(int)] - 1
                if target.classes
                else label[train, None]
            )
            columns.append(wide)
            blocks += [len(columns) - 1] * wide.shape[1]
    labelled = torch.from_numpy(np.concatenate(columns, 1)).to(learned.device)
    predicted = ridge_predictions(learned, labelled, unseen, inner, np.array(blocks, np.int64)).cpu().numpy()
    first = 0
    for (target, _), output in zip(batch, outputs, strict=True):
        width = max(1, len(target.classes))
        for number in range(len(output)):
            part = predicted[:, first : first + width]
            output[number, test] = part.argmax(1) if target.classes else part[:, 0]
            first += width


def _rows(
    target: Target,
    repeats: list[_Repeat],
    groups: Int64[np.ndarray, " P"],
    trained: float,
    plan: Plan,
) -> list[dict[str, str | float]]:
    """One row a metric, from the labels and predictions of every repeat."""
    classes = bool(target.classes)
    predicted = np.stack([output[0] for _, output in repeats])
    value = scores(target.values, predicted, classes=classes)
    ends = intervals(target.values, predicted, groups, classes=classes, resamples=plan.resamples, seed=plan.seed)
    null = [
        scores(fake, guess[None], classes=classes)
        for labels, output in repeats
        for fake, guess in zip(labels[1:], output[1:], strict=True)
    ]
    sizes = {"n_train": round(trained), "n_test": len(groups), "n_groups": len(set(groups))}
    return [
        {
            "metric": name,
            "value": value[name],
            "low": ends[name][0],
            "high": ends[name][1],
            **_band([line[name] for line in null]),
            **sizes,
        }
        for name in value
    ]


def _band(values: list[float]) -> dict[str, float]:
    low, high = percentile_interval(values, tail=0.05) if values else (np.nan, np.nan)
    return {"shuffled": float(np.mean(values)) if values else np.nan, "shuffled_low": low, "shuffled_high": high}
