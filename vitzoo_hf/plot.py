"""Every figure of a zoo, drawn from its tables alone; no model is loaded and no window opened.

The input are pandas tables of the configs `index`, `evaluations` and `pairs`, with class labels as text
('finetune', 'linear'). A plot function takes a table and returns a matplotlib `Figure`. Whatever varies among the
models is found in the table, so that any blueprint's factors work.
"""

import functools
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter

from vitzoo_hf.schema import ZooError, did_you_mean

MAX_LEVELS = 8
"""Factors with more levels than this are neither colours nor strips; panels thin out their tick labels."""

MAX_PANELS = 8

# Okabe and Ito's colours, which the common forms of colour blindness keep apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#6B7280")
RAMPS = ("viridis", "magma", "cividis")
INK, MUTED, FAINT = "#1f2430", "#6b7280", "#e5e7eb"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
}

NAMES = {
    "test_accuracy": "test accuracy",
    "agreement": "agreement on test images",
    "cka": "CKA of features on test images (debiased)",
    "cka_biased": "CKA of features on test images (biased)",
    "weight_l2": "distance of trunk weights (L2)",
    "weight_cosine": "cosine of trunk weights",
}

P = ParamSpec("P")


class NothingToDrawError(ZooError):
    """The columns are there but hold no value: the figure does not apply to this zoo."""


def final_models(table: pd.DataFrame, value: str = "test_accuracy", *, name: str = "evaluations") -> pd.DataFrame:
    """The final fine-tuned models that have a `value`; the final pre-trained ones where no fine-tuned one has.

    Args:
        table: columns `model_id`, `stage`, `is_final` and `value`.
        value: the column that must not be null.
        name: what an error calls the table.

    Raises:
        ZooError: if the table is empty, lacks a column, or no final model has a value.
    """
    _require(table, name, ("model_id", "stage", "is_final", value))
    final = table[table["is_final"].astype(bool) & table[value].notna()]
    if final.empty:
        raise NothingToDrawError(f"table {name!r}: no final model has a value in column {value!r}")
    tuned = final[final["stage"] == "finetune"]
    return (final if tuned.empty else tuned).reset_index(drop=True)


def varying_factors(table: pd.DataFrame) -> dict[str, pd.Series]:
    """What differs among the rows -> the level of each row, a categorical of short text, ordered if numeric.

    Every `factor_*` column counts, then `head`, `dataset` and `parent` unless they only repeat a factor. Left out:
    what is constant, and text that is different in every row. A numeric factor sampled rather than taken from a
    grid (more than 8 values, fewer than two rows a value) is cut into quintiles.

    Args:
        table: any of the columns `factor_*`, `head`, `dataset`, `parent_id`.
    """
    columns = {str(c).removeprefix("factor_"): table[c] for c in table if str(c).startswith("factor_")}
    declared = set(columns)
    for name in ("head", "dataset"):
        if name in table:
            columns.setdefault(name, table[name])
    if "parent_id" in table:
        columns.setdefault("parent", table["parent_id"].map(_run_of, na_action="ignore"))
    found: dict[str, pd.Series] = {}
    partitions: set[bytes] = set()
    for name, column in columns.items():
        level = _levels(column)
        partition = pd.factorize(level)[0].tobytes()
        if 1 < level.nunique() < len(table) and (name in declared or partition not in partitions):
            found[name] = level
            partitions.add(partition)
    return found


