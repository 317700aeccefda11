"""Explained variance against anova by hand, PERMANOVA by pairs, least squares; its tests against enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitzoo_hf.metrics import variance

seeds = st.integers(0, 10**6)


def squares_of(points):
    points = points.reshape(len(points), -1)
    return ((points[:, None] - points[None]) ** 2).sum(-1)


def inner_of(points):
    return variance.gower_centred(squares_of(points))


def some_codes(rng, size, levels):
    return rng.permutation(np.arange(size) % levels)


def anova(y, codes):
    """Eta squared by the definition: sums of squares around means."""
    total = sum((value - y.mean()) ** 2 for value in y)
    between = sum((codes == g).sum() * (y[codes == g].mean() - y.mean()) ** 2 for g in set(codes.tolist()))
    return between / total


def permanova(squared, codes):
    """R² by Anderson's sums over pairs: 1 - SS_W / SS_T; and pseudo F, as scikit-bio writes it."""
    size, pairs = len(codes), list(itertools.combinations(range(len(codes)), 2))
    counts = {g: int((codes == g).sum()) for g in set(codes.tolist())}
    total = sum(squared[i, j] for i, j in pairs) / size
    within = sum(squared[i, j] / counts[codes[i]] for i, j in pairs if codes[i] == codes[j])
    return 1 - within / total


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 30), st.integers(2, 6), seeds)
def test_a_value_gives_one_way_eta_squared(size, levels, seed):
    rng = np.random.default_rng(seed)
    y, codes = rng.normal(size=size) * 10.0 ** rng.integers(-3, 4) + 5, some_codes(rng, size, min(levels, size))
    assert variance.one_way_shares(inner_of(y), codes[None])[0] == pytest.approx(anova(y, codes), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 20), st.integers(2, 5), seeds)
def test_a_matrix_gives_permanova_whether_its_distances_are_of_points_or_not(size, levels, seed):
    rng = np.random.default_rng(seed)
    squared = rng.uniform(0.5, 9, (size, size))
    squared = np.tril(squared, -1) + np.tril(squared, -1).T
    codes = np.stack([some_codes(rng, size, min(levels, size)) for _ in range(3)])
    shares = variance.one_way_shares(variance.gower_centred(squared), codes)
    np.testing.assert_allclose(shares, [permanova(squared, row) for row in codes], atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 30), seeds)
def test_factors_together_are_a_least_squares_fit(size, seed):
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(size, 3))
    codes = np.stack([some_codes(rng, size, levels) for levels in (2, 3, 2)])
    design = np.concatenate([np.ones((size, 1))] + [(row[:, None] == np.unique(row)) * 1.0 for row in codes], axis=1)
    order = rng.permutation(size)
    residual = data - design[order] @ np.linalg.lstsq(design[order], data, rcond=None)[0]
    expected = 1 - (residual**2).sum() / ((data - data.mean(0)) ** 2).sum()
    basis = variance.additive_basis(codes)
    assert basis.shape[1] == np.linalg.matrix_rank(design) - 1
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-9)
    assert variance.additive_shares(inner_of(data), basis, order[None])[0] == pytest.approx(expected, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 20), seeds)
def test_shares_ignore_order_names_place_and_scale(size, seed):
    rng = np.random.default_rng(seed)
    data, codes = rng.normal(size=(size, 4)), some_codes(rng, size, 3)
    share = variance.one_way_shares(inner_of(data), codes[None])[0]
    order, names = rng.permutation(size), rng.permutation(3)
    turned = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    for points, levels in ((data[order], codes[order]), (data, names[codes]), (7 * data @ turned + 3, codes)):
        assert variance.one_way_shares(inner_of(points), levels[None])[0] == pytest.approx(share, abs=1e-9)
    assert variance.additive_shares(inner_of(data), variance.additive_basis(codes[None]), np.arange(size)[None])[
        0
    ] == pytest.approx(share, abs=1e-9)


def test_blocks_do_not_change_a_share(monkeypatch):
    rng = np.random.default_rng(0)
    inner, codes = inner_of(rng.normal(size=(12, 2))), np.stack([some_codes(rng, 12, 3) for _ in range(9)])
    orders, basis = np.stack([rng.permutation(12) for _ in range(9)]), variance.additive_basis(codes[:2])
    whole = variance.one_way_shares(inner, codes), variance.additive_shares(inner, basis, orders)
    monkeypatch.setattr(variance, "BLOCK_BYTES", 1000)
    np.testing.assert_allclose(variance.one_way_shares(inner, codes), whole[0], rtol=1e-12)
    np.testing.assert_allclose(variance.additive_shares(inner, basis, orders), whole[1], rtol=1e-12)


