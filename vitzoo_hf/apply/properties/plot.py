"""Draw predicted properties: a panel a target, a row a kind of features, over bands of shuffled labels."""

import math

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vitzoo_hf.report.factors import require
from vitzoo_hf.report.style import PALETTE, STYLE, heading, short

COLUMNS = ("target", "rows", "features", "model", "split", "metric", "value", "low", "high")
SHUFFLED = ("shuffled_low", "shuffled_high")
SHOWN = {"r2": "R²", "balanced_accuracy": "balanced accuracy"}
SPLIT_COLOURS = {"run": PALETTE[0], "lineage": PALETTE[5]}
PANELS_ACROSS = 4
LEAST_R2 = -0.5  # R² has no lower bound; one bad cell would squeeze all others


@rc_context(STYLE)
def plot_properties(table: pd.DataFrame) -> Figure:
    """Draw R² of numbers and balanced accuracy of classes with 95 % intervals, over bands of shuffled labels.

    Args:
        table: the result of `predict_properties`. R² below -0.5 is drawn at -0.5.

    Raises:
        ZooError: if the table lacks a column, or has no rows.
    """
    require(table, "properties", (*COLUMNS, *SHUFFLED))
    # one metric a kind of target: the table has several, and a panel shows one
    table = table[table["metric"].isin(SHOWN)]
    labels = table["features"] + np.where(table["model"] == "ridge", "", ", " + table["model"])
    table = table.assign(label=labels, panel=[_title(row) for row in table.to_dict("records")])
    names, panels = list(dict.fromkeys(table["label"])), list(dict.fromkeys(table["panel"]))
    columns = min(PANELS_ACROSS, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (1.6 + 2.35 * columns, 1.5 + lines * (0.75 + 0.24 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    grid[0].set_yticks(range(len(names)), [short(name, 30) for name in names])
    grid[0].set_ylim(len(names) - 0.4, -0.6)
    for axes, panel in zip(grid, panels, strict=False):
        _panel(axes, table[table["panel"] == panel], names)
        axes.set_title(panel, fontsize=9)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    splits = [split for split in SPLIT_COLOURS if (table["split"] == split).any()]
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=SPLIT_COLOURS[split], marker="o", label=f"unseen {split}s") for split in splits
    ]
    handles.append(Patch(color="#d1d5db", label="shuffled labels, 5th to 95th percentile"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    heading(
        figure, "Which properties can be predicted?", "cross-validated; lines: 95 % bootstrap over held-out groups"
    )
    return figure


def _title(row: dict[str, str]) -> str:
    name = row["target"].removeprefix("factor_").replace("_", " ")
    rows = ", all epochs" if row["rows"] == "all" else ""
    return f"{name}{rows}\n{SHOWN[row['metric']]}"


def _panel(axes: Axes, table: pd.DataFrame, names: list[str]) -> None:
    numbers = bool((table["metric"] == "r2").all())
    least = LEAST_R2 if numbers else 0.0
    for split, part in table.groupby("split", sort=False):
        shift = -0.17 if split == "run" else 0.17
        y = part["label"].map(names.index).to_numpy(float) + shift
        low, high = (part[name].astype(float).clip(least, 1) for name in SHUFFLED)
        # a least width, because bands of zero width would not be drawn
        axes.barh(y, (high - low).clip(lower=0.006), left=low, height=0.3, color="#d1d5db", lw=0)
        ends = part[["low", "high"]].astype(float).clip(least, 1)
        axes.hlines(y, ends["low"], ends["high"], color=SPLIT_COLOURS[str(split)], lw=1.6)
        axes.scatter(part["value"].clip(lower=least), y, s=16, color=SPLIT_COLOURS[str(split)], zorder=3)
    axes.set_xlim(least - 0.05, 1.05)
    if numbers:
        axes.axvline(0, color="#9ca3af", lw=0.8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
