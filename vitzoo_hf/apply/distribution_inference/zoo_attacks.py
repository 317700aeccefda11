"""Attacks on a zoo whose rows carry a secret and a role: the game, its guards, and a table of how attacks did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.black_box import BLACK_BOX, seen_like
from vitzoo_hf.apply.distribution_inference.game import Attack, Kind, Outcome, Shadows, Views, check_equal, play
from vitzoo_hf.apply.distribution_inference.metrics import leaked_samples, leaked_samples_of_errors
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, Secret, secret_of
from vitzoo_hf.apply.distribution_inference.set_encoder import set_encoder
from vitzoo_hf.apply.distribution_inference.white_box import WHITE_BOX
from vitzoo_hf.apply.distribution_inference.zoo_views import joined_views, zoo_features, zoo_outputs
from vitzoo_hf.schema import ZooError, did_you_mean
from vitzoo_hf.zoo import Zoo

ACCESS = ("weights", "probabilities", "labels")
ROLES = ("target", "shadow")
READS = {
    "log_odds": "head_bias",
    "head": "head",
    "components": "components",
    "statistics": "statistics",
    "flat_mlp": "flat",
    "set_encoder": "sets",
}
"""Attacks on weights -> the features they read."""

OF_ZOOS: dict[str, Attack] = {
    **{name: attack for name, attack in BLACK_BOX.items() if name != "loss_test"},
    **{name: WHITE_BOX[name] for name in READS if name in WHITE_BOX},
    "set_encoder": set_encoder,
}
BY_DEFAULT = tuple(name for name in OF_ZOOS if name not in ("flat_mlp", "log_odds"))
WITH_SEEDS = ("meta_classifier", "flat_mlp", "set_encoder")
TRAINED = {"training examples": "factor_trained_images", "optimiser steps": "factor_trained_steps"}
DATA_HASH = "factor_trained_sha256"


@dataclass(frozen=True, eq=False)
class Report:
    """What attacks found out.

    Attributes:
        table: a row an attack.
        facts: of the game: secret, prior, access, knowledge, sizes, guards; for the card.
        guesses: a row a target: its model, its secret, and the guess of each attack.
    """

    table: pd.DataFrame
    facts: Mapping[str, Any]
    guesses: pd.DataFrame


def attack_zoo(
    zoo: Zoo,
    secret: str,
    *,
    role: str = "role",
    access: str = "weights",
    attacks: Sequence[str] | None = None,
    num_queries: int = 512,
    seeds: int = 5,
    unequal: bool = False,
    seed: int = 0,
    cache: Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Report:
    """Guess a secret of the targets of a zoo from its shadows.

    Args:
        zoo: final models are used; those without a role are left out.
        secret: column of the secret, with or without `factor_`; two values are classes, more numbers are a number.
        role: column that says `target` or `shadow`.
        access: `weights`, with outputs besides; `probabilities`; or `labels`, predicted classes alone.
        attacks: names; by default all that the access allows.
        num_queries: selection images that models are asked about.
        seeds: of attacks with randomness.
        unequal: go on although training differs between secrets; the report says so.
        seed: of the queries.
        cache: folder that keeps outputs.
        device: where models run and features are taken.
        progress: show bars.

    Raises:
        ZooError: for an unknown column, attack or access; too few models of a role; a guard that fails.
    """
    names = _chosen(attacks, access)
    index = _with_roles(zoo, role)
    own = zoo.filter(model_id=list(index["model_id"]))
    index = index.set_index("model_id").loc[own.model_ids].reset_index()
    column = _column(index, secret)
    space, secrets = secret_of([_plain(value) for value in index[column]])
    shadows = torch.from_numpy((index[_column(index, role)] == "shadow").to_numpy(copy=True))
    guards = _guards(index, column, role, secrets, shadows, space, unequal)
    options: dict[str, Any] = {"device": device, "progress": progress}
    asked, queries = None, None
    if any(name in BLACK_BOX for name in names):
        asks: dict[str, Any] = {"num_queries": num_queries, "seed": seed, "cache": cache}
        asked, queries = zoo_outputs(own, **asks, **options)
    wanted = [READS[name] for name in names if name in READS]
    read = zoo_features(own, shadows, wanted, **options) if wanted else None
    known_at, seen_at = shadows.nonzero()[:, 0], (~shadows).nonzero()[:, 0]
    known = Shadows(joined_views(asked, read, known_at), secrets[known_at], space, queries)
    targets, truth = joined_views(asked, read, seen_at), secrets[seen_at]
    targets = seen_like(targets, "labels") if access == "labels" else targets
    table, guesses = _played(names, known, targets, truth, access, seeds, device)
    told = index.loc[seen_at.numpy(), ["model_id", column]].reset_index(drop=True)
    facts = _facts(zoo, column, space, access, index, shadows, guards, num_queries, seeds)
    return Report(table, facts, told.assign(**guesses))


def _played(
    names: Sequence[str],
    known: Shadows,
    targets: Views,
    truth: Tensor,
    access: str,
    seeds: int,
    device: str | torch.device,
) -> tuple[pd.DataFrame, dict[str, list[Any]]]:
    """A row an attack, the best on shadows marked, and the guesses of each."""
    rows, guesses = [], {}
    for name in names:
        repeats = range(seeds) if name in WITH_SEEDS else range(1)
        attack = partial(set_encoder, device=device) if name == "set_encoder" else OF_ZOOS[name]
        outcome = play(known, targets, truth, attack, seeds=repeats)
        row = _row(name, access, known.secret, truth, outcome)
        rows.append(row | {"shadow_value": _on_shadows(known, attack, targets.kind)})
        guesses[name] = _told(known.secret, outcome.guesses)
    table = pd.DataFrame(rows)
    values = table["shadow_value"] if isinstance(known.secret, ClassSecret) else -table["shadow_value"]
    table["chosen"] = values == values.max()
    table.loc[table.index[table["chosen"]][1:], "chosen"] = False
    return table, guesses


def _chosen(attacks: Sequence[str] | None, access: str) -> list[str]:
    if access not in ACCESS:
        raise ZooError(f"unknown access {access!r}: {did_you_mean(access, ACCESS)}")
    names = list(dict.fromkeys(attacks or ()))
    for name in names:
        if name not in OF_ZOOS:
            raise ZooError(f"unknown attack {name!r}: {did_you_mean(name, list(OF_ZOOS))}")
        if name in READS and access != "weights":
            raise ZooError(f"attack {name} reads weights, but access is {access}: give --access weights")
    return names or [name for name in BY_DEFAULT if access == "weights" or name not in READS]


def _column(index: pd.DataFrame, name: str) -> str:
    for known in (name, f"factor_{name}"):
        if known in index:
            return known
    raise ZooError(f"the zoo has no column {name!r}: {did_you_mean(name, list(index.columns))}")


def _with_roles(zoo: Zoo, role: str) -> pd.DataFrame:
    """The index of final targets and shadows."""
    index = zoo.to_pandas()
    column = _column(index, role)
    found = index[index["is_final"] & index[column].isin(ROLES)]
    counts = found[column].value_counts()
    for name, least in (("target", 2), ("shadow", 8)):
        if counts.get(name, 0) < least:
            raise ZooError(
                f"{counts.get(name, 0)} final models are a {name} by column {column}: expected at least {least};"
                f" its values are {sorted(map(str, index[column].dropna().unique()))}"
            )
    return found


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _guards(
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
    own = {column, _column(index, role)}
    found = []
    for name in [*index.filter(regex="^factor_"), "epoch", "architecture", "head"]:
        if name in own or name.startswith("factor_trained_") or index[name].nunique() > len(index) / 4:
            continue
        values = [frozenset(part.dropna()) for _, part in index.groupby(column)[name]]
        if len(set(values)) > 1:
            found.append(str(name))
    return found


def _row(name: str, access: str, space: Secret, truth: Tensor, outcome: Outcome) -> dict[str, Any]:
    classes = isinstance(space, ClassSecret)
    value = outcome.accuracy if classes else outcome.risk
    row: dict[str, Any] = {
        "attack": name,
        "access": "weights" if name in READS else "probabilities" if access == "weights" else access,
    }
    row |= {"metric": "accuracy" if classes else "mae", "value": value.mean, "low": value.low, "high": value.high}
    row |= {"auc": float(np.mean(outcome.auc)) if outcome.auc else None, "advantage": outcome.advantage}
    row |= {"seeds": len(outcome.losses), "n_leaked": _leaked(space, truth, outcome)}
    return row


def _leaked(space: Secret, truth: Tensor, outcome: Outcome) -> float | None:
    """n_leaked where the secret is a ratio."""
    if isinstance(space, ClassSecret):
        numeric = all(isinstance(value, int | float) and 0 <= value <= 1 for value in space.values)
        if len(space.values) != 2 or not numeric:
            return None
        return leaked_samples(outcome.accuracy.mean, (float(space.values[0]), float(space.values[1])))
    if len(space.bounds) != 1 or min(space.bounds[0]) < 0 or max(space.bounds[0]) > 1:
        return None
    return leaked_samples_of_errors(truth[:, 0], outcome.guesses[:, 0])


def _on_shadows(known: Shadows, attack: Attack, kind: Kind) -> float:
    """How well an attack does on every second shadow from the others: what attacks are to be chosen by."""
    order = torch.randperm(len(known.secrets), generator=torch.Generator().manual_seed(0))
    first, second = order[::2], order[1::2]
    half = Shadows(known.views.at(first), known.secrets[first], known.secret, known.queries)
    if len(first) < 8 or (isinstance(known.secret, ClassSecret) and len(half.secrets.unique()) < 2):
        return float("nan")
    outcome = play(half, seen_like(known.views.at(second), kind), known.secrets[second], attack)
    return (outcome.accuracy if isinstance(known.secret, ClassSecret) else outcome.risk).mean


def _told(space: Secret, guesses: Tensor) -> list[Any]:
    if isinstance(space, ClassSecret):
        return [space.values[guess] for guess in guesses.tolist()]
    return [guess[0] if len(guess) == 1 else guess for guess in guesses.tolist()]


def _facts(
    zoo: Zoo,
    column: str,
    space: Secret,
    access: str,
    index: pd.DataFrame,
    shadows: Tensor,
    guards: Mapping[str, str],
    num_queries: int,
    seeds: int,
) -> dict[str, Any]:
    kinds = [set(index["architecture_args"][mask.numpy()]) for mask in (shadows, ~shadows)]
    classes = isinstance(space, ClassSecret)
    return {
        "zoo": zoo.manifest["name"],
        "secret": column,
        "space": f"one of {', '.join(map(str, space.values))}"
        if isinstance(space, ClassSecret)
        else f"a number from {space.bounds[0][0]:g} to {space.bounds[0][1]:g}",
        "prior": "every value as likely",
        "prior_risk": space.prior_risk,
        "metric": "accuracy" if classes else "MAE",
        "access": access,
        "knowledge": "shadows of the same architecture, on data of the adversary"
        if kinds[0] == kinds[1]
        else "shadows of another architecture, on data of the adversary",
        "targets": int((~shadows).sum()),
        "shadows": int(shadows.sum()),
        "queries": num_queries,
        "seeds": seeds,
        "guards": dict(guards),
    }
