"""The parts of stacked training, each against what torch or the module does for one model."""

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitzoo_hf.blueprint.blueprint import Recipe
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models import vit
from vitzoo_hf.models.batched import BatchedViT
from vitzoo_hf.training.losses import info_nce, make_erase, make_mix, stacked_cross_entropy, stacked_info_nce
from vitzoo_hf.training.seeds import GlobalDraws, seeded_globals
from vitzoo_hf.training.stacked_optimizers import StackedOptimizer

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def models_of(args, count, **options):
    models = [vit.create(NAME, args, seed=seed, **options) for seed in range(count)]
    generator = torch.Generator().manual_seed(0)
    for model in models:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return models


def leaves(models):
    states = [model.state_dict() for model in models]
    return {name: torch.stack([state[name] for state in states]).requires_grad_() for name in states[0]}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    patch=st.sampled_from([1, 2, 4]),
    channels=st.integers(1, 3),
    heads=st.integers(1, 3),
    depth=st.integers(1, 2),
    mlp=st.booleans(),
    count=st.integers(1, 4),
    batch=st.integers(1, 5),
)
def test_outputs_and_gradients_are_those_of_the_modules_in_float64(
    grid, patch, channels, heads, depth, mlp, count, batch
):
    size = (grid[0] * patch, grid[1] * patch)
    args = {"img_size": size, "patch_size": patch, "in_chans": channels, "embed_dim": 4 * heads, "depth": depth}
    args |= {"num_heads": heads, "num_classes": 4}
    models = models_of(args, count, **({"head": "mlp", "head_hidden": 5} if mlp else {}))
    images = torch.randn(count, batch, channels, *size, generator=torch.Generator().manual_seed(1))
    sizes, tensors = BatchedViT.trainable(models[0]), leaves(models)
    logits = sizes.logits(tensors, images)
    gradients = torch.autograd.grad(logits.square().mean((1, 2)).sum(), list(tensors.values()))
    for number, model in enumerate(models):
        expected = model.double()(images[number].double())
        torch.testing.assert_close(logits[number].double(), expected, atol=2e-5, rtol=1e-4)
        expected.square().mean().backward()
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(
                gradient[number].double(),
                parameter.grad,
                atol=2e-5,
                rtol=1e-3,
                msg=lambda text, name=name: name + text,
            )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
def test_models_do_not_mix(bad):
    models = models_of(SMALL, 3)
    sizes = BatchedViT.trainable(models[0])
    images = torch.randn(3, 4, 1, 8, 8)
    found = []
    for value in (None, bad):
        tensors = leaves(models)
        if value is not None:
            images[1] = value
        losses = stacked_cross_entropy(sizes.logits(tensors, images), torch.zeros(3, 4, dtype=torch.int64))
        found.append((losses, torch.autograd.grad(losses.sum(), list(tensors.values()))))
    (before, clean), (after, hurt) = found
    assert not torch.equal(before[1], after[1])
    for model in (0, 2):
        assert torch.equal(before[model], after[model])
        assert all(torch.equal(first[model], second[model]) for first, second in zip(clean, hurt, strict=True))


@pytest.mark.parametrize(
    "drawing", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "patch_drop_rate"]
)
def test_models_that_draw_while_they_train_are_not_taken(drawing):
    assert BatchedViT.trainable(vit.create(NAME, SMALL)) is not None
    assert BatchedViT.trainable(vit.create(NAME, SMALL | {drawing: 0.1})) is None
    assert BatchedViT.trainable(vit.create(NAME, SMALL | {"qk_norm": True})) is None


