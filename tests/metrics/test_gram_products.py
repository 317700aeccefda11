from itertools import product

import numpy as np
import pytest
import torch
from gram_oracle import hsic_of_grams, hsic_oracle, randn, related

from vitzoo_hf.metrics import features as centred_features
from vitzoo_hf.metrics import gram_products
from vitzoo_hf.metrics.cka import estimates
from vitzoo_hf.metrics.features import CentredFeatures
from vitzoo_hf.metrics.gram_products import linear_products, median_distances, rbf_products


def small_pieces(monkeypatch, tile):
    monkeypatch.setattr(gram_products, "TILE_IMAGES", tile)
    monkeypatch.setattr(gram_products, "DIAGONAL_IMAGES", 16)
    monkeypatch.setattr(gram_products, "TILE_ELEMENTS", 7 * tile**2)
    monkeypatch.setattr(gram_products, "MODEL_BLOCK", 3)
    monkeypatch.setattr(gram_products, "FEATURE_COLUMNS", 13)


@pytest.mark.parametrize("num_first", [None, 1, 3, 5])
@pytest.mark.parametrize("blocks", [2**29, 1500])
@pytest.mark.parametrize("tile", [16, 20, 39, 40, 41])
def test_tiles_and_both_routes_agree(monkeypatch, tile, blocks, num_first):
    features = [*related(5, 40, 6), randn(40, 9), randn(40, 6, seed=1)]
    expected = hsic_oracle(features, True)
    size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    small_pieces(monkeypatch, tile)
    monkeypatch.setattr(centred_features, "BLOCK_BYTES", blocks)
    centred = CentredFeatures(features, 4)
    squares = centred.squares
    whole = gram_products._feature_route(centred, num_first)
    off_diagonal, _ = gram_products._sample_route(centred, num_first)
    asked = torch.ones(7, 7, dtype=torch.bool).triu()
    if num_first is not None:
        asked[:num_first, :num_first] = asked[num_first:, num_first:] = False
        asked.fill_diagonal_(True)
        assert torch.equal(whole != 0, asked)
        assert torch.equal(off_diagonal != 0, asked)
    for inner in (whole - squares @ squares.T, off_diagonal):
        products = linear_products(centred, num_first)._replace(inner=inner)
        values = estimates(products, True) * torch.outer(centred.scales, centred.scales).square() / (40 * 37)
        np.testing.assert_allclose((values.numpy() / size)[asked], (expected / size)[asked], atol=1e-6)


@pytest.mark.parametrize("first_equals_second", [True, False])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (70, 16), (16, 90), (33, 50), (128, 700)])
def test_tiles_cover_every_pair_of_images_once(height, width, first_equals_second):
    first, second = slice(10, 143), slice(10, 143) if first_equals_second else slice(143, 200)
    count = torch.zeros(200, 200)
    for i, j in gram_products._tiles(first, second, height, width, 16):
        count[i, j] += 1
        assert i.stop - i.start <= height
        assert i == j or j.start >= i.stop
    expected = torch.zeros(200, 200)
    expected[first, second] = 1
    assert torch.equal(count.triu(), expected.triu())


@pytest.mark.parametrize(("N", "F", "route"), [(300, 4, "_feature_route"), (12, 40, "_sample_route")])
@pytest.mark.parametrize("num_first", [None, 2])
def test_the_cheaper_side_is_taken(monkeypatch, N, F, route, num_first):
    taken = []
    for name in ("_feature_route", "_sample_route"):
        original = getattr(gram_products, name)
        monkeypatch.setattr(
            gram_products, name, lambda *args, o=original, name=name: (taken.append(name), o(*args))[1]
        )
    linear_products(CentredFeatures(randn(4, N, F), 4), num_first)
    assert taken == [route]


@pytest.mark.parametrize("blocks", [2**29, 1500])
@pytest.mark.parametrize("tile", [16, 30])
def test_rbf_tiles(monkeypatch, tile, blocks):
    features = [*related(3, 70, 5), randn(70, 2)]
    small_pieces(monkeypatch, tile)
    monkeypatch.setattr(centred_features, "BLOCK_BYTES", blocks)
    centred = CentredFeatures(features, 4)
    medians = median_distances(centred)
    products = rbf_products(centred, 2 / medians, medians)  # bandwidth 0.5 of the root of the median
    for debiased, factor in ((True, 70 * 67), (False, 69**2)):
        expected = hsic_oracle(features, debiased, "rbf", 0.5)
        size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        np.testing.assert_allclose(estimates(products, debiased).numpy() / factor / size, expected / size, atol=1e-5)


@pytest.mark.parametrize(("N", "F"), [(2, 1), (5, 3), (64, 1), (65, 8), (300, 2)])
def test_the_median_distance_is_exact(monkeypatch, N, F):
    monkeypatch.setattr(gram_products, "MEDIAN_TILE", 16)
    model = randn(N, F).double()
    distances = ((model[:, None] - model[None]) ** 2).sum(-1).numpy()
    result = gram_products._medians(model[None], model.square().sum(1)[None])
    assert result.item() == pytest.approx(np.median(distances), rel=1e-6)


def test_blocks_of_models_cover_every_pair_once():
    for P, size, num_first in product((1, 2, 7), (1, 3, 10), (None, 1, 2, 6)):
        if num_first is not None and num_first >= P:
            continue
        count = torch.zeros(P, P)
        for p, q in gram_products._block_pairs(list(gram_products._split(slice(0, P), size, num_first)), num_first):
            count[p, q] += 1
        border = P if num_first is None else num_first
        expected = torch.ones(P, P).triu() if num_first is None else torch.zeros(P, P)
        expected[:border, border:] = 1
        assert torch.equal(count.triu(), expected)


def test_estimates_equal_u_centred_gram_matrices():
    features = randn(3, 12, 5)
    products = linear_products(CentredFeatures(features, 4))
    scales = torch.outer(products.scales, products.scales).square()
    grams = [(x @ x.T).double().numpy() for x in features]
    np.testing.assert_allclose(
        estimates(products, True) * scales / 108, hsic_of_grams(grams, True), rtol=1e-4, atol=1e-4
    )
