"""The report of synthetic tables: complete, self-contained, escaped, written whole or not at all."""

import errno
import html.parser
import pathlib
import re

import numpy as np
import pandas as pd
import pytest

from vitzoo_hf import figures, report
from vitzoo_hf.schema import ZooError


@pytest.fixture(scope="module", autouse=True)
def coarse_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 30)
        yield


PNG = b"\x89PNG\r\n\x1a\n"


def small_tables(models=12, parents=("sl-s42", "cl-s42")):
    """Index, evaluations, pairs: fine-tuned models of `parents`, whose learning rate decides the accuracy."""
    rng = np.random.default_rng(0)
    rows = []
    for parent in parents:
        for i in range(models // len(parents)):
            lr = (0.001, 0.01)[i % 2]
            for epoch in (0, 5):
                row = {"run_id": f"{parent}--{i}", "epoch": epoch, "model_id": f"{parent}--{i}@{epoch}"}
                row |= {"parent_id": f"{parent}@9", "stage": "finetune", "is_final": epoch == 5, "head": "linear"}
                row |= {"dataset": "digits", "factor_lr": lr, "factor_seed": i // 2, "generalization_gap": 0.0625}
                rows.append(row | {"test_accuracy": 0.1 + epoch * lr * 15 + rng.uniform(0, 0.01)})
    index = pd.DataFrame(rows)
    evaluations = index[index["is_final"]].drop(columns="generalization_gap").assign(test_ece=0.125)
    names = list(evaluations["model_id"])
    pairs = pd.DataFrame(
        [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]], columns=["model_a", "model_b"]
    )
    pairs["same_parent"] = pairs["model_a"].str[:2] == pairs["model_b"].str[:2]
    pairs["agreement"] = pairs["cka"] = np.where(pairs["same_parent"], 0.75, 0.5) + rng.uniform(0, 0.01, len(pairs))
    pairs["cohen_kappa"] = pairs["agreement"] - 0.1
    return index, evaluations.reset_index(drop=True), pairs.assign(weight_l2=rng.uniform(1, 9, len(pairs)))


def layer_table():
    blocks = [(model, block) for model in ("a", "b") for block in range(3)]
    rows = [(*one, *other, 1.0 if one == other else 0.5) for one in blocks for other in blocks]
    return pd.DataFrame(rows, columns=["model_a", "block_a", "model_b", "block_b", "cka"])


class Page(html.parser.HTMLParser):
    """Elements with their attributes, the text, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    facts = {"models": "12", "licence": "<b>CC & BY</b>"}
    title = "Zoo <script>alert(1)</script>"
    path = report.write_report(*small_tables(), folder, title=title, facts=facts, layers=layer_table())
    assert path == folder / "report.html"
    return path


def test_report_is_self_contained_and_well_formed(page):
    found = Page(page.read_text("utf-8"))
    assert found.open == []
    links = [value for _, attrs in found.elements for key, value in attrs.items() if key in ("src", "href")]
    assert len(links) == len(figures.FIGURES)
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in found.elements}
    assert not re.search(r"https?:|url\(|@import", page.read_text("utf-8"))


def test_report_shows_facts_sentences_figures_and_models(page):
    text = " ".join(Page(page.read_text("utf-8")).texts)
    assert "<b>CC & BY</b>" in text
    assert re.search(r"of the 12 final fine-tuned models: from \s*1\d\.\d %", text)
    assert re.search(r"\blr : η² = (0\.9\d|1\.00)", text)
    assert "No more than chance would explain" in text
    assert re.search(r"same parent predict the same class for 75\.\d % .* for 50\.\d %", text)
    assert all(entry.heading in text and entry.caption in text for entry in figures.FIGURES.values())
    assert "Not drawn" not in text
    assert "sl-s42--0@5" in text
    assert "generalization gap" in text
    assert "0.0625" in text


def test_everything_from_outside_is_escaped(tmp_path):
    evil = '$\\frac$"><img src=x onerror=alert(1)>'
    index, evaluations, pairs = small_tables()
    for table in (index, evaluations):
        table["factor_" + evil] = np.where(table["factor_lr"] > 0.005, evil, "b")
        table["model_id"] = evil + table["model_id"]
    pairs[["model_a", "model_b"]] = evil + pairs[["model_a", "model_b"]]
    path = report.write_report(index, evaluations, pairs, tmp_path, title=evil, facts={evil: evil})
    found = Page(path.read_text("utf-8"))
    assert not [attrs for _, attrs in found.elements if "onerror" in attrs]
    assert len([tag for tag, _ in found.elements if tag == "script"]) == 1
    assert sum(evil in text for text in found.texts) > 12


def test_figures_that_do_not_apply_are_skipped_and_named(tmp_path):
    index, evaluations, pairs = small_tables()
    written = figures.write_figures(index, evaluations, None, tmp_path)
    assert [path.name for path in written] == ["overview.png", "accuracy_by_factor.png", "learning_curves.png"]
    assert figures.write_figures(index, evaluations, pairs[:0], tmp_path) == written
    unrecorded = index.assign(test_accuracy=np.nan)
    path = report.write_report(unrecorded, evaluations, pairs.assign(agreement=None), tmp_path, title="t", facts={})
    missing = "Learning curves, Agreement of predictions, Distance in weights and agreement in behaviour"
    missing += ", Agreement and accuracy, Layers against layers"
    assert f"Not drawn, for lack of data: {missing}." in path.read_text("utf-8")


@pytest.mark.parametrize("models", [2, 3])
def test_reports_of_tiny_zoos(tmp_path, models):
    tables = small_tables(models, parents=("sl-s42",))
    text = report.write_report(*tables, tmp_path, title="t", facts={}).read_text("utf-8")
    assert f"of the {models} final fine-tuned models" in text


def test_a_zoo_where_nothing_varies(tmp_path):
    index, evaluations, pairs = small_tables(4, parents=("sl-s42",))
    index, evaluations = (table.assign(factor_lr=0.1, factor_seed=1) for table in (index, evaluations))
    text = report.write_report(index, evaluations, pairs, tmp_path, title="t", facts={}).read_text("utf-8")
    assert "No factor can be named" in text


def test_formats_and_files(tmp_path):
    index, evaluations, pairs = small_tables()
    written = figures.write_figures(
        index, evaluations, pairs, tmp_path / "a" / "b", layers=layer_table(), formats=("png", "svg")
    )
    assert [path.suffix for path in written] == [".png", ".svg"] * len(figures.FIGURES)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted(path.name for path in written)
    assert all(path.read_bytes().startswith(PNG) for path in written[::2])
    assert all(b"<svg" in path.read_bytes() for path in written[1::2])


def test_errors_are_one_clear_line(tmp_path):
    index, evaluations, pairs = small_tables()
    with pytest.raises(ZooError, match=r"^cannot write figures as 'pngg': did you mean 'png'\?$"):
        figures.write_figures(index, evaluations, pairs, tmp_path, formats=["pngg"])
    with pytest.raises(ZooError, match=r"^table 'pairs' has no column 'weight_l2'"):
        figures.write_figures(index, evaluations, pairs.drop(columns="weight_l2"), tmp_path)
    for wrong, name in (((index[:0], evaluations), "index"), ((index, evaluations[:0]), "evaluations")):
        with pytest.raises(ZooError, match=f"^table '{name}' has no rows"):
            report.write_report(*wrong, pairs, tmp_path, title="t", facts={})
    assert not (tmp_path / "report.html").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = figures.written(tmp_path / "x", b"old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(ZooError, match=r"cannot write .*x: disk full"):
        figures.written(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_leaves_no_scrap(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(ZooError, match=r"cannot write .*overview.png: No space left on device"):
        figures.write_figures(*small_tables(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_figure_is_drawn_again_from_the_tables_beside_it(tmp_path):
    report.write_report(*small_tables(), tmp_path, title="t", facts={}, layers=layer_table())
    tables = figures.Tables.read(tmp_path)
    again = figures.write_figures(
        tables.index, tables.evaluations, tables.pairs, tmp_path / "again", layers=tables.layers
    )
    assert len(again) == len(figures.FIGURES)
    for file in again:
        assert file.read_bytes() == (tmp_path / "figures" / file.name).read_bytes(), file.name


def test_a_folder_without_tables_is_one_line(tmp_path):
    with pytest.raises(ZooError, match="holds no tables of a report"):
        figures.Tables.read(tmp_path)
