import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.format import schema
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish.pack import is_packed, pack
from vitzoo_hf.training.checkpoint import RunFolder


def test_plain_load_dataset_gives_every_checkpoint_bit_for_bit(tiny_zoo, tiny_blueprint, tiny_runs):
    rows = datasets.load_dataset(str(tiny_zoo)).with_format("numpy")
    held = {row["model_id"]: row for split in rows.values() for row in split}
    expected = [(run, epoch) for run in tiny_blueprint.runs for epoch in run.keep_epochs]
    assert set(held) == {schema.model_id(run.run_id, epoch) for run, epoch in expected}
    for run, epoch in expected:
        tensors, _ = RunFolder(tiny_runs / run.run_id).load_epoch(epoch)
        vector = np.concatenate([tensor.numpy().ravel() for tensor in tensors.values()])
        stored = held[schema.model_id(run.run_id, epoch)]["weights"]
        assert stored.astype("<f4").tobytes() == vector.astype("<f4").tobytes()


def test_rows_carry_factors_lineage_and_results(tiny_zoo, tiny_blueprint):
    index = datasets.concatenate_datasets(list(datasets.load_dataset(str(tiny_zoo), "index").values()))
    runs = {run.run_id: run for run in tiny_blueprint.runs}
    ids = set(index["model_id"])
    for row in index:
        run = runs[row["run_id"]]
        assert row["parent_id"] == run.parent_id
        assert row["parent_id"] is None or row["parent_id"] in ids
        assert row["is_final"] == (row["epoch"] == run.epochs)
        assert row["factor_regime"] == run.factors["regime"]
        assert index.features["stage"].int2str(row["stage"]) == run.stage
        contrastive_itself = run.recipe.regime == "contrastive"
        assert (row["test_accuracy"] is None) == contrastive_itself
        assert row["train_loss"] is not None
        recipe = json.loads(row["provenance"])["recipe"]
        assert recipe["lr"] == run.recipe.lr


def test_streaming_gives_the_same_rows(tiny_zoo):
    eager = datasets.load_dataset(str(tiny_zoo), split="train")
    streamed = list(datasets.load_dataset(str(tiny_zoo), split="train", streaming=True))
    assert [row["weights_sha256"] for row in streamed] == list(eager["weights_sha256"])
    assert streamed[0]["weights"] == eager[0]["weights"]


def test_no_run_is_in_two_splits(tiny_zoo):
    parts = datasets.load_dataset(str(tiny_zoo), "index")
    runs = [set(part["run_id"]) for part in parts.values()]
    assert sum(map(len, runs)) == len(set.union(*runs))


def test_weights_take_their_raw_size_and_nothing_more(tmp_path):
    """At the size of the mini zoo; the tiny zoo's models are smaller than their metadata."""
    from vitzoo_hf.format.shards import write_parquet

    vectors = np.random.default_rng(0).standard_normal((64, 27_000)).astype(np.float32)
    features = datasets.Features(
        {"model_id": datasets.Value("string"), "weights": datasets.List(datasets.Value("float32"))}
    )
    rows = [{"model_id": str(i), "dtype": "float32", "weights": vector} for i, vector in enumerate(vectors)]
    write_parquet(tmp_path / "x.parquet", features, [rows[:32], rows[32:]], {})
    assert (tmp_path / "x.parquet").stat().st_size < 1.003 * vectors.nbytes


def test_a_shard_alone_can_be_rebuilt(tiny_zoo):
    from vitzoo_hf.format.layout import Layout

    file = next((tiny_zoo / "weights").glob("train-*.parquet"))
    metadata = pq.read_metadata(file).metadata
    assert metadata[b"vitzoo.format"] == b"1"
    layouts = {key: Layout.from_json(value) for key, value in json.loads(metadata[b"vitzoo.layouts"]).items()}
    for row in pq.read_table(file, columns=["layout", "num_parameters"]).to_pylist():
        assert layouts[row["layout"]].num_parameters == row["num_parameters"]
        assert layouts[row["layout"]].fingerprint == row["layout"]


