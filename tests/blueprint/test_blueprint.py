import itertools
import json
import os
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
from places import TINY

from vitzoo_hf.blueprint import blueprint as module
from vitzoo_hf.blueprint.blueprint import Blueprint, ImagesSpec
from vitzoo_hf.format.schema import MODEL_ID, ZooError, canonical_json

TEXT = """\
name: small
architecture:
  name: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2}
images:
  digits: {size: 8}
stages:
  pretrain:
    images: digits
    epochs: 4
    settings: {lr: 0.003, batch_size: 64}
    factors: {regime: supervised, seed: [1, 2]}
  finetune:
    images: digits
    epochs: 3
    keep_epochs: [0, 2]
    settings: {head_hidden: 8}
    factors:
      optimizer: [adamw, sgd]
      lr: [0.01, 1e-3]
splits: {by: run, seed: 3, train: 0.6, validation: 0.2, test: 0.2}
"""

# Schürholt et al. 2025, "A Model Zoo of Vision Transformers", tables 1 and 2
PAPER = """\
name: vit-zoo
architecture:
  name: vit_small_patch16_224
  args: {img_size: 224, patch_size: 16}
images:
  imagenet: {source: "hf:ILSVRC/imagenet-1k", size: 224, classes: 1000}
  cifar100: {source: "hf:uoft-cs/cifar100", size: 224, classes: 100}
stages:
  pretrain:
    images: imagenet
    epochs: 90
    keep_epochs: all
    settings: {optimizer: adamw, lr: 1e-3, weight_decay: 1e-4, init: kaiming}
    variants:
      - factors: {regime: supervised, ddp: false, seed: [42, 6312]}
        settings: &supervised
          accumulate: 2
          batch_size: 256
          augmentation: crop-flip
          mixup: .8
          cutmix: 1.0
          random_erase: .25
          label_smoothing: .1
      - factors: {regime: supervised, ddp: true, seed: [1957, 2517, 3753, 6312, 7853]}
        settings: *supervised
      - factors: {regime: contrastive, seed: [42, 2517, 6312]}
        settings: {batch_size: 96, augmentation: simclr, temperature: .07}
  finetune:
    images: cifar100
    epochs: 50
    keep_epochs: all
    settings: {batch_size: 256, init: kaiming, head_hidden: 256}
    factors:
      seed: [42, 6312]
      lr: [3e-3, 1e-3, 1e-4]
      optimizer: [adamw, sgd]
      head: [linear, mlp]
splits: {by: lineage, seed: 0, train: .7, validation: .15, test: .15}
"""


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str = TEXT, *changes: tuple[str, str]) -> Blueprint:
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        file = tmp_path / "zoo.yaml"
        file.write_text(text, encoding="utf-8")
        return Blueprint.load(file)

    return load


def check_invariants(blueprint: Blueprint) -> None:
    ids = [run.run_id for run in blueprint.runs]
    assert len(set(ids)) == len(ids)
    position = {run_id: number for number, run_id in enumerate(ids)}
    for number, run in enumerate(blueprint.runs):
        assert MODEL_ID.fullmatch(f"{run.run_id}@0")
        assert list(run.factors) == list(blueprint.factor_types)
        assert run.keep_epochs == tuple(sorted(set(run.keep_epochs)))
        assert run.keep_epochs[-1] == run.epochs
        if run.stage == "pretrain":
            assert run.parent_id is None
            assert run.parent_run is None
        else:
            assert position[run.parent_run] < number
            parent = blueprint.runs[position[run.parent_run]]
            assert run.parent_id == f"{parent.run_id}@{parent.epochs}"


def test_mini_is_two_pretrained_and_the_grid_of_the_paper_on_each():
    mini = Blueprint.load("mini")
    check_invariants(mini)
    parents = [run for run in mini.runs if run.stage == "pretrain"]
    assert {run.factors["regime"] for run in parents} == {"supervised", "contrastive"}
    assert len(parents) == 2
    grid = set(itertools.product(("adamw", "sgd"), (3e-3, 1e-3, 1e-4), ("linear", "mlp"), (42, 6312)))
    for parent in parents:
        children = [run.recipe for run in mini.runs if run.parent_run == parent.run_id]
        assert len(children) == 24
        assert {(one.optimizer, one.lr, one.head, one.seed) for one in children} == grid
    assert len(mini.runs) == 50
    assert mini.num_rows == 50 * 5


