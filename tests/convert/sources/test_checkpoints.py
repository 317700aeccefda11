"""Files and model folders of other people, through the conversion to a zoo whose models give equal logits."""

import csv
import functools
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from vitzoo_hf.convert.convert import convert
from vitzoo_hf.convert.rows import SourceError
from vitzoo_hf.convert.sources.checkpoints import plan_checkpoints
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.vit import create
from vitzoo_hf.zoo import Zoo

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 10}
GIVEN = {"architecture": NAME, "architecture_args": {"num_heads": 2}}
HF = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1}
HF |= {"num_attention_heads": 2, "intermediate_size": 64, "layer_norm_eps": 1e-6, "num_labels": 10}


@functools.cache
def model_of(seed, hidden=None):
    return create(NAME, ARGS, head="mlp" if hidden else "linear", head_hidden=hidden, seed=seed).eval()


@functools.cache
def images():
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def state(seed, dtype=torch.float32):
    return {name: tensor.to(dtype).clone() for name, tensor in model_of(seed).state_dict().items()}


def save(file, seed=0, dtype=torch.float32):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(state(seed, dtype), file)
    else:
        torch.save(state(seed, dtype), file)
    return file


def table(folder, lines, name="factors.csv"):
    header = list(dict.fromkeys(column for line in lines for column in line))
    with (folder / name).open("w", newline="") as opened:
        writer = csv.DictWriter(opened, header)
        writer.writeheader()
        writer.writerows(lines)
    return folder / name


def converted(source, tmp_path, **options):
    options = GIVEN | options
    done = convert(plan_checkpoints(source, **options), tmp_path / "zoo", progress=False)
    return Zoo(done.folder), done.refused


def refusals(source, **options):
    return plan_checkpoints(source, **(GIVEN | options)).refused


def logits(zoo, model_id):
    with torch.no_grad():
        return zoo.model(model_id)(images())


def expected(seed, dtype=torch.float32):
    model = create(NAME, ARGS).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state(seed, dtype).items()})
    with torch.no_grad():
        return model(images())


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth", "a.bin", "a.ckpt", "checkpoints"])
def test_one_file(tmp_path, name):
    zoo, refused = converted(save(tmp_path / name), tmp_path)
    assert refused == {}
    assert zoo.model_ids == [f"{name.partition('.')[0]}@1"]
    assert torch.equal(logits(zoo, zoo.model_ids[0]), expected(0))
    assert zoo.index[0]["dataset"] == "unknown"
    assert zoo.index[0]["is_final"]
    provenance = json.loads(zoo.index[0]["provenance"])
    assert provenance["source"] == name
    assert provenance["given"] == GIVEN
    assert str(tmp_path) not in json.dumps(provenance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["half.safetensors", "half.pt"])
def test_half_precision_files_are_widened_exactly(tmp_path, name, dtype):
    zoo, _ = converted(save(tmp_path / name, dtype=dtype), tmp_path)
    assert torch.equal(logits(zoo, "half@1"), expected(0, dtype))
    assert "widened to float32" in json.loads(zoo.index[0]["provenance"])["flags"][0]


def test_a_folder_without_a_table_tells_run_and_epoch_by_its_paths(tmp_path):
    names = ["run a/epoch_1.pt", "run a/epoch_10.pt", "run a/epoch_2.pt", "b/checkpoint_000007/checkpoints"]
    names += ["c.safetensors", "c.pt", "x/y/epoch-3.bin", "d_epoch4.pth"]
    for seed, name in enumerate(names):
        save(tmp_path / "in" / name, seed)
    (tmp_path / "in" / "README.md").write_text("text")
    (tmp_path / "in" / ".hidden.pt").write_bytes(b"x")
    save(tmp_path / "in" / ".git" / "a.pt")
    zoo, refused = converted(tmp_path / "in", tmp_path)
    assert refused == {}
    rows = {json.loads(row["provenance"])["source"]: row for row in zoo.index}
    ids = {name: rows[name]["model_id"] for name in names}
    assert ids["run a/epoch_10.pt"] == "run-a@10"
    assert ids["b/checkpoint_000007/checkpoints"] == "b@7"
    assert (ids["x/y/epoch-3.bin"], ids["d_epoch4.pth"]) == ("x-y@3", "d@4")
    assert len({ids["c.safetensors"], ids["c.pt"]}) == 2
    assert [name for name in names if rows[name]["is_final"]] == [*names[1:2], *names[3:]]
    assert [row["epoch"] for row in zoo.index if row["run_id"] == "run-a"] == [1, 2, 10]
    for seed, name in enumerate(names):
        assert torch.equal(logits(zoo, ids[name]), expected(seed))


