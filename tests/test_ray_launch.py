"""Runs on a real Ray cluster of this machine, workers and drivers killed, against the runs of `launch`."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray_processes import processes_of, workers_at_a_task
from test_launch import hashes, wait_for

from vitzoo_hf import ray_launch, ray_worker
from vitzoo_hf.blueprint import Blueprint
from vitzoo_hf.checkpoint import RunFolder
from vitzoo_hf.launch import exclusive, launch
from vitzoo_hf.pack import pack
from vitzoo_hf.ray_launch import launch_on_ray
from vitzoo_hf.ray_worker import Job, train_on_worker, versions
from vitzoo_hf.run_storage import RunStorage
from vitzoo_hf.schema import ZooError
from vitzoo_hf.train import run_spec

TESTS = Path(__file__).parent
TASK = "train_on_worker"


def start(blueprint: Path, folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """`vitzoo train --ray` in a session of its own, with everything that Ray starts."""
    code = "from vitzoo_hf.cli import main; main()"
    command = [sys.executable, "-c", code, "train", blueprint, "--out", folder, "--ray", *arguments, "--quiet"]
    return subprocess.Popen(
        list(map(str, command)), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> str:
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors
    return output


def kill_worker(process: subprocess.Popen[str], until) -> None:
    wait_for(until)
    wait_for(lambda: workers_at_a_task(process.pid, TASK))
    os.kill(workers_at_a_task(process.pid, TASK)[0], signal.SIGKILL)


def kill_driver(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_of(process.pid))


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "runs"
    launch(Blueprint.load(TESTS / "small.yaml"), folder, workers=1, progress=False)
    return folder


def test_a_killed_worker_continues_from_its_last_upload_to_the_same_zoo(small_runs, tmp_path):
    pytest.importorskip("ray")
    storage = tmp_path / "storage"
    process = start(TESTS / "small.yaml", tmp_path / "runs", "--storage", f"file://{storage}")
    kill_worker(process, lambda: len(list(storage.glob("s1/epoch-*.json"))) > 3)
    before = {file: file.stat().st_mtime_ns for file in storage.glob("s1/epoch-*.json")}
    assert "3 runs finished" in finish(process)
    assert 3 < len(before) < 13
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert hashes(tmp_path / "runs") == hashes(storage) == hashes(small_runs)
    assert not processes_of(process.pid)