def test_the_zoo_of_the_paper_can_be_said(load):
    zoo = load(PAPER)
    check_invariants(zoo)
    parents = [run for run in zoo.runs if run.stage == "pretrain"]
    children = [run for run in zoo.runs if run.stage == "finetune"]
    assert (len(parents), len(children)) == (10, 240)
    assert zoo.num_rows == 10 * 91 + 240 * 51
    assert {(run.recipe.regime, run.recipe.ddp, run.recipe.seed) for run in parents} == {
        *(("supervised", False, seed) for seed in (42, 6312)),
        *(("supervised", True, seed) for seed in (1957, 2517, 3753, 6312, 7853)),
        *(("contrastive", False, seed) for seed in (42, 2517, 6312)),
    }
    for run in parents:
        recipe = run.recipe
        assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.init) == ("adamw", 1e-3, 1e-4, "kaiming")
        mixing = (recipe.batch_size, recipe.mixup, recipe.cutmix, recipe.random_erase, recipe.label_smoothing)
        assert mixing == ((256, 0.8, 1.0, 0.25, 0.1) if recipe.regime == "supervised" else (96, 0, 0, 0, 0))
    assert all(run.recipe.regime == "supervised" and run.recipe.batch_size == 256 for run in children)
    assert Counter(run.parent_run for run in children) == {run.run_id: 24 for run in parents}
    assert [run.factors["ddp"] for run in parents] == [False] * 2 + [True] * 5 + [False] * 3
    assert {run.factors["parent_seed"] for run in children if run.factors["regime"] == "contrastive"} == {
        42,
        2517,
        6312,
    }


def test_factors_are_inherited_and_filled(load):
    zoo = load()
    check_invariants(zoo)
    assert zoo.factor_types == {"regime": "string", "seed": "int", "optimizer": "string", "lr": "float"}
    parent, child = zoo.runs[0], zoo.runs[-1]
    assert parent.factors == {"regime": "supervised", "seed": 1, "optimizer": "adamw", "lr": 0.003}
    assert child.factors == {"regime": "supervised", "seed": 2, "optimizer": "sgd", "lr": 0.001}
    assert child.run_id == "sl-s2--sgd-lr0.001"
    assert child.parent_id == "sl-s2@4"


def test_a_factor_of_both_stages_is_kept_twice(load):
    zoo = load(TEXT, ("lr: [0.01, 1e-3]", "seed: [7, 8]"))
    assert {run.factors["parent_seed"] for run in zoo.runs if run.stage == "pretrain"} == {None}
    children = [run for run in zoo.runs if run.stage == "finetune"]
    assert all(run.factors["seed"] == run.recipe.seed for run in children)
    assert {(run.parent_run, run.factors["parent_seed"]) for run in children} == {("sl-s1", 1), ("sl-s2", 2)}
    assert zoo.factor_types["parent_seed"] == "int"


def test_a_factor_of_one_variant_is_inherited_from_the_settings_of_the_others(load):
    zoo = load(
        TEXT,
        (
            "    factors: {regime: supervised, seed: [1, 2]}\n",
            "    variants:\n"
            "      - factors: {regime: supervised, augmentation: [crop, none], seed: 1}\n"
            "      - factors: {seed: 2}\n"
            "        settings: {regime: contrastive, augmentation: simclr}\n",
        ),
    )
    contrastive = [run for run in zoo.runs if run.run_id.startswith("s2")]
    assert len(contrastive) == 5
    for run in contrastive:
        assert (run.factors["regime"], run.factors["augmentation"]) == ("contrastive", "simclr"), run.run_id


