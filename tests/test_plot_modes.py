"""The plane of a population: distances come back, groups score as in scikit-learn, models without pairs go."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import silhouette_score

from vitzoo_hf import plot_modes
from vitzoo_hf.factors import NothingToDrawError
from vitzoo_hf.schema import ZooError


def between(points):
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def zoo_of(points, behaviour, **factors):
    """Tables of models at given places in weight space, whose disagreement is the distance of `behaviour`."""
    names = [f"r{i}@1" for i in range(len(points))]
    fixed = {"model_id": names, "parent_id": "p@1", "stage": "finetune", "is_final": True, "head": "linear"}
    index = pd.DataFrame(fixed | {f"factor_{name}": values for name, values in factors.items()})
    far, unlike = between(points), between(behaviour)
    rows = [
        {"model_a": names[i], "model_b": names[j], "weight_l2": far[i, j], "agreement": 1 - unlike[i, j]}
        for i, j in itertools.combinations(range(len(points)), 2)
    ]
    return pd.DataFrame(rows), index


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(0, 10**6))
def test_points_of_a_plane_give_back_their_distances(size, seed):
    distances = between(np.random.default_rng(seed).normal(size=(size, 2)))
    points, share = plot_modes.classical_mds(distances)
    np.testing.assert_allclose(between(points), distances, atol=1e-9)
    assert share == pytest.approx(1)
    again, _ = plot_modes.classical_mds(3 * distances)
    np.testing.assert_allclose(again, 3 * points, atol=1e-8)


def test_more_dimensions_than_two_give_the_principal_components():
    data = np.random.default_rng(0).normal(size=(30, 6)) * [5, 3, 1, 1, 1, 1]
    points, share = plot_modes.classical_mds(between(data))
    centred = data - data.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(left[:, :2] * singular[:2]), atol=1e-9)
    assert share == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum())


def test_equal_models_lie_on_one_point():
    points, share = plot_modes.classical_mds(np.zeros((4, 4)))
    assert not points.any()
    assert math.isnan(share)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 30), st.integers(2, 3), st.integers(0, 10**6))
def test_silhouette_is_that_of_scikit_learn(size, groups, seed):
    rng = np.random.default_rng(seed)
    distances = between(rng.normal(size=(size, 3)))
    codes = np.concatenate([np.arange(groups), rng.integers(0, groups, size - groups)])
    expected = silhouette_score(distances, codes, metric="precomputed")
    assert plot_modes.silhouette(distances, codes) == pytest.approx(expected, abs=1e-12)


def test_the_factor_that_makes_the_modes_is_found_in_each_space():
    rng = np.random.default_rng(1)
    a, b = np.repeat([0, 1], 12), np.tile([0, 1], 12)
    far = np.stack([10.0 * a, rng.normal(size=24)], 1)
    unlike = np.stack([0.4 * b, rng.normal(0, 0.01, size=24)], 1)
    pairs, index = zoo_of(far, unlike, a=a, b=b, c=rng.permutation(a))
    table = plot_modes.modes_table(pairs, index)
    assert set(table["weight_l2_factor"]) == {"a"}
    assert set(table["disagreement_factor"]) == {"b"}
    np.testing.assert_allclose(between(table[["weight_l2_x", "weight_l2_y"]].to_numpy()), between(far), atol=1e-9)
    scores = plot_modes.separation_table(pairs, index).set_index(["space", "factor"])
    assert scores.loc[("weight_l2", "a"), "silhouette"] > 0.7 > scores.loc[("weight_l2", "a"), "chance_95"]
    assert scores.loc[("weight_l2", "b"), "silhouette"] < scores.loc[("weight_l2", "b"), "chance_95"]
    assert abs(scores["chance"]).max() < 0.1
    plot_modes.modes(table).draw_without_rendering()
    shuffled = plot_modes.separation_table(pairs.sample(frac=1, random_state=0), index).set_index(["space", "factor"])
    pd.testing.assert_frame_equal(shuffled, scores)


def test_a_model_without_pairs_is_left_out_of_its_space():
    points = np.random.default_rng(2).normal(size=(6, 2))
    pairs, index = zoo_of(points, points / 10, a=[1, 1, 1, 2, 2, 2])
    lacking = (pairs["model_a"] == "r2@1") | (pairs["model_b"] == "r2@1")
    pairs["agreement"] = pairs["agreement"].mask(lacking)
    table = plot_modes.modes_table(pairs, index).set_index("model_id")
    assert list(table.index[table["disagreement_x"].isna()]) == ["r2@1"]
    assert table["weight_l2_x"].notna().all()
    plot_modes.modes(table.reset_index()).draw_without_rendering()
    one_space = plot_modes.modes_table(pairs.assign(agreement=np.nan), index)
    assert not [name for name in one_space if name.startswith("disagreement")]
    assert len(plot_modes.modes(one_space).axes) == 1


def test_no_factor_that_varies_and_too_few_models():
    points = np.random.default_rng(3).normal(size=(5, 2))
    pairs, index = zoo_of(points, points / 10)
    table = plot_modes.modes_table(pairs, index)
    assert table["weight_l2_factor"].isna().all()
    assert plot_modes.separation_table(pairs, index).empty
    plot_modes.modes(table).draw_without_rendering()
    with pytest.raises(NothingToDrawError, match="no three models"):
        plot_modes.modes_table(pairs[:1], index)
    with pytest.raises(ZooError, match=r"^table 'pairs' has no column 'weight_l2'"):
        plot_modes.modes_table(pairs.drop(columns="weight_l2"), index)


def test_pre_trained_models_are_shown_only_where_none_is_fine_tuned():
    points = np.random.default_rng(4).normal(size=(6, 2))
    pairs, index = zoo_of(points, points / 10)
    some = index.assign(stage=["pretrain"] * 2 + ["finetune"] * 4)
    assert list(plot_modes.modes_table(pairs, some)["model_id"]) == [f"r{i}@1" for i in range(2, 6)]
    assert len(plot_modes.modes_table(pairs, index.assign(stage="pretrain"))) == 6
