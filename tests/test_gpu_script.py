"""`benchmarks/gpu.sh`: parts that fail or are stopped do not stop the next, and each leaves its rows."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_script import GPU_SH, gpu_parts
from places import REPOSITORY

MOST_SECONDS = 540
INTERPRETER = """\
#!/bin/sh
out=$3
case $1 in
  *gpu_tests.py) exit 1 ;;
  *gpu_equality.py) printf 'a\\n1\\n2\\n' >"$out/equality.csv"; exit 124 ;;
  *) printf 'a\\n1\\n' >"$out/$(basename "$1" .py | cut -c5-).csv"; echo measured ;;
esac
"""


def run(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    environment |= {"PYTHON": python, "PYTHONPATH": str(REPOSITORY)}
    command = ["bash", str(GPU_SH), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def interpreter(tmp_path: Path) -> str:
    """A stand-in for Python, under which the first part fails and the second is stopped."""
    file = tmp_path / "python"
    file.write_text(INTERPRETER)
    file.chmod(0o755)
    return str(file)


def test_a_part_that_fails_or_is_stopped_does_not_stop_the_next(tmp_path: Path, interpreter: str) -> None:
    done = run("--out", str(tmp_path / "out"), python=interpreter)
    assert done.returncode == 1
    limit = gpu_parts()["equality"]
    summary = [line.rpartition(",")[0] for line in done.stdout.splitlines()[-len(gpu_parts()) :]]
    assert summary[:2] == [
        "tests: failed, status 1, 0 lines of figures",
        f"equality: stopped after {limit} s, 2 lines of figures",
    ]
    assert summary[2:] == [f"{part}: done, 1 lines of figures" for part in list(gpu_parts())[2:]]
    assert (tmp_path / "out" / "gpu.log").read_text() == done.stdout


def test_all_is_well_only_where_every_part_is(tmp_path: Path, interpreter: str) -> None:
    done = run("--out", str(tmp_path / "out"), "stream", "metrics", python=interpreter)
    assert done.returncode == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["gpu.log", "metrics.csv", "stream.csv"]


def test_results_fit_the_limits_of_a_borrowed_machine(tmp_path: Path) -> None:
    """At most nine minutes, and eight files: a table a part and the log."""
    (limit,) = [int(line.removeprefix("ALL=")) for line in GPU_SH.read_text().splitlines() if line.startswith("ALL=")]
    # the last part may be given five seconds more to end
    assert limit + 5 <= MOST_SECONDS
    assert len(gpu_parts()) + 1 <= 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no folder for the results: give --out FOLDER or set OUT"),
        (["--out"], "no folder for the results"),
        (["--fast", "--out", "x"], "unknown option --fast"),
        (["--out", "x", "tables"], "unknown part tables; parts are tests equality"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_simulated_part_measures_and_says_that_it_is_simulated(tmp_path: Path) -> None:
    done = run("--simulate", "--out", str(tmp_path), "training")
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["gpu"] == "simulated" and float(row["ratio"]) > 0 for row in rows)


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path), "training")
    assert done.returncode == 1
    assert "sees no CUDA device; --simulate runs without one" in done.stdout
    assert not list(tmp_path.glob("*.csv"))