def explained_variance(evaluations: pd.DataFrame, value: str = "test_accuracy") -> pd.Series:
    """The share of the variance of `value` among the final models that each factor explains: one-way eta squared.

    1 means that the factor alone decides the value, 0 that the levels have equal means. By chance alone, k levels
    among n models give (k - 1) / (n - 1). Shares of different factors need not add up to 1.

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


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def accuracy_by_factor(evaluations: pd.DataFrame) -> Figure:
    """One panel a varying factor: the test accuracy of every final model, with median and quartiles of each level.

    Args:
        evaluations: columns `model_id`, `stage`, `is_final`, `test_accuracy`, and the factors.
    """
    table = final_models(evaluations)
    levels = varying_factors(table)
    shares = explained_variance(evaluations)
    names = list(shares.index[:MAX_PANELS])
    if not names:
        levels = {"all models": pd.Series(["all"] * len(table), dtype="category")}
        names = ["all models"]
    columns = len(names) if len(names) <= 5 else math.ceil(len(names) / 2)
    rows = math.ceil(len(names) / columns)
    ratios = [2 + min(levels[name].nunique(), 12) for name in names] if rows == 1 else [5] * columns
    figure = Figure(figsize=(max(5.2, 0.9 + 0.46 * sum(ratios)), 0.9 + 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False, width_ratios=ratios)
    for axes, name in zip(grid.flat, names, strict=False):
        _strip_panel(axes, table["test_accuracy"].astype(float), levels[name])
        axes.set_title(name, loc="left", fontsize=10, weight="bold", pad=22)
        if name in shares:
            _share_bar(axes, float(shares[name]))
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    shown = "" if len(shares) <= MAX_PANELS else f"; the {MAX_PANELS} strongest of {len(shares)} factors"
    told = f"{_count(table)}; line: median, box: quartiles{shown}"
    if len(shares):
        told += "\nη²: share of the variance between models that the factor explains"
    _heading(figure, "What decides accuracy: test accuracy by generating factor", told)
    return figure


@_styled
def learning_curves(index: pd.DataFrame) -> Figure:
    """Test accuracy against epoch, a thin line a run and a thick median, coloured by the strongest factor.

    Args:
        index: columns `model_id`, `run_id`, `stage`, `epoch`, `is_final`, `test_accuracy`, and the factors.
    """
    _require(index, "index", ("model_id", "run_id", "stage", "epoch", "is_final", "test_accuracy"))
    rows = index[index["test_accuracy"].notna()].sort_values("epoch")
    stages = [stage for stage in ("pretrain", "finetune") if (rows["stage"] == stage).any()]
    if not stages:
        raise NothingToDrawError("table 'index': no row has a recorded test accuracy")
    factor = next(iter(_key_factors(index)), None)
    width = 3.4 * len(stages) + 3.8
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    ratios = [1.0 if stage == "pretrain" and len(stages) > 1 else 1.7 for stage in stages]
    panels = figure.subplots(1, len(stages), squeeze=False, width_ratios=ratios)[0]
    for axes, stage in zip(panels, stages, strict=True):
        part = rows[rows["stage"] == stage]
        runs = part.drop_duplicates("run_id", keep="last").reset_index(drop=True)
        levels = varying_factors(runs)
        if stage == "finetune" and factor in levels:
            level, title = levels[factor], factor
        elif len(runs) <= MAX_LEVELS:
            level, title = _levels(runs["run_id"]), "run"
        else:
            level, title = pd.Series(["all runs"] * len(runs), dtype="category"), ""
        _curves(axes, part, pd.Series(level.array, index=runs["run_id"]))
        axes.legend(title=title, loc="best", alignment="left", handlelength=1.4)
        images = ", ".join(sorted(map(str, part["dataset"].dropna().unique()))) if "dataset" in part else ""
        label = {"pretrain": "pre-training", "finetune": "fine-tuning"}[stage] + (f" on {images}" if images else "")
        axes.set_title(f"{_short(label, 44)} ({len(runs)} runs)", loc="left", fontsize=10, weight="bold")
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.set_xlabel("epoch (points: kept checkpoints)")
    panels[0].set_ylabel("test accuracy")
    _heading(
        figure, "How the population learns: test accuracy during training", "thin: one run; thick: median of runs"
    )
    return figure


@_styled
def pair_matrix(pairs: pd.DataFrame, index: pd.DataFrame, value: str = "agreement") -> Figure:
    """A heat map of a pairwise metric, models ordered by lineage and then by the strongest factors.

    Models without any value are left out; single missing pairs are hatched.

    Args:
        pairs: columns `model_a`, `model_b` and `value`.
        index: columns `model_id`, `run_id`, `parent_id`, and the factors, for every model of `pairs`.
        value: a metric of `pairs`: `agreement`, `cka`, `cka_biased`, `weight_l2`, `weight_cosine`.
    """
    _require(pairs, "pairs", ("model_a", "model_b", value))
    _require(index, "index", ("model_id", "run_id", "parent_id"))
    known = pairs[pairs[value].notna()]
    if known.empty:
        raise NothingToDrawError(f"table 'pairs': no pair has a value in column {value!r}")
    models = _by_lineage(pd.unique(pd.concat([known["model_a"], known["model_b"]])), index)
    size = len(models)
    place = pd.Series(range(size), index=models["model_id"])
    matrix = np.full((size, size), np.nan)
    a, b = place[known["model_a"]].to_numpy(), place[known["model_b"]].to_numpy()
    matrix[a, b] = matrix[b, a] = known[value].to_numpy(float)

    figure = Figure(figsize=(8.6, 7.6), layout="constrained")
    axes = figure.subplots()
    axes.add_patch(Rectangle((0, 0), size, size, facecolor="#f3f4f6", edgecolor="#b6bcc6", hatch="/////", lw=0))
    low, high = np.nanquantile(matrix, [0.01, 0.99])
    image = axes.imshow(
        matrix,
        extent=(0, size, size, 0),
        cmap="viridis_r" if value == "weight_l2" else "viridis",
        vmin=low,
        vmax=high if high > low else low + 1e-9,
        interpolation="nearest",
    )
    for i in range(size):
        axes.add_patch(Rectangle((i, i), 1, 1, facecolor="white", lw=0))
    entries = _lineage_margin(axes, models)
    if np.isnan(matrix[~np.eye(size, dtype=bool)]).any():
        entries.append(Patch(facecolor="#f3f4f6", edgecolor="#b6bcc6", hatch="/////", label="no value"))
    beyond = {(True, True): "both", (True, False): "min", (False, True): "max"}
    extend = beyond.get((bool(np.nanmin(matrix) < low), bool(np.nanmax(matrix) > high)), "neither")
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.6, aspect=34, pad=0.02, extend=extend)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label(NAMES.get(value, value))
    legend = figure.legend(handles=entries, loc="outside right upper", handlelength=1.1, alignment="left")
    for text in legend.get_texts():
        if text.get_text().endswith(":"):
            text.set_weight("bold")
    left_out = len(pd.unique(pd.concat([pairs["model_a"], pairs["model_b"]]))) - size
    told = f"{size} final models in the same order on both axes, grouped by parent"
    told += f"; {left_out} without a value left out" if left_out else ""
    _heading(figure, f"Who resembles whom: {NAMES.get(value, value)}", told)
    return figure


@_styled
def distance_against_agreement(pairs: pd.DataFrame) -> Figure:
    """Distance in weight space against agreement, a point a pair, siblings apart from strangers, with margins.

    Args:
        pairs: columns `weight_l2`, `agreement`, `same_parent`.
    """
    _require(pairs, "pairs", ("weight_l2", "agreement", "same_parent"))
    known = pairs.dropna(subset=["weight_l2", "agreement"])
    if known.empty:
        raise NothingToDrawError("table 'pairs': no pair has both a weight distance and an agreement")
    figure = Figure(figsize=(7.4, 5.8), layout="constrained")
    grid = figure.subplots(2, 2, width_ratios=(5, 1), height_ratios=(1, 5), sharex="col", sharey="row")
    above, axes, beside = grid[0, 0], grid[1, 0], grid[1, 1]
    spans = [np.histogram_bin_edges(known[c].astype(float), bins=40) for c in ("weight_l2", "agreement")]
    groups = ((True, "same parent", PALETTE[0]), (False, "different parents", PALETTE[5]))
    for same, label, colour in groups:
        part = known[known["same_parent"].astype(bool) == same]
        if part.empty:
            continue
        x, y = part["weight_l2"].astype(float), part["agreement"].astype(float)
        rho = _spearman(x, y)
        told = "not defined" if math.isnan(rho) else f"{rho:+.2f}".replace("-", "−")
        alpha = float(np.clip(30 / math.sqrt(len(known)) / 3, 0.08, 0.8))
        axes.scatter(x, y, s=14, color=colour, alpha=alpha, linewidths=0, rasterized=True)
        axes.scatter([], [], s=26, color=colour, label=f"{label}: {len(part):,} pairs, Spearman ρ {told}")
        for margin, values, bins, way in ((above, x, spans[0], "vertical"), (beside, y, spans[1], "horizontal")):
            margin.hist(values, bins=bins, color=colour, alpha=0.55, orientation=way, density=True)
    for margin in (above, beside, grid[0, 1]):
        margin.set_axis_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_xlabel(NAMES["weight_l2"])
    axes.set_ylabel("agreement: share of test images with the same prediction")
    figure.legend(loc="outside lower left", ncols=2, handletextpad=0.3)
    _heading(figure, "Close in weights, close in behaviour?", "a point is a pair of final models; margins: densities")
    return figure


@_styled
def accuracy_against_calibration(evaluations: pd.DataFrame) -> Figure:
    """Test accuracy against expected calibration error; colour and marker are the two strongest factors.

    Args:
        evaluations: columns `model_id`, `stage`, `is_final`, `test_accuracy`, `test_ece`, and the factors.
    """
    table = final_models(final_models(evaluations), "test_ece")
    names = _key_factors(evaluations)[:2]
    levels = [varying_factors(table).get(name, pd.Series(["all models"] * len(table))) for name in names]
    colour = levels[0] if levels else pd.Series(["all models"] * len(table), dtype="category")
    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    axes = figure.subplots()
    colours, handles = _colours(colour), []
    marker = levels[1] if len(levels) > 1 else pd.Series([""] * len(table), dtype="category")
    markers = dict(zip(marker.cat.categories, "o^sDvPX*", strict=False))
    for (c, m), part in table.groupby([colour.to_numpy(), marker.to_numpy()], observed=True):
        axes.scatter(part["test_accuracy"], part["test_ece"], s=38, color=colours[c], marker=markers[m], alpha=0.75)
    return figure


def _require(table: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in table:
            raise ZooError(f"table {name!r} has no column {column!r}: {did_you_mean(column, map(str, table.columns))}")
    if table.empty:
        raise ZooError(f"table {name!r} has no rows: nothing to draw")


def _run_of(model_id: str) -> str:
    return model_id.rpartition("@")[0] or model_id


def _short(text: str, length: int = 18) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _text(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:g}"
    return str(value).lower() if isinstance(value, bool | np.bool_) else str(value)


def _levels(column: pd.Series) -> pd.Series:
    """Text levels in their natural order, null last as 'none'."""
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    values = column.dropna().unique()
    if numeric and len(values) > MAX_LEVELS and 2 * len(values) > len(column):
        column = pd.qcut(column, 5, duplicates="drop")
        names = {bin: f"Q{i} ≤ {bin.right:.3g}" for i, bin in enumerate(column.cat.categories, 1)}
    else:
        names = {value: _text(value) for value in (sorted(values) if numeric else sorted(values, key=str))}
    text = [names.get(value, "none") for value in column]
    order = [*dict.fromkeys(names.values()), *(["none"] if "none" in text and "none" not in names.values() else [])]
    return pd.Series(pd.Categorical(text, categories=order, ordered=bool(numeric)), index=column.index)


def _key_factors(table: pd.DataFrame) -> list[str]:
    """Factors with few levels, the one that explains most of the test accuracy first."""
    try:
        shares = explained_variance(table)
    except NothingToDrawError:
        return []
    levels = varying_factors(final_models(table))
    return [name for name in shares.index if levels[name].nunique() <= MAX_LEVELS]


def _spearman(x: pd.Series, y: pd.Series) -> float:
    return float(x.rank().corr(y.rank())) if len(x) > 2 and x.nunique() > 1 and y.nunique() > 1 else math.nan


def _colours(level: pd.Series, shift: int = 0) -> dict[str, Any]:
    """Level -> colour: a ramp where the order means something, else separate hues; `shift` tells factors apart."""
    names = [name for name in level.cat.categories if (level == name).any()]
    if len(names) > len(PALETTE) or (level.cat.ordered and len(names) > 2):
        ramp = colormaps[RAMPS[shift % len(RAMPS)]](np.linspace(0.12, 0.85, len(names)))
        return dict(zip(names, ramp, strict=True))
    return {name: PALETTE[(i + 2 * shift) % len(PALETTE)] for i, name in enumerate(names)}


def _heading(figure: Figure, title: str, told: str) -> None:
    """A bold title and grey lines below it; the blank lines of the title keep their place in the layout."""
    width, height = figure.get_size_inches()
    lines = told.count("\n") + 1
    figure.suptitle(title + "\n" * lines, x=0.08 / width, ha="left", fontsize=12.5, weight="bold")
    figure.text(0.08 / width, 1 - 0.31 / height, told, va="top", fontsize=9, color=MUTED, in_layout=False)


def _count(table: pd.DataFrame) -> str:
    kind = "fine-tuned" if (table["stage"] == "finetune").all() else "pre-trained"
    return f"{len(table)} final {kind} model" + "s" * (len(table) != 1)


def _strip_panel(axes: Axes, y: pd.Series, level: pd.Series) -> None:
    names = list(_colours(level))
    rng = np.random.default_rng(0)
    for i, (name, colour) in enumerate(_colours(level).items()):
        values = y[level == name]
        low, median, high = values.quantile([0.25, 0.5, 0.75])
        axes.add_patch(Rectangle((i - 0.32, low), 0.64, high - low, color=colour, alpha=0.18, lw=0))
        x = i + rng.uniform(-0.2, 0.2, len(values))
        axes.scatter(x, values, s=13, color=colour, alpha=0.7, linewidths=0, zorder=2)
        axes.plot([i - 0.32, i + 0.32], [median, median], color=INK, lw=1.6, solid_capstyle="butt", zorder=3)
    step = math.ceil(len(names) / MAX_LEVELS)
    shown = [_short(name, 14) for name in names[::step]]
    tilt = 35 if sum(map(len, shown)) > 9 + 5 * len(shown) else 0
    axes.set_xticks(range(0, len(names), step), shown, rotation=tilt, ha="right" if tilt else "center")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)


def _share_bar(axes: Axes, share: float) -> None:
    told = "η² not defined" if math.isnan(share) else f"η² = {share:.2f}"
    axes.text(0, 1.055, told, transform=axes.transAxes, fontsize=9, color=MUTED)
    for width, colour in ((1.0, FAINT), (0.0 if math.isnan(share) else share, INK)):
        axes.add_patch(
            Rectangle((0, 1.02), width, 0.018, transform=axes.transAxes, color=colour, lw=0, clip_on=False)
        )


def _curves(axes: Axes, rows: pd.DataFrame, level: pd.Series) -> None:
    """Thin lines for runs; thick medians, drawn at epochs that at least half of a level's runs kept."""
    for name, colour in _colours(level).items():
        part = rows[rows["run_id"].isin(level.index[level == name])]
        for _, run in part.groupby("run_id"):
            axes.plot(run["epoch"], run["test_accuracy"], color=colour, lw=0.8, alpha=0.35)
        by_epoch = part.groupby("epoch")["test_accuracy"].agg(["median", "size"])
        median = by_epoch.loc[2 * by_epoch["size"] >= by_epoch["size"].max(), "median"]
        axes.plot(median.index, median, color=colour, lw=2.4, marker="o", ms=4.5, mec="white", mew=0.7, label=name)


def _by_lineage(models: Sequence[str], index: pd.DataFrame) -> pd.DataFrame:
    """The rows of `models` with a column `lineage`, the run at the root of each, sorted by it and by key factors."""
    known = index.drop_duplicates("model_id").set_index("model_id", drop=False)
    unknown = [model for model in models if model not in known.index]
    if unknown:
        raise ZooError(f"table 'index' lacks {unknown[0]!r}, a model of table 'pairs': draw tables of the same zoo")
    parent_of = known["parent_id"].dropna().to_dict()

    def root(model: str) -> str:
        seen = {model}
        while (parent := parent_of.get(model)) is not None and parent not in seen:
            seen.add(model := parent)
        return _run_of(model)

    rows = known.loc[list(models)].reset_index(drop=True)
    rows = rows.assign(lineage=rows["model_id"].map(root), tuned=rows["parent_id"].notna())
    codes = {f"_{name}": level.cat.codes for name, level in _strips(rows, index)[1:]}
    return rows.assign(**codes).sort_values(["lineage", "tuned", *codes], ignore_index=True)