def test_settings_reach_the_recipes(load):
    zoo = load(TEXT, ("lr: 0.003, batch_size: 64", "lr: 3e-3, batch_size: 64, weight_decay: 1, schedule: cosine"))
    pretrain, finetune = zoo.runs[0].recipe, zoo.runs[-1].recipe
    assert (pretrain.lr, pretrain.batch_size, pretrain.weight_decay, pretrain.schedule) == (0.003, 64, 1.0, "cosine")
    assert isinstance(pretrain.weight_decay, float)
    assert (finetune.batch_size, finetune.schedule, finetune.head_hidden) == (128, "constant", 8)


def test_variants_refine_common_settings(load):
    zoo = load(
        TEXT,
        (
            "    factors: {regime: supervised, seed: [1, 2]}\n",
            "    variants:\n      - {factors: {seed: 1}, settings: {batch_size: 16}}\n      - {factors: {seed: 2}}\n",
        ),
    )
    assert [run.recipe.batch_size for run in zoo.runs[:2]] == [16, 64]


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("keep_epochs: all", (0, 1, 2, 3)),
        ("keep_epochs: [2, 0, 2]", (0, 2, 3)),
        ("keep_epochs: []", (3,)),
        ("", (3,)),
    ],
)
def test_kept_epochs_always_hold_the_last(load, line, kept):
    zoo = load(TEXT, ("keep_epochs: [0, 2]", line))
    assert zoo.runs[-1].keep_epochs == kept
    assert zoo.runs[0].keep_epochs == (4,)


def test_arguments_may_be_lists(load):
    zoo = load(TEXT, ("img_size: 8", "img_size: [8, 8]"))
    assert zoo.architecture_args["img_size"] == [8, 8]
    assert canonical_json(zoo.architecture_args)
    assert zoo.fingerprint != load().fingerprint


def test_fingerprints_of_blueprints_trained_before_stay(load):
    """A field that is added later must not change them where it has its default."""
    mini = Blueprint.load("mini")
    assert mini.fingerprint == "831f82d5a86e65e4"
    assert Blueprint.load(TINY).fingerprint == "4ffa3d53f907e6c0"
    images = ImagesSpec("digits", 8).decides()
    assert not {"interpolation", "label", "decode", "path", "classes"} & set(images)


@pytest.mark.parametrize(
    "change", ["interpolation: bicubic", "label: fine", "decode: once", "mean: [0.1, 0.2, 0.3]", "std: 0.4"]
)
def test_the_fingerprint_follows_how_images_are_prepared(load, change):
    changed = load(TEXT, ("{size: 8}", f"{{size: 8, {change}}}"))
    assert changed.fingerprint != load().fingerprint
    spec = changed.images["digits"]
    assert canonical_json(spec.decides()) == canonical_json(json.loads(canonical_json(spec.decides())))
    assert hash(spec) == hash(load(TEXT, ("{size: 8}", f"{{size: 8, {change}}}")).images["digits"])


def test_the_fingerprint_ignores_how_it_is_written(load):
    zoo = load()
    rewritten = load(
        "# a comment\n" + TEXT,
        ("{size: 8}", "\n    size:   8 # pixels"),
        ("lr: 0.003", "lr: 3e-3"),
        ("[0, 2]", "[2, 0, 3]"),
    )
    assert rewritten.fingerprint == zoo.fingerprint
    assert rewritten.runs == zoo.runs


@pytest.mark.parametrize(
    "change",
    [
        ("name: small", "name: other"),
        ("depth: 1", "depth: 2"),
        ("{size: 8}", "{size: 8, mean: 0.4}"),
        ("{size: 8}", "{size: 8, split_seed: 1}"),
        ("epochs: 4", "epochs: 5"),
        ("[0, 2]", "[0, 1]"),
        ("lr: 0.003", "lr: 0.0030001"),
        ("batch_size: 64", "batch_size: 65"),
        ("batch_size: 64", "batch_size: 64, ddp: true, accumulate: 2"),
        ("head_hidden: 8", "head_hidden: 9"),
        ("head_hidden: 8", "freeze_trunk: true"),
        ("seed: [1, 2]", "seed: [2, 1]"),
        ("[adamw, sgd]", "[adamw]"),
        ("by: run", "by: lineage"),
        ("seed: 3", "seed: 4"),
    ],
)
def test_the_fingerprint_follows_every_setting(load, change):
    assert load(TEXT, change).fingerprint != load().fingerprint