def test_a_table_gives_ids_factors_and_lineage(tmp_path):
    lines = [
        {"file": "ft.pt", "model_id": "ft@5", "parent_id": "pre@9", "lr": "0.1", "Weight Decay": "1", "aug": "true"},
        {"file": "./pre.pt", "model_id": "pre@9", "lr": "1e-3", "Weight Decay": "2", "aug": "", "dataset": "mnist"},
        {"file": "deep/a.safetensors", "run_id": "x", "epoch": "3", "lr": "", "Weight Decay": "", "aug": "False"},
    ]
    lines[0] |= {"test_accuracy": "0.5", "opt": "adam", "long": "1" * 5000}
    lines[2] |= {"stage": "finetune", "is_final": "false", "opt": "007"}
    for seed, line in enumerate(lines):
        save(tmp_path / "in" / line["file"], seed)
    table(tmp_path / "in", lines)
    plan = plan_checkpoints(tmp_path / "in", **GIVEN, name="mine")
    assert plan.name == "mine"
    assert plan.factor_types == {
        "lr": "float",
        "weight_decay": "int",
        "aug": "bool",
        "opt": "string",
        "long": "string",
    }
    assert [row.columns["model_id"] for row in plan.rows] == ["pre@9", "x@3", "ft@5"]
    assert [row.split_group for row in plan.rows] == ["pre", "x", "pre"]
    zoo, refused = converted(tmp_path / "in", tmp_path)
    assert refused == {}
    row = zoo.filter(model_id=["ft@5"]).index[0]
    assert (row["parent_id"], row["stage"], row["is_final"]) == ("pre@9", 1, True)
    assert (row["factor_lr"], row["factor_weight_decay"], row["factor_aug"], row["factor_opt"]) == (
        0.1,
        1,
        True,
        "adam",
    )
    assert (row["test_accuracy"], row["factor_long"]) == (0.5, "1" * 5000)
    other = zoo.filter(model_id=["x@3"]).index[0]
    assert (other["factor_lr"], other["factor_aug"], other["stage"], other["is_final"]) == (None, False, 1, False)
    assert zoo.filter(model_id=["pre@9"]).index[0]["dataset"] == "mnist"
    assert torch.equal(logits(zoo, "ft@5"), expected(0))


