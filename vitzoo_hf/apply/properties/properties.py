"""Properties of models predicted from features: cross-validation over runs or lineages, controls, one long table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64, Int64
from sklearn.model_selection import GroupKFold

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
LARGEST_SEED = 2**32 - 1
_Batch = list[tuple[Target, Float64[np.ndarray, "S M"]]]


@dataclass(frozen=True)
class Plan:
    """How predictions are cross-validated.

    Attributes:
        repeats: of the cross-validation, with other folds.
        shuffles: shuffled labels a repeat, predicted in the same way; 0 for none.
        resamples: of the held-out groups, for the intervals.
        seed: of folds, shuffles, trees and intervals.
        device: of ridge; trees run on the CPU.
    """

    repeats: int = 3
    shuffles: int = 20
    resamples: int = 200
    seed: int = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.shuffles < 0 or self.resamples < 1:
            told = f"repeats is {self.repeats}, shuffles {self.shuffles} and resamples {self.resamples}"
            raise ZooError(f"{told}; expected at least 1, 0 and 1")
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
    """How well accuracy, generalisation gap, epoch and factors of unseen models are predicted.

    Grouped cross-validation, in five folds or one a group where there are fewer: `run` keeps the epochs of a run
    together, `lineage` all that descends from one pre-trained run. Standardisation, principal components and the
    penalty see training models only; the penalty is chosen in folds over their lineages, or runs where there is one
    lineage, for a split by lineage, over runs for one by run.

    Args:
        zoo: the models; those of its most common data set are used (`predicted_models`).
        targets: columns of the index; all that vary by default.
        features: names out of `FEATURES`, or `Features` of one's own, such as an embedding.
        models: `ridge`; `lightgbm` (an extra) or `hist_gradient_boosting`.
        splits: `run`, `lineage`.
        repeats: see `Plan`.
        shuffles: see `Plan`.
        resamples: see `Plan`.
        seed: of all of `Plan`, and of the probing images.
        device: of weights, probing and ridge; trees run on the CPU.
        num_workers: threads that read weights.
        progress: show bars.

    Returns:
        One row a target, features, model, split and metric: `value` with the ends of its 95 % interval, mean and 5th
        and 95th percentile of what shuffled labels give, the mean number of rows trained on, of rows predicted and of
        their groups. A class that one group alone has is left out of that split. `attrs["notes"]` says in
        sentences what was left out.

    Raises:
        ZooError: for names that are unknown, a zoo with one run or none, features that are not finite.

    Example:
        >>> found = predict_properties(Zoo.sample(), targets=["test_accuracy"], features=["norm"], splits=["run"])
        >>> list(found["metric"]), int(found["n_test"].iloc[0])
        (['r2', 'kendall_tau', 'mae'], 6)
    """
    plan = Plan(repeats, shuffles, resamples, seed, usable_device(device))
    _check(models, splits)
    chosen, table = predicted_models(zoo)
    wanted = targets_of(table, None if targets is None else list(targets))
    _splits_that_differ(table, splits)
    check_features(chosen, table, features, seed=seed)
    options: dict[str, Any] = {"device": device, "num_workers": num_workers, "progress": progress}
    given = [features_of(chosen, table, each, seed=seed, **options) for each in features]
    return cross_validated(table, wanted, given, plan, models=models, splits=splits, progress=progress)


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
    """What `predict_properties` gives, of any table of models.

    Args:
        table: columns `model_id`, `run_id`, `lineage`, `epoch`; the targets say which of its rows are theirs.
        targets: of `targets_of`.
        features: of all models of the targets.
        plan: how to cross-validate.
        models: see `predict_properties`.
        splits: see `predict_properties`.
        progress: show a bar.

    Raises:
        ZooError: for names that are unknown, or if no target is in two groups.
    """
    _check(models, splits)
    splits, notes = _splits_that_differ(table, splits)
    found: list[dict[str, Any]] = []
    jobs = [(split, each, model) for split in splits for each in features for model in models]
    with progress_bar("predicting", "fit", shown=progress, total=len(jobs)) as bar:
        for split, each, model in jobs:
            for target, rows in _evaluated(table, targets, each, model, split, plan):
                about: dict[str, Any] = {"target": target.name, "rows": target.rows, "features": each.name}
                about |= {"model": model, "split": split, "num_features": len(each.names)}
                found += [about | row for row in rows]
            bar.update()
    if not found:
        raise ZooError("no target is in two groups of any split: give a zoo with more runs or lineages")
    order = [target.name for target in targets]
    if plan.shuffles:
        notes += _without_control(table, targets)
    result = pd.DataFrame(found)[list(COLUMNS)]
    place = result["target"].map(order.index)
    result = result.iloc[np.lexsort([np.arange(len(result)), result["rows"], place])].reset_index(drop=True)
    result.attrs["notes"] = notes
    return result


def _splits_that_differ(table: pd.DataFrame, splits: Sequence[str]) -> tuple[list[str], list[str]]:
    """The splits without that by lineage where it equals that by run, and a note of it."""
    if "lineage" not in splits or not same_groups(table["run_id"], table["lineage"]):
        return list(splits), []
    told = "no two of these runs are of one lineage, as far as `parent_id` tells, so split lineage equals split run"
    if set(splits) == {"lineage"}:
        raise ZooError(f"{told}: ask for split run")
    return [split for split in splits if split != "lineage"], [f"{told} and is left out"]


def _without_control(table: pd.DataFrame, targets: Sequence[Target]) -> list[str]:
    """A note for each target whose values cannot go from run to run."""
    lacking = [f"{target.name} of {target.rows} rows" for target in targets if shuffled(target, table, 0) is None]
    why = "has no shuffled control: no two runs are kept at the same epochs"
    return [f"{name} {why}" for name in lacking]


def _check(models: Sequence[str], splits: Sequence[str]) -> None:
    for model in models:
        check_model(model)
    for split in splits:
        column_of(split)


def check_features(zoo: Zoo, table: pd.DataFrame, features: Sequence[str | Features], *, seed: int = 0) -> None:
    """Raise ZooError for features that cannot be had of these models, before any is taken."""
    for each in features:
        if isinstance(each, Features):
            each.of(list(table["model_id"]))
        elif each not in FEATURES:
            raise ZooError(f"unknown features {each!r}: {did_you_mean(each, FEATURES)}")
        else:
            _check_log(table, each)
    probing = [each for each in features if isinstance(each, str) and each in PROBES]
    if probing:
        try:
            probing_images(zoo, common_dataset(table), max(PROBES[each] for each in probing), seed)
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
    """The features of one name, of the models of `predicted_models`.

    `constant` has no column: it predicts the mean, or the class of most. `epoch` and `training_log` (epoch, loss and
    accuracy on training images) are what a log says without any weights.

    Raises:
        ZooError: for an unknown name, or a column of the log with nulls.
    """
    if isinstance(name, Features):
        return name
    if name in WEIGHT_FEATURES:
        options: dict[str, Any] = {"device": device, "num_workers": num_workers, "progress": progress}
        made: Features = WEIGHT_FEATURES[name](zoo, **options)
        return made
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
) -> Iterator[tuple[Target, list[dict[str, Any]]]]:
    """Scores of every target that the split can test and that is not itself the feature."""
    usable = [predictable(target, table, split) for target in targets]
    kept = [target for target in usable if target is not None and target.name not in features.names]
    by_rows: dict[bytes, list[Target]] = {}
    for target in kept:
        by_rows.setdefault(target.places.tobytes(), []).append(target)
    for members in by_rows.values():
        rows = table.iloc[members[0].places]
        groups = pd.factorize(rows[column_of(split)])[0].astype(np.int64)
        if len(set(groups)) < 2:
            continue
        values = features.of(list(rows["model_id"]))
        runs, size = pd.factorize(rows["run_id"])[0].astype(np.int64), []
        predicted = []
        for repeat in range(plan.repeats):
            batch = [(target, _labels(target, table, plan, repeat)) for target in members]
            made, trained = _held_out(values, batch, groups, runs, features.components, model, plan, repeat)
            predicted.append([*zip(batch, made, strict=True)])
            size.append(trained)
        for number, target in enumerate(members):
            repeats = [(batch[1], made) for (batch, made) in (each[number] for each in predicted)]
            yield target, _rows(target, repeats, groups, float(np.mean(size)), plan)


def _labels(target: Target, table: pd.DataFrame, plan: Plan, repeat: int) -> Float64[np.ndarray, "S M"]:
    """The true values, and below them shuffled ones; those of a target that cannot be shuffled alone."""
    fakes = [shuffled(target, table, [plan.seed, repeat, draw]) for draw in range(plan.shuffles)]
    return np.stack([target.values, *(fake for fake in fakes if fake is not None)])


def _held_out(
    values: Float64[np.ndarray, "M F"],
    batch: _Batch,
    groups: Int64[np.ndarray, " M"],
    runs: Int64[np.ndarray, " M"],
    components: int | None,
    model: str,
    plan: Plan,
    repeat: int,
) -> tuple[list[Float64[np.ndarray, "S M"]], float]:
    """Every label of every target predicted for each model while its group was held out; and rows trained on."""
    seed = int(np.random.default_rng([plan.seed, repeat]).integers(2**31))
    folds = GroupKFold(min(MOST_FOLDS, len(set(groups))), shuffle=True, random_state=seed)
    found = [np.empty_like(labels) for _, labels in batch]
    matrix, sizes = torch.from_numpy(values).to(usable_device(plan.device)), []
    for train, test in folds.split(values, groups=groups):
        known, unknown = prepare(matrix[train], matrix[test], components)
        inner = groups[train] if len(set(groups[train])) > 1 else runs[train]
        sizes.append(len(train))
        if model == "ridge":
            _ridge(known, unknown, batch, train, test, inner, found)
            continue
        for (target, labels), out in zip(batch, found, strict=True):
            for number, label in enumerate(labels):
                options: dict[str, Any] = {"model": model, "classes": bool(target.classes), "seed": plan.seed}
                out[number, test] = tree_predictions(
                    known.cpu().numpy(), label[train], unknown.cpu().numpy(), **options
                )
    return found, float(np.mean(sizes))


def _ridge(
    known: torch.Tensor,
    unknown: torch.Tensor,
    batch: _Batch,
    train: np.ndarray,
    test: np.ndarray,
    inner: Int64[np.ndarray, " n"],
    found: list[Float64[np.ndarray, "S M"]],
) -> None:
    """All labels of all targets at once, a column a number or class, written into `found`."""
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
    told = torch.from_numpy(np.concatenate(columns, 1)).to(known.device)
    made = ridge_predictions(known, told, unknown, inner, np.array(blocks, np.int64)).cpu().numpy()
    first = 0
    for (target, _), out in zip(batch, found, strict=True):
        width = max(1, len(target.classes))
        for number in range(len(out)):
            part = made[:, first : first + width]
            out[number, test] = part.argmax(1) if target.classes else part[:, 0]
            first += width


def _rows(
    target: Target,
    repeats: list[tuple[np.ndarray, np.ndarray]],
    groups: Int64[np.ndarray, " M"],
    trained: float,
    plan: Plan,
) -> list[dict[str, Any]]:
    """One row a metric, from the labels and predictions of each repeat."""
    classes = bool(target.classes)
    predicted = np.stack([made[0] for _, made in repeats])
    value = scores(target.values, predicted, classes=classes)
    options = {"resamples": plan.resamples, "seed": plan.seed}
    ends = intervals(target.values, predicted, groups, classes=classes, **options)
    null = [
        scores(fake, guess[None], classes=classes)
        for labels, made in repeats
        for fake, guess in zip(labels[1:], made[1:], strict=True)
    ]
    sizes = {"n_train": round(trained), "n_test": len(groups), "n_groups": len(set(groups))}
    return [
        {"metric": name, "value": value[name], "low": ends[name][0], "high": ends[name][1]}
        | _band([each[name] for each in null])
        | sizes
        for name in value
    ]


def _band(values: list[float]) -> dict[str, float]:
    low, high = np.percentile(values, [5, 95]) if values else (np.nan, np.nan)
    return {
        "shuffled": float(np.mean(values)) if values else np.nan,
        "shuffled_low": float(low),
        "shuffled_high": float(high),
    }
