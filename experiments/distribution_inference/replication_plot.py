"""The figure of the replication: leakage against the size of the difference, fit, number of examples, and learner."""

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from vitzoo_hf.report.style import INK, MUTED, PALETTE, STYLE, heading

SHOWN = {
    "published_meta_classifier": "outputs: meta-classifier as published",
    "meta_classifier": "outputs: the same, standardised",
    "kl_test": "outputs: KL test",
    "deep_sets": "weights: DeepSets",
    "set_encoder": "weights: set encoder",
}
PANELS = (
    ("A", False, "size of the change to the teacher (epsilon)", "source 1: E[Y|X]"),
    ("A-bis", False, "training loss at which a model stops", "source 1, stopped early"),
    ("B", False, "training loss at which a model stops", "source 2: fitness"),
    ("C", False, "examples n, 20 epochs", "source 3 as published"),
    ("C", True, "examples n, 1280 steps", "source 3, steps fixed"),
)


def plot_replication(table: pd.DataFrame) -> Figure:
    """Normalised advantage of attacks in each experiment, with 95 % intervals; empty panels where nothing was run.

    Args:
        table: as `gather` gives it.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        axes = figure.subplots(2, 3)
        for axis, (experiment, mended, label, title) in zip(axes.flat, PANELS, strict=False):
            _lines(axis, table[(table["experiment"] == experiment) & (table["mended"] == mended)])
            axis.set(xlabel=label, title=title)
        _learners(axes.flat[-1], table[table["experiment"] == "DMI"])
        for axis in axes.flat:
            axis.axhline(0, color=MUTED, linewidth=0.8)
            axis.set_ylim(-0.25, 1.05)
        for axis in axes[:, 0]:
            axis.set_ylabel("advantage: 1 - risk / prior risk")
        axes[0, 0].legend(fontsize=7.5)
        heading(
            figure, "Leakage about the training distribution", "mean and 95 % interval over worlds, seeds, targets"
        )
    return figure


def _lines(axis: Any, table: pd.DataFrame) -> None:
    for number, (attack, label) in enumerate(SHOWN.items()):
        rows = table[table["attack"] == attack].sort_values("knob")
        if len(rows):
            middle, low, high = advantages(rows)
            # lists: of a series or array of one value, older matplotlib asks for a float, which is deprecated
            errors = [(middle - low).tolist(), (high - middle).tolist()]
            axis.errorbar(rows["knob"], middle, errors, color=PALETTE[number], marker="o", markersize=4, label=label)


def _learners(axis: Any, table: pd.DataFrame) -> None:
    rows = table[table["attack"] == "meta_classifier"].sort_values(["learner", "mended"])
    if len(rows):
        middle, low, high = advantages(rows)
        colours = [PALETTE[2] if mended else PALETTE[1] for mended in rows["mended"]]
        names = [f"{row.learner}\n{'equal n' if row.mended else 'published'}" for row in rows.itertuples()]
        axis.bar(range(len(rows)), middle, yerr=[middle - low, high - middle], color=colours, ecolor=INK)
        axis.set_xticks(range(len(rows)), [name.replace("_", "\n") for name in names], fontsize=6.5)
    axis.set(title="is an environment among the data")


def advantages(rows: pd.DataFrame) -> tuple[pd.Series, pd.Series, pd.Series]:
    """Normalised advantages of the values and of the ends of their intervals, the lower end first."""
    number = rows["metric"] == "mae"
    # Without a model the mean error is 1/4 for a number between 0 and 1, and 1/2 for a balanced class.
    found = [(1 - 4 * rows[name]).where(number, 2 * rows[name] - 1) for name in ("value", "low", "high")]
    # A larger error is a smaller advantage, so that the ends of a number's interval change places.
    return found[0], found[1].where(~number, found[2]), found[2].where(~number, found[1])
