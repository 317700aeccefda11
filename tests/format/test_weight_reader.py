import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
from places import GOLDEN

from vitzoo_hf.format import encoding, schema, weight_reader
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish import folder as zoo_folder
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.zoo import Zoo

STORAGES = [("list", "float32"), ("binary", "float32"), ("binary", "float16"), ("binary", "bfloat16")]


@pytest.fixture(scope="module", params=STORAGES, ids=" ".join)
def stored(request, tiny_blueprint, tiny_runs, tmp_path_factory):
    """The tiny zoo in every encoding, several shards a split, several row groups a shard."""
    kind, dtype = request.param
    patch = pytest.MonkeyPatch()
    patch.setattr(zoo_folder, "ROW_GROUP_BYTES", 40_000)
    patch.setattr(zoo_folder, "SHARD_BYTES", 90_000)
    if kind == "binary":
        patch.setattr(schema, "LIST_LIMIT", 100)
    folder = pack(tiny_blueprint, tiny_runs, tmp_path_factory.mktemp("stored") / "zoo", dtype=dtype, progress=False)
    patch.undo()
    return folder


@pytest.fixture(scope="module")
def exact(tiny_zoo):
    return {row["model_id"]: row["weights"] for row in Zoo(tiny_zoo).rows()}


def truth(exact, model_id, dtype):
    return encoding.rounded(exact[model_id], dtype)


@pytest.mark.parametrize("mapped", [0, 1 << 40])
def test_every_way_of_reading_gives_the_same_weights(stored, exact, mapped, monkeypatch):
    monkeypatch.setattr(weight_reader, "MAPPED_BYTES", mapped)
    zoo = Zoo(stored)
    reader = zoo._reader
    assert reader.places.offset.min() > 0
    assert len(reader.places.files) > 1
    for position, model_id in enumerate(zoo.model_ids):
        expected = truth(exact, model_id, reader.rows.dtype(position))
        assert reader.read(position).tobytes() == expected.tobytes()
        out = np.empty_like(expected)
        reader.read_into(position, out)
        assert out.tobytes() == expected.tobytes()
        parts = [slice(3, 10), slice(100, 160)]
        some = np.empty(67, np.float32)
        for verify in (True, False):
            Zoo(stored)._reader.read_parts(position, parts, some, verify=verify)
            assert some.tobytes() == np.concatenate([expected[part] for part in parts]).tobytes()


def test_shards_without_offsets_are_decoded_to_the_same_weights(stored, exact, tmp_path):
    import shutil

    folder = shutil.copytree(stored, tmp_path / "zoo")
    manifest = json.loads((folder / "zoo.json").read_text())
    shards = json.loads((folder / "shards.json").read_text())
    del manifest["files"]["shards.json"]
    manifest["files"] |= {
        name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in shards.items()
    }
    (folder / "zoo.json").write_text(json.dumps(manifest))
    zoo = Zoo(folder)
    assert zoo._reader.places.offset.max() == -1
    for row in zoo.rows():
        assert row["weights"].tobytes() == truth(exact, row["model_id"], row["dtype"]).tobytes()
    zoo._reader.read_parts(0, [slice(2, 5)], out := np.empty(3, np.float32))
    assert out.tobytes() == zoo._reader.read(0)[2:5].tobytes()


def test_what_is_written_into_a_vector_stays_in_memory(stored, monkeypatch):
    monkeypatch.setattr(weight_reader, "MAPPED_BYTES", 0)
    zoo = Zoo(stored)
    files = {file: file.read_bytes() for file in (stored / "weights").iterdir()}
    first = zoo._reader.read(0)
    before = first.copy()
    first[:] = 7
    assert zoo._reader.read(0).tobytes() == before.tobytes()
    assert files == {file: file.read_bytes() for file in (stored / "weights").iterdir()}


def test_pickled_and_threaded_readers_read_the_same(stored):
    reader = Zoo(stored)._reader
    expected = [reader.read(position).tobytes() for position in range(18)]
    again = pickle.loads(pickle.dumps(reader))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda position: again.read(position % 18).tobytes(), range(180))) == expected * 10


