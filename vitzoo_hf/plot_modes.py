"""Modes of a population: models as points in a plane, and which generating factor tells them apart."""

import math
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Float64, Int64
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitzoo_hf.factors import MAX_LEVELS, NothingToDrawError, require, varying_factors
from vitzoo_hf.figure_style import MUTED, STYLE, colours_of, heading, short
from vitzoo_hf.plot_pairs import square

SPACES = {"weight_l2": "weights: L2 distance", "disagreement": "behaviour: 1 − agreement"}
PERMUTATIONS = 200


def modes_table(pairs: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """Final models (fine-tuned ones where there are any) in the plane of their distances, and their factors.

    A model that lacks pairs is left out, the one that lacks most first, until every pair has a value.

    Args:
        pairs: columns `model_a`, `model_b`, `weight_l2`, `agreement`.
        index: columns `model_id`, `parent_id`, `stage`, and the factors.

    Returns:
        `model_id`, `parent_id`, `head`, `dataset` and `factor_*` where known; then for each of `weight_l2` and
        `disagreement` (1 - agreement): `*_x`, `*_y` (see `classical_mds`), `*_share` (of the positive
        eigenvalues, held by these two axes) and `*_factor`, the factor with the largest silhouette, null where none
        varies.

    Raises:
        NothingToDrawError: if neither distance is known for three models.
    """
    rows, spaces = _distances(pairs, index)
    kept = [n for n in rows if n in ("model_id", "parent_id", "head", "dataset") or str(n).startswith("factor_")]
    table = rows[kept].copy()
    scores = separation_table(pairs, index)
    for space, (places, distances) in spaces.items():
        points, share = classical_mds(distances)
        table.loc[places, [f"{space}_x", f"{space}_y"]] = points
        table[f"{space}_share"] = share
        few = scores[(scores["space"] == space) & (scores["levels"] <= MAX_LEVELS)]
        best = few.sort_values("silhouette", ascending=False, kind="stable")["factor"]
        table[f"{space}_factor"] = None if best.empty else best.iloc[0]
    return table


def separation_table(pairs: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """How well each factor separates the models, in the whole matrix of distances rather than in the plane.

    Args:
        pairs: see `modes_table`.
        index: see `modes_table`.

    Returns:
        `space` (weight_l2, disagreement), `factor`, `levels`, `silhouette`, `chance` and `chance_95`: mean and 95th
        percentile of the silhouette over 200 permutations of the levels; best factor of a space first.
    """
    rows, spaces = _distances(pairs, index)
    found = []
    for space, (places, distances) in spaces.items():
        rng = np.random.default_rng(0)
        for name, level in varying_factors(rows.loc[places].reset_index(drop=True)).items():
            codes = level.cat.codes.to_numpy(np.int64)
            chance = [silhouette(distances, rng.permutation(codes)) for _ in range(PERMUTATIONS)]
            row = {"space": space, "factor": name, "levels": level.nunique()}
            row |= {"silhouette": silhouette(distances, codes), "chance": float(np.mean(chance))}
            found.append(row | {"chance_95": float(np.quantile(chance, 0.95))})
    table = pd.DataFrame(found, columns=["space", "factor", "levels", "silhouette", "chance", "chance_95"])
    order = table["space"].map(list(SPACES).index), -table["silhouette"].astype(float)
    return table.iloc[np.lexsort((order[1], order[0]))].reset_index(drop=True)


def classical_mds(distances: Float[np.ndarray, "M M"]) -> tuple[Float64[np.ndarray, "M 2"], float]:
    """Points in the plane whose distances are closest to the given ones: Torgerson's classical scaling (1952).

    Double centring of the squared distances gives inner products; the points are its first two eigenvectors times the
    roots of their eigenvalues. Distances of points in a plane come back exactly. The sign of an axis means nothing:
    the largest coordinate is made positive. An axis whose eigenvalue is not positive is 0 throughout.

    Args:
        distances: symmetric, 0 on the diagonal; no NaN.

    Returns:
        float64 `[M, 2]`, and the share of the two eigenvalues in the sum of the positive ones; NaN if none is.

    Example:
        >>> points, share = classical_mds(np.array([[0.0, 3, 3], [3, 0, 0], [3, 0, 0]]))
        >>> points[:, 0].round(6).tolist(), round(share, 6)
        ([2.0, -1.0, -1.0], 1.0)
    """
    squared = distances.astype(np.float64) ** 2
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1, keepdims=True) + squared.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    positive = np.where(values > 1e-12 * np.abs(values).max(), values, 0.0)[::-1]
    points = vectors[:, ::-1][:, :2] * np.sqrt(positive[:2])
    largest = points[np.abs(points).argmax(axis=0), np.arange(2)]
    share = positive[:2].sum() / positive.sum() if positive.any() else math.nan
    return points * np.where(largest < 0, -1.0, 1.0), float(share)


def silhouette(distances: Float[np.ndarray, "M M"], codes: Int64[np.ndarray, " M"]) -> float:
    """The mean silhouette of groups: scikit-learn's `silhouette_score`, in one matrix product.

    1: groups are tight and far apart; 0: they overlap; below: models are closer to another group than to their own.

    Args:
        distances: symmetric, 0 on the diagonal.
        codes: the group of each model, at least two different ones.
    """
    groups, own = np.unique(codes, return_inverse=True)
    members = np.eye(len(groups))[own]
    counts = members.sum(axis=0)
    sums = distances @ members
    rows = np.arange(len(codes))
    inside = sums[rows, own] / np.maximum(counts[own] - 1, 1)
    outside = np.where(members > 0, np.inf, sums / counts).min(axis=1)
    larger = np.maximum(inside, outside)
    alone = (counts[own] == 1) | (larger == 0)
    return float(np.where(alone, 0.0, (outside - inside) / np.where(alone, 1.0, larger)).mean())


@rc_context(STYLE)
def modes(table: pd.DataFrame) -> Figure:
    """Models in the plane of their distances in weights and in behaviour, coloured by what separates them best.

    Args:
        table: the result of `modes_table`.
    """
    spaces = [space for space in SPACES if f"{space}_x" in table]
    require(table, "modes", ("model_id", f"{(spaces or list(SPACES))[0]}_x"))
    levels = varying_factors(table)
    figure = Figure(figsize=(5.4 * len(spaces) + 0.4, 5.0), layout="constrained")
    for axes, space in zip(figure.subplots(1, len(spaces), squeeze=False)[0], spaces, strict=True):
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


def _distances(
    pairs: pd.DataFrame, index: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, tuple[list[int], Float64[np.ndarray, "M M"]]]]:
    """The models' rows of `index`; for each space the places of its models among them, and their distances."""
    require(pairs, "pairs", ("model_a", "model_b", "weight_l2", "agreement"))
    require(index, "index", ("model_id", "parent_id", "stage"))
    rows = index.drop_duplicates("model_id")
    rows = rows[rows["model_id"].isin({*pairs["model_a"], *pairs["model_b"]})]
    tuned = rows[rows["stage"] == "finetune"]
    rows = (rows if tuned.empty else tuned).reset_index(drop=True)
    spaces = {}
    for space in SPACES:
        value = "weight_l2" if space == "weight_l2" else "agreement"
        matrix = square(pairs, list(rows["model_id"]), value)
        matrix = matrix if space == "weight_l2" else 1 - matrix
        np.fill_diagonal(matrix, 0)
        places = _complete(matrix)
        if len(places) > 2:
            spaces[space] = (places, matrix[np.ix_(places, places)])
    if not spaces:
        raise NothingToDrawError("table 'pairs': no three models have all their distances")
    return rows, spaces


def _complete(matrix: Float64[np.ndarray, "M M"]) -> list[int]:
    """Places of models among which every pair has a value: whoever lacks most goes first."""
    missing = np.isnan(matrix)
    lacks = missing.sum(axis=1)
    kept = np.ones(len(matrix), bool)
    while kept.any() and lacks[kept].max() > 0:
        worst = int(np.where(kept, lacks, -1).argmax())
        kept[worst] = False
        lacks = lacks - missing[worst]
    return np.flatnonzero(kept).tolist()
