"""What varies in a zoo: final models, the levels of their generating factors, the variance each explains.

Pandas tables of the configs `index` and `evaluations`, with class labels as text ('finetune', 'linear').
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd

from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError

MAX_LEVELS = 8
"""Factors with more levels are neither colours nor strips."""


class NothingToDrawError(ZooError):
    """The columns are there but hold no value: the figure does not apply to this zoo."""


def require(table: pd.DataFrame, name: str, columns: Collection[str]) -> None:
    """Raise `ZooError` if the table lacks one of the columns, or has no rows."""
    for column in columns:
        if column not in table:
            raise ZooError(f"table {name!r} has no column {column!r}: {did_you_mean(column, map(str, table))}")
    if table.empty:
        raise ZooError(f"table {name!r} has no rows: nothing to draw")


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
        columns.setdefault("parent", table["parent_id"].map(run_of, na_action="ignore"))
    levels_by_factor: dict[str, pd.Series] = {}
    # declared factors first: `head`, `dataset` and `parent` are compared with them
    for name in sorted(columns, key=lambda name: name not in declared):
        level = levels_of(columns[name])
        repeats = name not in declared and any(same_groups(level, other) for other in levels_by_factor.values())
        if 1 < level.nunique() < len(table) and not repeats:
            levels_by_factor[name] = level
    return levels_by_factor


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


def key_factors(table: pd.DataFrame, rows: pd.DataFrame) -> dict[str, pd.Series]:
    """The factors of `rows` with few levels, what explains most of the test accuracy in `table` first."""
    try:
        shares = explained_variance(table).fillna(0).to_dict()
    except NothingToDrawError:
        shares = {}
    few = {name: level for name, level in varying_factors(rows).items() if level.nunique() <= MAX_LEVELS}
    return dict(sorted(few.items(), key=lambda item: -shares.get(item[0], -1)))


def run_of(model_id: str) -> str:
    """The run of a model id: what comes before the last `@`."""
    return model_id.rpartition("@")[0] or model_id


def same_groups(a: pd.Series, b: pd.Series) -> bool:
    """Whether two columns group the rows alike, whatever the names of the groups."""
    return bool((pd.factorize(a)[0] == pd.factorize(b)[0]).all())


def levels_of(column: pd.Series) -> pd.Series:
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


def _text(value: Any) -> str:
    if isinstance(value, bool | np.bool_ | str):
        return str(value) if isinstance(value, str) else str(value).lower()
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:g}"
