import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from foreign_layouts import (
    FINETUNED,
    NAME,
    OVERRIDE,
    PRETRAINED,
    model_of,
    served,
    write_checkpoint,
    write_release,
)

from vitzoo_hf.convert.convert import convert
from vitzoo_hf.convert.rows import SourceError
from vitzoo_hf.convert.sources import places
from vitzoo_hf.convert.sources.places import FolderPlace, WebPlace, unsafe
from vitzoo_hf.convert.sources.release import is_release, plan_release
from vitzoo_hf.convert.sources.release_runs import parse_results, public
from vitzoo_hf.format import schema
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish import folder as zoo_folder
from vitzoo_hf.zoo import Zoo

SL, DDP, CL = (name for name, *_ in PRETRAINED)
LINEAR, MLP = (name for name, *_ in FINETUNED)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def own(release, tmp_path):
    return shutil.copytree(release, tmp_path / "release")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(places, "FIRST_WAIT", 0.01)


def planned(root, **options):
    return plan_release(FolderPlace(root), **OVERRIDE | options)


def by_id(plan):
    return {row.columns["model_id"]: row for row in plan.rows}


def test_every_checkpoint_has_a_row_with_lineage_and_factors(release):
    plan = planned(release)
    assert plan.refused == {}
    rows = by_id(plan)
    assert len(rows) == 3 * 3 + 6 * 2
    assert [row.columns["stage"] for row in plan.rows] == ["pretrain"] * 9 + ["finetune"] * 12
    for name, mode, ddp, seed in PRETRAINED:
        first = rows[f"{name}@1"].columns
        assert (first["parent_id"], first["dataset"], first["is_final"]) == (None, "imagenet-1k", False)
        assert rows[f"{name}@3"].columns["is_final"]
        regime = "contrastive" if mode == "cl" else "supervised"
        assert [first[f"factor_{key}"] for key in ("regime", "ddp", "seed", "parent_seed")] == [
            regime,
            ddp,
            seed,
            None,
        ]
        for child, head_seed, lr, optimizer, mlp in FINETUNED:
            tuned = rows[f"{name}--{child}@2"].columns
            assert tuned["parent_id"] == f"{name}@3"
            assert (tuned["dataset"], tuned["is_final"]) == ("cifar-100", True)
            assert tuned["factor_regime"] == regime
            assert (tuned["factor_seed"], tuned["factor_parent_seed"]) == (head_seed, seed)
            assert (tuned["factor_lr"], tuned["factor_optimizer"]) == (lr, optimizer)
            assert tuned["factor_head"] == ("mlp" if mlp else "linear")
            assert rows[f"{name}--{child}@2"].split_group == name
    assert all(schema.MODEL_ID.fullmatch(model_id) for model_id in rows)
    assert {f"factor_{name}" for name in plan.factor_types} == {key for key in first if key.startswith("factor_")}


def test_results_are_those_of_the_epoch_and_projections_have_no_accuracy(release):
    rows = by_id(planned(release))
    second = rows[f"{SL}@2"].columns
    assert second["train_loss"] == 1.0
    assert second["test_accuracy"] == pytest.approx(0.42)
    assert second["generalization_gap"] == pytest.approx(0.1)
    contrastive = rows[f"{CL}@1"].columns
    assert contrastive["train_loss"] == 2.0
    assert contrastive["test_accuracy"] is contrastive["generalization_gap"] is None
    assert rows[f"{CL}@2"].columns["train_loss"] is None  # its result.json holds one epoch only
    assert rows[f"{CL}--{LINEAR}@1"].columns["test_accuracy"] == pytest.approx(0.41)


def test_what_is_declared_and_what_was_done_are_kept_apart(release):
    plan = planned(release)
    told = by_id(plan)[f"{SL}@1"].columns["provenance"]
    assert told["declared"] == {"mixup": 0.8, "cutmix": 1.0, "randerase": 0.25, "label_smoothing": 0.1}
    assert told["effective"] == {"label_smoothing": 0.8, "mixup": 1.0, "cutmix": 0.0, "random_erase": 0.25}
    assert by_id(plan)[f"{CL}@1"].columns["provenance"]["effective"]["mixup"] == 0.0
    for trap in ("passes its arguments in another order", "projections", "9,984", "choosing on test", "no licence"):
        assert any(trap in note for note in plan.notes), trap