LONE = "factors: {regime: supervised, seed: [1, 2]}"


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("name: small", "nam: small"), 1, "unknown key 'nam' in the blueprint: did you mean 'name'?"),
        (("name: small\n", ""), 1, "the blueprint lacks 'name'"),
        (("name: small", "name: 3"), 1, "name is 3; expected text"),
        (("images:\n  digits", "imagess:\n  digits"), 5, "unknown key 'imagess'"),
        (("  pretrain:", "  pretrian:"), 8, "unknown key 'pretrian' in stages: did you mean 'pretrain'?"),
        (("    epochs: 4", "    epoch: 4"), 10, "unknown key 'epoch' in pretrain: did you mean 'epochs'?"),
        (("    epochs: 4\n", ""), 8, "pretrain lacks 'epochs'"),
        (("batch_size: 64", "batchsize: 64"), 11, "unknown setting or factor 'batchsize': did you mean 'batch_size'"),
        (("seed: [1, 2]", "sead: [1, 2]"), 12, "unknown setting or factor 'sead': did you mean 'seed'?"),
        (("regime: supervised", "regime: supervisd"), 12, "unknown regime 'supervisd': did you mean 'supervised'?"),
        (("[adamw, sgd]", "[adamw,\n        adam]"), 20, "unknown optimizer 'adam': did you mean 'adamw'?"),
        (("{lr: 0.003", "{lr: fast"), 11, "lr is 'fast'; expected a number"),
        (("batch_size: 64", "batch_size: 64.5"), 11, "batch_size is 64.5; expected a whole number"),
        (("batch_size: 64", "batch_size: true"), 11, "batch_size is True; expected a whole number"),
        (("batch_size: 64", "ddp: 1"), 11, "ddp is 1; expected true or false"),
        (("lr: 0.003", "lr: -0.003"), 11, "lr is -0.003; it must not be negative"),
        (("lr: 0.003", "lr: 0"), 11, "lr is 0; it must be positive"),
        (("batch_size: 64", "batch_size: 0"), 11, "batch_size is 0; it must be positive"),
        (("batch_size: 64", "label_smoothing: 1.5"), 11, "label_smoothing is 1.5; it must lie between 0 and 1"),
        (("batch_size: 64", "seed: 4"), 12, "'seed' is both a setting and a factor of this stage"),
        (("seed: [1, 2]", "seed: [1, 1]"), 12, "factor 'seed' lists a value twice: [1, 1]"),
        (("lr: [0.01, 1e-3]", "lr: [0.01, 1e-2]"), 20, "factor 'lr' lists a value twice"),
        (("lr: [0.01, 1e-3]", "lr: [0.01, 0.010000001]"), 18, "two combinations give the run id"),
        (("seed: [1, 2]", "seed: []"), 12, "factor 'seed' has no value"),
        ((LONE, "factors: {}"), 12, "a stage needs at least one factor"),
        ((LONE, ""), 8, "pretrain lacks 'factors'"),
        ((LONE, LONE + "\n    variants: []"), 13, "a stage has either factors or variants, not both"),
        (("epochs: 4", "epochs: 0"), 10, "epochs is 0; it must be at least 1"),
        (("[0, 2]", "[0, 4]"), 16, "keep_epochs [0, 3, 4] must lie between 0 (initial weights) and epochs = 3"),
        (("[0, 2]", "[-1, 2]"), 16, "keep_epochs [-1, 2, 3] must lie between 0"),
        (("[0, 2]", "5"), 16, "keep_epochs must be a list"),
        (("digits\n    epochs: 4", "digit\n    epochs: 4"), 9, "unknown images 'digit': did you mean 'digits'?"),
        (("{size: 8}", "{}"), 6, "digits lacks 'size'"),
        (("{size: 8}", "{size: 8, scale: 2}"), 6, "unknown key 'scale' in digits"),
        (("{size: 8}", "{size: 0}"), 6, "size is 0; it must be positive"),
        (("{size: 8}", "{size: 8, std: 0}"), 6, "std is 0.0; it must be positive"),
        (("{size: 8}", "{size: 8, channels: 3, std: [1, 0, 1]}"), 6, "std is 0.0; it must be positive"),
        (("{size: 8}", "{size: 8, mean: [0.5, 0.5]}"), 6, "mean has 2 numbers; give one, or one for each channel"),
        (("{size: 8}", "{size: 8, mean: [a, b, c]}"), 6, "mean is 'a'; expected a number"),
        (("{size: 8}", "{size: 8, mean: null}"), 6, "mean is None; expected a number"),
        (("{size: 8}", "{size: 8, interpolation: cubic}"), 6, "unknown interpolation 'cubic': did you mean"),
        (("{size: 8}", "{size: 8, decode: on-demand}"), 6, "unknown decode 'on-demand': did you mean"),
        (("{size: 8}", "{size: 8, channels: 0}"), 6, "channels is 0; it must be positive"),
        (("{size: 8}", "{size: 8, classes: -1}"), 6, "classes is -1; it must be positive"),
        (("{size: 8}", "{size: 8, test: 0.9}"), 6, "selection and test are shares above 0 that leave images"),
        (("by: run", "by: row"), 21, "splits are by 'run' or by 'lineage', not by 'row'"),
        (("train: 0.6", "train: 0.7"), 21, "train, validation, test are [0.7, 0.2, 0.2]; they must sum to 1"),
        (("train: 0.6, validation: 0.2", "train: 1.2, validation: -0.4"), 21, "they must sum to 1"),
        (("seed: 3, ", ""), 21, "splits lacks 'seed'"),
        (("batch_size: 64", "momentum: 0.9"), 12, "adamw has no momentum setting"),
        (("batch_size: 64", "freeze_trunk: true"), 12, "a trunk can be frozen only in fine-tuning"),
        (("head_hidden: 8", "regime: contrastive, augmentation: crop"), 18, "a contrastive run is a pre-training"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_where_they_stand(load, change, line, message):
    with pytest.raises(ZooError, match=rf"^zoo\.yaml, line {line}: .*{re.escape(message)}"):
        load(TEXT, change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("augmentation: crop, mixup: 0.8", "no labels to smooth or mix"),
        ("augmentation: crop, cutmix: 1.0", "no labels to smooth or mix"),
        ("augmentation: crop, label_smoothing: 0.1", "no labels to smooth or mix"),
        ("augmentation: none", "needs two different views: set an augmentation"),
        ("augmentation: crop, head: mlp", "head is its projection: it is linear"),
        ("augmentation: crop, batch_size: 1", "needs a batch of at least 2"),
    ],
)
def test_contradictions_of_contrastive_runs(load, settings, message):
    with pytest.raises(ZooError, match=rf"^zoo\.yaml, line 12: .*{message}.* \(in the combination"):
        load(TEXT, ("lr: 0.003, batch_size: 64", settings), ("supervised", "contrastive"))


