"""Properties across splits: nothing leaks, shuffled labels stay at chance, and the whole fold is scikit-learn's."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from peak_memory import peak_mb
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vitzoo_hf.apply.properties import properties
from vitzoo_hf.apply.properties.features import table_features
from vitzoo_hf.apply.properties.models import SHARES
from vitzoo_hf.apply.properties.plot import plot_properties
from vitzoo_hf.apply.properties.properties import FEATURES, Plan, cross_validated, features_of, predict_properties
from vitzoo_hf.apply.properties.targets import predicted_models, targets_of
from vitzoo_hf.cli.app import run
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

PARENTS, RUNS, EPOCHS = 8, 10, (0, 2)


@pytest.fixture
def models():
    """A made-up population: accuracy is a sum of what the run, the lineage and the epoch add."""
    random = np.random.default_rng(0)
    of_parent, of_run = random.normal(size=PARENTS), random.normal(size=(PARENTS, RUNS))
    rows = [
        {
            "model_id": f"p{parent}--r{run}@{epoch}",
            "run_id": f"p{parent}--r{run}",
            "lineage": f"p{parent}",
            "epoch": epoch,
            "is_final": epoch == EPOCHS[-1],
            "factor_regime": ["sl", "cl"][parent % 2],
            "factor_optimizer": ["adamw", "sgd"][int(of_run[parent, run] > 0)],
            "test_accuracy": of_parent[parent] + of_run[parent, run] + epoch,
            "generalization_gap": random.normal(),
            "train_loss": 0.5,
            "train_accuracy": 0.5,
        }
        for parent in range(PARENTS)
        for run in range(RUNS)
        for epoch in EPOCHS
    ]
    return pd.DataFrame(rows)


def features_from(table, name="made", **columns):
    columns = {name: np.asarray(values) for name, values in columns.items()}
    return table_features(name, pd.DataFrame(columns, index=table["model_id"]))


def predict(table, *, features, targets=None, models=("ridge",), splits=("run",), **plan):
    plan = Plan(**({"repeats": 1, "shuffles": 0, "resamples": 20} | plan))
    return cross_validated(table, targets_of(table, targets), features, plan, models=models, splits=splits)


def log_of(table, name, *columns):
    return table_features(name, table.set_index("model_id")[list(columns)].astype(float))


def value(found, metric="r2", **where):
    rows = found[found["metric"] == metric]
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    assert len(rows) == 1
    return rows.iloc[0]


def folds_of(table):
    seed = int(np.random.default_rng([0, 0]).integers(2**31))
    return GroupKFold(5, shuffle=True, random_state=seed).split(table, groups=table["run_id"])


def scaled_ridge(values, target, share):
    scaler = StandardScaler().fit(values)
    alpha = share * np.linalg.norm(scaler.transform(values), 2) ** 2
    return make_pipeline(scaler, Ridge(alpha=alpha, solver="svd")).fit(values, target)


def test_the_whole_way_is_what_scikit_learn_gives(models):
    """Nested cross-validation again, by scikit-learn's own estimators, one fold and one penalty at a time."""
    random = np.random.default_rng(1)
    final = models[models["is_final"]].reset_index(drop=True)
    target = final["test_accuracy"].to_numpy()
    values = np.c_[target + random.normal(size=len(final)), random.normal(size=(len(final), 30))]
    given = table_features("made", pd.DataFrame(values, index=final["model_id"]).add_prefix("z"))
    row = value(predict(final, features=[given], targets=["test_accuracy"]))
    guess = np.empty(len(final))
    for train, test in folds_of(final):
        scaled = StandardScaler().fit_transform(values[train])
        errors = np.zeros(len(SHARES))
        for learned, held in GroupKFold(4).split(scaled, groups=pd.factorize(final["run_id"])[0][train]):
            centred = scaled[learned] - scaled[learned].mean(0)
            for number, share in enumerate(SHARES):
                ridge = Ridge(alpha=share * np.linalg.norm(centred, 2) ** 2, solver="svd")
                made = ridge.fit(scaled[learned], target[train][learned]).predict(scaled[held])
                errors[number] += ((made - target[train][held]) ** 2).sum()
        guess[test] = scaled_ridge(values[train], target[train], SHARES[errors.argmin()]).predict(values[test])
    assert row["value"] == pytest.approx(r2_score(target, guess), abs=1e-9)
    assert 0.1 < row["value"] < 0.95


