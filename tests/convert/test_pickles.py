import io
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from vitzoo_hf.convert.pickles import read_state_dict
from vitzoo_hf.format.schema import ZooError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.float16)}


def saved(value, tmp_path, **options):
    torch.save(value, tmp_path / "x.pt", **options)
    return tmp_path / "x.pt"


def same(found):
    assert list(found) == list(STATE)
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize(
    "wrapped",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": {"state_dict": STATE}},
        {"model_state_dict": STATE, "optimizer": {"lr": 1}},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_and_wrapped_state_dicts(wrapped, zipped, tmp_path):
    file = saved(wrapped, tmp_path, _use_new_zipfile_serialization=zipped)
    same(read_state_dict(file, "x"))
    same(read_state_dict(io.BytesIO(file.read_bytes()), "x"))


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    found = read_state_dict(tmp_path / "x.safetensors", "x")
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


class Bomb:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('/tmp/vitzoo-was-here').touch()",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(zipped, tmp_path):
    from pathlib import Path

    file = saved({"a": torch.zeros(1), "bomb": Bomb()}, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ZooError, match=r"x.pt is not read: it holds more than tensors"):
        read_state_dict(file, "x.pt")
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ZooError, match=r"x.pt is"):
        read_state_dict(file, "x.pt")
    assert not Path("/tmp/vitzoo-was-here").exists()


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path):
    file = saved(STATE, tmp_path)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry))
        bomb.writestr("archive/data/9", b"\0" * 50_000_000, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    with pytest.raises(ZooError, match=r"is refused: \d+ bytes that unpack to 5\d+; torch writes archives unpacked"):
        read_state_dict(tmp_path / "bomb.pt", "bomb.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "holds a list, not a dictionary of tensors"),
        ({}, "is no dictionary of tensors: it is empty"),
        ({"a": torch.zeros(1), "step": 3}, "is no dictionary of tensors: 'step' is no named tensor"),
        ({3: torch.zeros(1)}, "3 is no named tensor"),
        (torch.zeros(3), "holds a Tensor, not a dictionary"),
    ],
)
def test_what_is_no_state_dict_is_named(value, message, tmp_path):
    with pytest.raises(ZooError, match=message):
        read_state_dict(saved(value, tmp_path), "x")


@pytest.mark.parametrize("kind", ["pt", "legacy", "safetensors"])
def test_cut_and_empty_files_are_named(kind, tmp_path):
    file = tmp_path / "x"
    if kind == "safetensors":
        save_file(STATE, file)
    else:
        torch.save(STATE, file, _use_new_zipfile_serialization=kind == "pt")
    whole = file.read_bytes()
    for cut in (0, 1, 7, 9, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ZooError, match=r"^sl/checkpoint_3 (is|has|holds)"):
            read_state_dict(file, "sl/checkpoint_3")
    file.write_bytes(b"<html>not found</html>" * 40)
    with pytest.raises(ZooError, match="sl/checkpoint_3 is"):
        read_state_dict(file, "sl/checkpoint_3")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ZooError, match="x cannot be read: No such file"):
        read_state_dict(tmp_path / "none", "x")
