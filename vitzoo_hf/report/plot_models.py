"""Figures of single models: the population, accuracy and gap by factor, learning curves.

The input are pandas tables, the output matplotlib `Figure` objects: no model is loaded and no window opened.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from vitzoo_hf.report.factors import (
    MAX_LEVELS,
    NothingToDrawError,
    explained_variance,
    final_models,
    key_factors,
    levels_of,
    require,
    varying_factors,
)
from vitzoo_hf.report.style import FAINT, INK, MUTED, PALETTE, PERCENT, STYLE, colours_of, heading, short

MAX_PANELS = 8

OVERVIEW = {
    "test_accuracy": "test accuracy",
    "test_loss": "test loss (nats)",
    "generalization_gap": "generalisation gap (accuracy)",
    "test_ece": "expected calibration error",
    "test_brier": "Brier score",
    "test_entropy": "entropy of predictions (nats)",
}
VALUES = {
    "test_accuracy": ("What decides test accuracy?", "test accuracy"),
    "generalization_gap": ("What decides the generalisation gap?", "training − test accuracy"),
}


@rc_context(STYLE)
def population_overview(evaluations: pd.DataFrame) -> Figure:
    """Histograms of what was measured of the final models: accuracy, loss, calibration error, gap.

    Args:
        evaluations: columns `model_id`, `stage`, `is_final`, `test_accuracy` and any of `OVERVIEW`; a column that is
            missing or all null has no panel.
    """
    table = final_models(evaluations)
    names = [name for name in OVERVIEW if name in table and table[name].notna().any()]
    columns = len(names) if len(names) <= 4 else 3
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(5.2, 3 * columns), 0.8 + 2.7 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name, colour in zip(panels, names, PALETTE, strict=False):
        values = table[name].dropna().astype(float)
        axes.hist(values, bins=min(30, max(5, math.ceil(2 * math.sqrt(len(values))))), color=colour, alpha=0.75)
        axes.axvline(values.median(), color=INK, lw=1.6)
        axes.set_title(f"median {values.median():.3g}, {len(values)} models", fontsize=9, weight="normal")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel(OVERVIEW[name])
    for axes in grid[:, 0]:
        axes.set_ylabel("models")
    heading(figure, "The population", f"{len(table)} final models on their test images; black line: median")
    return figure


@rc_context(STYLE)
def by_factor(evaluations: pd.DataFrame, value: str = "test_accuracy") -> Figure:
    """One panel a varying factor: the accuracy or gap of every final model, median and quartiles of each level.

    Args:
        evaluations: columns `model_id`, `stage`, `is_final`, `value`, and the factors.
        value: a key of `VALUES`.
    """
    table = final_models(evaluations, value)
    shares = explained_variance(evaluations, value)
    levels = varying_factors(table) or {"all models": levels_of(pd.Series("all", index=table.index))}
    names = list(shares.index[:MAX_PANELS]) or list(levels)
    columns = len(names) if len(names) <= 5 else math.ceil(len(names) / 2)
    rows = math.ceil(len(names) / columns)
    ratios = [_room(levels[name].cat.categories) if rows == 1 else 5 for name in names[:columns]]
    figure = Figure(figsize=(max(5.2, 0.9 + 0.46 * sum(ratios)), 0.9 + 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False, width_ratios=ratios)
    for axes, name, room in zip(grid.flat, names, ratios * rows, strict=False):
        _strip_panel(axes, table[value].astype(float), levels[name], shares.get(name), room)
        axes.set_title(short(name, 24), pad=22)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(VALUES[value][1])
        axes.yaxis.set_major_formatter(PERCENT)
    subtitle = f"{len(table)} final models; line: median, box: quartiles"
    subtitle += "" if len(shares) <= MAX_PANELS else f"; the {MAX_PANELS} strongest of {len(shares)} factors"
    subtitle += "\nη²: share of the variance between models that the factor explains" if len(shares) else ""
    heading(figure, VALUES[value][0], subtitle)
    return figure


@rc_context(STYLE)
def learning_curves(index: pd.DataFrame) -> Figure:
    """Test accuracy and generalisation gap against epoch, a thin line a run, coloured by the strongest factor.

    Args:
        index: columns `model_id`, `run_id`, `stage`, `epoch`, `is_final`, `test_accuracy`, and the factors;
            `generalization_gap` where recorded.
    """
    require(index, "index", ("model_id", "run_id", "stage", "epoch", "is_final", "test_accuracy"))
    rows = index[index["test_accuracy"].notna()].sort_values("epoch")
    stages = {"pretrain": "Pre-training", "finetune": "Fine-tuning"}
    parts = [(stage, rows[rows["stage"] == stage]) for stage in stages if (rows["stage"] == stage).any()]
    if not parts:
        raise NothingToDrawError("table 'index': no row has a recorded test accuracy")
    values = [value for value in VALUES if value in rows and rows[value].notna().any()]
    figure = Figure(figsize=(3.8 * len(parts) + 3.8, 0.9 + 3.4 * len(values)), layout="constrained")
    ratios = [1, 1.6][-len(parts) :]
    grid = figure.subplots(len(values), len(parts), squeeze=False, width_ratios=ratios, sharex="col")
    for column, (stage, part) in enumerate(parts):
        runs = part.drop_duplicates("run_id", keep="last").reset_index(drop=True)
        title = "run" if len(runs) <= MAX_LEVELS else ""
        level = levels_of(runs["run_id"] if title else pd.Series("all runs", index=runs.index))
        for name, found in list(key_factors(index, runs).items())[: stage == "finetune"]:
            title, level = name, found
        for axes, value in zip(grid[:, column], values, strict=True):
            _curves(axes, part[part[value].notna()], pd.Series(level.array, index=runs["run_id"]), value)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(PERCENT)
            axes.set_ylabel(VALUES[value][1])
        where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "alignment": "left"}
        grid[0, column].legend(title=title, handlelength=1.4, **where)
        grid[0, column].set_title(f"{stages[stage]} ({len(runs)} run{'s' * (len(runs) > 1)})")
        grid[-1, column].set_xlabel("epoch (points: kept checkpoints)")
    subtitle = "thin: one run; thick: median; shaded: the middle half of the runs"
    heading(figure, "How the population learns", subtitle)
    return figure


def _room(names: Collection[str]) -> float:
    return max(2.0 + min(len(names), 12), min(8.0, 0.2 * sum(len(name) + 1 for name in names)))


def _strip_panel(axes: Axes, y: pd.Series, level: pd.Series, share: float | None, room: float) -> None:
    names = list(colours_of(level))
    rng = np.random.default_rng(0)
    for i, (name, colour) in enumerate(colours_of(level).items()):
        values = y[level == name]
        low, median, high = values.quantile([0.25, 0.5, 0.75])
        axes.add_patch(Rectangle((i - 0.32, low), 0.64, high - low, color=colour, alpha=0.18, lw=0))
        x = i + rng.uniform(-0.2, 0.2, len(values))
        axes.scatter(x, values, s=13, color=colour, alpha=0.7, linewidths=0, zorder=2)
        axes.plot([i - 0.32, i + 0.32], [median, median], color=INK, lw=1.6, zorder=3)
    step = math.ceil(len(names) / MAX_LEVELS)
    shown = [short(name, 14) for name in names[::step]]
    tilt = 35 if 0.2 * sum(len(name) + 1 for name in shown) > room else 0
    axes.set_xticks(range(0, len(names), step), shown, rotation=tilt, ha="right" if tilt else "center")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    if share is not None:
        subtitle = "η² not defined" if math.isnan(share) else f"η² = {share:.2f}"
        axes.text(0, 1.055, subtitle, transform=axes.transAxes, color=MUTED)
        for width, colour in ((1.0, FAINT), (0.0 if math.isnan(share) else share, INK)):
            where: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
            axes.add_patch(Rectangle((0, 1.02), width, 0.018, color=colour, lw=0, **where))


def _curves(axes: Axes, rows: pd.DataFrame, level: pd.Series, value: str) -> None:
    """Thin lines for runs; medians and quartiles at epochs that at least half of a level's runs kept."""
    for name, colour in colours_of(level).items():
        part = rows[rows["run_id"].isin(level.index[level == name])]
        lines = [run[["epoch", value]].to_numpy(float) for _, run in part.groupby("run_id")]
        axes.add_collection(
            LineCollection(lines, colors=[colour], linewidths=0.8, alpha=min(0.3, 15 / max(1, len(lines))))
        )
        by_epoch = part.groupby("epoch")[value]
        counts = by_epoch.size()
        shown = counts.index[2 * counts >= counts.max()]
        low, median, high = (by_epoch.quantile(q)[shown] for q in (0.25, 0.5, 0.75))
        axes.fill_between(shown, low, high, color=colour, alpha=0.15, lw=0)
        label = short(name, 24)
        axes.plot(shown, median, "o-", color=colour, lw=2.4, ms=5, mec="white", label=label, zorder=3)
    axes.autoscale_view()