def test_nothing_private_is_published(release):
    text = json.dumps([row.columns for row in planned(release).rows])
    for private in ("netscratch", "somebody", "node17", "10.1.2.3"):
        assert private not in text
    assert public({"a": "/home/x", "user": "x", "b": {"c": "10.0.0.1:80", "d": [1, "C:\\x\\y"]}, "nlin": "gelu"}) == {
        "b": {"d": [1, None]},
        "nlin": "gelu",
    }


@pytest.mark.parametrize("tops", [("pretraining", "finetuning"), ("dataset/pretraining", "dataset/finetuning")])
def test_both_namings_of_the_folders(release, tmp_path, tops):
    other = write_release(tmp_path, tops=tops)
    assert is_release(FolderPlace(other))
    assert list(by_id(planned(other))) == list(by_id(planned(release)))


def test_what_is_no_release_is_said_to_be_none(tmp_path):
    assert not is_release(FolderPlace(tmp_path))
    with pytest.raises(
        ZooError, match="is no release of the ViT model zoo: expected folders vit_imagenet_pretrained"
    ):
        planned(tmp_path)


def test_checkpoints_from_before_training_are_epoch_zero(tmp_path):
    release = write_release(tmp_path, before=True)
    rows = by_id(planned(release))
    assert {f"{SL}--{LINEAR}@{epoch}" for epoch in (0, 1, 2)} < rows.keys()
    assert rows[f"{SL}--{LINEAR}@1"].columns["test_accuracy"] == pytest.approx(0.41)
    for run in (release / "vit_cifar100_finetuned").glob("*/*"):
        shutil.rmtree(run / "checkpoint_00002")
    plan = planned(release)
    assert f"{SL}--{LINEAR}@0" in by_id(plan)
    assert any("against the number of checkpoints" in note for note in plan.notes)
    assert f"{SL}--{LINEAR}@1" in by_id(planned(release, first_epoch=1))
    with pytest.raises(ZooError, match="first_epoch is 2; expected 0"):
        planned(release, first_epoch=2)


def test_models_are_exact(release, tmp_path):
    done = convert(planned(release), tmp_path / "zoo", progress=False)
    assert (done.rows, done.refused) == (21, {})
    zoo = Zoo(tmp_path / "zoo")
    batch = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        for name, *_ in PRETRAINED:
            for index in range(3):
                assert torch.equal(zoo.model(f"{name}@{index + 1}")(batch), model_of(f"{name}{index}", 10)(batch))
            for child, *_, mlp in FINETUNED:
                for index in range(2):
                    source = model_of(f"{name}{child}{index}", 5, "mlp" if mlp else "linear")
                    assert torch.equal(zoo.model(f"{name}--{child}@{index + 1}")(batch), source(batch))
    assert set(zoo.filter(stage="finetune").index["parent_id"]) == {f"{name}@3" for name, *_ in PRETRAINED}


def test_real_small_vits(tmp_path):
    """Two checkpoints of the real size, seen from their configs and shapes alone."""
    from vitzoo_hf.models.vit import create

    run = tmp_path / "vit_imagenet_pretrained" / SL
    tuned = tmp_path / "vit_cifar100_finetuned" / SL / MLP
    models = {
        run: create(NAME, {"num_classes": 1000}, seed=1).eval(),
        tuned: create(NAME, {"num_classes": 100}, head="mlp", head_hidden=256, seed=2).eval(),
    }
    for folder, model in models.items():
        write_checkpoint(folder / "checkpoint_0", model)
        changes = {"training::epochs_train": 1}
        source = "vit_imagenet_pretrained" if folder == run else "vit_cifar100_finetuned"
        assert source in str(folder)
        (folder / "config.json").write_text(json.dumps({"model::type": "vit_s_16", "seed": 1, **changes}))
    plan = plan_release(FolderPlace(tmp_path))
    convert(plan, tmp_path / "zoo", progress=False)
    zoo = Zoo(tmp_path / "zoo")
    assert zoo.index["num_parameters"][:] == [22_050_664, 21_789_924]
    batch = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        for model_id, model in zip(zoo.model_ids, models.values(), strict=True):
            assert torch.equal(zoo.model(model_id)(batch), model(batch))


