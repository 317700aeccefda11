"""CONTRIBUTING, the workflows and the metadata of the wheel agree with the repository."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from places import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
TESTS_WORKFLOW = REPOSITORY / ".github" / "workflows" / "tests.yml"
SUPPORTED = [
    name.rsplit(" ", 1)[1]
    for name in PROJECT["project"]["classifiers"]
    if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", name)
]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def package_version() -> str:
    """Return the version at the place that pyproject.toml names for the build."""
    module, name = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"].rsplit(".", 1)
    return str(getattr(importlib.import_module(module), name))


def named_paths(text: str) -> list[str]:
    """Return the files and folders that Markdown text names: with a slash, or with the suffix of a file."""
    words = {word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}
    words |= set(re.findall(r"\]\(([^)#:]+)\)", text))
    return sorted(
        word for word in words if re.fullmatch(r"[\w./-]+/[\w./-]*|[\w.-]+\.(?:md|py|toml|txt|yml|yaml)", word)
    )


def test_contributing_is_short():
    assert CONTRIBUTING.count("\n") <= 60


def test_paths_are_read_from_code_and_links():
    text = "`a/b.py`, `pytest tests/x.py`, `SOURCES`, `ruff check .` and [c](docs/c.md) or [d](https://d.org/e)"
    assert named_paths(text) == ["a/b.py", "docs/c.md", "tests/x.py"]


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "RELEASING.md"])
def test_paths_that_documents_name_exist(document):
    paths = named_paths((REPOSITORY / document).read_text(encoding="utf-8"))
    assert paths
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_sections_of_the_readme_that_contributing_names_exist():
    headings = re.findall(r"^## (.+)$", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    sections = re.findall(r"`README\.md`, \"([^\"]+)\"", CONTRIBUTING)
    assert len(sections) >= 6
    for section in sections:
        assert any(heading.startswith(section.removesuffix("…").strip()) for heading in headings), section


def test_contributing_gives_a_place_for_each_kind_of_addition():
    first_column = " ".join(re.findall(r"^\| (an? [^|]+) \|", CONTRIBUTING, re.MULTILINE))
    kinds = ("metric", "image source", "checkpoint layout", "column of the index", "attack", "figure", "verb")
    assert [kind for kind in (*kinds, "experiment") if kind not in first_column] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_valid(workflow):
    text = workflow.read_text(encoding="utf-8")
    content = yaml.load(text, Loader=yaml.BaseLoader)  # the base loader leaves the key `on` a string
    assert content["on"]
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert job["runs-on"], name
        assert all(("uses" in step) != ("run" in step) for step in job["steps"]), name
        assert {*job.get("needs", "").split()} <= {*content["jobs"]}
    for version in re.findall(r"python-version: \"([\d.]+)\"", text):
        assert version in SUPPORTED


def test_tested_versions_are_those_the_package_claims():
    jobs = yaml.safe_load(TESTS_WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    assert jobs["tested"]["strategy"]["matrix"]["python-version"] == SUPPORTED
    lowest = SUPPORTED[0]
    assert PROJECT["project"]["requires-python"] == f">={lowest}"
    (set_up,) = [step for step in jobs["lowest"]["steps"] if "python-version" in step.get("with", {})]
    assert set_up["with"]["python-version"] == lowest
    assert PROJECT["tool"]["mypy"]["python_version"] == lowest
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"


def test_workflows_install_from_constraints_that_exist():
    files = re.findall(r"pip install -c (\S+)", TESTS_WORKFLOW.read_text(encoding="utf-8"))
    assert files == ["constraints.txt", "constraints-lowest.txt"]
    assert [name for name in files if not (REPOSITORY / name).is_file()] == []


def test_hooks_run_linters_of_the_extra_dev():
    content = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = content["repos"]
    assert local["repo"] == "local"
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    programs = [hook["entry"].split()[0] for hook in local["hooks"]]
    assert programs == ["ruff", "ruff", "lint-imports"]
    assert all((Path(sys.executable).parent / name).is_file() for name in programs)


def test_issue_templates_have_a_name_and_a_purpose():
    for file in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.md"):
        _, front, body = file.read_text(encoding="utf-8").split("---\n", 2)
        assert set(yaml.safe_load(front)) == {"name", "about"}
        assert body.strip()


def test_changelog_begins_with_unreleased_and_knows_the_version():
    headings = re.findall(r"^## \[(.+?)\]", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", package_version()]


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == package_version()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel of a copy, because a build writes beside its sources."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(REPOSITORY / name, source)
    for name in ("vitzoo_hf", "cards"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, source / "dist"], cwd=source, check=True, capture_output=True)
    (file,) = (source / "dist").glob("*.whl")
    return file


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_has_every_module_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    on_disk = {
        file.relative_to(REPOSITORY).as_posix()
        for file in (REPOSITORY / "vitzoo_hf").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    cards = {f"vitzoo_hf/cards/{file.name}" for file in (REPOSITORY / "cards").glob("*.jinja")}
    assert files == on_disk | cards


def test_metadata_of_the_wheel(wheel):
    fields = metadata(wheel)
    assert fields["Name"] == "vitzoo-hf"
    assert fields["Version"] == package_version()
    assert fields["Author"] == "vitzoo-hf authors"
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["License-File"] == "LICENSE"
    assert fields["Requires-Python"] == f">={SUPPORTED[0]}"
    assert fields["Description-Content-Type"] == "text/markdown"
    assert fields.get_payload() == (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert {f"Programming Language :: Python :: {version}" for version in SUPPORTED} <= {
        *fields.get_all("Classifier")
    }


def test_a_requirement_is_listed_once(wheel):
    extras = {"": PROJECT["project"]["dependencies"], **PROJECT["project"]["optional-dependencies"]}
    for extra, requirements in extras.items():
        names = [re.split(r"[<>=!~\[ ]", requirement)[0].lower() for requirement in requirements]
        assert sorted(names) == sorted(set(names)), extra
    assert {*metadata(wheel).get_all("Provides-Extra")} == {*PROJECT["project"]["optional-dependencies"]}


def test_python_m_is_the_same_program():
    command = [sys.executable, "-m", "vitzoo_hf"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == package_version()
    rows = subprocess.run([*command, "info", "sample", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(rows.stdout)
    mistake = subprocess.run([*command, "nothing"], capture_output=True, text=True, check=False)
    assert mistake.returncode == 2
    assert mistake.stderr.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_written_for_a_shell(tmp_path, monkeypatch, shell):
    from vitzoo_hf.cli.app import app, run

    monkeypatch.setenv("HOME", str(tmp_path))
    script = tmp_path / "completion"
    assert run(["--install-completion", "--shell", shell, "--output", str(script)]) == 0
    assert [verb for verb in app if not verb.startswith("-") and verb not in script.read_text()] == []
