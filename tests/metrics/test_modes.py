"""Distances of a plane come back from classical scaling; groups score as in scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import silhouette_score

from vitzoo_hf.metrics import modes


def between(points):
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(0, 10**6))
def test_points_of_a_plane_give_back_their_distances(size, seed):
    distances = between(np.random.default_rng(seed).normal(size=(size, 2)))
    points, share = modes.classical_mds(distances)
    np.testing.assert_allclose(between(points), distances, atol=1e-9)
    assert share == pytest.approx(1)
    again, _ = modes.classical_mds(3 * distances)
    np.testing.assert_allclose(again, 3 * points, atol=1e-8)


def test_more_dimensions_than_two_give_the_principal_components():
    data = np.random.default_rng(0).normal(size=(30, 6)) * [5, 3, 1, 1, 1, 1]
    points, share = modes.classical_mds(between(data))
    centred = data - data.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(left[:, :2] * singular[:2]), atol=1e-9)
    assert share == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum())


def test_equal_models_lie_on_one_point():
    points, share = modes.classical_mds(np.zeros((4, 4)))
    assert not points.any()
    assert math.isnan(share)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 30), st.integers(2, 3), st.integers(0, 10**6))
def test_silhouette_is_that_of_scikit_learn(size, groups, seed):
    rng = np.random.default_rng(seed)
    distances = between(rng.normal(size=(size, 3)))
    codes = np.concatenate([np.arange(groups), rng.integers(0, groups, size - groups)])
    expected = silhouette_score(distances, codes, metric="precomputed")
    assert modes.silhouette(distances, codes) == pytest.approx(expected, abs=1e-12)
