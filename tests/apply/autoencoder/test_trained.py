"""Autoencoders as files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_autoencoder import SMALL

from vitzoo_hf.apply.autoencoder.sampling import decoded, encoded
from vitzoo_hf.apply.autoencoder.trained import FILE, load_autoencoder
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

RECIPE = replace(SMALL, contrast=0.05, views=("mlp",), steps=3)


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo).filter(stage="finetune", head="mlp")


@pytest.fixture(scope="module")
def folder(zoo, tmp_path_factory):
    place = tmp_path_factory.mktemp("autoencoder")
    train_autoencoder(zoo, RECIPE, place)
    return place


def test_an_autoencoder_is_whole_from_its_folder_alone(zoo, folder, tmp_path):
    before = train_autoencoder(zoo, RECIPE, tmp_path)
    again = load_autoencoder(folder)
    vectors = torch.stack([torch.from_numpy(row["weights"]) for row in zoo.rows()])
    latents = encoded(before, vectors)
    assert torch.equal(latents, encoded(again, vectors))
    assert torch.equal(decoded(before, latents), decoded(again, latents))
    assert (again.recipe, again.step, again.history) == (before.recipe, before.step, before.history)
    assert again.loss.scales == before.loss.scales
    assert not again.model.training
    assert all(value.requires_grad for value in again.model.parameters())


def test_a_damaged_or_foreign_file_is_one_line(folder, tmp_path):
    with pytest.raises(ZooError, match=r"holds no autoencoder\.safetensors: train one"):
        load_autoencoder(tmp_path)
    whole, file = (folder / FILE).read_bytes(), tmp_path / FILE
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ZooError, match="is damaged: delete it, and train again"):
        load_autoencoder(tmp_path)
    save_file({"a": torch.zeros(3)}, file)
    with pytest.raises(ZooError, match="is no autoencoder of this library"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda record, tensors: record["recipe"].update(lr=1.0),
        lambda record, tensors: record["recipe"].update(lr="fast"),
        lambda record, tensors: record["recipe"]["sizes"].update(width=32),
        lambda record, tensors: record.pop("architecture"),
        lambda record, tensors: record.update(layout="another"),
        lambda record, tensors: tensors.pop("scaling.mean"),
        lambda record, tensors: tensors.update({"scaling.std": torch.ones(3)}),
        lambda record, tensors: tensors.pop("model.index_table"),
    ],
)
def test_a_record_that_does_not_fit_is_one_line(folder, tmp_path, change):
    from safetensors import safe_open

    with safe_open(folder / FILE, framework="pt") as opened:
        record = json.loads(opened.metadata()["record"])
    tensors = load_file(folder / FILE)
    change(record, tensors)
    save_file(tensors, tmp_path / FILE, {"record": json.dumps(record)})
    with pytest.raises(ZooError, match="is damaged") as caught:
        load_autoencoder(tmp_path)
    assert "\n" not in str(caught.value)
