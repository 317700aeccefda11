"""Recover from weights alone which models are of one tree, and which model is the parent of which.

Only trunks are compared, because fine-tuning starts with a new head. `parent_id` serves scores alone. Methods know
nothing but weights, and the candidates of `recover_lineage`. Memory and time grow with P² for P models.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int64

from vitzoo_hf.apply.lineage.costs import TrunkMeasures, measure_trunks, mother_costs, mother_distances
from vitzoo_hf.apply.lineage.metrics import Truth, baselines, forest_scores
from vitzoo_hf.apply.lineage.metrics import truth_of as truth_of
from vitzoo_hf.apply.lineage.trees import (
    FAR_SHARE,
    far_children,
    hubs,
    is_sibling,
    minimum_arborescence,
    nearest_candidates,
    renumbered,
    spanning,
    star,
    ward_trees,
)
from vitzoo_hf.format.layout import trunk_key
from vitzoo_hf.format.messages import counted, did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.weight_columns import WeightColumns

METHODS = ("hubs", "spanning", "mother", "mother-reversed", "candidates")


@dataclass(frozen=True)
class Forest:
    """A recovered forest of P models.

    Attributes:
        model_ids: ids of the models.
        tree: number of the tree of every model.
        parent: position of the parent of every model; -1 for no parent.
        method: method that recovered the forest.
        orphan_trees: trees whose root looks like a child of a parent that is not among the models (`is_sibling`).
            Their edges stay: on real zoos that rule is often wrong, see results/lineage.
        notes: sentences on the limits of this result.
    """

    model_ids: list[str]
    tree: Int64[np.ndarray, " P"]
    parent: Int64[np.ndarray, " P"]
    method: str
    orphan_trees: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_trees(self) -> int:
        """The number of trees."""
        return int(self.tree.max()) + 1

    def edges(self) -> pd.DataFrame:
        """One row a model: `model_id`, `tree`, `parent_id` (None for none) and `role`.

        The role is `child`, `root`, `root or sibling` where the parent may not be among the models (`orphan_trees`),
        or, with method "candidates", `no parent found`.
        """
        has_child = set(self.parent[self.parent >= 0].tolist())
        roles = []
        for model, (parent, tree) in enumerate(zip(self.parent.tolist(), self.tree.tolist(), strict=True)):
            alone = self.method == "candidates" and model not in has_child
            root = "no parent found" if alone else "root or sibling" if tree in self.orphan_trees else "root"
            roles.append("child" if parent >= 0 else root)
        names = [self.model_ids[parent] if parent >= 0 else None for parent in self.parent.tolist()]
        return pd.DataFrame({"model_id": self.model_ids, "tree": self.tree, "parent_id": names, "role": roles})

    def scores(self, truth: Truth) -> dict[str, float]:
        """Scores of this forest; see `forest_scores`."""
        return forest_scores(self.tree, self.parent, truth)

    def baselines(self, truth: Truth, *, seed: int = 0) -> pd.DataFrame:
        """Scores of chance for this forest; see `baselines`."""
        return baselines(self.tree, self.parent, truth, seed=seed)


def recover_lineage(
    zoo: Zoo,
    *,
    method: str = "hubs",
    trees: int | None = None,
    candidates: Collection[str] | None = None,
    precision: str = "float32",
    device: str | torch.device = "cpu",
    num_workers: int = 1,
    verify: bool = True,
    progress: bool = True,
) -> Forest:
    """Recover the forest of a zoo's models from their weights.

    Args:
        zoo: the models. Models whose trunks differ in layout are of different trees.
        method: "hubs": trees around hubs, each a star about its likeliest root. That fits zoos in which children are
            not parents themselves and every root has children: a root without any comes out as a child.
            "spanning": the trees of "hubs", each with the minimum spanning tree away from its root.
            "mother": MoTHer as published, Ward's clusters, each with a minimum arborescence of distance and kurtosis;
            "mother-reversed" with the opposite rule of kurtosis. "candidates": the parent is the nearest of the
            models that are known to be roots. See `vitzoo_hf.apply.lineage.trees` and `costs`.
        trees: number of trees; by default estimated from the weights.
        candidates: model ids that are known to be roots, for method "candidates" alone.
        precision: type to which weights are rounded first: float32 (no change), bfloat16 or float16.
        device: where weights are compared.
        num_workers: number of threads that read.
        verify: compare every row with its hash when it is first read.
        progress: show bars.

    Raises:
        ZooError: if the zoo is empty or has fewer models than `trees`, an argument does not fit the method, a row is
            damaged, or weights are not finite.

    Example:
        >>> forest = recover_lineage(Zoo.sample(), progress=False)
        >>> forest.num_trees, forest.scores(truth_of(Zoo.sample().to_pandas()))["tree_accuracy"]
        (2, 1.0)
    """
    check_arguments(zoo, method, trees, candidates)
    parts = []
    groups = layouts_by_trunk(zoo)
    if trees is not None and len(groups) > 1:
        # a number of trees cannot be shared out between groups that are never compared
        raise ZooError(f"trees={trees}, but there are {len(groups)} kinds of trunks: filter by `architecture` first")
    for layouts in groups:
        columns = zoo.filter(layout=layouts).weight_columns(device=device, num_workers=num_workers)
        columns = columns.verified() if verify else columns
        measures = measure_trunks(columns, precision=precision, progress=progress)
        roots = None if candidates is None else np.isin(measures.model_ids, list(candidates))
        parts.append(forest_of(measures, columns, method, trees=trees, roots=roots, precision=precision))
    return _joined(parts, zoo.model_ids, method)


def forest_of(
    measures: TrunkMeasures,
    columns: WeightColumns,
    method: str,
    *,
    trees: int | None = None,
    roots: Bool[np.ndarray, " P"] | None = None,
    precision: str = "float32",
    progress: bool = False,
) -> Forest:
    """The forest of models of one trunk layout, from their measurements; see `recover_lineage`.

    Args:
        measures: measurements of the models of `columns`.
        columns: the weights, which only MoTHer reads again.
        method: see `recover_lineage`.
        trees: number of trees; by default estimated from the weights.
        roots: which models are candidates, for method "candidates" alone.
        precision: see `recover_lineage`.
        progress: show a bar.
    """
    distance, orphans = measures.distance, []
    if method.startswith("mother"):
        tree = ward_trees(measures.mean_absolute, trees)
        parent = _mother_parents(measures, columns, tree, method == "mother-reversed", precision, progress)
    elif method == "candidates":
        assert roots is not None
        parent = nearest_candidates(distance, roots)
        tree = renumbered(np.where(parent >= 0, parent, np.arange(len(parent))))
    else:
        tree = hubs(distance, trees)
        parent = star(distance, tree) if method == "hubs" else spanning(distance, tree)
        orphans = _orphan_trees(distance, tree, parent)
    notes = []
    # upper triangle: the first of equal trunks is no twin of an earlier one
    twins = int((np.triu(distance == 0, 1)).any(0).sum())
    if method in ("hubs", "spanning") and (far := int(far_children(distance, tree, parent).sum())):
        notes.append(
            f"{counted(far, 'child', 'children')} as far from the root as roots are from each other (at least "
            f"{FAR_SHARE:g} times the median distance of roots): possibly roots without children of their own, which "
            f"method {method} cannot find"
        )
    if twins:
        notes.append(f"{twins} trunks equal an earlier one: which came first is not in the weights")
    return Forest(measures.model_ids, tree, parent, method, orphans, notes)


def check_arguments(zoo: Zoo, method: str, trees: int | None, candidates: Collection[str] | None) -> None:
    """Raise ZooError for what `recover_lineage` cannot do."""
    if not len(zoo):
        raise ZooError("there is no model to recover the lineage of: the filter matches none")
    if method not in METHODS:
        raise ZooError(f"unknown method {method!r}: {did_you_mean(method, METHODS)}")
    if trees is not None and not 1 <= trees <= len(zoo):
        raise ZooError(f"trees={trees}; expected 1 to {len(zoo)}, the number of models")
    if method == "candidates" and candidates is None:
        raise ZooError(
            'method "candidates" needs candidates, the models that are known to be roots: give their ids, or on the '
            "command line --candidates COLUMN=VALUE, such as stage=pretrain"
        )
    if method != "candidates" and candidates is not None:
        raise ZooError(f'method {method!r} makes no use of candidates: drop them, or take method "candidates"')
    if candidates is not None and (unknown := sorted(set(candidates) - set(zoo.model_ids))):
        raise ZooError(f"candidate {unknown[0]!r} is not among the models: {did_you_mean(unknown[0], zoo.model_ids)}")
    if method == "candidates" and trees is not None:
        raise ZooError('with method="candidates" there are as many trees as candidates: drop trees')


def layouts_by_trunk(zoo: Zoo) -> list[list[str]]:
    """Ids of the layouts of the zoo's rows, grouped by trunk."""
    groups: dict[str, list[str]] = {}
    for layout_id in dict.fromkeys(zoo.to_pandas()["layout"]):
        # heads are new at fine-tuning, so models of several heads may be of one tree
        groups.setdefault(trunk_key(zoo.layouts[layout_id]), []).append(layout_id)
    return list(groups.values())


