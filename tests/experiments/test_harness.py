"""A run of one cell replaces its own rows of a table; provenance, Markdown and splicing."""

import ast
import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import harness
import numpy as np
import pandas as pd
import pytest
from places import REPOSITORY

from vitzoo_hf.format.schema import ZooError

EXPERIMENTS = REPOSITORY / "experiments"
KEYS = ("cell", "knob")


@pytest.fixture
def whole() -> pd.DataFrame:
    """12 cells of 2 rows each; a cell is called null, and a number is missing in some."""
    rows = list(itertools.product(("null", "a, b", "c"), (0.0, 0.2, 10.0, 1e-3), "kt"))
    table = pd.DataFrame(rows, columns=["cell", "knob", "attack"])
    values = np.random.default_rng(0).normal(size=len(table))
    return table.assign(value=values, r2=np.where(table["attack"] == "k", values**2, np.nan))


def test_a_run_of_one_cell_replaces_its_rows_and_leaves_all_others_to_the_byte(whole, tmp_path):
    file = tmp_path / "table.csv"
    harness.write_table(whole, file, KEYS)
    lines = file.read_text().splitlines()
    assert lines == whole.to_csv(index=False, float_format="%.6g").splitlines()
    for cell, knob in whole[list(KEYS)].drop_duplicates().itertuples(index=False):
        mine = (whole["cell"] == cell) & (whole["knob"] == knob)
        harness.write_table(whole[mine].assign(value=7.5), file, KEYS)
        changed = file.read_text().splitlines()
        assert len(changed) == len(lines)
        kept = [before == after for before, after in zip(lines[1:], changed[1:], strict=True)]
        assert kept == (~mine).tolist()
        assert all(line.split(",")[-2] == "7.5" for line, other in zip(changed[1:], kept, strict=True) if not other)
        harness.write_table(whole[mine], file, KEYS)
        assert file.read_text().splitlines() == lines


def test_a_cell_of_fewer_rows_leaves_none_of_its_old_ones_and_a_new_cell_comes_last(whole, tmp_path):
    file = tmp_path / "table.csv"
    harness.write_table(whole, file, KEYS)
    harness.write_table(whole.iloc[:1].assign(value=1.0), file, KEYS)
    harness.write_table(whole.iloc[:2].assign(cell="new"), file, KEYS)
    table = pd.read_csv(file, keep_default_na=False)
    assert len(table) == len(whole) - 1 + 2
    assert table["attack"][0] == "k"
    assert table["knob"][1] == 0.2
    assert list(table["cell"][-2:]) == ["new", "new"]


def test_whole_numbers_and_floats_name_one_cell(tmp_path):
    file = tmp_path / "table.csv"
    harness.write_table(pd.DataFrame({"seed": [0.0, 1.0, None], "value": [1, 2, 3]}), file, ["seed"])
    harness.write_table(pd.DataFrame({"seed": [1], "value": [9]}), file, ["seed"])
    assert pd.read_csv(file)["value"].tolist() == [1, 9, 3]


def test_sorted_tables_are_in_one_order_however_their_cells_came(whole, tmp_path):
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    for part in (whole.iloc[10:], whole.iloc[:10]):
        harness.write_table(part, one, KEYS, order=[*KEYS, "attack"])
    harness.write_table(whole, other, KEYS, order=[*KEYS, "attack"])
    assert one.read_bytes() == other.read_bytes()
    assert pd.read_csv(one)["knob"][:8].tolist() == [0, 0, 0.001, 0.001, 0.2, 0.2, 10, 10]


@pytest.mark.parametrize("change", ["lacking", "new", "renamed"])
def test_changed_columns_are_refused_and_the_table_stays(whole, tmp_path, change):
    file = tmp_path / "table.csv"
    harness.write_table(whole, file, KEYS)
    before = file.read_bytes()
    changed = {
        "lacking": whole.drop(columns="r2"),
        "new": whole.assign(extra=1),
        "renamed": whole.rename(columns={"r2": "extra"}),
    }[change]
    with pytest.raises(ZooError, match=r"columns differ.*; move the file away") as error:
        harness.write_table(changed.iloc[:2], file, KEYS)
    assert "\n" not in str(error.value)
    assert ("lacking: r2" in str(error.value)) == (change != "new")
    assert ("new: extra" in str(error.value)) == (change != "lacking")
    assert file.read_bytes() == before
    with pytest.raises(ZooError, match="other tell cells apart"):
        harness.write_table(whole, file, ["cell", "other"])
    harness.write_table(whole[whole.columns[::-1]].iloc[:2], file, KEYS)
    assert file.read_bytes() == before, "an order of columns is no difference"


