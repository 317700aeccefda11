"""The shape of the code: sizes, layers, public names, what importing costs, linters."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import measure_house
import pytest
from places import REPOSITORY

MODULES = sorted((REPOSITORY / "vitzoo_hf").rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_modules_and_functions_stay_small(module):
    text = module.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno <= 60, node.name


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "timm", "datasets", "numpy", "pandas", "pyarrow", "matplotlib")
    code = f"import sys, vitzoo_hf; sys.exit(any(name in sys.modules for name in {heavy!r}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names():
    import vitzoo_hf as vz

    names = "Blueprint Layout Population Zoo ZooError accuracy agreement cka cosine_similarity cross_entropy evaluate"
    names += (
        " expected_calibration_error flatten predictions reconstruct unflatten verify weight_distances weights_of"
    )
    names += (
        " brier_score class_accuracy prediction_entropy cohen_kappa error_consistency error_overlap jensen_shannon"
    )
    names += " FeatureFile MinibatchCKA cka_between"
    names += " part_distances task_vectors weight_statistics weight_quantiles singular_values stable_rank"
    names += " zoo_task_vectors zoo_weight_metrics"
    names += " __version__"
    assert sorted(vz.__all__) == sorted(names.split())
    for name in vz.__all__:
        assert getattr(vz, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vz.nothing  # noqa: B018


def test_public_functions_keep_their_names_beside_packages():
    code = "import vitzoo_hf.metrics.cka, vitzoo_hf.evaluation.evaluate, vitzoo_hf as vz; import sys;"
    code += "sys.exit(not (callable(vz.cka) and callable(vz.evaluate)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_timm_is_imported_where_its_import_is_prepared():
    importing = []
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "timm" for name in names):
                importing.append(module.name)
    assert set(importing) == {"timm_import.py", "vit.py"}


def test_pickles_are_read_in_one_place_and_only_as_plain_tensors():
    for module in MODULES:
        text = module.read_text(encoding="utf-8")
        assert "torch.save(" not in text
        if module.name != "pickles.py":
            assert "import pickle" not in text
            assert "torch.load(" not in text
    (call,) = re.findall(
        r"torch\.load\(opened.*\)", (REPOSITORY / "vitzoo_hf" / "convert" / "pickles.py").read_text()
    )
    assert "weights_only=True" in call


TOPICS = {
    "apply": ["cuda_budgets"],
    "apply/autoencoder": ["cuda_budgets", "memory"],
    "apply/distribution_inference": ["cuda_budgets", "membership_memory", "memory", "reliance_memory"],
    "apply/soup": ["memory"],
    "blueprint": ["paper", "world_blueprints"],
    "convert": ["hostile"],
    "evaluation": ["cuda_budgets"],
    "experiments": ["results", "smoke"],
    "launch": ["faults", "relative_folders"],
    "metrics": ["cka_batches", "cuda_budgets", "feature_file", "spectra"],
    "models": ["cuda_budgets"],
    "publish": ["hub"],
    "report": ["plot_modes"],
    "training": ["cuda_budgets"],
    "zoo": ["cuda_budgets", "hostile", "memory", "olah", "remote", "stream_conventions", "stream_drivers"],
}
"""Folder of tests -> what its files are about that are named after no module or folder of the package."""


def test_tests_are_laid_out_like_the_package():
    """A folder of tests is one of the package or experiments/; its files are named after a module, or a topic."""
    topics = {}
    for file in sorted((REPOSITORY / "tests").rglob("*/test_*.py")):
        folder = file.parent.relative_to(REPOSITORY / "tests")
        tested = REPOSITORY / folder if folder.parts[0] == "experiments" else REPOSITORY / "vitzoo_hf" / folder
        assert tested.is_dir(), f"{file} lies in no folder of the package"
        name = file.stem.removeprefix("test_")
        if not (tested / f"{name}.py").is_file() and not (tested / name).is_dir() and name != tested.name:
            topics.setdefault(folder.as_posix(), []).append(name)
    assert topics == TOPICS


def test_the_house_keeps_its_limits():
    figures = measure_house.limited()
    assert figures.pop("contracts of independence") >= 1
    limits = {
        "modules in the largest folder": 14,
        "lines of the longest module": 400,
        "lines of the longest body": 60,
        "import layers": 12,
    }
    assert figures.keys() == limits.keys()
    assert {name: value for name, value in figures.items() if value > limits[name]} == {}


def test_the_house_gets_no_worse():
    """Figures of names, comments, types and size, beside those of tests/house.json."""
    stored = json.loads(measure_house.STORED.read_text(encoding="utf-8"))
    worse = measure_house.worse(measure_house.ratchet(), stored)
    assert not worse, f"worse than tests/house.json: {worse}; mend them. When figures improve, {measure_house.ADVICE}"


def test_figures_of_a_module_counted_by_hand():
    text = '''"""A module
of two lines."""

from typing import Any  # a reason

given = 1


def area(side: float) -> Any:
    """Return it.

    Args:
        side: of the square.
        other (int): the side (of it).
    """
    # why
    total: Any = side**2
    return total
'''
    assert measure_house.lines_of_code(text) == 5
    assert measure_house.longest_body(text) == 4
    assert measure_house.comments(text) == 2
    assert measure_house.uses_of_any(text) == 2
    assert [name for _, name in measure_house.assigned_names(text)] == ["given", "total"]
    assert [number for number, _ in measure_house.entries(text)] == [13, 14]
    fragments = [bool(measure_house.FRAGMENT.match(line)) for _, line in measure_house.entries(text)]
    assert fragments == [True, False]


def test_a_worse_figure_is_named_in_its_direction():
    stored = {"lines of code": 10, "comments per 100 lines": 3.0}
    assert measure_house.worse({"lines of code": 9, "comments per 100 lines": 3.5}, stored) == {}
    figures = {"lines of code": 11, "comments per 100 lines": 2.5}
    assert measure_house.worse(figures, stored).keys() == stored.keys()
    with pytest.raises(KeyError, match="comments per 100 lines"):
        measure_house.worse({"lines of code": 9}, stored)


def folder_imports() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports at any level, types only aside."""
    names = {".".join(module.relative_to(REPOSITORY).with_suffix("").parts): module for module in MODULES}
    imports = {}
    for name, module in names.items():
        tree = ast.parse(module.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        targets = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vitzoo_hf"):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    targets.add(inner if inner in names else node.module)
        imports[name] = {target if target in names else f"{target}.__init__" for target in targets}
    return imports


@pytest.mark.parametrize("depth", [2, 3, 4], ids=["packages", "modules and folders", "modules"])
def test_no_circle_of_imports(depth):
    """Between packages, between the modules and folders inside a package, and between single modules."""
    import networkx as nx

    graph = nx.DiGraph()
    for name, targets in folder_imports().items():
        source = tuple(name.split(".")[:depth])
        for target in targets:
            # a package's front hands on names of its modules, which do not import it back
            if not target.endswith("__init__") and not name.endswith("__init__"):
                graph.add_edge(source, tuple(target.split(".")[:depth]))
    graph.remove_edges_from(nx.selfloop_edges(graph))
    assert not list(nx.simple_cycles(graph))


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports"], ["mypy"]],
    ids=["ruff check", "ruff format", "lint-imports", "mypy"],
)
def test_linters_are_content(command):
    tool = Path(sys.executable).parent / command[0]
    result = subprocess.run([tool, *command[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
