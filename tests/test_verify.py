import json

import pytest

from vitzoo_hf.schema import ZooError
from vitzoo_hf.verify import verify
from vitzoo_hf.zoo import Zoo


def test_an_intact_zoo_is_intact(tiny_zoo):
    found = verify(tiny_zoo, progress=False)
    assert found.intact
    files = [file for file in tiny_zoo.rglob("*") if file.is_file() and file.name not in ("zoo.json", "README.md")]
    assert found.files == len(files)
    assert found.size == sum(file.stat().st_size for file in files)


def test_every_file_is_looked_at(zoo_copy):
    for file in [file for file in sorted(zoo_copy.rglob("*")) if file.is_file()]:
        if file.name in ("zoo.json", "shards.json", "README.md"):
            continue
        whole = file.read_bytes()
        for damaged in (
            whole[:-1],
            whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :],
        ):
            file.write_bytes(damaged)
            found = verify(zoo_copy, progress=False)
            assert list(found.damaged) == [file.relative_to(zoo_copy).as_posix()]
        file.unlink()
        assert verify(zoo_copy, progress=False).damaged == {file.relative_to(zoo_copy).as_posix(): "missing"}
        file.write_bytes(whole)
    assert verify(zoo_copy, progress=False).intact


def test_lost_rows_are_named_and_only_they(zoo_copy):
    zoo = Zoo(zoo_copy)
    file = next((zoo_copy / "weights").glob("*.parquet"))
    data = bytearray(file.read_bytes())
    for position in (3, 8):
        data[int(zoo._reader.places.offset[position]) + 17] ^= 4
    file.write_bytes(data)
    found = verify(zoo_copy, progress=False)
    assert found.rows == {f"weights/{file.name}": [zoo.model_ids[3], zoo.model_ids[8]]}
    kept = [model_id for number, model_id in enumerate(zoo.model_ids) if number not in (3, 8)]
    assert [row["model_id"] for row in Zoo(zoo_copy).filter(model_id=kept).rows()] == kept


def test_a_cut_shard_loses_its_last_rows_only(zoo_copy):
    zoo = Zoo(zoo_copy)
    file = next((zoo_copy / "weights").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[: int(zoo._reader.places.offset[14])])
    (lost,) = verify(zoo_copy, progress=False).rows.values()
    assert lost == zoo.model_ids[14:]


def test_what_cannot_be_verified_is_one_line(zoo_copy, tmp_path):
    with pytest.raises(ZooError, match="is not a zoo"):
        verify(tmp_path)
    (zoo_copy / "shards.json").write_text(json.dumps({}))
    with pytest.raises(ZooError, match=r"shards.json of .* does not match its hash"):
        verify(zoo_copy)
    (zoo_copy / "zoo.json").unlink()
    with pytest.raises(ZooError, match="it has no zoo"):
        verify(zoo_copy)


def test_the_verb_fails_when_something_is_damaged(zoo_copy, capsys):
    from vitzoo_hf.cli import run

    assert run(["verify", str(zoo_copy), "--quiet"]) == 0
    assert "are as they were written" in capsys.readouterr().out
    (zoo_copy / "layouts.json").write_text("other")
    assert run(["verify", str(zoo_copy), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("damaged: layouts.json: 5 bytes, not ")
    assert err.startswith("vitzoo: 1 of ")
