"""Runs trained together against the same runs trained alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vitzoo_hf.blueprint.blueprint import Blueprint, Recipe, Run
from vitzoo_hf.format.layout import flatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.training import loop, stacked
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.loop import train_epoch
from vitzoo_hf.training.run import initial_model, is_finished
from vitzoo_hf.training.stacked import groups, memory_of, shape_of, stackable, train_run, train_stacked
from vitzoo_hf.training.stacked_trainer import StackedTrainer
from vitzoo_hf.training.trainer import DivergedError, SingleTrainer

TEXT = """\
name: stacked
architecture:
  name: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2}
images:
  digits: {size: 8, selection: 0.4, test: 0.4}
stages:
  pretrain: {images: digits, epochs: 3, keep_epochs: all, factors: {PRETRAIN}}
  finetune: {images: digits, epochs: 3, keep_epochs: [0, 2], settings: {head_hidden: 8}, factors: {FINETUNE}}
splits: {by: run, seed: 3, train: 0.6, validation: 0.2, test: 0.2}
"""
PRETRAIN = {
    "adamw": "seed: [1, 2, 3], lr: [1e-3, 3e-3], batch_size: 50",
    "sgd": "seed: [1, 2], lr: [1e-2, 3e-3], optimizer: sgd, momentum: [0, 0.9], batch_size: 50",
    "cosine": "seed: [1, 2], lr: 3e-3, weight_decay: [0, 0.1], schedule: cosine, augmentation: crop, batch_size: 50",
    "contrastive": "seed: [1, 2], lr: 1e-3, regime: contrastive, augmentation: simclr-no-flip, batch_size: 50",
    "contrastive, erased": "seed: [1, 2], lr: 1e-3, regime: contrastive, augmentation: simclr, random_erase: 0.5,"
    " temperature: 0.5, batch_size: 50",
    "smoothed, erased": "seed: [1, 2], label_smoothing: [0, 0.2], random_erase: 0.25, batch_size: 50",
    "mixed": "seed: [1, 2], lr: 3e-3, augmentation: crop-flip, mixup: 0.8, cutmix: 1.0, random_erase: 0.25,"
    " label_smoothing: [0, 0.1], batch_size: 45",
    "initialised otherwise": "seed: 1, init: [timm, kaiming], lr: 1e-4, batch_size: 50",
}
FINETUNE = {
    "linear": "seed: [7, 8], batch_size: 50",
    "mlp": "head: mlp, seed: [7, 8], batch_size: 50",
    "mlp, frozen": "head: mlp, freeze_trunk: true, seed: [7, 8], weight_decay: 0.1, batch_size: 50",
    "frozen by sgd": "freeze_trunk: true, optimizer: sgd, momentum: [0.5, 0], seed: 7, batch_size: 50",
}
MODEL = ("adamw", "sgd", "contrastive")


@pytest.fixture
def make(tmp_path: Path):
    def make(pretrain: str = PRETRAIN["adamw"], finetune: str = "seed: 7", *changes: tuple[str, str]) -> Blueprint:
        text = TEXT.replace("{PRETRAIN}", f"{{{pretrain}}}").replace("{FINETUNE}", f"{{{finetune}}}")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "zoo.yaml"
        file.write_text(text)
        return Blueprint.load(file)

    return make


def stage(zoo: Blueprint, name: str = "pretrain") -> list[Run]:
    return [run for run in zoo.runs if run.stage == name]


def without_key_biases(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All weights as a vector; key biases, whose gradient is nothing but rounding, left out."""
    cut = {}
    for name, tensor in tensors.items():
        query, key, value = tensor.chunk(3) if name.endswith("qkv.bias") else (tensor, None, None)
        cut[name] = query if key is None else torch.cat([query, value])
    return flatten({name: tensor.clone() for name, tensor in cut.items()}).double()


def distance(first: Path, second: Path, run: Run, epoch: int) -> float:
    """Between the weights of a run in two folders, relative to their norm."""
    here, there = (
        without_key_biases(RunFolder(folder / run.run_id).load_epoch(epoch)[0]) for folder in (first, second)
    )
    return float((here - there).norm() / here.norm())


def assert_alike(first: Path, second: Path, run: Run) -> None:
    for epoch in run.keep_epochs:
        assert distance(first, second, run, epoch) <= (1e-5 if epoch else 0), (run.run_id, epoch)
        here, there = (RunFolder(folder / run.run_id).load_epoch(epoch)[1] for folder in (first, second))
        assert here == pytest.approx(there, abs=1e-5)


def files(folder: Path, run: Run) -> dict[str, object]:
    return {file.name: file.stat().st_size for file in (folder / run.run_id).iterdir() if file.suffix != ".json"}


def stop_at(epoch: int):
    def stop(*told: object) -> None:
        if told[-1] == epoch:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("kind", PRETRAIN)
