"""Penalties over environments against autograd on one model at a time."""

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from vitzoo_hf.training.world_losses import (
    annealed,
    group_shares,
    half_scale_gradients,
    invariance_penalty,
    invariance_product,
    logit_scale_gradients,
    risk_variance,
    scale_gradients,
)

M, E, N, K = 3, 4, 7, 5


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def dummy_gradient(loss_of_scale):
    """As the authors of IRM compute it: autograd through a scale of 1."""
    scale = torch.tensor(1.0, requires_grad=True)
    return torch.autograd.grad(loss_of_scale(scale), scale)[0]


def test_squared_loss_gradient_is_autograds(generator):
    outputs, targets = torch.randn(M, E, N, generator=generator), torch.randn(M, E, N, generator=generator)
    found = scale_gradients(outputs, targets)
    for model in range(M):
        for environment in range(E):
            f, y = outputs[model, environment], targets[model, environment]
            expected = dummy_gradient(lambda w, f=f, y=y: mse_loss(w * f, y))
            torch.testing.assert_close(found[model, environment], expected)


def test_cross_entropy_gradient_is_autograds(generator):
    logits = torch.randn(M, E, N, K, generator=generator)
    labels = torch.randint(K, (M, E, N), generator=generator)
    found = logit_scale_gradients(logits, labels)
    for model in range(M):
        for environment in range(E):
            f, y = logits[model, environment], labels[model, environment]
            expected = dummy_gradient(lambda w, f=f, y=y: cross_entropy(w * f, y))
            torch.testing.assert_close(found[model, environment], expected)


def test_examples_that_are_not_there_do_not_count(generator):
    outputs, targets = torch.randn(M, E, N, generator=generator), torch.randn(M, E, N, generator=generator)
    logits, labels = torch.randn(M, E, N, K, generator=generator), torch.randint(K, (M, E, N), generator=generator)
    counted = torch.arange(N).expand(M, E, N) < 4
    outputs[..., 4:] = torch.inf
    torch.testing.assert_close(
        scale_gradients(outputs, targets, counted), scale_gradients(outputs[..., :4], targets[..., :4])
    )
    torch.testing.assert_close(
        logit_scale_gradients(logits, labels, counted), logit_scale_gradients(logits[..., :4, :], labels[..., :4])
    )
    nothing = torch.zeros(M, E, N, dtype=torch.bool)
    assert (logit_scale_gradients(logits, labels, nothing) == 0).all()


def test_product_of_equal_halves_is_the_square_and_has_no_lower_bound(generator):
    gradients = torch.randn(M, E, generator=generator)
    torch.testing.assert_close(invariance_product(gradients, gradients), invariance_penalty(gradients))
    assert (invariance_product(gradients, -gradients) < 0).all()


@pytest.mark.parametrize("size", [6, 7])
def test_derivatives_on_halves_are_those_of_the_halves(generator, size):
    outputs, targets = torch.randn(M, E, size, generator=generator), torch.randn(M, E, size, generator=generator)
    order = torch.randperm(size, generator=generator)
    first, second = half_scale_gradients(outputs, targets, order)
    even, odd = order[::2], order[1::2]
    torch.testing.assert_close(first, scale_gradients(outputs[..., even], targets[..., even]))
    torch.testing.assert_close(second, scale_gradients(outputs[..., odd], targets[..., odd]))


def test_penalty_vanishes_exactly_where_no_scale_is_better_in_any_environment():
    truth = torch.randn(1, E, 1000, generator=torch.Generator().manual_seed(1))
    assert invariance_penalty(scale_gradients(truth, truth)).item() == 0
    assert invariance_penalty(scale_gradients(2 * truth, truth)).item() > 1


def test_variance_of_risks_is_numpys(generator):
    risks = torch.rand(M, E, generator=generator)
    torch.testing.assert_close(risk_variance(risks), risks.var(1, unbiased=False))
    present = torch.tensor([True, True, True, False]).expand(M, E)
    torch.testing.assert_close(risk_variance(risks, present), risks[:, :3].var(1, unbiased=False))


def test_shares_follow_the_worst_environment(generator):
    shares = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]])
    risks = torch.tensor([[0.1, 0.2, 0.9, torch.nan]])
    expected = shares[0, :3] * torch.exp(0.5 * risks[0, :3])
    found = group_shares(shares, risks, rate=0.5)
    torch.testing.assert_close(found[0, :3], expected / expected.sum())
    assert found[0, 3] == 0
    for _ in range(200):
        shares = group_shares(shares, risks, rate=0.5)
    assert shares[0, 2] > 0.999


def test_models_do_not_touch_each_other(generator):
    logits = torch.randn(M, E, N, K, generator=generator, requires_grad=True)
    labels = torch.randint(K, (M, E, N), generator=generator)
    invariance_penalty(logit_scale_gradients(logits, labels))[0].backward()
    assert logits.grad[0].abs().sum() > 0
    assert (logits.grad[1:] == 0).all()


def test_a_large_weight_does_not_make_large_steps():
    risks, penalties = torch.tensor([2.0]), torch.tensor([3.0])
    assert annealed(risks, penalties, 0.5).item() == 3.5
    assert annealed(risks, penalties, 1e4).item() == pytest.approx(3.0002)
    with pytest.raises(ValueError, match="weight=-1"):
        annealed(risks, penalties, -1)