def test_models_above_the_list_limit_are_stored_as_bytes_one_a_row_group(
    tiny_blueprint, tiny_runs, tmp_path, monkeypatch
):
    from vitzoo_hf.zoo import Zoo

    monkeypatch.setattr(schema, "LIST_LIMIT", 100)
    zoo = Zoo(pack(tiny_blueprint, tiny_runs, tmp_path / "zoo", progress=False))
    file = next((tmp_path / "zoo" / "weights").glob("train-*.parquet"))
    assert pq.read_metadata(file).row_group(0).num_rows == 1
    for row in zoo.rows():
        assert len(row["weights"]) == row["num_parameters"]


def test_packing_twice_gives_the_same_bytes(tiny_blueprint, tiny_runs, tmp_path):
    first = pack(tiny_blueprint, tiny_runs, tmp_path / "a", progress=False)
    second = pack(tiny_blueprint, tiny_runs, tmp_path / "b", progress=False)
    names = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(second) for file in second.rglob("*") if file.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_nothing_of_this_machine_is_published(tiny_zoo):
    text = b"".join(file.read_bytes() for file in tiny_zoo.rglob("*") if file.is_file())
    assert str(Path.home()).encode() not in text
    assert str(tiny_zoo.parents[1]).encode() not in text  # where it was built: the parent was renamed since


def test_unfinished_runs_are_named(tiny_blueprint, tiny_runs, tmp_path):
    runs = Path(shutil.copytree(tiny_runs, tmp_path / "runs"))
    shutil.rmtree(runs / "cl-s1")
    with pytest.raises(
        ZooError, match=r"1 of 10 runs in .* are unfinished, cl-s1 the first: run `vitzoo train` again"
    ):
        pack(tiny_blueprint, runs, tmp_path / "zoo", progress=False)
    assert not (tmp_path / "zoo").exists()


def test_a_damaged_checkpoint_is_refused_and_leaves_the_old_zoo(tiny_blueprint, tiny_runs, tmp_path):
    runs = Path(shutil.copytree(tiny_runs, tmp_path / "runs"))
    zoo = pack(tiny_blueprint, runs, tmp_path / "zoo", progress=False)
    before = (zoo / "zoo.json").read_bytes()
    file = runs / "sl-s1" / "epoch-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ZooError, match="does not match its hash"):
        pack(tiny_blueprint, runs, zoo, progress=False)
    assert (zoo / "zoo.json").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == [".zoo.lock"]


def test_nan_weights_are_refused_by_row(tiny_blueprint, tiny_runs, tmp_path):
    runs = Path(shutil.copytree(tiny_runs, tmp_path / "runs"))
    place = RunFolder(runs / "sl-s1")
    tensors, results = place.load_epoch(2)
    tensors["norm.weight"][0] = torch.nan
    place.save_epoch(2, tensors, results)
    with pytest.raises(ZooError, match=r"sl-s1@2 has 1 weights that are not finite"):
        pack(tiny_blueprint, runs, tmp_path / "zoo", progress=False)


def test_a_diverged_run_and_its_children_are_left_out_and_listed(tiny_blueprint, tiny_runs, tmp_path):
    from vitzoo_hf.zoo import Zoo

    runs = Path(shutil.copytree(tiny_runs, tmp_path / "runs"))
    RunFolder(runs / "cl-s1").record_divergence(1, "the loss is not finite")
    zoo = Zoo(pack(tiny_blueprint, runs, tmp_path / "zoo", progress=False))
    assert len(zoo.manifest["missing_runs"]) == 5
    assert zoo.manifest["missing_runs"]["cl-s1"] == "diverged in epoch 1"
    assert not any(run_id.startswith("cl") for run_id in zoo.index["run_id"])


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_blueprint, tiny_runs, tmp_path, monkeypatch):
    import errno

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vitzoo_hf.publish.folder.write_parquet", full)
    with pytest.raises(ZooError, match=r"cannot write the zoo .*: No space left on device"):
        pack(tiny_blueprint, tiny_runs, tmp_path / "zoo", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == [".zoo.lock"]


def test_is_packed_sees_another_blueprint_and_a_cut_file(tiny_blueprint, zoo_copy, tmp_path):
    assert is_packed(tiny_blueprint, zoo_copy)
    assert not is_packed(Blueprint.load("mini"), zoo_copy)
    assert not is_packed(tiny_blueprint, tmp_path / "nowhere")
    file = next((zoo_copy / "weights").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-1])
    assert not is_packed(tiny_blueprint, zoo_copy)
