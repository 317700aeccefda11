"""The table of pairs -> matrices: how unlike the final models are, in weights and in behaviour."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int64

from vitzoo_hf.report.factors import NothingToDrawError, require, same_groups, varying_factors

SPACES = {
    "weight_l2": "weights: L2 distance",
    "weight_cosine": "weights: 1 − cosine",
    "agreement": "behaviour: 1 − agreement",
    "cka": "representation: 1 − CKA",
}
"""Pair metrics that say how unlike two models are, and how."""


class Space(NamedTuple):
    """Models with all their distances in one metric: their rows of `index`, and the dissimilarities."""

    rows: pd.DataFrame
    unlike: Float64[np.ndarray, "M M"]
    metric: str

    @property
    def squared(self) -> Float64[np.ndarray, "M M"]:
        """Squared distances: those of weights, or `2 (1 - s)` of a similarity s.

        `2 (1 - s)` is the squared distance of one-hot predictions per image for agreement, of weights of length 1 for
        cosine, of centred Gram matrices of length 1 for CKA.
        """
        return self.unlike**2 if self.metric == "weight_l2" else 2 * self.unlike


def square(pairs: pd.DataFrame, models: list[str], value: str) -> Float64[np.ndarray, "M M"]:
    """A pair metric of `models` as a symmetric matrix; NaN on the diagonal and where a pair is missing."""
    matrix = np.full((len(models), len(models)), np.nan)
    both = pairs[pairs["model_a"].isin(models) & pairs["model_b"].isin(models)]
    place = pd.Series(range(len(models)), index=models)
    a, b = place[both["model_a"]].to_numpy(), place[both["model_b"]].to_numpy()
    matrix[a, b] = matrix[b, a] = both[value].to_numpy(float)
    return matrix


def compared_models(pairs: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """The rows of the models that `pairs` compares: fine-tuned ones where there are any.

    Args:
        pairs: columns `model_a`, `model_b`.
        index: columns `model_id`, `parent_id`, `stage`, and the factors.
    """
    require(pairs, "pairs", ("model_a", "model_b"))
    require(index, "index", ("model_id", "parent_id", "stage"))
    rows = index.drop_duplicates("model_id")
    rows = rows[rows["model_id"].isin({*pairs["model_a"], *pairs["model_b"]})]
    tuned = rows[rows["stage"] == "finetune"]
    return (rows if tuned.empty else tuned).reset_index(drop=True)


def spaces_of(pairs: pd.DataFrame, index: pd.DataFrame) -> list[Space]:
    """The distances of the compared models in every metric of `SPACES` that was measured.

    A model that lacks pairs is left out, the one that lacks most first, until every pair has a value.

    Args:
        pairs: columns `model_a`, `model_b`, `weight_l2`, `agreement`; `weight_cosine` and `cka` where measured.
        index: see `compared_models`.

    Raises:
        NothingToDrawError: if no metric is known for three models.
    """
    require(pairs, "pairs", ("model_a", "model_b", "weight_l2", "agreement"))
    rows = compared_models(pairs, index)
    found = []
    for metric in SPACES:
        if metric not in pairs:
            continue
        matrix = square(pairs, list(rows["model_id"]), metric)
        matrix = matrix if metric == "weight_l2" else 1 - matrix
        np.fill_diagonal(matrix, 0)
        places = _complete(matrix)
        if len(places) > 2:
            found.append(Space(rows.loc[places].reset_index(drop=True), matrix[np.ix_(places, places)], metric))
    if not found:
        raise NothingToDrawError("table 'pairs': no three models have all their distances")
    return found


def levels_and_parent(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """The varying factors, and the parent even where it groups the models as a factor does."""
    found = varying_factors(rows)
    parents = rows["parent_id"]
    if "parent" not in found and 1 < parents.nunique(dropna=False) < len(rows):
        found["parent"] = varying_factors(rows[["parent_id"]])["parent"]
    return found


def strata_of(rows: pd.DataFrame, factor: str = "") -> Int64[np.ndarray, " M"]:
    """Within what the levels of a factor are exchanged: the parent's number, for the parent itself one for all.

    Models without a parent share a number.
    """
    if factor == "parent":
        return np.zeros(len(rows), np.int64)
    return pd.factorize(rows["parent_id"], use_na_sentinel=False)[0].astype(np.int64)


def varies_within(level: pd.Series, strata: Int64[np.ndarray, " M"]) -> bool:
    """Whether models of one parent differ in a factor, where there is more than one parent."""
    both = pd.Series(list(zip(level.astype(str), strata, strict=True)))
    return len(set(strata)) > 1 and not same_groups(both, pd.Series(strata))


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