def test_a_momentum_is_for_sgd(load):
    assert load(TEXT, ("batch_size: 64", "optimizer: sgd, momentum: 0.9")).runs[0].recipe.momentum == 0.9


def test_a_blueprint_needs_pretraining(load):
    start, stop = TEXT.index("  pretrain:"), TEXT.index("  finetune:")
    with pytest.raises(ZooError, match=r"line 7: a blueprint needs a `pretrain` stage"):
        load(TEXT[:start] + TEXT[stop:])


def test_pretraining_alone_is_a_zoo(load):
    zoo = load(TEXT[: TEXT.index("  finetune:")] + TEXT[TEXT.index("splits:") :])
    check_invariants(zoo)
    assert [run.run_id for run in zoo.runs] == ["sl-s1", "sl-s2"]


def test_ids_unsafe_as_a_file_name_are_refused(load, monkeypatch):
    monkeypatch.setitem(module.ID_PREFIXES, "seed", "../s")
    with pytest.raises(ZooError, match=r"line 12: the run id 'sl-\.\./s1' would not be safe as a file name"):
        load()


def test_a_blueprint_can_come_through_a_pipe(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe.yaml")
    writer = threading.Thread(target=pipe.write_text, args=(TEXT,), daemon=True)
    writer.start()
    assert Blueprint.load(pipe).text == TEXT  # a second reading would wait for ever
    writer.join()


def test_unknown_blueprints_are_refused(tmp_path):
    with pytest.raises(ZooError, match=r"unknown blueprint 'minni': did you mean 'mini'\?, or a \.yaml file"):
        Blueprint.load("minni")
    with pytest.raises(ZooError, match=r"cannot read .*none\.yml: No such file or directory"):
        Blueprint.load(tmp_path / "none.yml")


MANY = TEXT.replace("seed: [1, 2]", f"seed: {list(range(40))}")


def test_splits_by_run_never_divide_a_run_and_do_divide_trees(load):
    zoo = load(MANY)
    assert len({run.run_id for run in zoo.runs}) == len(zoo.runs)
    counts = Counter(run.split for run in zoo.runs)
    assert abs(counts["train"] / len(zoo.runs) - 0.6) < 0.1
    splits = {(run.parent_run or run.run_id, run.split) for run in zoo.runs}
    assert len(splits) > 40


def test_splits_by_lineage_keep_trees_together(load):
    zoo = load(MANY, ("by: run", "by: lineage"))
    splits = {(run.parent_run or run.run_id, run.split) for run in zoo.runs}
    assert len(splits) == 40
    assert {split for _, split in splits} == {"train", "validation", "test"}


@pytest.mark.parametrize("by", ["run", "lineage"])
def test_more_runs_never_move_the_others(load, by):
    before = {run.run_id: run.split for run in load(MANY, ("by: run", f"by: {by}")).runs}
    grown = load(
        MANY, ("by: run", f"by: {by}"), ("[adamw, sgd]", "[sgd, adamw]"), ("[0.01, 1e-3]", "[0.2, 0.01, 1e-3]")
    )
    after = {run.run_id: run.split for run in grown.runs}
    assert len(after) > len(before)
    assert {run_id: after[run_id] for run_id in before} == before


def test_folders_of_this_machine_stay_out_of_the_text(load):
    zoo = load(TEXT, ("{size: 8}", "{source: folder, path: /home/someone/pictures, size: 8}"))
    assert "someone" not in zoo.text
    assert "path: pictures" in zoo.text
    assert zoo.images["digits"].path == "/home/someone/pictures"


def test_the_paper_s_zoo_is_in_the_package():
    zoo = Blueprint.load("vit_small_imagenet_cifar100")
    small = Blueprint.load("desk")
    assert [run.run_id for run in zoo.runs] == [run.run_id for run in small.runs]
    assert len(zoo.runs) == 250
    assert sum(run.stage == "pretrain" for run in zoo.runs) == 10
    assert {run.epochs for run in zoo.runs if run.stage == "pretrain"} == {90}
    assert {run.epochs for run in zoo.runs if run.stage == "finetune"} == {50}
    assert {(run.recipe.lr, run.recipe.optimizer, run.recipe.head) for run in zoo.runs[10:]} == {
        (lr, optimizer, head)
        for lr in (3e-3, 1e-3, 1e-4)
        for optimizer in ("adamw", "sgd")
        for head in ("linear", "mlp")
    }


def test_the_executed_reading_shifts_the_arguments_by_one(load):
    declared = "mixup: 0.8, cutmix: 1.0, random_erase: 0.25, label_smoothing: 0.1"
    recipe = (
        load(TEXT, ("batch_size: 64", f"batch_size: 64, {declared}, augmentation_reading: executed")).runs[0].recipe
    )
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (0.8, 1.0, 0.1)
    executed = recipe.executed
    assert (executed.label_smoothing, executed.mixup, executed.cutmix, executed.random_erase) == (0.8, 1.0, 0.0, 0.25)
    assert recipe.decides["augmentation_reading"] == "executed"
    assert load(TEXT, ("batch_size: 64", f"batch_size: 64, {declared}")).runs[0].recipe.executed.cutmix == 1.0
