"""Alignments against exhaustive search and planted symmetries."""

from itertools import pairwise, permutations, product

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from vit_weights import tensors_of, vit_row

from vitzoo_hf.apply.rebasin.by_activations import Moments, align_by_activations
from vitzoo_hf.apply.rebasin.by_weights import (
    align_by_weights,
    best_rotation,
    improve,
    match_heads,
    match_hidden,
    residual_gain,
    squared_distance,
)
from vitzoo_hf.apply.rebasin.canonical import prepare
from vitzoo_hf.apply.rebasin.symmetries import FAMILIES, Symmetry, head_parts, sizes_of, transform
from vitzoo_hf.format.schema import ZooError

RUNGS = [FAMILIES[:number] for number in range(1, 7)]
SMALL = {"width": 4, "heads": 2, "depth": 1, "mlp_ratio": 1}


def planted(row, families, seed=5):
    """A target in its prepared form, and the same function moved by a random element."""
    target = tensors_of(row)
    sizes = sizes_of(row)[0]
    prepare(target, sizes, families)
    source = dict(target)
    moved = tuple(name for name in families if name != "invertible")
    transform(source, Symmetry.random(sizes, seed=seed, families=moved))
    return target, source, sizes


def distance_after(target, source, symmetry):
    moved = dict(source)
    transform(moved, symmetry)
    return squared_distance(target, moved)


@pytest.mark.parametrize("families", RUNGS[:3], ids=lambda families: families[-1])
@pytest.mark.parametrize("head_hidden", [None, 5], ids=["linear", "mlp"])
def test_weights_recover_a_planted_symmetry(families, head_hidden):
    target, source, sizes = planted(vit_row(1, head_hidden=head_hidden), families)
    found = align_by_weights(target, source, sizes, families)
    assert found.squared_distances[0] > 1
    assert distance_after(target, source, found.symmetry) < 1e-12


@pytest.mark.parametrize("families", RUNGS, ids=lambda families: families[-1])
def test_activations_recover_a_planted_symmetry(families):
    row = vit_row(2, head_hidden=5)
    target, source, sizes = planted(row, families)
    images = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    symmetry = align_by_activations(target, source, row, sizes, families, images)
    before = squared_distance(target, source)
    assert distance_after(target, source, symmetry) < 1e-4 * before
    found = align_by_weights(target, source, sizes, families, start=symmetry)
    assert found.squared_distances[-1] < 1e-4 * before


@pytest.mark.parametrize("seed", range(3))
def test_hidden_units_are_those_of_exhaustive_search(seed):
    target, source = (tensors_of(vit_row(number, **SMALL)) for number in (seed, seed + 50))

    def cost(order):
        place = list(order)
        total = (target["blocks.0.mlp.fc1.weight"] - source["blocks.0.mlp.fc1.weight"][place]).square().sum()
        total += (target["blocks.0.mlp.fc1.bias"] - source["blocks.0.mlp.fc1.bias"][place]).square().sum()
        return (
            total + (target["blocks.0.mlp.fc2.weight"] - source["blocks.0.mlp.fc2.weight"][:, place]).square().sum()
        )

    assert match_hidden(target, source, 0).tolist() == list(min(permutations(range(4)), key=cost))


@pytest.mark.parametrize("seed", range(3))
def test_heads_and_maps_are_those_of_exhaustive_search_with_scipy(seed):
    target, source = (tensors_of(vit_row(number, width=6, heads=3, depth=1)) for number in (seed, seed + 50))
    one, other = ([part.numpy() for part in head_parts(tensors, 0, 3)] for tensors in (target, source))

    def best(order):
        total, maps = 0.0, []
        for place, head in enumerate(order):
            for a, b in (((0, False), (1, False)), ((2, False), (3, True))):
                left, right = (
                    np.concatenate([parts[k][i].T if turned else parts[k][i] for k, turned in (a, b)], axis=1)
                    for parts, i in ((one, place), (other, head))
                )
                rotation, _ = scipy.linalg.orthogonal_procrustes(right.T, left.T)
                total += np.square(left - rotation.T @ right).sum()
                maps.append(rotation.T)
        return total, maps

    wanted = min(permutations(range(3)), key=lambda order: best(order)[0])
    order, query_key, value = match_heads(target, source, 0, 3, ("heads", "maps"))
    assert order.tolist() == list(wanted)
    expected = best(wanted)[1]
    np.testing.assert_allclose(torch.stack([query_key, value], 1).flatten(0, 1), expected, atol=1e-9)


def test_descent_with_restarts_finds_the_best_of_all_permutations():
    row, other = vit_row(1, **SMALL), vit_row(2, **SMALL)
    target, source, sizes = tensors_of(row), tensors_of(other), sizes_of(row)[0]
    families = ("mlp", "heads", "residual")
    least = float("inf")
    for residual, hidden, heads in product(permutations(range(4)), permutations(range(4)), permutations(range(2))):
        g = Symmetry.identity(sizes)
        g.hidden[0], g.heads[0] = torch.tensor(hidden), torch.tensor(heads)
        g.residual[:] = torch.eye(4, dtype=torch.float64)[list(residual)]
        least = min(least, distance_after(target, source, g))
    found = align_by_weights(target, source, sizes, families, restarts=20)
    assert found.squared_distances[-1] == pytest.approx(least)
    assert distance_after(target, source, found.symmetry) == pytest.approx(least)