def test_a_server_gives_the_same_zoo_as_a_folder(release, tmp_path):
    convert(planned(release), tmp_path / "folder", progress=False)
    with served(release) as (address, server):
        convert(plan_release(WebPlace(address), **OVERRIDE), tmp_path / "web", workers=1, progress=False)
        fetched = [path for path in server.requests if path.endswith("/checkpoints")]
    assert sorted(set(fetched)) == sorted(f"{row.source}" for row in planned(release).rows)
    folder, web = Zoo(tmp_path / "folder"), Zoo(tmp_path / "web")
    assert folder.index["weights_sha256"][:] == web.index["weights_sha256"][:]
    assert folder.to_pandas().drop(columns="provenance").equals(web.to_pandas().drop(columns="provenance"))


@pytest.mark.parametrize(
    "faults",
    [
        [("status", 503), ("status", 500)],
        [("cut", 100)],
        [("cut", 5_000), ("cut", 3_000), ("status", 429)],
        [("cut", 0)],
    ],
)
def test_a_poor_connection_changes_nothing(release, faults):
    row = planned(release).rows[0]
    expected = (release / row.source).read_bytes()
    with served(release) as (address, server):
        server.faults[:] = list(faults)
        assert WebPlace(address).open(row.source).getvalue() == expected
        assert server.faults == []


def test_a_server_that_is_gone_is_not_a_refused_checkpoint(release, monkeypatch):
    monkeypatch.setattr(WebPlace, "attempts", 2)
    with served(release) as (address, server):
        plan = plan_release(WebPlace(address), **OVERRIDE)
        server.faults[:] = [("status", 503)] * 9
        with pytest.raises(SourceError, match="the server says 503; the same command continues later"):
            plan.rows[0].load()
    with pytest.raises(SourceError, match="the same command continues later"):
        plan.rows[0].load()


def test_a_missing_file_of_a_server_is_only_that(release):
    with served(release) as (address, _), pytest.raises(ZooError, match="the server says 404") as caught:
        WebPlace(address).open("vit_imagenet_pretrained/none")
    assert type(caught.value) is ZooError


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/etc", "a/b", "a\\b", "%2e%2e", "x%2Fy", "a\nb", "a\0b", "x" * 300, None, 7]
)
def test_names_that_lead_elsewhere_are_refused(release, name):
    assert unsafe(name) is not None
    with served(release) as (address, server):
        server.extra["vit_imagenet_pretrained"] = [{"name": name, "type": "directory"}, "no object", {"type": "file"}]
        plan = plan_release(WebPlace(address), **OVERRIDE)
        assert len(plan.rows) == 21
        assert len(plan.refused) >= 1
        assert all(path.startswith("vit_imagenet_pretrained/") for path in plan.refused)
        assert not [path for path in server.requests if "etc" in path]


@pytest.mark.parametrize("listing", [b"<html>", b"{}", b"[" + b"1," * 300_000 + b"1]"])
def test_what_is_no_listing_is_named(monkeypatch, listing):
    monkeypatch.setattr(WebPlace, "_fetch", lambda self, path, limit: bytearray(listing))
    with pytest.raises(ZooError, match="is no listing: expected a JSON list"):
        WebPlace("http://127.0.0.1:9").listing()


def spoil(run, kind):
    """Damage checkpoint 1 of a run; returns the name of the folder that is then refused."""
    folder = run / "checkpoint_1"
    if kind in ("cyrillic", "arabic"):
        return folder.rename(run / {"cyrillic": "checkpoint_1О", "arabic": "checkpoint_١"}[kind]).name
    if kind == "twice":
        shutil.rmtree(run / "checkpoint_2")
        shutil.copytree(folder, run / "checkpoint_0001")
        return folder.name
    (folder / "checkpoints").unlink()
    if kind == "empty":
        (folder / "checkpoints").touch()
    elif kind == "link":
        (folder / "checkpoints").symlink_to("/etc/hostname")
    return folder.name


@pytest.mark.parametrize("kind", ["cyrillic", "arabic", "empty", "no file", "twice", "link"])
def test_a_bad_checkpoint_is_refused_by_name_and_the_rest_goes_on(own, kind):
    folder = spoil(own / "vit_imagenet_pretrained" / SL, kind)
    plan = planned(own)
    assert list(plan.refused) == [f"vit_imagenet_pretrained/{SL}/{folder}"]
    assert len(plan.rows) == 20
    assert f"{SL}@3" in by_id(plan) or kind == "twice"