def test_mistakes_in_lines_refuse_their_files_and_the_rest_goes_on(tmp_path):
    folder = tmp_path / "in"
    names = ["good", "child", "twice", "id1", "id2", "number", "stage", "orphan", "ring1", "ring2", "mixed", "extra"]
    for name in names:
        save(folder / f"{name}.pt")
    save(folder / "unlisted.pt")
    lines = [
        {"file": "good.pt", "model_id": "good@1", "epoch": "1"},
        {"file": "child.pt", "model_id": "child@1", "parent_id": "gone@1"},
        {"file": "gone.pt", "model_id": "gone@1"},
        {"file": "twice.pt", "model_id": "t@1"},
        {"file": "twice.pt", "model_id": "t@2"},
        {"file": "id1.pt", "model_id": "same@1"},
        {"file": "id2.pt", "model_id": "same@1"},
        {"file": "number.pt", "model_id": "number@1", "test_loss": "nan"},
        {"file": "stage.pt", "model_id": "stage@1", "stage": "fine-tune"},
        {"file": "orphan.pt", "model_id": "orphan@1", "parent_id": "nobody@1"},
        {"file": "ring1.pt", "model_id": "ring1@1", "parent_id": "ring2@1"},
        {"file": "ring2.pt", "model_id": "ring2@1", "parent_id": "ring1@1"},
        {"file": "../../etc/passwd", "model_id": "evil@1"},
        {"file": "/etc/passwd", "model_id": "evil@2"},
        {"file": "mixed.pt", "model_id": "mixed@1", "epoch": "2"},
        {"file": "extra.pt", "model_id": "../up@1"},
    ]
    table(folder, lines)
    refused = refusals(folder)
    for path, reason in {
        "gone.pt": "factors.csv line 4: there is no file 'gone.pt' in in",
        "twice.pt": "factors.csv lists it more than once, in lines 5, 6: keep one",
        "id1.pt": "factors.csv line 7: 'same@1' is also in line 8: tell them apart by run_id or epoch",
        "id2.pt": "factors.csv line 8: 'same@1' is also in line 7: tell them apart by run_id or epoch",
        "number.pt": "factors.csv line 9: test_loss is 'nan'; expected a finite number, or an empty cell",
        "stage.pt": "factors.csv line 10: stage is 'fine-tune': did you mean 'finetune'?",
        "orphan.pt": "factors.csv line 11: parent_id 'nobody@1' is no model of the table",
        "ring1.pt": "factors.csv line 12: the parents of 'ring1@1' go in a circle",
        "ring2.pt": "factors.csv line 13: the parents of 'ring2@1' go in a circle",
        "../../etc/passwd": "factors.csv line 14: '../../etc/passwd' leaves the folder; paths are relative to it",
        "/etc/passwd": "factors.csv line 15: '/etc/passwd' leaves the folder; paths are relative to it",
        "mixed.pt": "factors.csv line 16: model_id is 'mixed@1'; run and epoch make 'mixed@2'",
        "extra.pt": "factors.csv line 17: model_id is '../up@1'; expected RUN@EPOCH, such as run1@20",
        "unlisted.pt": "it is not in factors.csv",
    }.items():
        assert refused.pop(path) == reason
    assert refused == {}
    zoo, _ = converted(folder, tmp_path)
    assert sorted(zoo.model_ids) == ["child@1", "good@1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,lr\na.pt,1\n", "factors.csv has no column 'file'"),
        ("file;lr\na.pt;1\n", "separate its columns by commas"),
        ("", "has no column 'file'"),
        ("file,lr,lr\na.pt,1,2\n", "has the column 'lr' more than once"),
        ("file,lr,LR\na.pt,1,2\n", "two columns for the factor 'lr'"),
        ("file,größe\na.pt,1\n", "'größe' cannot name a factor"),
        ("file,lr\na.pt,\n", "column 'lr' of factors.csv is empty, so its type is unknown"),
        ("file,lr\n,1\n", "factors.csv line 2 has no file"),
        ('file,lr\n"a.pt,1\n', "cannot be read as CSV"),
    ],
)
def test_mistakes_in_the_header_are_one_line(tmp_path, text, message):
    save(tmp_path / "a.pt")
    (tmp_path / "factors.csv").write_text(text)
    with pytest.raises(ZooError, match=message) as raised:
        plan_checkpoints(tmp_path, **GIVEN)
    assert "\n" not in str(raised.value)