def test_an_interrupted_write_leaves_the_table_as_it_was(whole, tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    harness.write_table(whole, file, KEYS)
    before = file.read_bytes()
    real = pd.DataFrame.to_csv

    def interrupted(table: pd.DataFrame, path: object = None, **options: object) -> object:
        if path is None:
            return real(table, path, **options)
        Path(str(path)).write_text("cell,kn")
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harness.write_table(whole.iloc[:2], file, KEYS)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_every_committed_table_of_cells_merges_with_itself_to_the_byte(tmp_path):
    """The harness reads and writes all tables of results/ without a change, whatever wrote them."""
    files = [file for file in (REPOSITORY / "results").rglob("*.csv") if file.stat().st_size < 200_000]
    assert len(files) > 30
    for file in files:
        copy = tmp_path / file.name
        copy.write_bytes(file.read_bytes())
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        harness.write_table(table.iloc[:1], copy, list(table))
        assert copy.read_bytes() == file.read_bytes(), file


def test_provenance_has_commit_and_command_and_no_place(tmp_path, monkeypatch):
    script = REPOSITORY / "experiments" / "soup.py"
    monkeypatch.setattr(sys, "argv", [str(script), "/home/somebody/zoos/desk", "desk", "--arms", "S B"])
    record = harness.provenance()
    assert record["command"] == "python experiments/soup.py desk desk --arms 'S B'"
    assert record["commit"]
    assert {"date", "torch", "python", "cores"} <= record.keys()
    assert "somebody" not in str(record) + harness.provenance_line()
    file = tmp_path / "provenance.json"
    for number in range(3):
        harness.write_provenance(file, {"run": number}, merged=True)
    assert file.read_text().endswith("}\n")
    assert harness.read_json(file) == {"run": 2, "earlier": [{"run": 0}, {"run": 1}]}
    harness.write_provenance(file, {"run": 3})
    assert harness.read_json(file) == {"run": 3}


def test_markdown_tables_and_intervals():
    assert harness.markdown(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert harness.header("a", "b") == "| a | b |\n|---|---|"
    assert harness.gain_interval([0.01, 0.01]) == "+1.00 (+1.00 to +1.00)"


def test_splicing_replaces_between_marks_or_refuses(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before <mark>\nold\n\nafter")
    harness.splice(file, "<mark>\n", "\n\n", "new")
    assert file.read_text() == "before <mark>\nnew\n\nafter"
    for start, end in (("<lost>", "\n\n"), ("e", "\n"), ("<mark>", "<lost>")):
        with pytest.raises(ZooError, match="holds"):
            harness.splice(file, start, end, "newer")
    assert file.read_text() == "before <mark>\nnew\n\nafter"


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (ZooError("no such zoo"), "soup.py: no such zoo"),
        (PermissionError(13, "Permission denied", "out"), "soup.py: out: Permission denied"),
        (OSError("broken"), "soup.py: broken"),
        (KeyboardInterrupt(), "\nsoup.py: interrupted"),
    ],
)
def test_a_fault_of_the_caller_is_told_without_a_traceback(
    fault: BaseException, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> None:
        raise fault

    monkeypatch.setattr(sys, "argv", ["experiments/soup.py"])
    with pytest.raises(SystemExit, match=f"^{line}$"):
        harness.run_main(main)


def test_a_fault_of_the_code_keeps_its_traceback() -> None:
    def main() -> None:
        raise KeyError("column")

    with pytest.raises(KeyError):
        harness.run_main(main)


def calls(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Give the name of each function or method that a source calls, and the source of its positional arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            yield name, [ast.unparse(argument) for argument in node.args]


REPLACED = {
    "arithmetic.py": ["landscape(zoo, tuned, arguments.name)"],  # one plane, one cell
    "publish.py": ["evaluations", "index[columns]", "pairs"],  # of one zoo
    "rebasin.py": ["medians"],  # of all merged pairs
    "distribution_inference/report.py": ["table"],  # verdicts on all merged tables
    "autoencoder/grid.py": [  # merged before: which cells are chosen depends on all of them
        "rows.loc[shown.index]",
        "table[table['variant'] != '']",
        "table[table['variant'] == '']",
    ],
}
"""Script -> the tables that it writes whole, in the order of their names."""
STUDIES = sorted(file for file in EXPERIMENTS.rglob("*.py") if file.name != "harness.py")


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: str(file.relative_to(EXPERIMENTS)))
def test_experiments_write_tables_through_the_harness_and_merge_them_by_cell(file):
    whole = []
    for name, arguments in calls(ast.parse(file.read_text(encoding="utf-8"))):
        assert name not in {"to_parquet", "to_excel", "savetxt"}, "tables are written by the harness"
        assert name != "to_csv" or not arguments, "to a file only by write_table and write_cell of the harness"
        if name == "write_table" and "WHOLE" in arguments:
            whole.append(arguments[0])
    assert sorted(whole) == REPLACED.get(str(file.relative_to(EXPERIMENTS)), [])


def test_a_table_cannot_be_written_without_saying_what_tells_its_cells_apart(whole, tmp_path):
    with pytest.raises(TypeError, match="keys"):
        harness.write_table(whole, tmp_path / "table.csv")
    file = tmp_path / "table.csv"
    for part in (whole, whole.iloc[:2]):
        harness.write_table(part, file, harness.WHOLE)
    assert len(pd.read_csv(file)) == 2


TABLES = {
    "soup/soups_*": ["design"],
    "soup/epochs_*": ["run_id"],
    "soup/epoch_gains_*": ["stage", "factor_optimizer", "factor_lr", "average"],
    "arithmetic/additions_*": ["one", "two"],
    "arithmetic/extensions_*": ["run_id"],
    "arithmetic/negations_*": ["child"],
    "lineage/????": ["zoo", "case"],
    "lineage/*_missing_parents": ["zoo", "rule", "case"],
    "lineage/*_wrong_edges": ["zoo", "method"],
    "properties/*": ["target", "rows", "features", "model", "split"],
    "desk/index": ["model_id"],
    "desk/evaluations": ["model_id"],
}


@pytest.mark.parametrize("pattern", TABLES)
def test_committed_tables_take_a_run_of_any_cell_at_its_place(pattern, tmp_path):
    """A run of one cell changes no byte outside it, so that the keys of each experiment tell its own tables apart."""
    keys = TABLES[pattern]
    files = list((REPOSITORY / "results").glob(f"{pattern}.csv"))
    assert files
    for file in files:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        cells = list(table.groupby(keys, sort=False))
        assert len(cells) > 1 or len(table) == 1
        copy = tmp_path / file.name
        copy.write_bytes(file.read_bytes())
        for _, cell in (cells[0], cells[len(cells) // 2], cells[-1]):
            harness.write_table(cell, copy, keys)
            assert copy.read_bytes() == file.read_bytes(), file


def test_a_rung_measured_later_lies_beside_the_others_of_its_pair(tmp_path):
    """Rungs of `rebasin` merge by the harness: the table of all rungs comes out whichever is measured last."""
    rebasin = importlib.import_module("rebasin")
    stored = REPOSITORY / "results" / "rebasin" / "desk_barriers.csv"
    table = pd.read_csv(stored, dtype=str, keep_default_na=False)
    keys, file = [*rebasin.PAIR, "families"], tmp_path / "barriers.csv"
    later = table["families"] == "mlp"
    assert later.any()
    for part in (table[~later], table[later]):
        harness.write_table(part, file, keys, order=rebasin.by_pair_and_rung)
    assert file.read_bytes() == stored.read_bytes()


def test_what_a_killed_process_had_begun_is_no_finished_cell(tmp_path):
    harness.write_cell(pd.DataFrame({"value": [1 / 3]}), tmp_path / "b.csv")
    harness.write_cell(pd.DataFrame({"value": [1 / 3]}), tmp_path / "a.csv", digits=2)
    (tmp_path / ".tmp-x.csv").write_text("val")
    assert [file.name for file in harness.cell_files(tmp_path)] == ["a.csv", "b.csv"]
    assert pd.read_csv(tmp_path / "b.csv")["value"][0] == 1 / 3
    assert (tmp_path / "a.csv").read_text() == "value\n0.33\n"
