"""The figures of a zoo as files, each drawn from a CSV of its own that is written beside it."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from vitzoo_hf.format.atomic import write_atomically
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.report import factor_tables, plot_factors, plot_pairs
from vitzoo_hf.report import plot_factors as plot_modes
from vitzoo_hf.report import plot_models as plot
from vitzoo_hf.report.factors import NothingToDrawError, final_models, require
from vitzoo_hf.report.style import STYLE

DPI = 200
TEXT = ("model_id", "run_id", "parent_id", "stage", "dataset", "head", "lineage", "model_a", "model_b")
MODEL = ("model_id", "run_id", "parent_id", "stage", "epoch", "is_final", "head", "dataset")


class Tables(NamedTuple):
    """Tables of a zoo: the configs, and the CKA of blocks that `layer_similarity` gives; empty: not known."""

    index: pd.DataFrame
    evaluations: pd.DataFrame
    pairs: pd.DataFrame
    layers: pd.DataFrame


class Entry(NamedTuple):
    """A figure of the report: what its CSV holds, how it is drawn from it, and what the page says of it."""

    table: Callable[[Tables], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]
    heading: str
    caption: str
    source: str = "evaluations"
    """The table without which there is no such figure."""


FIGURES: dict[str, Entry] = {
    "population_overview": Entry(
        lambda tables: _columns(_with_gap(tables), *plot.OVERVIEW),
        plot.population_overview,
        "Population overview",
        "How many final models have which test accuracy, loss, generalisation gap (training minus test accuracy, as"
        " recorded during training), expected calibration error (top label, 15 bins), Brier score (summed over"
        " classes, 0 to 2) and entropy of predictions. What was not measured has no panel. Tables: evaluations,"
        " index.",
    ),
    "accuracy_by_factor": Entry(
        lambda tables: _columns(final_models(tables.evaluations), "test_accuracy"),
        plot.by_factor,
        "Accuracy by factor",
        "Each point is one final model, measured on the test images; every panel shows the same models, sorted by"
        " another factor. A black line is the median of a level, its box the middle half. Panels are ordered by η²,"
        " the bar on top: how much of the differences between models the factor explains by itself. Table:"
        " evaluations.",
    ),
    "gap_by_factor": Entry(
        lambda tables: _gaps(tables),
        lambda table: plot.by_factor(table, "generalization_gap"),
        "Generalisation gap by factor",
        "As above, for training minus test accuracy, as recorded at the end of training: above 0, a model does"
        " better on the images it was trained on. A model that learned little has a small gap. Tables: evaluations,"
        " index.",
    ),
    "learning_curves": Entry(
        lambda tables: _recorded(tables.index),
        plot.learning_curves,
        "Learning curves",
        "A thin line is one run, a thick line the median and the shade the middle half of the runs that share a level"
        " of the strongest factor; points are checkpoints kept in the zoo. Test accuracy and generalisation gap as"
        " recorded during training; contrastive pre-training has none, so it is not shown. Table: index.",
    ),
    "factors": Entry(
        lambda tables: factor_tables.variance_table(_with_gap(tables), tables.index, tables.pairs),
        plot_factors.variance,
        "Variance explained by each factor",
        "The share of the variance between final models that a factor explains by itself, and that all explain"
        " together by shifts that add up. Of accuracy and gap it is η²; of distances it is the R² of PERMANOVA,"
        " where the squared distance of two models is that of their weights, or 2 (1 − similarity). p: how often 999"
        " permutations reach it. A factor that varies within parents is permuted within each; what belongs to"
        " parents is permuted among parents, which takes at least a handful of them; parents themselves, and all"
        " factors, among all models. p is not corrected for the number of tests, and a factor whose levels only"
        " spread differently can have a small one too. Tables: evaluations, index, pairs.",
    ),
    "agreement_matrix": Entry(
        lambda tables: plot_pairs.matrix_table(tables.pairs, tables.index, "agreement"),
        lambda table: plot_pairs.draw_matrix(table, "agreement"),
        "Agreement of predictions",
        "Each cell is a pair of final models: the share of test images for which both predict the same class."
        " Rows and columns have the same order: by lineage (brackets, white lines), then by the factors in the"
        " strips on the left. Bright blocks on the diagonal mean that models of one parent decide alike. Hatched:"
        " not defined, for example between different label sets. Tables: pairs, index.",
        "pairs",
    ),
    "cka_matrix": Entry(
        lambda tables: plot_pairs.matrix_table(tables.pairs, tables.index, "cka"),
        lambda table: plot_pairs.draw_matrix(table, "cka"),
        "Similarity of representations",
        "As above, with the centred kernel alignment (CKA, debiased) of the features that two models compute for"
        " the test images: 1 means the same geometry up to rotation and scale, 0 unrelated. It needs no labels, so"
        " pre-trained models are included where they were measured. Tables: pairs, index.",
        "pairs",
    ),
    "pairs_by_level": Entry(
        lambda tables: factor_tables.level_pairs_table(tables.pairs, tables.index),
        plot_factors.level_pairs,
        "Pairs within and between the levels of factors",
        "Distance and cosine of trunk weights, agreement and CKA of pairs of final models of the same parent, regime"
        " or level of a factor, beside those of the other pairs. With a star: among models of one parent alone, where"
        " differences between parents play no part; with a dagger: of different parents alone, so that siblings do"
        " not count for a regime. Tables: pairs, index.",
        "pairs",
    ),
    "layer_matrix": Entry(
        lambda tables: tables.layers,
        plot_pairs.layer_matrix,
        "Similarity layer by layer",
        "Each cell compares the class token after a block of one model with that after a block of another: debiased"
        " CKA on test images the zoo carries. The models are chosen: the best, on selection images, of each of a few"
        " parents. Bright diagonals mean that equally deep blocks compute alike. Computed from the weights.",
        "layers",
    ),
    "agreement_against_accuracy": Entry(
        lambda tables: plot_pairs.accuracy_table(tables.pairs, tables.evaluations, tables.index),
        plot_pairs.agreement_against_accuracy,
        "Agreement and accuracy",
        "Two accurate models must agree often. Each point is a pair of final models; grey dashes are the most that"
        " its two accuracies a and b allow, 1 − |a − b|, black ones what errors independent of each other and evenly"
        " spread over the other classes would give, ab + (1 − a)(1 − b) / (classes − 1). Points above the black"
        " dashes are more alike than that. Cohen’s kappa and error consistency (kappa of being right) are 0 for what"
        " chance alone would give; zoos evaluated before they were measured do not show them. Tables: pairs,"
        " evaluations, index.",
        "pairs",
    ),
    "distance_against_agreement": Entry(
        lambda tables: _known_pairs(tables.pairs),
        plot_pairs.distance_against_agreement,
        "Distance in weights and agreement in behaviour",
        "Each point is a pair of final models: how far apart their trunk weights are, and how often they agree on"
        " test images. Spearman's rank correlation is computed within each colour; a correlation over both colours"
        " would mostly show the difference between the groups. Pairs share models and are not independent, so read"
        " it as a description and not as a test. Table: pairs.",
        "pairs",
    ),
    "modes": Entry(
        lambda tables: plot_modes.modes_table(tables.pairs, tables.index),
        plot_modes.modes,
        "Modes by generating factor",
        "Final models as points in a plane, placed by classical multidimensional scaling of the L2 distances of"
        " their trunk weights, and of 1 minus cosine, agreement and CKA. The share is that of the two axes in the"
        " positive eigenvalues: a small one means that much of the distances is not in the picture. Colours: the"
        " factor with the largest silhouette, computed in the whole matrix of distances. Axes have no unit of their"
        " own and their sign means nothing. Tables: pairs, index.",
        "pairs",
    ),
    "separation": Entry(
        lambda tables: factor_tables.separation_table(tables.pairs, tables.index),
        plot_factors.separation,
        "Factors that make modes",
        "The mean silhouette of the levels of each factor in the whole matrix of distances: 1 where models with the"
        " same level are close together and far from all others, 0 where levels overlap, below where they are nearer"
        " to others. Grey: what 199 permutations of the levels give, exchanged as for the variance above. Tables:"
        " pairs, index.",
        "pairs",
    ),
}
"""File name -> figure, in the order of the report."""


def write_figures(
    index: pd.DataFrame,
    evaluations: pd.DataFrame,
    pairs: pd.DataFrame | None,
    folder: Path,
    *,
    layers: pd.DataFrame | None = None,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Write `figures/NAME.png` of every figure that applies to this zoo, and the `data/NAME.csv` it is drawn from.

    A figure is skipped where its columns hold no value, such as learning curves without recorded accuracy. Each
    file is written atomically; returned are the figures, in report order.

    Args:
        index: see `plot.learning_curves`.
        evaluations: see `plot.accuracy_by_factor`.
        pairs: see `plot_pairs`; None or empty: no figure of pairs.
        folder: created where missing.
        layers: of `layer_similarity`; None: no such figure.
        formats: file endings that matplotlib can write, such as `png`, `svg`, `pdf`.

    Raises:
        ZooError: for an unknown format, a missing column, or an empty `index` or `evaluations`.
    """
    known = Figure().canvas.get_supported_filetypes()
    for ending in formats:
        if ending not in known:
            raise ZooError(f"cannot write figures as {ending!r}: {did_you_mean(ending, known)}")
    empty = pd.DataFrame()
    tables = Tables(index, evaluations, empty if pairs is None else pairs, empty if layers is None else layers)
    for place in (folder / "figures", folder / "data"):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ZooError(f"cannot write into {folder}: {error.strerror}") from None
    written = []
    for name, entry in FIGURES.items():
        if entry.source in ("pairs", "layers") and getattr(tables, entry.source).empty:
            continue
        try:
            table = entry.table(tables)
        except NothingToDrawError:
            continue
        content = table.to_csv(index=False, lineterminator="\n").encode()
        figure = figure_from_csv(name, write_file(folder / "data" / f"{name}.csv", content))
        for ending in formats:
            written.append(write_file(folder / "figures" / f"{name}.{ending}", image_of(figure, ending)))
    return written


