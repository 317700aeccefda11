import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from vitzoo_hf.blueprint.blueprint import Blueprint, Recipe
from vitzoo_hf.format.layout import flatten
from vitzoo_hf.format.schema import ZooError, weights_sha256
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.models.vit import create
from vitzoo_hf.training import loop, stacked, trainer
from vitzoo_hf.training import losses as objectives
from vitzoo_hf.training import run as train
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.feed import FedBatch
from vitzoo_hf.training.losses import info_nce, soften
from vitzoo_hf.training.seeds import seeded_globals
from vitzoo_hf.training.stacked import train_run
from vitzoo_hf.training.trainer import DivergedError

TEXT = """\
name: trained
architecture:
  name: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2}
images:
  digits: {size: 8, selection: 0.4, test: 0.4}
stages:
  pretrain:
    images: digits
    epochs: 3
    keep_epochs: all
    settings: {batch_size: 50}
    factors: {PRETRAIN}
  finetune:
    images: digits
    epochs: 2
    keep_epochs: all
    settings: {batch_size: 50, head_hidden: 8}
    factors: {FINETUNE}
splits: {by: run, seed: 3, train: 0.6, validation: 0.2, test: 0.2}
"""
KINDS = {
    "adamw": "seed: 1, lr: 3e-3, weight_decay: 0.1",
    "sgd with momentum": "seed: 1, lr: 1e-2, optimizer: sgd, momentum: 0.9",
    "cosine": "seed: 1, lr: 3e-3, schedule: cosine",
    "contrastive": "seed: 1, lr: 3e-3, regime: contrastive, augmentation: simclr-no-flip, batch_size: 64",
    "mixed": "seed: 1, lr: 3e-3, augmentation: crop-flip, mixup: 0.8, cutmix: 1.0, random_erase: 0.25,"
    " label_smoothing: 0.1",
    "cutmix": "seed: 1, cutmix: 1.0",
    "accumulated": "seed: 1, lr: 3e-3, accumulate: 2, augmentation: crop, mixup: 0.8",
    "bfloat16, warm-up": "seed: 1, lr: 3e-3, precision: bfloat16, warmup_epochs: 1.5, schedule: cosine",
}


@pytest.fixture
def make(tmp_path: Path):
    def make(pretrain: str = KINDS["adamw"], finetune: str = "seed: 7", *changes: tuple[str, str]) -> Blueprint:
        text = TEXT if "batch_size" not in pretrain else TEXT.replace("settings: {batch_size: 50}", "settings: {}")
        text = text.replace("{PRETRAIN}", f"{{{pretrain}}}").replace("{FINETUNE}", f"{{{finetune}}}")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "zoo.yaml"
        file.write_text(text)
        return Blueprint.load(file)

    return make


def hashes(folder: Path, run) -> list[str]:
    """Of every kept epoch, as its weights are on disk."""
    place = RunFolder(folder / run.run_id)
    return [weights_sha256(flatten(place.load_epoch(epoch)[0]).numpy()) for epoch in run.keep_epochs]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_reproducible_also_when_interrupted(make, tmp_path, kind):
    """Whatever happens to the global generators meanwhile, and whenever the interruption comes."""
    zoo = make(KINDS[kind])
    run = zoo.runs[0]
    train_run(PreparedBlueprint(zoo), run, tmp_path / "whole")
    expected = hashes(tmp_path / "whole", run)
    assert len(set(expected)) == 4
    torch.rand(5), random.random(), np.random.rand()
    for stop in range(run.epochs):
        seen = []

        def interrupt(epoch, stop=stop, seen=seen):
            seen.append(epoch)
            if epoch == stop:
                raise KeyboardInterrupt

        folder = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            train_run(PreparedBlueprint(zoo), run, folder, on_epoch=interrupt)
        assert RunFolder(folder / run.run_id).epochs() == list(range(stop + 1))
        assert not train.is_finished(zoo, run, folder)
        resumed = []
        train_run(PreparedBlueprint(zoo), run, folder, on_epoch=resumed.append)
        assert resumed == list(range(stop, run.epochs + 1))
        assert train.is_finished(zoo, run, folder)
        assert hashes(folder, run) == expected


