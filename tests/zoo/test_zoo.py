import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load, load_file

import vitzoo_hf as vz
from vitzoo_hf.convert.export import export_zoo
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo):
    return Zoo(tiny_zoo)


def test_index_is_a_dataset_without_weights(zoo):
    assert len(zoo.index) == len(zoo) == 18
    assert "weights" not in zoo.index.features
    assert zoo.index.features["stage"].names == ["pretrain", "finetune"]


@pytest.mark.parametrize(
    ("conditions", "check"),
    [
        ({"stage": "finetune"}, lambda row: row["stage"] == "finetune"),
        ({"factor_lr": 1e-3}, lambda row: row["factor_lr"] == 1e-3),
        (
            {"factor_optimizer": ["sgd"], "head": "mlp"},
            lambda row: row["factor_optimizer"] == "sgd" and row["head"] == "mlp",
        ),
        (
            {"test_accuracy": (0.1, 0.5)},
            lambda row: row["test_accuracy"] is not None and 0.1 <= row["test_accuracy"] <= 0.5,
        ),
        ({"epoch": (1, None)}, lambda row: row["epoch"] >= 1),
        ({"parent_id": None}, lambda row: row["parent_id"] is None),
        ({"test_accuracy": None}, lambda row: row["test_accuracy"] is None),
        ({"is_final": True, "epoch": [0, 2]}, lambda row: row["is_final"]),
    ],
)
def test_filter_keeps_exactly_the_rows_that_match(zoo, conditions, check):
    everything = list(zoo.rows())
    chosen = zoo.filter(**conditions)
    assert len(chosen) > 0
    assert chosen.model_ids == [row["model_id"] for row in everything if check(row)]
    assert [row["model_id"] for row in chosen.rows()] == chosen.model_ids


def test_filters_compose_and_leave_the_zoo_alone(zoo):
    both = zoo.filter(stage="finetune").filter(head="mlp", split="train")
    assert both.model_ids == zoo.filter(stage="finetune", head="mlp", split="train").model_ids
    assert len(zoo) == 18


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"factor_lrr": 1}, r"unknown column 'factor_lrr': did you mean 'factor_lr'\?"),
        ({"factor_lr": "fast"}, r"factor_lr='fast' does not fit the column's type double"),
        ({"factor_optimizer": 3}, r"factor_optimizer=3 does not fit"),
        ({"stage": "pretraining"}, r"unknown stage 'pretraining': did you mean 'pretrain'\?"),
        ({"epoch": (1, 2, 3)}, r"epoch=\(1, 2, 3\) does not fit"),
    ],
)
def test_a_wrong_condition_is_one_clear_line(zoo, conditions, message):
    with pytest.raises(ZooError, match=message) as caught:
        zoo.filter(**conditions)
    assert "\n" not in str(caught.value)


def test_models_are_exact_and_live(zoo):
    for row in zoo.rows():
        model = zoo.model(row["model_id"])
        assert not model.training
        rebuilt = torch.cat([tensor.flatten() for tensor in model.state_dict().values()]).detach().numpy()
        assert rebuilt.tobytes() == row["weights"].tobytes()


def test_a_model_can_be_trained_further(zoo):
    model = zoo.model(zoo.model_ids[0]).train()
    before = vz.flatten(model.state_dict()).clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, vz.flatten(model.state_dict()))
    assert zoo.row(zoo.model_ids[0])["weights"].tobytes() == before.numpy().tobytes()


def test_an_unknown_model_is_named_with_the_closest(zoo):
    with pytest.raises(ZooError, match=r"has no model 'sl-s1@3': did you mean 'sl-s1@2'\?"):
        zoo.model("sl-s1@3")