def test_the_rotation_is_that_of_scipy_on_centred_channels_and_beats_random_ones():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(6, 40, generator=generator).double() for _ in range(2))
    one, other = (values - values.mean(0) for values in (one, other))
    rotation = best_rotation(one @ other.T)
    torch.testing.assert_close(rotation @ torch.ones(6).double(), torch.ones(6).double())
    expected, _ = scipy.linalg.orthogonal_procrustes(other.T.numpy(), one.T.numpy())
    np.testing.assert_allclose(rotation @ other, expected.T @ other.numpy(), atol=1e-9)
    sizes = sizes_of(vit_row(1, width=6, heads=3))[0]
    least = (one - rotation @ other).square().sum()
    for seed in range(50):
        drawn = Symmetry.random(sizes, seed=seed, families=("residual", "rotation")).residual
        assert (one - drawn @ other).square().sum() > least


def test_the_gain_of_channels_is_what_the_distance_says():
    row = vit_row(1, **SMALL)
    target, source, sizes = tensors_of(row), tensors_of(vit_row(2, **SMALL)), sizes_of(row)[0]
    gain = residual_gain(target, source)
    stay = distance_after(target, source, Symmetry.identity(sizes))
    for order in permutations(range(4)):
        g = Symmetry.identity(sizes)
        g.residual[:] = g.residual[list(order)]
        expected = stay - 2 * (gain[range(4), list(order)].sum() - gain.trace())
        assert distance_after(target, source, g) == pytest.approx(float(expected))


@pytest.mark.parametrize("families", RUNGS, ids=lambda families: families[-1])
def test_no_step_moves_the_weights_away(families):
    row = vit_row(1, head_hidden=4)
    sizes = sizes_of(row)[0]
    target, source = tensors_of(row), tensors_of(vit_row(2, head_hidden=4))
    for tensors in (target, source):
        prepare(tensors, sizes, families)
    current, symmetry = dict(source), Symmetry.identity(sizes)
    parts = [("hidden", 0), ("attention", 0), ("residual", 0), ("hidden", 1), ("attention", 1), ("classifier", 0)]
    free = [part for part in parts if part[0] != "residual" or "residual" in families]
    distance = squared_distance(target, current)
    for part in [part for part in free if part[0] != "attention" or "heads" in families] * 3:
        symmetry = improve(target, current, symmetry, part, families)
        now = squared_distance(target, current)
        assert now <= distance * (1 + 1e-12)
        distance = now
    assert distance_after(target, source, symmetry) == pytest.approx(distance)
    sweeps = align_by_weights(target, source, sizes, families).squared_distances
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(sweeps))


def test_scales_of_an_mlp_head_are_those_of_scipy():
    row = vit_row(1, head_hidden=4)
    target, source, sizes = tensors_of(row), tensors_of(vit_row(2, head_hidden=4)), sizes_of(row)[0]
    found = align_by_weights(target, source, sizes, ("maps",)).symmetry
    assert found.classifier.tolist() == [0, 1, 2, 3]
    for unit in range(4):
        entering = [torch.cat([t["head.0.weight"][unit], t["head.0.bias"][unit, None]]) for t in (target, source)]
        leaving = [t["head.2.weight"][:, unit] for t in (target, source)]

        def cost(logarithm, entering=entering, leaving=leaving):
            s = float(np.exp(logarithm))
            there, back = entering[0] - s * entering[1], leaving[0] - leaving[1] / s
            return float(there.square().sum() + back.square().sum())

        grid = min(np.linspace(-3, 3, 61), key=cost)
        best = scipy.optimize.minimize_scalar(cost, bounds=(grid - 0.1, grid + 0.1), method="bounded")
        assert cost(float(found.classifier_scale[unit].log())) == pytest.approx(best.fun, rel=1e-6)


def test_moments_are_those_of_numpy():
    one, other = torch.randn(50, 3), torch.randn(50, 4)
    one[:, 1] = 2.0
    moments = Moments()
    for a, b in zip(one.split(20), other.split(20), strict=True):
        moments.update(a, b)
    both = np.concatenate([one.numpy(), other.numpy()], 1).astype(float)
    expected = np.cov(both.T, bias=True)[:3, 3:]
    np.testing.assert_allclose(moments.covariance(), expected, atol=1e-12)
    alive = np.corrcoef(both[:, [0, 2, 3, 4, 5, 6]].T)[:2, 2:]
    np.testing.assert_allclose(moments.correlation()[[0, 2]], alive, atol=1e-9)
    assert (moments.correlation()[1] == 0).all()


def test_alignment_is_deterministic_and_mistakes_are_told():
    row = vit_row(1)
    sizes = sizes_of(row)[0]
    target, source = tensors_of(row), tensors_of(vit_row(2))
    one, same = (align_by_weights(target, source, sizes, FAMILIES[:4], seed=3, restarts=2) for _ in range(2))
    assert one.squared_distances == same.squared_distances
    assert one.squared_distances[-1] <= align_by_weights(target, source, sizes, FAMILIES[:4]).squared_distances[0]
    with pytest.raises(ZooError, match="no images were given for alignment by activations"):
        align_by_activations(target, source, row, sizes, ("mlp",), torch.zeros(0, 1, 8, 8))