@pytest.mark.parametrize("kind", ["cut", "wrong shape", "missing key", "html", "code"])
def test_a_bad_file_is_refused_when_it_is_read(own, tmp_path, kind):
    file = own / "vit_imagenet_pretrained" / SL / "checkpoint_1" / "checkpoints"
    state = torch.load(file, weights_only=True)
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    elif kind == "html":
        file.write_bytes(b"<html>busy</html>")
    elif kind == "code":
        torch.save({"a": print}, file)
    else:
        name = "vit.blocks.0.attn.qkv.weight"
        changed = {key: tensor for key, tensor in state.items() if key != name}
        torch.save(changed if kind == "missing key" else changed | {name: torch.zeros(3, 3)}, file)
    done = convert(planned(own), tmp_path / "zoo", progress=False)
    assert list(done.refused) == [f"vit_imagenet_pretrained/{SL}/checkpoint_1/checkpoints"]
    assert done.rows == 20


@pytest.mark.parametrize(
    "kind", ["no config", "broken config", "huge config", "deep config", "unknown type", "unknown regime"]
)
def test_a_run_that_cannot_be_taken_is_refused_with_its_children(own, kind):
    run = own / "vit_imagenet_pretrained" / SL
    options = {}
    if kind == "no config":
        (run / "config.json").unlink()
    elif kind == "broken config":
        (run / "config.json").write_text("{")
    elif kind == "huge config":
        (run / "config.json").write_text(json.dumps({"a": "x" * 2_000_000}))
    elif kind == "deep config":
        (run / "config.json").write_text("[" * 200_000)
    elif kind == "unknown regime":
        (run / "config.json").write_text('{"model::type": "vit_s_16"}')
        run = run.rename(run.with_name("xx" + SL))
        (own / "vit_cifar100_finetuned" / SL).rename(own / "vit_cifar100_finetuned" / run.name)
    else:
        (run / "config.json").write_text('{"model::type": "resnet"}')
        options = {"architecture": None}
    plan = planned(own, **options)
    expected = {f"vit_cifar100_finetuned/{run.name}/{child}" for child, *_ in FINETUNED}
    assert set(plan.refused) == expected | {f"vit_imagenet_pretrained/{run.name}"}
    assert len(plan.rows) == 14


def test_accuracies_outside_zero_to_one_are_left_out(own):
    run = own / "vit_imagenet_pretrained" / SL
    (run / "result.json").write_text(
        json.dumps([{"training_iteration": 1, "train_acc": 51.0, "test_acc": 0.4, "test_loss": float("nan")}])
    )
    plan = planned(own)
    first = by_id(plan)[f"{SL}@1"].columns
    assert (first["train_accuracy"], first["test_accuracy"], first["test_loss"]) == (None, 0.4, None)
    assert f"{SL}: it records accuracies outside 0 to 1, which are left out." in plan.notes


def test_an_unfinished_run_is_noted(own):
    shutil.rmtree(own / "vit_imagenet_pretrained" / DDP / "checkpoint_0002")
    plan = planned(own)
    assert f"{DDP}: it ends after 2 epochs, its config says 3." in plan.notes
    assert by_id(plan)[f"{DDP}--{LINEAR}@2"].columns["parent_id"] == f"{DDP}@2"


INCOMPLETE = [
    b'{"training_iteration": 1}\n{"training_iter',
    b"[{}, {}]",
    b'{"test_acc": 0.9}',
    b"[" * 200_000,
    b'[1, {"training_iteration": 2}]',
    b"<html>",
]


@pytest.mark.parametrize(
    ("text", "epochs"),
    [
        (b'{"training_iteration": 5}', [5]),
        (b'[{"training_iteration": 1}, {"training_iteration": 2}]', [1, 2]),
        (b'{"training_iteration": 1, "a": "x\xe2\x80\xa8y"}\n\n{"training_iteration": 9}\n', [1, 9]),
        (b'{"training_iteration": 1}\n{"training_iter', [1]),
        (b"[{}, {}, {}]", [1, 2, 3]),
        (b"{}\n{}\n{}", [1, 2, 3]),
        (b"[{}, {}]", []),
        (b'{"test_acc": 0.9}', []),
        (b"[" * 200_000, []),
        (b'[1, {"training_iteration": 2}]', [2]),
        (b"<html>", []),
    ],
)
def test_results_in_every_form(text, epochs):
    found, notes = parse_results(text, 3)
    assert list(found) == epochs
    assert bool(notes) == (text in INCOMPLETE)