def test_the_ends():
    codes = np.array([[0, 0, 1, 1]])
    assert np.isnan(variance.one_way_shares(inner_of(np.ones(4)), codes)).all()
    assert math.isnan(variance.p_value(math.nan, np.zeros(3)))
    assert variance.p_value(0.9, np.array([0.1, 0.9 - 1e-12, 0.2])) == 0.5  # a tie but for rounding
    assert variance.p_value(0.9, np.zeros(9)) == 0.1
    everyone = np.array([[0, 1, 2, 3]])
    assert variance.one_way_shares(inner_of(np.arange(4.0)), everyone)[0] == pytest.approx(1)
    assert variance.one_way_shares(inner_of(np.arange(4.0)), np.zeros((1, 4), np.int64))[0] == pytest.approx(0)
    assert variance.additive_basis(np.zeros((1, 4), np.int64)).shape == (4, 0)
    assert variance.additive_shares(inner_of(np.arange(4.0)), np.zeros((4, 0)), np.arange(4)[None]).tolist() == [0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite: leave out"):
        variance.gower_centred(np.array([[0, np.nan], [np.nan, 0]]))
    with pytest.raises(ValueError, match="distances of 3 models and levels of 4: give one level a model"):
        variance.one_way_shares(inner_of(np.arange(3.0)), np.array([[0, 0, 1, 1]]))
    with pytest.raises(ValueError, match="distances of 3 models and levels of 4"):
        variance.additive_shares(inner_of(np.arange(3.0)), np.zeros((4, 1)), np.arange(4)[None])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), seeds)
def test_models_are_exchanged_within_strata_where_the_factor_varies_there(parents, models, seed):
    rng = np.random.default_rng(seed)
    strata = rng.permutation(np.repeat(np.arange(parents), models))
    codes = np.empty_like(strata)
    for stratum in range(parents):
        codes[strata == stratum] = rng.permutation(np.arange(models) % 2)
    shuffled, unit = variance.exchangeable_codes(codes, 10 * strata, 20, rng)
    assert unit == "models within strata"
    for row, stratum in itertools.product(shuffled, range(parents)):
        assert sorted(row[strata == stratum]) == sorted(codes[strata == stratum])
    assert len({tuple(row) for row in shuffled}) > 1


def test_strata_exchange_their_levels_as_wholes():
    rng, strata = np.random.default_rng(0), np.array([0, 0, 1, 2, 2, 2, 3])
    codes = np.array([0, 1, 0, 1])[strata]
    shuffled, unit = variance.exchangeable_codes(codes, strata, 200, rng)
    assert unit == "strata"
    found = {tuple(int(row[strata == s][0]) for s in range(4)) for row in shuffled}
    assert found == set(itertools.permutations([0, 1, 0, 1]))
    assert all(len(set(row[strata == s])) == 1 for row in shuffled for s in range(4))
    shuffled, unit = variance.exchangeable_codes(strata, np.zeros(7, np.int64), 3, rng)
    assert unit == "models"
    assert all(sorted(row) == sorted(strata) for row in shuffled)


def test_p_values_are_those_of_every_permutation_counted():
    y, codes = np.array([0.0, 0.5, 0.7, 2, 3, 5]), np.array([0, 0, 0, 1, 1, 1])
    every = np.array(sorted(set(itertools.permutations(codes.tolist()))))
    exact = np.mean([anova(y, row) >= anova(y, codes) - 1e-12 for row in every])
    inner = inner_of(y)
    shuffled, _ = variance.exchangeable_codes(codes, np.zeros(6, np.int64), 4000, np.random.default_rng(0))
    observed = variance.one_way_shares(inner, codes[None])[0]
    assert variance.p_value(observed, variance.one_way_shares(inner, shuffled)) == pytest.approx(exact, abs=0.015)
    assert variance.least_p_value(codes, shuffled) == pytest.approx(2 / len(every), abs=0.015)


def test_without_an_effect_p_values_are_even_although_parents_differ():
    rng, strata = np.random.default_rng(1), np.repeat(np.arange(3), 6)
    found = []
    for _ in range(300):
        y, codes = rng.normal(size=18) + 5 * strata, np.tile([0, 0, 0, 0, 1, 1], 3)
        shuffled, _ = variance.exchangeable_codes(codes, strata, 99, rng)
        inner = inner_of(y)
        shares = variance.one_way_shares(inner, np.concatenate([codes[None], shuffled]))
        found.append(variance.p_value(shares[0], shares[1:]))
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.06)
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


def test_two_parents_of_two_regimes_can_not_be_told_from_chance():
    strata, rng = np.repeat(np.arange(4), 3), np.random.default_rng(0)
    shuffled, _ = variance.exchangeable_codes(strata // 2, strata, 999, rng)
    assert variance.least_p_value(strata // 2, shuffled) == pytest.approx(1 / 3, abs=0.05)
    two = np.repeat(np.arange(2), 3)
    assert variance.least_p_value(two, np.stack([two, 1 - two])) == 1
    assert variance.least_p_value(two, np.array([[0, 1, 0, 1, 0, 1]])) == 0.5
    assert variance.least_p_value(two, np.zeros((1, 6), np.int64)) == 0.5
