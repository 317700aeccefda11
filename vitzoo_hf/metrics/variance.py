"""Share of the variance between models that a factor explains: eta squared, of values and of distances (PERMANOVA).

The sum of squared distances over all pairs of models, divided by the number of models, is the sum of squares around
the mean. So one formula serves both: with `(y_i - y_j)²` of a value the share is one-way eta squared, with a matrix
of distances the R² of PERMANOVA (Anderson 2001, https://doi.org/10.1111/j.1442-9993.2001.01070.pp.x). Several factors
together are the additive model of McArdle and Anderson (2001). Tests permute levels, only among models that may be
exchanged; like all permutation tests of distances they also respond to levels that differ in spread alone.

P models, R permutations or groupings, K factors.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

BLOCK_BYTES = 2**26
TIE = 1e-9
"""Shares that differ by less are equal: they differ by rounding."""


def gower_centred(squared: Float[np.ndarray, "P P"]) -> Float64[np.ndarray, "P P"]:
    """Inner products around the mean, from squared distances: `-1/2 J D² J` (Gower 1966).

    Args:
        squared: symmetric squared distances, 0 on the diagonal. They need not be those of points in a space.

    Raises:
        ValueError: for NaN or infinite distances.
    """
    squared = squared.astype(np.float64)
    if not np.isfinite(squared).all():
        raise ValueError("some distances are NaN or infinite: leave out the models without all their distances")
    rows = squared.mean(axis=0)
    return -(squared - rows - rows[:, None] + rows.mean()) / 2


def one_way_shares(inner: Float64[np.ndarray, "P P"], codes: Int64[np.ndarray, "R P"]) -> Float64[np.ndarray, " R"]:
    """Share of the variance that each of several groupings of the models explains.

    Args:
        inner: inner products around the mean, from `gower_centred`.
        codes: the groups of all models, from 0, one grouping a row.

    Raises:
        ValueError: if `inner` and `codes` differ in the number of models.

    Returns:
        float64, NaN where the models do not vary. In [0, 1] for distances of points; other dissimilarities can
        leave it.

    Example:
        >>> y = np.array([1.0, 1, 3, 3])
        >>> one_way_shares(gower_centred((y[:, None] - y) ** 2), np.array([[0, 0, 1, 1], [0, 1, 0, 1]])).tolist()
        [1.0, 0.0]
    """
    _check_models(inner, codes.shape[1])
    total, groups = _total(inner), int(codes.max()) + 1
    explained = np.empty(len(codes))
    step = max(1, BLOCK_BYTES // (8 * groups * len(inner)))
    for start in range(0, len(codes), step):
        members = np.eye(groups)[codes[start : start + step]]
        counts = members.sum(axis=1)
        sums = np.einsum("rmg,rmg->rg", members, inner @ members)
        means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
        explained[start : start + step] = means.sum(axis=1)
    return explained / total


def additive_basis(codes: Int64[np.ndarray, "K P"]) -> Float64[np.ndarray, "P degrees"]:
    """An orthonormal basis of what several factors can explain together, each by a shift of its own per level.

    Args:
        codes: one row a factor, the level of each model.

    Returns:
        Orthonormal columns of mean 0; their number is the degrees of freedom, without those that factors share.
    """
    members = np.concatenate([np.eye(int(row.max()) + 1)[row] for row in codes], axis=1)
    left, singular, _ = np.linalg.svd(members - members.mean(axis=0), full_matrices=False)
    return left[:, singular > 1e-9 * math.sqrt(members.size)]


def additive_shares(
    inner: Float64[np.ndarray, "P P"], basis: Float64[np.ndarray, "P degrees"], orders: Int64[np.ndarray, "R P"]
) -> Float64[np.ndarray, " R"]:
    """Share of the variance that the factors of `additive_basis` explain, for several orders of the models.

    Args:
        inner: inner products around the mean, from `gower_centred`.
        basis: basis of the factors of the same models, from `additive_basis`.
        orders: permutations of the models, one a row; model i gets the levels of model `orders[r, i]`.

    Raises:
        ValueError: if `inner` and `basis` differ in the number of models.

    Returns:
        float64, NaN where the models do not vary.
    """
    _check_models(inner, len(basis))
    total = _total(inner)
    explained = np.empty(len(orders))
    step = max(1, BLOCK_BYTES // (8 * max(1, basis.size)))
    for start in range(0, len(orders), step):
        permuted = basis[orders[start : start + step]]
        explained[start : start + step] = np.einsum("rmd,rmd->r", permuted, inner @ permuted)
    return explained / total


def exchangeable_codes(
    codes: Int64[np.ndarray, " P"], strata: Int64[np.ndarray, " P"], count: int, rng: np.random.Generator
) -> tuple[Int64[np.ndarray, "R P"], str]:
    """Permutations of a factor's levels among the units that may be exchanged if the factor has no effect.

    A factor that varies within a stratum is permuted among the models of each stratum, so that differences between
    strata are not taken for its effect. A factor that is constant in each stratum belongs to the stratum: strata
    exchange their levels as a whole, since models of one stratum are not independent repetitions. In a single stratum
    all models are exchanged.

    Args:
        codes: the level of each model, from 0.
        strata: the stratum of each model, such as its parent, from 0.
        count: number of permutations.
        rng: generator of the permutations.

    Returns:
        The levels, one permutation a row; and what was permuted: `models`, `models within strata` or `strata`.
    """
    _, first, strata = np.unique(strata, return_index=True, return_inverse=True)
    constant = bool((codes[first][strata] == codes).all())
    if len(first) == 1:
        return np.stack([rng.permutation(codes) for _ in range(count)]), "models"
    if constant:
        return np.stack([codes[first][rng.permutation(len(first))][strata] for _ in range(count)]), "strata"
    order = np.argsort(strata, kind="stable")
    shuffled = np.empty((count, len(codes)), np.int64)
    for row in shuffled:
        row[order] = codes[np.lexsort((rng.random(len(codes)), strata))]
    return shuffled, "models within strata"


def p_value(observed: float, permuted: Float64[np.ndarray, " R"]) -> float:
    """Share of permutations that reach the observed statistic, the observed order among them.

    Source: Phipson and Smyth, 2010. NaN where the statistic is not defined.

    Example:
        >>> p_value(0.9, np.array([0.1, 0.9, 0.2]))
        0.5
    """
    if math.isnan(observed):
        return math.nan
    return float((1 + (permuted >= observed - TIE).sum()) / (1 + len(permuted)))


def least_p_value(codes: Int64[np.ndarray, " P"], permuted: Int64[np.ndarray, "R P"]) -> float:
    """The p-value of the strongest possible effect, since some permutations leave all groups unchanged.

    Two parents of two regimes, say, have no other order: the p-value is 1, whatever the effect.
    """
    return float((1 + _is_same_grouping(codes, permuted).sum()) / (1 + len(permuted)))


def _is_same_grouping(codes: Int64[np.ndarray, " P"], permuted: Int64[np.ndarray, "R P"]) -> Bool[np.ndarray, " R"]:
    """Whether two groupings are equal, whatever the names of the groups."""
    together = np.sort(codes * (int(permuted.max()) + 1) + permuted, axis=1)
    distinct = 1 + (np.diff(together, axis=1) > 0).sum(axis=1)
    groups = 1 + (np.diff(np.sort(permuted, axis=1), axis=1) > 0).sum(axis=1)
    return (distinct == len(np.unique(codes))) & (distinct == groups)


def _check_models(inner: Float64[np.ndarray, "P P"], models: int) -> None:
    if len(inner) != models:
        raise ValueError(f"distances of {len(inner)} models and levels of {models}: give one level a model")


def _total(inner: Float64[np.ndarray, "P P"]) -> float:
    """The sum of squares around the mean; NaN for models that do not vary."""
    total = float(np.trace(inner))
    return total if total > 0 else math.nan
