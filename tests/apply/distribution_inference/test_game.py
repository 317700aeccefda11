"""Secrets, metrics and the game: closed forms, and attacks whose success is known."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from vitzoo_hf.apply.distribution_inference.attacks.black_box import (
    BLACK_BOX,
    per_point_threshold_test,
    ridge_on_outputs,
)
from vitzoo_hf.apply.distribution_inference.game import Guesses, Queries, Shadows, Views, check_equal, play
from vitzoo_hf.apply.distribution_inference.metrics import (
    area_under_curve,
    leaked_samples,
    leaked_samples_of_errors,
    nested_interval,
)
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, NumberSecret, advantage, secret_of
from vitzoo_hf.format.schema import ZooError


def test_the_best_guess_without_a_model_has_the_prior_risk():
    """By brute force over constants, for every kind of secret."""
    classes = ClassSecret(("a", "b", "c"), (0.2, 0.5, 0.3))
    drawn = classes.uniform(200_000, 0)
    best = min(classes.losses(torch.full_like(drawn, guess), drawn).mean().item() for guess in range(3))
    assert best == pytest.approx(classes.prior_risk, abs=0.01)
    for number in (NumberSecret(((-1.0, 3.0),)), NumberSecret(((0.0, 1.0),), ((0.1, 0.5, 0.9),))):
        secrets = number.uniform(20_000, 0)
        guesses = torch.linspace(*number.bounds[0], 201, dtype=torch.float64)
        losses = [number.losses(torch.full_like(secrets, guess), secrets).mean().item() for guess in guesses]
        assert min(losses) == pytest.approx(number.prior_risk, abs=0.01)
    assert NumberSecret(((0.0, 1.0), (0.0, 3.0))).prior_risk == 0.5


def test_constant_guessers_have_no_advantage():
    secret = ClassSecret((0, 1))
    shadows = Shadows(Views(), secret.even(10), secret)
    for guess in (0, 1):
        outcome = play(
            shadows,
            Views(),
            secret.even(40),
            lambda known, seen, seed, guess=guess: Guesses(torch.full((40,), guess)),
        )
        assert outcome.advantage == 0
    number = NumberSecret(((0.0, 1.0),))
    even = number.even(4001)
    known = Shadows(Views(), even, number)
    outcome = play(known, Views(), even, lambda known, seen, seed: Guesses(torch.full_like(even, 0.5)))
    assert outcome.advantage == pytest.approx(0, abs=1e-3)


def test_advantage_of_a_binary_secret_is_twice_the_accuracy_less_one():
    assert advantage(1 - 0.75, ClassSecret((0, 1)).prior_risk) == 0.5
    assert advantage(0.0, 0.25) == 1


def test_even_draws_are_balanced_and_a_grid():
    assert ClassSecret((3, 1, 2)).even(9).bincount().tolist() == [3, 3, 3]
    np.testing.assert_allclose(NumberSecret(((2.0, 4.0),)).even(8)[:, 0], np.arange(2, 4, 0.25))
    levels = NumberSecret(((0.0, 1.0),), ((0.0, 0.5, 1.0),))
    assert set(levels.uniform(100, 1)[:, 0].tolist()) == {0.0, 0.5, 1.0}
    with pytest.raises(ZooError, match="an even grid of 2 numbers"):
        NumberSecret(((0.0, 1.0), (0.0, 1.0))).even(4)


def test_columns_become_secrets():
    secret, secrets = secret_of(["east", "west", "east"])
    assert (secret.values, secrets.tolist()) == (("east", "west"), [0, 1, 0])
    number, secrets = secret_of([0.1, 0.5, 0.9])
    assert isinstance(number, NumberSecret)
    assert secrets.shape == (3, 1)
    assert number.prior_risk == pytest.approx(0.8 / 3)
    assert isinstance(secret_of([1, 2, 3], as_classes=True)[0], ClassSecret)
    for wrong, told in (
        ([0.5, 0.5], "every model has the secret 0.5"),
        ([None, 1], "have no secret"),
        ([], "no model"),
    ):
        with pytest.raises(ZooError, match=told):
            secret_of(wrong)


@pytest.mark.parametrize(
    ("accuracy", "ratios", "expected"),
    [(0.9, (0.5, 0.3), 3.04), (0.75, (0.5, 0.3), 0.85), (0.95, (0.5, 0.4), 9.11), (0.9, (0.2, 0.8), 0.74)],
)
def test_leaked_samples_of_the_specification(accuracy, ratios, expected):
    assert leaked_samples(accuracy, ratios) == pytest.approx(expected, abs=0.005)
    assert leaked_samples(accuracy, ratios[::-1]) == leaked_samples(accuracy, ratios)


@given(st.floats(0.51, 0.999), st.floats(0.05, 0.45), st.floats(0.5, 0.95))
@settings(max_examples=30, deadline=None)
def test_leaked_samples_turn_the_bound_around(accuracy, low, high):
    n = leaked_samples(accuracy, (low, high))
    overlap = max(low / high, (1 - high) / (1 - low))
    assert 0.5 + 0.5 * math.sqrt(1 - overlap**n) == pytest.approx(accuracy, abs=1e-6)


def test_leaked_samples_at_the_ends():
    assert leaked_samples(1.0, (0.5, 0.3)) == math.inf
    assert leaked_samples(0.5, (0.5, 0.3)) == leaked_samples(0.4, (0.5, 0.3)) == 0
    with pytest.raises(ValueError, match="two different ratios"):
        leaked_samples(0.9, (0.5, 0.5))
    ratios = torch.full((100_000,), 0.3, dtype=torch.float64)
    mean_of_nine = torch.distributions.Binomial(9, ratios).sample() / 9
    assert leaked_samples_of_errors(ratios, mean_of_nine) == pytest.approx(9, rel=0.03)


def test_area_under_curve_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(8, (200,), generator=generator).double()
    positive = torch.rand(200, generator=generator) < 0.3
    assert area_under_curve(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


def test_intervals_over_targets_are_those_of_the_binomial():
    hits = (torch.arange(400) % 4 == 0).double()
    mean, low, high = nested_interval(hits[None, None])
    assert mean == 0.25
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == (pytest.approx(0.25 - half, abs=0.008), pytest.approx(0.25 + half, abs=0.008))


def test_intervals_over_worlds_are_wider_where_worlds_differ():
    same = torch.tensor([0.0, 1.0]).repeat(3, 2, 100).double()
    differing = torch.stack([torch.zeros(2, 200), torch.full((2, 200), 0.5), torch.ones(2, 200)]).double()
    narrow, wide = nested_interval(same), nested_interval(differing)
    assert narrow.mean == wide.mean == 0.5
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    assert (wide.low, wide.high) == (0.0, 1.0)


def constructed(count, seed, *, leak, queries=50, places=(7,)):
    """Two-class outputs that say the secret in one logit of some queries, and noise elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    secrets = torch.arange(count) % 2
    logits = torch.randn(count, queries, 2, generator=generator)
    logits[:, places, 1] += leak * (2 * secrets[:, None] - 1)
    return logits.log_softmax(2), secrets


