"""Figure of modes: models as points in a plane, coloured by the generating factor that tells them apart."""

import math
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitzoo_hf.factor_tables import best_factor
from vitzoo_hf.factors import MAX_LEVELS, require, varying_factors
from vitzoo_hf.figure_style import MUTED, STYLE, colours_of, heading, short
from vitzoo_hf.modes import classical_mds
from vitzoo_hf.pair_tables import SPACES, compared_models, spaces_of


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
        told = f"{points.iloc[:, 0].notna().sum()} models; share of the two axes: {held}"
        axes.text(0, 1.015, told, transform=axes.transAxes, color=MUTED)
        axes.set(xlabel="first axis", ylabel="second axis")
    heading(figure, "Modes of the population", "a point is a final model; classical scaling of all their distances")
    return figure
