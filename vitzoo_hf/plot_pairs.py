"""Figures of how a population spreads: overview, agreement against accuracy, modes by factor, layers against layers.

Drawn from tables alone, as those of `vitzoo_hf.plot`.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitzoo_hf.plot import (
    MUTED,
    PALETTE,
    PERCENT,
    STYLE,
    NothingToDrawError,
    colours,
    final_models,
    heading,
    key_factors,
    require,
)

OVERVIEW = {
    "test_accuracy": "test accuracy",
    "test_loss": "test loss (nats)",
    "test_ece": "calibration error",
    "test_brier": "Brier score",
    "test_entropy": "entropy of predictions (nats)",
}
PERMUTATIONS = 200
LEAST_MODELS = 4


@rc_context(STYLE)
def overview(evaluations: pd.DataFrame) -> Figure:
    """Histograms of what was measured of final models.

    Args:
        evaluations: columns `model_id`, `stage`, `is_final`, `test_accuracy` and any of `OVERVIEW`.
    """
    table = final_models(evaluations)
    shown = [name for name in OVERVIEW if name in table and table[name].notna().any()]
    figure = Figure(figsize=(2.5 * len(shown) + 0.6, 3.0), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        values = table[name].dropna().astype(float)
        axes.hist(values, bins=min(20, max(5, len(values) // 3)), color=PALETTE[0], alpha=0.8)
        axes.axvline(values.median(), color=PALETTE[5], lw=1.4)
        axes.set(xlabel=OVERVIEW[name])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    heading(figure, "What the population is like", f"{len(table)} final models, counts; line: median")
    return figure


@rc_context(STYLE)
def agreement_against_accuracy(evaluations: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    """Agreement and Cohen's kappa of pairs against the mean accuracy of the two.

    Args:
        evaluations: columns `model_id`, `test_accuracy`.
        pairs: columns `model_a`, `model_b`, `same_parent`, `agreement`, `cohen_kappa`.
    """
    require(evaluations, "evaluations", ("model_id", "test_accuracy"))
    require(pairs, "pairs", ("model_a", "model_b", "same_parent", "agreement"))
    if "cohen_kappa" not in pairs:
        raise NothingToDrawError("table 'pairs' has no kappa: evaluate the zoo again")
    accuracy = evaluations.drop_duplicates("model_id").set_index("model_id")["test_accuracy"].astype(float)
    first, second = (pairs[name].map(accuracy) for name in ("model_a", "model_b"))
    known = pairs.assign(mean=(first + second) / 2, gap=(first - second).abs()).dropna(subset=["mean", "agreement"])
    if known.empty:
        raise NothingToDrawError("no pair has an agreement and two accuracies")
    figure = Figure(figsize=(9.4, 4.4), layout="constrained")
    for axes, value, label in zip(
        figure.subplots(1, 2), ("agreement", "cohen_kappa"), ("agreement", "Cohen's kappa"), strict=True
    ):
        for name, same, colour in (("different parents", False, PALETTE[5]), ("same parent", True, PALETTE[0])):
            part = known[known["same_parent"].astype(bool) == same]
            if len(part):
                axes.scatter(
                    part["mean"], part[value].astype(float), s=14, color=colour, alpha=0.5, linewidths=0, label=name
                )
        axes.xaxis.set_major_formatter(PERCENT)
        axes.set(xlabel="mean test accuracy of the two", ylabel=label)
    line = np.linspace(float(known["mean"].min()), float(known["mean"].max()), 50)
    panels = figure.axes
    panels[0].plot(line, line**2, color=MUTED, lw=1.2, ls="--", label="independent errors, never the same class")
    panels[0].yaxis.set_major_formatter(PERCENT)
    panels[0].legend(loc="upper left")
    heading(figure, "Do accurate models agree?", "a point is a pair of final models; kappa is corrected for chance")
    return figure


def embedded(pairs: pd.DataFrame, value: str) -> pd.DataFrame:
    """Models in the plane, by classical scaling (Torgerson 1952) of a distance: columns `model_id`, `x`, `y`.

    Models without a value to every other are left out, those with most missing first.

    Args:
        pairs: columns `model_a`, `model_b` and `value`.
        value: `weight_l2`, `jensen_shannon`, or `agreement`, whose complement is the distance.

    Raises:
        NothingToDrawError: for fewer than four models.
    """
    from sklearn.manifold import ClassicalMDS

    ids = list(dict.fromkeys([*pairs["model_a"], *pairs["model_b"]]))
    table = pairs.pivot(index="model_a", columns="model_b", values=value).reindex(index=ids, columns=ids)
    matrix = table.combine_first(table.T).loc[ids, ids].to_numpy(float, copy=True)
    matrix = 1 - matrix if value == "agreement" else matrix
    np.fill_diagonal(matrix, 0)
    kept = np.arange(len(ids))
    while len(kept) and (missing := np.isnan(matrix[np.ix_(kept, kept)]).sum(1)).any():
        kept = np.delete(kept, missing.argmax())
    if len(kept) < LEAST_MODELS:
        raise NothingToDrawError(f"{len(kept)} models have {value} to every other: too few for a map")
    places = ClassicalMDS(n_components=2, metric="precomputed").fit_transform(matrix[np.ix_(kept, kept)])
    return pd.DataFrame({"model_id": [ids[i] for i in kept], "x": places[:, 0], "y": places[:, 1]})


def separation(places: Float[np.ndarray, "n 2"], level: pd.Series) -> tuple[float, float]:
    """Mean silhouette of the levels of a factor on a map, and the share of random relabelings that reach it.

    (Rousseeuw 1987; a permutation test with the observed labels among the permutations.)
    """
    from sklearn.metrics import silhouette_score

    labels = level.to_numpy(str)
    if not 1 < len(set(labels)) < len(labels):
        return float("nan"), float("nan")
    found = float(silhouette_score(places, labels))
    generator = np.random.default_rng(0)
    reached = sum(silhouette_score(places, generator.permutation(labels)) >= found for _ in range(PERMUTATIONS))
    return found, (reached + 1) / (PERMUTATIONS + 1)


@rc_context(STYLE)
def modes(evaluations: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    """Maps of the population by weights and by behaviour, coloured by the factor that separates best on each.

    Args:
        evaluations: columns `model_id`, `stage`, `is_final`, `test_accuracy`, and the factors.
        pairs: columns `model_a`, `model_b`, `weight_l2`, `agreement`.
    """
    require(pairs, "pairs", ("model_a", "model_b", "weight_l2", "agreement"))
    require(evaluations, "evaluations", ("model_id", "stage", "is_final", "test_accuracy"))
    maps = {}
    for value, title in (("weight_l2", "by distance of weights"), ("agreement", "by disagreement of predictions")):
        try:
            maps[title] = embedded(pairs[pairs[value].notna()], value)
        except NothingToDrawError:
            continue
    if not maps:
        raise NothingToDrawError("too few pairs have a distance or an agreement for a map")
    figure = Figure(figsize=(5.0 * len(maps), 4.6), layout="constrained")
    for axes, (title, places) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        _map(axes, places, evaluations)
        axes.set_title(title)
    told = "classical scaling of all pairwise distances; colour: the factor that separates best, with its mean\n"
    told += f"silhouette and the share of {PERMUTATIONS} random relabelings that reach it"
    heading(figure, "Modes of the population", told)
    return figure


def _map(axes: Axes, places: pd.DataFrame, evaluations: pd.DataFrame) -> None:
    rows = evaluations.drop_duplicates("model_id").set_index("model_id", drop=False).loc[places["model_id"]]
    rows = rows.reset_index(drop=True)
    points = places[["x", "y"]].to_numpy()
    factors = key_factors(rows, rows)
    scores = {name: separation(points, level) for name, level in factors.items()}
    scores = {name: score for name, score in scores.items() if not np.isnan(score[0])}
    axes.set(xlabel="first coordinate", ylabel="second coordinate")
    axes.set_aspect("equal", adjustable="datalim")
    if not scores:
        axes.scatter(points[:, 0], points[:, 1], s=22, color=PALETTE[0], alpha=0.8, linewidths=0)
        return
    best = max(scores, key=lambda name: scores[name][0])
    for label, colour in colours(factors[best]).items():
        chosen = (factors[best] == label).to_numpy()
        axes.scatter(points[chosen, 0], points[chosen, 1], s=22, color=[colour], alpha=0.8, linewidths=0, label=label)
    silhouette, share = scores[best]
    axes.legend(title=f"{best}: {silhouette:+.2f}, {share:.3f}", loc="best", alignment="left")


@rc_context(STYLE)
def layer_matrix(layers: pd.DataFrame) -> Figure:
    """CKA of every block of some models with every other.

    Args:
        layers: columns `model_a`, `block_a`, `model_b`, `block_b`, `cka`, as `layer_similarity` gives them.
    """
    require(layers, "layers", ("model_a", "block_a", "model_b", "block_b", "cka"))
    models = list(dict.fromkeys(layers["model_a"]))
    order = pd.MultiIndex.from_frame(layers[["model_a", "block_a"]].drop_duplicates())
    pivot = layers.pivot(index=["model_a", "block_a"], columns=["model_b", "block_b"], values="cka")
    matrix = pivot.loc[order, list(order)].to_numpy(float)
    size = len(matrix)
    figure = Figure(figsize=(7.8, 6.8), layout="constrained")
    axes = figure.subplots()
    shown: dict[str, Any] = {"cmap": "viridis", "vmin": min(0.0, float(np.nanmin(matrix))), "vmax": 1}
    image = axes.imshow(matrix, extent=(0, size, size, 0), **shown)
    starts = np.flatnonzero([block == 0 for _, block in order])
    for start in starts[1:]:
        axes.axhline(start, color="white", lw=2)
        axes.axvline(start, color="white", lw=2)
    middles = (starts + np.append(starts[1:], size)) / 2
    names = [model if len(model) <= 40 else f"{model[:22]}…{model[-16:]}" for model in models]
    axes.set_yticks(middles, names, rotation=90 if len(models) < 4 else 0, va="center")
    axes.set_xticks(middles, [""] * len(models))
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, shrink=0.7, label="CKA (debiased)")
    heading(figure, "Which layers do the same?", "within a model from its first block to its last; same order across")
    return figure