def test_a_run_without_readable_results_keeps_its_weights(own):
    (own / "vit_imagenet_pretrained" / SL / "result.json").write_text("{}\n{")
    plan = planned(own)
    assert (len(plan.rows), plan.refused) == (21, {})
    assert by_id(plan)[f"{SL}@1"].columns["train_loss"] is None
    assert f"{SL}: 1 of 2 entries of its result.json cannot be read." in plan.notes


@pytest.mark.parametrize("kind", ["empty", "no file"])
def test_children_keep_their_true_parent_when_it_cannot_be_taken(own, tmp_path, kind):
    last = own / "vit_imagenet_pretrained" / SL / "checkpoint_2" / "checkpoints"
    last.unlink()
    if kind == "empty":
        last.touch()
    plan = planned(own)
    assert {row.columns["parent_id"] for row in plan.rows if row.columns["run_id"].startswith(f"{SL}--")} == {
        f"{SL}@3"
    }
    assert not any(row.columns["is_final"] for row in plan.rows if row.columns["run_id"] == SL)
    assert any(f"{SL}@3 the first" in note for note in convert(plan, tmp_path / "zoo", progress=False).notes)


def test_folders_whose_names_look_alike_keep_their_own_children(own):
    parents, children = own / "vit_imagenet_pretrained", own / "vit_cifar100_finetuned"
    names = ["sl a", "sl-a", "sl+a--b", "sl+a", "_sl", "sl" + "x" * 200, "sl" + "x" * 201]
    for number, name in enumerate(names):
        shutil.copytree(parents / SL, parents / name)
        shutil.copytree(children / SL / LINEAR, children / name / f"b--c{number}")
        shutil.copytree(children / SL / LINEAR, children / name / "c")
    plan = planned(own)
    assert plan.refused == {}
    assert len(plan.rows) == len(by_id(plan)) == 21 + len(names) * (3 + 2 + 2)
    assert all(schema.MODEL_ID.fullmatch(model_id) and len(model_id) < 250 for model_id in by_id(plan))
    run_of = {
        row.source.split("/")[1]: row.columns["run_id"] for row in plan.rows if row.columns["stage"] == "pretrain"
    }
    for row in plan.rows:
        if row.columns["stage"] == "finetune":
            assert row.columns["parent_id"] == f"{run_of[row.source.split('/')[1]]}@3"
            assert row.split_group == run_of[row.source.split("/")[1]]


ODD_CONFIGS = [
    {"seed": 2**70},
    {"seed": float("inf"), "optim::lr": float("nan")},
    {"optim::lr": 10**400, "optim::wd": -(10**400)},
    {"optim::optimizer": "\ud800"},
    {"optim::optimizer": ["adamw"], "dataset::name": "\n", "model::o_dim": "ten"},
    {"a": json.loads("[" * 90 + "]" * 90)},
    {"training::mixup": "/home/somebody", "/home/somebody": 1, "x": "on 10.1.2.3", "trial": {"hostname": "somebody"}},
]


def test_odd_values_of_configs_become_null(own, tmp_path):
    files = sorted(own.glob("vit_*/*/config.json")) + sorted(own.glob("vit_*/*/*/config.json"))
    for file, changes in zip(files, ODD_CONFIGS, strict=False):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    plan = planned(own)
    done = convert(plan, tmp_path / "zoo", progress=False)
    assert (done.rows, done.refused) == (21, {})
    rows = {row.source.rpartition("/checkpoint_")[0]: row.columns for row in plan.rows}
    for file, changes in zip(files, ODD_CONFIGS, strict=False):
        row = rows[file.parent.relative_to(own).as_posix()]
        for key, column in (("optim::lr", "lr"), ("optim::wd", "weight_decay"), ("optim::optimizer", "optimizer")):
            assert (row[f"factor_{column}"] is None) == (key in changes)
        named = re.search(r"seed_(\d+)", file.parent.name)
        assert "seed" not in changes or row["factor_seed"] == int(named[1])  # the folder's name still tells it
    published = "".join(Zoo(tmp_path / "zoo").index["provenance"][:])
    assert not re.search(r"somebody|10\.1\.2\.3|NaN|Infinity", published)


def test_images_of_another_dataset_are_not_called_cifar(own):
    for file in own.glob("vit_cifar100_finetuned/*/*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset::name": "TinyImagenet"}))
    plan = planned(own)
    assert by_id(plan)[f"{SL}--{MLP}@1"].columns["dataset"] == "tinyimagenet"
    assert plan.images.keys() == {"imagenet-1k"}
    assert any(note.startswith("tinyimagenet is not among the images") for note in plan.notes)