def test_probes_are_the_images_training_tested_on(zoo, tiny_blueprint):
    from vitzoo_hf.images.sources import load_images

    images = load_images("digits", tiny_blueprint.images["digits"])
    for role in ("selection", "test"):
        pixels, labels = zoo.probes("digits", role)
        own, own_labels = images.part(role)
        assert torch.equal(pixels, images.normalize(own))
        assert torch.equal(labels, own_labels)
    with pytest.raises(ZooError, match=r"carries no test images of 'cifar'; it has them of: \['digits'\]"):
        zoo.probes("cifar")


def test_a_config_that_is_not_there_is_named(zoo):
    with pytest.raises(ZooError, match=r"has no config 'evaluation'.*did you mean 'evaluations'\?"):
        zoo.to_pandas("evaluation")


def test_a_cut_shard_is_refused_on_opening(zoo_copy):
    file = next((zoo_copy / "weights").glob("train-*.parquet"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ZooError, match=r"weights/train-00000-of-00001.parquet has \d+ bytes, not \d+: it was cut"):
        Zoo(zoo_copy)


def test_a_missing_shard_is_named(zoo_copy):
    next((zoo_copy / "weights").glob("train-*.parquet")).unlink()
    with pytest.raises(ZooError, match=r"weights/train-00000-of-00001.parquet of .* is missing"):
        Zoo(zoo_copy)


def test_no_flipped_bit_ever_gives_wrong_weights(tiny_zoo, zoo_copy):
    """Either the row is refused, or every weight is as it was."""
    truth = {row["model_id"]: row["weights"].tobytes() for row in Zoo(tiny_zoo).rows()}
    file = next((zoo_copy / "weights").glob("train-*.parquet"))
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for position in generator.integers(4, len(whole) - 4, size=60):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        try:
            read = {row["model_id"]: row["weights"].tobytes() for row in Zoo(zoo_copy).rows()}
        except ZooError as caught:
            message = str(caught)
        else:
            message = None
            assert read == truth
        if message is not None:
            assert "pack the zoo again" in message
            refused += 1
    assert refused > 30


def test_a_flipped_weight_is_refused_by_name(zoo_copy):
    file = next((zoo_copy / "weights").glob("train-*.parquet"))
    table = pq.read_table(file)
    weights = [list(values) for values in table["weights"].to_pylist()]
    weights[1][7] += 1.0
    position = table.column_names.index("weights")
    field = table.schema.field("weights")
    changed = table.set_column(position, field, pa.array(weights, field.type))
    pq.write_table(changed, file, use_dictionary=False, compression="none")
    manifest = json.loads((zoo_copy / "zoo.json").read_text())
    listed = {
        f"weights/{file.name}": {"bytes": file.stat().st_size, "sha256": "0" * 64}
        for file in (zoo_copy / "weights").iterdir()
    }
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name != "shards.json"} | listed
    (zoo_copy / "zoo.json").write_text(json.dumps(manifest))
    damaged = table["model_id"][1].as_py()
    with pytest.raises(ZooError, match=f"the weights of {damaged} do not match their hash"):
        [row.weights for row in Zoo(zoo_copy).rows()]


def test_a_newer_format_is_refused(zoo_copy):
    manifest = json.loads((zoo_copy / "zoo.json").read_text())
    (zoo_copy / "zoo.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ZooError, match=r"says format 2, this version reads up to 1: run `pip install -U vitzoo-hf`"):
        Zoo(zoo_copy)


def test_what_is_no_zoo_is_said_to_be_none(tmp_path):
    with pytest.raises(ZooError, match=r"is not a zoo: it has no zoo.json"):
        Zoo(tmp_path)
    with pytest.raises(ZooError, match="neither a folder nor a dataset id like ORG/NAME"):
        Zoo(tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: [], "zoo.json is damaged: it lacks 'format'"),
        (lambda manifest: {key: manifest[key] for key in manifest if key != "files"}, "it lacks 'files'"),
        (lambda manifest: manifest | {"format": "1"}, "`format` is '1'; expected an integer from 1 to"),
    ],
)
def test_a_damaged_manifest_is_named(zoo_copy, change, message):
    file = zoo_copy / "zoo.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ZooError, match=message):
        Zoo(zoo_copy)


