"""Figures of what factors do: variance explained, groups that lie apart, pairs of like and of unlike models.

Figure of modes: models as points in a plane, coloured by the generating factor that tells them apart.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vitzoo_hf.metrics.modes import classical_mds
from vitzoo_hf.report.factor_tables import ALL_FACTORS, best_factor
from vitzoo_hf.report.factors import MAX_LEVELS, require, varying_factors
from vitzoo_hf.report.pair_tables import SPACES, compared_models, spaces_of
from vitzoo_hf.report.style import INK, MUTED, NAMES, PALETTE, STYLE, colours_of, heading, short

MEASURES = {
    "test_accuracy": "test\naccuracy",
    "generalization_gap": "general-\nisation gap",
    "weight_l2": "weights\nL2",
    "weight_cosine": "weights\ncosine",
    "agreement": "agreement",
    "cka": "CKA",
}
LEVEL_OF_TEST = 0.05
MAX_FACTORS = 20
AMONG = {"all": "", "two parents": " † pairs of different parents only", "one parent": " * pairs of one parent only"}
SAME = ((True, "same level", PALETTE[0]), (False, "different levels", PALETTE[5]))


@rc_context(STYLE)
def variance(table: pd.DataFrame) -> Figure:
    """Shares of variance, a row a factor and a column a measure, with the p-values of their permutation tests.

    Args:
        table: the result of `variance_table`.
    """
    require(table, "factors", ("measure", "factor", "share", "p", "least_p"))
    measures = [name for name in MEASURES if (table["measure"] == name).any()]
    names = [*_by_largest(table[table["factor"] != ALL_FACTORS], "factor", "share"), ALL_FACTORS]
    cells = table.set_index(["factor", "measure"])
    figure = Figure(figsize=(2.4 + 1.15 * len(measures), 1.9 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    shares = cells["share"].astype(float).unstack().reindex(index=names, columns=measures).to_numpy()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, name in enumerate(names):
        for column, measure in enumerate(measures):
            if (name, measure) in cells.index:
                _share(axes, column, row, cells.loc[(name, measure)])
    axes.axhline(len(names) - 1.5, color="white", lw=4)
    axes.set_xticks(range(len(measures)), [MEASURES[name] for name in measures])
    axes.set_yticks(range(len(names)), [short(name, 24) for name in names])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, shrink=0.9, aspect=30).set_label("share of the variance")
    subtitle = f"bold: p ≤ {LEVEL_OF_TEST} by permutation of levels; small: p; – too few parents or levels for a test"
    heading(
        figure, "What do factors explain?", subtitle + "\nof values: η²; of distances between models: PERMANOVA R²"
    )
    return figure


def _share(axes: Axes, x: int, y: int, cell: pd.Series) -> None:
    share, p = float(cell["share"]), float(cell["p"])
    ink = "white" if share > 0.6 else INK
    if math.isnan(share):
        axes.text(x, y, "not defined", ha="center", va="center", color=MUTED, fontsize=7)
        return
    weight = "bold" if p <= LEVEL_OF_TEST else "normal"
    axes.text(x, y - 0.12, f"{share:.2f}", ha="center", va="center", color=ink, weight=weight, fontsize=10)
    significance = "–" if cell["least_p"] > LEVEL_OF_TEST else f"p {p:.3f}"
    axes.text(x, y + 0.26, significance, ha="center", va="center", color=ink, fontsize=7)


@rc_context(STYLE)
def separation(table: pd.DataFrame) -> Figure:
    """The silhouette of every factor in each matrix of distances, beside what permuted levels give.

    Args:
        table: the result of `separation_table`.
    """
    require(table, "separation", ("space", "factor", "silhouette", "chance_5", "chance_95", "least_p"))
    spaces = [space for space in SPACES if (table["space"] == space).any()]
    names = _by_largest(table, "factor", "silhouette")[:MAX_FACTORS]
    figure = Figure(figsize=(1.7 + 2.5 * len(spaces), 1.7 + 0.36 * len(names)), layout="constrained")
    for axes, space in zip(_panels(figure, len(spaces), names), spaces, strict=True):
        axes.use_sticky_edges = False  # bars would take the margin where they start
        part = table[table["space"] == space].set_index("factor").reindex(names)
        y = np.arange(len(names))
        wide = (part["chance_95"] - part["chance_5"]).to_numpy(float)
        axes.barh(y, wide, left=part["chance_5"].to_numpy(float), height=0.62, color="#d1d5db", lw=0)
        apart = (part["silhouette"] > part["chance_95"]).to_numpy()
        testable = (part["least_p"] <= LEVEL_OF_TEST).to_numpy()
        for shown, colour in ((testable & apart, PALETTE[0]), (testable & ~apart, MUTED)):
            axes.scatter(part["silhouette"][shown], y[shown], s=34, color=colour, zorder=3)
        axes.scatter(part["silhouette"][~testable], y[~testable], s=34, facecolor="none", edgecolor=INK, zorder=3)
        axes.axvline(0, color=INK, lw=1)
        axes.set_title(SPACES[space].replace(": ", "\n"), fontsize=9)
        axes.set_xlabel("mean silhouette")
        axes.xaxis.set_major_locator(MaxNLocator(4))
    subtitle = (
        "1: levels lie apart; 0: they overlap. Grey bar: 5th to 95th percentile of permuted levels; blue: above"
    )
    subtitle += "\nhollow: too few parents or levels for a test"
    heading(figure, "Which factors make modes?", subtitle)
    return figure


@rc_context(STYLE)
def level_pairs(table: pd.DataFrame) -> Figure:
    """Boxes of every metric of pairs: pairs with the same level of a factor over pairs with different ones.

    Args:
        table: the result of `level_pairs_table`.
    """
    require(
        table, "pairs_by_level", ("metric", "factor", "among", "same_level", "q05", "q25", "median", "q75", "q95")
    )
    metrics = [metric for metric in SPACES if (table["metric"] == metric).any()]
    among = table.drop_duplicates("factor").set_index("factor")["among"].map(list(AMONG).index)
    names = list(among.sort_values(kind="stable").index[:MAX_FACTORS])
    labels = [short(name) + list(AMONG.values())[among[name]][:2] for name in names]
    figure = Figure(figsize=(1.7 + 2.6 * len(metrics), 2.0 + 0.5 * len(names)), layout="constrained")
    for axes, metric in zip(_panels(figure, len(metrics), labels), metrics, strict=True):
        for same, _, colour in SAME:
            part = table[(table["metric"] == metric) & (table["same_level"].astype(bool) == same)]
            places = [names.index(name) + (-0.19 if same else 0.19) for name in part["factor"] if name in names]
            _boxes(axes, part[part["factor"].isin(names)], places, colour)
        axes.set_title(NAMES[metric].split(" (")[0], fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if metric == "agreement":
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    handles = [Patch(color=colour, alpha=0.6, label=label) for _, label, colour in SAME]
    figure.legend(handles=handles, loc="outside lower left", ncols=2)
    subtitle = "pairs of final models; box: quartiles, line: median, whiskers: 5th and 95th percentile"
    subtitle += "\n" + ";  ".join(
        mark.strip() for i, mark in enumerate(AMONG.values()) if mark and (among == i).any()
    )
    heading(figure, "Are models alike that share a factor?", subtitle)
    return figure


def _boxes(axes: Axes, table: pd.DataFrame, places: list[float], colour: str) -> None:
    keys = {"whislo": "q05", "q1": "q25", "med": "median", "q3": "q75", "whishi": "q95"}
    boxes = [{key: float(row[column]) for key, column in keys.items()} for row in table.to_dict("records")]
    fill: dict[str, Any] = {"boxprops": {"facecolor": colour, "alpha": 0.6, "lw": 0}}
    lines: dict[str, Any] = {"medianprops": {"color": INK, "lw": 1.6}, "whiskerprops": {"color": colour, "lw": 1.2}}
    options: dict[str, Any] = {"patch_artist": True, "showfliers": False, "showcaps": False, "manage_ticks": False}
    axes.bxp(boxes, positions=places, widths=0.3, orientation="horizontal", **fill, **lines, **options)


def _panels(figure: Figure, count: int, labels: list[str]) -> list[Axes]:
    """Panels side by side that share a list of factors, the first on top."""
    panels = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    panels[0].set_yticks(range(len(labels)), [short(label, 24) for label in labels])
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    for axes in panels:
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    return panels


def _by_largest(table: pd.DataFrame, key: str, value: str) -> list[str]:
    return list(table.groupby(key)[value].max().sort_values(ascending=False, kind="stable").index)


def modes_table(pairs: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """Final models (fine-tuned ones where there are any) in the plane of their distances, and their factors.

    Args:
        pairs: see `spaces_of`.
        index: see `spaces_of`.

    Returns:
        `model_id`, `parent_id`, `head`, `dataset` and `factor_*` where known; then for each metric of `SPACES` that
        was measured: `*_x`, `*_y` (see `classical_mds`; null for a model that lacks pairs), `*_share` (of the
        positive eigenvalues, held by these two axes) and `*_factor`, the factor with the largest silhouette, null
        where none varies.

    Raises:
        NothingToDrawError: if no distance is known for three models.
    """
    spaces, rows = spaces_of(pairs, index), compared_models(pairs, index)
    kept = [n for n in rows if n in ("model_id", "parent_id", "head", "dataset") or str(n).startswith("factor_")]
    table = rows[kept].set_index("model_id", drop=False)
    for space in spaces:
        points, share = classical_mds(space.unlike)
        table.loc[space.rows["model_id"], [f"{space.metric}_x", f"{space.metric}_y"]] = points
        table[f"{space.metric}_share"] = share
        table[f"{space.metric}_factor"] = best_factor(space, MAX_LEVELS)
    return table.reset_index(drop=True)


@rc_context(STYLE)
def modes(table: pd.DataFrame) -> Figure:
    """Models in the plane of their distances in weights and in behaviour, coloured by what separates them best.

    Args:
        table: the result of `modes_table`.
    """
    spaces = [space for space in SPACES if f"{space}_x" in table]
    require(table, "modes", ("model_id", f"{(spaces or list(SPACES))[0]}_x"))
    levels = varying_factors(table)
    columns = min(2, len(spaces))
    lines = math.ceil(len(spaces) / columns)
    figure = Figure(figsize=(5.4 * columns + 0.4, 0.4 + 4.4 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(spaces) :]:
        axes.set_visible(False)
    for axes, space in zip(panels, spaces, strict=False):
        points = table[[f"{space}_x", f"{space}_y"]].astype(float)
        name, share = table[f"{space}_factor"].iloc[0], table[f"{space}_share"].iloc[0]
        drawn: dict[str, Any] = {"s": 26, "alpha": 0.75, "linewidths": 0}
        if pd.isna(name):
            axes.scatter(points.iloc[:, 0], points.iloc[:, 1], **drawn)
        else:
            for label, colour in colours_of(levels[name]).items():
                part = points[levels[name] == label]
                axes.scatter(part.iloc[:, 0], part.iloc[:, 1], color=colour, label=short(label, 24), **drawn)
            where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "alignment": "left"}
            axes.legend(title=short(name), handletextpad=0.2, **where)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_aspect("equal", adjustable="datalim")
        held = "not defined" if pd.isna(share) else f"{100 * share:.0f} %"
        axes.set_title(f"{SPACES[space]}\n", pad=2)
        subtitle = f"{points.iloc[:, 0].notna().sum()} models; share of the two axes: {held}"
        axes.text(0, 1.015, subtitle, transform=axes.transAxes, color=MUTED)
        axes.set(xlabel="first axis", ylabel="second axis")
    heading(figure, "Modes of the population", "a point is a final model; classical scaling of all their distances")
    return figure
