"""Hashing a zoo again: in a folder here, and on a Hub on this machine by the command line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from local_hub import LocalHub
from places import GOLDEN

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.verify import verify

NAME = "ModelZoos/vit-zoo"
SHARD = "weights/train-00000-of-00001.parquet"
INDEX = "index/train-00000-of-00001.parquet"


def check(folder):
    return verify(folder, progress=False)


def damage(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def byte_of(folder, position):
    """Where a byte in the middle of a row's weights lies in its shard."""
    reader = Zoo(folder)._reader
    return reader.places.offset[position] + reader.row_bytes(position) // 2


def test_an_intact_zoo(zoo_copy):
    (zoo_copy / "notes.txt").write_text("mine")
    found = check(zoo_copy)
    (zoo_copy / "README.md").write_text("cards are there to be edited")
    listed = json.loads((zoo_copy / "zoo.json").read_text())["files"]
    shards = json.loads((zoo_copy / "shards.json").read_text())
    assert found.intact
    assert found.files == len(listed) + len(shards)
    assert found.size == sum((zoo_copy / name).stat().st_size for name in listed | shards)
    assert (found.damaged, found.rows) == ({}, {})


def test_a_zoo_without_a_list_of_shards():
    found = check(GOLDEN)
    assert found.intact
    assert found.files == 5


@pytest.mark.parametrize("position", [0, 5])
def test_a_damaged_byte_is_found_in_its_row(zoo_copy, position):
    zoo = Zoo(zoo_copy)
    damage(zoo_copy / SHARD, byte_of(zoo_copy, position))
    found = check(zoo_copy)
    assert not found.intact
    assert found.damaged == {SHARD: "its content does not match its hash"}
    assert found.rows == {SHARD: [zoo.model_ids[position]]}


def test_every_damaged_file_is_named(zoo_copy):
    ids = Zoo(zoo_copy).filter(split="train").model_ids
    (zoo_copy / SHARD).write_bytes((zoo_copy / SHARD).read_bytes()[:-100])
    (zoo_copy / "pairs" / "full-00000-of-00001.parquet").unlink()
    damage(zoo_copy / "blueprint.yaml", 3)
    found = check(zoo_copy)
    size = (zoo_copy / SHARD).stat().st_size
    assert found.damaged == {
        "pairs/full-00000-of-00001.parquet": "missing",
        "blueprint.yaml": "its content does not match its hash",
        SHARD: f"{size} bytes, not {size + 100}",
    }
    assert found.rows == {SHARD: []}  # only the Parquet footer was cut: the weights can still be read
    (zoo_copy / SHARD).unlink()
    assert check(zoo_copy).rows == {SHARD: ids}
    (zoo_copy / INDEX).unlink()
    assert check(zoo_copy).rows == {}


def test_a_cut_shard_loses_its_last_rows_only(zoo_copy):
    zoo = Zoo(zoo_copy)
    (zoo_copy / SHARD).write_bytes((zoo_copy / SHARD).read_bytes()[: int(zoo._reader.places.offset[14])])
    assert check(zoo_copy).rows == {SHARD: zoo.model_ids[14:]}


def test_damage_outside_the_weights_loses_no_row(zoo_copy):
    damage(zoo_copy / SHARD, (zoo_copy / SHARD).read_bytes().rindex(b"parquet-cpp-arrow"))
    found = check(zoo_copy)
    assert found.damaged.keys() == {SHARD}
    assert found.rows == {SHARD: []}


def test_what_is_no_zoo(tmp_path):
    with pytest.raises(ZooError, match="is not a zoo: it has no zoo"):
        check(tmp_path)


def test_a_dataset_is_read_once_and_not_kept(tiny_zoo, tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        hub.publish(NAME, tiny_zoo)
        status, said = told(hub, tmp_path)
        assert status == 0
        assert re.fullmatch(rf"{check(tiny_zoo).files} files of {NAME}, \d+ kB, are as they were written", said)
        for file in (tiny_zoo / "weights").iterdir():
            assert sum(request.sent for request in hub.asked(f"GET .*/weights/{file.name}")) == file.stat().st_size
        assert not [file for file in (tmp_path / "home").rglob("*.parquet") if "weights" in file.parts]


def test_damage_of_a_dataset_is_named_to_the_row(tiny_zoo, tmp_path):
    other = Path(shutil.copytree(tiny_zoo, tmp_path / "other"))
    model_id = Zoo(tiny_zoo).model_ids[-1]
    lost = Zoo(tiny_zoo)._reader.places.files[-1]
    damage(other / lost, byte_of(tiny_zoo, len(Zoo(tiny_zoo)) - 1))
    with LocalHub(tmp_path / "hub") as hub:
        hub.publish(NAME, other)
        status, *said, last = told(hub, tmp_path)
        assert status == 1
        assert said[0] == f"damaged: {lost}: its content does not match its hash"
        assert said[1:] == [f"    lost: {model_id}"]
        expected = f"vitzoo: 1 of {check(tiny_zoo).files} files of {NAME} are damaged: "
        assert last == f"{expected}download them again, or pack the zoo again"
        (other / SHARD).unlink()
        hub.publish(NAME, other)
        status, *said, last = told(hub, tmp_path)
        ids = Zoo(tiny_zoo).filter(split="train").model_ids
        assert said[: len(ids) + 1] == [f"damaged: {SHARD}: missing", *(f"    lost: {name}" for name in ids)]
        assert not [file for file in (tmp_path / "home").rglob("*.parquet") if "weights" in file.parts]


def told(hub, tmp_path):
    """`vitzoo verify` of the dataset: exit status, then the lines it wrote."""
    code = f"""
import contextlib, io, json
from vitzoo_hf.cli.app import run
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    status = run(["verify", {NAME!r}, "--quiet"])
print(json.dumps([status, *said.getvalue().splitlines()]))
"""
    return hub.run(code, tmp_path / "home")


def test_a_file_that_does_not_belong_is_named(zoo_copy):
    first = next((zoo_copy / "weights").glob("train-*.parquet"))
    (zoo_copy / "weights" / "train-00001-of-00002.parquet").write_bytes(first.read_bytes())
    found = verify(zoo_copy, progress=False)
    assert list(found.damaged) == ["weights/train-00001-of-00002.parquet"]
    assert "not a file of this zoo" in found.damaged["weights/train-00001-of-00002.parquet"]


def test_a_missing_card_is_named(zoo_copy):
    (zoo_copy / "README.md").unlink()
    assert list(verify(zoo_copy, progress=False).damaged) == ["README.md"]


def test_a_folder_has_no_revision(zoo_copy):
    with pytest.raises(ZooError, match="only datasets on the Hub have revisions"):
        verify(zoo_copy, revision="v1", progress=False)
