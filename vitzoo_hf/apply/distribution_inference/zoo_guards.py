"""Who plays distribution inference on a zoo, by its columns, and what must not differ between secrets."""

from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.game import check_equal
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, Secret
from vitzoo_hf.schema import ZooError, did_you_mean

ROLES = ("target", "shadow")
TRAINED = {"training examples": "factor_trained_images", "optimiser steps": "factor_trained_steps"}
DATA_HASH = "factor_trained_sha256"


def column_of(index: pd.DataFrame, name: str) -> str:
    """A column by its name, with or without `factor_`.

    Raises:
        ZooError: if there is none.
    """
    for known in (name, f"factor_{name}"):
        if known in index:
            return known
    raise ZooError(f"the zoo has no column {name!r}: {did_you_mean(name, list(index.columns))}")


def with_roles(index: pd.DataFrame, role: str) -> pd.DataFrame:
    """Final targets and shadows of an index.

    Raises:
        ZooError: for too few of either.
    """
    column = column_of(index, role)
    found = index[index["is_final"] & index[column].isin(ROLES)]
    counts = found[column].value_counts()
    for name, least in (("target", 2), ("shadow", 8)):
        if counts.get(name, 0) < least:
            raise ZooError(
                f"{counts.get(name, 0)} final models are a {name} by column {column}: expected at least {least};"
                f" its values are {sorted(map(str, index[column].dropna().unique()))}"
            )
    return found


def plain(value: Any) -> Any:
    """A value of a column as one of Python's own.

    >>> plain(np.float64(0.5)), plain("target")
    (0.5, 'target')
    """
    return value.item() if isinstance(value, np.generic) else value


def guards_of(
    index: pd.DataFrame, column: str, role: str, secrets: Tensor, shadows: Tensor, space: Secret, unequal: bool
) -> dict[str, str]:
    """What was compared, and how it came out.

    Raises:
        ZooError: if training data of the roles overlap; if training differs between secrets and `unequal` is not set.
    """
    told = {"targets' secrets": "never given to an attack; attacks are compared on shadows alone"}
    if isinstance(space, ClassSecret):
        for name, held in (("shadow", secrets[shadows]), ("target", secrets[~shadows])):
            if len(held.unique()) < len(space.values):
                raise ZooError(
                    f"no {name} has some of the secrets {list(space.values)}: every role needs all of them"
                )
    for what, name in TRAINED.items():
        if name not in index or index[name].isna().any():
            told[what] = "not recorded in this zoo"
            continue
        try:
            check_equal(what, index[name].tolist(), secrets)
            told[what] = f"equal: {index[name].iloc[0]:g} for every model"
        except ZooError as error:
            if not unequal:
                raise ZooError(f"{error}; --unequal goes on") from None
            told[what] = f"NOT equal: {index[name].min():g} to {index[name].max():g}"
    if "factor_role" in index and (index["factor_role"] != index[column_of(index, role)]).any():
        raise ZooError(
            f"column {role} calls some models targets that learnt from the adversary's data: give --role role"
        )
    if DATA_HASH in index and index[DATA_HASH].notna().all():
        parts = [set(index[DATA_HASH][mask.numpy()]) for mask in (shadows, ~shadows)]
        if parts[0] & parts[1]:
            raise ZooError(f"{len(parts[0] & parts[1])} training sets are those of a target and of a shadow")
        told["training data"] = "no training set is that of a target and of a shadow"
    else:
        told["training data"] = "not recorded in this zoo"
    differing = _differing(index, column, role)
    if differing and not unequal:
        raise ZooError(f"{differing[0]} takes other values with other secrets: filter by --where; --unequal goes on")
    told["other factors"] = f"NOT alike: {', '.join(differing)}" if differing else "the same values with every secret"
    return told


def _differing(index: pd.DataFrame, column: str, role: str) -> list[str]:
    """Other factors whose values depend on the secret; those that number the runs do not count."""
    own = {column, column_of(index, role)}
    found = []
    for name in [*index.filter(regex="^factor_"), "epoch", "architecture", "head"]:
        if name in own or name.startswith("factor_trained_") or index[name].nunique() > len(index) / 4:
            continue
        values = [frozenset(part.dropna()) for _, part in index.groupby(column)[name]]
        if len(set(values)) > 1:
            found.append(str(name))
    return found
