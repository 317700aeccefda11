"""A run of one cell replaces its own rows of a table; provenance, Markdown and splicing."""

import itertools
import sys
from pathlib import Path

import harness
import numpy as np
import pandas as pd
import pytest
from places import REPOSITORY

from vitzoo_hf.format.schema import ZooError

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
