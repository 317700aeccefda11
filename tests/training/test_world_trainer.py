"""Runs that draw images of their own: alone and together, by every learner, against autograd on one model."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.format.layout import flatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.feed import FedBatch
from vitzoo_hf.training.run import initial_model
from vitzoo_hf.training.seeds import derive_seed
from vitzoo_hf.training.stacked import groups, train_run, train_stacked
from vitzoo_hf.training.world_trainer import WorldTrainer

TEXT = """\
name: worlds
architecture:
  name: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 4, in_chans: 3, embed_dim: 8, depth: 1, num_heads: 2}
images:
  digits: {size: 8, selection: 0.4, world: two-colour, queries: 40, tests: 60}
stages:
  pretrain:
    images: digits
    epochs: 3
    keep_epochs: [0, 1, 2, 3]
    settings: {lr: 0.003, batch_size: 24, epoch_steps: 5, SETTINGS}
    factors: {FACTORS}
    replicas: 1
splits: {by: run, seed: 3, train: 0.6, validation: 0.2, test: 0.2}
"""
ENVIRONMENTS = "environments: [0.9, 0.6], num_images: 240"
LEARNERS = {
    "erm": "",
    "causal": "learner: causal",
    "colour-randomised": "learner: colour-randomised",
    "irm": "learner: irm, penalty_weight: 100, penalty_from: 7",
    "irm-product": "learner: irm-product, penalty_weight: 10",
    "v-rex": "learner: v-rex, penalty_weight: 10",
    "group-dro": "learner: group-dro, group_rate: 0.5",
    "resample": "learner: resample, resample_by: agreement, resample_to: 0.75",
    "stopped": "stop_loss: 0.68",
    "shifted": "augmentation: shift",
}
LABEL_RATIOS = "label_ratio: [0.3, 0.7], role: [target, shadow]"


@pytest.fixture
def make(tmp_path: Path):
    def make(settings: str = "", factors: str = LABEL_RATIOS, *changes: tuple[str, str]) -> Blueprint:
        settings = ", ".join(
            part for part in (settings, "" if "num_images" in settings + factors else ENVIRONMENTS) if part
        )
        text = TEXT.replace("SETTINGS", settings).replace("FACTORS", factors)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "worlds.yaml"
        file.write_text(text)
        return Blueprint.load(file)

    return make


def begun(zoo: Blueprint) -> WorldTrainer:
    images = load_images("digits", zoo.images["digits"])
    models = [initial_model(PreparedBlueprint(zoo), run, Path()) for run in zoo.runs]
    return WorldTrainer(zoo.runs, images, models, "cpu")


def first_batch(trainer: WorldTrainer) -> tuple[FedBatch, torch.Tensor]:
    """The first batch of the first epoch, and its labels."""
    batch = next(trainer.feed.batches(trainer.batches(1), trainer.draws(1)))
    return batch, trainer.drawn_labels.gather(1, batch.positions)


def weights(folder: Path, run_id: str, epoch: int) -> torch.Tensor:
    return flatten(RunFolder(folder / run_id).load_epoch(epoch)[0]).double()


def results(folder: Path, run_id: str, epoch: int) -> dict:
    return RunFolder(folder / run_id).load_epoch(epoch)[1]


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_run_does_not_depend_on_those_beside_it(make, tmp_path, learner):
    """Alone, in another order beside two others, and interrupted: the same weights, but for rounding."""
    zoo = make(LEARNERS[learner])
    (group,) = groups(zoo.runs, 8)
    train_stacked(PreparedBlueprint(zoo), group, tmp_path / "together")
    chosen = group[2]

    def stop(run_id: str, epoch: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stacked(PreparedBlueprint(zoo), [chosen], tmp_path / "alone", on_epoch=stop)
    train_stacked(PreparedBlueprint(zoo), [chosen], tmp_path / "alone")
    train_stacked(PreparedBlueprint(zoo), [group[3], chosen], tmp_path / "reordered")
    for epoch in (0, 1, 2, 3):
        expected = weights(tmp_path / "together", chosen.run_id, epoch)
        for other in ("alone", "reordered"):
            found = weights(tmp_path / other, chosen.run_id, epoch)
            assert float((found - expected).norm() / expected.norm()) < (1e-4 if epoch else 1e-12)
            assert results(tmp_path / other, chosen.run_id, epoch) == pytest.approx(
                results(tmp_path / "together", chosen.run_id, epoch), abs=1e-3
            )
    assert weights(tmp_path / "together", chosen.run_id, 3).isfinite().all()


def test_every_run_makes_equally_many_steps_whatever_its_number_of_images(make, tmp_path):
    zoo = make("label_noise: 0.1, role: target", "num_images: [24, 120, 480]")
    assert len(groups(zoo.runs, 8)) == 1
    train_stacked(PreparedBlueprint(zoo), zoo.runs, tmp_path)
    for run in zoo.runs:
        assert [results(tmp_path, run.run_id, epoch)["steps"] for epoch in (0, 1, 2, 3)] == [0, 5, 10, 15]


def test_without_epoch_steps_an_epoch_is_a_pass(make):
    """Of other lengths, so the runs train in groups of their own."""
    zoo = make("role: target", "num_images: [48, 120]", ("epoch_steps: 5, ", ""))
    assert [len(group) for group in groups(zoo.runs, 8)] == [1, 1]
    trainers = [begun(zoo.__class__(**(zoo.__dict__ | {"runs": (run,)}))) for run in zoo.runs]
    assert [trainer.steps for trainer in trainers] == [2, 5]
    entries = torch.cat(trainers[1].batches(2))
    assert sorted(entries.flatten().tolist()) == list(range(120))


def test_all_images_come_before_any_comes_again(make):
    trainer = begun(make("role: target, num_images: 48", "label_ratio: [0.5]"))
    stream = torch.cat([batch[0] for epoch in (1, 2, 3) for batch in trainer.batches(epoch)])
    passes = stream[: 48 * (len(stream) // 48)].view(-1, 48)
    assert len(passes) > 5
    assert all(sorted(one.tolist()) == list(range(48)) for one in passes)
    assert passes[0].tolist() != passes[1].tolist()


def test_batches_by_environment_have_equal_parts_of_each(make):
    zoo = make(LEARNERS["irm"])
    trainer = begun(zoo)
    run = zoo.runs[0]
    pool = load_images("digits", zoo.images["digits"]).pool
    draw = pool.training_draw(run.world, run.learner, run.recipe.seed)
    draw = draw.take(draw.environments.argsort(stable=True))
    for batch in trainer.batches(1):
        assert draw.environments[batch[0]].tolist() == [0] * 12 + [1] * 12
    assert trainer.feed.places[0].tolist() == (draw.positions + pool.pixels.shape[1] * draw.groups).tolist()


def test_models_are_fed_their_own_images_in_their_colours(make):
    zoo = make("group_ratio: 0.5")
    trainer = begun(zoo)
    images = load_images("digits", zoo.images["digits"])
    fed, labels = first_batch(trainer)
    for model, run in enumerate(zoo.runs):
        draw = images.pool.training_draw(run.world, run.learner, run.recipe.seed).take(fed.positions[model])
        assert labels[model].tolist() == draw.labels.tolist()
        torch.testing.assert_close(fed.inputs[model], images.normalize(images.pool.images(draw)))


def oracle_objective(learner, run, model, inputs, labels, step: int) -> torch.Tensor:
    """One model, environment by environment, with autograd through the dummy scale."""
    risks, penalties = [], []
    for x, y in zip(inputs.chunk(2), labels.chunk(2), strict=True):
        logits = model(x)
        risks.append(cross_entropy(logits, y))
        parts = [slice(None)] if learner == "irm" else [slice(0, None, 2), slice(1, None, 2)]
        gradients = []
        for part in parts:
            scale = torch.ones((), requires_grad=True)
            loss = cross_entropy(logits[part] * scale, y[part])
            gradients.append(torch.autograd.grad(loss, scale, create_graph=True)[0])
        penalties.append(gradients[0] * gradients[-1])
    risks = torch.stack(risks)
    if learner == "group-dro":
        shares = torch.softmax(run.learner.group_rate * risks.detach(), 0)
        return (shares * risks).sum()
    penalty = risks.var(unbiased=False) if learner == "v-rex" else torch.stack(penalties).mean()
    weight = run.learner.penalty_weight
    if step < run.learner.penalty_from:
        weight = 1.0
    return (risks.mean() + weight * penalty) / max(weight, 1.0)


@pytest.mark.parametrize("learner", ["irm", "irm-product", "v-rex", "group-dro"])
def test_gradients_of_learners_are_autograds(make, learner):
    """By SGD with learning rate 1 a step is the gradient; before and after the penalty's weight rises."""
    changes = (("lr: 0.003", "lr: 1, optimizer: sgd"),)
    for penalty_from, step in ((0, 0), (3, 0)):
        text = LEARNERS[learner].replace("penalty_from: 7", f"penalty_from: {penalty_from}")
        zoo = make(text, LABEL_RATIOS, *changes)
        trainer = begun(zoo)
        batch, labels = first_batch(trainer)
        before = trainer.weights.detach().clone()
        trainer.step(iter([batch]), trainer.draws(1), 0.0)
        for number, run in enumerate(zoo.runs):
            model = initial_model(PreparedBlueprint(zoo), run, Path()).train()
            oracle_objective(learner, run, model, batch.inputs[number], labels[number], step).backward()
            gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            torch.testing.assert_close(before[number] - trainer.weights[number], gradient, atol=2e-6, rtol=1e-4)


