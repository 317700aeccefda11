"""The figures of a zoo as files, and the tables that they are drawn from."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from vitzoo_hf import plot, plot_pairs
from vitzoo_hf.checkpoint import write_atomically
from vitzoo_hf.schema import ZooError, did_you_mean

DPI = 200
TEXTS = ("model_id", "run_id", "parent_id", "stage", "head", "dataset", "model_a", "model_b", "split")


class Tables(NamedTuple):
    """What the figures are drawn from; `layers` as `layer_similarity` gives it, empty for no such figure."""

    index: pd.DataFrame
    evaluations: pd.DataFrame
    pairs: pd.DataFrame
    layers: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> "Tables":
        """The tables that `write_report` left in `folder/data`, from which every figure can be drawn again.

        Raises:
            ZooError: if there are none.
        """
        try:
            return cls(*(_read_csv(folder / "data" / f"{name}.csv") for name in cls._fields))
        except OSError as error:
            raise ZooError(f"{folder} holds no tables of a report: {error}") from None

    def write(self, folder: Path) -> None:
        """Write `data/NAME.csv`, the columns of the zoo's configs."""
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for name, table in self._asdict().items():
            written(folder / "data" / f"{name}.csv", table.to_csv(index=False).encode())


def _read_csv(file: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(file, dtype=dict.fromkeys(TEXTS, "str"))
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


class Entry(NamedTuple):
    """A figure of the report: how it is drawn from the tables, and what the page says of it."""

    draw: Callable[["Tables"], Figure]
    heading: str
    caption: str
    of_pairs: bool = False


FIGURES: dict[str, Entry] = {
    "overview": Entry(
        lambda tables: plot_pairs.overview(tables.evaluations),
        "Overview",
        "How the final models spread over what was measured on the test images. Calibration error: top label, 15"
        " bins. Brier score: summed over classes, 0 to 2. Table: evaluations.",
    ),
    "accuracy_by_factor": Entry(
        lambda tables: plot.accuracy_by_factor(tables.evaluations),
        "Accuracy by factor",
        "Each point is one final model, measured on the test images; every panel shows the same models, sorted by"
        " another factor. A black line is the median of a level, its box the middle half. Panels are ordered by η²,"
        " the bar on top: how much of the differences between models the factor explains by itself. Table:"
        " evaluations.",
    ),
    "learning_curves": Entry(
        lambda tables: plot.learning_curves(tables.index),
        "Learning curves",
        "A thin line is one run, a thick line the median of the runs that share a level of the strongest factor;"
        " points are checkpoints kept in the zoo. Test accuracy as recorded during training; contrastive"
        " pre-training has none, so it is not shown. Table: index.",
    ),
    "agreement_matrix": Entry(
        lambda tables: plot.pair_matrix(tables.pairs, tables.index, "agreement"),
        "Agreement of predictions",
        "Each cell is a pair of final models: the share of test images for which both predict the same class."
        " Rows and columns have the same order: by lineage (brackets, white lines), then by the factors in the"
        " strips on the left. Bright blocks on the diagonal mean that models of one parent decide alike. Hatched:"
        " not defined, for example between different label sets. Tables: pairs, index.",
        True,
    ),
    "cka_matrix": Entry(
        lambda tables: plot.pair_matrix(tables.pairs, tables.index, "cka"),
        "Similarity of representations",
        "As above, with the centred kernel alignment (CKA, debiased) of the features that two models compute for"
        " the test images: 1 means the same geometry up to rotation and scale, 0 unrelated. It needs no labels, so"
        " pre-trained models are included where they were measured. Tables: pairs, index.",
        True,
    ),
    "distance_against_agreement": Entry(
        lambda tables: plot.distance_against_agreement(tables.pairs),
        "Distance in weights and agreement in behaviour",
        "Each point is a pair of final models: how far apart their trunk weights are, and how often they agree on"
        " test images. Spearman's rank correlation is computed within each colour; a correlation over both colours"
        " would mostly show the difference between the groups. Pairs share models and are not independent, so read"
        " it as a description and not as a test. Table: pairs.",
        True,
    ),
    "agreement_against_accuracy": Entry(
        lambda tables: plot_pairs.agreement_against_accuracy(tables.evaluations, tables.pairs),
        "Agreement and accuracy",
        "Accurate models must agree on what both get right. The dashed line is the agreement of two models of equal"
        " accuracy that err independently and never name the same wrong class; points above it share errors or"
        " successes. Kappa is corrected for the agreement that the two models' class frequencies give by chance."
        " Tables: pairs, evaluations.",
        True,
    ),
    "modes": Entry(
        lambda tables: plot_pairs.modes(tables.evaluations, tables.pairs),
        "Modes by generating factor",
        "Maps on which the distance between models is kept as well as two dimensions can. A factor whose levels lie"
        " apart shapes the population; a silhouette of 1 means separate groups, 0 or less none. The factor was chosen"
        " for its silhouette, so its share of random relabelings is too small where many factors were tried."
        " Tables: pairs, evaluations.",
        True,
    ),
    "layer_matrix": Entry(
        lambda tables: plot_pairs.layer_matrix(tables.layers),
        "Layers against layers",
        "CKA of the class token after every block of some final models, the best of each of up to four parents on the"
        " selection images. Table: layers.",
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
    """Write every figure that applies to this zoo, each file atomically; returns the files in report order.

    A figure is skipped where its columns hold no value, such as learning curves without recorded accuracy.

    Args:
        index: see `plot.learning_curves`.
        evaluations: see `plot.accuracy_by_factor`.
        pairs: see `plot.pair_matrix` and `plot.distance_against_agreement`; None or empty: no figure of pairs.
        folder: created where missing.
        layers: see `plot_pairs.layer_matrix`; None: no such figure.
        formats: file endings that matplotlib can write, such as `png`, `svg`, `pdf`.

    Raises:
        ZooError: for an unknown format, a missing column, or an empty `index` or `evaluations`.
    """
    known = Figure().canvas.get_supported_filetypes()
    for ending in formats:
        if ending not in known:
            raise ZooError(f"cannot write figures as {ending!r}: {did_you_mean(ending, known)}")
    tables = tables_of(index, evaluations, pairs, layers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooError(f"cannot write into {folder}: {error.strerror}") from None
    paths: list[Path] = []
    for name, entry in FIGURES.items():
        if (entry.of_pairs and tables.pairs.empty) or (name == "layer_matrix" and tables.layers.empty):
            continue
        try:
            figure = entry.draw(tables)
        except plot.NothingToDrawError:
            continue
        for ending in formats:
            with BytesIO() as buffer, rc_context(plot.STYLE):
                figure.savefig(buffer, format=ending, dpi=DPI)
                paths.append(written(folder / f"{name}.{ending}", buffer.getvalue()))
    return paths


def tables_of(
    index: pd.DataFrame, evaluations: pd.DataFrame, pairs: pd.DataFrame | None, layers: pd.DataFrame | None
) -> Tables:
    """The tables, empty where they are not there."""
    empty = pd.DataFrame()
    return Tables(index, evaluations, empty if pairs is None else pairs, empty if layers is None else layers)


def written(path: Path, content: bytes) -> Path:
    """Write a file atomically; returns its path."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path
