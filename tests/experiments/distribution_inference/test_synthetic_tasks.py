"""Synthetic worlds and stacked MLPs, against one model at a time in plain PyTorch."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from distribution_inference.synthetic_tasks import (
    EQUAL_ROWS,
    PUBLISHED_ROWS,
    TEACHER,
    Learner,
    TeacherWorld,
    draw_environments,
    flipped,
)
from torch import nn

from vitzoo_hf.apply.distribution_inference.attacks import stacked_mlps
from vitzoo_hf.apply.distribution_inference.attacks.stacked_mlps import (
    Training,
    Widths,
    diverged,
    initial_mlps,
    mlp_outputs,
    squared_error,
    train_mlps,
)
from vitzoo_hf.format.layout import unflatten

WIDTHS = Widths(3, 5)


def as_module(vector, widths):
    parts = unflatten(vector, widths.layout)
    module = nn.Sequential(nn.Linear(widths.inputs, widths.hidden), nn.ReLU(), nn.Linear(widths.hidden, 1))
    for parameter, part in zip(module.parameters(), parts.values(), strict=True):
        parameter.data = part.clone()
    return module


def data(models, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(models, WIDTHS.inputs, n, generator=generator)
    return inputs, inputs.sum(1).sin() + 1


def test_initial_weights_are_those_of_pytorch():
    drawn = unflatten(initial_mlps(Widths(4, 32), 4000, torch.Generator().manual_seed(0)), Widths(4, 32).layout)
    torch.manual_seed(0)
    for name, layer in (("hidden", nn.Linear(4, 32)), ("output", nn.Linear(32, 1))):
        bound = 1 / math.sqrt(layer.in_features)
        for part in ("weight", "bias"):
            values = drawn[f"{name}.{part}"]
            assert values.abs().max() <= bound
            assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert getattr(layer, part).abs().max() <= bound


def test_outputs_are_those_of_single_models():
    vectors = initial_mlps(WIDTHS, 4, torch.Generator().manual_seed(1))
    inputs, _ = data(4, 7)
    expected = torch.stack([as_module(v, WIDTHS)(x.mT)[:, 0] for v, x in zip(vectors, inputs, strict=True)])
    torch.testing.assert_close(mlp_outputs(vectors, WIDTHS, inputs), expected)
    torch.testing.assert_close(mlp_outputs(vectors, WIDTHS, inputs[:1])[0], expected[0])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_training_is_that_of_pytorch_in_the_same_order(name):
    training = Training(lr=0.01, weight_decay=0.05, epochs=3, batch_size=8, optimizer=name)
    inputs, targets = data(3, 20)
    found = train_mlps(WIDTHS, inputs, targets, training, seed=5)
    generator = torch.Generator().manual_seed(5)
    start = initial_mlps(WIDTHS, 3, generator)
    modules = [as_module(vector, WIDTHS) for vector in start]
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    optimizers = [kinds[name](module.parameters(), lr=0.01, weight_decay=0.05) for module in modules]
    for _ in range(3):
        for batch in torch.randperm(20, generator=generator).split(8):
            for module, optimizer, x, y in zip(modules, optimizers, inputs, targets, strict=True):
                optimizer.zero_grad()
                nn.functional.mse_loss(module(x[:, batch].mT)[:, 0], y[batch]).backward()
                optimizer.step()
    expected = torch.stack([torch.cat([p.detach().flatten() for p in module.parameters()]) for module in modules])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_each_model_stops_where_it_would_alone(monkeypatch):
    """Three models with targets of other sizes; each is trained again by itself, from the same start and order."""
    inputs, targets = data(3, 64)
    targets = targets * torch.tensor([0.1, 1.0, 30.0])[:, None]
    training = Training(lr=0.01, epochs=8, batch_size=16, stop_below=0.7)
    together = train_mlps(WIDTHS, inputs, targets, training, seed=2)
    starts = initial_mlps(WIDTHS, 3, torch.Generator().manual_seed(2))
    endless = train_mlps(WIDTHS, inputs, targets, Training(lr=0.01, epochs=8, batch_size=16), seed=2)
    for model in range(3):

        def alone(widths, count, generator, model=model):
            torch.rand(3, widths.layout.num_parameters, generator=generator)
            return starts[[model]].clone()

        monkeypatch.setattr(stacked_mlps, "initial_mlps", alone)
        one = train_mlps(WIDTHS, inputs[[model]], targets[[model]], training, seed=2)
        torch.testing.assert_close(one[0], together[model], rtol=1e-5, atol=1e-6)
    assert not torch.equal(together[0], endless[0])  # small targets: stopped at once
    assert torch.equal(together[2], endless[2])  # large ones: never


def test_fixed_steps_are_counted_over_epochs(monkeypatch):
    seen = []

    def counted(outputs, targets, step):
        seen.append((step, outputs.shape[1]))
        return squared_error(outputs, targets, step)

    inputs, targets = data(2, 20)
    train_mlps(WIDTHS, inputs, targets, Training(steps=7, batch_size=8), loss=counted)
    assert seen == [(0, 8), (1, 8), (2, 4), (3, 8), (4, 8), (5, 4), (6, 8)]


def test_groups_do_not_change_what_is_drawn(monkeypatch):
    inputs, targets = data(5, 32)
    monkeypatch.setattr(stacked_mlps, "SMALLEST_GROUP", 2)
    monkeypatch.setitem(stacked_mlps.GROUP_ACTIVATIONS, "cpu", 1)
    one = train_mlps(WIDTHS, inputs, targets, Training(epochs=1), seed=3)
    assert torch.equal(one, train_mlps(WIDTHS, inputs, targets, Training(epochs=1), seed=3))
    assert one.isfinite().all()


def test_divergence_is_seen_and_not_hidden():
    inputs, targets = data(2, 32)
    targets = torch.stack([targets[0], 1e6 * targets[1]])
    vectors = train_mlps(WIDTHS, inputs, targets, Training(lr=0.05, epochs=40, optimizer="sgd"))
    assert diverged(vectors).tolist() == [False, True]


def test_teachers_differ_by_epsilon_and_label_without_noise():
    same, other = TeacherWorld.conditional(0.0, 3), TeacherWorld.conditional(0.1, 3)
    assert torch.equal(same.teachers[0], same.teachers[1])
    assert (other.teachers[1] - other.teachers[0]).std() == pytest.approx(0.1, rel=0.2)
    draw = other.draw(torch.tensor([0.0, 1.0]), 4000, torch.Generator().manual_seed(0))
    expected = as_module(other.teachers[1], TEACHER)(draw.inputs[1].mT)[:, 0]
    torch.testing.assert_close(draw.targets[1], expected, rtol=1e-4, atol=1e-4)
    assert draw.inputs.std() == pytest.approx(2, rel=0.03)
    assert draw.inputs.mean(2).abs().max() < 0.15


def test_the_mean_of_inputs_follows_the_secret():
    world = TeacherWorld.covariate(1)
    draw = world.draw(torch.tensor([0.0, 0.25, 1.0]), 20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw.inputs.mean((1, 2)), torch.tensor([-1.0, -0.5, 1.0]), atol=0.04, rtol=0)


@pytest.mark.parametrize(("environments", "error", "flipped_error"), [(3, 0.745, 2.027), (4, 0.840, 1.582)])
def test_environments_have_the_analytic_risks(environments, error, flipped_error):
    """Of the best linear predictor `(1 - b) X1 + b X2`, `b = 1 / (1 + mean variance)`."""
    draw = draw_environments(1, environments, environments * 200_000, torch.Generator().manual_seed(0))
    b = 1 / (1 + sum((0.5 + i) ** 2 for i in range(environments)) / environments)
    for samples, expected in ((draw, error), (flipped(draw), flipped_error)):
        guess = (1 - b) * samples.inputs[:, 0] + b * samples.inputs[:, 1]
        assert (guess - samples.targets).square().mean().item() == pytest.approx(expected, rel=0.02)


def test_equal_rows_are_shared_equally_and_published_ones_are_not_equal():
    assert len(set(EQUAL_ROWS)) == 1
    assert all(rows % environments == 0 for rows, environments in zip(EQUAL_ROWS, (3, 4), strict=True))
    assert PUBLISHED_ROWS == (1536, 2048)
    with pytest.raises(ValueError, match="2048 rows of 3 environments"):
        draw_environments(1, 3, 2048, torch.Generator())


def test_causal_learner_sees_no_effect_and_irm_uses_less_of_it():
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for name in ("erm", "causal", "irm_squared"):
        learner = Learner(name)
        draw = draw_environments(8, 3, 510, generator).select(learner.widths.inputs)
        training = replace(learner.training, steps=1000 if name == "irm_squared" else 160)
        vectors = train_mlps(learner.widths, draw.inputs, draw.targets, training, loss=learner.loss(3, 0))
        vectors = vectors[~diverged(vectors)]
        test = draw_environments(1, 3, 6000, torch.Generator().manual_seed(9))
        found = []
        for samples in (test, flipped(test)):
            outputs = mlp_outputs(vectors, learner.widths, samples.select(learner.widths.inputs).inputs)
            found.append((outputs - samples.targets).square().mean(1).median().item())
        errors[name] = found
    assert errors["causal"][0] == errors["causal"][1]
    assert errors["erm"][1] > errors["irm_squared"][1] > errors["causal"][1]


def test_published_penalty_is_autograds_product_on_halves():
    outputs = torch.randn(1, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    found = Learner("irm").loss(2, 4)(outputs, targets, 0)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    expected = torch.tensor(0.0)
    for f, y in zip(outputs[0].split(6), targets[0].split(6), strict=True):
        expected = expected + 0.1 * (f - y).square().mean()
        gradients = []
        for half in (order[::2], order[1::2]):
            scale = torch.tensor(1.0, requires_grad=True)
            loss = (scale * f[half] - y[half]).square().mean()
            gradients.append(torch.autograd.grad(loss, scale, create_graph=True)[0])
        expected = expected + gradients[0] * gradients[1]
    torch.testing.assert_close(found[0], expected)
    (one,) = torch.autograd.grad(found.sum(), outputs, retain_graph=True)
    torch.testing.assert_close(one, torch.autograd.grad(expected, outputs)[0])
    assert copy.copy(Learner("irm")) == Learner("irm")
    with pytest.raises(ValueError, match="learner 'irl'"):
        Learner("irl")


@pytest.mark.gpu
def test_training_on_cuda_is_that_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs, targets = data(5, 64)
    one, other = (train_mlps(WIDTHS, inputs, targets, Training(epochs=2), device=place) for place in ("cpu", "cuda"))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
