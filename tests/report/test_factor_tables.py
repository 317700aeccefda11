"""Tables of factors: what a zoo was built with comes out, parents are no repetitions, pairs are counted."""

import itertools

import numpy as np
import pandas as pd
import pytest
from pair_zoo import zoo_of

from vitzoo_hf.report import factor_tables
from vitzoo_hf.report.factors import NothingToDrawError


@pytest.fixture(scope="module")
def zoo():
    """Six parents of two regimes, each with four models: weights lie by parent, behaviour by learning rate."""
    rng = np.random.default_rng(0)
    parent, lr = np.repeat(np.arange(6), 4), np.tile([1, 1, 2, 2], 6)
    seed, regime = np.tile([1, 2], 12), parent % 2
    weights = 10 * rng.normal(size=(6, 5))[parent] + rng.normal(size=(24, 5))
    behaviour = np.stack([0.3 * lr, rng.normal(0, 0.02, 24)], 1)
    names = [f"p{i}@1" for i in parent]
    pairs, index = zoo_of(weights, behaviour, names, lr=lr, seed=seed, regime=regime)
    accuracy = 0.5 + 0.2 * lr + 0.1 * regime + rng.normal(0, 0.02, 24)
    models = index.assign(test_accuracy=accuracy, generalization_gap=0.05 * seed + rng.normal(0, 0.01, 24))
    return models, index, pairs


@pytest.fixture(scope="module")
def shares(zoo):
    return factor_tables.variance_table(*zoo)


def test_a_row_a_measure_and_factor_and_one_for_all(shares):
    measures = ["test_accuracy", "generalization_gap", "weight_l2", "agreement"]
    assert list(dict.fromkeys(shares["measure"])) == measures
    assert set(shares["factor"]) == {"lr", "seed", "regime", "parent", "all, additive"}
    assert len(shares) == 20
    assert list(shares.columns) == list(factor_tables.VARIANCE)
    assert (shares.groupby("measure")["factor"].last() == "all, additive").all()


def test_the_shares_are_anova_s_and_permanova_s(zoo, shares):
    models, _, pairs = zoo
    found = shares.set_index(["measure", "factor"])["share"]
    for value, factor in itertools.product(("test_accuracy", "generalization_gap"), ("lr", "seed", "regime")):
        y, levels = models[value], models[f"factor_{factor}"]
        between = y.groupby(levels).transform("mean")
        expected = between.var() / y.var()
        assert found[(value, factor)] == pytest.approx(expected, abs=1e-9)
    level = models.set_index("model_id")["factor_lr"]
    same = pairs["model_a"].map(level) == pairs["model_b"].map(level)
    for metric, squared in (("weight_l2", pairs["weight_l2"] ** 2), ("agreement", 2 * (1 - pairs["agreement"]))):
        assert found[(metric, "lr")] == pytest.approx(1 - squared[same].sum() / 12 / (squared.sum() / 24), abs=1e-9)


def test_what_shaped_the_zoo_is_told_from_chance(shares):
    p = shares.set_index(["measure", "factor"])["p"]
    strong = [("test_accuracy", "lr"), ("generalization_gap", "seed")]
    strong += [("weight_l2", "parent"), ("agreement", "lr"), ("weight_l2", "all, additive")]
    weak = [("test_accuracy", "seed"), ("generalization_gap", "lr"), ("weight_l2", "regime"), ("agreement", "parent")]
    assert p[strong].max() <= 0.01
    assert p[("test_accuracy", "regime")] == pytest.approx(2 / 20, abs=0.03)  # the least of six parents
    assert p[weak].min() > 0.1
    chance = shares[shares["factor"] == "lr"].set_index("measure")["chance"]
    assert chance["test_accuracy"] == pytest.approx(1 / 23, abs=0.02)


def test_parents_are_the_repetitions_of_what_they_have_in_common(shares):
    permuted = shares[shares["measure"] == "weight_l2"].set_index("factor")["permuted"]
    expected = {"lr": "models within a parent", "seed": "models within a parent", "regime": "6 parents"}
    assert permuted.to_dict() == expected | {"parent": "models", "all, additive": "models"}
    least = shares[shares["measure"] == "weight_l2"].set_index("factor")["least_p"]
    assert least["regime"] == pytest.approx(2 / 20, abs=0.03)
    assert least["lr"] == pytest.approx(0.001, abs=0.001)


