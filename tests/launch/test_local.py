import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import TINY
from run_folders import hashes, wait_for

from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.format.atomic import exclusive
from vitzoo_hf.format.layout import flatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.launch.local import default_stack, launch
from vitzoo_hf.training.checkpoint import RunFolder

LAUNCH = "from pathlib import Path; from vitzoo_hf.launch.local import launch\n"
LAUNCH += "from vitzoo_hf.blueprint.blueprint import Blueprint\n"
LAUNCH += "if __name__ == '__main__': launch(Blueprint.load({tiny!r}), Path({folder!r}), workers=2, progress=False)"


def start(folder: Path) -> subprocess.Popen[bytes]:
    code = LAUNCH.format(tiny=str(TINY), folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    try:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except FileNotFoundError:
        return []
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in listed.split()}
    return [pid for pid, command in commands.items() if b"spawn_main" in command]


def test_everything_is_trained_once(tiny_blueprint, runs_copy):
    before = {file: file.stat().st_mtime_ns for file in runs_copy.rglob("epoch-*")}
    summary = launch(tiny_blueprint, runs_copy, progress=False)
    assert sorted(summary.finished) == sorted(run.run_id for run in tiny_blueprint.runs)
    assert {file: file.stat().st_mtime_ns for file in runs_copy.rglob("epoch-*")} == before


def test_one_worker_or_two_give_the_same_weights(tiny_blueprint, tiny_runs, tmp_path):
    launch(tiny_blueprint, tmp_path, workers=1, progress=False)
    assert hashes(tmp_path) == hashes(tiny_runs)


def test_stacked_runs_give_the_same_zoo_up_to_rounding(tiny_blueprint, tiny_runs, tmp_path):
    """Eight fine-tunes of four shapes, each shape from two parents."""
    summary = launch(tiny_blueprint, tmp_path, workers=1, stack=4, progress=False)
    assert sorted(summary.finished) == sorted(run.run_id for run in tiny_blueprint.runs)
    assert hashes(tmp_path).keys() == hashes(tiny_runs).keys()
    for run in tiny_blueprint.runs:
        for epoch in run.keep_epochs:
            here, there = (RunFolder(folder / run.run_id).load_epoch(epoch) for folder in (tmp_path, tiny_runs))
            assert here[1] == pytest.approx(there[1], abs=0.01)
            weights = [flatten(tensors) for tensors in (here[0], there[0])]
            assert (weights[0] - weights[1]).norm() <= 2e-3 * weights[1].norm(), (run.run_id, epoch)


def test_a_diverged_run_of_a_stack_leaves_the_others(tmp_path):
    text = TINY.read_text().replace("supervised, seed: 1}", "supervised, seed: 1, lr: [1e30, 0.003]}")
    text = text.replace("lr: 0.003, batch", "batch")
    (tmp_path / "wild.yaml").write_text(text)
    blueprint = Blueprint.load(tmp_path / "wild.yaml")
    summary = launch(blueprint, tmp_path / "runs", workers=1, stack=8, progress=False)
    assert list(summary.diverged) == ["sl-s1-lr1e+30"]
    assert (len(summary.finished), len(summary.orphaned)) == (10, 4)


@pytest.mark.slow
def test_killed_at_any_moment_it_continues_to_the_same_zoo(tiny_runs, tmp_path):
    for delay in (0.5, 3.0, 4.5):
        process = start(tmp_path)
        time.sleep(delay)
        workers = children(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        wait_for(lambda pids=workers: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    process = start(tmp_path)
    assert process.wait(120) == 0, process.stderr.read().decode()
    process.stderr.close()
    assert hashes(tmp_path) == hashes(tiny_runs)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_dead_worker_is_replaced(tiny_runs, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: list(tmp_path.glob("*/run.json")))
    os.kill(children(process)[0], signal.SIGKILL)
    assert process.wait(120) == 0, process.stderr.read().decode()
    process.stderr.close()
    assert hashes(tmp_path) == hashes(tiny_runs)


def test_ctrl_c_stops_the_workers(tmp_path):
    process = start(tmp_path)
    wait_for(lambda: list(tmp_path.glob("*/run.json")))
    workers = children(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) != 0
    assert b"KeyboardInterrupt" in process.stderr.read()
    process.stderr.close()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_a_worker_that_always_dies_is_given_up_with_a_hint(tiny_blueprint, tmp_path, monkeypatch):
    monkeypatch.setattr("vitzoo_hf.launch.local._work", _die)
    with pytest.raises(ZooError, match=r"the worker training sl-s1 died 3 times \(exit code \d\).*fewer workers"):
        launch(tiny_blueprint, tmp_path, workers=1, progress=False)


def _die(connection, *arguments):
    connection.recv()
    os._exit(7)


def test_a_mistake_in_a_worker_is_one_line_here(tmp_path):
    text = TINY.read_text().replace("digits: {size: 8}", "digits: {size: 12}")
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ZooError, match=r"takes 1 channels of 8×8, images 'digits' have 1 of 12×12"):
        launch(Blueprint.load(tmp_path / "wrong.yaml"), tmp_path / "runs", progress=False)


def test_a_diverged_parent_leaves_its_children_out(tiny_blueprint, tmp_path):
    place = RunFolder(tmp_path / "cl-s1")
    from vitzoo_hf.training.run import run_spec

    run = next(run for run in tiny_blueprint.runs if run.run_id == "cl-s1")
    place.open(run_spec(tiny_blueprint, run))
    place.record_divergence(1, "for the test")
    summary = launch(tiny_blueprint, tmp_path, workers=1, progress=False)
    assert list(summary.diverged) == ["cl-s1"]
    assert len(summary.orphaned) == 4
    assert len(summary.finished) == 5


def test_two_trainings_cannot_share_a_folder(tiny_blueprint, tmp_path):
    with exclusive(tmp_path), pytest.raises(ZooError, match="another process is working in"):
        launch(tiny_blueprint, tmp_path, progress=False)


def test_a_folder_that_cannot_be_written_is_one_line(tiny_blueprint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match=r"cannot write into .*file/runs"):
        launch(tiny_blueprint, tmp_path / "file" / "runs", progress=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stacks_fit_the_device(tiny_blueprint, device, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64_000_000, 64_000_000))
    stacks = [default_stack(tiny_blueprint, device, workers) for workers in (1, 2, 1000)]
    if device == "cpu":
        assert stacks == [1, 1, 1]
    else:
        assert stacks[0] // 2 == stacks[1]
        assert 32 >= stacks[0] > stacks[2] == 1


def test_no_stack_is_refused(tiny_blueprint, tmp_path):
    with pytest.raises(ZooError, match="stack is 0; it must be at least 1"):
        launch(tiny_blueprint, tmp_path, stack=0, progress=False)


def test_no_workers_are_refused(tiny_blueprint, tmp_path):
    with pytest.raises(ZooError, match="workers is 0; it must be at least 1"):
        launch(tiny_blueprint, tmp_path, workers=0, progress=False)