def test_a_line_with_too_few_cells_is_named(tmp_path):
    save(tmp_path / "a.pt")
    save(tmp_path / "b.pt")
    (tmp_path / "factors.csv").write_text("file,lr\n\na.pt\nb.pt,1\n")
    assert refusals(tmp_path) == {"a.pt": "factors.csv line 3 has 1 cells; its header has 2"}


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_hostile_and_damaged_files_are_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    save(folder / "good.pt", 3)
    (folder / "empty.pt").touch()
    cut = save(folder / "cut.safetensors")
    cut.write_bytes(cut.read_bytes()[:-100])
    (folder / "code.pt").write_bytes(pickle.dumps({"a": Bomb()}, protocol=2))
    torch.save({name: tensor[..., :1] for name, tensor in state(0).items()}, folder / "shapes.pt")
    torch.save({name: tensor for name, tensor in state(0).items() if name != "norm.bias"}, folder / "keys.pt")
    nan = state(0)
    nan["cls_token"] *= float("nan")
    save_file(nan, folder / "nan.safetensors")
    outside = save(tmp_path / "outside" / "secret.pt").parent
    (folder / "link.pt").symlink_to(outside / "secret.pt")
    (folder / "linked").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    save(folder / "config-away" / "a.pt")
    (outside / "config.json").write_text("{}")
    (folder / "config-away" / "config.json").symlink_to(outside / "config.json")
    save(folder / "1" / "2" / "3" / "4" / "deep.pt")
    zoo, refused = converted(folder, tmp_path)
    for path, reason in {
        "empty.pt": "is empty",
        "cut.safetensors": "damaged",
        "code.pt": "only checkpoints of plain tensors",
        "shapes.pt": "",
        "keys.pt": "norm.bias",
        "nan.safetensors": "16 weights that are not finite",
        "link.pt": "a link that leaves the folder",
        "linked": "a link that leaves the folder",
        "loop": "a link to a folder",
        "config-away/config.json": "a link that leaves the folder",
        "config-away/a.pt": "its config.json is a link",
        "1/2/3": "below 3 levels",
    }.items():
        assert reason in refused.pop(path)
    assert refused == {}
    assert zoo.model_ids == ["good@1"]
    assert torch.equal(logits(zoo, "good@1"), expected(3))
    assert not (tmp_path / "exploded").exists()


def test_the_table_may_be_elsewhere_and_name_the_head(tmp_path):
    hidden = {name: tensor.clone() for name, tensor in model_of(1, 12).state_dict().items()}
    (tmp_path / "in").mkdir()
    save_file(hidden, tmp_path / "in" / "mlp.safetensors")
    save(tmp_path / "in" / "linear.pt")
    lines = [{"file": "mlp.safetensors", "head_hidden": "12", "lr": "1"}, {"file": "linear.pt", "head": "mlp"}]
    place = table(tmp_path, lines, "mine.csv")
    zoo, refused = converted(tmp_path / "in", tmp_path, table=place)
    assert refused == {"linear.pt": "has head 'linear', mine.csv line 3 says 'mlp': correct the table"}
    with torch.no_grad():
        assert torch.equal(logits(zoo, "mlp@1"), model_of(1, 12)(images()))


@pytest.mark.parametrize("sharded", [False, True])
def test_model_folders_of_transformers(tmp_path, sharded):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**HF)).eval()
    for number in range(2):
        folder = tmp_path / "in" / f"checkpoint-{number}"
        model.save_pretrained(folder, **({"max_shard_size": "8KB"} if sharded else {}))
        torch.save({"step": 1}, folder / "optimizer.pt")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    zoo, refused = converted(tmp_path / "in", tmp_path, architecture=None, architecture_args=None)
    assert refused == {}
    assert zoo.model_ids == ["in@0", "in@1"]
    with torch.no_grad():
        assert (logits(zoo, "in@1") - model(images()).logits).abs().max() <= 1e-5
    one = convert(plan_checkpoints(folder), tmp_path / "one", progress=False)
    assert [row["run_id"] for row in Zoo(one.folder).index] == ["checkpoint-1"]


