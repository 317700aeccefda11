"""Folders for transformers, loaded by the real library."""

import json

import pytest
import torch

from vitzoo_hf.export import export_row, export_zoo
from vitzoo_hf.foreign.names import to_timm
from vitzoo_hf.schema import ZooError
from vitzoo_hf.zoo import Zoo

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def zoo():
    return Zoo.sample()


def test_every_linear_model_loads_with_equal_logits(zoo, tmp_path):
    linear = zoo.filter(head="linear")
    folders = export_zoo(linear, tmp_path, format="transformers", progress=False)
    assert len(folders) == len(linear) == 5
    batch = torch.randn(8, 1, 16, 16)
    for folder in folders:
        model, told = transformers.ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        with torch.inference_mode():
            difference = (model.eval()(batch).logits - zoo.model(folder.name)(batch)).abs().max()
        assert difference < 1e-5


def test_what_is_there_is_kept_and_what_was_cut_is_written_again(zoo, tmp_path):
    linear = zoo.filter(head="linear", stage="finetune")
    folders = export_zoo(linear, tmp_path, format="transformers", progress=False)
    before = {folder: (folder / "model.safetensors").stat().st_mtime_ns for folder in folders}
    (folders[0] / "model.safetensors").write_bytes(b"cut")
    export_zoo(linear, tmp_path, format="transformers", progress=False)
    after = {folder: (folder / "model.safetensors").stat().st_mtime_ns for folder in folders}
    assert [folder for folder in folders if before[folder] != after[folder]] == folders[:1]
    transformers.ViTForImageClassification.from_pretrained(folders[0])


def test_what_cannot_be_is_one_line(zoo, tmp_path):
    with pytest.raises(ZooError, match="transformers has no ViT with an MLP head: choose rows with --where head=lin"):
        export_zoo(zoo, tmp_path / "all", format="transformers", progress=False)
    assert not (tmp_path / "all").exists()
    row = next(zoo.filter(head="mlp").rows())
    with pytest.raises(ZooError, match="transformers has no ViT with an MLP head"):
        export_row(row, tmp_path / "one", format="transformers")
    (tmp_path / "mine").mkdir()
    row = next(zoo.filter(head="linear").rows())
    with pytest.raises(ZooError, match="mine is there already and no model of transformers"):
        export_row(row, tmp_path / "mine", format="transformers")
    with pytest.raises(ZooError, match="unknown format 'onnx'"):
        export_row(row, tmp_path / "x", format="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_models_of_transformers_come_in_as_they_went_out(zoo, tmp_path):
    """Their own names of today, written by the library itself."""
    row = next(zoo.filter(head="linear").rows())
    export_row(row, tmp_path / "ours", format="transformers")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    loaded = to_timm(dict(model.state_dict()), name="x", config=config)
    vector = torch.cat([tensor.flatten() for tensor in loaded.tensors.values()])
    assert torch.equal(vector, torch.from_numpy(row["weights"]))


def test_a_model_of_transformers_with_its_own_epsilon_is_flagged_and_close():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    loaded = to_timm(dict(model.state_dict()), name="x", config=config.to_dict())
    assert loaded.flags == ["layer_norm_eps 1e-12 in the source, 1e-6 here"]
    from vitzoo_hf.vit import create

    again = create(loaded.architecture, loaded.architecture_args)
    again.load_state_dict(loaded.tensors)
    batch = torch.randn(4, 1, 16, 16)
    with torch.inference_mode():
        assert (again.eval()(batch) - model(batch).logits).abs().max() < 5e-3