def game_of(shadows=4000, targets=4000, leak=1.0, queries=50, places=(7,)):
    own, secrets = constructed(shadows, 1, leak=leak, queries=queries, places=places)
    seen, truth = constructed(targets, 2, leak=leak, queries=queries, places=places)
    asked = Queries(torch.zeros(queries, dtype=torch.int64), torch.zeros(queries, dtype=torch.int64))
    return Shadows(Views(own), secrets, ClassSecret((0, 1)), asked), Views(seen), truth


def test_a_leak_through_one_logit_is_read_as_well_as_can_be():
    """The difference of two logits is N(±1, 2), so the best accuracy is Phi(1 / sqrt 2) = 0.760."""
    shadows, targets, truth = game_of()
    best = 0.5 * (1 + math.erf(1 / 2))
    for attack in (partial(per_point_threshold_test, share=0.02), ridge_on_outputs):
        assert play(shadows, targets, truth, attack).accuracy.mean == pytest.approx(best, abs=0.03)


@pytest.mark.parametrize("name", [name for name in BLACK_BOX if name != "loss_test"])
def test_permuted_secrets_are_guessed_at_chance(name):
    """On average: so few shadows show some direction by chance, and its sign is as often right as wrong."""
    shadows, targets, truth = game_of(shadows=200, targets=300, leak=0.5, queries=20, places=tuple(range(20)))
    assert play(shadows, targets, truth, BLACK_BOX[name]).accuracy.mean > 0.85
    chance = [play(shadows.permuted(seed), targets, truth, BLACK_BOX[name]).losses.mean().item() for seed in range(6)]
    assert abs(np.mean(chance) - 0.5) < 0.2


@pytest.mark.parametrize("name", [name for name in BLACK_BOX if name != "loss_test"])
def test_a_guess_does_not_depend_on_other_targets(name):
    shadows, targets, _ = game_of(shadows=60, targets=12, leak=2.0, queries=20)
    together = BLACK_BOX[name](shadows, targets, 0).secrets
    alone = [BLACK_BOX[name](shadows, targets.at(torch.tensor([place])), 0).secrets for place in range(12)]
    assert torch.equal(together, torch.cat(alone))


def test_guards_name_what_differs():
    secrets = [0.3, 0.3, 0.5, 0.5]
    check_equal("training examples", [2048] * 4, secrets)
    with pytest.raises(ZooError, match=r"training examples differ.*2048 with secret 0.3, 1536 with secret 0.5"):
        check_equal("training examples", [2048, 1536, 2048, 1536], secrets)


def test_missing_access_is_one_line():
    secret = ClassSecret((0, 1))
    with pytest.raises(ZooError, match="reads outputs of models"):
        play(
            Shadows(Views(), secret.even(10), secret, Queries(torch.zeros(2, dtype=torch.int64))),
            Views(),
            secret.even(4),
            BLACK_BOX["kl_test"],
        )
    with pytest.raises(ZooError, match="needs the queries"):
        BLACK_BOX["kl_test"](Shadows(Views(), secret.even(10), secret), Views(), 0)
