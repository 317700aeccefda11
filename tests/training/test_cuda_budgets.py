"""Training on a CUDA device: the CPU's weights by every objective, in steps that wait for nothing."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from simulated_kernels import DeviceTensor

from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.loop import train_epoch
from vitzoo_hf.training.private_trainer import PrivateTrainer
from vitzoo_hf.training.run import initial_model
from vitzoo_hf.training.stacked import train_run, train_stacked
from vitzoo_hf.training.stacked_trainer import StackedTrainer
from vitzoo_hf.training.trainer import SingleTrainer
from vitzoo_hf.training.world_trainer import WorldTrainer

TEXT = """\
name: on-cuda
architecture:
  name: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 4, in_chans: CHANNELS, embed_dim: 8, depth: 1, num_heads: 2}
images:
  digits: {size: 8, IMAGES}
stages:
  pretrain: {images: digits, epochs: 1, keep_epochs: [0, 1], SETTINGS}
splits: {by: run, seed: 3, train: 0.6, validation: 0.2, test: 0.2}
"""
RECIPES = {
    "adamw": "factors: {seed: [1, 2], lr: [1e-3, 3e-3], batch_size: 150}",
    "sgd": "factors: {seed: [1, 2], optimizer: sgd, momentum: [0, 0.9], batch_size: 150}",
    "cropped": "factors: {seed: [1, 2], schedule: cosine, augmentation: crop-flip, batch_size: 150}",
    "contrastive": "factors: {seed: [1, 2], regime: contrastive, augmentation: simclr, batch_size: 150}",
    "contrastive, erased": "factors: {seed: [1, 2], regime: contrastive, augmentation: simclr-no-flip,"
    " random_erase: 0.5, batch_size: 150}",
    "smoothed, erased": "factors: {seed: [1, 2], label_smoothing: [0, 0.2], random_erase: 0.25, batch_size: 150}",
    "mixed": "factors: {seed: [1, 2], mixup: 0.8, cutmix: 1.0, label_smoothing: [0, 0.1], batch_size: 150}",
}
LEARNERS = {
    "erm": "",
    "causal": "learner: causal, ",
    "colour-randomised": "learner: colour-randomised, ",
    "irm": "learner: irm, penalty_weight: 100, penalty_from: 1, ",
    "irm-product": "learner: irm-product, penalty_weight: 10, ",
    "v-rex": "learner: v-rex, penalty_weight: 10, ",
    "group-dro": "learner: group-dro, group_rate: 0.5, ",
    "resample": "learner: resample, resample_by: agreement, resample_to: 0.75, ",
    "stopped": "stop_loss: 0.68, ",
    "shifted": "augmentation: shift, ",
}
WORLD = (
    "settings: {lr: 0.003, batch_size: 24, epoch_steps: 2, LEARNERenvironments: [0.9, 0.6], num_images: 96},"
    " factors: {label_ratio: [0.3, 0.7]}, replicas: 1"
)


@pytest.fixture
def make(tmp_path):
    def make(settings, images="selection: 0.4, test: 0.5", channels=1):
        text = TEXT.replace("SETTINGS", settings).replace("IMAGES", images).replace("CHANNELS", str(channels))
        file = tmp_path / "zoo.yaml"
        file.write_text(text)
        return Blueprint.load(file)

    return make


@pytest.fixture
def make_world(make):
    images = "selection: 0.4, world: two-colour, queries: 40, tests: 60"
    return lambda learner: make(WORLD.replace("LEARNER", LEARNERS.get(learner, learner)), images, 3)


@pytest.fixture
def make_stack(make):
    """Zoos of two batches an epoch, also for contrastive recipes, which drop the last batch where it is short."""
    return lambda recipe, seeds="[1, 2]": make(RECIPES[recipe].replace("[1, 2]", seeds), "selection: 0.4, test: 0.3")


def trainer_of(zoo, device):
    images = load_images("digits", zoo.images["digits"])
    models = [initial_model(PreparedBlueprint(zoo), run, Path()) for run in zoo.runs]
    if zoo.runs[0].world is not None:
        return WorldTrainer(zoo.runs, images, models, device)
    return StackedTrainer([run.recipe for run in zoo.runs], images, models, 1, device)


def assert_trains_as_on_the_cpu(make_trainer, tolerance=1e-4):
    trainers = {device: make_trainer(device) for device in ("cuda", "cpu")}
    for trainer in trainers.values():
        assert train_epoch(trainer, 1) == []
    weights = {device: trainer.weights.detach() for device, trainer in trainers.items()}
    assert isinstance(weights["cuda"], DeviceTensor)
    torch.testing.assert_close(weights["cuda"].cpu(), weights["cpu"], rtol=0, atol=tolerance)
    for result, expected in zip(*(trainer.results() for trainer in trainers.values()), strict=True):
        assert result == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stacks_train_as_on_the_cpu(simulated_cuda, make, recipe):
    zoo = make(RECIPES[recipe])
    assert_trains_as_on_the_cpu(lambda device: trainer_of(zoo, device))


@pytest.mark.parametrize("learner", LEARNERS)
def test_worlds_train_as_on_the_cpu(simulated_cuda, make_world, learner):
    zoo = make_world(learner)
    assert_trains_as_on_the_cpu(lambda device: trainer_of(zoo, device))


PRIVATE = "learner: dp-sgd, noise_multiplier: 0.5, clip_norm: 1.0, optimizer: sgd, "


def test_private_training_is_that_of_the_cpu(simulated_cuda, make_world):
    pytest.importorskip("opacus", reason="opacus is an extra: pip install 'vitzoo-hf[privacy]'")
    zoo = make_world(PRIVATE)
    run = zoo.runs[0]
    images = load_images("digits", zoo.images["digits"])

    def make_trainer(device):
        return PrivateTrainer([run], images, [initial_model(PreparedBlueprint(zoo), run, Path())], device)

    assert_trains_as_on_the_cpu(make_trainer)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("recipe", ["sgd", "contrastive", "mixed"])
def test_one_model_trains_as_on_the_cpu(simulated_cuda, make, recipe, precision):
    zoo = make(RECIPES[recipe].replace("batch_size", f"precision: {precision}, batch_size"))
    run = zoo.runs[0]
    images = load_images("digits", zoo.images["digits"])
    models = {}
    for device in ("cuda", "cpu"):
        model = initial_model(PreparedBlueprint(zoo), run, Path())
        trainer = SingleTrainer(run.recipe, images, model, 1, device)
        assert train_epoch(trainer, 1) == []
        (results,) = trainer.results()
        assert results
        models[device] = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    tolerance = 1e-4 if precision == "float32" else 2e-2
    torch.testing.assert_close(models["cuda"], models["cpu"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("train", [train_run, train_stacked])
def test_files_of_runs_are_those_of_the_cpu(simulated_cuda, make, tmp_path, train):
    zoo = make(RECIPES["adamw"])
    for device in ("cuda", "cpu"):
        runs = zoo.runs[0] if train is train_run else zoo.runs[:2]
        train(PreparedBlueprint(zoo), runs, tmp_path / device, device=device)
    for epoch in (0, 1):
        (tensors, results), (expected, expected_results) = (
            RunFolder(tmp_path / device / zoo.runs[0].run_id).load_epoch(epoch) for device in ("cuda", "cpu")
        )
        torch.testing.assert_close(tensors, expected, rtol=0, atol=1e-4)
        assert results == pytest.approx(expected_results, abs=1e-3)


def cost_of_a_step(device, trainer):
    draws = trainer.draws(1)
    fed = trainer.feed.batches(trainer.batches(1), draws)
    trainer.step(islice(fed, 1), draws, 0.0)
    device.reset()
    trainer.step(islice(fed, 1), draws, 0.5)
    return device.kernels, device.syncs, device.h2d


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_step_of_a_world_reads_nothing(simulated_cuda, make_world, learner):
    kernels, syncs, _ = cost_of_a_step(simulated_cuda, trainer_of(make_world(learner), "cuda"))
    assert syncs == 0, simulated_cuda.lines("sync")
    assert kernels <= 200


def test_a_step_of_a_world_can_be_captured(simulated_cuda, make_world):
    _, _, copies = cost_of_a_step(simulated_cuda, trainer_of(make_world("erm"), "cuda"))
    assert copies == 0, simulated_cuda.lines("h2d")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_a_stack_waits_for_nothing(simulated_cuda, make_stack, recipe):
    _, syncs, copies = cost_of_a_step(simulated_cuda, trainer_of(make_stack(recipe), "cuda"))
    assert syncs == copies == 0, simulated_cuda.where


GROWS = {
    "cropped": "every model draws on its own: augment.py:64",
    "contrastive": "every model draws on its own: augment.py:64",
    "contrastive, erased": "timm erases model by model: stacked_trainer.py:154",
    "smoothed, erased": "timm erases model by model: stacked_trainer.py:154",
    "mixed": "timm mixes model by model: losses.py:29",
}


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=pytest.mark.xfail(reason=GROWS[recipe], raises=AssertionError, strict=True))
        if recipe in GROWS
        else recipe
        for recipe in RECIPES
    ],
)
def test_a_step_of_more_models_is_as_many_kernels(simulated_cuda, make_stack, recipe):
    few, more = (
        cost_of_a_step(simulated_cuda, trainer_of(make_stack(recipe, seeds), "cuda"))[0]
        for seeds in ("[1, 2]", "[1, 2, 3, 4]")
    )
    assert few == more
