"""What README and examples say is run; what they list is compared with the disk."""

import csv
import re
import shutil
import subprocess
import sys

import pytest
from places import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_readme_blocks_run(number, tiny_zoo, capsys):
    from vitzoo_hf.zoo import Zoo

    names = {"ZOO": str(tiny_zoo), "zoo": Zoo.sample()}
    exec(compile(PYTHON[number], f"README block {number}", "exec"), names)


def test_readme_blueprint_makes_six_models(tmp_path):
    from vitzoo_hf.blueprint.blueprint import Blueprint

    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "six.yaml").write_text(block)
    assert len(Blueprint.load(tmp_path / "six.yaml").runs) == 6


def test_readme_lists_every_setting_source_and_verb():
    from vitzoo_hf.blueprint.settings import KNOWN, SETTING_TYPES
    from vitzoo_hf.cli.app import app
    from vitzoo_hf.images.sources import SOURCES

    for name in [*SETTING_TYPES, *SOURCES]:
        assert f"`{name}`" in README, name
    for choices in KNOWN.values():
        assert f"({', '.join(choices)})" in README, choices
    verbs = {name for name in app if not name.startswith("-")}
    assert verbs == set(re.findall(r"^\| `vitzoo (\w+)", README, re.MULTILINE))


def test_readme_table_of_packages_is_the_disk_in_the_order_of_the_layers():
    """One row a package, from the bottom of the import contract to its top, and one a folder beside the package."""
    import tomllib

    contract = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [name.strip() for layer in reversed(contract["layers"]) for name in layer.split("|")]
    packages = [name for name in layers if (REPOSITORY / "vitzoo_hf" / name).is_dir()]
    assert re.findall(r"^\| `vitzoo_hf/(\w+)/`", README, re.MULTILINE) == packages
    top = re.findall(r"^\| `(\w+)/`", README, re.MULTILINE)
    assert {"loading_script", "cards", "experiments", "examples", "benchmarks", "results", "tests"} <= set(top)
    assert all((REPOSITORY / folder).is_dir() for folder in top)


def test_readme_results_are_those_of_the_results_file(tmp_path, monkeypatch):
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        import quickstart as benchmark
    finally:
        sys.path.pop(0)
    with (REPOSITORY / "benchmarks" / "results" / "quickstart.csv").open() as file:
        (row,) = csv.DictReader(file)
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    monkeypatch.setattr(benchmark, "REPOSITORY", tmp_path)
    benchmark.fill_readme(row)
    assert (tmp_path / "README.md").read_text() == README


def test_readme_data_path_is_that_of_the_results_files(tmp_path):
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        import readme
    finally:
        sys.path.pop(0)
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    readme.fill(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == README


def test_make_sample_runs(tmp_path):
    """On the sample itself, which is the smallest zoo with the mini zoo's factors."""
    from vitzoo_hf.zoo import Zoo

    script = REPOSITORY / "examples" / "make_sample.py"
    sample = REPOSITORY / "vitzoo_hf" / "sample"
    subprocess.run([sys.executable, script, sample, tmp_path / "again"], check=True, stdout=subprocess.DEVNULL)
    assert set(Zoo(tmp_path / "again").model_ids) == set(Zoo(sample).model_ids)


def test_the_sample_is_small_and_whole():
    import vitzoo_hf as vz

    folder = REPOSITORY / "vitzoo_hf" / "sample"
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 1_500_000
    zoo = vz.Zoo.sample()
    assert len(zoo) == 8
    assert len({row["run_id"] for row in zoo.rows()}) == 8
    stored = zoo.to_pandas("evaluations")["test_accuracy"]
    again = vz.evaluate(zoo, progress=False).evaluations["test_accuracy"]
    assert (stored.fillna(-1) - again.fillna(-1)).abs().max() <= 2 / 359


def test_constraints_cover_torch_and_its_torchvision():
    text = (REPOSITORY / "constraints.txt").read_text()
    assert "torch==" in text
    assert "torchvision==" in text


def test_lowest_constraints_are_the_bounds_of_the_package():
    """Torch's bound is lower than what could be run, which docs/dependencies.md says."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    bounds = dict(re.match(r"([\w-]+)>=([\w.]+)", text).groups() for text in project["dependencies"])
    lowest = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (REPOSITORY / "constraints-lowest.txt").read_text(), re.M))
    newest = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (REPOSITORY / "constraints.txt").read_text(), re.M))
    assert lowest.pop("torch") == newest["torch"]
    assert lowest["torchvision"] == newest["torchvision"]
    bounds.pop("torch")
    whole = re.compile(r"(\.0)+$")
    assert {name: whole.sub("", lowest[name]) for name in bounds} == {
        name: whole.sub("", bound) for name, bound in bounds.items()
    }
