"""The plane of a population: the factor that makes the modes is found, models without pairs go."""

import numpy as np
import pytest
from pair_zoo import between, zoo_of

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.report import plot_factors as plot_modes
from vitzoo_hf.report.factors import NothingToDrawError


def test_the_factor_that_makes_the_modes_is_found_in_each_space():
    rng = np.random.default_rng(1)
    a, b = np.repeat([0, 1], 12), np.tile([0, 1], 12)
    far = np.stack([10.0 * a, rng.normal(size=24)], 1)
    unlike = np.stack([0.4 * b, rng.normal(0, 0.01, size=24)], 1)
    pairs, index = zoo_of(far, unlike, a=a, b=b, c=rng.permutation(a))
    table = plot_modes.modes_table(pairs, index)
    assert set(table["weight_l2_factor"]) == {"a"}
    assert set(table["agreement_factor"]) == {"b"}
    np.testing.assert_allclose(between(table[["weight_l2_x", "weight_l2_y"]].to_numpy()), between(far), atol=1e-9)
    plot_modes.modes(table).draw_without_rendering()


def test_a_model_without_pairs_is_left_out_of_its_space():
    points = np.random.default_rng(2).normal(size=(6, 2))
    pairs, index = zoo_of(points, points / 10, a=[1, 1, 1, 2, 2, 2])
    lacking = (pairs["model_a"] == "r2@1") | (pairs["model_b"] == "r2@1")
    pairs["agreement"] = pairs["agreement"].mask(lacking)
    table = plot_modes.modes_table(pairs, index).set_index("model_id")
    assert list(table.index[table["agreement_x"].isna()]) == ["r2@1"]
    assert table["weight_l2_x"].notna().all()
    plot_modes.modes(table.reset_index()).draw_without_rendering()
    one_space = plot_modes.modes_table(pairs.assign(agreement=np.nan), index)
    assert not [name for name in one_space if name.startswith("agreement")]
    assert len(plot_modes.modes(one_space).axes) == 1


def test_no_factor_that_varies_and_too_few_models():
    points = np.random.default_rng(3).normal(size=(5, 2))
    pairs, index = zoo_of(points, points / 10)
    table = plot_modes.modes_table(pairs, index)
    assert table["weight_l2_factor"].isna().all()
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
