"""Every figure of a zoo, drawn from its tables alone; no model is loaded and no window opened.

The input are pandas tables of the configs `index`, `evaluations` and `pairs`, with class labels as text
('finetune', 'linear'); the output are matplotlib `Figure` objects. What varies among the models is found in
the tables, so any blueprint's factors work. `vitzoo_hf.report` writes the figures to files.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vitzoo_hf.schema import ZooError, did_you_mean

MAX_LEVELS = MAX_PANELS = 8  # factors with more levels are neither colours nor strips; panels thin out ticks
# Okabe and Ito's colours, which the common forms of colour blindness keep apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#6B7280")
INK, MUTED, FAINT = "#1f2430", "#6b7280", "#e5e7eb"
STYLE: dict[Any, Any] = {"axes.edgecolor": "#9ca3af", "axes.labelcolor": INK, "axes.grid": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
STYLE |= {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"}
STYLE |= {"text.color": INK, "grid.color": FAINT, "xtick.color": "#4b5563", "ytick.color": "#4b5563"}
STYLE |= {"legend.frameon": False, "text.parse_math": False, "hatch.linewidth": 0.6, "axes.axisbelow": True}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g} %")
NAMES = {
    "agreement": "agreement (share of test images with the same prediction)",
    "cka": "CKA of features on test images (debiased)",
    "weight_l2": "distance of trunk weights (L2)",
    "weight_cosine": "cosine of trunk weights",
}


class NothingToDrawError(ZooError):
    """The columns are there but hold no value: the figure does not apply to this zoo."""


def final_models(table: pd.DataFrame, value: str = "test_accuracy") -> pd.DataFrame:
    """The final fine-tuned models that have a `value`; where there is none, the final pre-trained ones.

    Args:
        table: `evaluations` or `index`: columns `model_id`, `stage`, `is_final` and `value`.
        value: the column that must not be null.

    Raises:
        ZooError: if the table is empty, lacks a column, or no final model has a value.
    """
    require(table, "evaluations", ("model_id", "stage", "is_final", value))
    final = table[table["is_final"].astype(bool) & table[value].notna()]
    if final.empty:
        raise NothingToDrawError(f"no final model has a value in column {value!r}: evaluate the zoo first")
    tuned = final[final["stage"] == "finetune"]
    return (final if tuned.empty else tuned).reset_index(drop=True)


def varying_factors(table: pd.DataFrame) -> dict[str, pd.Series]:
    """What differs among the rows -> the level of each row, a categorical of text, ordered if numeric.

    Columns `factor_*`, then `head`, `dataset` and `parent` (from `parent_id`) unless they only repeat a factor.
    Left out: what is constant, and what differs in every row. Numbers that were sampled rather than taken from
    a grid (more than 8 values, fewer than two rows a value) are cut into quintiles.
    """
    columns = {str(c).removeprefix("factor_"): table[c] for c in table if str(c).startswith("factor_")}
    declared = set(columns)
    columns = {name: table[name] for name in ("head", "dataset") if name in table} | columns
    if "parent_id" in table:
        columns.setdefault("parent", table["parent_id"].map(_run_of, na_action="ignore"))
    found: dict[str, pd.Series] = {}
    for name in sorted(columns, key=lambda name: name not in declared):
        level = _levels(columns[name])
        repeats = name not in declared and any(_same_groups(level, other) for other in found.values())
        if 1 < level.nunique() < len(table) and not repeats:
            found[name] = level
    return found


def explained_variance(evaluations: pd.DataFrame, value: str = "test_accuracy") -> pd.Series:
    """The share of the variance of `value` among final models that each factor explains: one-way eta squared.

    1: the factor alone decides the value; 0: its levels have equal means. By chance, k levels among n models
    give (k - 1) / (n - 1). Shares of different factors need not add up to 1.

    Args:
        evaluations: columns `model_id`, `stage`, `is_final`, `value`, and the factors.
        value: a numeric column.

    Returns:
        factor -> eta squared, largest first; NaN where all models have the same value.
    """
    table = final_models(evaluations, value)
    y = table[value].astype(float)
    centred = y - y.mean()
    shares = {}
    for name, level in varying_factors(table).items():
        between = centred.groupby(level, observed=True).transform("mean")
        shares[name] = (between**2).sum() / (centred**2).sum() if y.nunique() > 1 else math.nan
    return pd.Series(shares, dtype=float, name="eta_squared").sort_values(ascending=False, kind="stable")


@rc_context(STYLE)
def accuracy_by_factor(evaluations: pd.DataFrame) -> Figure:
    """One panel a varying factor: the test accuracy of every final model, median and quartiles of each level.

    Args:
        evaluations: columns `model_id`, `stage`, `is_final`, `test_accuracy`, and the factors.
    """
    table = final_models(evaluations)
    shares = explained_variance(evaluations)
    levels = varying_factors(table) or {"all models": _levels(pd.Series("all", index=table.index))}
    names = list(shares.index[:MAX_PANELS]) or list(levels)
    columns = len(names) if len(names) <= 5 else math.ceil(len(names) / 2)
    rows = math.ceil(len(names) / columns)
    ratios = [_room(levels[name].cat.categories) if rows == 1 else 5 for name in names[:columns]]
    figure = Figure(figsize=(max(5.2, 0.9 + 0.46 * sum(ratios)), 0.9 + 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False, width_ratios=ratios)
    for axes, name, room in zip(grid.flat, names, ratios * rows, strict=False):
        _strip_panel(axes, table["test_accuracy"].astype(float), levels[name], shares.get(name), room)
        axes.set_title(_short(name, 24), pad=22)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_major_formatter(PERCENT)
    told = f"{len(table)} final models; line: median, box: quartiles"
    told += "" if len(shares) <= MAX_PANELS else f"; the {MAX_PANELS} strongest of {len(shares)} factors"
    told += "\nη²: share of the variance between models that the factor explains" if len(shares) else ""
    heading(figure, "What decides test accuracy?", told)
    return figure


@rc_context(STYLE)
def learning_curves(index: pd.DataFrame) -> Figure:
    """Test accuracy against epoch, a thin line a run and a thick median, coloured by the strongest factor.

    Args:
        index: columns `model_id`, `run_id`, `stage`, `epoch`, `is_final`, `test_accuracy`, and the factors.
    """
    require(index, "index", ("model_id", "run_id", "stage", "epoch", "is_final", "test_accuracy"))
    rows = index[index["test_accuracy"].notna()].sort_values("epoch")
    stages = {"pretrain": "Pre-training", "finetune": "Fine-tuning"}
    parts = [(stage, rows[rows["stage"] == stage]) for stage in stages if (rows["stage"] == stage).any()]
    if not parts:
        raise NothingToDrawError("table 'index': no row has a recorded test accuracy")
    figure = Figure(figsize=(3.8 * len(parts) + 3.8, 4.4), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False, width_ratios=[1, 1.6][-len(parts) :])[0]
    for axes, (stage, part) in zip(panels, parts, strict=True):
        runs = part.drop_duplicates("run_id", keep="last").reset_index(drop=True)
        title = "run" if len(runs) <= MAX_LEVELS else ""
        level = _levels(runs["run_id"] if title else pd.Series("all runs", index=runs.index))
        for name, found in list(key_factors(index, runs).items())[: stage == "finetune"]:
            title, level = name, found
        _curves(axes, part, pd.Series(level.array, index=runs["run_id"]))
        axes.legend(title=title, loc="upper left", bbox_to_anchor=(1, 1), alignment="left", handlelength=1.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_title(f"{stages[stage]} ({len(runs)} run{'s' * (len(runs) > 1)})")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set(xlabel="epoch (points: kept checkpoints)", ylabel="test accuracy")
    heading(figure, "How the population learns: test accuracy by epoch", "thin: one run; thick: median")
    return figure


@rc_context(STYLE)
def pair_matrix(pairs: pd.DataFrame, index: pd.DataFrame, value: str = "agreement") -> Figure:
    """A heat map of a pairwise metric, models ordered by lineage and then by the strongest factors.

    Models without any value are left out; single missing pairs are hatched.

    Args:
        pairs: columns `model_a`, `model_b` and `value`.
        index: `model_id`, `run_id`, `parent_id`, `stage`, `is_final`, `test_accuracy`, and the factors.
        value: a metric of `pairs`: `agreement`, `cka`, `cka_biased`, `weight_l2`, `weight_cosine`.
    """
    require(pairs, "pairs", ("model_a", "model_b", value))
    require(index, "index", ("model_id", "run_id", "parent_id", "stage", "is_final", "test_accuracy"))
    known = pairs[pairs[value].notna()]
    if known.empty:
        raise NothingToDrawError(f"table 'pairs': no pair has a value in column {value!r}")
    models, strips = _by_lineage(pd.unique(known[["model_a", "model_b"]].to_numpy().ravel()), index)
    size = len(models)
    place = pd.Series(range(size), index=models["model_id"])
    matrix = np.full((size, size), np.nan)
    a, b = place[known["model_a"]].to_numpy(), place[known["model_b"]].to_numpy()
    matrix[a, b] = matrix[b, a] = known[value].to_numpy(float)
    figure = Figure(figsize=(8.6, 7.6), layout="constrained")
    axes = figure.subplots()
    hatched: dict[str, Any] = {"facecolor": "#f3f4f6", "edgecolor": "#b6bcc6", "hatch": "/////"}
    axes.add_patch(Rectangle((0, 0), size, size, lw=0, zorder=-1, **hatched))
    low, high = np.nanquantile(matrix, [0.01, 0.99])
    shown: dict[str, Any] = {"cmap": "viridis_r" if value == "weight_l2" else "viridis", "vmin": low}
    image = axes.imshow(matrix, extent=(0, size, size, 0), vmax=max(high, low + 1e-9), **shown)
    diagonal = np.where(np.eye(size) > 0, 0.0, np.nan)
    axes.imshow(diagonal, extent=(0, size, size, 0), cmap="gray_r", vmin=0, vmax=1)
    entries = _margin(axes, models, strips)
    if np.isnan(matrix[np.isnan(diagonal)]).any():
        entries.append(Patch(label="no value", **hatched))
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=34, pad=0.02, extend="both")
    bar.set_label(f"{NAMES.get(value, value)}; scale: 1st to 99th percentile")
    legend = figure.legend(handles=entries, loc="outside right upper", handlelength=1.1, alignment="left")
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text().endswith(":") else "normal")
    left_out = len(pd.unique(pairs[["model_a", "model_b"]].to_numpy().ravel())) - size
    told = f"{size} final models in the same order on both axes, grouped by the run at the root of their lineage"
    told += f"\nleft out, without a value: {left_out}" if left_out else ""
    heading(figure, f"Who resembles whom: {NAMES.get(value, value).split(' (')[0]}", told)
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
    for label, same, colour in (("different parents", False, PALETTE[5]), ("same parent", True, PALETTE[0])):
        part = known[known["same_parent"].astype(bool) == same]
        x, y = part["weight_l2"].astype(float), part["agreement"].astype(float)
        defined = len(x) > 2 and x.nunique() > 1 and y.nunique() > 1
        rho = f"{x.rank().corr(y.rank()):+.2f}" if defined else "not defined"
        axes.scatter(x, y, s=14, color=colour, alpha=alpha, linewidths=0, rasterized=True)
        told = f"{label}: {len(x):,} pairs, Spearman {rho}" if len(x) else None
        axes.scatter([], [], s=26, color=colour, label=told)
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


def require(table: pd.DataFrame, name: str, columns: Collection[str]) -> None:
    """Raise `ZooError` if the table lacks one of the columns, or has no rows."""
    for column in columns:
        if column not in table:
            raise ZooError(f"table {name!r} has no column {column!r}: {did_you_mean(column, map(str, table))}")
    if table.empty:
        raise ZooError(f"table {name!r} has no rows: nothing to draw")


def key_factors(table: pd.DataFrame, rows: pd.DataFrame) -> dict[str, pd.Series]:
    """The factors of `rows` with few levels, what explains most of the test accuracy in `table` first."""
    try:
        shares = explained_variance(table).fillna(0).to_dict()
    except NothingToDrawError:
        shares = {}
    few = {name: level for name, level in varying_factors(rows).items() if level.nunique() <= MAX_LEVELS}
    return dict(sorted(few.items(), key=lambda item: -shares.get(item[0], -1)))


def _run_of(model_id: str) -> str:
    return model_id.rpartition("@")[0] or model_id


def _short(text: str, length: int = 18) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _same_groups(a: pd.Series, b: pd.Series) -> bool:
    return bool((pd.factorize(a)[0] == pd.factorize(b)[0]).all())


def _text(value: Any) -> str:
    if isinstance(value, bool | np.bool_ | str):
        return str(value) if isinstance(value, str) else str(value).lower()
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:g}"


def _levels(column: pd.Series) -> pd.Series:
    """Text levels in their natural order, null last as 'none'."""
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    values = column.dropna().unique()
    names = {value: _text(value) for value in sorted(values, key=None if numeric else str)}
    if numeric and len(values) > MAX_LEVELS and 2 * len(values) > len(column):
        column = pd.qcut(column, 5, duplicates="drop")
        names = {part: f"Q{i} ≤ {part.right:.3g}" for i, part in enumerate(column.cat.categories, 1)}
    text = [names.get(value, "none") for value in column]
    order = dict.fromkeys([*names.values(), *(["none"] if "none" in text else [])])
    return pd.Series(pd.Categorical(text, categories=list(order), ordered=bool(numeric)), index=column.index)


def colours(level: pd.Series, shift: int = 0) -> dict[str, Any]:
    """Level -> colour: a ramp where order means something, else separate hues; `shift` tells factors apart."""
    names = [name for name in level.cat.categories if (level == name).any()]
    if len(names) > len(PALETTE) or (level.cat.ordered and len(names) > 2):
        ramp = colormaps[("viridis", "magma", "cividis")[shift % 3]](np.linspace(0.1, 0.82, len(names)))
        return dict(zip(names, ramp, strict=True))
    return {name: PALETTE[(i + 2 * shift) % len(PALETTE)] for i, name in enumerate(names)}


def heading(figure: Figure, title: str, told: str) -> None:
    """A bold title and grey lines below it; blank lines in the title keep their place in the layout."""
    width, height = map(float, figure.get_size_inches())
    title += "\n" * (told.count("\n") + 1)
    figure.suptitle(title, x=0.08 / width, ha="left", fontsize=12.5, weight="bold")
    figure.text(0.08 / width, 1 - 0.3 / height, told, va="top", color=MUTED, linespacing=1.35)


def _room(names: Collection[str]) -> float:
    return max(2.0 + min(len(names), 12), min(8.0, 0.2 * sum(len(name) + 1 for name in names)))


def _strip_panel(axes: Axes, y: pd.Series, level: pd.Series, share: float | None, room: float) -> None:
    names = list(colours(level))
    rng = np.random.default_rng(0)
    for i, (name, colour) in enumerate(colours(level).items()):
        values = y[level == name]
        low, median, high = values.quantile([0.25, 0.5, 0.75])
        axes.add_patch(Rectangle((i - 0.32, low), 0.64, high - low, color=colour, alpha=0.18, lw=0))
        x = i + rng.uniform(-0.2, 0.2, len(values))
        axes.scatter(x, values, s=13, color=colour, alpha=0.7, linewidths=0, zorder=2)
        axes.plot([i - 0.32, i + 0.32], [median, median], color=INK, lw=1.6, zorder=3)
    step = math.ceil(len(names) / MAX_LEVELS)
    shown = [_short(name, 14) for name in names[::step]]
    tilt = 35 if 0.2 * sum(len(name) + 1 for name in shown) > room else 0
    axes.set_xticks(range(0, len(names), step), shown, rotation=tilt, ha="right" if tilt else "center")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    if share is not None:
        told = "η² not defined" if math.isnan(share) else f"η² = {share:.2f}"
        axes.text(0, 1.055, told, transform=axes.transAxes, color=MUTED)
        for width, colour in ((1.0, FAINT), (0.0 if math.isnan(share) else share, INK)):
            where: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
            axes.add_patch(Rectangle((0, 1.02), width, 0.018, color=colour, lw=0, **where))


def _curves(axes: Axes, rows: pd.DataFrame, level: pd.Series) -> None:
    """Thin lines for runs; thick medians, drawn at epochs that at least half of a level's runs kept."""
    for name, colour in colours(level).items():
        part = rows[rows["run_id"].isin(level.index[level == name])]
        for _, run in part.groupby("run_id"):
            axes.plot(run["epoch"], run["test_accuracy"], color=colour, lw=0.8, alpha=0.3)
        by_epoch = part.groupby("epoch")["test_accuracy"].agg(["median", "size"])
        median = by_epoch.loc[2 * by_epoch["size"] >= by_epoch["size"].max(), "median"]
        label = _short(name, 24)
        axes.plot(median.index, median, "o-", color=colour, lw=2.4, ms=5, mec="white", label=label, zorder=3)


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
    rows = rows.assign(lineage=rows["model_id"].map(roots).map(_run_of), tuned=rows["parent_id"].notna())
    codes = {f"_{name}": level.cat.codes for name, level in key_factors(index, rows).items()}
    rows = rows.assign(**codes).sort_values(["lineage", "tuned", *codes], ignore_index=True)
    shown = [(name, level) for name, level in key_factors(index, rows).items() if name != "parent"]
    return rows, dict([pair for pair in shown if not _same_groups(pair[1], rows["lineage"])][:4])


