import itertools

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from vitzoo_hf.apply.lineage.trees import (
    hubs,
    is_sibling,
    largest_drop,
    likeliest_root,
    minimum_arborescence,
    nearest_candidates,
    renumbered,
    spanning,
    star,
    ward_trees,
)

DIMENSIONS = 2000


def between(points):
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def forest(generator, sizes, *, apart=10.0, steps=(0.05, 3.0)):
    """Points of stars, their trees and parents: the first of each tree is the parent of the others."""
    points, tree, parent = [], [], []
    for number, size in enumerate(sizes):
        root = len(points)
        points.append(apart * generator.standard_normal(DIMENSIONS) / np.sqrt(2 * DIMENSIONS))
        for step in np.geomspace(*steps, size - 1):
            points.append(points[root] + step * generator.standard_normal(DIMENSIONS) / np.sqrt(DIMENSIONS))
        tree += [number] * size
        parent += [-1] + [root] * (size - 1)
    return np.array(points), np.array(tree), np.array(parent)


def total(cost, parent):
    return sum(cost[source, child] for child, source in enumerate(parent.tolist()) if source >= 0)


def networkx_arborescence(cost):
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(cost)))
    pairs = itertools.permutations(range(len(cost)), 2)
    graph.add_weighted_edges_from((a, b, cost[a, b]) for a, b in pairs)
    parent = np.full(len(cost), -1)
    for a, b in networkx.minimum_spanning_arborescence(graph).edges:
        parent[b] = a
    return parent


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_arborescence_is_that_of_networkx(count, seed):
    cost = np.random.default_rng(seed).standard_normal((count, count))
    np.testing.assert_array_equal(minimum_arborescence(cost), networkx_arborescence(cost))


def test_arborescence_with_many_nested_cycles_is_that_of_networkx():
    generator = np.random.default_rng(1)
    points, _, _ = forest(generator, [20, 20])
    cost = between(points) + 0.3 * (generator.random((40, 40)) > 0.5)
    np.testing.assert_array_equal(minimum_arborescence(cost), networkx_arborescence(cost))
    tied = generator.integers(0, 3, (30, 30)).astype(float)
    assert total(tied, minimum_arborescence(tied)) == total(tied, networkx_arborescence(tied))


def test_arborescence_follows_its_nodes_and_ignores_scale():
    generator = np.random.default_rng(2)
    cost, order = generator.random((25, 25)), generator.permutation(25)
    parent = minimum_arborescence(cost)
    np.testing.assert_array_equal(minimum_arborescence(1e6 * cost + 7), parent)
    moved = minimum_arborescence(cost[np.ix_(order, order)])
    np.testing.assert_array_equal(np.where(moved >= 0, order[moved], -1), parent[order])


def test_arborescence_refuses_what_has_no_tree():
    with pytest.raises(ValueError, match="at least one node"):
        minimum_arborescence(np.zeros((0, 0)))
    with pytest.raises(ValueError, match="finite"):
        minimum_arborescence(np.array([[0.0, np.inf], [1.0, 0.0]]))


@pytest.mark.parametrize("sizes", [[5, 7], [12, 5, 9, 6], [30]])
def test_trees_roots_and_their_number_are_found(sizes):
    points, tree, parent = forest(np.random.default_rng(len(sizes)), sizes, steps=(0.5, 1.5))
    distance = between(points)
    found = hubs(distance)
    np.testing.assert_array_equal(found, tree)
    np.testing.assert_array_equal(star(distance, found), parent)
    order = np.random.default_rng(0).permutation(len(tree))
    moved = hubs(distance[np.ix_(order, order)])
    np.testing.assert_array_equal(moved, renumbered(tree[order]))
    np.testing.assert_array_equal(hubs(1e-3 * distance), tree)


def test_spanning_finds_chains():
    generator = np.random.default_rng(10)
    points = np.cumsum(generator.standard_normal((6, DIMENSIONS)) * np.array([9, 1, 1.2, 1.1, 1.3, 1])[:, None], 0)
    parent = spanning(between(points), np.zeros(6, np.int64))
    assert [(parent[i] == i - 1) or (parent[i - 1] == i) for i in range(1, 6)] == [True] * 5


def test_hubs_are_the_best_of_all_choices():
    for seed in range(5):
        points, _, _ = forest(np.random.default_rng(seed), [4, 5, 3])
        distance = between(points)
        best = min(itertools.combinations(range(12), 3), key=lambda chosen: distance[list(chosen)].min(0).sum())
        np.testing.assert_array_equal(hubs(distance, 3), renumbered(distance[list(best)].argmin(0)))


