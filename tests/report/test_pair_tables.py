"""Pairs become matrices; their squared distances are those of points; parents and what varies within them."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_zoo import between, zoo_of

from vitzoo_hf.report import pair_tables
from vitzoo_hf.report.factors import NothingToDrawError


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 12), st.integers(2, 4), st.integers(0, 10**6))
def test_squared_distances_are_those_of_predictions_and_directions(models, classes, seed):
    rng = np.random.default_rng(seed)
    predicted, weights = rng.integers(0, classes, (models, 15)), rng.normal(size=(models, 6))
    onehot = (predicted[:, :, None] == np.arange(classes)).reshape(models, -1) / np.sqrt(15)
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    pairs, index = zoo_of(weights, np.zeros((models, 1)))
    for name, matrix in (("agreement", onehot @ onehot.T), ("weight_cosine", unit @ unit.T)):
        pairs[name] = [matrix[i, j] for i, j in itertools.combinations(range(models), 2)]
    found = {space.metric: space.squared for space in pair_tables.spaces_of(pairs, index)}
    assert list(found) == ["weight_l2", "weight_cosine", "agreement"]
    for name, points in (("weight_l2", weights), ("agreement", onehot), ("weight_cosine", unit)):
        np.testing.assert_allclose(found[name], between(points) ** 2, atol=1e-9)


def test_models_without_all_pairs_are_left_out_of_that_metric_alone():
    points = np.random.default_rng(0).normal(size=(6, 2))
    pairs, index = zoo_of(points, points / 10)
    lost = (pairs["model_a"] == "r4@1") | (pairs["model_b"] == "r4@1")
    far, alike = pair_tables.spaces_of(pairs.assign(agreement=pairs["agreement"].mask(lost)), index)
    assert list(far.rows["model_id"]) == [f"r{i}@1" for i in range(6)]
    assert list(alike.rows["model_id"]) == [f"r{i}@1" for i in (0, 1, 2, 3, 5)]
    np.testing.assert_allclose(alike.unlike, between(points / 10)[np.ix_([0, 1, 2, 3, 5], [0, 1, 2, 3, 5])])
    with pytest.raises(NothingToDrawError, match="no three models"):
        pair_tables.spaces_of(pairs[:1], index)


def test_parents_are_a_factor_of_their_own():
    parents = ["p@1"] * 3 + ["q@1"] * 3
    _, rows = zoo_of(np.zeros((6, 1)), np.zeros((6, 1)), parents, regime=["a"] * 3 + ["b"] * 3, lr=[1, 2, 1, 1, 2, 1])
    levels = pair_tables.levels_and_parent(rows)
    assert list(levels) == ["regime", "lr", "parent"]
    strata = pair_tables.strata_of(rows, "regime")
    assert strata.tolist() == [0, 0, 0, 1, 1, 1]
    assert not pair_tables.strata_of(rows, "parent").any()
    assert [pair_tables.varies_within(level, strata) for level in levels.values()] == [False, True, False]
    assert not pair_tables.varies_within(levels["lr"], np.zeros(6, np.int64))
    orphans = rows.assign(parent_id=None)
    assert "parent" not in pair_tables.levels_and_parent(orphans)
    assert not pair_tables.strata_of(orphans).any()
    assert "parent" not in pair_tables.levels_and_parent(rows.assign(parent_id=[f"{i}@1" for i in range(6)]))
    assert isinstance(levels["parent"].dtype, pd.CategoricalDtype)