def test_what_only_a_factor_explains(zoo, shares):
    unique = shares[shares["measure"] == "test_accuracy"].set_index("factor")["unique"]
    share = shares[shares["measure"] == "test_accuracy"].set_index("factor")["share"]
    assert unique["regime"] == pytest.approx(0, abs=1e-9)  # parents tell it too
    assert unique["lr"] == pytest.approx(share["lr"], abs=1e-9)  # the grid is balanced
    models, index, pairs = zoo
    two = [table[table["parent_id"].isin(["p0@1", "p1@1"])].reset_index(drop=True) for table in (models, index)]
    some = factor_tables.variance_table(*two, pairs[:0]).set_index(["measure", "factor"])
    assert some.loc[("test_accuracy", "regime"), "unique"] == pytest.approx(
        some.loc[("test_accuracy", "parent"), "share"], abs=1e-9
    )
    assert some.loc[("test_accuracy", "regime"), "least_p"] == 1


def test_a_fit_with_a_parameter_a_model_is_no_evidence():
    models = pd.DataFrame({"model_id": [f"r{i}@1" for i in range(4)], "stage": "finetune", "is_final": True})
    models = models.assign(factor_a=[1, 1, 2, 3], factor_b=[1, 2, 2, 2], test_accuracy=[0.1, 0.5, 0.3, 0.9])
    table = factor_tables.variance_table(models, pd.DataFrame(), pd.DataFrame()).set_index("factor")
    assert table.loc["all, additive", ["share", "p", "least_p"]].tolist() == pytest.approx([1, 1, 1])
    alike = factor_tables.variance_table(models.assign(test_accuracy=0.5), pd.DataFrame(), pd.DataFrame())
    assert alike[["share", "p"]].isna().all(axis=None)
    with pytest.raises(NothingToDrawError, match="no factor varies"):
        factor_tables.variance_table(models.drop(columns=["factor_a", "factor_b"]), pd.DataFrame(), pd.DataFrame())


def test_groups_that_lie_apart_are_told_from_permuted_ones(zoo):
    _, index, pairs = zoo
    scores = factor_tables.separation_table(pairs, index)
    assert list(scores.columns) == list(factor_tables.SEPARATION)
    found = scores.set_index(["space", "factor"])
    assert found.loc[("weight_l2", "parent"), "silhouette"] > 0.5 > found.loc[("weight_l2", "parent"), "chance_95"]
    assert found.loc[("agreement", "lr"), "p"] == 1 / (1 + factor_tables.SILHOUETTES)
    assert found.loc[("weight_l2", "seed"), "p"] > 0.05
    assert (found["chance_5"] <= found["chance"]).all()
    assert (scores.groupby("space")["silhouette"].diff().dropna() <= 0).all()
    shuffled = factor_tables.separation_table(pairs.sample(frac=1, random_state=0), index)
    pd.testing.assert_frame_equal(shuffled, scores)
    with pytest.raises(NothingToDrawError, match="no factor varies"):
        factor_tables.separation_table(pairs, index[["model_id", "parent_id", "stage"]].assign(parent_id="p@1"))


def test_pairs_of_a_level_are_compared_where_nothing_else_differs_by_design(zoo):
    _, index, pairs = zoo
    table = factor_tables.level_pairs_table(pairs, index)
    among = table.drop_duplicates("factor").set_index("factor")["among"].to_dict()
    assert among == {"lr": "one parent", "seed": "one parent", "regime": "two parents", "parent": "all"}
    found = table[table["metric"] == "weight_l2"].set_index(["factor", "same_level"])
    assert found.loc[("lr", True), "pairs"] == 6 * 2
    assert found.loc[("lr", False), "pairs"] == 6 * 4
    assert found.loc[("regime", True), "pairs"] == 2 * 3 * 16
    assert found.loc[("parent", True), "pairs"] == 6 * 6
    rows = index.set_index("model_id")
    a, b = rows.loc[pairs["model_a"]], rows.loc[pairs["model_b"]]
    siblings = a["parent_id"].to_numpy() == b["parent_id"].to_numpy()
    same = a["factor_lr"].to_numpy() == b["factor_lr"].to_numpy()
    assert found.loc[("lr", True), "median"] == pairs["weight_l2"][siblings & same].median()
    assert found.loc[("parent", False), "q95"] == pairs["weight_l2"][~siblings].quantile(0.95)
    missing = factor_tables.level_pairs_table(pairs.assign(agreement=np.nan), index)
    assert set(missing["metric"]) == {"weight_l2"}
    with pytest.raises(NothingToDrawError):
        factor_tables.level_pairs_table(pairs.assign(agreement=np.nan, weight_l2=np.nan), index)