def test_together_and_alone_give_the_same_weights(make, tmp_path, kind):
    """After 24 updates."""
    zoo = make(PRETRAIN[kind])
    runs = stage(zoo)
    assert len(groups(runs, 32)) == 1
    told = []
    assert (
        train_stacked(PreparedBlueprint(zoo), runs, tmp_path / "together", on_epoch=lambda *epoch: told.append(epoch))
        == {}
    )
    for run in runs:
        train_run(PreparedBlueprint(zoo), run, tmp_path / "alone")
        assert is_finished(zoo, run, tmp_path / "together")
        assert_alike(tmp_path / "alone", tmp_path / "together", run)
        assert [epoch for run_id, epoch in told if run_id == run.run_id] == [0, 1, 2, 3]
        assert files(tmp_path / "together", run) == files(tmp_path / "alone", run)
        specs = [(tmp_path / folder / run.run_id / "run.json").read_text() for folder in ("alone", "together")]
        assert json.loads(specs[0]) == json.loads(specs[1])


@pytest.mark.parametrize("kind", FINETUNE)
def test_fine_tuning_together_and_alone_give_the_same_weights(make, tmp_path, kind):
    """Of two parents at once; a frozen trunk stays to the bit."""
    zoo = make("seed: [1, 2]", FINETUNE[kind])
    for folder in ("alone", "together"):
        for run in stage(zoo):
            train_run(PreparedBlueprint(zoo), run, tmp_path / folder)
    runs = stage(zoo, "finetune")
    (group,) = groups(runs, 4)
    train_stacked(PreparedBlueprint(zoo), group, tmp_path / "together")
    for run in runs:
        train_run(PreparedBlueprint(zoo), run, tmp_path / "alone")
        assert_alike(tmp_path / "alone", tmp_path / "together", run)
        start, end = (RunFolder(tmp_path / "together" / run.run_id).load_epoch(epoch)[0] for epoch in (0, 3))
        for name in start:
            if "frozen" in kind:
                assert torch.equal(start[name], end[name]) != name.startswith("head."), name


def test_the_gradient_of_key_biases_is_rounding(make, tmp_path):
    """Why they are left out above: softmax takes no notice of what all keys share."""
    zoo = make("seed: 1")
    images = load_images("digits", zoo.images["digits"])
    model = initial_model(PreparedBlueprint(zoo), zoo.runs[0], tmp_path).double()
    pixels, labels = images.part("train")
    loss = torch.nn.functional.cross_entropy(model(images.normalize(pixels).double()), labels)
    loss.backward()
    query, key, value = model.get_parameter("blocks.0.attn.qkv.bias").grad.abs().chunk(3)
    assert key.max() < 1e-15 < 1e-6 < min(query.max(), value.max())


@pytest.mark.parametrize("kind", PRETRAIN)
def test_batches_are_equal_to_the_bit(make, tmp_path, kind, monkeypatch):
    zoo = make(PRETRAIN[kind])
    runs = stage(zoo)
    images = load_images("digits", zoo.images["digits"])
    models = [initial_model(PreparedBlueprint(zoo), run, tmp_path) for run in runs]
    trainer = StackedTrainer([run.recipe for run in runs], images, models, 3, "cpu")
    draws = trainer.draws(2)
    together = [trainer.inputs(batch, draws)[0] for batch in trainer.feed.batches(trainer.batches(2), draws)]
    for number, (run, model) in enumerate(zip(runs, models, strict=True)):
        alone = []
        model.register_forward_pre_hook(lambda module, given, fed=alone: fed.append(given[0].clone()))
        train_epoch(SingleTrainer(run.recipe, images, model, 3, "cpu"), 2)
        assert len(alone) == len(together) == (7 if "contrastive" in kind else 8)
        for mine, theirs in zip(alone, together, strict=True):
            assert torch.equal(mine, theirs[number])


# interruption


@pytest.mark.parametrize("kind", MODEL)
def test_what_was_begun_one_way_continues_the_other_way(make, tmp_path, kind):
    zoo = make(PRETRAIN[kind])
    runs = stage(zoo)[:3]
    runs = [run for run in runs if shape_of(run) == shape_of(runs[0])]
    for run in runs:
        train_run(PreparedBlueprint(zoo), run, tmp_path / "alone")
        with pytest.raises(KeyboardInterrupt):
            train_run(PreparedBlueprint(zoo), run, tmp_path / "alone first", on_epoch=stop_at(2))
    with pytest.raises(KeyboardInterrupt):
        train_stacked(PreparedBlueprint(zoo), runs, tmp_path / "together first", on_epoch=stop_at(2))
    for run in runs:
        resumes = [
            load_file(tmp_path / folder / run.run_id / "resume.safetensors")
            for folder in ("alone first", "together first")
        ]
        assert [{name: (t.shape, t.dtype) for name, t in sorted(found.items())} for found in resumes[:1]] == [
            {name: (t.shape, t.dtype) for name, t in sorted(found.items())} for found in resumes[1:]
        ]
        train_run(PreparedBlueprint(zoo), run, tmp_path / "together first")
    resumed = []
    train_stacked(
        PreparedBlueprint(zoo), runs, tmp_path / "alone first", on_epoch=lambda *epoch: resumed.append(epoch)
    )
    assert [epoch for _, epoch in resumed] == [2] * len(runs) + [3] * len(runs)
    for run in runs:
        for folder in ("alone first", "together first"):
            assert_alike(tmp_path / "alone", tmp_path / folder, run)
            assert files(tmp_path / folder, run) == files(tmp_path / "alone", run)