def test_constant_predictions_are_those_of_the_dummies(models):
    found = predict(models, features=[log_of(models, "constant")])
    final = models[models["is_final"]].reset_index(drop=True)
    mean, most = np.empty(len(final)), np.empty(len(final), dtype=object)
    for train, test in folds_of(final):
        mean[test] = DummyRegressor().fit(final.loc[train], final["test_accuracy"][train]).predict(final.loc[test])
        labels = final["factor_optimizer"][train]
        most[test] = DummyClassifier(strategy="most_frequent").fit(final.loc[train], labels).predict(final.loc[test])
    row = value(found, target="test_accuracy", rows="final")
    assert row["value"] == pytest.approx(r2_score(final["test_accuracy"], mean))
    row = value(found, "accuracy", target="factor_optimizer")
    assert row["value"] == pytest.approx((most == final["factor_optimizer"]).mean())


def test_what_is_known_is_predicted_and_what_is_shuffled_is_not(models):
    random = np.random.default_rng(1)
    given = features_from(models, signal=models["test_accuracy"], noise=random.normal(size=len(models)))
    found = predict(models, features=[given], shuffles=15, splits=["run", "lineage"])
    for split in ("run", "lineage"):
        row = value(found, target="test_accuracy", rows="final", split=split)
        assert row["value"] > 0.999
        assert row["shuffled_high"] < 0.2
        assert row["shuffled_low"] <= row["shuffled"] <= row["shuffled_high"]
        assert row["low"] <= row["value"] <= row["high"] + 1e-12
        row = value(found, target="generalization_gap", rows="all", split=split)
        assert row["value"] < 0.1
        assert value(found, "accuracy", target="factor_optimizer", split=split)["value"] > 0.7


def test_shuffled_accuracies_keep_what_the_epoch_tells(models):
    found = predict(models, features=[log_of(models, "epoch", "epoch")], shuffles=10)
    row = value(found, target="test_accuracy", rows="all")
    assert row["value"] > 0.2
    assert row["shuffled"] == pytest.approx(row["value"], abs=0.05)
    assert not (found["target"] == "epoch").any()


def test_what_tells_the_parent_helps_by_run_and_not_by_lineage(models):
    """The trap: the identity of the parent predicts anything that is the same in a lineage, shuffled or not."""
    identity = np.eye(PARENTS)[models["lineage"].str[1:].astype(int)]
    given = features_from(models, **{f"p{number}": identity[:, number] for number in range(PARENTS)})
    found = predict(models, features=[given], shuffles=10, splits=["run", "lineage"], targets=["factor_regime"])
    by_run = value(found, "accuracy", split="run")
    assert by_run["value"] == by_run["shuffled_low"] == 1
    assert value(found, "accuracy", split="lineage")["value"] <= 0.6


def test_no_group_is_on_both_sides(models, monkeypatch):
    seen = []
    original = properties.prepare

    def watched(train, test, components):
        seen.append((set(train[:, 0].tolist()), set(test[:, 0].tolist())))
        return original(train, test, components)

    monkeypatch.setattr(properties, "prepare", watched)
    for split, column in (("run", "run_id"), ("lineage", "lineage")):
        seen.clear()
        given = features_from(models, group=pd.factorize(models[column])[0].astype(float))
        found = predict(models, features=[given], splits=[split], targets=["test_accuracy"], repeats=2)
        assert len(seen) == 2 * 2 * 5
        assert all(not train & test for train, test in seen)
        assert set(found["n_groups"]) == {models[column].nunique()}