def figure_from_csv(name: str, path: Path) -> Figure:
    """Draw a figure of the report again from its CSV: the very picture of the report.

    Args:
        name: a key of `FIGURES`, such as `agreement_matrix`.
        path: the CSV that `write_figures` wrote for it.

    Raises:
        ZooError: for an unknown figure, or a file that cannot be read or lacks a column.
    """
    if name not in FIGURES:
        raise ZooError(f"unknown figure {name!r}: {did_you_mean(name, FIGURES)}")
    try:
        table = pd.read_csv(
            path,
            dtype=dict.fromkeys(TEXT, str),
            keep_default_na=False,
            na_values=[""],
            low_memory=False,
        )
    except (OSError, ValueError) as error:
        raise ZooError(f"cannot read {path} as a CSV: {error}") from None
    return FIGURES[name].draw(table)


def image_of(figure: Figure, ending: str = "png") -> bytes:
    """The file of a figure, as the report has it."""
    with BytesIO() as buffer, rc_context(STYLE):
        figure.savefig(buffer, format=ending, dpi=DPI)
        return buffer.getvalue()


def write_file(path: Path, content: bytes) -> Path:
    """Write all of a file or nothing; returns its path."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


def _columns(table: pd.DataFrame, *values: str) -> pd.DataFrame:
    """What says which model a row is, the factors, and `values`, as far as the table has them."""
    return table[[name for name in table if name in (*MODEL, *values) or str(name).startswith("factor_")]]


def _recorded(index: pd.DataFrame) -> pd.DataFrame:
    require(index, "index", ("model_id", "test_accuracy"))
    table = _columns(index[index["test_accuracy"].notna()], "test_accuracy", "generalization_gap")
    if table.empty:
        raise NothingToDrawError("table 'index': no row has a recorded test accuracy")
    return table


def _with_gap(tables: Tables) -> pd.DataFrame:
    models, name = final_models(tables.evaluations), "generalization_gap"
    if name in models or name not in tables.index:
        return models
    recorded = tables.index.drop_duplicates("model_id").set_index("model_id")[name]
    return models.assign(**{name: models["model_id"].map(recorded)})


def _gaps(tables: Tables) -> pd.DataFrame:
    models = _with_gap(tables)
    if "generalization_gap" not in models or models["generalization_gap"].isna().all():
        raise NothingToDrawError("table 'index': no final model has a recorded generalisation gap")
    return _columns(models, "generalization_gap")


def _known_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    columns = ["model_a", "model_b", "same_parent", "weight_l2", "agreement"]
    require(pairs, "pairs", columns)
    known = pairs[columns].dropna(subset=["weight_l2", "agreement"])
    if known.empty:
        raise NothingToDrawError("table 'pairs': no pair has both a weight distance and an agreement")
    return known
