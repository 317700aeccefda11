"""Exports that the installed transformers loads, with equal logits; what it cannot compute is refused."""

import json

import pytest
import torch
from safetensors.torch import load, safe_open

from vitzoo_hf.convert import export
from vitzoo_hf.convert import transformers as transformers_folder
from vitzoo_hf.convert.convert import convert
from vitzoo_hf.convert.export import export_row, export_zoo
from vitzoo_hf.convert.names import to_timm
from vitzoo_hf.convert.sources.checkpoints import plan_checkpoints
from vitzoo_hf.convert.transformers import check_known_to_transformers
from vitzoo_hf.format.layout import Layout, flatten
from vitzoo_hf.format.schema import ZooError, canonical_json
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.vit import create
from vitzoo_hf.zoo import Zoo

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}


def row_of(**args):
    args = ARGS | args
    tensors = dict(create(NAME, args, seed=0).state_dict())
    row = {"model_id": "run@1", "architecture": NAME, "architecture_args": canonical_json(args), "head": "linear"}
    return row | {"weights": flatten(tensors), "layout": Layout.of(tensors).fingerprint}


def from_transformers(folder):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, report = transformers.ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def zoo(tiny_zoo):
    return Zoo(tiny_zoo).filter(head="linear")


def test_every_model_loads_with_equal_logits(zoo, tmp_path):
    folders = export_zoo(zoo, tmp_path / "out", format="transformers", progress=False)
    assert [folder.name for folder in folders] == zoo.model_ids
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == set(zoo.model_ids)
    for folder, model_id in zip(folders, zoo.model_ids, strict=True):
        ours, theirs = zoo.model(model_id), from_transformers(folder)
        size = theirs.config.image_size
        images = torch.randn(4, theirs.config.num_channels, size, size)
        with torch.no_grad():
            assert (ours(images) - theirs(images).logits).abs().max() <= 1e-5
        with safe_open(folder / "model.safetensors", framework="pt") as opened:
            assert opened.metadata()["model_id"] == model_id


def test_an_export_comes_back_bit_for_bit(zoo, tmp_path):
    export_zoo(zoo, tmp_path / "out", format="transformers", progress=False)
    back = convert(plan_checkpoints(tmp_path / "out"), tmp_path / "back", progress=False)
    assert back.refused == {}
    assert sorted(Zoo(back.folder).index["weights_sha256"]) == sorted(zoo.index["weights_sha256"])


@pytest.mark.parametrize(
    "args", [{"qkv_bias": False}, {"norm_layer": "layernorm"}, {"dynamic_img_size": True}, {"mlp_ratio": 3.0}]
)
def test_variants_that_transformers_has(tmp_path, args):
    row = row_of(**args)
    export_row(row, tmp_path / "model", format="transformers")
    model = create(NAME, ARGS | args, seed=0).eval()
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert (model(images) - from_transformers(tmp_path / "model")(images).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"act_layer": "relu"}, "the activation ReLU"),
        ({"act_layer": "gelu_tanh"}, "the activation GELUTanh"),
        ({"global_pool": "avg", "fc_norm": False}, "global_pool 'avg'"),
        ({"global_pool": "avg"}, "no norm.bias"),
        ({"no_embed_class": True}, "a class token without position"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "no cls_token"),
        ({"img_size": [8, 16]}, "an image that is not square"),
        ({"proj_bias": False}, "no blocks.0.attn.proj.bias"),
        ({"init_values": 1e-5}, "a tensor blocks.0.ls1.gamma"),
        ({"qk_norm": True}, "a tensor blocks.0.attn.k_norm.bias"),
    ],
)
def test_variants_that_transformers_would_get_wrong_are_refused(tmp_path, args, reason):
    with pytest.raises(ZooError, match=f"transformers' ViT cannot compute .* it has {reason}"):
        export_row(row_of(**args), tmp_path / "model", format="transformers")
    assert list(tmp_path.iterdir()) == []