def test_an_interrupted_group_gives_the_same_weights_to_the_bit(make, tmp_path):
    zoo = make(PRETRAIN["mixed"])
    train_stacked(PreparedBlueprint(zoo), stage(zoo), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_stacked(PreparedBlueprint(zoo), stage(zoo), tmp_path / "part", on_epoch=stop_at(1))
    train_stacked(PreparedBlueprint(zoo), stage(zoo), tmp_path / "part")
    for run in stage(zoo):
        here, there = (RunFolder(tmp_path / name / run.run_id).load_epoch(3)[0] for name in ("whole", "part"))
        assert torch.equal(flatten(here), flatten(there))


def test_members_at_different_epochs_train_in_groups_of_one_epoch(make, tmp_path, monkeypatch):
    """One finished, two after epoch 2, one after epoch 1, the others not begun."""
    zoo = make(PRETRAIN["adamw"])
    runs = stage(zoo)
    for run, stop in zip(runs[:4], (3, 2, 2, 1), strict=True):
        if stop == 3:
            train_run(PreparedBlueprint(zoo), run, tmp_path / "mixed")
        else:
            with pytest.raises(KeyboardInterrupt):
                train_run(PreparedBlueprint(zoo), run, tmp_path / "mixed", on_epoch=stop_at(stop))
    sizes = []
    monkeypatch.setattr(
        stacked, "StackedTrainer", lambda recipes, *rest: sizes.append(len(recipes)) or spy(recipes, *rest)
    )
    train_stacked(PreparedBlueprint(zoo), runs, tmp_path / "mixed")
    assert sizes == [2, 2]
    train_stacked(PreparedBlueprint(zoo), runs, tmp_path / "whole")
    for run in runs:
        assert_alike(tmp_path / "whole", tmp_path / "mixed", run)


spy = StackedTrainer


def test_out_of_memory_halves_the_group(make, tmp_path, monkeypatch):
    zoo = make(PRETRAIN["adamw"])
    runs = stage(zoo)[:5]
    train_stacked(PreparedBlueprint(zoo), runs, tmp_path / "whole")
    sizes = []

    def small_memory(trainer, epoch):
        if trainer.num_models > 1:
            sizes.append(trainer.num_models)
        if trainer.num_models > 2 and epoch == 2:
            raise torch.OutOfMemoryError("for the test")
        return train_epoch(trainer, epoch)

    monkeypatch.setattr(loop, "train_epoch", small_memory)
    train_stacked(PreparedBlueprint(zoo), runs, tmp_path / "halved")
    assert sizes == [5, 5, 2, 2, 3, 2, 2]
    for run in runs:
        assert_alike(tmp_path / "whole", tmp_path / "halved", run)


# divergence


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_diverging_run_leaves_and_the_others_go_on_unharmed(make, tmp_path, optimizer):
    zoo = make(f"seed: [1, 2], lr: [1e-3, 1e30, 2e-3], optimizer: {optimizer}, batch_size: 50")
    runs = stage(zoo)
    wild = [run for run in runs if run.recipe.lr == 1e30]
    calm = [run for run in runs if run not in wild]
    told = []
    lost = train_stacked(PreparedBlueprint(zoo), runs, tmp_path / "all", on_epoch=lambda *epoch: told.append(epoch))
    reason = "the loss or a weight is no longer finite; lower the learning rate"
    assert lost == {run.run_id: f"{run.run_id} diverged in epoch 1: {reason}" for run in wild}
    train_stacked(PreparedBlueprint(zoo), calm, tmp_path / "calm")
    for run in calm:
        assert_alike(tmp_path / "calm", tmp_path / "all", run)
    for run in wild:
        with pytest.raises(DivergedError):
            train_run(PreparedBlueprint(zoo), run, tmp_path / "alone")
        places = [RunFolder(tmp_path / folder / run.run_id) for folder in ("alone", "all")]
        assert places[0].divergence == places[1].divergence == {"epoch": 1, "reason": reason}
        assert [place.epochs() for place in places] == [[0], [0]]
        assert [epoch for run_id, epoch in told if run_id == run.run_id] == [0]
        with pytest.raises(DivergedError, match="diverged in epoch 1"):
            train_run(PreparedBlueprint(zoo), run, tmp_path / "all")
    again = train_stacked(PreparedBlueprint(zoo), runs, tmp_path / "all")
    assert again == {run.run_id: f"{run.run_id} diverged in epoch 1: {reason}" for run in wild}


def test_a_group_may_diverge_whole(make, tmp_path):
    zoo = make("seed: [1, 2], lr: 1e30")
    assert list(train_stacked(PreparedBlueprint(zoo), stage(zoo), tmp_path)) == [run.run_id for run in stage(zoo)]


# groups


recipes = st.builds(
    Recipe,
    seed=st.integers(0, 3),
    lr=st.sampled_from([0.1, 0.2]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    batch_size=st.sampled_from([8, 16]),
)


@given(st.lists(recipes, max_size=20), st.integers(1, 6))
def test_groups_hold_every_run_once_and_one_shape_each(chosen, most):
    runs = [
        Run(f"r{number}", "pretrain", None, "digits", 1, (1,), recipe, {}, "train")
        for number, recipe in enumerate(chosen)
    ]
    made = groups(runs, most)
    assert sorted(run.run_id for group in made for run in group) == sorted(run.run_id for run in runs)
    for group in made:
        assert 1 <= len(group) <= most
        assert len({(run.recipe.optimizer, run.recipe.batch_size) for run in group}) == 1
        assert [runs.index(run) for run in group] == sorted(runs.index(run) for run in group)
    shapes = {(recipe.optimizer, recipe.batch_size) for recipe in chosen}
    short = [group for group in made if len(group) < most]
    assert len(short) <= len(shapes)


@pytest.mark.parametrize(
    "change",
    [
        {"head": "mlp"},
        {"schedule": "cosine"},
        {"augmentation": "crop"},
        {"mixup": 0.1},
        {"temperature": 1.0},
        {"batch_size": 3},
        {"freeze_trunk": True},
        {"regime": "contrastive"},
        {"random_erase": 0.1},
    ],
    ids=str,
)
def test_runs_of_other_shapes_are_refused(make, tmp_path, change):
    zoo = make("seed: [1, 2]")
    first, second = stage(zoo)
    second = replace(second, recipe=replace(second.recipe, **change))
    assert len(groups([first, second], 2)) == 2
    with pytest.raises(ZooError, match="s1 and the other runs differ in shape: split them by `groups`"):
        train_stacked(PreparedBlueprint(zoo), [first, second], tmp_path)


def test_groups_of_none_are_refused():
    with pytest.raises(ZooError, match="stack is 0; it must be at least 1"):
        groups([], 0)


def test_models_that_do_not_stack_train_alone_to_the_bit(make, tmp_path):
    zoo = make("seed: [1, 2], batch_size: 50", "seed: 7", ("num_heads: 2", "num_heads: 2, drop_rate: 0.1"))
    assert not stackable(zoo)
    train_stacked(PreparedBlueprint(zoo), stage(zoo), tmp_path / "together")
    images = load_images("digits", zoo.images["digits"])
    models = [initial_model(PreparedBlueprint(zoo), run, tmp_path) for run in stage(zoo)]
    with pytest.raises(ZooError, match="only plain ViTs without dropout train together"):
        StackedTrainer([run.recipe for run in stage(zoo)], images, models, 3, "cpu")
    for run in stage(zoo):
        train_run(PreparedBlueprint(zoo), run, tmp_path / "alone")
        here, there = (RunFolder(tmp_path / name / run.run_id).load_epoch(3)[0] for name in ("alone", "together"))
        assert torch.equal(flatten(here), flatten(there))


def test_more_images_and_views_take_more_memory(make):
    supervised, contrastive = (stage(make(PRETRAIN[kind]))[0] for kind in ("adamw", "contrastive"))
    zoo = make()
    assert memory_of(zoo, supervised) < memory_of(zoo, contrastive) < 2 * memory_of(zoo, supervised)
    larger = replace(supervised, recipe=replace(supervised.recipe, batch_size=500))
    assert memory_of(zoo, larger) > 5 * memory_of(zoo, supervised)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PRETRAIN)
def test_cuda_trains_together_as_alone(make, tmp_path, kind):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    zoo = make(PRETRAIN[kind])
    train_stacked(PreparedBlueprint(zoo), stage(zoo), tmp_path / "together", device="cuda")
    for run in stage(zoo):
        train_run(PreparedBlueprint(zoo), run, tmp_path / "alone", device="cuda")
        assert_alike(tmp_path / "alone", tmp_path / "together", run)