def test_swapped_layouts_are_refused(zoo_copy):
    file = zoo_copy / "layouts.json"
    layouts = json.loads(file.read_text())
    first, second, *_ = layouts
    layouts[first], layouts[second] = layouts[second], layouts[first]
    file.write_text(json.dumps(layouts))
    with pytest.raises(ZooError, match=r"layouts.json is damaged: layout \w+ has the fingerprint"):
        Zoo(zoo_copy)


def test_a_fraction_is_no_epoch(zoo):
    assert len(zoo.filter(epoch=2.0)) == len(zoo.filter(epoch=2))
    with pytest.raises(ZooError, match=r"epoch=2.5 does not fit"):
        zoo.filter(epoch=2.5)


@pytest.mark.parametrize(("device", "message"), [("cudaa", "unknown device 'cudaa'"), ("cuda:99", "is not here")])
def test_a_device_that_is_not_here_is_one_line(zoo, device, message):
    for use in (
        lambda: zoo.model(zoo.model_ids[0], device=device),
        lambda: vz.Population.from_rows(zoo.rows(), device=device),
        lambda: zoo.stream(device=device),
    ):
        with pytest.raises(ZooError, match=message):
            use()


@pytest.mark.parametrize("config", ["index", "evaluations", "pairs", "probes"])
def test_a_flipped_bit_in_a_light_table_is_named(zoo_copy, config):
    file = next((zoo_copy / config).glob("*.parquet"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    def read_everything():
        zoo = Zoo(zoo_copy)
        for role in ("test", "selection"):
            zoo.probes("digits", role)
        zoo.to_pandas(config)

    with pytest.raises(ZooError, match=f"{config}/.* does not match its hash: it is damaged"):
        read_everything()


def test_a_shard_without_size_or_hash_is_named(zoo_copy):
    manifest = json.loads((zoo_copy / "zoo.json").read_text())
    del manifest["files"]["shards.json"]
    manifest["files"]["weights/train-00000-of-00001.parquet"] = {"bytes": 3}
    (zoo_copy / "zoo.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ZooError, match=r"is damaged: size or hash of weights/train-00000-of-00001.parquet is not listed"
    ):
        Zoo(zoo_copy)


def test_the_end_of_a_range_is_rounded_as_the_values_were(zoo):
    value = zoo.index["test_accuracy"][0]
    shown = float(f"{value:.7g}")
    equal = zoo.filter(test_accuracy=shown).model_ids
    assert set(equal) <= set(zoo.filter(test_accuracy=(shown, None)).model_ids)
    assert set(equal) <= set(zoo.filter(test_accuracy=(None, shown)).model_ids)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"test_accuracy": (0.9, 0.1)}, "holds nothing: the first of a pair is the lower end"),
        ({"test_accuracy": float("nan")}, "does not fit the column's type"),
        ({"factor_seed": 2**70}, "does not fit the column's type"),
    ],
)
def test_conditions_that_can_hold_for_nothing_are_refused(zoo, condition, message):
    with pytest.raises(ZooError, match=message):
        zoo.filter(**condition)


def test_integers_beside_nulls_stay_whole(zoo):
    held = zoo.to_pandas()["factor_parent_seed"] if "factor_parent_seed" in zoo.factors else None
    assert held is None or all(value is None or isinstance(value, int) for value in held)


def test_an_exported_file_that_rotted_is_written_again(zoo, tmp_path):
    files = export_zoo(zoo, tmp_path / "out", progress=False)
    whole = files[0].read_bytes()
    held = load(whole)
    files[0].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    export_zoo(zoo, tmp_path / "out", progress=False)
    again = load_file(files[0])
    assert all(torch.equal(again[name], tensor) for name, tensor in held.items())
