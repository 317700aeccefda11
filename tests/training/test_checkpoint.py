import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from vitzoo_hf.format.atomic import read_json, write_atomically, write_json
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.training import checkpoint
from vitzoo_hf.training.checkpoint import RunFolder

SPEC = {"fingerprint": "aaaa", "recipe": {"lr": 0.1}}
RESULTS = {"train_loss": 0.25, "train_accuracy": None}


def weights():
    """Names whose order is neither the alphabet's nor that of their sizes."""
    return {"z": torch.randn(2, 3), "a": torch.randn(7), "m.weight": torch.randn(1), "b": torch.tensor(-0.0)}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.open(SPEC)
    return folder


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_an_epoch_comes_back_in_order_and_to_the_bit(folder):
    state = weights()
    folder.save_epoch(3, state, RESULTS)
    tensors, results = folder.load_epoch(3)
    assert list(tensors) == list(state)
    assert all(
        torch.equal(tensors[name].view(-1).view(torch.int32), state[name].view(-1).view(torch.int32))
        for name in state
    )
    assert results == RESULTS
    assert folder.intact()


def test_epochs_are_listed_in_order(folder):
    for epoch in (10, 0, 2):
        folder.save_epoch(epoch, weights(), RESULTS)
    assert folder.epochs() == [0, 2, 10]


def test_views_and_parameters_can_be_kept(folder):
    base = torch.arange(12.0).view(3, 4)
    folder.save_epoch(0, {"t": base.T, "p": nn.Parameter(base.clone())}, RESULTS)
    tensors, _ = folder.load_epoch(0)
    assert torch.equal(tensors["t"], base.T)
    assert torch.equal(tensors["p"], base)
    assert not tensors["p"].requires_grad


def test_a_missing_epoch_is_told(folder):
    with pytest.raises(ZooError, match=r"run has no finished epoch 7: train the run first"):
        folder.load_epoch(7)


def test_weights_without_their_record_do_not_count(folder):
    folder.save_epoch(1, weights(), RESULTS)
    (folder.path / "epoch-00001.json").unlink()
    assert folder.epochs() == []


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_truncated_file_is_named(folder, keep):
    folder.save_epoch(1, weights(), RESULTS)
    file = folder.path / "epoch-00001.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert not folder.intact()
    with pytest.raises(ZooError, match=r"epoch-00001\.safetensors is damaged \(.*\): delete .*run and train again"):
        folder.load_epoch(1)


def test_a_lost_file_is_named(folder):
    folder.save_epoch(1, weights(), RESULTS)
    (folder.path / "epoch-00001.safetensors").unlink()
    assert not folder.intact()
    with pytest.raises(ZooError, match=r"epoch-00001\.safetensors is damaged"):
        folder.load_epoch(1)


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_is_found(folder):
    folder.save_epoch(1, weights(), RESULTS)
    flip_last_byte(folder.path / "epoch-00001.safetensors")
    with pytest.raises(ZooError, match=r"epoch-00001\.safetensors does not match its hash: delete .*run"):
        folder.load_epoch(1)


def test_a_damaged_record_is_named(folder):
    folder.save_epoch(1, weights(), RESULTS)
    (folder.path / "epoch-00001.json").write_text('{"epoch": 1, ')
    assert not folder.intact()
    with pytest.raises(ZooError, match=r"cannot read .*epoch-00001\.json"):
        folder.load_epoch(1)


# the folder


def test_a_folder_is_of_one_training(folder):
    folder.open(SPEC | {"versions": "other"})
    assert folder.spec == SPEC
    with pytest.raises(ZooError, match=r"run holds a run trained by another blueprint \(aaaa, not bbbb\)"):
        folder.open(SPEC | {"fingerprint": "bbbb"})
    assert folder.spec == SPEC


def test_a_damaged_folder_record_is_named(folder):
    (folder.path / "run.json").write_text("")
    with pytest.raises(ZooError, match=r"cannot read .*run\.json"):
        folder.open(SPEC)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ZooError, match=r"cannot (make|write into) .*file"):
            RunFolder(path).open(SPEC)


def test_divergence_is_recorded(folder):
    assert folder.divergence is None
    folder.record_divergence(4, "why")
    assert RunFolder(folder.path).divergence == {"epoch": 4, "reason": "why"}


