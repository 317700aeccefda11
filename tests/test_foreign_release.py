import json
import shutil
import subprocess
import sys

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

from vitzoo_hf import schema
from vitzoo_hf.convert import convert
from vitzoo_hf.foreign import places
from vitzoo_hf.foreign.places import FolderPlace, WebPlace, unsafe
from vitzoo_hf.foreign.plan import SourceError
from vitzoo_hf.foreign.release import is_release, plan_release
from vitzoo_hf.foreign.release_runs import parse_results, public
from vitzoo_hf.schema import ZooError
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
    from vitzoo_hf.vit import create

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


@pytest.mark.parametrize("kind", ["no config", "broken config", "huge config", "broken results", "unknown type"])
def test_a_run_that_cannot_be_taken_is_refused_with_its_children(own, kind):
    run = own / "vit_imagenet_pretrained" / SL
    options = {}
    if kind == "no config":
        (run / "config.json").unlink()
    elif kind == "broken config":
        (run / "config.json").write_text("{")
    elif kind == "huge config":
        (run / "config.json").write_text(json.dumps({"a": "x" * 2_000_000}))
    elif kind == "broken results":
        (run / "result.json").write_text("{}\n{")
    else:
        (run / "config.json").write_text('{"model::type": "resnet"}')
        options = {"architecture": None}
    plan = planned(own, **options)
    refused = [path for path in plan.refused if SL in path.split("/")]
    assert f"vit_imagenet_pretrained/{SL}" in refused
    assert {f"vit_cifar100_finetuned/{SL}/{child}" for child, *_ in FINETUNED} <= set(refused)
    assert len(plan.rows) == 14


def test_accuracies_outside_zero_to_one_are_left_out(own):
    run = own / "vit_imagenet_pretrained" / SL
    (run / "result.json").write_text(json.dumps([{"train_acc": 51.0, "test_acc": 0.4, "test_loss": float("nan")}]))
    plan = planned(own)
    first = by_id(plan)[f"{SL}@1"].columns
    assert (first["train_accuracy"], first["test_accuracy"], first["test_loss"]) == (None, 0.4, None)
    assert f"{SL} records accuracies outside 0 to 1, which are left out." in plan.notes


def test_an_unfinished_run_is_noted(own):
    shutil.rmtree(own / "vit_imagenet_pretrained" / DDP / "checkpoint_0002")
    plan = planned(own)
    assert f"{DDP} ends after 2 epochs; its config says 3." in plan.notes
    assert by_id(plan)[f"{DDP}--{LINEAR}@2"].columns["parent_id"] == f"{DDP}@2"


@pytest.mark.parametrize(
    ("text", "epochs"),
    [
        (b'{"training_iteration": 5}', [5]),
        (b"[{}, {}]", [1, 2]),
        (b'{}\n\n{"training_iteration": 9}\n', [1, 9]),
        (b"{}", [1]),
    ],
)
def test_results_in_every_form(text, epochs):
    assert list(parse_results(text, "x")) == epochs


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from vitzoo_hf import zoo_folder
from vitzoo_hf.convert import convert
from vitzoo_hf.foreign.places import WebPlace
from vitzoo_hf.foreign.release import plan_release

address, out, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
zoo_folder.SHARD_BYTES = 60_000
if seconds:
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
plan = plan_release(WebPlace(address), architecture="vit_small_patch16_224", architecture_args={"num_heads": 2})
if seconds:
    from dataclasses import replace
    import time
    def slow(load):
        def wait():
            time.sleep(0.03)
            return load()
        return wait
    plan = replace(plan, rows=[replace(row, load=slow(row.load)) for row in plan.rows])
convert(plan, out, workers=1, progress=False)
"""


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_zoo_is_the_same(release, tmp_path):
    import random

    script = tmp_path / "convert.py"
    script.write_text(KILLED)
    with served(release) as (address, _):
        whole = subprocess.run([sys.executable, script, address, tmp_path / "whole", "0"], check=True)
        generator = random.Random(0)
        codes = []
        for _ in range(10):
            seconds = f"{generator.uniform(2.5, 4.5):.2f}"
            codes.append(
                subprocess.run([sys.executable, script, address, tmp_path / "zoo", seconds], check=False).returncode
            )
        subprocess.run([sys.executable, script, address, tmp_path / "zoo", "0"], check=True)
    assert whole.returncode == 0
    assert codes.count(-9) >= 3
    held = [
        {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "whole", tmp_path / "zoo")
    ]
    assert held[0] == held[1]
