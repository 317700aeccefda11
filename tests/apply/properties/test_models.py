"""Ridge beside scikit-learn's, trees that fit, scores beside scikit-learn's."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import accuracy_score, balanced_accuracy_score, mean_absolute_error, r2_score
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vitzoo_hf.apply.properties import metrics as property_scores
from vitzoo_hf.apply.properties import models as property_models
from vitzoo_hf.apply.properties.models import prepare, ridge_path, ridge_predictions, tree_predictions
from vitzoo_hf.format.schema import ZooError


def data(seed, rows=40, columns=6):
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, columns)) * random.uniform(0.1, 10, columns) + random.normal(size=columns)
    return values, values @ random.normal(size=columns) + random.normal(size=rows)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 40), st.integers(1, 30), st.sampled_from([1e-6, 1e-3, 0.1, 1.0]))
def test_ridge_is_that_of_scikit_learn(seed, rows, columns, share):
    values, target = data(seed, rows + 5, columns)
    known, unknown = prepare(torch.from_numpy(values[:-5]), torch.from_numpy(values[-5:]), None)
    made = ridge_path(known, torch.from_numpy(target[:-5])[:, None], unknown, [share])[0, :, 0]
    scaler = StandardScaler().fit(values[:-5])
    scaled = scaler.transform(values[:-5])
    alpha = share * np.linalg.norm(scaled, 2) ** 2
    expected = Ridge(alpha=alpha, solver="svd").fit(scaled, target[:-5]).predict(scaler.transform(values[-5:]))
    np.testing.assert_allclose(made, expected, rtol=1e-6, atol=1e-6)


def test_classes_are_those_of_scikit_learns_ridge_classifier():
    values, _ = data(1, 60)
    classes = np.random.default_rng(2).integers(0, 3, 60)
    told = 2 * np.eye(3)[classes] - 1
    known, unknown = prepare(torch.from_numpy(values[:45]), torch.from_numpy(values[45:]), None)
    made = ridge_path(known, torch.from_numpy(told[:45]), unknown, [0.01])[0].argmax(1)
    scaler = StandardScaler().fit(values[:45])
    alpha = 0.01 * np.linalg.norm(scaler.transform(values[:45]), 2) ** 2
    oracle = RidgeClassifier(alpha=alpha, solver="svd").fit(scaler.transform(values[:45]), classes[:45])
    np.testing.assert_array_equal(made, oracle.predict(scaler.transform(values[45:])))


def test_the_penalty_is_that_of_scikit_learns_grid_search_over_groups():
    """Equal groups, so that squared errors of folds weigh the same in both."""
    values, target = data(3, 48)
    groups = np.repeat(np.arange(8), 6)
    train, test = np.arange(40), np.arange(40, 48)
    known, unknown = prepare(torch.from_numpy(values[train]), torch.from_numpy(values[test]), None)
    largest = float(torch.linalg.matrix_norm(known, 2)) ** 2
    shares = [1e-3, 1e-1, 1.0, 10.0]

    class Scaled(Ridge):
        """The penalty of a fold is a share of its own largest squared singular value."""

        def fit(self, X, y):
            self.share, self.alpha = self.alpha, self.alpha * np.linalg.norm(X - X.mean(0), 2) ** 2
            fitted = super().fit(X, y)
            self.alpha = self.share
            return fitted

    search = GridSearchCV(
        Scaled(solver="svd"), {"alpha": shares}, cv=GroupKFold(4), scoring="neg_mean_squared_error", refit=False
    )
    search.fit(known.numpy(), target[train], groups=groups[train])
    best = search.best_params_["alpha"]
    expected = Ridge(alpha=best * largest, solver="svd").fit(known, target[train]).predict(unknown)
    block = np.zeros(1, np.int64)
    made = ridge_predictions(known, torch.from_numpy(target[train])[:, None], unknown, groups[train], block, shares)
    np.testing.assert_allclose(made[:, 0], expected, rtol=1e-6)


def test_a_penalty_needs_two_training_runs():
    values, target = data(3)
    known = torch.from_numpy(values)
    with pytest.raises(ZooError, match="at least three runs are needed, here two"):
        ridge_predictions(
            known, torch.from_numpy(target)[:, None], known, np.zeros(40, np.int64), np.zeros(1, np.int64)
        )


def test_targets_predicted_together_are_those_predicted_alone():
    values, target = data(4)
    random = np.random.default_rng(0)
    told = torch.from_numpy(np.stack([target, random.normal(size=40), random.normal(size=40)], 1))
    groups = np.arange(40) % 10
    known, unknown = prepare(torch.from_numpy(values), torch.from_numpy(values[:7]), None)
    together = ridge_predictions(known, told, unknown, groups, np.array([0, 1, 2]))
    for number in range(3):
        alone = ridge_predictions(known, told[:, [number]], unknown, groups, np.zeros(1, np.int64))
        np.testing.assert_allclose(together[:, [number]], alone, rtol=1e-9, atol=1e-9)


def test_units_of_features_and_constant_columns_change_nothing():
    values, target = data(5)
    told, groups = torch.from_numpy(target)[:, None], np.arange(40) % 10
    made = []
    for each in (values, np.c_[values * 1000 + 5, np.full(40, 0.1)]):
        known, unknown = prepare(torch.from_numpy(each[:30]), torch.from_numpy(each[30:]), None)
        made.append(ridge_predictions(known, told[:30], unknown, groups[:30], np.zeros(1, np.int64)))
    np.testing.assert_allclose(*made, rtol=1e-6)


def test_nothing_to_learn_from_gives_the_mean():
    empty = torch.zeros(6, 0, dtype=torch.float64)
    target = torch.arange(6.0, dtype=torch.float64)[:, None]
    made = ridge_predictions(empty, target, empty[:2], np.arange(6), np.zeros(1, np.int64))
    assert made.flatten().tolist() == [2.5, 2.5]
    same = torch.ones(6, 3, dtype=torch.float64)
    known, unknown = prepare(same, same[:2] + 1, None)
    assert known.shape == (6, 0)
    assert ridge_path(known, target, unknown).unique().item() == 2.5


def test_preparation_looks_at_training_rows_only():
    values = torch.from_numpy(data(6)[0])
    for components in (None, 2):
        known, unknown = prepare(values[:30], values[30:], components)
        again, alone = prepare(values[:30], values[35:36] * 1, components)
        np.testing.assert_allclose(known, again)
        np.testing.assert_allclose(unknown[5:6], alone)


TREES = ["hist_gradient_boosting"] + ["lightgbm"] * (importlib.util.find_spec("lightgbm") is not None)


@pytest.mark.parametrize("model", TREES)
def test_trees_learn_what_is_not_linear(model):
    random = np.random.default_rng(0)
    values = random.normal(size=(300, 3))
    square = values[:, 0] ** 2
    made = tree_predictions(values[:200], square[:200], values[200:], model=model, classes=False)
    assert r2_score(square[200:], made) > 0.7
    again = tree_predictions(values[:200], square[:200], values[200:], model=model, classes=False)
    np.testing.assert_array_equal(made, again)
    far = (square > 1).astype(float)
    made = tree_predictions(values[:200], far[:200], values[200:], model=model, classes=True)
    assert accuracy_score(far[200:], made) > 0.9


def test_trees_without_anything_to_learn_are_constant():
    options = {"model": "hist_gradient_boosting"}
    nothing, two = np.zeros((4, 0)), np.zeros((2, 0))
    assert tree_predictions(nothing, np.array([1.0, 2, 2, 0]), two, classes=True, **options).tolist() == [2, 2]
    assert tree_predictions(nothing, np.array([1.0, 2, 2, 0]), two, classes=False, **options).tolist() == [1.25] * 2


def test_models_that_are_not_there_are_named(monkeypatch):
    with pytest.raises(ZooError, match=r"unknown model 'rigde'.*ridge"):
        property_models.check_model("rigde")
    monkeypatch.setattr(property_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ZooError, match=r"pip install 'vitzoo-hf\[properties\]'"):
        property_models.check_model("lightgbm")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_scores_are_those_of_scikit_learn_and_scipy(seed):
    random = np.random.default_rng(seed)
    true, guess = random.normal(size=30), random.normal(size=(2, 30)).round(1)
    found = property_scores.scores(true, guess, classes=False)
    for name, metric in (("r2", r2_score), ("mae", mean_absolute_error)):
        assert found[name] == pytest.approx(np.mean([metric(true, each) for each in guess]))
    assert found["kendall_tau"] == pytest.approx(np.mean([kendalltau(true, each).statistic for each in guess]))
    true = np.r_[0.0, 1, 2, random.integers(0, 3, 27)]
    guess = random.integers(0, 3, (2, 30)).astype(float)
    found = property_scores.scores(true, guess, classes=True)
    for name, metric in (("accuracy", accuracy_score), ("balanced_accuracy", balanced_accuracy_score)):
        assert found[name] == pytest.approx(np.mean([metric(true, each) for each in guess]))


def test_constant_predictions_have_no_order():
    assert property_scores.scores(np.arange(3.0), np.ones((1, 3)), classes=False)["kendall_tau"] == 0


def test_intervals_cover_what_groups_give():
    """The mean over groups of a share that differs between groups: the bootstrap knows its spread, rows do not."""
    covered = 0
    for seed in range(30):
        random = np.random.default_rng(seed)
        share = random.uniform(0.2, 0.8, 30)
        groups = np.repeat(np.arange(30), 20)
        true = np.ones(600)
        true[::2] = 0
        right = random.random(600) < share[groups]
        guess = np.where(right, true, 1 - true)[None]
        low, high = property_scores.intervals(true, guess, groups, classes=True, resamples=100)["accuracy"]
        covered += low <= 0.5 <= high
    assert 25 <= covered <= 30


def test_few_groups_have_no_interval():
    low, high = property_scores.intervals(
        np.arange(8.0), np.zeros((1, 8)), np.repeat(np.arange(4), 2), classes=False
    )["r2"]
    assert np.isnan([low, high]).all()


@pytest.mark.gpu
def test_ridge_on_a_gpu_is_that_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values, target = data(7)
    made = []
    for device in ("cpu", "cuda"):
        whole = torch.from_numpy(values).to(device)
        known, unknown = prepare(whole[:30], whole[30:], None)
        told = torch.from_numpy(target[:30])[:, None].to(device)
        made.append(ridge_predictions(known, told, unknown, np.arange(30) % 6, np.zeros(1, np.int64)).cpu())
    np.testing.assert_allclose(*made, rtol=1e-8)


def test_the_pipeline_of_scikit_learn_is_what_a_fold_does():
    values, target = data(8)
    pipeline = make_pipeline(StandardScaler(), Ridge(alpha=3.0)).fit(values[:30], target[:30])
    known, unknown = prepare(torch.from_numpy(values[:30]), torch.from_numpy(values[30:]), None)
    share = 3.0 / float(torch.linalg.matrix_norm(known, 2)) ** 2
    made = ridge_path(known, torch.from_numpy(target[:30])[:, None], unknown, [share])[0, :, 0]
    np.testing.assert_allclose(made, pipeline.predict(values[30:]), rtol=1e-8)