def sharded_folder(folder):
    folder.mkdir(parents=True)
    config = {"architecture": NAME, "model_args": ARGS}
    (folder / "config.json").write_text(json.dumps(config))
    held = state(0)
    names = list(held)
    parts = {"model-1-of-2.safetensors": names[:5], "model-2-of-2.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: held[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_model_in_several_files_is_whole_or_refused(tmp_path):
    folder = tmp_path / "in"
    sharded_folder(folder / "good")
    for name in ("missing", "cut", "stray", "traversal", "broken"):
        index = sharded_folder(folder / name)
        if name == "missing":
            (folder / name / "model-2-of-2.safetensors").unlink()
        elif name == "cut":
            (folder / name / "model-2-of-2.safetensors").write_bytes(b"")
        elif name == "stray":
            index["weight_map"].popitem()
        elif name == "traversal":
            index["weight_map"]["cls_token"] = "../good/model-1-of-2.safetensors"
        (folder / name / "model.safetensors.index.json").write_text("{" if name == "broken" else json.dumps(index))
    table(folder, [{"file": name, "lr": "1"} for name in ("good", "missing", "cut", "stray", "traversal", "broken")])
    zoo, refused = converted(folder, tmp_path, architecture=None, architecture_args=None)
    for name, reason in {
        "missing": "lacks model-2-of-2.safetensors",
        "cut": "model-2-of-2.safetensors of cut is empty",
        "stray": "does not have the tensors that model.safetensors.index.json says: head.bias differs",
        "traversal": "names '../good/model-1-of-2.safetensors', which is no checkpoint file beside it",
        "broken": "model.safetensors.index.json of broken cannot be read",
    }.items():
        assert reason in refused[name]
    assert zoo.model_ids == ["good@1"]
    assert torch.equal(logits(zoo, "good@1"), expected(0))


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000])
def test_a_damaged_config_is_named(tmp_path, text):
    save(tmp_path / "in" / "bad" / "model.safetensors")
    (tmp_path / "in" / "bad" / "config.json").write_bytes(text.encode("latin-1"))
    save(tmp_path / "in" / "good.pt")
    zoo, refused = converted(tmp_path / "in", tmp_path)
    assert "config.json of bad" in refused["bad"]
    assert zoo.model_ids == ["good@1"]


def test_a_zoo_survives_files_of_other_architectures_with_names_of_their_own(tmp_path):
    names = json.dumps(ARGS)
    save(tmp_path / "in" / "a.pt")
    line = {"file": "a.pt", "architecture": NAME, "architecture_args": names, "lr": "1"}
    table(tmp_path / "in", [line])
    zoo, refused = converted(tmp_path / "in", tmp_path, architecture=None, architecture_args=None)
    assert refused == {}
    assert torch.equal(logits(zoo, "a@1"), expected(0))


def test_other_options_are_another_conversion(tmp_path):
    save(tmp_path / "in" / "a.pt")
    converted(tmp_path / "in", tmp_path)
    other = {"architecture_args": {"num_heads": 4}}
    with pytest.raises(ZooError, match="holds a zoo that is not of this source and these options"):
        converted(tmp_path / "in", tmp_path, **other)
    assert json.loads(Zoo(tmp_path / "zoo").index[0]["architecture_args"])["num_heads"] != 4
    plan = plan_checkpoints(tmp_path / "in", architecture=NAME, **other)
    convert(plan, tmp_path / "zoo", replace=True, progress=False)
    zoo = Zoo(tmp_path / "zoo")
    assert json.loads(zoo.index[0]["architecture_args"])["num_heads"] == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "is neither a file nor a folder"),
        ("text.txt", "is no checkpoint by its name"),
        ("empty", "has no checkpoint"),
    ],
)
def test_no_source_is_one_line(tmp_path, name, message):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match=message):
        plan_checkpoints(tmp_path / name)


def test_a_disk_that_goes_away_refuses_nothing(tmp_path):
    save(tmp_path / "in" / "a.pt")
    plan = plan_checkpoints(tmp_path / "in", **GIVEN)
    (tmp_path / "in").rename(tmp_path / "away")
    with pytest.raises(SourceError, match="is gone"):
        convert(plan, tmp_path / "zoo", progress=False)
    (tmp_path / "away").rename(tmp_path / "in")
    assert convert(plan, tmp_path / "zoo", progress=False).rows == 1