def test_order_of_rows_and_units_change_nothing(models):
    random = np.random.default_rng(1)
    given = features_from(
        models, a=models["test_accuracy"] + random.normal(size=len(models)), b=random.normal(size=len(models))
    )
    scaled = table_features("made", pd.DataFrame(given.values[::-1] * 50 + 3, given.model_ids[::-1], given.names))
    one, other = (predict(models, features=[each], shuffles=2) for each in (given, scaled))
    pd.testing.assert_frame_equal(one, other, rtol=1e-6)


def test_repeats_have_other_folds_and_the_seed_decides(models):
    given = features_from(models, a=models["test_accuracy"] + np.random.default_rng(1).normal(size=len(models)))
    options = {"features": [given], "targets": ["test_accuracy"], "shuffles": 2}
    first, again, other = (predict(models, seed=seed, repeats=2, **options) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not first["value"].equals(other["value"])


def test_trees_take_the_same_way(models):
    given = features_from(models, a=models["test_accuracy"])
    final = models[models["is_final"]]
    found = predict(final, features=[given], models=["hist_gradient_boosting"], shuffles=1)
    assert value(found, target="test_accuracy")["value"] > 0.8
    assert value(found, "balanced_accuracy", target="factor_optimizer")["value"] > 0.6


def test_a_zoo_of_one_lineage_has_no_split_by_lineage(models):
    one = models[models["lineage"] == "p0"]
    given = features_from(one, a=one["test_accuracy"])
    found = predict(one, features=[given], splits=["run", "lineage"])
    assert set(found["split"]) == {"run"}
    with pytest.raises(ZooError, match="no target is in two groups"):
        predict(one, features=[given], splits=["lineage"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"features": ["statistic"]}, "unknown features 'statistic'"),
        ({"models": ["forest"]}, "unknown model 'forest'"),
        ({"splits": ["row"]}, "unknown split 'row'"),
        ({"targets": ["accuracy"]}, "unknown target 'accuracy'"),
        ({"repeats": 0}, "repeats is 0"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0"),
    ],
)
def test_names_are_checked(options, told):
    with pytest.raises(ZooError, match=told):
        predict_properties(Zoo.sample(), **({"features": ["constant"]} | options))


def test_a_split_by_lineage_that_is_one_by_run_is_left_out_or_refused(models):
    alone = models.assign(lineage=models["run_id"])
    given = features_from(alone, a=alone["test_accuracy"])
    found = predict(alone, features=[given], targets=["test_accuracy"], splits=["run", "lineage"])
    assert set(found["split"]) == {"run"}
    assert "split lineage equals split run and is left out" in found.attrs["notes"][0]
    with pytest.raises(ZooError, match="split lineage equals split run: ask for split run"):
        predict(alone, features=[given], splits=["lineage"])


def test_a_control_that_cannot_be_is_missing(models):
    own = models.assign(epoch=models["epoch"] + 10 * pd.factorize(models["run_id"])[0])
    given = features_from(own, a=own["test_accuracy"])
    found = predict(own, features=[given], targets=["test_accuracy"], shuffles=3)
    by_rows = found[found["metric"] == "r2"].set_index("rows")["shuffled"]
    assert np.isnan(by_rows["all"])
    assert np.isfinite(by_rows["final"])
    assert found.attrs["notes"] == [
        "test_accuracy of all rows has no shuffled control: no two runs are kept at the same epochs"
    ]


def test_two_runs_are_too_few_for_ridge(capsys):
    runs = "sl-s42--adamw-lr0.001-linear-s6312,sl-s42--sgd-lr0.001-linear-s6312"
    assert run(["properties", "sample", "--where", f"run_id={runs}", "--features", "norm", "--quiet"]) == 1
    assert "at least three runs are needed, here two" in capsys.readouterr().err