def _margin(axes: Axes, rows: pd.DataFrame, strips: dict[str, pd.Series]) -> list[Patch]:
    """Factors as strips on the left, lineages as brackets on top, lines between; returns legend entries."""
    size, wide = len(rows), 0.035 * len(rows)
    entries = []
    for j, (name, level) in enumerate(strips.items()):
        shades, left = colours(level, j), wide * (1.15 * (j - len(strips)) - 0.4)
        cells = np.array([[to_rgb(shades[label])] for label in level])
        axes.imshow(cells, extent=(left, left + wide, size, 0), interpolation="nearest")
        axes.text(left + wide / 2, 1.01 * size, _short(name), rotation=90, va="top", ha="center", fontsize=8)
        entries += [Patch(alpha=0, label=f"{name}:")] + [Patch(color=c, label=n) for n, c in shades.items()]
    groups = rows.groupby("lineage", sort=False).indices
    tilt = 60 if max(map(len, groups)) * len(groups) > 60 else 0
    for name, members in groups.items():
        start, stop = members[0], members[-1] + 1
        axes.plot([start + 0.01 * size, stop - 0.01 * size], [-0.015 * size] * 2, color=INK, lw=1.6)
        where: dict[str, Any] = {"ha": "left" if tilt else "center", "va": "bottom", "rotation": tilt}
        if len(groups) <= 30:
            axes.text((start + stop) / 2, -0.03 * size, _short(name), **where)
        axes.plot([0, size], [start, start], [start, start], [0, size], color="white", lw=2.2)
    axes.set(xlim=(wide * (-1.15 * len(strips) - 0.4), size), ylim=(size, -0.03 * size))
    axes.set_axis_off()
    return entries
