"""Which models stay together, what is predicted of them, and what a shuffle keeps."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitzoo_hf.apply.properties import targets as property_targets
from vitzoo_hf.apply.properties.targets import (
    Target,
    column_of,
    lineages,
    predictable,
    predicted_models,
    shuffled,
    targets_of,
)
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

PARENTS, RUNS, EPOCHS = 4, 6, (0, 1, 5)


def table_of(parents=PARENTS, runs=RUNS, epochs=EPOCHS):
    random = np.random.default_rng(0)
    rows = [
        {
            "model_id": f"p{parent}--r{run}@{epoch}",
            "run_id": f"p{parent}--r{run}",
            "lineage": f"p{parent}",
            "epoch": epoch,
            "is_final": epoch == epochs[-1],
            "factor_regime": ["sl", "cl"][parent % 2],
            "factor_lr": [1e-3, 1e-2, 1e-1][run % 3],
            "factor_only_here": "a" if parent == 0 else "b",
            "factor_constant": 1,
            "test_accuracy": random.uniform() + epoch,
            "generalization_gap": random.uniform(),
        }
        for parent in range(parents)
        for run in range(runs)
        for epoch in epochs
    ]
    return pd.DataFrame(rows)


def target_of(table, name, rows="final"):
    return next(target for target in targets_of(table) if (target.name, target.rows) == (name, rows))


def test_grandchildren_belong_to_the_root():
    index = pd.DataFrame({"run_id": ["c", "a", "b", "b", "d"], "parent_id": ["b@2", None, "a@1", "a@1", "gone@3"]})
    assert lineages(index) == ["a", "a", "a", "a", "gone"]
    with pytest.raises(ZooError, match="descends from itself"):
        lineages(pd.DataFrame({"run_id": ["a", "b"], "parent_id": ["b@1", "a@1"]}))


def test_parents_of_equal_initial_weights_are_one_lineage():
    index = pd.DataFrame(
        {
            "run_id": ["a", "b", "c", "a1", "b1", "c1"],
            "parent_id": [None, None, None, "a@9", "b@9", "c@9"],
            "epoch": [0, 0, 0, 0, 0, 0],
            "weights_sha256": ["same", "same", "other", "x", "y", "z"],
        }
    )
    assert lineages(index) == ["a", "a", "c", "a", "a", "c"]
    assert lineages(index.assign(epoch=1)) == ["a", "b", "c", "a", "b", "c"]


def test_lineages_of_a_filtered_zoo_are_those_of_the_whole_one(tiny_zoo, monkeypatch):
    whole = Zoo(tiny_zoo).to_pandas()
    parents = sorted(set(whole.loc[whole["stage"] == "pretrain", "run_id"]))
    monkeypatch.setattr(
        property_targets,
        "_first_of_equal_starts",
        lambda index, roots: dict.fromkeys(parents, "one") if len(index) == len(whole) else {},
    )
    assert set(predicted_models(Zoo(tiny_zoo).filter(is_final=True, stage="finetune"))[1]["lineage"]) == {"one"}


def test_models_of_the_common_dataset_that_classify_are_predicted(tiny_zoo):
    zoo = Zoo(tiny_zoo)
    models, table = predicted_models(zoo)
    assert list(table["model_id"]) == models.model_ids
    index = zoo.to_pandas().set_index("model_id")
    left_out = set(zoo.model_ids) - set(models.model_ids)
    assert left_out
    assert set(index.loc[list(left_out), "factor_regime"]) == {"contrastive"}
    for run, lineage in zip(table["run_id"], table["lineage"], strict=True):
        assert run.split("--")[0] == lineage
    with pytest.raises(ZooError, match="filter matches none"):
        predicted_models(zoo.filter(epoch=99))


def test_targets_are_what_varies():
    found = [(target.name, target.rows) for target in targets_of(table_of())]
    both = [(name, rows) for name in ("test_accuracy", "generalization_gap") for rows in ("all", "final")]
    factors = [(f"factor_{name}", "final") for name in ("regime", "lr", "only_here")]
    assert found == [*both, ("epoch", "all"), *factors]
    assert target_of(table_of(), "factor_lr").classes == ("0.001", "0.01", "0.1")
    with pytest.raises(ZooError, match="unknown target 'factor_rl'"):
        targets_of(table_of(), ["factor_rl"])
    with pytest.raises(ZooError, match="does not vary"):
        targets_of(table_of(), ["factor_constant"])


def test_zoos_of_final_models_have_no_other_rows():
    table = table_of(epochs=(5,))
    assert {target.rows for target in targets_of(table)} == {"final"}


def test_rows_without_a_value_are_left_out():
    table = table_of()
    table.loc[table["run_id"] == "p0--r0", "test_accuracy"] = np.nan
    target = target_of(table, "test_accuracy", "all")
    assert len(target.places) == len(table) - len(EPOCHS)
    assert np.isfinite(target.values).all()


def test_many_numbers_are_no_classes():
    table = table_of(parents=8).assign(factor_width=lambda table: pd.factorize(table["run_id"])[0] + 0.5)
    target = target_of(table, "factor_width")
    assert target.classes == ()
    assert target.values.max() == 47.5


def test_a_class_of_one_lineage_cannot_be_predicted_across_lineages():
    table = table_of()
    target = target_of(table, "factor_only_here")
    assert predictable(target, table, "run") is not None
    assert predictable(target, table, "lineage") is None
    seeds = table.assign(factor_parent=table["lineage"].map({"p0": 1, "p1": 2, "p2": 1, "p3": 3}))
    kept = predictable(target_of(seeds, "factor_parent"), seeds, "lineage")
    assert kept is None
    seeds["factor_parent"] = seeds["lineage"].map({"p0": 7, "p1": 5, "p2": 7, "p3": 5})
    seeds.loc[seeds["run_id"] == "p0--r0", "factor_parent"] = 9
    seeds.loc[seeds["run_id"] == "p0--r1", "factor_parent"] = 9
    kept = predictable(target_of(seeds, "factor_parent"), seeds, "lineage")
    assert kept.classes == ("5", "7")
    assert len(kept.places) == PARENTS * RUNS - 2
    told = seeds["factor_parent"].iloc[kept.places].to_numpy()
    np.testing.assert_array_equal(np.array([5, 7])[kept.values.astype(int)], told)


def test_splits_have_names():
    assert column_of("run") == "run_id"
    with pytest.raises(ZooError, match="unknown split 'row'"):
        column_of("row")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_what_a_lineage_shares_moves_between_lineages(seed):
    table = table_of()
    fake = shuffled(target_of(table, "factor_regime"), table, seed)
    final = table[table["is_final"]]
    by_lineage = pd.Series(fake).groupby(final["lineage"].to_numpy())
    assert (by_lineage.nunique() == 1).all()
    assert sorted(by_lineage.first()) == [0, 0, 1, 1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_what_a_run_shares_moves_between_runs(seed):
    table = table_of()
    target = target_of(table, "factor_lr")
    fake = shuffled(target, table, seed)
    assert sorted(fake) == sorted(target.values)
    np.testing.assert_array_equal(fake, shuffled(target, table, seed))
    repeated = Target(
        "factor_lr", "all", np.arange(len(table)), np.repeat(target.values, len(EPOCHS)), target.classes
    )
    fake = shuffled(repeated, table, seed)
    assert (pd.Series(fake).groupby(table["run_id"]).nunique() == 1).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_accuracies_move_with_their_epochs(seed):
    table = table_of()
    other = table[table["run_id"] != "p1--r1"].iloc[:-2].sample(frac=1, random_state=0).reset_index(drop=True)
    target = target_of(other, "test_accuracy", "all")
    fake = shuffled(target, other, seed)
    for epoch in EPOCHS:
        here = (other["epoch"] == epoch).to_numpy()
        assert sorted(fake[here]) == sorted(target.values[here])
    source = dict(zip(target.values, other["run_id"], strict=True))
    given_to = other.assign(source=[source[value] for value in fake]).groupby("run_id")["source"]
    assert (given_to.nunique() == 1).all()
    short = (
        other.groupby("run_id").size().idxmin()
    )  # kept at fewer epochs than all others: it has nobody to swap with
    assert given_to.first()[short] == short


def test_runs_at_epochs_of_their_own_have_no_shuffled_accuracy():
    table = table_of()
    own = table.assign(epoch=table["epoch"] + 100 * pd.factorize(table["run_id"])[0])
    assert shuffled(target_of(own, "test_accuracy", "all"), own, 0) is None
    assert shuffled(target_of(own, "epoch", "all"), own, 0) is not None
    overlapping = table[~((table["epoch"] == 1) & (pd.factorize(table["run_id"])[0] > 0))].reset_index(drop=True)
    assert shuffled(target_of(overlapping, "test_accuracy", "all"), overlapping, 0) is not None


def test_epochs_move_within_runs():
    table = table_of()
    target = target_of(table, "epoch", "all")
    fake = pd.Series(shuffled(target, table, 0))
    assert fake.groupby(table["run_id"]).apply(sorted).map(tuple).unique().tolist() == [EPOCHS]
    assert not np.array_equal(fake, target.values)
