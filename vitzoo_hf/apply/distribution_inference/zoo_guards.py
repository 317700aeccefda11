"""Guards of distribution inference on a zoo: roles by column, and columns that must not follow the secret."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import chi2_contingency, kruskal
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.game import check_equal
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, Secret
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError

ROLES = ("target", "shadow")
LEAST = {"target": 2, "shadow": 16}
LEAST_OF_A_CLASS = {"target": 1, "shadow": 4}
UNLIKELY = 1e-3
"""Largest p value at which a factor counts as dependent on the secret."""
SHOWN_VALUES = 8
POOL = ("source", "selection", "test", "split_seed")
"""Settings of a world that decide which images belong to the victim."""
IMPLIED = ("factor_seed", "factor_trained_distinct_images", "factor_trained_environments")
"""Columns that number the runs, or are determined by the secret and the learner."""
TRAINED = {"training examples": "factor_trained_images", "optimiser steps": "factor_trained_steps"}
DATA_HASH = "factor_trained_sha256"


def column_of(index: pd.DataFrame, name: str) -> str:
    """Find a column by its name, with or without `factor_`.

    Raises:
        ZooError: if there is no such column.
    """
    for column in (name, f"factor_{name}"):
        if column in index:
            return column
    raise ZooError(f"the zoo has no column {name!r}: {did_you_mean(name, list(index.columns))}")


def with_roles(index: pd.DataFrame, role: str) -> pd.DataFrame:
    """Select the final targets and shadows of an index.

    Raises:
        ZooError: for too few targets or shadows.
    """
    column = column_of(index, role)
    # final models alone: epochs of one run are not independent
    players = index[index["is_final"] & index[column].isin(ROLES)]
    counts = players[column].value_counts()
    values = sorted(map(str, index[column].dropna().unique()))
    shown = ", ".join(values[:SHOWN_VALUES]) + (f", … ({len(values)} in all)" if len(values) > SHOWN_VALUES else "")
    for name, least in LEAST.items():
        if counts.get(name, 0) < least:
            raise ZooError(
                f"{counts.get(name, 0)} final models are a {name} by column {column}: expected at least {least};"
                f" its values are {shown or 'missing'}"
            )
    return players


def plain(value: object) -> object:
    """Convert a value of a column to a plain Python value.

    >>> plain(np.float64(0.5)), plain("target")
    (0.5, 'target')
    """
    if isinstance(value, tuple):
        return tuple(plain(part) for part in value)
    # numpy scalars print with their type, and most do not go into JSON
    return value.item() if isinstance(value, np.generic) else value


def guards_of(
    index: pd.DataFrame, column: str, role: str, secrets: Tensor, shadows: Tensor, space: Secret, unequal: bool
) -> dict[str, str]:
    """Check the guards: name of a comparison -> its result.

    Raises:
        ZooError: if training data of the roles overlap; or if training differs between secrets without
            `unequal`.
    """
    _check_classes(secrets, shadows, space)
    results = {"targets' secrets": "never given to an attack; attacks are compared on shadows alone"}
    for what, name in TRAINED.items():
        results[what] = _same(index, what, name, column, unequal)
    if "factor_role" in index and (index["factor_role"] != index[column_of(index, role)]).any():
        raise ZooError(
            f"column {role} calls some models targets that learnt from the adversary's data: give --role role"
        )
    results["training data"] = _apart(index, shadows)
    differing = _differing(index, column, role)
    if differing and not unequal:
        raise ZooError(f"{differing[0]} takes other values with other secrets: filter by --where; --unequal goes on")
    equal = "the same values, as often, with every secret"
    results["other factors"] = f"NOT alike: {', '.join(differing)}" if differing else equal
    return results


def check_pools(victim: Mapping[str, object], adversary: Mapping[str, object]) -> None:
    """Refuse shadows of a zoo whose images were split in another way than the images of the targets' zoo.

    Args:
        victim: record of the images of the targets' world.
        adversary: record of the images of the shadows' world.

    Raises:
        ZooError: naming what differs.

    Example:
        >>> check_pools({"source": "digits", "split_seed": 0}, {"source": "digits", "split_seed": 0})
    """
    for name in POOL:
        if victim.get(name) != adversary.get(name):
            raise ZooError(
                f"images of the shadows have {name} {adversary.get(name)!r}, those of the targets"
                f" {victim.get(name)!r}: shadows may have learnt from the victim's images; train them with the same"
            )


def _check_classes(secrets: Tensor, shadows: Tensor, space: Secret) -> None:
    if not isinstance(space, ClassSecret):
        return
    for name, members in (("shadow", secrets[shadows]), ("target", secrets[~shadows])):
        counts = members.bincount(minlength=len(space.values)).tolist()
        if min(counts) < LEAST_OF_A_CLASS[name]:
            rare = space.values[counts.index(min(counts))]
            raise ZooError(
                f"{min(counts)} models with secret {rare!r} are a {name}: expected at least {LEAST_OF_A_CLASS[name]}"
                f" of each of {list(space.values)}"
            )


def _same(index: pd.DataFrame, what: str, name: str, column: str, unequal: bool) -> str:
    """Check that a number of the training, such as its steps, is equal for all models that record it."""
    # a model whose run did not record the number has none to compare
    recorded = index[index[name].notna()] if name in index else index[:0]
    if recorded.empty:
        return "not recorded in this zoo"
    part = "" if len(recorded) == len(index) else f", of the {len(recorded)} of {len(index)} models that record it"
    try:
        check_equal(what, recorded[name].tolist(), recorded[column].tolist())
    except ZooError as error:
        if not unequal:
            raise ZooError(f"{error}; --unequal goes on") from None
        return f"NOT equal: {recorded[name].min():g} to {recorded[name].max():g}{part}"
    return f"equal: {recorded[name].iloc[0]:g} for every model{part}"


def _apart(index: pd.DataFrame, shadows: Tensor) -> str:
    """Check that no target and shadow have a training set in common."""
    if DATA_HASH not in index or index[DATA_HASH].isna().all():
        return "not recorded in this zoo"
    parts = [set(index[DATA_HASH][mask.numpy()].dropna()) for mask in (shadows, ~shadows)]
    if parts[0] & parts[1]:
        raise ZooError(f"{len(parts[0] & parts[1])} training sets are those of a target and of a shadow")
    missing = int(index[DATA_HASH].isna().sum())
    return "no training set is that of a target and of a shadow" + (f"; {missing} not recorded" if missing else "")


def _differing(index: pd.DataFrame, column: str, role: str) -> list[str]:
    """List the other factors whose values depend on the secret."""
    of_role = column_of(index, role)
    expected = {column, *column.split(","), of_role, DATA_HASH, *TRAINED.values(), *IMPLIED}
    names = [*index.filter(regex="^factor_"), "epoch", "architecture", "head"]
    return [str(name) for name in names if name not in expected and _depends(index, name, column, of_role)]


def _depends(index: pd.DataFrame, name: str, column: str, role: str) -> bool:
    """Whether the values of a factor, or their frequencies, depend on the secret.

    Few different values, missing ones included, are counted for each role; many different numbers are ranked over all
    roles (Kruskal and Wallis, 1952).
    """
    values = index[name]
    if values.nunique(dropna=False) < 2:
        return False
    # a table of counts needs several models a cell; numbers are ranked instead
    if values.nunique(dropna=False) > len(index) / 4:
        numbers = pd.to_numeric(values, errors="coerce")
        parts = [part.dropna() for _, part in numbers.groupby(index[column]) if part.notna().any()]
        return len(parts) > 1 and bool(kruskal(*parts).pvalue < UNLIKELY)
    shown = values.astype(object).where(values.notna(), "missing").map(str)
    # a value that occurs with one secret alone gives it away, however rare
    if len({frozenset(part) for _, part in shown.groupby(index[column])}) > 1:
        return True
    for _, part in index.groupby(role):
        # role by role, because roles may differ in size and in their factors
        counts = pd.crosstab(part[column], shown[part.index])
        if min(counts.shape) > 1 and chi2_contingency(counts).pvalue < UNLIKELY:
            return True
    return False
