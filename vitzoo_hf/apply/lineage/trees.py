"""Distances and costs of models -> trees, roots and parents. Pure functions of P × P matrices.

Three ideas are used:

- *Hubs* are few models that are near many models (k-medoids: Kaufman and Rousseeuw, Finding Groups in Data, 1990,
  chapter 2).
- The *likeliest root* is the model with the least mean logarithm of distances: the maximum likelihood of the parent,
  if every child is its parent plus a Gaussian step of unknown size.
- The *minimum arborescence* is the directed tree of least cost (Chu and Liu 1965; Edmonds 1967).
"""

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

MOST_TREES = 50
NEAREST = 6
SIBLING_COSINE = 0.25  # half way between the cosines seen from a parent, 0, and from a sibling, 1/2
FAR_SHARE = 0.9


def minimum_arborescence(cost: Float64[np.ndarray, "P P"]) -> Int64[np.ndarray, " P"]:
    """The directed tree over all nodes with the least sum of costs; its root is free.

    Args:
        cost: cost of the edge from row to column; finite but for the diagonal, which is ignored.

    Returns:
        The parent of every node; -1 for the root.

    Raises:
        ValueError: if there is no node, or a cost off the diagonal is not finite.

    Example:
        >>> minimum_arborescence(np.array([[0.0, 1.0, 9.0], [5.0, 0.0, 1.0], [5.0, 5.0, 0.0]])).tolist()
        [-1, 0, 1]
    """
    count = len(cost)
    off = ~np.eye(count, dtype=bool)
    if count == 0 or not np.isfinite(cost[off]).all():
        raise ValueError("expected at least one node, and finite costs off the diagonal")
    # An additional root with edges to all nodes, each dearer than all others together, so that it gets one child.
    spread = np.ptp(cost[off]) if count > 1 else 0.0
    start = np.full((count + 1, count + 1), np.inf)
    # shifted to at least 0: every tree has equally many edges, so the best tree stays the best
    start[:count, :count] = np.where(off, cost - (cost[off].min() if count > 1 else 0.0), np.inf)
    start[count, :count] = 1 + 2 * spread * count
    parent = _edmonds(start, count)[:count]
    return np.where(parent == count, -1, parent)


def _edmonds(cost: np.ndarray, root: int) -> np.ndarray:
    """Parents in the least arborescence from a root whose column is infinite."""
    best = cost.argmin(0)
    best[root] = root
    cycle_of = _cycles(best, root)
    if (cycle_of < 0).all():
        return best
    component = np.where(cycle_of >= 0, cycle_of, -1)
    alone = np.flatnonzero(cycle_of < 0)
    component[alone] = cycle_of.max() + 1 + np.arange(len(alone))
    in_cycle = cycle_of >= 0
    # an edge into a cycle replaces the edge inside it, so it costs the difference (Edmonds 1967)
    reduced = cost - np.where(in_cycle, cost[best, np.arange(len(cost))], 0.0)
    # reduceat takes runs of equal labels, so rows and columns are sorted by component
    order = np.argsort(component, kind="stable")
    starts = np.searchsorted(component[order], np.arange(component.max() + 1))
    # All cycles are contracted at once, and P × P minima are taken in numpy, not in Python.
    joined = np.minimum.reduceat(np.minimum.reduceat(reduced[order], starts, axis=0)[:, order], starts, axis=1)
    np.fill_diagonal(joined, np.inf)
    outer = _edmonds(joined, int(component[root]))
    parent = best.copy()
    for target, source in enumerate(outer):
        if target == component[root]:
            continue
        rows, columns = np.flatnonzero(component == source), np.flatnonzero(component == target)
        row, column = np.unravel_index(reduced[np.ix_(rows, columns)].argmin(), (len(rows), len(columns)))
        parent[columns[column]] = rows[row]
    return parent


def _cycles(best: np.ndarray, root: int) -> np.ndarray:
    """Number of the cycle of every node when each goes to its best parent; -1 for nodes on no cycle."""
    cycle_of, first_visit = np.full(len(best), -1), np.full(len(best), -1)
    first_visit[root] = len(best)
    count = 0
    for start in range(len(best)):
        node = start
        while first_visit[node] < 0:
            first_visit[node] = start
            node = best[node]
        if first_visit[node] == start and cycle_of[node] < 0:
            while cycle_of[node] < 0:
                cycle_of[node] = count
                node = best[node]
            count += 1
    return cycle_of


