"""Attacks on outputs against closed forms, loops and every kind of secret."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from vitzoo_hf.apply.distribution_inference.attacks.black_box import (
    BLACK_BOX,
    _point_votes,
    loss_test,
    published_meta_classifier,
    qualities,
    threshold_test,
)
from vitzoo_hf.apply.distribution_inference.attacks.kl_tests import (
    _divergences,
    _share_above,
    _shares_of_shadows,
    _threshold_of_shares,
    calibrated_kl_test,
    kl_test,
)
from vitzoo_hf.apply.distribution_inference.game import Queries, Shadows, Views, label_only, play
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, NumberSecret
from vitzoo_hf.apply.distribution_inference.zoo_attacks import on_shadows
from vitzoo_hf.format.schema import ZooError

Q = 24


def real_outputs(means, count_of, sigma, seed):
    """Outputs `[M, Q, 1]` around the mean of each model's secret."""
    generator = torch.Generator().manual_seed(seed)
    noise = sigma * torch.randn(len(count_of), Q, generator=generator)
    return Views((means[count_of][:, None] + noise)[..., None], "real")


def asked(origins=None, labels=None, candidates=None):
    return Queries(torch.zeros(Q, dtype=torch.int64) if origins is None else origins, labels, candidates)


def test_kl_test_of_two_gaussians_has_its_closed_form():
    """Shadows sit at the means, so the test takes the nearer mean: accuracy Phi(sqrt Q gap / (2 sigma))."""
    means, sigma = torch.tensor([0.0, 0.3]), 1.0
    secret = ClassSecret((0, 1))
    secrets, truth = secret.even(40), secret.even(6000)
    shadows = Shadows(real_outputs(means, secrets, 0.0, 1), secrets, secret, asked())
    found = play(shadows, real_outputs(means, truth, sigma, 2), truth, kl_test).accuracy.mean
    expected = 0.5 * (1 + math.erf(math.sqrt(Q) * 0.3 / (2 * sigma) / math.sqrt(2)))
    assert found == pytest.approx(expected, abs=0.015)


def test_divergences_are_kl_of_probabilities_and_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    own, seen = (torch.randn(count, Q, 3, generator=generator).log_softmax(2) for count in (4, 5))
    origins = torch.arange(2).repeat_interleave(Q // 2)
    found = _divergences(Views(own), Views(seen), asked(origins))
    f, g = (values.double().exp().clamp(1e-4, 1 - 1e-4).numpy() for values in (own, seen))
    for origin in (0, 1):
        here = origins.numpy() == origin
        for i in range(4):
            for t in range(5):
                expected = (f[i, here] * np.log(f[i, here] / g[t, here])).sum(1).mean()
                assert found[origin, i, t].item() == pytest.approx(expected, abs=1e-9)
    reals = [torch.randn(count, Q, 1, generator=generator) for count in (4, 5)]
    found = _divergences(Views(reals[0], "real"), Views(reals[1], "real"), asked())
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(reals[0][1], 1.0), torch.distributions.Normal(reals[1][2], 1.0)
    ).mean()
    assert found[0, 1, 2].item() == pytest.approx(expected.item(), rel=1e-4)