def test_features_are_checked_before_any_is_taken(tiny_zoo, monkeypatch):
    def taken(*args, **options):
        raise AssertionError("taken before the check")

    monkeypatch.setitem(properties.WEIGHT_FEATURES, "norm", taken)
    zoo = Zoo(tiny_zoo)
    short = table_features("embedding", pd.DataFrame({"z": [1.0]}, index=["nobody@1"]))
    with pytest.raises(ZooError, match=r"features 'embedding' lack .* models"):
        predict_properties(zoo, features=["norm", short])
    with pytest.raises(ZooError, match="unknown features 'spectre'"):
        predict_properties(zoo, features=["norm", "spectre"])
    monkeypatch.setattr(zoo._tables, "read", lambda *args: None)
    with pytest.raises(ZooError, match=r"carries no selection images .* none: leave out features probing_16, which"):
        predict_properties(zoo, features=["norm", "probing_16"])


def test_a_log_with_holes_is_refused(models):
    with pytest.raises(ZooError, match="'train_loss' has no value for some models"):
        features_of(Zoo.sample(), models.assign(train_loss=np.nan), "training_log")


def test_every_kind_of_features_of_a_real_zoo(tiny_zoo):
    found = predict_properties(
        Zoo(tiny_zoo), repeats=1, shuffles=2, resamples=5, features=[*FEATURES[:-3], "probing_16"]
    )
    assert set(found["features"]) == {*FEATURES[:-3], "probing_16"}
    assert set(found["target"]) >= {"test_accuracy", "epoch", "factor_optimizer", "factor_head"}
    numbers = found[["value", "shuffled", "n_train", "n_test", "num_features"]].to_numpy(float)
    assert np.isfinite(numbers).all()
    assert (found["n_train"] < found["n_test"]).all()
    before = predicted_models(Zoo(tiny_zoo))[1]
    assert found.loc[found["rows"] == "final", "n_test"].max() == before["is_final"].sum()


def test_figure_has_a_panel_a_target(models):
    given = features_from(models, a=models["test_accuracy"])
    table = predict(models, features=[log_of(models, "constant"), given], shuffles=2, splits=["run", "lineage"])
    figure = plot_properties(table)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == len(table[["target", "rows"]].drop_duplicates())
    assert [label.get_text() for label in shown[0].get_yticklabels()] == ["constant", "made"]
    with pytest.raises(ZooError, match="has no column 'shuffled_low'"):
        plot_properties(table.drop(columns="shuffled_low"))


SMALL = ["properties", "sample", "--features", "norm", "--split", "run", "--repeats", "1", "--shuffles", "2"]


def test_verb_writes_table_and_figure(tmp_path, capsys):
    embedding = tmp_path / "z.csv"
    pd.DataFrame({"model_id": Zoo.sample().model_ids, "z0": range(8)}).to_csv(embedding, index=False)
    status = run(
        [*SMALL, "--embedding", str(embedding), "--targets", "test_accuracy", "--out", str(tmp_path), "--quiet"]
    )
    assert status == 0
    table = pd.read_csv(tmp_path / "properties.csv")
    assert set(table["features"]) == {"norm", "embedding"}
    assert (tmp_path / "properties.png").stat().st_size > 10_000
    assert re.search(r"6 rows and the figure in", capsys.readouterr().out)


def test_verb_prints_json_or_a_mistake(tmp_path, capsys):
    assert run([*SMALL, "--targets", "test_accuracy", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["metric"] for row in rows] == ["r2", "kendall_tau", "mae"]
    assert run([*SMALL, "--embedding", str(tmp_path / "gone.csv")]) == 1
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "z.csv").write_text("a,b\n1,2\n")
    assert run([*SMALL, "--embedding", str(tmp_path / "z.csv")]) == 1
    assert "has no column model_id" in capsys.readouterr().err


PROGRAM = """
import sys
from pathlib import Path
import side_by_side
from vitzoo_hf.apply.properties.features import WEIGHT_FEATURES
from vitzoo_hf.zoo import Zoo

folder = side_by_side.random_zoo(Path(sys.argv[1]), side_by_side.VIT_S, 20)
for make in WEIGHT_FEATURES.values():
    assert len(make(Zoo(folder)).values) == 20
"""


@pytest.mark.slow
def test_twenty_large_models_take_less_than_four_gigabytes(tmp_path):
    assert peak_mb(PROGRAM, tmp_path, tmp_path / "zoo") < 4000