def test_images_are_prepared_as_the_release_did(release):
    images = planned(release).images
    for name, interpolation in (("imagenet-1k", "bilinear"), ("cifar-100", "bicubic")):
        record = images[name]
        assert (record["resize"], record["crop"], record["size"]) == (256, 224, 224)
        assert (record["mean"], record["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        assert (record["interpolation"], bool(record["licence"])) == (interpolation, True)


@pytest.mark.parametrize(("key", "value"), [("model::o_dim", 7), ("model::head::mlp", True)])
def test_a_file_that_is_not_what_its_config_says_is_refused(own, key, value):
    file = own / "vit_cifar100_finetuned" / SL / LINEAR / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ZooError, match=f"{LINEAR}/checkpoint_00000/checkpoints has .*; its"):
        by_id(planned(own))[f"{SL}--{LINEAR}@1"].load()


def test_configs_that_name_another_parent_are_noted(own):
    for child, *_ in FINETUNED:
        file = own / "vit_cifar100_finetuned" / SL / child / "config.json"
        changes = {"pretraining::model::path": "/x/checkpoint_0001/checkpoints", "pretraining::seed": 5}
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    notes = planned(own).notes
    assert f"2 runs, {SL}--{LINEAR} the first: its config names checkpoint 1 of its parent, not the last." in notes
    assert any("another seed of pre-training than its parent's, 6312" in note for note in notes)


def test_a_frozen_trunk_does_not_tell_whether_checkpoint_0_is_untrained(own):
    for parent, *_ in PRETRAINED:
        for child, *_, mlp in FINETUNED:
            run = own / "vit_cifar100_finetuned" / parent / child
            for index in range(2):
                model = model_of(f"{child}{index}", 5, "mlp" if mlp else "linear")
                trunk = model_of(f"{parent}2", 10).state_dict()
                model.load_state_dict({name: trunk[name] for name in trunk if "head" not in name}, strict=False)
                shutil.rmtree(run / f"checkpoint_{index:05d}")
                write_checkpoint(run / f"checkpoint_{index:05d}", model)
    assert f"{SL}--{LINEAR}@2" in by_id(planned(own))
    assert f"{SL}--{LINEAR}@0" not in by_id(planned(own))


def test_configs_that_do_not_say_how_long_leave_a_note(own):
    for file in own.glob("vit_imagenet_pretrained/*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"training::epochs_train": None}))
    assert any("is not known for pretrain runs" in note for note in planned(own).notes)


def test_folders_that_cannot_be_listed_are_refused_and_the_rest_goes_on(release):
    with served(release) as (address, server):
        server.extra["vit_cifar100_finetuned"] = [{"name": "gone", "type": "directory"}]
        plan = plan_release(WebPlace(address), **OVERRIDE)
    assert len(plan.rows) == 21
    assert plan.refused == {
        "vit_cifar100_finetuned/gone": "vit_cifar100_finetuned/gone/ cannot be read: the server says 404"
    }


@pytest.mark.parametrize("kind", ["loop", "outside", "nowhere", "control", "bytes", "backslash"])
def test_odd_names_and_links_of_a_folder_are_refused(own, tmp_path, kind):
    top = own / "vit_imagenet_pretrained"
    names = {"control": "a\nb", "backslash": "a\\b"}
    if kind == "bytes":
        (top / os.fsdecode(b"\xff\xfe")).mkdir()
    elif kind in names:
        (top / names[kind]).mkdir()
    else:
        (top / kind).symlink_to({"loop": "loop", "outside": tmp_path, "nowhere": "none"}[kind])
    plan = planned(own)
    assert (len(plan.rows), len(plan.refused)) == (21, 1)
    (path,) = plan.refused
    assert path.isprintable()
    assert convert(plan, tmp_path / "zoo", progress=False).rows == 21


def test_a_folder_and_a_server_give_the_same_plan(own):
    spoil(own / "vit_imagenet_pretrained" / SL, "cyrillic")
    shutil.rmtree(own / "vit_imagenet_pretrained" / DDP)
    (own / "vit_imagenet_pretrained" / "a\nb").mkdir()
    (own / "vit_imagenet_pretrained" / CL / "config.json").write_text("{")
    folder = planned(own)
    with served(own) as (address, _):
        web = plan_release(WebPlace(address), **OVERRIDE)
    assert len(folder.refused) == 7
    for part in ("name", "factor_types", "images", "refused", "notes"):
        assert getattr(folder, part) == getattr(web, part), part
    for one, other in zip(folder.rows, web.rows, strict=True):
        assert (one.source, one.columns, one.split_group) == (other.source, other.columns, other.split_group)
        assert one.size == (own / one.source).stat().st_size


def test_a_file_replaced_between_two_parts_is_read_anew(release, monkeypatch):
    row = planned(release).rows[0]
    with served(release) as (address, server):
        server.faults[:] = [("cut", 1_000)]
        monkeypatch.setattr(server, "watch", staticmethod(lambda: setattr(server, "version", server.version + 1)))
        assert WebPlace(address).open(row.source).getvalue() == (release / row.source).read_bytes()
        assert server.faults == []


def test_a_server_that_turns_everything_away_is_gone(own):
    with served(own) as (address, server):
        plan = plan_release(WebPlace(address), **OVERRIDE)
        (own / plan.rows[0].source).unlink()
        with pytest.raises(ZooError, match="the server says 404") as caught:
            plan.rows[0].load()
        assert type(caught.value) is ZooError
        server.faults[:] = [("status", 403)] * 2
        with pytest.raises(SourceError, match="is not listed any more"):
            plan.rows[1].load()


def test_a_folder_that_was_unplugged_is_gone(own):
    plan = planned(own)
    shutil.rmtree(own)
    with pytest.raises(SourceError, match="is not there any more; the same command continues later"):
        plan.rows[0].load()


def test_a_file_without_end_is_not_read_to_its_end(release, monkeypatch):
    monkeypatch.setattr(places, "MAX_FILE_BYTES", 1_000)
    with served(release) as (address, _), pytest.raises(ZooError, match="has more than 1000 bytes"):
        WebPlace(address).open(planned(release).rows[0].source)


@pytest.mark.parametrize(
    "address",
    ["http://", "http://[::1", "ftp://x/y", "http://me:secret@x/y", "http://x/?a", "http://x:99999/", "http://é/"],
)
def test_addresses_that_are_none(address):
    with pytest.raises(ZooError, match=r"the address of a source is http") as caught:
        WebPlace(address)
    assert "secret" not in str(caught.value)


KILLED = """
import sys
from vitzoo_hf.publish import folder as zoo_folder
from vitzoo_hf.convert.convert import convert
from vitzoo_hf.convert.sources.places import WebPlace
from vitzoo_hf.convert.sources.release import plan_release

zoo_folder.SHARD_BYTES = 60_000
plan = plan_release(WebPlace(sys.argv[1]), architecture="vit_small_patch16_224", architecture_args={"num_heads": 2})
convert(plan, sys.argv[2], workers=1, progress=False)
"""


class Killer:
    """Kills a conversion when it asks for a checkpoint for the n-th time, a little later."""

    def __init__(self, script, generator):
        self.script, self.generator, self.left, self.process = script, generator, None, None

    def convert(self, address, folder, after):
        self.left = after
        self.process = subprocess.Popen([sys.executable, self.script, address, folder])
        return self.process.wait()

    def watch(self):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                threading.Timer(self.generator.uniform(0, 0.1), self.process.kill).start()
            time.sleep(0.03)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_zoo_is_the_same(release, tmp_path, monkeypatch, kills):
    script = tmp_path / "convert.py"
    script.write_text(KILLED)
    generator = random.Random(kills)
    killer = Killer(script, generator)
    monkeypatch.setattr(zoo_folder, "SHARD_BYTES", 60_000)
    with served(release) as (address, server):
        plan = plan_release(WebPlace(address), **OVERRIDE)
        convert(plan, tmp_path / "whole", progress=False)
        server.watch = staticmethod(killer.watch)
        codes = [killer.convert(address, tmp_path / "zoo", generator.randint(1, 6)) for _ in range(kills)]
        killer.left = None
        server.requests.clear()
        convert(plan, tmp_path / "zoo", progress=False)
        asked = len([path for path in server.requests if path.endswith("/checkpoints")])
    assert codes[:2] == [-signal.SIGKILL] * 2
    assert asked < len(plan.rows) or kills == 2
    held = [
        {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "whole", tmp_path / "zoo")
    ]
    assert held[0] == held[1]