def test_votes_are_counted_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(5, (n, 3), generator=generator).double() for n in (6, 7))
    expected = []
    for t in range(3):
        pairs = [(a, b) for a in first[:, t].tolist() for b in second[:, t].tolist()]
        expected.append(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
    assert _share_above(first, second).tolist() == pytest.approx(expected)


def test_thresholds_are_those_of_a_search():
    generator = torch.Generator().manual_seed(0)
    second = torch.arange(14) % 2 == 1
    own = torch.randn(14, 3, generator=generator, dtype=torch.float64) + torch.where(second, 1.0, 0.0)[:, None]
    seen = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    votes = []
    for point in range(3):
        values = own[:, point].sort().values
        best = (-1.0, 0.0, True)
        for cut in ((values[1:] + values[:-1]) / 2).tolist():
            for upper in (True, False):
                right = ((own[:, point] > cut) == upper) == second
                gain = right[second].double().mean().item() + right[~second].double().mean().item()
                best = max(best, (gain, cut, upper), key=lambda each: each[0])
        votes.append((seen[:, point] > best[1]) == best[2])
    expected = torch.stack(votes).double().mean(0)
    torch.testing.assert_close(_point_votes(own, second, seen, share=1.0), expected)


def test_constant_statistics_do_not_vote():
    second = torch.arange(20) % 2 == 1
    own = torch.stack([torch.ones(20), second.double() + torch.linspace(0, 0.1, 20)], 1).double()
    seen = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    assert _point_votes(own, second, seen, share=1.0).tolist() == [0, 1]
    assert _point_votes(own[:, :1], second, seen[:, :1], share=1.0).tolist() == [0.5, 0.5]


def test_loss_test_takes_the_distribution_that_is_answered_best():
    """Three candidate distributions, and no shadow needed."""
    secret = ClassSecret(("a", "b", "c"))
    origins = torch.arange(3).repeat_interleave(8)
    labels = torch.randint(4, (Q,), generator=torch.Generator().manual_seed(0))
    outputs = torch.full((3, Q, 4), -9.0)
    for model in range(3):
        right = origins == model
        outputs[model, torch.arange(Q), torch.where(right, labels, (labels + 1) % 4)] = 0.0
    queries = asked(origins, labels, torch.tensor([2, 0, 1]))
    shadows = Shadows(Views(), torch.tensor([0, 1, 2]), secret, queries)
    assert loss_test(shadows, Views(outputs.log_softmax(2))).secrets.tolist() == [2, 0, 1]
    assert qualities(Views(outputs), queries).argmax(1).tolist() == [0, 1, 2]
    with pytest.raises(ZooError, match="every candidate distribution"):
        loss_test(replace(shadows, queries=replace(queries, candidates=None)), Views(outputs))


def test_real_outputs_are_judged_by_squared_error():
    truth = torch.linspace(0, 1, Q)
    outputs = torch.stack([truth, truth + 1])[..., None]
    found = qualities(Views(outputs, "real"), asked(labels=truth))
    torch.testing.assert_close(found, torch.tensor([[0.0], [-1.0]], dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in BLACK_BOX if name != "loss_test"])
def test_three_classes_and_a_number_are_guessed(name):
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(Q, generator=generator)
    truth = torch.zeros(Q)
    for secret in (ClassSecret((0.0, 0.5, 1.0)), NumberSecret(((0.0, 1.0),))):
        views, secrets = [], []
        for count, seed in ((90, 1), (30, 2)):
            drawn = secret.even(count)
            scalar = drawn.float() / 2 if drawn.ndim == 1 else drawn[:, 0].float()
            noise = 0.05 * torch.randn(count, Q, generator=torch.Generator().manual_seed(seed))
            views.append(Views((scalar[:, None] * slope + noise)[..., None], "real"))
            secrets.append(drawn)
        shadows = Shadows(views[0], secrets[0], secret, asked(labels=truth))
        outcome = play(shadows, views[1], secrets[1], BLACK_BOX[name])
        assert outcome.advantage > 0.7, outcome.advantage


def test_label_only_hides_all_but_the_predicted_class():
    outputs = torch.randn(3, Q, 4, generator=torch.Generator().manual_seed(0))
    found = label_only(outputs)
    assert torch.equal(found.argmax(2), outputs.argmax(2))
    torch.testing.assert_close(found.exp().sum(2), torch.ones(3, Q))
    assert torch.equal(label_only(found * 5), found)
    secret = ClassSecret((0, 1))
    secrets = secret.even(40)
    generator = torch.Generator().manual_seed(1)
    own = 3 * torch.randn(Q, 4, generator=generator) + torch.randn(40, Q, 4, generator=generator)
    own[..., 0] += 4.0 * secrets[:, None]
    shadows = Shadows(Views(own.log_softmax(2)), secrets, secret, asked(labels=torch.zeros(Q, dtype=torch.int64)))
    seen = Views(label_only(own), "labels")
    for attack in (kl_test, threshold_test):
        assert play(shadows, seen, secrets, attack).accuracy.mean > 0.95
    with pytest.raises(ZooError, match="ask both the same queries"):
        threshold_test(shadows, Views(own[:, :5], "labels"))


def test_label_only_kl_sees_labels_through_classes_that_differ_in_confidence():
    """Models are unsure, as with noisy labels. Class 1 predicts label 1 more often, and is twice as sure."""
    generator = torch.Generator().manual_seed(0)
    secrets = torch.arange(80) % 2
    logits = 0.6 * torch.randn(Q, 2, generator=generator) + 0.1 * torch.randn(80, Q, 2, generator=generator)
    logits[secrets == 1, :, 1] += 0.3
    logits[secrets == 1] *= 2
    views = Views(logits.log_softmax(2))
    known, seen = (views.at(part) for part in torch.arange(80).split(40))
    shadows = Shadows(known, secrets[:40], ClassSecret((0, 1)), asked())
    targets = Views(label_only(seen.answers()), "labels")
    guesses = kl_test(shadows, targets).secrets
    assert (guesses == secrets[40:]).double().mean() > 0.9


def test_the_published_meta_classifier_reads_raw_outputs_of_half_of_the_shadows():
    from sklearn.neural_network import MLPRegressor

    secret = NumberSecret(((0.0, 1.0),))
    known, truth = secret.uniform(80, 0), secret.uniform(30, 1)
    generator = torch.Generator().manual_seed(2)
    own, seen = (
        5 + each.float() @ torch.ones(1, Q) + 0.1 * torch.randn(len(each), Q, generator=generator)
        for each in (known, truth)
    )
    shadows = Shadows(Views(own[..., None], "real"), known, secret, asked())
    guesses = published_meta_classifier(shadows, Views(seen[..., None], "real"), 3).secrets
    half = np.random.RandomState(3).permutation(80)[40:]
    expected = MLPRegressor(
        hidden_layer_sizes=(128, 64), max_iter=1024, early_stopping=True, validation_fraction=0.1, random_state=3
    ).fit(own.double().numpy()[half], known.numpy()[half, 0])
    np.testing.assert_allclose(guesses[:, 0].numpy(), expected.predict(seen.double().numpy()), atol=1e-9)
    far = published_meta_classifier(shadows, Views(seen[..., None] + 50, "real"), 3).secrets
    assert far.min() < 0 or far.max() > 1


def test_the_published_meta_classifier_finds_a_leak_through_one_output():
    secret = ClassSecret((0, 1))
    secrets, truth = secret.even(200), secret.even(100)
    views = [real_outputs(torch.zeros(2), each, 0.3, seed) for seed, each in enumerate((secrets, truth))]
    for view, each in zip(views, (secrets, truth), strict=True):
        view.outputs[:, 5, 0] += 4 * each
    shadows = Shadows(views[0], secrets, secret, asked())
    assert play(shadows, views[1], truth, published_meta_classifier, seeds=range(3)).accuracy.mean > 0.9
    blind = play(shadows.permuted(0), views[1], truth, published_meta_classifier, seeds=range(3))
    assert blind.accuracy.mean < 0.8


def test_a_calibrated_threshold_helps_where_one_class_answers_more_alike():
    """Shadows of the second class scatter, so that nearly all are nearer to those of the first."""
    secret = ClassSecret((0, 1))
    means = torch.tensor([0.0, 0.3])
    parts = []
    for count, seed in ((80, 1), (400, 2)):
        secrets = secret.even(count)
        near, far = (real_outputs(means, secrets, sigma, seed).outputs for sigma in (0.2, 0.35))
        parts.append((Views(torch.where(secrets[:, None, None] == 1, far, near), "real"), secrets))
    (own, secrets), (seen, truth) = parts
    shadows = Shadows(own, secrets, secret, asked())
    voted, calibrated = (play(shadows, seen, truth, attack) for attack in (kl_test, calibrated_kl_test))
    assert voted.accuracy.mean < 0.8
    assert calibrated.accuracy.mean > 0.95, calibrated.accuracy
    assert calibrated.auc == pytest.approx(voted.auc)


def test_shares_and_threshold_of_shadows_are_those_of_a_search():
    generator = torch.Generator().manual_seed(1)
    secrets = torch.tensor([0, 1, 2, 0, 1, 1, 0, 2, 1])
    apart = (secrets[:, None] - secrets).abs()
    own = (torch.randn(2, 9, 9, generator=generator) + 0.6 * apart).double().abs()
    first, second = secrets == 0, secrets == 1
    shares, upper = _shares_of_shadows(own, first, second)
    expected = []
    for t in (first | second).nonzero()[:, 0].tolist():
        pairs = [(a, b) for a in first.nonzero()[:, 0] for b in second.nonzero()[:, 0] if t not in (a, b)]
        votes = [(own[origin, a, t] > own[origin, b, t]).double() for origin in (0, 1) for a, b in pairs]
        expected.append(torch.stack(votes).mean().item())
    assert shares.tolist() == pytest.approx(expected)
    threshold = _threshold_of_shares(shares, upper)

    def balanced(cut):
        return ((shares > cut)[upper].double().mean() + (shares <= cut)[~upper].double().mean()).item()

    ordered = shares.sort().values
    assert 1 < balanced(threshold) < 2
    assert balanced(threshold) == pytest.approx(max(map(balanced, (ordered[1:] + ordered[:-1]) / 2)))
    same = torch.full((4,), 0.7, dtype=torch.float64)
    assert _threshold_of_shares(same, torch.tensor([True, False, True, False])) == 0.5


def test_numbers_of_the_kl_test_are_drawn_out_to_the_range_of_shadows():
    secret = NumberSecret(((0.0, 1.0),))
    known, truth = secret.uniform(60, 0), secret.uniform(200, 1)
    views = []
    for each, seed in ((known, 2), (truth, 3)):
        noise = 0.8 * torch.randn(len(each), Q, generator=torch.Generator().manual_seed(seed))
        views.append(Views((each.float() + noise)[..., None], "real"))
    shadows = Shadows(views[0], known, secret, asked())
    plain, drawn = (attack(shadows, views[1], 0).secrets for attack in (kl_test, calibrated_kl_test))
    line = np.polyfit(plain[:, 0], drawn[:, 0], 1)
    inside = (drawn > 0) & (drawn < 1)
    np.testing.assert_allclose(np.polyval(line, plain[inside]), drawn[inside], atol=0.05)
    assert line[0] > 1
    errors = [(each - truth).abs().mean().item() for each in (plain, drawn)]
    assert errors[1] < errors[0]


def test_divergences_of_labels_are_counts_of_disagreements():
    generator = torch.Generator().manual_seed(0)
    own, seen = (label_only(torch.randn(count, Q, 3, generator=generator)) for count in (7, 9))
    origins = torch.arange(2).repeat_interleave(Q // 2)
    found = _divergences(Views(own, "labels"), Views(seen, "labels"), asked(origins))
    probabilities = _divergences(Views(own), Views(seen), asked(origins))
    torch.testing.assert_close(found, probabilities)
    differ = (own.argmax(2)[:, None] != seen.argmax(2)).double()
    for origin in (0, 1):
        counts = differ[..., origins == origin].sum(2)
        assert len(found[origin].unique()) == len(counts.unique())
    alone = _divergences(Views(own, "labels"), Views(seen[3:4], "labels"), asked(origins))
    assert torch.equal(alone, found[..., 3:4])


def test_attacks_refuse_what_they_cannot_learn_from():
    secret, number = ClassSecret((0.3, 0.5)), NumberSecret(((0.0, 1.0),))
    views = real_outputs(torch.zeros(2), secret.even(20), 1.0, 0)
    nan = Views(views.answers().clone(), "real")
    nan.outputs[3, 2] = torch.nan
    for attack in (kl_test, calibrated_kl_test, threshold_test, published_meta_classifier):
        with pytest.raises(ZooError, match="outputs of some model are NaN"):
            attack(Shadows(nan, secret.even(20), secret, asked(labels=torch.zeros(Q))), views, 0)
    with pytest.raises(ZooError, match=r"0 shadows have the secret 0\.5: expected at least 1"):
        kl_test(Shadows(views, torch.zeros(20, dtype=torch.int64), secret, asked()), views)
    with pytest.raises(ZooError, match="one shadow has no other"):
        kl_test(Shadows(views.at(torch.tensor([0])), number.even(1), number, asked()), views)
    rare = torch.tensor([0] * 17 + [1] * 3)
    with pytest.raises(ZooError, match=r"3 shadows have the secret 0\.5: expected at least 4"):
        published_meta_classifier(Shadows(views, rare, secret, asked()), views)
    with pytest.raises(ZooError, match="7 shadows are too few"):
        published_meta_classifier(Shadows(views.at(torch.arange(14)), number.even(14), number, asked()), views)
    alone = torch.tensor([0] * 19 + [1])
    with pytest.raises(ZooError, match=r"1 shadows have the secret 0\.5: expected at least 2"):
        BLACK_BOX["meta_classifier"](Shadows(views, alone, secret, asked()), views, 0)


def test_attacks_are_chosen_by_halves_of_the_shadows_that_keep_their_classes():
    secret = ClassSecret((0, 1, 2))
    secrets = torch.tensor([0] * 40 + [1] * 10 + [2] * 4)[
        torch.randperm(54, generator=torch.Generator().manual_seed(3))
    ]
    views = real_outputs(torch.tensor([0.0, 2.0, 4.0]), secrets, 0.3, 0)
    shadows = Shadows(views, secrets, secret, asked(labels=torch.zeros(Q)))
    asked_of = []

    def attack(half, targets, seed=0):
        asked_of.append(half.secrets.bincount(minlength=3).tolist())
        return kl_test(half, targets, seed)

    assert on_shadows(shadows, attack, "real") > 0.9
    assert asked_of == [[20, 5, 2]]
    for name in ("meta_classifier", "calibrated_kl_test", "threshold_test"):
        assert 0.5 < on_shadows(shadows, BLACK_BOX[name], "real") <= 1


def test_the_threshold_of_shares_breaks_no_tie_by_rounding():
    """The first of the cuts that are best, by fractions."""
    generator = torch.Generator().manual_seed(0)
    for sizes in ((6, 9), (14, 10), (5, 5), (3, 7)):
        second = torch.tensor([False] * sizes[0] + [True] * sizes[1])
        for _ in range(40):
            shares = (torch.randint(0, 8, (sum(sizes),), generator=generator) + 2 * second).double() / 10
            cuts = sorted({round(value, 9) for value in shares.tolist()})
            best, expected = Fraction(0), 0.5
            for low, high in itertools.pairwise(cuts):
                below = [(shares[second == upper] <= low).sum().item() for upper in (False, True)]
                gain = Fraction(below[0], sizes[0]) - Fraction(below[1], sizes[1])
                if gain > best:
                    best, expected = gain, (low + high) / 2
            assert _threshold_of_shares(shares, second) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["meta_classifier", "published"])
def test_ctrl_c_in_the_training_of_a_meta_classifier_ends_it(name, monkeypatch):
    from sklearn.neural_network import MLPClassifier

    def interrupted(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(MLPClassifier, "_update_no_improvement_count", interrupted)
    secret = ClassSecret((0, 1))
    views = real_outputs(torch.tensor([0.0, 1.0]), secret.even(40), 1.0, 0)
    attack = BLACK_BOX.get(name, published_meta_classifier)
    with pytest.raises(KeyboardInterrupt):
        attack(Shadows(views, secret.even(40), secret, asked()), views, 0)
