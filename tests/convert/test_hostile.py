"""Sources made by somebody who means harm, or is merely careless: refused by name, and the rest goes on."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from foreign_layouts import OVERRIDE, PRETRAINED, served, write_release
from safetensors.torch import save_file

from vitzoo_hf.convert.convert import convert
from vitzoo_hf.convert.names import to_timm, to_transformers
from vitzoo_hf.convert.pickles import read_state_dict
from vitzoo_hf.convert.sources import places
from vitzoo_hf.convert.sources.checkpoints import plan_checkpoints
from vitzoo_hf.convert.sources.places import FolderPlace, WebPlace
from vitzoo_hf.convert.sources.release import plan_release
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.vit import create
from vitzoo_hf.zoo import Zoo

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
STATE = dict(create(NAME, ARGS, seed=1).state_dict())
PRETRAINED_FOLDER, FINETUNED_FOLDER = "vit_imagenet_pretrained", "vit_cifar100_finetuned"
SL, DDP = PRETRAINED[0][0], PRETRAINED[1][0]


def taken(**changes):
    """What becomes of a checkpoint with these tensors instead of its own; None takes one away."""
    state = {name: tensor for name, tensor in (STATE | changes).items() if tensor is not None}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    held = read_state_dict(io.BytesIO(buffer.getvalue()), "x")
    return to_timm(held, name="x", architecture=NAME, architecture_args={"num_heads": 2})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "norm.bias",
            torch.zeros(1, dtype=torch.float16).expand(10**12),
            r"\d+ bytes that claim to be 2\d{12} bytes",
        ),
        ("norm.bias", torch.zeros(1).expand(10**12), r"\d+ bytes that claim to be 4\d{12} bytes of tensors"),
        ("head.bias", torch.zeros(1).expand(10**9), r"\d+ bytes that claim to be 4\d{9} bytes of tensors"),
        ("norm.bias", torch.zeros(16).to_sparse(), "norm.bias is no plain tensor: save it dense"),
        ("norm.bias", torch.zeros(16, device="meta"), "norm.bias is no plain tensor"),
        ("blocks.20000000.norm1.weight", torch.zeros(16), "its blocks are not numbered from 0"),
        ("pos_embed", torch.zeros(1, 0, 16), "it has no patches"),
        ("patch_embed.proj.weight", torch.zeros(0, 1, 8, 8), "it has no patches"),
        ("patch_embed.proj.weight", torch.zeros(16, 1, 0, 0), "it has no patches"),
    ],
)
def test_tensors_that_are_not_what_they_say(name, tensor, message):
    with pytest.raises(ZooError, match=f"x.*{message}"):
        taken(**{name: tensor})


def test_an_mlp_head_without_a_matrix_is_no_head():
    wrong = {
        "head.weight": None,
        "head.bias": None,
        "head.0.weight": torch.tensor(1.0),
        "head.2.weight": torch.eye(2),
    }
    with pytest.raises(ZooError, match="x has no head"):
        taken(**wrong)


def test_many_names_of_one_small_tensor_do_not_fill_the_memory():
    one = torch.zeros(10_000_000)
    with pytest.raises(ZooError, match="bytes that claim to be"):
        taken(**{f"extra{number}": one for number in range(100)})


HF_CONFIG, HF_STATE = to_transformers(STATE, architecture=NAME, architecture_args=ARGS, head="linear")
QUERY = "vit.encoder.layer.1.attention.attention.query.weight"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 10**7}, "x has depth 2; 10000000 is what its config or table says"),
        ({"hidden_size": 32}, "x has embed_dim 16; 32 is what its config or table says"),
        ({"num_attention_heads": -2}, "num_heads -2; expected a whole number above 0"),
        ({"num_attention_heads": "2"}, "num_heads '2'; expected a whole number above 0"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps '1e-6'; expected a number"),
        ({"layer_norm_eps": None}, "layer_norm_eps None; expected a number"),
        ({"intermediate_size": 10**400}, "its sizes are no numbers"),
        ({"architecture": NAME, "model_args": [1]}, "has model_args that are no object"),
        ({"architecture": NAME, "model_args": {"num_heads": 2, "norm_layer": 5}}, "timm cannot build"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, message):
    with pytest.raises(ZooError, match=message):
        to_timm(HF_STATE, name="x", config=HF_CONFIG | config)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "cache_dir", "pretrained"])
def test_a_config_cannot_have_timm_read_files(argument, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file({name: tensor + 1 for name, tensor in STATE.items()}, weights)
    config = {"architecture": NAME, "model_args": {"num_heads": 2, argument: str(weights)}}
    with pytest.raises(ZooError, match=f"'{argument}' is no argument of a row's architecture"):
        to_timm(STATE, name="x", config=config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({QUERY: torch.zeros(3, 3)}, r"query, key and value \(weight\) of block 1 differ in shape"),
        ({QUERY: HF_STATE[QUERY].half()}, r"query, key and value \(weight\) of block 1 differ in type"),
        ({"vit.layers.1.attention.q_proj.weight": torch.ones(16, 16)}, "under another name too: keep one of the two"),
        ({QUERY.replace("1", "١"): torch.ones(16, 16)}, "that no ViT of transformers has"),
    ],
)
def test_no_tensor_of_transformers_is_lost_or_replaced(changes, message):
    with pytest.raises(ZooError, match=message):
        to_timm(HF_STATE | changes, name="x", config=HF_CONFIG)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def own(release, tmp_path):
    return Path(shutil.copytree(release, tmp_path / "release"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(places, "FIRST_WAIT", 0.01)


def planned(root):
    return plan_release(FolderPlace(root), **OVERRIDE)


def reconfigured(root, **changes):
    file = root / PRETRAINED_FOLDER / SL / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def first_of(plan):
    return next(row.columns for row in plan.rows if row.columns["run_id"] == SL)


@pytest.mark.parametrize("name", ["loop", "checkpoint_7"])
def test_a_link_to_itself_is_refused(own, name):
    (own / PRETRAINED_FOLDER / SL / name).symlink_to(name)
    plan = planned(own)
    assert list(plan.refused) == [f"{PRETRAINED_FOLDER}/{SL}/{name}"]
    assert len(plan.rows) == 21


@pytest.mark.parametrize("seed", [float("inf"), float("nan"), 10**30, -(10**30), [1], "x"])
def test_numbers_that_do_not_fit_a_column_are_null(own, tmp_path, seed):
    reconfigured(own, seed=seed, **{"optim::lr": seed})
    convert(planned(own), tmp_path / "zoo", progress=False)
    row = Zoo(tmp_path / "zoo").row(f"{SL}@1")
    assert row["factor_lr"] is None or abs(row["factor_lr"]) == 1e30
    assert row["factor_seed"] == 6312, "the folder's name tells it too"
    json.loads(row["provenance"], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_results_that_do_not_fit_a_column_are_null(own):
    told = [{"train_loss": 1e300, "test_loss": True, "train_acc": 10**300, "test_acc": "inf"}]
    (own / PRETRAINED_FOLDER / SL / "result.json").write_text(json.dumps(told))
    columns = first_of(planned(own))
    assert [columns[name] for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy")] == [None] * 4


def test_paths_do_not_get_out_as_keys_factors_or_declarations(own):
    secret = "/home/somebody/secret"
    reconfigured(own, **{secret: 1, "optim::optimizer": secret, "training::mixup": secret, "a": [{"b": secret}]})
    assert "secret" not in json.dumps([row.columns for row in planned(own).rows])


ENDLESS = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


def test_a_config_without_end_refuses_its_run_alone(own):
    (own / PRETRAINED_FOLDER / SL / "config.json").write_text(ENDLESS)
    plan = planned(own)
    assert f"{PRETRAINED_FOLDER}/{SL}" in plan.refused
    assert len(plan.rows) == 14


def test_results_without_end_leave_the_weights_and_a_note(own):
    (own / PRETRAINED_FOLDER / SL / "result.json").write_text(ENDLESS)
    plan = planned(own)
    assert any(SL in note and "result.json cannot be read" in note for note in plan.notes)
    assert first_of(plan)["test_accuracy"] is None
    assert len(plan.rows) == 21


def test_deep_configs_are_cut(own):
    text = '{"model::type": "vit_s_16", "seed": 5, "a": ' + "[" * 600 + "]" * 600 + "}"
    (own / PRETRAINED_FOLDER / SL / "config.json").write_text(text)
    assert first_of(planned(own))["factor_seed"] == 5


@pytest.mark.parametrize("name", ["\ud800x", "sl\u202ex", "sl\u2028x", "sl\x85x"])
def test_names_that_cannot_be_shown_are_refused(release, name):
    with served(release) as (address, server):
        server.extra[PRETRAINED_FOLDER] = [{"name": name, "type": "directory"}]
        plan = plan_release(WebPlace(address), **OVERRIDE)
    assert list(plan.refused.values()) == ["it is no plain name"]
    assert len(plan.rows) == 21
    json.dumps(plan.refused, ensure_ascii=False).encode()


@pytest.mark.parametrize("top", [PRETRAINED_FOLDER, FINETUNED_FOLDER])
def test_a_folder_that_is_listed_but_not_there_is_refused(release, top):
    with served(release) as (address, server):
        server.extra[top] = [{"name": "ghost", "type": "directory"}]
        plan = plan_release(WebPlace(address), **OVERRIDE)
    assert plan.refused.keys() == {f"{top}/ghost"}
    assert len(plan.rows) == 21


@pytest.mark.parametrize("length", ["abc", "-5", ""])
def test_a_length_that_is_no_number_is_not_believed(release, length):
    row = planned(release).rows[0]
    with served(release) as (address, server):
        server.protocol_version = "HTTP/1.0"
        told = server.send_header
        server.send_header = lambda self, key, value: told(self, key, length if key == "Content-Length" else value)
        assert WebPlace(address).open(row.source).getvalue() == (release / row.source).read_bytes()


def test_a_listing_without_end_is_no_listing(monkeypatch):
    monkeypatch.setattr(WebPlace, "_fetch", lambda self, path, limit: bytearray(b"[" * 100_000))
    with pytest.raises(ZooError, match="is no listing"):
        WebPlace("http://127.0.0.1:9").listing()


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path):
    old, new = b"a" * 300_000, b"b" * 300_000
    (tmp_path / "x").write_bytes(old)
    with served(tmp_path) as (address, server):
        get = server.do_GET

        def versioned(self):
            data = (tmp_path / "x").read_bytes()
            tag = f'"{data[:1].decode()}"'
            if self.headers.get("If-Range") not in (None, tag):
                del self.headers["Range"]
            say = self.end_headers
            self.end_headers = lambda: (self.send_header("ETag", tag), say())
            get(self)
            (tmp_path / "x").write_bytes(new)

        server.do_GET = versioned
        server.faults[:] = [("cut", 100_000)]
        assert WebPlace(address).open("x").getvalue() == new


@pytest.mark.parametrize("good", [True, False])
def test_a_file_whose_name_is_no_text_is_refused(tmp_path, good):
    folder = tmp_path / "models"
    folder.mkdir()
    torch.save(STATE, folder / "fine.pt")
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/odd\xff.pt"))
    shutil.copy(folder / "fine.pt", odd)
    if not good:
        odd.write_bytes(b"junk")
    plan = plan_checkpoints(folder, architecture=NAME, architecture_args={"num_heads": 2})
    done = convert(plan, tmp_path / "zoo", progress=False)
    assert done.rows == 1
    assert list(done.refused.values()) == [places.NOT_SHOWN]
    assert Zoo(tmp_path / "zoo").manifest["refused"] == done.refused
