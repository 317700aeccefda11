"""The report of synthetic tables: complete, self-contained, escaped, written whole or not at all."""

import errno
import html.parser
import pathlib
import re

import numpy as np
import pandas as pd
import pytest

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.report import factor_tables, factors, figures
from vitzoo_hf.report import html as report


@pytest.fixture(scope="module", autouse=True)
def coarse_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 30)
        patch.setattr(factor_tables, "PERMUTATIONS", 39)
        patch.setattr(factor_tables, "SILHOUETTES", 39)
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
    return index, evaluations.reset_index(drop=True), pairs.assign(weight_l2=rng.uniform(1, 9, len(pairs)))


def layer_table():
    blocks = [(model, block) for model in ("sl-s42--0@5", "cl-s42--0@5") for block in (0, 1)]
    rows = [(*a, *b, 1.0 if a == b else 0.5) for a in blocks for b in blocks]
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
    data = [attrs["href"] for _, attrs in found.elements if "href" in attrs]
    assert data == ["data/factors.csv", *(f"data/{name}.csv" for name in figures.FIGURES)]
    assert all((page.parent / link).is_file() for link in data)
    links = [attrs["src"] for _, attrs in found.elements if "src" in attrs]
    assert len(links) == len(figures.FIGURES)
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in found.elements}
    assert not re.search(r"https?:|url\(|@import", page.read_text("utf-8"))


def test_report_shows_facts_sentences_figures_and_models(page):
    text = " ".join(Page(page.read_text("utf-8")).texts)
    assert "<b>CC & BY</b>" in text
    assert re.search(r"of the 12 final fine-tuned models: from \s*1\d\.\d %", text)
    assert re.search(r"\blr : η² = (0\.9\d|1\.00)", text)
    assert re.search(r"Not told from chance: seed \(p = (0\.[1-9]\d|1\.00)\)", text)
    assert re.search(r"η² = [01]\.\d\d \(p = 0\.025\)", text)
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
    names = ["population_overview", "accuracy_by_factor", "gap_by_factor", "learning_curves", "factors"]
    assert [path.stem for path in written] == names
    unrecorded = index.assign(test_accuracy=np.nan)
    path = report.write_report(unrecorded, evaluations, pairs.assign(agreement=None), tmp_path, title="t", facts={})
    missing = "Learning curves, Agreement of predictions, Similarity layer by layer, Agreement and accuracy, Distance"
    missing += " in weights and agreement in behaviour"
    assert f"Not drawn, for lack of data: {missing}." in path.read_text("utf-8")


@pytest.mark.parametrize("models", [1, 2, 3])
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
    index, evaluations, _ = small_tables()
    written = figures.write_figures(
        index, evaluations, None, tmp_path / "a" / "b", formats=("png", "svg"), layers=layer_table()
    )
    assert [path.suffix for path in written] == [".png", ".svg"] * 6
    found = (tmp_path / "a" / "b" / "figures").iterdir()
    assert sorted(path.name for path in found) == sorted(path.name for path in written)
    found = (tmp_path / "a" / "b" / "data").iterdir()
    assert {path.stem for path in found} == {path.stem for path in written}
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
    path = figures.write_file(tmp_path / "x", b"old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(ZooError, match=r"cannot write .*x: disk full"):
        figures.write_file(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_leaves_no_scrap(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(ZooError, match=r"cannot write .*population_overview.csv: No space left on device"):
        figures.write_figures(*small_tables(), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_drawn_again_from_its_csv_is_the_same_to_the_byte(page, name):
    figure = figures.figure_from_csv(name, page.parent / "data" / f"{name}.csv")
    assert figures.image_of(figure) == (page.parent / "figures" / f"{name}.png").read_bytes()


def test_the_csv_keeps_numbers_and_names(page):
    _, _, pairs = small_tables()
    # as text: the C parser of pandas 2 rounds the last bit
    found = pd.read_csv(page.parent / "data" / "distance_against_agreement.csv", dtype=str)
    assert found["weight_l2"].astype(float).tolist() == pairs["weight_l2"].tolist()
    assert found["model_b"].tolist() == pairs["model_b"].tolist()
    matrix = pd.read_csv(page.parent / "data" / "cka_matrix.csv", index_col="model_id")
    for pair in pairs.itertuples():
        assert matrix.loc[pair.model_a, pair.model_b] == matrix.loc[pair.model_b, pair.model_a] == pair.cka


def test_levels_that_look_like_nothing_are_levels(tmp_path):
    index, evaluations, _ = small_tables()
    for table in (index, evaluations):
        table["factor_augmentation"] = np.where(table["factor_lr"] > 0.005, "NA", "none")
    empty = pd.DataFrame()
    table = figures.FIGURES["accuracy_by_factor"].table(figures.Tables(index, evaluations, empty, empty))
    table.to_csv(tmp_path / "table.csv", index=False)
    figure = figures.figure_from_csv("accuracy_by_factor", tmp_path / "table.csv")
    panel = next(axes for axes in figure.axes if axes.get_title("left") == "augmentation")
    assert [label.get_text() for label in panel.get_xticklabels()] == ["NA", "none"]


def test_a_csv_that_is_none_is_refused_in_one_line(tmp_path):
    with pytest.raises(ZooError, match=r"^unknown figure 'mode': did you mean 'modes'\?$"):
        figures.figure_from_csv("mode", tmp_path / "x.csv")
    with pytest.raises(ZooError, match=r"^cannot read .*x.csv as a CSV: .*No such file"):
        figures.figure_from_csv("modes", tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("model,b\n1,2\n")
    with pytest.raises(ZooError, match="has no column 'model_id'"):
        figures.figure_from_csv("modes", tmp_path / "x.csv")


def test_the_separation_of_factors_is_on_the_page(page):
    text = " ".join(Page(page.read_text("utf-8")).texts)
    text = re.sub(r"\s+", " ", text)
    assert "silhouette by chance 95 % p permuted weights: L2 distance" in text
    assert re.search(
        r"only by it by chance p permuted test accuracy lr 2 (0\.99\d*|1) .* models within a parent", text
    )
    assert "all, additive" in text


def test_models_without_an_accuracy_are_named():
    _, evaluations, pairs = small_tables()
    evaluations.loc[:6, ["test_accuracy", "test_ece"]] = None
    models = factors.final_models(evaluations)
    untested = pd.DataFrame(columns=factor_tables.VARIANCE)
    told = list(report._sentences(models, evaluations, untested, pairs))[1]
    names = ", ".join(evaluations["model_id"][:5])
    assert told == f"Left out, without a test accuracy: 7 final fine-tuned models, {names}…."
