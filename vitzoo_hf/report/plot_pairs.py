"""Figures of pairs of models: heat maps by lineage, layer by layer, distance and accuracy against agreement."""

import json
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from vitzoo_hf.format.schema import DISTANCES, ZooError
from vitzoo_hf.report.factors import NothingToDrawError, key_factors, levels_of, require, run_of, same_groups
from vitzoo_hf.report.pair_tables import square
from vitzoo_hf.report.style import INK, NAMES, PALETTE, PERCENT, STYLE, colours_of, heading, short

KAPPAS = {"cohen_kappa": "Cohen’s kappa", "error_consistency": "error consistency"}
GROUPS = (("different parents", False, PALETTE[5]), ("same parent", True, PALETTE[0]))


LABELS = ("model_id", "lineage")


def pair_matrix(pairs: pd.DataFrame, index: pd.DataFrame, value: str = "agreement") -> Figure:
    """A heat map of a pairwise metric, models ordered by lineage and then by the strongest factors.

    Models without any value are left out; single missing pairs are hatched.

    Args:
        pairs: columns `model_a`, `model_b` and `value`.
        index: `model_id`, `run_id`, `parent_id`, `stage`, `is_final`, `test_accuracy`, and the factors.
        value: a metric of `pairs`, such as `agreement`, `cka` or `weight_l2`.
    """
    return draw_matrix(matrix_table(pairs, index, value), value)


def matrix_table(pairs: pd.DataFrame, index: pd.DataFrame, value: str) -> pd.DataFrame:
    """What a heat map shows, one row a model in the order of the figure; see `pair_matrix` for the arguments.

    Returns:
        `model_id`, `lineage` (the run at the root), the factors of the strips on the left, and a column a model
        with the values. Models without a value come last and have no column.
    """
    require(pairs, "pairs", ("model_a", "model_b", value))
    require(index, "index", ("model_id", "run_id", "parent_id", "stage", "is_final", "test_accuracy"))
    known = pairs[pairs[value].notna()]
    if known.empty:
        raise NothingToDrawError(f"table 'pairs': no pair has a value in column {value!r}")
    models, strips = _by_lineage(pd.unique(known[["model_a", "model_b"]].to_numpy().ravel()), index)
    matrix = square(known, list(models["model_id"]), value)
    columns = [f"factor_{name}" if f"factor_{name}" in models else name for name in strips]
    table = pd.concat([models[[*LABELS, *columns]], pd.DataFrame(matrix, columns=models["model_id"])], axis=1)
    everyone = pd.unique(pairs[["model_a", "model_b"]].to_numpy().ravel())
    left_out = [model for model in everyone if model not in set(models["model_id"])]
    return table.reindex(range(len(table) + len(left_out))).assign(model_id=[*models["model_id"], *left_out])


@rc_context(STYLE)
def draw_matrix(table: pd.DataFrame, value: str) -> Figure:
    """The heat map of `matrix_table`'s result; `value` names the metric."""
    require(table, "matrix", LABELS)
    rows = table[table["model_id"].isin(table.columns)].reset_index(drop=True)
    size = len(rows)
    matrix = rows[list(rows["model_id"])].to_numpy(float)
    columns = [name for name in rows if name not in LABELS and name not in set(rows["model_id"])]
    strips = {str(name).removeprefix("factor_"): levels_of(rows[name]) for name in columns}
    figure = Figure(figsize=(8.6, 7.6), layout="constrained")
    axes = figure.subplots()
    hatched: dict[str, Any] = {"facecolor": "#f3f4f6", "edgecolor": "#b6bcc6", "hatch": "/////"}
    axes.add_patch(Rectangle((0, 0), size, size, lw=0, zorder=-1, **hatched))
    low, high = np.nanquantile(matrix, [0.01, 0.99])
    shown: dict[str, Any] = {"cmap": "viridis_r" if value in DISTANCES else "viridis", "vmin": low}
    image = axes.imshow(matrix, extent=(0, size, size, 0), vmax=max(high, low + 1e-9), **shown)
    diagonal = np.where(np.eye(size) > 0, 0.0, np.nan)
    axes.imshow(diagonal, extent=(0, size, size, 0), cmap="gray_r", vmin=0, vmax=1)
    entries = _margin(axes, rows, strips)
    if np.isnan(matrix[np.isnan(diagonal)]).any():
        entries.append(Patch(label="no value", **hatched))
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=34, pad=0.02, extend="both")
    bar.set_label(f"{NAMES.get(value, value)}; scale: 1st to 99th percentile")
    legend = figure.legend(handles=entries, loc="outside right upper", handlelength=1.1, alignment="left")
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text().endswith(":") else "normal")
    left_out = len(table) - size
    subtitle = f"{size} final models in the same order on both axes, grouped by the run at the root of their lineage"
    subtitle += f"\nleft out, without a value: {left_out}" if left_out else ""
    heading(figure, f"Who resembles whom: {NAMES.get(value, value).split(' (')[0]}", subtitle)
    return figure