def test_another_epsilon_is_written_down(tmp_path, monkeypatch):
    def with_another(*arguments):
        model = create(NAME, ARGS)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-3
        return model

    monkeypatch.setattr(Architecture, "skeleton", property(with_another))
    export_row(row_of(), tmp_path / "model", format="transformers")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["layer_norm_eps"] == 1e-3


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch16_18x2_224", "no blocks"),
        ("vit_base_patch16_xp_224", "no blocks"),
        ("deit_tiny_distilled_patch16_224", "the structure of VisionTransformerDistilled"),
        ("vit_medium_patch16_gap_240", "no cls_token"),
    ],
)
def test_architectures_that_transformers_has_not(name, reason):
    with pytest.raises(ZooError, match=f"transformers' ViT cannot compute {name} .* it has {reason}"):
        check_known_to_transformers(name, {"num_classes": 10, "depth": 1}, "linear")


def test_mlp_heads_are_refused_before_anything_is_written(tiny_zoo, tmp_path):
    every = Zoo(tiny_zoo)
    with pytest.raises(ZooError, match=r"\d+ of \d+ models have an MLP head.*--where head=linear"):
        export_zoo(every, tmp_path / "out", format="transformers", progress=False)
    row = next(every.filter(head="mlp").rows())
    with pytest.raises(ZooError, match="--where head=linear"):
        export_row(row, tmp_path / "out", format="transformers")
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_kept_and_what_was_damaged_is_made_again(zoo, tmp_path, monkeypatch):
    folders = export_zoo(zoo, tmp_path / "out", format="transformers", progress=False)
    weights = folders[0] / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load(whole)
    weights.write_bytes(whole[:-10])
    (folders[1] / "config.json").unlink()
    written = []
    real = export.export_row

    def noted(row, place, **options):
        written.append(row["model_id"])
        real(row, place, **options)

    monkeypatch.setattr(export, "export_row", noted)
    export_zoo(zoo, tmp_path / "out", format="transformers", progress=False)
    assert written == [folder.name for folder in folders[:2]]
    again = load(weights.read_bytes())
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert json.loads((folders[1] / "config.json").read_text())["model_type"] == "vit"


def test_what_is_no_export_is_not_replaced(zoo, tmp_path):
    first = tmp_path / "out" / zoo.model_ids[0]
    first.mkdir(parents=True)
    (first / "thesis.tex").write_text("mine")
    with pytest.raises(ZooError, match=r"exists and holds 'thesis\.tex'"):
        export_zoo(zoo, tmp_path / "out", format="transformers", progress=False)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [first.name]
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ZooError, match="exists and is no folder"):
        export_row(row_of(), file, format="transformers")


def test_a_failure_leaves_no_half_folder(tmp_path, monkeypatch):
    export_row(row_of(), tmp_path / "model", format="transformers")
    held = (tmp_path / "model" / "model.safetensors").read_bytes()

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers_folder, "save_file", full)
    for name in ("model", "other"):
        with pytest.raises(ZooError, match="No space left on device"):
            export_row(row_of(), tmp_path / name, format="transformers")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == held


def test_formats_and_names_are_checked(zoo, tmp_path):
    with pytest.raises(ZooError, match=r"unknown format 'transformer': did you mean 'transformers'\?"):
        export_zoo(zoo, tmp_path, format="transformer", progress=False)
    with pytest.raises(ZooError, match=r"leave \.safetensors out"):
        export_row(row_of(), tmp_path / "a.safetensors", format="transformers")
    with pytest.raises(ZooError, match=r"does not end in \.safetensors"):
        export_row(row_of(), tmp_path / "a")


def test_models_of_transformers_come_in_as_they_went_out(zoo, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    row = next(zoo.filter(head="linear").rows())
    export_row(row, tmp_path / "ours", format="transformers")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    loaded = to_timm(dict(model.state_dict()), name="x", config=config)
    vector = torch.cat([tensor.flatten() for tensor in loaded.tensors.values()])
    assert torch.equal(vector, torch.from_numpy(row["weights"]))


def test_a_model_of_transformers_with_its_own_epsilon_is_flagged_and_close():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    loaded = to_timm(dict(model.state_dict()), name="x", config=config.to_dict())
    assert loaded.flags == ["layer_norm_eps 1e-12 in the source, 1e-6 here"]
    again = create(loaded.architecture, loaded.architecture_args)
    again.load_state_dict(loaded.tensors)
    batch = torch.randn(4, 1, 16, 16)
    with torch.inference_mode():
        assert (again.eval()(batch) - model(batch).logits).abs().max() < 5e-3