def with_other_colours(images: torch.Tensor) -> torch.Tensor:
    return images[:, [1, 0, 2]]


@pytest.mark.parametrize("learner", ["causal", "erm"])
def test_outputs_of_the_causal_learner_do_not_depend_on_colour(make, tmp_path, learner):
    settings = LEARNERS[learner] + (", " if LEARNERS[learner] else "") + "colour_agreement: 0.9, num_images: 240"
    zoo = make(settings, LABEL_RATIOS, ("lr: 0.003", "lr: 0.01"), ("epoch_steps: 5", "epoch_steps: 20"))
    train_stacked(PreparedBlueprint(zoo), zoo.runs, tmp_path)
    images = load_images("digits", zoo.images["digits"])
    pixels = images.normalize(images.part("test")[0])
    trainer = begun(zoo)
    for number, run in enumerate(zoo.runs):
        tensors = RunFolder(tmp_path / run.run_id).load_epoch(3)[0]
        trainer.weights[number] = flatten(tensors)
        both = [
            trainer.vit({name: value[None] for name, value in tensors.items()}, trainer.vit.patches(colour)).logits
            for colour in (pixels, with_other_colours(pixels))
        ]
        difference = float((both[0] - both[1]).abs().max())
        assert difference < 2e-6 if learner == "causal" else difference > 0.05 * float(both[0].std(1).mean())


