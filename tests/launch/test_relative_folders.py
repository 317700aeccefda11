"""Verbs that lock folders or hand them to other processes, given relative names, from a directory of their own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from places import TESTS
from ray_processes import processes_of
from run_folders import hashes

from vitzoo_hf.format.atomic import exclusive
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

VERB = "from vitzoo_hf.cli import main; main()"
ARGUMENTS = {"plain": (), "stacked": ("--stack", "4"), "ray": ("--ray",), "stacked on ray": ("--ray", "--stack", "4")}


@pytest.fixture
def python():
    """Runs code as a process with a session of its own; ends all that it started."""
    sessions = []

    def call(code: str, *arguments: object) -> str:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        sessions.append(process.pid)
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
        return output

    yield call
    for session in sessions:
        for process_id in processes_of(session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "stacked on ray" else []) for kind in ARGUMENTS]
)
def test_training_into_a_relative_folder_ends_whole(kind, python, tiny_runs, tmp_path, monkeypatch):
    if "ray" in kind:
        pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    output = python(VERB, "train", TESTS / "tiny.yaml", "--out", "runs", *ARGUMENTS[kind], "--quiet")
    assert "10 runs finished in runs" in output
    weights = hashes(Path("runs"))
    assert weights.keys() == hashes(tiny_runs).keys()
    if "stacked" not in kind:  # stacked runs are equal up to rounding
        assert weights == hashes(tiny_runs)
    assert [entry.name for entry in Path().iterdir()] == ["runs"]


def test_a_folder_is_locked_by_any_of_its_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    with exclusive(Path("link")) as folder:
        assert folder == tmp_path / "runs"
        for name in ("runs", "link", tmp_path / "link", "link/../runs"):
            with pytest.raises(ZooError, match="another process is working in"), exclusive(Path(name)):
                pass


def _write_pictures(folder: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (2, 40, 8, 8), dtype=np.uint8)
    for label, images in enumerate(values):
        (folder / str(label)).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / str(label) / f"{number}.png")


CLUSTER_ELSEWHERE = """
import os, ray, sys
here, elsewhere = sys.argv[1:]
os.chdir(elsewhere)
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
os.chdir(here)
from vitzoo_hf.cli.app import run
assert run(["train", "pictures.yaml", "--out", "runs", "--ray", "--quiet"]) == 0
assert run(["evaluate", "zoo", "--ray", "local", "--quiet"]) == 0
"""


def test_workers_in_another_directory_reach_relative_folders_and_images(python, tiny_zoo, tmp_path):
    """The cluster was started in another directory, in which another zoo has the same relative name."""
    pytest.importorskip("ray")
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    shutil.copytree(tiny_zoo, here / "zoo", ignore=shutil.ignore_patterns("*cache*"))
    shutil.copytree(Zoo.sample().name, elsewhere / "zoo")
    _write_pictures(here / "pictures")
    text = (TESTS / "small.yaml").read_text()
    (here / "pictures.yaml").write_text(
        text.replace("{size: 8}", "{source: folder, path: pictures, size: 8, channels: 1}")
    )
    before = Zoo(here / "zoo").to_pandas("evaluations")
    python(CLUSTER_ELSEWHERE, here, elsewhere)
    assert {record.parent.name for record in (here / "runs").glob("*/epoch-*1.json")} == {"s1", "s1--adamw"}
    assert [entry.name for entry in elsewhere.iterdir()] == ["zoo"]
    after = Zoo(here / "zoo").to_pandas("evaluations")
    pd.testing.assert_frame_equal(after, before, rtol=1e-4, atol=1e-5)
