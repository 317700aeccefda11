from pathlib import Path

import numpy as np
import pytest
import torch

from vitzoo_hf.metrics.features import FeatureFile


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_ranges_are_what_was_saved(tmp_path, dtype):
    saved = np.random.default_rng(0).standard_normal((11, 3)).astype(dtype)
    np.save(tmp_path / "model.npy", saved)
    file = FeatureFile(tmp_path / "model.npy")
    assert (tuple(file.shape), len(file), str(file.device)) == ((11, 3), 11, "cpu")
    for images in (slice(None), slice(0, 4), slice(4, 11), slice(10, 30), slice(5, 5)):
        assert torch.equal(file[images], torch.from_numpy(saved[images]))
        assert file[images].dtype == file.dtype


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_reading_keeps_no_file_open_and_maps_nothing(tmp_path):
    np.save(tmp_path / "model.npy", np.zeros((4, 2), np.float32))
    file = FeatureFile(tmp_path / "model.npy")
    for _ in range(2):
        file[:]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not any(str(tmp_path) in str(fd.resolve()) for fd in Path("/proc/self/fd").iterdir())


def archive(path):
    np.savez(path / "x.npz", x=np.zeros((4, 2)))
    (path / "x.npz").rename(path / "x.npy")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.save(path / "x.npy", np.zeros(4)), r"holds float64 \[4\]; expected row-major float16"),
        (lambda path: np.save(path / "x.npy", np.zeros((4, 2), int)), r"holds int64 \[4, 2\]"),
        (lambda path: np.save(path / "x.npy", np.zeros((4, 2), ">f4")), r"holds >f4 \[4, 2\]"),
        (lambda path: np.save(path / "x.npy", np.zeros((4, 2), order="F")), r"holds float64 \[4, 2\]"),
        (lambda path: (path / "x.npy").write_bytes(b"no features"), "is no .npy file .*: write it with numpy.save"),
        (lambda path: (path / "x.npy").write_bytes(b""), "is no .npy file"),
        (archive, "holds an archive"),
    ],
)
def test_refusals(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        FeatureFile(tmp_path / "x.npy")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.npy"):
        FeatureFile(tmp_path / "gone.npy")


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((8, 4), np.float32))
    file = FeatureFile(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert file[:6].shape == (6, 4)
    with pytest.raises(ValueError, match="ends within its features"):
        file[:]
