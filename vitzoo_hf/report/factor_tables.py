"""What factors do to a population, as tables: variance explained, groups that lie apart, pairs of like and unlike."""

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int64

from vitzoo_hf.metrics.modes import silhouette
from vitzoo_hf.metrics.variance import (
    additive_basis,
    additive_shares,
    exchangeable_codes,
    gower_centred,
    least_p_value,
    one_way_shares,
    p_value,
)
from vitzoo_hf.report.factors import NothingToDrawError, final_models, same_groups, varying_factors
from vitzoo_hf.report.pair_tables import (
    SPACES,
    Space,
    compared_models,
    levels_and_parent,
    spaces_of,
    strata_of,
    varies_within,
)

VALUES = ("test_accuracy", "generalization_gap")
ALL_FACTORS = "all, additive"
PERMUTATIONS, SILHOUETTES = 999, 199
VARIANCE = (
    "measure",
    "factor",
    "levels",
    "degrees",
    "models",
    "share",
    "unique",
    "chance",
    "p",
    "least_p",
    "permuted",
)
SEPARATION = (
    "space",
    "factor",
    "levels",
    "silhouette",
    "chance",
    "chance_5",
    "chance_95",
    "p",
    "least_p",
    "permuted",
)
QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def variance_table(models: pd.DataFrame, index: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """What each factor, and all together, explain of accuracy, generalisation gap and distances; see `variance`.

    Values are those of final models, one-way eta squared; distances give the R² of PERMANOVA. Levels are permuted as
    `exchangeable_codes` says, with parents as strata; all factors together by permuting models freely.

    Args:
        models: evaluations with `test_accuracy` and, where known, `generalization_gap`, and the factors.
        index: see `spaces_of`.
        pairs: see `spaces_of`; empty: no distances.

    Returns:
        A row a measure and factor, largest share first and `all, additive` last: `levels`, `degrees` of freedom,
        `models`, `share`, `unique` (what `all` loses without the factor and those that group the models as it does),
        `chance` (mean share of permutations), `p`, `least_p` (see `least_p_value`) and what was `permuted`.

    Raises:
        NothingToDrawError: if nothing varies among the models.
    """
    records: list[dict[str, object]] = []
    for value in VALUES:
        if value in models and models[value].notna().any():
            rows = final_models(models, value)
            values = rows[value].to_numpy(float)
            records += _explained(value, rows, gower_centred((values[:, None] - values) ** 2))
    for space in _spaces(pairs, index):
        records += _explained(space.metric, space.rows, gower_centred(space.squared))
    if not records:
        raise NothingToDrawError("no factor varies among the final models")
    table = pd.DataFrame(records, columns=VARIANCE).astype({"levels": "Int64"})
    measure, last = pd.factorize(table["measure"])[0], table["factor"] == ALL_FACTORS
    return table.iloc[np.lexsort((-table["share"], last, measure))].reset_index(drop=True)


def _spaces(pairs: pd.DataFrame, index: pd.DataFrame) -> list[Space]:
    try:
        return [] if pairs.empty else spaces_of(pairs, index)
    except NothingToDrawError:
        return []


def _explained(measure: str, rows: pd.DataFrame, inner: Float64[np.ndarray, "M M"]) -> list[dict[str, object]]:
    # a fixed seed: the same zoo gives the same p-values
    rng = np.random.default_rng(0)
    rows = rows if "parent_id" in rows else rows.assign(parent_id=None)
    factors = levels_and_parent(rows)
    if not factors:
        return []
    codes = {name: level.cat.codes.to_numpy(np.int64) for name, level in factors.items()}
    order = np.arange(len(rows))[None]
    whole = additive_basis(np.stack(list(codes.values())))
    joint = float(additive_shares(inner, whole, order)[0])
    about = {"measure": measure, "models": len(rows)}
    records = []
    for name, own in codes.items():
        shuffled, unit = _exchanged(rows, name, own, PERMUTATIONS, rng)
        shares = one_way_shares(inner, np.concatenate([own[None], shuffled]))
        # without factors that group the models alike: they would explain the whole share again
        others = [codes[key] for key, level in factors.items() if not same_groups(level, factors[name])]
        rest = float(additive_shares(inner, additive_basis(np.stack(others)), order)[0]) if others else 0.0
        levels = int(factors[name].nunique())
        row = {"factor": name, "levels": levels, "degrees": levels - 1, "share": shares[0], "unique": joint - rest}
        row |= {"chance": shares[1:].mean(), "p": p_value(float(shares[0]), shares[1:])}
        records.append(about | row | {"least_p": least_p_value(own, shuffled), "permuted": unit})
    orders = np.stack([rng.permutation(len(rows)) for _ in range(PERMUTATIONS)])
    shares = additive_shares(inner, whole, orders)
    least = 1.0 if whole.shape[1] == len(rows) - 1 else 1 / (1 + PERMUTATIONS)  # it fits whatever the order
    row = {"factor": ALL_FACTORS, "degrees": whole.shape[1], "share": joint, "chance": shares.mean()}
    row |= {"p": p_value(joint, shares), "least_p": least, "permuted": "models"}
    return [*records, about | row]


def _exchanged(
    rows: pd.DataFrame, factor: str, codes: Int64[np.ndarray, " M"], count: int, rng: np.random.Generator
) -> tuple[Int64[np.ndarray, "R M"], str]:
    """Permutations of a factor's levels, and in words of what."""
    strata = strata_of(rows, factor)
    shuffled, unit = exchangeable_codes(codes, strata, count, rng)
    return shuffled, f"{len(set(strata))} parents" if unit == "strata" else unit.replace("strata", "a parent")


def separation_table(pairs: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """How well each factor separates the models, in the whole matrix of distances rather than in the plane.

    Args:
        pairs: see `spaces_of`.
        index: see `spaces_of`.

    Returns:
        `space`, `factor`, `levels`, `silhouette`; `chance`, `chance_5` and `chance_95`: mean and percentiles of the
        silhouette over permutations of the levels, as in `variance_table`; `p`, `least_p`, `permuted`. Best factor of
        a space first.

    Raises:
        NothingToDrawError: if no factor varies among models with all their distances.
    """
    records = []
    for space in spaces_of(pairs, index):
        # seeded anew for each space, so that its figures do not depend on which other spaces there are
        rng = np.random.default_rng(0)
        for name, level in levels_and_parent(space.rows).items():
            codes = level.cat.codes.to_numpy(np.int64)
            shuffled, unit = _exchanged(space.rows, name, codes, SILHOUETTES, rng)
            chance = np.array([silhouette(space.unlike, row) for row in shuffled])
            own = silhouette(space.unlike, codes)
            row = {"space": space.metric, "factor": name, "levels": level.nunique(), "silhouette": own}
            row |= {"chance": chance.mean(), "p": p_value(own, chance), "least_p": least_p_value(codes, shuffled)}
            row |= {"chance_5": np.quantile(chance, 0.05), "chance_95": np.quantile(chance, 0.95)}
            records.append(row | {"permuted": unit})
    if not records:
        raise NothingToDrawError("no factor varies among the models with all their distances")
    table = pd.DataFrame(records, columns=SEPARATION)
    order = np.lexsort((-table["silhouette"], table["space"].map(list(SPACES).index)))
    return table.iloc[order].reset_index(drop=True)


def best_factor(space: Space, most_levels: int) -> str | None:
    """The factor of up to `most_levels` levels with the largest silhouette; None if none varies."""
    few = {name: level for name, level in varying_factors(space.rows).items() if level.nunique() <= most_levels}
    silhouettes = {name: silhouette(space.unlike, level.cat.codes.to_numpy(np.int64)) for name, level in few.items()}
    return max(silhouettes, key=lambda name: silhouettes[name]) if silhouettes else None


def level_pairs_table(pairs: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """Distances and similarities of pairs with the same level of a factor, and of pairs with different ones.

    A factor that varies among the models of a parent is compared within parents. What belongs to parents, such as
    the regime, is compared between parents, where more than one parent has a level; parents among all pairs.

    Args:
        pairs: columns `model_a`, `model_b`, and any metric of `SPACES`.
        index: see `compared_models`.

    Returns:
        A row a metric, factor and `same_level`, true or false: `among` (`one parent`, `two parents`, `all`), the
        number of `pairs`, and the quantiles `q05`, `q25`, `median`, `q75`, `q95`. Groups without pairs are left out.

    Raises:
        NothingToDrawError: if no factor varies, or no pair has a value.
    """
    rows = compared_models(pairs, index)
    strata, place = strata_of(rows), pd.Series(range(len(rows)), index=rows["model_id"])
    both = pairs[pairs["model_a"].isin(place.index) & pairs["model_b"].isin(place.index)]
    a, b = (place[both[name]].to_numpy() for name in ("model_a", "model_b"))
    records = []
    for name, level in levels_and_parent(rows).items():
        codes, siblings = level.cat.codes.to_numpy(), strata[a] == strata[b]
        among, allowed = "all", np.ones(len(both), bool)
        if varies_within(level, strata):
            among, allowed = "one parent", siblings
        elif (~siblings & (codes[a] == codes[b])).any():
            among, allowed = "two parents", ~siblings
        for metric in [metric for metric in SPACES if metric in both]:
            values = both[metric].to_numpy(float)
            for same in (True, False):
                part = values[allowed & ((codes[a] == codes[b]) == same) & ~np.isnan(values)]
                if not len(part):
                    continue
                row = {"metric": metric, "factor": name, "among": among, "same_level": same}
                levels = dict(zip(QUANTILES, np.quantile(part, list(QUANTILES.values())), strict=True))
                records.append(row | {"pairs": len(part)} | levels)
    if not records:
        raise NothingToDrawError("no factor varies among the compared models, or no pair has a value")
    return pd.DataFrame(records)