def test_a_row_is_hashed_once(stored, monkeypatch):
    hashed = []
    original = schema.weights_sha256
    monkeypatch.setattr(schema, "weights_sha256", lambda vector: hashed.append(1) or original(vector))
    zoo = Zoo(stored)
    for part in (zoo, zoo.filter(stage="finetune")):
        assert all(row.weights.size for row in part.rows())
    for _ in zoo.stream():
        pass
    assert len(hashed) == len(zoo)
    assert all(row.weights.size for row in Zoo(stored).rows(verify=False))
    assert len(hashed) == len(zoo)


def test_a_shard_cut_while_it_is_read_is_named(stored, tmp_path):
    import shutil

    folder = shutil.copytree(stored, tmp_path / "zoo")
    zoo = Zoo(folder)
    name = zoo._reader.places.files[0]
    with (folder / name).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ZooError, match=rf"{name}, row group 0, cannot be read .*; pack the zoo again"):
        zoo._reader.read_into(0, np.empty(zoo._reader.rows.num_parameters[0], np.float32))


def test_an_index_of_other_rows_is_refused(zoo_copy):
    manifest = json.loads((zoo_copy / "zoo.json").read_text())
    shards = json.loads((zoo_copy / "shards.json").read_text())
    first = next(iter(shards.values()))
    first["groups"][0][0] += 1
    first["rows"] += 1
    del manifest["files"]["shards.json"]
    manifest["files"] |= shards
    (zoo_copy / "zoo.json").write_text(json.dumps(manifest))
    with pytest.raises(ZooError, match="19 rows of weights for 18 of the index"):
        Zoo(zoo_copy).row("sl-s1@2")


def test_damaged_offsets_never_give_wrong_weights(zoo_copy):
    manifest = json.loads((zoo_copy / "zoo.json").read_text())
    shards = json.loads((zoo_copy / "shards.json").read_text())
    for entry in shards.values():
        entry["groups"] = [[count, end - 4] for count, end in entry["groups"]]
    del manifest["files"]["shards.json"]
    manifest["files"] |= shards
    (zoo_copy / "zoo.json").write_text(json.dumps(manifest))
    with pytest.raises(ZooError, match="the weights of sl-s1@2 do not match their hash"):
        Zoo(zoo_copy).row("sl-s1@2").required("weights")


def test_a_damaged_list_of_shards_is_refused(zoo_copy):
    file = zoo_copy / "shards.json"
    file.write_text(file.read_text().replace('"rows": ', '"rows":  '))
    with pytest.raises(ZooError, match=r"shards.json of .* does not match its hash: it is damaged"):
        Zoo(zoo_copy)


@pytest.mark.parametrize("form", [None, "arrow", "numpy", "torch"])
def test_datasets_and_this_package_agree_on_every_encoding(stored, form):
    import datasets

    from vitzoo_hf.models.rebuild import reconstruct, weights_of

    ours = {row["model_id"]: row["weights"].tobytes() for row in Zoo(stored).rows()}
    rows = datasets.load_dataset(str(stored), "weights", split="train").with_format(form)
    for number in (0, len(rows) - 1):
        row = rows[number]
        model_id = row["model_id"][0].as_py() if form == "arrow" else row["model_id"]
        assert weights_of(row).tobytes() == ours[model_id]
        rebuilt = np.concatenate([tensor.detach().numpy().ravel() for tensor in reconstruct(row).parameters()])
        assert rebuilt.tobytes() == ours[model_id]


def test_a_row_group_of_a_large_model_holds_it_alone(stored):
    import pyarrow as pa

    for file in (stored / "weights").iterdir():
        held = pq.ParquetFile(file)
        if pa.types.is_binary(held.schema_arrow.field("weights").type):
            assert all(held.metadata.row_group(group).num_rows == 1 for group in range(held.num_row_groups))


def test_yesterdays_zoo_opens(exact):
    """Written before `shards.json`, and never to be written again: format 1 goes on reading it."""

    zoo = Zoo(GOLDEN)
    assert zoo.manifest["format"] == 1
    assert zoo.model_ids == ["sl-s1@2", "cl-s1@2", "sl-s1--adamw-lr0.001-linear@2", "sl-s1--adamw-lr0.001-mlp@2"]
    (batch,) = zoo.filter(head="mlp").stream()
    assert batch["weights"].shape == (1, 3906)
    images, labels = zoo.probes("digits")
    for row in zoo.rows():
        model = zoo.model(row["model_id"])
        if row["test_accuracy"] is not None:
            accuracy = (model(images).argmax(1) == labels).double().mean().item()
            assert abs(accuracy - row["test_accuracy"]) < 2 / len(labels)
