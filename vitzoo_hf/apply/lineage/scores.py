"""How right a recovered forest is, and how right chance would be, by the same scorer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int64
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from vitzoo_hf.apply.lineage.trees import renumbered
from vitzoo_hf.format import schema
from vitzoo_hf.report.factors import run_of

DRAWS = 400
SCORES = (
    "tree_accuracy",
    "adjusted_rand",
    "edge_precision",
    "edge_recall",
    "direction_accuracy",
    "root_accuracy",
)


@dataclass(frozen=True)
class Truth:
    """The true forest of P models.

    Attributes:
        tree: number of the tree of each model.
        parent: position of its parent; -1 where it has none, or its parent is not among the models.
    """

    tree: Int64[np.ndarray, " P"]
    parent: Int64[np.ndarray, " P"]

    @property
    def roots(self) -> Int64[np.ndarray, " R"]:
        """Models that are the parent of another and have none themselves."""
        return np.array(sorted(set(self.parent[self.parent >= 0]) & set(np.flatnonzero(self.parent < 0))), np.int64)


def truth_of(index: pd.DataFrame) -> Truth | None:
    """The forest that `parent_id` tells of; None where no model has a parent.

    Models belong to one tree if `run_id` or `parent_id` connects them, also by a model that is not among them: epochs
    of one run are of one tree, and its children with them, whichever of its epochs are there.

    Args:
        index: rows of `Zoo.to_pandas()`: `model_id`, `run_id`, `parent_id`.
    """
    parents = [parent if isinstance(parent, str) else None for parent in index["parent_id"]]
    if not any(parents):
        return None
    place = {model_id: row for row, model_id in enumerate(index["model_id"])}
    parent = np.array([place.get(model_id, -1) if model_id else -1 for model_id in parents], dtype=np.int64)
    pairs = []
    for model_id, run_id, parent_id in zip(index["model_id"], index["run_id"], parents, strict=True):
        pairs.append((f"model {model_id}", f"run {run_id}"))
        if parent_id:
            pairs.append((f"model {model_id}", f"model {parent_id}"))
            pairs.append((f"model {model_id}", f"run {run_of(parent_id)}"))
    trees = schema.union_find(pairs)
    return Truth(renumbered(np.array([trees[f"model {model_id}"] for model_id in index["model_id"]])), parent)


def tree_accuracy(found: Int64[np.ndarray, " P"], true: Int64[np.ndarray, " P"]) -> float:
    """Share of models in the right tree under the best one-to-one matching of found and true trees.

    Example:
        >>> tree_accuracy(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 0]))
        0.75
    """
    counts = np.zeros((found.max() + 1, true.max() + 1))
    np.add.at(counts, (found, true), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(found))


def forest_scores(tree: Int64[np.ndarray, " P"], parent: Int64[np.ndarray, " P"], truth: Truth) -> dict[str, float]:
    """Scores of a forest; NaN where there is nothing to take a share of.

    Returns:
        `tree_accuracy`; `adjusted_rand` of the trees; `edge_precision` and `edge_recall` of directed edges;
        `direction_accuracy`, the share of true edges found, in either direction, that have the right one;
        `root_accuracy`, the share of true roots that have children and no parent.
    """
    found = {(int(source), child) for child, source in enumerate(parent.tolist()) if source >= 0}
    true = {(int(source), child) for child, source in enumerate(truth.parent.tolist()) if source >= 0}
    right, turned = len(found & true), len({(child, source) for source, child in found} & true)
    roots = set(truth.roots.tolist())
    named = roots & {source for source, _ in found} & set(np.flatnonzero(parent < 0).tolist())
    return {
        "tree_accuracy": tree_accuracy(tree, truth.tree),
        "adjusted_rand": float(adjusted_rand_score(truth.tree, tree)),
        "edge_precision": _share(right, len(found)),
        "edge_recall": _share(right, len(true)),
        "direction_accuracy": _share(right, right + turned),
        "root_accuracy": _share(len(named), len(roots)),
    }


def baselines(
    tree: Int64[np.ndarray, " P"],
    parent: Int64[np.ndarray, " P"],
    truth: Truth,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of chance: mean and the interval that holds 95 % of the draws.

    `random_forest` knows the true sizes of the trees and nothing else: models are dealt out at random, and in each
    tree a random member is the parent of the others. `random_root` has the trees that were found, and a random parent
    in each. `random_direction` has the edges that were found, each turned by a coin; its trees are those found.

    Returns:
        One row a baseline and score: `baseline`, `score`, `mean`, `low`, `high`.
    """
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[dict[str, float]]] = {"random_forest": [], "random_root": [], "random_direction": []}
    for _ in range(draws):
        dealt = generator.permutation(truth.tree)
        drawn["random_forest"].append(forest_scores(dealt, _random_stars(dealt, generator), truth))
        drawn["random_root"].append(forest_scores(tree, _random_stars(tree, generator), truth))
        drawn["random_direction"].append({"direction_accuracy": _coin_flips(parent, truth, generator)})
    rows: list[dict[str, Any]] = []
    for baseline, scores in drawn.items():
        for score in SCORES if baseline != "random_direction" else ("direction_accuracy",):
            values = np.array([held[score] for held in scores])
            values = values[~np.isnan(values)]
            if values.size:
                low, high = np.quantile(values, [0.025, 0.975])
                rows.append({"baseline": baseline, "score": score, "mean": values.mean(), "low": low, "high": high})
    return pd.DataFrame(rows, columns=["baseline", "score", "mean", "low", "high"])


def _random_stars(tree: np.ndarray, generator: np.random.Generator) -> Int64[np.ndarray, " P"]:
    parent = np.full(len(tree), -1)
    for number in range(tree.max() + 1):
        members = np.flatnonzero(tree == number)
        root = generator.choice(members)
        parent[members[members != root]] = root
    return parent


def _coin_flips(parent: np.ndarray, truth: Truth, generator: np.random.Generator) -> float:
    """Direction accuracy of the true edges among those found, in either direction, each turned by a coin."""
    children = np.flatnonzero(parent >= 0)
    sources = parent[children]
    edges = int(((truth.parent[children] == sources) | (truth.parent[sources] == children)).sum())
    return generator.binomial(edges, 0.5) / edges if edges else float("nan")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