values = st.floats(0, 0.5)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["adamw", "sgd"]),
    chosen=st.lists(st.tuples(st.floats(1e-5, 0.5), values, values | st.just(0.0)), min_size=1, max_size=4),
    size=st.integers(1, 9),
    scales=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    seed=st.integers(0, 9),
)
def test_updates_are_those_of_torch(kind, chosen, size, scales, seed):
    recipes = [
        Recipe(optimizer=kind, lr=lr, weight_decay=decay, momentum=momentum if kind == "sgd" else 0.0)
        for lr, decay, momentum in chosen
    ]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(recipes), size, generator=generator, dtype=torch.float64)
    gradients = torch.randn(len(scales), *start.shape, generator=generator, dtype=torch.float64)
    weights = start.clone()
    optimizer = StackedOptimizer.of(recipes, weights)
    for gradient, scale in zip(gradients, scales, strict=True):
        optimizer.step(weights, gradient, scale)
    for number, recipe in enumerate(recipes):
        parameter = torch.nn.Parameter(start[number].clone())
        theirs = {
            "adamw": lambda p, r=recipe: torch.optim.AdamW([p], lr=r.lr, weight_decay=r.weight_decay, foreach=False),
            "sgd": lambda p, r=recipe: torch.optim.SGD(
                [p], lr=r.lr, weight_decay=r.weight_decay, momentum=r.momentum, foreach=False
            ),
        }[kind](parameter)
        for gradient, scale in zip(gradients, scales, strict=True):
            theirs.param_groups[0]["lr"] = recipe.lr * scale
            parameter.grad = gradient[number].clone()
            theirs.step()
        torch.testing.assert_close(weights[number], parameter.data, atol=1e-12, rtol=1e-12)
        state = {name: value for name, value in theirs.state[parameter].items() if value is not None}
        steps = state.pop("step", torch.tensor(float(len(scales))))
        assert optimizer.steps == int(steps)
        assert optimizer.of_model(number).keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(optimizer.of_model(number)[name], value, atol=1e-12, rtol=1e-12)


def test_a_model_that_leaves_changes_nothing_for_the_others():
    recipes = [Recipe(lr=lr, weight_decay=0.1) for lr in (0.1, 0.2, 0.3)]
    start, gradients = torch.randn(3, 5), torch.randn(4, 3, 5)
    results = []
    for leaving in (False, True):
        weights = start.clone()
        optimizer = StackedOptimizer.of(recipes, weights)
        optimizer.step(weights, gradients[0], 1.0)
        rest = slice(None)
        if leaving:
            rest = [0, 2]
            optimizer.keep(rest)
            weights = weights[rest]
        for gradient in gradients[1:]:
            optimizer.step(weights, gradient[rest], 0.5)
        results.append(weights)
    assert torch.equal(results[0][[0, 2]], results[1])


def test_different_optimizers_are_refused():
    with pytest.raises(ZooError, match="models with optimizers adamw, sgd cannot be updated together: group them"):
        StackedOptimizer.of([Recipe(), Recipe(optimizer="sgd")], torch.zeros(2, 1))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_stacked_info_nce_is_that_of_each_model_in_float64(count, temperature):
    outputs = torch.randn(3, 2 * count, 5, generator=torch.Generator().manual_seed(count))
    expected = torch.stack([info_nce(each.double(), temperature) for each in outputs])
    torch.testing.assert_close(stacked_info_nce(outputs, temperature).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_stacked_cross_entropy_is_that_of_each_model(soft):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (3, 7), generator=generator)
    targets = torch.randn(3, 7, 4, dtype=torch.float64).softmax(2) if soft else targets
    expected = [torch.nn.functional.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
    torch.testing.assert_close(stacked_cross_entropy(logits, targets), torch.stack(expected))


def test_alternating_draws_are_those_of_one_stretch():
    recipe = Recipe(mixup=0.8, cutmix=1.0, random_erase=0.5)
    batches = torch.rand(4, 6, 1, 8, 8)
    mix, erase = make_mix(recipe, 3), make_erase(recipe, "cpu")

    def mixed(batch):
        inputs, targets = mix(batch.clone(), torch.arange(6) % 3)
        return erase(inputs), targets

    expected = {}
    for seed in (1, 2):
        with seeded_globals(seed):
            expected[seed] = [mixed(batch) for batch in batches]
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    draws = {seed: GlobalDraws(seed, "cpu") for seed in (1, 2)}
    for number, batch in enumerate(batches):
        for seed in (1, 2):
            with draws[seed].taken():
                inputs, targets = mixed(batch)
            assert torch.equal(inputs, expected[seed][number][0])
            assert torch.equal(targets, expected[seed][number][1])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
