"""Score a recovered forest, and random forests as a baseline by the same scores."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Int64
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from vitzoo_hf.apply.intervals import percentile_interval
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
        tree: number of the tree of every model.
        parent: position of the parent of every model; -1 for no parent, or one that is not among the models.
    """

    tree: Int64[np.ndarray, " P"]
    parent: Int64[np.ndarray, " P"]

    @property
    def roots(self) -> Int64[np.ndarray, " R"]:
        """Positions of the models that are a parent and have no parent."""
        return np.array(sorted(set(self.parent[self.parent >= 0]) & set(np.flatnonzero(self.parent < 0))), np.int64)


def truth_of(index: pd.DataFrame) -> Truth | None:
    """The forest of the column `parent_id`; None where no model has a parent.

    Models belong to one tree if `run_id` or `parent_id` connects them. They may connect by a model that is not among
    them: all epochs of a run are of one tree, together with the children of any epoch.

    Args:
        index: table with the columns `model_id`, `run_id` and `parent_id`, such as `Zoo.to_pandas()`.
    """
    parents = [parent if isinstance(parent, str) else None for parent in index["parent_id"]]
    if not any(parents):
        return None
    place = {model_id: row for row, model_id in enumerate(index["model_id"])}
    parent = np.array([place.get(model_id, -1) if model_id else -1 for model_id in parents], dtype=np.int64)
    # prefixes, because a model and a run may have one name
    models = [f"model {model_id}" for model_id in index["model_id"]]
    pairs = list(zip(models, (f"run {run_id}" for run_id in index["run_id"]), strict=True))
    for model, parent_id in zip(models, parents, strict=True):
        if parent_id:
            # the parent itself, and its run: whichever of its epochs are in the table belong to this tree
            pairs += [(model, f"model {parent_id}"), (model, f"run {run_of(parent_id)}")]
    group_of = schema.union_find(pairs)
    return Truth(renumbered(np.array([group_of[model] for model in models])), parent)


def tree_accuracy(recovered: Int64[np.ndarray, " P"], true: Int64[np.ndarray, " P"]) -> float:
    """Share of models in the right tree under the best one-to-one matching of recovered and true trees.

    Example:
        >>> tree_accuracy(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 0]))
        0.75
    """
    counts = np.zeros((recovered.max() + 1, true.max() + 1))
    np.add.at(counts, (recovered, true), 1)
    # numbers of trees are arbitrary, so the best one-to-one matching names them
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(recovered))


def forest_scores(tree: Int64[np.ndarray, " P"], parent: Int64[np.ndarray, " P"], truth: Truth) -> dict[str, float]:
    """Scores of a forest; NaN for a share of nothing.

    Returns:
        `tree_accuracy`; `adjusted_rand` of the trees; `edge_precision` and `edge_recall` of directed edges;
        `direction_accuracy`, of the true edges recovered in either direction, the share in the right one;
        `root_accuracy`, the share of true roots that are recovered with children and no parent.
    """
    edges = {(int(source), child) for child, source in enumerate(parent.tolist()) if source >= 0}
    true = {(int(source), child) for child, source in enumerate(truth.parent.tolist()) if source >= 0}
    right, turned = len(edges & true), len({(child, source) for source, child in edges} & true)
    roots = set(truth.roots.tolist())
    recovered_roots = roots & {source for source, _ in edges} & set(np.flatnonzero(parent < 0).tolist())
    return {
        "tree_accuracy": tree_accuracy(tree, truth.tree),
        "adjusted_rand": float(adjusted_rand_score(truth.tree, tree)),
        "edge_precision": _share(right, len(edges)),
        "edge_recall": _share(right, len(true)),
        "direction_accuracy": _share(right, right + turned),
        "root_accuracy": _share(len(recovered_roots), len(roots)),
    }


def baselines(
    tree: Int64[np.ndarray, " P"],
    parent: Int64[np.ndarray, " P"],
    truth: Truth,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of chance: the mean over draws, and the interval of 95 % of the draws.

    `random_forest` has the true sizes of the trees: models are assigned at random, and a random member of each tree
    is the parent of the others. `random_root` has the recovered trees with a random parent in each.
    `random_direction` has the recovered trees and edges, each edge turned by a coin.

    Returns:
        One row a baseline and score: `baseline`, `score`, `mean`, `low`, `high`.
    """
    generator = np.random.default_rng(seed)
    draws_of: dict[str, list[dict[str, float]]] = {"random_forest": [], "random_root": [], "random_direction": []}
    for _ in range(draws):
        shuffled = generator.permutation(truth.tree)
        draws_of["random_forest"].append(forest_scores(shuffled, _random_stars(shuffled, generator), truth))
        draws_of["random_root"].append(forest_scores(tree, _random_stars(tree, generator), truth))
        draws_of["random_direction"].append({"direction_accuracy": _coin_flips(parent, truth, generator)})
    rows: list[dict[str, str | float]] = []
    for baseline, scores in draws_of.items():
        for score in SCORES if baseline != "random_direction" else ("direction_accuracy",):
            values = np.array([draw[score] for draw in scores])
            # a share of nothing is no score of chance
            values = values[~np.isnan(values)]
            if values.size:
                low, high = percentile_interval(values, tail=0.025)
                mean = float(values.mean())
                rows.append({"baseline": baseline, "score": score, "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows, columns=["baseline", "score", "mean", "low", "high"])


def _random_stars(tree: np.ndarray, generator: np.random.Generator) -> Int64[np.ndarray, " P"]:
    parent = np.full(len(tree), -1)
    for number in range(tree.max() + 1):
        members = np.flatnonzero(tree == number)
        root = generator.choice(members)
        parent[members[members != root]] = root
    return parent


def _coin_flips(parent: np.ndarray, truth: Truth, generator: np.random.Generator) -> float:
    """Direction accuracy of the recovered true edges, of either direction, each turned by a coin."""
    children = np.flatnonzero(parent >= 0)
    sources = parent[children]
    edges = int(((truth.parent[children] == sources) | (truth.parent[sources] == children)).sum())
    # coins of single edges are independent, so their sum is drawn at once
    return generator.binomial(edges, 0.5) / edges if edges else float("nan")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