def stop_at(epoch: int):
    def stop(done: int) -> None:
        if done == epoch:
            raise KeyboardInterrupt

    return stop


def test_an_epoch_that_was_not_kept_is_trained_again(make, tmp_path):
    whole, sparse = make(), make(KINDS["adamw"], "seed: 7", ("keep_epochs: all", "keep_epochs: [1]"))
    train_run(PreparedBlueprint(whole), whole.runs[0], tmp_path / "whole")
    run = sparse.runs[0]
    with pytest.raises(KeyboardInterrupt):
        train_run(PreparedBlueprint(sparse), run, tmp_path / "sparse", on_epoch=stop_at(2))
    resumed = []
    train_run(PreparedBlueprint(sparse), run, tmp_path / "sparse", on_epoch=resumed.append)
    assert resumed == [1, 2, 3]
    assert RunFolder(tmp_path / "sparse" / run.run_id).epochs() == [1, 3]
    expected = hashes(tmp_path / "whole", whole.runs[0])
    assert hashes(tmp_path / "sparse", run) == [expected[1], expected[3]]


@pytest.mark.parametrize(
    "lost",
    [
        ["epoch-00003.json"],
        ["epoch-00003.json", "epoch-00003.safetensors"],
        ["epoch-00003.safetensors"],
        ["epoch-00001.json"],
        ["epoch-00000.safetensors"],
    ],
    ids=lambda lost: "+".join(lost),
)
def test_lost_files_of_a_finished_run_are_made_again(make, tmp_path, lost):
    zoo = make()
    run = zoo.runs[0]
    train_run(PreparedBlueprint(zoo), run, tmp_path)
    expected = hashes(tmp_path, run)
    for name in lost:
        (tmp_path / run.run_id / name).unlink()
    assert not train.is_finished(zoo, run, tmp_path)
    train_run(PreparedBlueprint(zoo), run, tmp_path)
    assert train.is_finished(zoo, run, tmp_path)
    assert hashes(tmp_path, run) == expected


@pytest.mark.parametrize(
    "lost", ["epoch-00001.json", "epoch-00001.safetensors", "epoch-00002.json", "resume.safetensors"]
)
def test_lost_files_of_an_interrupted_run_are_made_again(make, tmp_path, lost):
    zoo = make()
    run = zoo.runs[0]
    train_run(PreparedBlueprint(zoo), run, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_run(PreparedBlueprint(zoo), run, tmp_path / "part", on_epoch=stop_at(2))
    (tmp_path / "part" / run.run_id / lost).unlink()
    train_run(PreparedBlueprint(zoo), run, tmp_path / "part")
    assert train.is_finished(zoo, run, tmp_path / "part")
    assert hashes(tmp_path / "part", run) == hashes(tmp_path / "whole", run)


def test_a_damaged_resume_file_costs_time_only(make, tmp_path):
    zoo = make()
    run = zoo.runs[0]
    train_run(PreparedBlueprint(zoo), run, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_run(PreparedBlueprint(zoo), run, tmp_path / "part", on_epoch=stop_at(2))
    file = tmp_path / "part" / run.run_id / "resume.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    seen = []
    train_run(PreparedBlueprint(zoo), run, tmp_path / "part", on_epoch=seen.append)
    assert seen == [0, 1, 2, 3]
    assert hashes(tmp_path / "part", run) == hashes(tmp_path / "whole", run)


def test_a_finished_run_is_left_alone(make, tmp_path):
    zoo = make()
    run = zoo.runs[0]
    train_run(PreparedBlueprint(zoo), run, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / run.run_id).iterdir()}
    assert not [file for file in before if file.name == "resume.safetensors"]
    seen = []
    train_run(PreparedBlueprint(zoo), run, tmp_path, on_epoch=seen.append)
    assert seen == [run.epochs]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / run.run_id).iterdir()} == before