@rc_context(STYLE)
def distance_against_agreement(pairs: pd.DataFrame) -> Figure:
    """Distance in weight space against agreement, a point a pair, siblings apart from strangers, with margins.

    Args:
        pairs: columns `weight_l2`, `agreement`, `same_parent`.
    """
    require(pairs, "pairs", ("weight_l2", "agreement", "same_parent"))
    known = pairs.dropna(subset=["weight_l2", "agreement"])
    if known.empty:
        raise NothingToDrawError("table 'pairs': no pair has both a weight distance and an agreement")
    figure = Figure(figsize=(7.4, 5.8), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row", width_ratios=(5, 1), height_ratios=(1, 5))
    axes, margins = (
        grid[1, 0],
        ((grid[0, 0], "weight_l2", "vertical"), (grid[1, 1], "agreement", "horizontal")),
    )
    alpha = float(np.clip(10 / math.sqrt(len(known)), 0.08, 0.8))
    for label, same, colour in GROUPS:
        part = known[known["same_parent"].astype(bool) == same]
        x, y = part["weight_l2"].astype(float), part["agreement"].astype(float)
        defined = len(x) > 2 and x.nunique() > 1 and y.nunique() > 1
        rho = f"{x.rank().corr(y.rank()):+.2f}" if defined else "not defined"
        axes.scatter(x, y, s=14, color=colour, alpha=alpha, linewidths=0, rasterized=True)
        legend_label = f"{label}: {len(x):,} pairs, Spearman {rho}" if len(x) else None
        axes.scatter([], [], s=26, color=colour, label=legend_label)
        for margin, column, way in margins if len(x) else ():
            bins = np.histogram_bin_edges(known[column].astype(float), bins=40)
            margin.hist(part[column], bins=bins, color=colour, alpha=0.55, orientation=way, density=True)
    for margin in (grid[0, 0], grid[0, 1], grid[1, 1]):
        margin.set_axis_off()
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set(xlabel=NAMES["weight_l2"], ylabel=NAMES["agreement"])
    figure.legend(loc="outside lower left", ncols=2, handletextpad=0.3)
    heading(figure, "Close in weights, close in behaviour?", "a point is a pair of models; margins: densities")
    return figure


def accuracy_table(pairs: pd.DataFrame, evaluations: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """Each pair that has an agreement, with the accuracies that limit it.

    Args:
        pairs: columns `model_a`, `model_b`, `same_parent`, `agreement`; `cohen_kappa` and `error_consistency` where
            they were measured.
        evaluations: columns `model_id`, `test_accuracy`.
        index: columns `model_id` and, for the number of classes, `architecture_args`.

    Returns:
        Those columns of `pairs`, then `accuracy_a`, `accuracy_b`, `classes`, and the two bounds of
        `agreement_bounds`: `independent` and `most`. `classes` and `independent` are null where unknown.
    """
    require(pairs, "pairs", ("model_a", "model_b", "same_parent", "agreement"))
    require(evaluations, "evaluations", ("model_id", "test_accuracy"))
    columns = ["model_a", "model_b", "same_parent", "agreement"]
    table = pairs[[*columns, *(name for name in KAPPAS if name in pairs)]]
    accuracy = evaluations.drop_duplicates("model_id").set_index("model_id")["test_accuracy"].astype(float)
    table = table.assign(accuracy_a=table["model_a"].map(accuracy), accuracy_b=table["model_b"].map(accuracy))
    table = table.dropna(subset=["agreement", "accuracy_a", "accuracy_b"]).reset_index(drop=True)
    if table.empty:
        raise NothingToDrawError("table 'pairs': no pair has an agreement and both accuracies")
    classes = pd.Series(np.nan, index=pd.unique(index["model_id"]))
    if "architecture_args" in index:
        arguments = index.drop_duplicates("model_id").set_index("model_id")["architecture_args"]
        classes = arguments.map(lambda text: json.loads(text).get("num_classes", math.nan)).astype(float)
    both = table["model_a"].map(classes), table["model_b"].map(classes)
    table["classes"] = both[0].where(both[0] == both[1])
    independent, most = agreement_bounds(table["accuracy_a"], table["accuracy_b"], table["classes"])
    return table.assign(independent=independent, most=most)


def agreement_bounds(a: pd.Series, b: pd.Series, classes: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Agreement that two accuracies allow: if errors were independent, and the most there can be.

    Independent: `a b + (1 - a)(1 - b) / (C - 1)`, both right, or both wrong with errors spread evenly over the
    other classes. The most: `1 - |a - b|`, the weaker model errs wherever the stronger one does, and alike.

    Args:
        a: accuracy of one model.
        b: accuracy of the other.
        classes: how many classes there are, C, at least 2.

    >>> independent, most = agreement_bounds(pd.Series([0.9]), pd.Series([0.8]), pd.Series([11]))
    >>> independent.round(3).tolist(), most.round(3).tolist()
    ([0.722], [0.9])
    """
    return a * b + (1 - a) * (1 - b) / (classes - 1), 1 - (a - b).abs()


@rc_context(STYLE)
def agreement_against_accuracy(table: pd.DataFrame) -> Figure:
    """Agreement against the mean accuracy of a pair, between what its accuracies allow; kappas where known.

    Args:
        table: the result of `accuracy_table`.
    """
    require(table, "pairs", ("same_parent", "agreement", "accuracy_a", "accuracy_b", "independent", "most"))
    values = ["agreement", *(name for name in KAPPAS if name in table and table[name].notna().any())]
    figure = Figure(figsize=(max(6.4, 4.1 * len(values)), 4.9), layout="constrained")
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    x = (table["accuracy_a"].astype(float) + table["accuracy_b"].astype(float)) / 2
    alpha = float(np.clip(10 / math.sqrt(len(table)), 0.08, 0.8))
    for axes, value in zip(panels, values, strict=True):
        for label, same, colour in GROUPS:
            part = table["same_parent"].astype(bool) == same
            axes.scatter(x[part], table.loc[part, value], s=14, color=colour, alpha=alpha, lw=0, rasterized=True)
            if value == "agreement" and part.any():
                axes.scatter([], [], s=26, color=colour, label=f"{label}: {part.sum():,} pairs")
        axes.set(xlabel="mean test accuracy of the two models", title=KAPPAS.get(value, value))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(PERCENT)
        if value != "agreement":
            axes.axhline(0, color=INK, lw=1, ls="--")
    for name, label, colour, width in (
        ("most", "the most that the two accuracies allow", "#9ca3af", 0.8),
        ("independent", "if errors were independent", INK, 1.2),
    ):
        if table[name].notna().any():
            bound: dict[str, Any] = {
                "marker": "_",
                "color": colour,
                "linewidths": width,
                "zorder": 0.9,
                "alpha": min(1, 3 * alpha),
            }
            panels[0].scatter(x, table[name], s=22, rasterized=True, **bound)
            panels[0].scatter([], [], s=60, marker="_", color=colour, label=label)
    panels[0].yaxis.set_major_formatter(PERCENT)
    figure.legend(loc="outside lower left", ncols=2, handletextpad=0.3)
    subtitle = "a point is a pair of models; dashes: what its two accuracies allow and suggest, see the legend"
    heading(figure, "More alike than their accuracies explain?", subtitle)
    return figure


@rc_context(STYLE)
def layer_matrix(layers: pd.DataFrame) -> Figure:
    """A heat map of CKA between all blocks of a few models, models apart by white lines.

    Args:
        layers: of `layer_similarity`: columns `model_a`, `block_a`, `model_b`, `block_b`, `cka`, one row an
            ordered pair of blocks.
    """
    require(layers, "layers", ("model_a", "block_a", "model_b", "block_b", "cka"))
    if layers["cka"].isna().all():
        raise NothingToDrawError("table 'layers': no pair of blocks has a CKA")
    wide = layers.pivot(index=["model_a", "block_a"], columns=["model_b", "block_b"], values="cka")
    order = list(layers[["model_a", "block_a"]].drop_duplicates().itertuples(index=False, name=None))
    # pivot sorts by name; blocks go in the order of the table
    matrix = wide.reindex(index=order, columns=order).to_numpy(float)
    figure = Figure(figsize=(8.2, 6.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, extent=(0, len(order), len(order), 0), vmin=min(0, np.nanmin(matrix)), vmax=1)
    groups = pd.Series(range(len(order))).groupby([model for model, _ in order], sort=False)
    for number, (model, members) in enumerate(groups, 1):
        start, stop = members.iloc[0], members.iloc[-1] + 1
        axes.plot([0, len(order)], [start, start], [start, start], [0, len(order)], color="white", lw=2.2)
        axes.text((start + stop) / 2, -0.02 * len(order), f"model {number}", ha="center", va="bottom", weight="bold")
        axes.scatter([], [], s=0, label=f"{number}: {short(str(model), 60)}")
    step = math.ceil(len(order) / 24)
    ticks = [place for place in range(len(order)) if order[place][1] % step == 0]
    names = [str(order[place][1] + 1) for place in ticks]
    axes.set_xticks([place + 0.5 for place in ticks], names)
    axes.set_yticks([place + 0.5 for place in ticks], names)
    axes.grid(visible=False)
    axes.set(xlabel="block", ylabel="block (models in the same order)", xlim=(0, len(order)), ylim=(len(order), 0))
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("CKA (debiased)")
    figure.legend(loc="outside lower left", handlelength=0, handletextpad=0)
    subtitle = "class token after each block; brighter: more alike, whatever the rotation and scale"
    heading(figure, "Layer by layer: which blocks compute alike?", subtitle)
    return figure


def _by_lineage(models: Collection[str], index: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, pd.Series]]:
    """The rows of `models`, sorted by `lineage` (the run at their root), and the factors to show."""
    known = index.drop_duplicates("model_id").set_index("model_id", drop=False)
    if unknown := sorted(set(models) - set(known.index)):
        raise ZooError(f"table 'index' lacks {unknown[0]!r}, a model of 'pairs': use tables of the same zoo")
    parents = known["parent_id"].dropna().to_dict()
    roots = {model: model for model in models}
    for _ in range(32):  # deeper than any lineage; a circle would never end
        roots = {model: parents.get(root, root) for model, root in roots.items()}
    rows = known.loc[list(models)].reset_index(drop=True)
    rows = rows.assign(lineage=rows["model_id"].map(roots).map(run_of), tuned=rows["parent_id"].notna())
    codes = {f"_{name}": level.cat.codes for name, level in key_factors(index, rows).items()}
    rows = rows.assign(**codes).sort_values(["lineage", "tuned", *codes], ignore_index=True)
    shown = [(name, level) for name, level in key_factors(index, rows).items() if name != "parent"]
    return rows, dict([pair for pair in shown if not same_groups(pair[1], rows["lineage"])][:4])


def _margin(axes: Axes, rows: pd.DataFrame, strips: dict[str, pd.Series]) -> list[Patch]:
    """Factors as strips on the left, lineages as brackets on top, lines between; returns legend entries."""
    size, wide = len(rows), 0.035 * len(rows)
    entries = []
    for j, (name, level) in enumerate(strips.items()):
        colours, left = colours_of(level, j), wide * (1.15 * (j - len(strips)) - 0.4)
        cells = np.array([[to_rgb(colours[label])] for label in level])
        axes.imshow(cells, extent=(left, left + wide, size, 0), interpolation="nearest")
        axes.text(left + wide / 2, 1.01 * size, short(name), rotation=90, va="top", ha="center", fontsize=8)
        entries += [Patch(alpha=0, label=f"{name}:")] + [Patch(color=c, label=n) for n, c in colours.items()]
    groups = rows.groupby("lineage", sort=False).indices
    tilt = 60 if max(map(len, groups)) * len(groups) > 60 else 0
    for name, members in groups.items():
        start, stop = members[0], members[-1] + 1
        axes.plot([start + 0.01 * size, stop - 0.01 * size], [-0.015 * size] * 2, color=INK, lw=1.6)
        where: dict[str, Any] = {"ha": "left" if tilt else "center", "va": "bottom", "rotation": tilt}
        if len(groups) <= 30:
            axes.text((start + stop) / 2, -0.03 * size, short(name), **where)
        axes.plot([0, size], [start, start], [start, start], [0, size], color="white", lw=2.2)
    axes.set(xlim=(wide * (-1.15 * len(strips) - 0.4), size), ylim=(size, -0.03 * size))
    axes.set_axis_off()
    return entries
