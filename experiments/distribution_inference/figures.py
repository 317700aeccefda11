"""Figures of the cells of ViTs: what leakage goes with, and ROC curves."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from vitzoo_hf.report.style import MUTED, PALETTE, STYLE, heading

SEEN = {
    "probabilities": ("outputs", PALETTE[0], "o"),
    "weights": ("weights", PALETTE[1], "s"),
    "labels": ("labels alone", PALETTE[2], "^"),
}
LADDER = ("linear", "narrow", "depth1", "full")


def plot_worlds(table: pd.DataFrame, learners: Mapping[str, str]) -> Figure:
    """Normalised advantage of the attack that is best on held-out shadows, with 95 % intervals, in six panels.

    Args:
        table: `worlds.csv`.
        learners: cell -> name, of the panel on colour reliance.
    """
    best = chosen(table)
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 7.2), layout="constrained")
        axes = figure.subplots(2, 3).ravel()
        rates = [float(cell.split(",")[1].rstrip("]")) for cell in _cells(best, "s1_region_rule-flip_rate")]
        _lines(axes[0], best, dict(zip(_cells(best, "s1_region_rule-flip_rate"), rates, strict=True)))
        axes[0].set(title="source 1: a conditional differs", xlabel="share of flipped labels ε in one class")
        fits = {cell: best.loc[best["cell"] == cell, "train_loss"].iloc[0] for cell in _cells(best, "s1_bis")}
        _lines(axes[1], best, fits)
        axes[1].set(title="source 1 by fit (early stopping)", xlabel="training loss at the end")
        counts = {cell: float(cell.split("=")[1]) for cell in _cells(best, "s3_finite_data-num_images")}
        _lines(axes[2], best, counts)
        axes[2].set(title="source 3: finite data, steps fixed", xlabel="training images n", xscale="log")
        _lines(axes[3], best, {f"s2_{name}": place for place, name in enumerate(LADDER)}, line=False)
        axes[3].set(title="source 2: capacity", xticks=range(len(LADDER)), xticklabels=LADDER, xlabel="model")
        _reliance(axes[4], best, learners)
        weights = {cell: float(cell.split("=")[1]) for cell in _cells(best, "dmi_irm_weights-penalty_weight")}
        _lines(axes[5], best, weights)
        axes[5].set(title="IRMv1 by weight of its penalty", xlabel="weight", xscale="log")
        for axis in axes:
            axis.axhline(0, color=MUTED, linewidth=0.8)
            # At chance, 128 targets spread the advantage by 0.17 to either side.
            axis.set_ylim(-0.25, 1.08)
        for axis in axes[::3]:
            axis.set_ylabel("advantage over the prior")
        axes[0].legend(loc="lower right")
        heading(
            figure,
            "What models of a known distribution tell of it",
            "128 targets or more, 256 shadows a cell;"
            " the attack of each kind that is best on held-out shadows; 95 % over targets and seeds",
        )
    return figure


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """The row of each cell and access that is best on held-out shadows, with the interval of its advantage."""
    # By held-out shadows: the best by `value` would be chosen on the targets that are shown.
    rows = table[table["shadow_value"].notna() & ~table["shuffled"].astype(bool)].copy()
    rows["error"] = rows["shadow_value"].where(rows["metric"] == "mae", -rows["shadow_value"])
    rows = rows.loc[rows.groupby(["cell", "access"])["error"].idxmin()]
    errors = rows["metric"] == "mae"
    # Risks are errors: the lower end of an accuracy is the upper end of its risk.
    worst, least = rows["high"].where(errors, 1 - rows["low"]), rows["low"].where(errors, 1 - rows["high"])
    return rows.assign(advantage_low=1 - worst / rows["prior_risk"], advantage_high=1 - least / rows["prior_risk"])


def _cells(best: pd.DataFrame, begin: str) -> list[str]:
    return [cell for cell in best["cell"].unique() if cell.startswith(begin)]


def _lines(axis: Any, best: pd.DataFrame, places: Mapping[str, float], *, line: bool = True) -> None:
    for access, (name, colour, marker) in SEEN.items():
        rows = best[(best["access"] == access) & best["cell"].isin(places)]
        rows = rows.assign(place=rows["cell"].map(places)).sort_values("place")
        if rows.empty:
            continue
        # An interval that does not contain its value gives a negative error, which matplotlib refuses.
        spread = [rows["advantage"] - rows["advantage_low"], rows["advantage_high"] - rows["advantage"]]
        axis.errorbar(
            rows["place"],
            rows["advantage"],
            [part.clip(lower=0) for part in spread],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.4 if line else 0,
            elinewidth=1,
            label=name,
        )


def _reliance(axis: Any, best: pd.DataFrame, learners: Mapping[str, str]) -> None:
    rows = best[(best["access"] == "probabilities") & best["cell"].isin(learners)].set_index("cell")
    for number, (cell, name) in enumerate(learners.items()):
        if cell in rows.index:
            place = rows.loc[cell, ["colour_reliance", "advantage"]].astype(float)
            shown = {"marker": "os^"[number % 3], "color": PALETTE[number % 8], "markersize": 6, "linestyle": ""}
            axis.plot(*place, label=name.split(" (")[0], **shown)
    axis.legend(loc="lower right", fontsize=6, ncol=2, handletextpad=0.2, columnspacing=0.8)
    axis.set(title="environment membership: learners", xlabel="colour reliance: mean |p(x) − p(recoloured x)|")


def plot_roc(points: pd.DataFrame) -> Figure:
    """ROC curves of the attack on outputs that is best on held-out shadows, a curve a cell.

    Args:
        points: columns `cell`, `attack`, `false_positive_rate`, `true_positive_rate`.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 5.4), layout="constrained")
        axis = figure.subplots()
        for number, (cell, rows) in enumerate(points.groupby("cell", sort=False)):
            name = f"{cell} ({rows['attack'].iloc[0].replace('_', ' ')})"
            axis.plot(
                rows["false_positive_rate"],
                rows["true_positive_rate"],
                color=PALETTE[number % len(PALETTE)],
                linewidth=1.5,
                label=name,
                drawstyle="steps-post",
            )
        axis.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
        axis.set(xlabel="false positives", ylabel="true positives", aspect="equal")
        axis.legend(loc="lower right", fontsize=7)
        heading(figure, "Guessing a binary secret from outputs", "64 targets of each secret")
    return figure