def test_training_leaves_the_global_generators(make, tmp_path):
    """Python's is left out: beartype, which checks types here, draws from it."""
    zoo = make(KINDS["mixed"])
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    train_run(PreparedBlueprint(zoo), zoo.runs[0], tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_the_seed_decides_the_weights(make, tmp_path):
    zoo = make("seed: [1, 2]")
    for run in zoo.runs[:2]:
        train_run(PreparedBlueprint(zoo), run, tmp_path)
    first, second = (hashes(tmp_path, run) for run in zoo.runs[:2])
    assert not set(first) & set(second)


def test_every_epoch_has_its_own_order_and_views(make, tmp_path, monkeypatch):
    orders, views = [], []
    step = trainer.SingleTrainer.step

    def spy(self, batches, draws, position, count):
        (batch,) = batches
        if batch.positions.shape == (1, 50) and draws.views[0].initial_seed() not in views:
            views.append(draws.views[0].initial_seed())
            orders.append(tuple(batch.positions[0].tolist()))
        return step(self, iter([batch]), draws, position, count)

    monkeypatch.setattr(trainer.SingleTrainer, "step", spy)
    zoo = make("seed: 1, augmentation: crop")
    train_run(PreparedBlueprint(zoo), zoo.runs[0], tmp_path)
    assert len(views) == 3
    assert len(set(orders)) == 3


def test_training_learns(make, tmp_path):
    zoo = make("seed: 1, lr: 1e-2", "seed: 7", ("epochs: 3", "epochs: 12"), ("keep_epochs: all", "keep_epochs: [0]"))
    run = zoo.runs[0]
    train_run(PreparedBlueprint(zoo), run, tmp_path)
    place = RunFolder(tmp_path / run.run_id)
    assert place.load_epoch(12)[1]["test_accuracy"] > 0.6 > 0.3 > place.load_epoch(0)[1]["test_accuracy"]


def test_contrastive_training_lowers_its_loss_and_has_no_accuracy(make, tmp_path):
    zoo = make("seed: 1, lr: 3e-3, regime: contrastive, augmentation: crop, batch_size: 64, temperature: 0.2")
    run = zoo.runs[0]
    train_run(PreparedBlueprint(zoo), run, tmp_path)
    first, last = (RunFolder(tmp_path / run.run_id).load_epoch(epoch)[1] for epoch in (0, 3))
    for role in ("train", "test"):
        assert last[f"{role}_loss"] < first[f"{role}_loss"] - 0.2
    for name in ("train_accuracy", "test_accuracy", "generalization_gap"):
        assert last[name] is None


def test_results_are_those_of_scikit_learn(make, tmp_path):
    zoo = make()
    run = zoo.runs[0]
    train_run(PreparedBlueprint(zoo), run, tmp_path)
    tensors, results = RunFolder(tmp_path / run.run_id).load_epoch(3)
    model = create(zoo.architecture, zoo.architecture_args | {"num_classes": 10}).eval()
    model.load_state_dict(tensors)
    images = load_images("digits", zoo.images["digits"])
    expected = {}
    for role in ("train", "test"):
        pixels, labels = images.part(role)
        with torch.no_grad():
            logits = model(torch.from_numpy((pixels.numpy() / 255.0 - 0.5) / 0.5).float())
        probabilities = logits.double().softmax(1).numpy()
        expected[f"{role}_loss"] = log_loss(labels, probabilities, labels=range(10))
        expected[f"{role}_accuracy"] = accuracy_score(labels, probabilities.argmax(1))
    expected["generalization_gap"] = expected["train_accuracy"] - expected["test_accuracy"]
    assert results == pytest.approx(expected, abs=1e-6)


# fine-tuning


@pytest.mark.parametrize("parent", ["adamw", "contrastive"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_fine_tuning_starts_from_its_parents_trunk_with_a_fresh_head(make, tmp_path, parent, head):
    zoo = make(KINDS[parent], f"head: {head}, seed: 7")
    first, second = zoo.runs
    for run in zoo.runs:
        train_run(PreparedBlueprint(zoo), run, tmp_path)
    given, _ = RunFolder(tmp_path / first.run_id).load_epoch(3)
    start, _ = RunFolder(tmp_path / second.run_id).load_epoch(0)
    trunk = [name for name in start if not name.startswith("head.")]
    assert len(trunk) == len(start) - (2 if head == "linear" else 4)
    for name in trunk:
        assert torch.equal(start[name], given[name]), name
    if head == "linear" and parent == "adamw":
        assert not torch.equal(start["head.weight"], given["head.weight"])
    shapes = {"linear": {(10, 16), (10,)}, "mlp": {(8, 16), (8,), (10, 8), (10,)}}[head]
    assert {tuple(start[name].shape) for name in start if name.startswith("head.")} == shapes
    end, _ = RunFolder(tmp_path / second.run_id).load_epoch(2)
    assert all(not torch.equal(start[name], end[name]) for name in end)


def test_a_frozen_trunk_stays_to_the_bit(make, tmp_path):
    zoo = make(KINDS["adamw"], "seed: 7", ("head_hidden: 8", "freeze_trunk: true, weight_decay: 0.1, lr: 0.01"))
    for run in zoo.runs:
        train_run(PreparedBlueprint(zoo), run, tmp_path)
    run = zoo.runs[1]
    start, _ = RunFolder(tmp_path / run.run_id).load_epoch(0)
    end, _ = RunFolder(tmp_path / run.run_id).load_epoch(2)
    for name in start:
        assert torch.equal(start[name], end[name]) != name.startswith("head."), name


def test_an_interrupted_frozen_run_continues(make, tmp_path):
    zoo = make(KINDS["adamw"], "seed: 7", ("head_hidden: 8", "freeze_trunk: true"))
    parent, run = zoo.runs
    for folder in ("whole", "part"):
        train_run(PreparedBlueprint(zoo), parent, tmp_path / folder)
    train_run(PreparedBlueprint(zoo), run, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_run(PreparedBlueprint(zoo), run, tmp_path / "part", on_epoch=stop_at(1))
    train_run(PreparedBlueprint(zoo), run, tmp_path / "part")
    assert hashes(tmp_path / "part", run) == hashes(tmp_path / "whole", run)


def test_a_missing_parent_is_told(make, tmp_path):
    zoo = make()
    with pytest.raises(ZooError, match=r"s1-.* has no finished epoch 3: train the run first"):
        train_run(PreparedBlueprint(zoo), zoo.runs[1], tmp_path)


# refusals


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_divergence_is_recorded_and_not_tried_again(make, tmp_path, optimizer, monkeypatch):
    zoo = make(f"seed: 1, lr: 1e30, optimizer: {optimizer}")
    run = zoo.runs[0]
    with pytest.raises(DivergedError, match=r"diverged in epoch 1: the loss or a weight is no longer finite; lower"):
        train_run(PreparedBlueprint(zoo), run, tmp_path)
    place = RunFolder(tmp_path / run.run_id)
    assert place.divergence["epoch"] == 1
    assert place.epochs() == [0]
    monkeypatch.setattr(stacked, "SingleTrainer", None)
    with pytest.raises(DivergedError, match=r"diverged in epoch 1"):
        train_run(PreparedBlueprint(zoo), run, tmp_path)
    assert not train.is_finished(zoo, run, tmp_path)


def test_a_folder_of_another_training_is_refused(make, tmp_path):
    zoo = make()
    run = zoo.runs[0]
    train_run(PreparedBlueprint(zoo), run, tmp_path)
    other = replace(run, recipe=replace(run.recipe, batch_size=51))
    for use, plan in ((train_run, PreparedBlueprint(zoo)), (train.is_finished, zoo)):
        with pytest.raises(ZooError, match="holds a run trained by another blueprint"):
            use(plan, other, tmp_path)


def test_a_child_of_another_parent_is_another_training(make):
    zoo, other = make("seed: 1, lr: 0.1"), make("seed: 1, lr: 0.2")
    child = zoo.runs[1]
    assert train.run_spec(zoo, child)["fingerprint"] != train.run_spec(other, other.runs[1])["fingerprint"]


def test_the_spec_holds_no_path(make, tmp_path):
    zoo = make(KINDS["adamw"], "seed: 7", ("digits: {size: 8,", f"digits: {{size: 8, path: {tmp_path}/x, "))
    for run in zoo.runs:
        assert str(tmp_path) not in str(train.run_spec(zoo, run))


def test_accumulated_batches_step_as_one_batch_of_them_all(make, tmp_path):
    images = load_images("digits", make().images["digits"])
    args = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    positions = torch.arange(60)
    pixels = images.part("train")[0].double() / 255
    weights = []
    for batches in ([positions], positions.split(20)):
        model = create("vit_tiny_patch16_224", args | {"num_classes": 10}, seed=3).double()
        part = trainer.SingleTrainer(Recipe(optimizer="sgd", lr=0.1), images, model, 1, "cpu")
        part._outputs = lambda inputs, model=model: model(inputs)
        fed = [FedBatch(batch[None], pixels[batch][None]) for batch in batches]
        part.step(iter(fed), part.draws(1), 0.0, len(batches))
        weights.append(torch.cat([value.flatten() for value in model.state_dict().values()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-12)


def test_ddp_declares_batches_that_are_accumulated(make):
    with pytest.raises(ZooError, match="each step takes batches of several processes: set accumulate"):
        make("seed: 1, ddp: true")
    assert make("seed: 1, ddp: true, accumulate: 2").runs[0].factors["ddp"] is True


def test_settings_that_came_later_leave_fingerprints_alone(make):
    assert Blueprint.load("mini").fingerprint == "831f82d5a86e65e4"
    assert "accumulate" not in make().runs[0].recipe.decides
    assert train.run_spec(make(), make().runs[0])["recipe"]["augmentation_reading"] == "declared"
    assert make("seed: 1, accumulate: 2").fingerprint != make("seed: 1, accumulate: 3").fingerprint


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("img_size: 8", "img_size: 16"), "takes 1 channels of 16×16, images 'digits' have 1 of 8×8: set size"),
        (("in_chans: 1", "in_chans: 3"), "takes 3 channels of 8×8, images 'digits' have 1 of 8×8"),
        (("in_chans: 1, ", ""), "takes 3 channels of 8×8, images 'digits' have 1 of 8×8"),
    ],
)
def test_images_must_fit_the_architecture(make, tmp_path, change, told):
    zoo = make(KINDS["adamw"], "seed: 7", change)
    with pytest.raises(ZooError, match=told):
        train_run(PreparedBlueprint(zoo), zoo.runs[0], tmp_path)


@pytest.mark.parametrize("size", ["[8, 8]", "[8, 16]"])
def test_image_sizes_may_be_pairs(make, tmp_path, size):
    zoo = make(KINDS["adamw"], "seed: 7", ("img_size: 8", f"img_size: {size}"))
    if size == "[8, 8]":
        train_run(PreparedBlueprint(zoo), zoo.runs[0], tmp_path)
        assert train.is_finished(zoo, zoo.runs[0], tmp_path)
    else:
        with pytest.raises(ZooError, match="takes 1 channels of 8×16, images 'digits' have 1 of 8×8"):
            train_run(PreparedBlueprint(zoo), zoo.runs[0], tmp_path)


# losses, batches, targets


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_info_nce_against_float64(count, temperature):
    outputs = torch.randn(2 * count, 5, generator=torch.Generator().manual_seed(count))
    rows = outputs.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    losses = []
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        terms = {j: np.exp(rows[i] @ rows[j] / temperature) for j in range(2 * count) if j != i}
        losses.append(-np.log(terms[partner] / sum(terms.values())))
    assert float(info_nce(outputs, temperature)) == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_soft_targets_are_those_of_label_smoothing(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(20, 7, generator=generator), torch.randint(7, (20,), generator=generator)
    targets = soften(labels, 7, smoothing)
    assert torch.allclose(targets.sum(1), torch.ones(20))
    expected = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(logits.double(), labels)
    ours = torch.nn.functional.cross_entropy(logits.double(), targets.double())
    assert float(ours) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(
    "recipe", [Recipe(mixup=0.8, label_smoothing=0.1), Recipe(cutmix=1.0), Recipe(label_smoothing=0.1)]
)
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_mixed_targets_are_distributions(recipe, count):
    mix = objectives.make_mix(recipe, 10)
    inputs, targets = mix(torch.randn(count, 1, 8, 8), torch.arange(count))
    assert len(inputs) == len(targets)
    assert len(inputs) >= count - 1
    assert torch.allclose(targets.sum(1), torch.ones(len(targets)))
    assert targets.min() >= 0


def test_full_batches_have_equally_many_items():
    items = torch.arange(10)
    assert [batch.tolist() for batch in trainer.full_batches(items, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(batch) for batch in trainer.full_batches(items, 20)] == [10]
    assert [len(batch) for batch in trainer.full_batches(items, 10)] == [10]


def test_cosine_goes_from_lr_to_zero(make, monkeypatch, tmp_path):
    rates = []
    step = trainer.SingleTrainer.step

    def spy(self, batches, draws, position, count):
        losses = step(self, batches, draws, position, count)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return losses

    monkeypatch.setattr(trainer.SingleTrainer, "step", spy)
    zoo = make("seed: 1, lr: 0.01, schedule: cosine")
    train_run(PreparedBlueprint(zoo), zoo.runs[0], tmp_path)
    total = len(rates)
    expected = 0.005 * (1 + np.cos(np.pi * np.arange(total) / total))
    assert total % 3 == 0
    assert rates == pytest.approx(expected.tolist(), abs=1e-12)


def test_global_generators_are_put_back_after_an_error():
    def fail():
        torch.rand(1), random.random(), np.random.rand()
        raise KeyError

    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(KeyError), seeded_globals(3):
        fail()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["adamw", "contrastive", "mixed"])
def test_cuda_training_is_reproducible_when_interrupted(make, tmp_path, kind):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    zoo = make(KINDS[kind])
    run = zoo.runs[0]
    train_run(PreparedBlueprint(zoo), run, tmp_path / "whole", device="cuda")
    with pytest.raises(KeyboardInterrupt):
        train_run(PreparedBlueprint(zoo), run, tmp_path / "part", device="cuda", on_epoch=stop_at(1))
    train_run(PreparedBlueprint(zoo), run, tmp_path / "part", device="cuda")
    assert hashes(tmp_path / "part", run) == hashes(tmp_path / "whole", run)


def test_a_run_goes_on_with_the_images_it_began_with(make, tmp_path):
    zoo = make()
    run = zoo.runs[0]

    def interrupt(epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(PreparedBlueprint(zoo), run, tmp_path, on_epoch=interrupt)
    record = tmp_path / run.run_id / "images.json"
    kept = record.read_text()
    record.write_text('{"digest": "of others"}')
    with pytest.raises(ZooError, match="began with other images than these"):
        train_run(PreparedBlueprint(zoo), run, tmp_path)
    record.write_text(kept)
    train_run(PreparedBlueprint(zoo), run, tmp_path)


def test_a_long_epoch_is_not_lost_where_none_is_kept(make, tmp_path, monkeypatch):
    zoo = make(KINDS["adamw"], "seed: 7", ("epochs: 3\n    keep_epochs: all", "epochs: 3"))
    run = zoo.runs[0]
    assert run.keep_epochs == (3,)
    train_run(PreparedBlueprint(zoo), run, tmp_path / "whole")
    monkeypatch.setattr(loop, "RESUME_SECONDS", 0.0)

    def interrupt(epoch: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(PreparedBlueprint(zoo), run, tmp_path / "parts", on_epoch=interrupt)
    seen = []
    train_run(PreparedBlueprint(zoo), run, tmp_path / "parts", on_epoch=seen.append)
    assert seen == [2, 3]
    assert hashes(tmp_path / "parts", run) == hashes(tmp_path / "whole", run)
