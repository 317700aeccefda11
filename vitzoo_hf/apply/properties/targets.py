"""Targets of prediction, groups of models that must stay together, and shuffled targets.

Tables are of the config `index`. A lineage is a pre-trained run with all runs that descend from it. Pre-trained runs
that start from equal weights are of one lineage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int64

from vitzoo_hf.evaluation.evaluate import common_dataset, is_classifier
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.report.factors import run_of
from vitzoo_hf.zoo import Zoo

RESULTS = ("test_accuracy", "generalization_gap")
MOST_CLASSES = 20
SPLITS = ("run", "lineage")


@dataclass(frozen=True, eq=False)
class Target:
    """A property to predict, with its values for some models.

    Attributes:
        name: a column of the index.
        rows: `all` for all kept epochs, or `final` for final models.
        places: positions of the models in the table of models.
        values: one value a model: a number, or the number of a class.
        classes: names of the classes; empty for numbers.
    """

    name: str
    rows: str
    places: Int64[np.ndarray, " P"]
    values: Float64[np.ndarray, " P"]
    classes: tuple[str, ...] = ()


def predicted_models(zoo: Zoo) -> tuple[Zoo, pd.DataFrame]:
    """The classifiers of the dataset with most final models, and their table with a column `lineage`.

    Other models of the zoo, such as pre-trained models, have other test images and other classes.

    Raises:
        ZooError: if there is no such model.

    Example:
        >>> models, table = predicted_models(Zoo.sample())
        >>> len(models), sorted(set(table["lineage"]))
        (6, ['cl-s42', 'sl-s42'])
    """
    index = zoo.to_pandas()
    if index.empty:
        raise ZooError("there is no model to predict a property of: the filter matches none")
    dataset = common_dataset(index)
    # lineages of the unfiltered zoo: a filter may remove the parent that joins two runs
    every = zoo.unfiltered.to_pandas()
    index["lineage"] = index["run_id"].map(dict(zip(every["run_id"], lineages(every), strict=True)))
    rows = records(index.drop(columns="lineage"))
    classifies = [row["dataset"] == dataset and is_classifier(row, zoo.manifest) for row in rows]
    if not any(classifies):
        raise ZooError(f"no model of {dataset!r} classifies: nothing to predict")
    table = index[classifies].reset_index(drop=True)
    return zoo.filter(model_id=list(table["model_id"])), table


def lineages(index: pd.DataFrame) -> list[str]:
    """The run at the root of every row's ancestry; the walk ends at a run whose parent the table lacks.

    Roots with equal `weights_sha256` at epoch 0 are one lineage, named after the first of them.

    Example:
        >>> index = pd.DataFrame({"run_id": ["a", "b", "c"], "parent_id": [None, "a@9", "b@9"]})
        >>> lineages(index)
        ['a', 'a', 'a']

    Raises:
        ZooError: for a run that is an ancestor of itself.
    """
    parent = {
        run: run_of(parent_id)
        for run, parent_id in zip(index["run_id"], index["parent_id"], strict=True)
        if isinstance(parent_id, str)
    }
    roots = []
    for run in index["run_id"]:
        ancestry = [run]
        while ancestry[-1] in parent:
            ancestry.append(parent[ancestry[-1]])
            if ancestry[-1] in ancestry[:-1]:
                raise ZooError(f"run {run!r} descends from itself: column parent_id is damaged")
        roots.append(ancestry[-1])
    # the flat weights of one root's children reveal those of a root with equal initial weights
    twin = _first_of_equal_starts(index, set(roots))
    return [twin.get(root, root) for root in roots]


def _first_of_equal_starts(index: pd.DataFrame, roots: set[str]) -> dict[str, str]:
    """Root -> the first root with equal weights at epoch 0."""
    if not {"epoch", "weights_sha256"} <= set(index.columns):
        return {}
    starts = index[(index["epoch"] == 0) & index["run_id"].isin(roots) & index["weights_sha256"].notna()]
    # the first by order of the table, so the name of a lineage does not depend on a set
    first = starts.groupby("weights_sha256")["run_id"].first()
    return dict(zip(starts["run_id"], starts["weights_sha256"].map(first), strict=True))


def targets_of(table: pd.DataFrame, names: list[str] | None = None) -> list[Target]:
    """Targets of a table: accuracy and gap of all and of final models, epoch, and every factor that varies.

    Factors are predicted for final models, because no trunk depends on a factor before training. A factor with up to
    20 levels has classes; classes of fewer than two runs are dropped with their models. A number with more levels
    remains a number.

    Args:
        table: table of `predicted_models`.
        names: columns to predict; by default all that vary.

    Raises:
        ZooError: for an unknown column, one that does not vary, or if nothing varies.
    """
    factors = [str(column) for column in table if str(column).startswith("factor_")]
    columns = [*RESULTS, "epoch", *factors]
    for name in names or ():
        if name not in columns:
            raise ZooError(f"unknown target {name!r}: {did_you_mean(name, columns)}")
    final = table["is_final"].to_numpy(bool)
    everything = np.ones(len(table), dtype=bool)
    targets: list[Target] = []
    for name in names or columns:
        masks = {"final": final} if name in factors else {"all": everything, "final": final}
        of_column = [_target(table, name, rows, mask, name in factors) for rows, mask in masks.items()]
        if names and not any(of_column):
            raise ZooError(f"target {name!r} does not vary between two runs each of these models: leave it out")
        targets += [target for target in of_column if target is not None]
    if not targets:
        raise ZooError("nothing varies among these models: there is nothing to predict")
    if final.all():  # then `all` and `final` are the same rows
        return [target for target in targets if target.rows == "final"] or targets
    return targets


def _target(table: pd.DataFrame, name: str, rows: str, mask: np.ndarray, is_factor: bool) -> Target | None:
    """A target of the rows that have a value, or None where it does not vary."""
    mask = mask & table[name].notna().to_numpy()
    places = np.flatnonzero(mask)
    column = table[name].iloc[places]
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    if not is_factor or (numeric and column.nunique() > MOST_CLASSES):
        values = column.to_numpy(np.float64)
        return Target(name, rows, places, values) if len(set(values)) > 1 else None
    runs = table["run_id"].iloc[places].groupby(column.to_numpy()).nunique()
    classes = [level for level in runs.index if runs[level] > 1]
    if not 2 <= len(classes) <= MOST_CLASSES:
        return None
    usable = column.isin(classes).to_numpy()
    codes = column[usable].map({level: code for code, level in enumerate(classes)}).to_numpy(np.float64)
    return Target(name, rows, places[usable], codes, tuple(map(str, classes)))


def predictable(target: Target, table: pd.DataFrame, split: str) -> Target | None:
    """The target without classes that occur in only one group of the split; None for fewer than two other classes."""
    if not target.classes:
        return target
    groups = table[column_of(split)].iloc[target.places].to_numpy()
    # while its only group is held out, such a class is not in the training models
    shared = [code for code in range(len(target.classes)) if len(set(groups[target.values == code])) > 1]
    if len(shared) < 2:
        return None
    mask = np.isin(target.values, shared)
    codes = np.searchsorted(shared, target.values[mask]).astype(np.float64)
    return replace(
        target, places=target.places[mask], values=codes, classes=tuple(target.classes[code] for code in shared)
    )


def column_of(split: str) -> str:
    """The column of the groups that a split does not divide.

    Raises:
        ZooError: if the split is neither `run` nor `lineage`.
    """
    if split not in SPLITS:
        raise ZooError(f"unknown split {split!r}: {did_you_mean(split, SPLITS)}")
    return "run_id" if split == "run" else "lineage"


def shuffled(target: Target, table: pd.DataFrame, seed: int | Sequence[int]) -> Float64[np.ndarray, " P"] | None:
    """Permute the values of a target between models, as a control that preserves dependence on group and epoch.

    - Values that are constant within lineages are permuted between lineages.
    - Values that are constant within runs are permuted between runs.
    - Values that change equally in all runs, such as the epoch, are permuted within every run.
    - Other values move from run to run, epoch by epoch, among runs with equal kept epochs: a shuffled accuracy still
      grows with the epoch.

    Returns:
        The permuted values; None if values have to move between runs, and no two runs have equal kept epochs.
    """
    random = np.random.default_rng(seed)
    rows = table.iloc[target.places]
    values = pd.Series(target.values)
    for column in ("lineage", "run_id"):
        unit = rows[column].reset_index(drop=True)
        if (values.groupby(unit).nunique() == 1).all():
            first = values.groupby(unit).first()
            return unit.map(dict(zip(first.index, random.permutation(first), strict=True))).to_numpy(np.float64)
    frame = pd.DataFrame(
        {"run": rows["run_id"].to_numpy(), "epoch": rows["epoch"].to_numpy(), "value": target.values}
    )
    shared = frame.groupby("epoch")["run"].nunique().max() > 1
    if target.name == "epoch" or (shared and (frame.groupby("epoch")["value"].nunique() == 1).all()):
        return frame.groupby("run")["value"].transform(random.permutation).to_numpy(np.float64)
    # runs with other epochs have no partner at each epoch, so values move within equal lists alone
    frame["kept"] = frame.groupby("run")["epoch"].transform(lambda epochs: str(sorted(epochs)))
    if (frame.groupby("kept")["run"].nunique() == 1).all():
        return None
    # a copy, because values are read from the frame while others are written
    values_after = frame["value"].to_numpy(copy=True)
    for _, group in frame.groupby("kept"):
        by_run = group.sort_values("epoch").groupby("run").indices
        ordered = np.stack([group.sort_values("epoch").index.to_numpy()[places] for places in by_run.values()])
        values_after[ordered] = frame["value"].to_numpy()[random.permutation(ordered)]
    return values_after