def _mother_parents(
    measures: TrunkMeasures,
    columns: WeightColumns,
    tree: np.ndarray,
    reverse: bool,
    precision: str,
    progress: bool,
) -> np.ndarray:
    """MoTHer's minimum arborescence within every tree."""
    members = [np.flatnonzero(tree == number) for number in range(tree.max() + 1)]
    parent = np.full(len(tree), -1)
    distances = mother_distances(columns, members, precision=precision, progress=progress)
    for rows, distance in zip(members, distances, strict=True):
        if len(rows) > 1:
            sources = minimum_arborescence(mother_costs(distance, measures.kurtosis[rows], reverse=reverse))
            parent[rows] = np.where(sources >= 0, rows[sources], -1)
    return parent


def _orphan_trees(distance: np.ndarray, tree: np.ndarray, parent: np.ndarray) -> list[int]:
    orphans = []
    for number in range(tree.max() + 1):
        members = np.flatnonzero(tree == number)
        # every tree has exactly one member without a parent
        root = int(np.flatnonzero(parent[members] < 0)[0])
        if is_sibling(distance[np.ix_(members, members)], root):
            orphans.append(number)
    return orphans


def _joined(parts: list[Forest], model_ids: list[str], method: str) -> Forest:
    """Join the forests of different trunks, in the order of the zoo."""
    place = {model_id: row for row, model_id in enumerate(model_ids)}
    tree, parent = np.zeros(len(place), np.int64), np.full(len(place), -1)
    orphans, notes, trees_before = [], [], 0
    for part in parts:
        rows = np.array([place[model_id] for model_id in part.model_ids])
        # numbers of the parts each start at 0
        tree[rows] = part.tree + trees_before
        parent[rows] = np.where(part.parent >= 0, rows[part.parent], -1)
        orphans += [number + trees_before for number in part.orphan_trees]
        notes += part.notes
        trees_before += part.num_trees
    return Forest(model_ids, tree, parent, method, orphans, notes)