def test_a_stopped_run_keeps_its_weights_and_tells_its_steps(make, tmp_path):
    zoo = make("num_images: 240", "stop_loss: [0, 100]")
    train_stacked(PreparedBlueprint(zoo), zoo.runs, tmp_path)
    going, stopped = zoo.runs
    assert [results(tmp_path, stopped.run_id, epoch)["steps"] for epoch in (1, 2, 3)] == [5, 5, 5]
    assert torch.equal(weights(tmp_path, stopped.run_id, 1), weights(tmp_path, stopped.run_id, 3))
    assert results(tmp_path, going.run_id, 3)["steps"] == 15
    assert not torch.equal(weights(tmp_path, going.run_id, 1), weights(tmp_path, going.run_id, 3))


def test_a_model_that_diverges_leaves_the_others(make, tmp_path):
    zoo = make("num_images: 240, optimizer: sgd", "lr: [1e-3, 1e30]", ("lr: 0.003, ", ""))
    diverged = train_stacked(PreparedBlueprint(zoo), zoo.runs, tmp_path)
    assert list(diverged) == [zoo.runs[1].run_id]
    assert weights(tmp_path, zoo.runs[0].run_id, 3).isfinite().all()


def test_training_results_are_those_of_the_models_own_images(make, tmp_path):
    zoo = make("num_images: 240, label_noise: 0.2")
    train_stacked(PreparedBlueprint(zoo), zoo.runs, tmp_path)
    images = load_images("digits", zoo.images["digits"])
    run = zoo.runs[1]
    tensors, told = RunFolder(tmp_path / run.run_id).load_epoch(3)
    model = initial_model(PreparedBlueprint(zoo), run, tmp_path).eval()
    model.load_state_dict(tensors)
    draw = images.pool.training_draw(run.world, run.learner, run.recipe.seed)
    with torch.no_grad():
        logits = model(images.normalize(images.pool.images(draw)))
    assert told["train_loss"] == pytest.approx(float(cross_entropy(logits, draw.labels)), abs=1e-5)
    assert told["train_accuracy"] == pytest.approx(float((logits.argmax(1) == draw.labels).double().mean()))
    pixels, labels = images.part("test")
    with torch.no_grad():
        logits = model(images.normalize(pixels))
    assert told["test_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()), abs=0.02)


def test_a_world_does_not_train_by_train_run(make, tmp_path):
    zoo = make()
    with pytest.raises(ZooError, match="draws training images of its own"):
        train_run(PreparedBlueprint(zoo), zoo.runs[0], tmp_path)


def test_packed_rows_say_what_they_were_trained_on(make, tmp_path):
    from vitzoo_hf.launch.cost import make_plan
    from vitzoo_hf.publish.pack import pack
    from vitzoo_hf.zoo import Zoo

    zoo = make()
    train_stacked(PreparedBlueprint(zoo), zoo.runs, tmp_path / "runs")
    packed = Zoo(pack(zoo, tmp_path / "runs", tmp_path / "zoo", progress=False))
    table = packed.filter(is_final=True).to_pandas()
    assert set(table["factor_role"]) == {"target", "shadow"}
    assert set(table["factor_trained_images"]) == {240}
    assert set(table["factor_trained_steps"]) == {15}
    assert set(table["factor_trained_environments"]) == {"120+120"}
    assert table["factor_trained_sha256"].nunique() == 4
    assert math.isclose(make_plan(zoo).parameters[0], table["num_parameters"][0])
    for dataset, role, count in (("digits", "test", 60), ("digits", "selection", 40), ("digits-flipped", "test", 60)):
        images, labels = packed.probes(dataset, role)
        assert images.shape == (count, 3, 8, 8)
        agreement = float((images.flatten(2).sum(2)[:, :2].argmax(1) == labels).double().mean())
        assert agreement < 0.3 if "flipped" in dataset else agreement > 0.55
    assert reconstruct(next(packed.rows()))(images).shape == (60, 2)


@pytest.mark.parametrize(
    ("settings", "factors", "message"),
    [
        ("learner: irm", "label_ratio: [0.3]", "learner irm needs a penalty_weight"),
        ("learner: group-dro, num_images: 240", "label_ratio: [0.3]", "needs environments"),
        ("penalty_weight: 3", "label_ratio: [0.3]", "learner erm has no penalty_weight"),
        ("learner: erm, mixup: 0.5", "label_ratio: [0.3]", "without mixing"),
        ("num_images: 241, environments: [0.9, 0.8]", "label_ratio: [0.3]", "241 images cannot be shared equally"),
        ("num_images: 100", "last_environment: [true, false]", "there is no last environment"),
        ("num_images: 100, learner: ermm", "label_ratio: [0.3]", "did you mean 'erm'"),
        ("num_images: 100", "label_ratio: [1.3]", "must lie between 0 and 1"),
        ("num_images: 100, seed: 1", "label_ratio: [0.5]", "both a setting and a factor"),
        ("num_images: 100, use_images: 200", "label_ratio: [0.5]", "more than num_images"),
    ],
)
def test_impossible_worlds_are_refused_with_their_line(make, settings, factors, message):
    with pytest.raises(ZooError, match=message) as refused:
        make(settings, factors)
    assert "line" in str(refused.value)


def test_settings_of_worlds_need_a_world(make):
    with pytest.raises(ZooError, match="is a setting of worlds"):
        make("", LABEL_RATIOS, ("world: two-colour, queries: 40, tests: 60", "test: 0.2"))


def test_replicas_have_seeds_of_their_own(make):
    zoo = make("", LABEL_RATIOS, ("replicas: 1", "replicas: 3"))
    assert [run.recipe.seed for run in zoo.runs] == list(range(12))
    assert [run.factors["label_ratio"] for run in zoo.runs[:7]] == [0.3] * 6 + [0.7]


PRIVATE = "learner: dp-sgd, num_images: 240, noise_multiplier: 0, clip_norm: 1000, optimizer: sgd"


def test_private_training_without_noise_or_clipping_is_sgd_on_poisson_samples(make, tmp_path):
    pytest.importorskip("opacus", reason="opacus is an extra: pip install 'vitzoo-hf[privacy]'")
    zoo = make(PRIVATE, "label_ratio: [0.5]", ("lr: 0.003", "lr: 0.1"))
    (run,) = zoo.runs
    train_stacked(PreparedBlueprint(zoo), [run], tmp_path)
    images = load_images("digits", zoo.images["digits"])
    draw = images.pool.training_draw(run.world, run.learner, run.recipe.seed)
    inputs = images.normalize(images.pool.images(draw))
    model = initial_model(PreparedBlueprint(zoo), run, tmp_path).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes = []
    for epoch in (1, 2, 3):
        generator = torch.Generator().manual_seed(derive_seed(0, "poisson", epoch))
        for _ in range(5):
            chosen = torch.rand(240, generator=generator) < 0.1
            sizes.append(int(chosen.sum()))
            optimizer.zero_grad()
            (cross_entropy(model(inputs[chosen]), draw.labels[chosen], reduction="sum") / 24).backward()
            optimizer.step()
    assert len(set(sizes)) > 3
    torch.testing.assert_close(
        weights(tmp_path, run.run_id, 3), flatten(model.state_dict()).double(), atol=1e-5, rtol=1e-4
    )


def test_private_gradients_are_clipped_and_noisy_and_the_budget_is_counted(make, tmp_path):
    """With all gradients longer than the norm, a step is at most clip_norm times images in length."""
    pytest.importorskip("opacus", reason="opacus is an extra: pip install 'vitzoo-hf[privacy]'")
    moved = {}
    for noise, clip in ((0, 1e-3), (1.0, 1e-3)):
        text = PRIVATE.replace(
            "noise_multiplier: 0, clip_norm: 1000", f"noise_multiplier: {noise}, clip_norm: {clip}"
        )
        zoo = make(text, "label_ratio: [0.5]", ("lr: 0.003", "lr: 1"))
        (run,) = zoo.runs
        if noise:
            for folder in ("first", "second"):
                train_stacked(PreparedBlueprint(zoo), [run], tmp_path / folder)
            first, second = (weights(tmp_path / folder, run.run_id, 3) for folder in ("first", "second"))
            assert torch.equal(first, second)
            spent = [results(tmp_path / "first", run.run_id, epoch)["epsilon"] for epoch in (0, 1, 3)]
            assert spent[0] == 0 < spent[1] < spent[2] < 20
        else:
            train_stacked(PreparedBlueprint(zoo), [run], tmp_path / "clipped")
        folder = tmp_path / ("first" if noise else "clipped")
        moved[noise] = weights(folder, run.run_id, 3) - weights(folder, run.run_id, 0)
    assert 0 < float(moved[0].norm()) < 15 * 1e-3 * 48 / 24
    noise_alone = (moved[1.0] - moved[0]).std()
    assert float(noise_alone) == pytest.approx(1e-3 / 24 * math.sqrt(15), rel=0.1)


def test_shared_init_begins_every_run_at_the_same_weights(make, tmp_path):
    for shared in (False, True):
        zoo = make(f"shared_init: {str(shared).lower()}")
        first, second = (
            flatten(initial_model(PreparedBlueprint(zoo), run, tmp_path).state_dict()) for run in zoo.runs[:2]
        )
        assert torch.equal(first, second) == shared


FINETUNE = """\
  finetune:
    images: digits
    epochs: 1
    settings: {lr: 0.003, batch_size: 24, epoch_steps: 5, num_images: 240, shared_init: true}
    factors: {role: [target, shadow]}
    replicas: 1
splits"""


def test_shared_init_gives_fine_tuned_runs_one_head_on_their_checkpoint(make, tmp_path):
    zoo = make("", "role: [target]", ("splits", FINETUNE))
    parent, *children = zoo.runs
    train_stacked(PreparedBlueprint(zoo), [parent], tmp_path)
    states = [initial_model(PreparedBlueprint(zoo), run, tmp_path).state_dict() for run in children]
    trained, _ = RunFolder(tmp_path / parent.run_id).load_epoch(3)
    assert torch.equal(states[0]["head.weight"], states[1]["head.weight"])
    assert not torch.equal(states[0]["head.weight"], trained["head.weight"])
    assert torch.equal(states[0]["patch_embed.proj.weight"], trained["patch_embed.proj.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("penalty_from: 5", "learner erm has no penalty_from"),
        ("group_rate: 0.5", "learner erm has no group_rate"),
        ("resample_by: group", "learner erm has no resample_by or resample_to"),
        ("flip_rate: 0.2", "flip_rate is 0.2, but images 'digits' have no region"),
        ("environments: [[0.9, 0.1]], num_images: 240", r"environments is \[0.9, 0.1\]; expected a number"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(make, settings, message):
    with pytest.raises(ZooError, match=message):
        make(settings)
