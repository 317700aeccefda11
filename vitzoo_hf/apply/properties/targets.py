"""What is predicted of models, which models must stay together, and labels shuffled between those.

Tables of the config `index`. A lineage is a pre-trained run with all that was fine-tuned from it, however indirectly;
pre-trained runs that start from the same weights are of one lineage.
"""

from dataclasses import dataclass, replace
from typing import Any

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
    """What is to be predicted of some models.

    Attributes:
        name: a column of the index.
        rows: `all` kept epochs, or `final` models.
        places: of these models in the table of models.
        values: one a model: numbers, or numbers of classes.
        classes: names of the classes; empty for numbers.
    """

    name: str
    rows: str
    places: Int64[np.ndarray, " M"]
    values: Float64[np.ndarray, " M"]
    classes: tuple[str, ...] = ()


def predicted_models(zoo: Zoo) -> tuple[Zoo, pd.DataFrame]:
    """The classifiers of the data set of most final models, and their table with a column `lineage`.

    Other models of the zoo, such as the pre-trained, were tested on other images, and their heads answer with other
    classes.

    Raises:
        ZooError: if there is none.

    Example:
        >>> models, table = predicted_models(Zoo.sample())
        >>> len(models), sorted(set(table["lineage"]))
        (6, ['cl-s42', 'sl-s42'])
    """
    index = zoo.to_pandas()
    if index.empty:
        raise ZooError("there is no model to predict anything of: the filter matches none")
    dataset = common_dataset(index)
    whole = zoo.unfiltered.to_pandas()
    index["lineage"] = index["run_id"].map(dict(zip(whole["run_id"], lineages(whole), strict=True)))
    rows = records(index.drop(columns="lineage"))
    chosen = [row["dataset"] == dataset and is_classifier(row, zoo.manifest) for row in rows]
    if not any(chosen):
        raise ZooError(f"no model of {dataset!r} classifies: nothing to predict")
    table = index[chosen].reset_index(drop=True)
    return zoo.filter(model_id=list(table["model_id"])), table


def lineages(index: pd.DataFrame) -> list[str]:
    """The run at the root of each row's ancestry; a parent that the table lacks ends the walk.

    Roots of equal initial weights, of equal `weights_sha256` at epoch 0 where the table has that column and those
    rows, are one lineage, by the name of the first: flat weights of the children of one tell those of the other.

    Example:
        >>> index = pd.DataFrame({"run_id": ["a", "b", "c"], "parent_id": [None, "a@9", "b@9"]})
        >>> lineages(index)
        ['a', 'a', 'a']

    Raises:
        ZooError: for a run that is its own ancestor.
    """
    parent = {
        run: run_of(parent_id)
        for run, parent_id in zip(index["run_id"], index["parent_id"], strict=True)
        if isinstance(parent_id, str)
    }
    roots = []
    for run in index["run_id"]:
        seen = [run]
        while seen[-1] in parent:
            seen.append(parent[seen[-1]])
            if seen[-1] in seen[:-1]:
                raise ZooError(f"run {run!r} descends from itself: column parent_id is damaged")
        roots.append(seen[-1])
    twin = _first_of_equal_starts(index, set(roots))
    return [twin.get(root, root) for root in roots]


def _first_of_equal_starts(index: pd.DataFrame, roots: set[str]) -> dict[str, str]:
    """Root -> the first root with the same weights at epoch 0."""
    if not {"epoch", "weights_sha256"} <= set(index.columns):
        return {}
    starts = index[(index["epoch"] == 0) & index["run_id"].isin(roots) & index["weights_sha256"].notna()]
    first = starts.groupby("weights_sha256")["run_id"].first()
    return dict(zip(starts["run_id"], starts["weights_sha256"].map(first), strict=True))


def targets_of(table: pd.DataFrame, names: list[str] | None = None) -> list[Target]:
    """What can be predicted: accuracy and gap of all rows and of final ones, epoch, and each factor that varies.

    Factors are predicted of final models: before training no trunk shows any. A factor of up to 20 levels makes
    classes, of which those of fewer than two runs are dropped with their models; a number of more levels stays one.

    Args:
        table: of `predicted_models`.
        names: columns; all that vary by default.

    Raises:
        ZooError: for an unknown column, one that does not vary, or if nothing varies.
    """
    factors = [str(column) for column in table if str(column).startswith("factor_")]
    known = [*RESULTS, "epoch", *factors]
    for name in names or ():
        if name not in known:
            raise ZooError(f"unknown target {name!r}: {did_you_mean(name, known)}")
    final = table["is_final"].to_numpy(bool)
    everything = np.ones(len(table), dtype=bool)
    found: list[Target] = []
    for name in names or known:
        wanted = {"final": final} if name in factors else {"all": everything, "final": final}
        made = [_target(table, name, rows, mask, name in factors) for rows, mask in wanted.items()]
        if names and not any(made):
            raise ZooError(f"target {name!r} does not vary between two runs each of these models: leave it out")
        found += [target for target in made if target is not None]
    if not found:
        raise ZooError("nothing varies among these models: there is nothing to predict")
    if final.all():
        return [target for target in found if target.rows == "final"] or found
    return found


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
    kept = column.isin(classes).to_numpy()
    codes = column[kept].map({level: code for code, level in enumerate(classes)}).to_numpy(np.float64)
    return Target(name, rows, places[kept], codes, tuple(map(str, classes)))


def predictable(target: Target, table: pd.DataFrame, split: str) -> Target | None:
    """The target without classes that only one group of the split has, and which no split could learn elsewhere."""
    if not target.classes:
        return target
    groups = table[column_of(split)].iloc[target.places].to_numpy()
    kept = [code for code in range(len(target.classes)) if len(set(groups[target.values == code])) > 1]
    if len(kept) < 2:
        return None
    mask = np.isin(target.values, kept)
    codes = np.searchsorted(kept, target.values[mask]).astype(np.float64)
    return replace(
        target, places=target.places[mask], values=codes, classes=tuple(target.classes[code] for code in kept)
    )


def column_of(split: str) -> str:
    """The column of the groups that a split keeps together.

    Raises:
        ZooError: for another split than `run` and `lineage`.
    """
    if split not in SPLITS:
        raise ZooError(f"unknown split {split!r}: {did_you_mean(split, SPLITS)}")
    return "run_id" if split == "run" else "lineage"


def shuffled(target: Target, table: pd.DataFrame, seed: Any) -> Float64[np.ndarray, " M"] | None:
    """The target's values given to other models: a control that keeps what no prediction should profit from.

    What is the same in a whole lineage is permuted between lineages, what is the same in a run between runs. What
    changes within runs goes from run to run, epoch by epoch, among runs kept at the same epochs: a shuffled accuracy
    still grows with the epoch. What changes alike in all runs, as the epoch itself, is permuted within each run. None
    where values would go between runs, and no two runs are kept at the same epochs.
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
    frame["kept"] = frame.groupby("run")["epoch"].transform(lambda epochs: str(sorted(epochs)))
    if (frame.groupby("kept")["run"].nunique() == 1).all():
        return None
    found = frame["value"].to_numpy(copy=True)
    for _, alike in frame.groupby("kept"):
        by_run = alike.sort_values("epoch").groupby("run").indices
        ordered = np.stack([alike.sort_values("epoch").index.to_numpy()[places] for places in by_run.values()])
        found[ordered] = frame["value"].to_numpy()[random.permutation(ordered)]
    return found