def test_ward_is_that_of_scikit_learn():
    points = np.random.default_rng(3).standard_normal((40, 3))
    for count in (2, 5, 9):
        theirs = AgglomerativeClustering(count, linkage="ward").fit_predict(points)
        assert adjusted_rand_score(theirs, ward_trees(between(points), count)) == 1
    points, tree, _ = forest(np.random.default_rng(4), [8, 8, 8])
    np.testing.assert_array_equal(ward_trees(between(points)), tree)


def test_spanning_is_the_minimum_spanning_tree_of_networkx():
    points = np.random.default_rng(5).standard_normal((30, 4))
    distance = between(points)
    parent = spanning(distance, np.zeros(30, np.int64))
    graph = networkx.from_numpy_array(distance)
    theirs = {frozenset(edge) for edge in networkx.minimum_spanning_tree(graph).edges}
    assert {frozenset((child, source)) for child, source in enumerate(parent.tolist()) if source >= 0} == theirs
    assert np.flatnonzero(parent < 0).tolist() == [likeliest_root(distance)]


def test_likeliest_root_is_that_of_the_normal_density():
    points = np.random.default_rng(6).standard_normal((9, 50)) * np.geomspace(0.01, 5, 9)[:, None]
    likelihoods = []
    for root in range(9):
        steps = np.delete(points, root, 0) - points[root]
        sizes = np.sqrt((steps**2).mean(1, keepdims=True))  # each child's best
        likelihoods.append(norm.logpdf(steps, scale=sizes).sum())
    assert likeliest_root(between(points)) == int(np.argmax(likelihoods))


def test_likeliest_root_is_the_parent_though_a_child_lies_nearer_on_average():
    """Steps share a direction, so whoever took a short one is nearer to all that took long ones."""
    generator = np.random.default_rng(11)
    sizes = np.array([0.05, 0.07, *np.geomspace(1, 5, 10)])
    steps = generator.standard_normal((12, DIMENSIONS)) / np.sqrt(DIMENSIONS)
    shared = generator.standard_normal(DIMENSIONS) / np.sqrt(DIMENSIONS)
    points = np.vstack([np.zeros(DIMENSIONS), sizes[:, None] * (0.95 * steps + 0.3 * shared)])
    distance = between(points)
    assert distance.sum(1).argmin() != 0
    assert likeliest_root(distance) == 0


def test_equal_models_are_one_tree_and_alone_is_a_tree():
    same = np.zeros((6, 6))
    assert hubs(same).tolist() == [0] * 6
    assert ward_trees(same).tolist() == [0] * 6
    assert star(same, np.zeros(6, np.int64)).tolist() == [-1, 0, 0, 0, 0, 0]
    one = np.zeros((1, 1))
    assert hubs(one).tolist() == ward_trees(one).tolist() == [0]
    assert minimum_arborescence(one).tolist() == star(one, np.zeros(1, np.int64)).tolist() == [-1]


def test_a_child_equal_to_its_parent_is_in_its_tree():
    points, tree, _ = forest(np.random.default_rng(7), [6, 6])
    points = np.insert(points, 6, points[0], axis=0)
    tree = np.insert(tree, 6, 0)
    np.testing.assert_array_equal(hubs(between(points)), tree)
    assert star(between(points), tree).tolist() == [-1, 0, 0, 0, 0, 0, 0, -1, 7, 7, 7, 7, 7]


def test_a_sibling_is_told_from_a_parent():
    points, _, _ = forest(np.random.default_rng(8), [12], steps=(1.0, 1.5))
    assert not is_sibling(between(points), 0)
    children = between(points[1:])
    assert is_sibling(children, likeliest_root(children))
    assert not is_sibling(children[:2, :2], 0)


def test_nearest_candidates_take_children_and_refuse_strangers():
    points, tree, parent = forest(np.random.default_rng(9), [8, 8, 8])
    distance = between(points)
    np.testing.assert_array_equal(nearest_candidates(distance, parent < 0), parent)
    known = (parent < 0) & (tree != 1)
    np.testing.assert_array_equal(nearest_candidates(distance, known), np.where(tree == 1, -1, parent))
    assert (nearest_candidates(distance, np.zeros(24, bool)) == -1).all()
    only = np.arange(24) == 0
    assert nearest_candidates(distance, only).tolist() == [-1] + [0] * 23


def test_largest_drop_counts_from_one():
    assert largest_drop(np.array([9.0, 1.0, 0.9])) == 1
    assert largest_drop(np.array([9.0, 8.0, 1.0, 0.9])) == 2
    assert largest_drop(np.array([9.0, 8.0, 0.0])) == 2