def ward_trees(distance: Float64[np.ndarray, "P P"], count: int | None = None) -> Int64[np.ndarray, " P"]:
    """Clusters by Ward's linkage of the distances, numbered in order of their first model.

    Args:
        distance: distances, symmetric, with a zero diagonal.
        count: number of clusters; by default where the heights of the dendrogram have their largest ratio.
    """
    if len(distance) == 1:
        return np.zeros(1, dtype=np.int64)
    merges = linkage(squareform(distance, checks=False), "ward")
    if count is None:
        heights = merges[::-1, 2]  # heights[k - 1] is that of the merge of k + 1 clusters into k
        gains = np.concatenate([[2 * heights[0]], heights[: most_trees(len(distance))]])
        count = largest_drop(gains)
    return renumbered(fcluster(merges, count, "maxclust"))


def most_trees(models: int) -> int:
    """The largest number of trees that an estimate considers: half the models, at most 50."""
    return min(max(1, models // 2), MOST_TREES)


def largest_drop(gains: Float64[np.ndarray, " K"]) -> int:
    """The k of at least 1 with the largest ratio of the gain of the k-th tree to the gain of the next tree."""
    floor = 1e-9 * gains.max()  # gains of equal models are rounding, and their ratios mean nothing
    if floor == 0:
        return 1
    gains = np.maximum(gains, floor)
    return 1 + int((gains[:-1] / gains[1:]).argmax())


def hubs(distance: Float64[np.ndarray, "P P"], count: int | None = None) -> Int64[np.ndarray, " P"]:
    """Trees of models that share a nearest hub, numbered in order of their first model.

    Hubs are the K models with the least sum of distances from every model to its nearest hub, by greedy selection and
    exchange (PAM). Sums of distances rather than squares let a tree retain distant children.

    Args:
        distance: distances, symmetric, with a zero diagonal.
        count: K; by default the number with the largest ratio of the saving by the K-th hub to that by the next hub.
            The first hub's saving is measured from a cost at which all models are as far as the farthest two.
    """
    most = most_trees(len(distance)) + 1 if count is None else count
    greedy: list[int] = []
    costs, labels = [len(distance) * distance.max()], []
    for _ in range(min(most, len(distance))):
        nearest = distance[greedy].min(0) if greedy else np.full(len(distance), np.inf)
        greedy = [*greedy, int(np.minimum(nearest, distance).sum(1).argmin())]
        exchanged = _exchange(distance, greedy)
        costs.append(distance[exchanged].min(0).sum())
        labels.append(distance[exchanged].argmin(0))
    if count is None:
        count = largest_drop(-np.diff(costs)) if len(costs) > 2 else 1
    return renumbered(labels[count - 1])


def _exchange(distance: np.ndarray, hubs: list[int]) -> list[int]:
    """Exchange hubs for better ones, the best exchange first, until none is better.

    The changes of cost by all exchanges follow at once from each model's nearest and second nearest hub (FastPAM1:
    Schubert and Rousseeuw, Faster k-Medoids Clustering, 2019).
    """
    # a copy, because the caller goes on from the list before exchanges
    hubs = list(hubs)
    while True:
        near = np.sort(np.vstack([distance[hubs], np.full(len(distance), np.inf)]), axis=0)[:2]
        owner = distance[hubs].argmin(0)
        gained = np.minimum(distance - near[0], 0)
        of_owner = np.minimum(distance, near[1]) - near[0] - gained
        change = of_owner @ np.eye(len(hubs))[owner] + gained.sum(1)[:, None]
        model, place = np.unravel_index(change.argmin(), change.shape)
        if change[model, place] >= -1e-12 * near[0].sum():  # below rounding, exchanges could go round in circles
            return hubs
        hubs[int(place)] = int(model)


def renumbered(labels: Int64[np.ndarray, " P"] | np.ndarray) -> Int64[np.ndarray, " P"]:
    """Labels of a partition, renumbered 0, 1 … in order of first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def likeliest_root(distance: Float64[np.ndarray, "P P"]) -> int:
    """The member of a tree with the least mean logarithm of its distances to the others.

    Of a parent w and children w + s_i e_i with standard normal e_i of D dimensions and unknown sizes s_i, the log
    likelihood, maximised over s_i, is -D sum_i log|w_i - w| plus a constant. Ties go to the first member. Real steps
    share a direction, so a child that stayed much nearer to its parent than every other child passes for the parent.

    Example:
        >>> points = np.array([1.0, 0.0, -2.0])[:, None]
        >>> likeliest_root(np.abs(points - points.T))
        1
    """
    if len(distance) == 1:
        return 0
    positive = distance[distance > 0]
    # The logarithm of 0 is infinite: identical models count as a thousand times closer than any others.
    floor = positive.min() / 1e3 if positive.size else 1.0
    logs = np.log(np.maximum(distance, floor))
    np.fill_diagonal(logs, 0.0)
    return int(logs.sum(1).round(9).argmin())  # rounded, so that equal sums tie in any order of summation


def star(distance: Float64[np.ndarray, "P P"], tree: Int64[np.ndarray, " P"]) -> Int64[np.ndarray, " P"]:
    """Parents when every tree is its likeliest root with all other models as children; -1 for roots."""
    parent = np.full(len(tree), -1)
    for number in np.unique(tree):
        members = np.flatnonzero(tree == number)
        root = members[likeliest_root(distance[np.ix_(members, members)])]
        parent[members[members != root]] = root
    return parent


def spanning(distance: Float64[np.ndarray, "P P"], tree: Int64[np.ndarray, " P"]) -> Int64[np.ndarray, " P"]:
    """Parents when each tree is the minimum spanning tree of its distances, away from its likeliest root."""
    parent = np.full(len(tree), -1)
    for number in np.unique(tree):
        members = np.flatnonzero(tree == number)
        distances = distance[np.ix_(members, members)]
        root = likeliest_root(distances)
        # Prim's algorithm, P² for P members
        nearest, source = distances[root].copy(), np.full(len(members), root)
        waiting = np.arange(len(members)) != root
        while waiting.any():
            node = int(np.where(waiting, nearest, np.inf).argmin())
            waiting[node] = False
            parent[members[node]] = members[source[node]]
            closer = waiting & (distances[node] < nearest)
            nearest[closer], source[closer] = distances[node][closer], node
    return parent


def is_sibling(distance: Float64[np.ndarray, "P P"], root: int) -> bool:
    """Whether the root of a tree looks like a child of a parent that is not among the models.

    Seen from their parent, children lie in independent directions, with cosines near 0. Seen from a sibling as far
    from the parent, they lie at cosines near 1/2, since all share the way back to the parent. The answer is True
    if the mean cosine among the six nearest models is above 1/4, and False for trees of fewer than three models. A
    sibling much nearer to the parent than all others cannot be distinguished from the parent.
    """
    # copies at distance 0 have no direction
    neighbours = np.flatnonzero(distance[root] > 0)
    neighbours = neighbours[np.argsort(distance[root][neighbours], kind="stable")][:NEAREST]
    if len(neighbours) < 2:
        return False
    away = distance[root][neighbours]
    # the law of cosines
    cosine = away[:, None] ** 2 + away[None] ** 2 - distance[np.ix_(neighbours, neighbours)] ** 2
    cosine /= 2 * away[:, None] * away[None]
    # the mean, because single cosines scatter
    return bool(cosine[np.triu_indices(len(neighbours), 1)].mean() > SIBLING_COSINE)


def far_children(
    distance: Float64[np.ndarray, "P P"], tree: Int64[np.ndarray, " P"], parent: Int64[np.ndarray, " P"]
) -> Bool[np.ndarray, " P"]:
    """Models as far from the root of their tree as roots are from each other, so that they may be roots themselves.

    The bound is 0.9 times the median distance of two roots. With one tree there is no bound, and no model is far.

    Example:
        >>> points = np.array([0.0, 1.0, 10.0, 21.0])
        >>> tree, parent = np.array([0, 0, 1, 1]), np.array([-1, 0, -1, 2])
        >>> far_children(np.abs(points[:, None] - points), tree, parent).tolist()
        [False, False, False, True]
    """
    roots = np.flatnonzero(parent < 0)
    if len(roots) < 2:
        return np.zeros(len(parent), dtype=bool)
    between = distance[np.ix_(roots, roots)][np.triu_indices(len(roots), 1)]
    root_of = np.zeros(int(tree.max()) + 1, np.int64)
    root_of[tree[roots]] = roots
    far = distance[np.arange(len(parent)), root_of[tree]] >= FAR_SHARE * np.median(between)
    return far & (parent >= 0)


def nearest_candidates(
    distance: Float64[np.ndarray, "P P"], candidate: Bool[np.ndarray, " P"]
) -> Int64[np.ndarray, " P"]:
    """Parents when the roots are known: the nearest root, or -1 where none is near enough.

    The position of a model on the line from the nearest root a towards another root b is
    `s = (d(w,a)^2 + d(a,b)^2 - d(w,b)^2) / (2 d(a,b)^2)`: near 0 for a child of a, whose step is
    independent of b, and near 1/2 for a model that is independent of both. A model whose mean s over all b is above
    1/4 has no parent among the candidates. With one candidate there is no b, and every model is its child.
    """
    roots = np.flatnonzero(candidate)
    parent = np.full(len(distance), -1)
    if not len(roots):
        return parent
    for model in np.flatnonzero(~candidate):
        nearest = roots[distance[model, roots].argmin()]
        # equal roots give no line to project on
        distinct = roots[distance[nearest, roots] > 0]
        apart = distance[nearest, distinct] ** 2
        along = (distance[model, nearest] ** 2 + apart - distance[model, distinct] ** 2) / (2 * apart)
        if not len(distinct) or along.mean() <= SIBLING_COSINE:
            parent[model] = nearest
    return parent
