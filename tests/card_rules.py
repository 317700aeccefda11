"""What a card must have: complete sections, and numbers counted again from the Parquet files without the package."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

STAGES = ("pretrain", "finetune")
SECTIONS = [
    *("What is inside", "Load it", "Configs", "Columns", "Results", "How it was created", "Factors", "Splits"),
    *("Licence", "Limits and known traps", "Verify", "Cite"),
]


def header_of(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def section(text: str, title: str) -> str:
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return found


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every table as rows of column -> cell, code marks removed."""
    found = []
    for lines in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        head, rule, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines.splitlines()
        ]
        assert set("".join(rule)) <= {"-"}, lines
        assert all(len(row) == len(head) for row in rows), lines
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def count(text: str) -> int:
    return int(text.replace(",", ""))


def without_code(text: str) -> str:
    return re.sub(r"`+[^`]*`+", "x", re.sub(r"(`{3,})\w*\n.*?\n\1", "x", text, flags=re.DOTALL))


def check_complete(text: str) -> None:
    """No section is missing or empty, no field is empty, nothing of the template is left."""
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    for title in SECTIONS:
        assert len(section(text, title).split()) > 3, title
    assert not re.search(r"\{\{|\{%|%\}|\{#|PATH_OR_ID|TODO|\bUndefined\b", text)
    assert not re.search(r"\b(None|nan|NaN)\b", without_code(text))
    for rows in tables(text):
        for row in rows:
            assert all(row.values()), row
    body = without_code(text)
    assert not re.search(r"^- *$|\(\)|: *\.|, *[.,;]|  \|", body, re.MULTILINE), body
    assert "\n\n\n" not in re.sub(r"(`{3,})\w*\n.*?\n\1", "x", text, flags=re.DOTALL)
    assert all(value not in (None, "", []) for value in header_of(text).values())


def check_numbers(text: str, folder: Path) -> None:
    """Counts and bytes against the files, accuracies against the index."""
    files = sorted(folder.glob("*/*.parquet"))
    rows = [row for file in files if file.parent.name == "index" for row in pq.read_table(file).to_pylist()]
    runs = {row["run_id"] for row in rows}
    facts, kept = tables(section(text, "What is inside"))
    inside = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", section(text, "What is inside"), re.MULTILINE))
    assert len(facts) == 8
    assert count(inside["checkpoints (rows)"]) == len(rows)
    stages = Counter(stage for _, stage in {(row["run_id"], row["stage"]) for row in rows})
    parents = {row["parent_id"] for row in rows} - {None}
    assert list(map(count, re.findall(r"[\d,]*\d", inside["training runs"]))) == [
        len(runs),
        stages[0],
        stages[1],
        len(parents),
    ]
    parameters = [row["num_parameters"] for row in rows]
    assert {count(part) for part in inside["parameters of a model"].split(" to ")} == {
        min(parameters),
        max(parameters),
    }
    assert count(inside["parameters in all"].split(", stored")[0]) == sum(parameters)
    weights = [file for file in files if file.parent.name == "weights"]
    assert list(map(count, re.findall(r"[\d,]*\d", inside["files of weights"]))) == [
        len(weights),
        sum(file.stat().st_size for file in weights),
    ]
    assert count(inside["all Parquet files"].split(" ")[0]) == sum(file.stat().st_size for file in files)
    for row in kept:
        members = [held for held in rows if STAGES[held["stage"]] == row["stage"]]
        assert count(row["rows"]) == len(members)
        assert count(row["runs"]) == len({held["run_id"] for held in members})
        assert list(map(int, row["epochs kept"].split(", "))) == sorted({held["epoch"] for held in members})
    check_configs(text, files)
    check_accuracies(text, rows)
    for row in tables(section(text, "Factors"))[0]:
        expected = Counter(value for _, value in {(held["run_id"], held[row["factor"].strip("`")]) for held in rows})
        told = dict(re.findall(r"(`[^`]+`|none) × ([\d,]+)", row["values × runs"]))
        assert {name: count(held) for name, held in told.items()} == {
            ("none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"): held
            for value, held in expected.items()
        }


def check_configs(text: str, files: list[Path]) -> None:
    (configs,) = tables(section(text, "Configs"))
    assert [row["config"].split("`")[1] for row in configs] == [
        entry["config_name"] for entry in header_of(text)["configs"]
    ]
    for row in configs:
        members = [file for file in files if file.parent.name == row["config"].split("`")[1]]
        splits: Counter = Counter()
        for file in members:
            splits[file.name.split("-")[0]] += pq.read_metadata(file).num_rows
        assert count(row["rows"]) == sum(splits.values())
        assert count(row["bytes"]) == sum(file.stat().st_size for file in members)
        told = dict(part.split(" ") for part in re.split(r", (?=[a-z])", row["splits and their rows"]))
        assert {split: count(held) for split, held in told.items()} == dict(splits)
    (splits,) = tables(section(text, "Splits"))
    for row in splits:
        members = [file for file in files if file.match(f"index/{row['split'].strip('`')}-*")]
        held = [run for file in members for run in pq.read_table(file, columns=["run_id"])["run_id"].to_pylist()]
        assert (count(row["rows"]), count(row["runs"])) == (len(held), len(set(held)))


def check_accuracies(text: str, rows: list[dict]) -> None:
    last = {}
    for row in sorted(rows, key=lambda row: row["epoch"]):
        last[row["run_id"]] = row
    (dataset,) = re.findall(r"Test accuracy on `(\w+)`", text)
    chosen = [row for row in last.values() if row["dataset"] == dataset and row["test_accuracy"] is not None]
    told = tables(section(text, "Results"))[0]
    for row in told:
        members = [
            held["test_accuracy"]
            for held in chosen
            if row["factor"] == "all" or str(held[row["factor"].strip("`")]) == row["value"].strip("`")
        ]
        assert count(row["models"]) == len(members)
        expected = [np.mean(members), min(members), max(members)]
        assert [float(row[name]) for name in ("mean", "lowest", "highest")] == pytest.approx(expected, abs=6e-5)
    bars = re.findall(r"^(\d\.\d) – \d\.\d  (█*) ?([\d,]+)$", text, re.MULTILINE)
    assert len(bars) == 10
    assert sum(count(held) for *_, held in bars) == len(chosen)
    for low, drawn, held in bars:
        inside = [row for row in chosen if float(low) <= row["test_accuracy"] < float(low) + 0.1 + (low == "0.9")]
        assert count(held) == len(inside)
        assert bool(drawn) == bool(inside)


def markup(body: str) -> tuple[list[str], Counter]:
    """What CommonMark makes of a text: all HTML in it, and how many headings, tables and lists."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    page = [token.content for token in [*tokens, *inline] if token.type.startswith("html")]
    kinds = ("heading_open", "table_open", "bullet_list_open")
    return page, Counter(token.type for token in tokens if token.type in kinds)
