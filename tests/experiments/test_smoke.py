"""Every benchmark and experiment runs to its end in its smallest size, writes only its results, and tells faults."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import pytest
from gpu_script import gpu_parts
from places import REPOSITORY, TESTS
from soup_zoo import noisy_zoo

from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.evaluation.evaluate import evaluate
from vitzoo_hf.launch.local import launch
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.zoo import Zoo

BENCHMARKS, EXPERIMENTS, RESULTS = "benchmarks", "experiments", "results"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Smoke(NamedTuple):
    """How a script is run in its smallest size.

    Attributes:
        arguments: a line; GRID and NOISY stand for zoos, OUT for an empty folder.
        prints: part of the ratios, table or place that it prints; empty for a script that writes files and no more.
        first: another script with its arguments, whose results in OUT this one reads.
        slow: takes more than about 15 s of a core.
        fashion_mnist: reads images that neither pip nor the repository brings.
    """

    arguments: str = "--smoke"
    prints: str = "="
    first: tuple[str, str] | None = None
    slow: bool = False
    fashion_mnist: bool = False


AUTOENCODERS = "NOISY noisy --runs OUT --steps 3 --rates 1e-3 --seeds 0 --arms S --processes 1"
SMOKES = {
    f"{BENCHMARKS}/agreement.py": Smoke(prints="times_ours=", slow=True),
    f"{BENCHMARKS}/cka_pairs.py": Smoke("--smoke --large", prints="times_cka="),
    f"{BENCHMARKS}/distances.py": Smoke(prints="ours"),
    f"{BENCHMARKS}/gpu.sh": Smoke("--simulate --out OUT", prints="autoencoder: done", slow=True),
    f"{BENCHMARKS}/gpu_wheels.sh": Smoke("--list", prints="datasets"),
    f"{BENCHMARKS}/launch_choices.py": Smoke(prints="over_the_best=", slow=True),
    f"{BENCHMARKS}/on_demand_images.py": Smoke(prints="times_ours_wall="),
    f"{BENCHMARKS}/population_forward.py": Smoke(prints="ours_over_best_other="),
    f"{BENCHMARKS}/quickstart.py": Smoke(prints='"size_ratio"', slow=True),
    f"{BENCHMARKS}/readme.py": Smoke("", prints=""),
    f"{BENCHMARKS}/reconstruct.py": Smoke(prints="times_faster="),
    f"{BENCHMARKS}/remote.py": Smoke(prints="times_ours=", slow=True),
    f"{BENCHMARKS}/stacked_training.py": Smoke(prints="ratio="),
    f"{BENCHMARKS}/many_rows.py": Smoke(prints="pickled stream of 100 rows, kB"),
    f"{BENCHMARKS}/storage.py": Smoke(prints="times_to_parquet_on_list="),
    f"{BENCHMARKS}/stream.py": Smoke(prints="ours_over_it_wall="),
    f"{BENCHMARKS}/world_training.py": Smoke(prints="over_together=", slow=True, fashion_mnist=True),
    f"{EXPERIMENTS}/arithmetic.py": Smoke("GRID grid", prints="", slow=True),
    f"{EXPERIMENTS}/autoencoder/grid.py": Smoke(AUTOENCODERS, prints="rank_correlation", slow=True),
    f"{EXPERIMENTS}/autoencoder/curve.py": Smoke(
        "NOISY noisy --folder OUT --steps 3 --sizes 2", prints="retention", slow=True
    ),
    f"{EXPERIMENTS}/autoencoder/report.py": Smoke("", prints=""),
    f"{EXPERIMENTS}/autoencoder/use.py": Smoke(
        "NOISY noisy --runs OUT --arms S --seeds 0 --bandwidths 0.2",
        prints="generating by S",
        first=("grid.py", AUTOENCODERS),
        slow=True,
    ),
    f"{EXPERIMENTS}/distribution_inference/replicate.py": Smoke(
        "--only B --runs OUT/cells --out OUT", prints="0 cells left", slow=True
    ),
    f"{EXPERIMENTS}/distribution_inference/report.py": Smoke("", prints=""),
    f"{EXPERIMENTS}/lineage.py": Smoke("GRID", prints="epochs after", slow=True),
    f"{EXPERIMENTS}/properties.py": Smoke("GRID grid --final --repeats 1 --shuffles 1", prints="", slow=True),
    f"{EXPERIMENTS}/publish.py": Smoke("GRID grid", prints="grid", slow=True),
    f"{EXPERIMENTS}/rebasin.py": Smoke(
        "GRID grid --pairs 1 --within 1 --curves 1 --images 50", prints="rebasin", slow=True
    ),
    f"{EXPERIMENTS}/soup.py": Smoke("GRID grid", prints="", slow=True),
    f"{EXPERIMENTS}/distribution_inference/world_cells.py": Smoke(
        "--folder OUT --smoke", prints="advantage", slow=True, fashion_mnist=True
    ),
    f"{EXPERIMENTS}/distribution_inference/world_draws.py": Smoke(
        "--folder OUT --draws 2 --smoke", prints="value", slow=True, fashion_mnist=True
    ),
}


PARTS = {f"{BENCHMARKS}/gpu_{part}.py" for part in gpu_parts()}
"""Scripts that `gpu.sh` runs."""


def scripts() -> list[str]:
    """Files of both folders that are run, not imported."""
    files = [
        file
        for folder in (BENCHMARKS, EXPERIMENTS)
        for file in (REPOSITORY / folder).rglob("*")
        if file.suffix == ".sh" or (file.suffix == ".py" and "__main__" in file.read_text(encoding="utf-8"))
    ]
    return [str(file.relative_to(REPOSITORY)) for file in files]


def test_every_script_has_a_smoke_run_and_no_smoke_run_is_stale() -> None:
    assert sorted(scripts()) == sorted([*SMOKES, *PARTS])


@pytest.fixture(scope="module")
def noisy(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one layout in all three splits, with which a weight autoencoder trains and is judged."""
    folder = tmp_path_factory.mktemp("noisy") / "zoo"
    zoo = noisy_zoo(folder, tiny_zoo, runs=15, epochs=1, splits=("train", "validation", "test"))
    evaluate(zoo, progress=False).write(folder)
    return folder


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with the factors of the desk zoo, evaluated."""
    folder = tmp_path_factory.mktemp("grid")
    blueprint = Blueprint.load(TESTS / "grid.yaml")
    launch(blueprint, folder / "runs", workers=2, stack=16, progress=False)
    zoo = pack(blueprint, folder / "runs", folder / "zoo", progress=False)
    evaluate(Zoo(zoo), progress=False).write(zoo)
    return zoo


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of all but the package, since experiments write into its folder of results."""
    skipped = shutil.ignore_patterns(".*", "vitzoo_hf", "__pycache__", "*.egg-info", "build")
    return Path(shutil.copytree(REPOSITORY, tmp_path / "repository", ignore=skipped))