# atomic writing


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    file = tmp_path / "file.json"
    write_json(file, {"old": 1})

    def write(path: Path) -> None:
        path.write_text("half of the n")
        raise error

    with pytest.raises(error):
        write_atomically(file, write)
    assert read_json(file) == {"old": 1}
    assert names(tmp_path) == ["file.json"]


@pytest.mark.parametrize("when", ["while writing", "before"])
def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path, monkeypatch, when):
    file = tmp_path / "file.json"
    write_json(file, {"old": 1})

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "before":
        monkeypatch.setattr(tempfile, "mkstemp", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ZooError, match=r"cannot write .*: No space left on device"):
        write_json(file, {"new": 1})
    assert read_json(file) == {"old": 1}
    assert names(tmp_path) == ["file.json"]


def test_safetensors_failing_to_write_is_told(folder, monkeypatch):
    def fail(*args, **options):
        raise checkpoint.SafetensorError("I/O error: no space left")

    folder.save_epoch(0, weights(), RESULTS)
    before = names(folder.path)
    monkeypatch.setattr(checkpoint, "save_file", fail)
    for save in (lambda: folder.save_epoch(1, weights(), RESULTS), lambda: folder.save_resume(1, weights())):
        with pytest.raises(ZooError, match=r"cannot write .*: I/O error: no space left"):
            save()
    assert names(folder.path) == before
    assert folder.epochs() == [0]


def test_writing_into_nowhere_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "file", tmp_path / "none"):
        with pytest.raises(ZooError, match=r"cannot write into .*: (Not a directory|No such file or directory)"):
            write_json(parent / "x.json", 1)


def test_files_can_be_read_by_others(folder):
    folder.save_epoch(0, weights(), RESULTS)
    assert {file.stat().st_mode & 0o777 for file in folder.path.iterdir()} == {0o644}


def test_json_keeps_text_and_precision(tmp_path):
    value = {"text": "ä–", "number": 0.1 + 0.2, "none": None}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ZooError, match=r"cannot read .*x\.json"):
        read_json(tmp_path / "x.json")


# resuming


def test_the_resume_file_holds_the_last_state(folder):
    assert folder.load_resume() is None
    folder.save_resume(1, weights())
    state = weights() | {"step": torch.tensor(3.0), "count": torch.tensor([1, 2])}
    folder.save_resume(2, state)
    epoch, tensors = folder.load_resume()
    assert epoch == 2
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert tensors["count"].dtype == torch.int64
    folder.drop_resume()
    folder.drop_resume()
    assert folder.load_resume() is None


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_truncated_resume_file_is_as_none(folder, keep):
    folder.save_resume(1, weights())
    file = folder.path / "resume.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert folder.load_resume() is None


def test_a_flipped_bit_in_the_resume_file_is_as_none(folder):
    folder.save_resume(1, weights())
    flip_last_byte(folder.path / "resume.safetensors")
    assert folder.load_resume() is None


def test_a_resume_file_of_something_else_is_as_none(folder):
    from safetensors.torch import save_file

    for metadata in (None, {"other": "1"}, {"epoch": "x"}):
        save_file(weights(), folder.path / "resume.safetensors", metadata=metadata)
        assert folder.load_resume() is None


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.01, fused=True),
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_continue_as_if_never_stopped(folder, kind):
    def step(model, optimizer, seed):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    model = nn.Linear(3, 12)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    folder.save_resume(3, checkpoint.optimizer_tensors(optimizer))
    other = nn.Linear(3, 12)
    other.load_state_dict(model.state_dict())
    resumed = OPTIMIZERS[kind](other.parameters())
    _, tensors = folder.load_resume()
    checkpoint.load_optimizer_tensors(resumed, tensors)
    assert len(checkpoint.optimizer_tensors(resumed)) == {"adamw": 6, "sgd with momentum": 2, "sgd": 0}[kind]
    for name, tensor in checkpoint.optimizer_tensors(optimizer).items():
        assert torch.equal(checkpoint.optimizer_tensors(resumed)[name], tensor)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    assert torch.equal(model.weight, other.weight)
