"""What may happen to a folder of runs while they train: a disk that is full, files that rot, a clock that jumps."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from run_folders import hashes

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.launch.local import launch
from vitzoo_hf.training.stacked import train_run


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own, too small for the runs."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_training_goes_on_once_a_full_disk_has_room(tiny_blueprint, tiny_runs, small_disk):
    with pytest.raises(ZooError, match="No space left on device"):
        launch(tiny_blueprint, small_disk / "runs", workers=2, progress=False)
    before = hashes(small_disk / "runs")
    assert before.items() < hashes(tiny_runs).items()
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    launch(tiny_blueprint, small_disk / "runs", workers=2, progress=False)
    assert hashes(small_disk / "runs") == hashes(tiny_runs)


@pytest.mark.slow
def test_a_rotten_parent_is_named_and_trained_again(tiny_blueprint, tiny_runs, tmp_path):
    parent = next(run for run in tiny_blueprint.runs if run.stage == "pretrain")
    shutil.copytree(tiny_runs / parent.run_id, tmp_path / parent.run_id)
    file = tmp_path / parent.run_id / "epoch-00002.safetensors"
    rotten = bytearray(file.read_bytes())
    rotten[-5] ^= 1
    file.write_bytes(rotten)
    with pytest.raises(ZooError, match=f"{file.name} does not match its hash: delete .*{parent.run_id} and train"):
        launch(tiny_blueprint, tmp_path, workers=1, progress=False)
    shutil.rmtree(file.parent)
    launch(tiny_blueprint, tmp_path, workers=2, progress=False)
    assert hashes(tmp_path) == hashes(tiny_runs)


@pytest.mark.parametrize("year", [-1.0e9, 4.0e9])
def test_the_clock_does_not_matter(tiny_blueprint, tmp_path, year):
    run = next(run for run in tiny_blueprint.runs if run.stage == "pretrain")

    def interrupt(epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    train_run(PreparedBlueprint(tiny_blueprint), run, tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        train_run(PreparedBlueprint(tiny_blueprint), run, tmp_path / "runs", on_epoch=interrupt)
    for file in tmp_path.glob("runs/*/*"):
        os.utime(file, (year, year))
    train_run(PreparedBlueprint(tiny_blueprint), run, tmp_path / "runs")
    assert hashes(tmp_path / "runs") == hashes(tmp_path / "undisturbed")