def run(script: Path, arguments: list[str], folder: Path) -> str:
    """What a script prints, run from an empty folder in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHON"] = sys.executable  # which scripts of the shell run
    command = ["bash" if script.suffix == ".sh" else sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def state(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def marked(script: str) -> object:
    return pytest.param(script, marks=[pytest.mark.slow] if SMOKES[script].slow else [])


@pytest.mark.parametrize("script", [marked(script) for script in SMOKES])
def test_script_runs_in_its_smallest_size(
    script: str, repository: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    smoke, out, here = SMOKES[script], tmp_path / "out", tmp_path / "here"
    if smoke.fashion_mnist and not any(FASHION_MNIST.glob("*.gz")):
        pytest.skip("needs Debian's dataset-fashion-mnist")
    out.mkdir()
    here.mkdir()

    def places(line: str) -> list[str]:
        for name in ("GRID", "NOISY"):
            if name in line.split():
                line = line.replace(name, str(request.getfixturevalue(name.lower())))
        return line.replace("OUT", str(out)).split()

    if smoke.first:
        run(repository / Path(script).with_name(smoke.first[0]), places(smoke.first[1]), here)
    before = state(repository)
    assert smoke.prints in run(repository / script, places(smoke.arguments), here)
    assert not list(here.iterdir())
    if script.startswith(BENCHMARKS):
        assert state(repository) == before
    else:
        changed = {name for name, content in state(repository).items() if before.get(name) != content}
        assert {name.split("/")[0] for name in changed} <= {RESULTS, "README.md"}


STUDIES = [script for script in scripts() if script.startswith(EXPERIMENTS)]
OF_ZOOS = [script for script in STUDIES if {"GRID", "NOISY"} & set(SMOKES[script].arguments.split())]


def with_fault(script: Path, fault: str) -> CodeType:
    """Compile a script whose `main` does nothing but raise."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    (main,) = (part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name == "main")
    main.body = ast.parse(fault).body
    return compile(tree, str(script), "exec")


def run_as_script(code: CodeType, script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a script in this process, which has the libraries loaded, and give the line with which it exits."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as ended:
        exec(code, {"__name__": "__main__", "__file__": str(script)})
    # Python prints a text that is no number to stderr and exits with status 1
    assert isinstance(ended.value.code, str)
    return ended.value.code


@pytest.mark.parametrize("script", STUDIES)
def test_every_experiment_ends_in_one_line_at_a_fault(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = REPOSITORY / script
    code = with_fault(file, "from vitzoo_hf.format.schema import ZooError\nraise ZooError('no such zoo')")
    assert run_as_script(code, file, [], monkeypatch) == f"{file.name}: no such zoo"


@pytest.mark.parametrize("script", OF_ZOOS)
def test_every_experiment_of_a_zoo_refuses_a_folder_that_is_none(
    script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, absent = REPOSITORY / script, tmp_path / "absent"
    places = {"GRID": str(absent), "NOISY": str(absent), "grid": "absent", "noisy": "absent"}
    arguments = [places.get(word, word.replace("OUT", str(tmp_path))) for word in SMOKES[script].arguments.split()]
    code = compile(file.read_text(encoding="utf-8"), str(file), "exec")
    line = run_as_script(code, file, arguments, monkeypatch)
    assert line.startswith(f"{file.name}: ")
    assert str(absent) in line
    assert "\n" not in line
    assert not list((REPOSITORY / "results").rglob("*absent*"))
    assert not list(tmp_path.iterdir())
