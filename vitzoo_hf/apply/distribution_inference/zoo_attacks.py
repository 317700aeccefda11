"""Attacks on a zoo whose rows carry a secret and a role: the game, its guards, and a table of how attacks did.

The card of an attack: what was guessed from what, how well, how sure that is, and what it may be used for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.attacks.black_box import BLACK_BOX
from vitzoo_hf.apply.distribution_inference.attacks.meta_models import FEWEST_SHADOWS
from vitzoo_hf.apply.distribution_inference.attacks.set_encoder import set_encoder
from vitzoo_hf.apply.distribution_inference.attacks.white_box import WHITE_BOX
from vitzoo_hf.apply.distribution_inference.game import (
    Attack,
    Guesses,
    Kind,
    Outcome,
    Queries,
    Shadows,
    Views,
    play,
    seen_like,
)
from vitzoo_hf.apply.distribution_inference.metrics import leaked_samples, leaked_samples_of_errors
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, Secret, secret_of
from vitzoo_hf.apply.distribution_inference.zoo_guards import check_pools, column_of, guards_of, plain, with_roles
from vitzoo_hf.apply.distribution_inference.zoo_views import joined_views, zoo_features, zoo_outputs, zoo_queries
from vitzoo_hf.blueprint.world import SHARES
from vitzoo_hf.evaluation.outputs_cache import ImageBatch
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.publish.card import template
from vitzoo_hf.zoo import Zoo

ACCESS = ("weights", "probabilities", "labels")
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
    **BLACK_BOX,
    **{name: WHITE_BOX[name] for name in READS if name in WHITE_BOX},
    "set_encoder": set_encoder,
}
BY_DEFAULT = tuple(name for name in OF_ZOOS if name not in ("flat_mlp", "log_odds"))
SHUFFLES = 20
CONTROL = {"control": "secrets of shadows were shuffled: every attack is to be at chance"}
WITH_SEEDS = ("meta_classifier", "flat_mlp", "set_encoder")


@dataclass(frozen=True, eq=False)
class Report:
    """What attacks found out.

    Attributes:
        table: a row an attack.
        facts: of the game: secret, prior, access, knowledge, sizes, guards; for the card.
        guesses: a row a target: its model, its secret, the guess of each attack, and as `ATTACK_score` its score,
            larger for the second class, where it has one.
    """

    table: pd.DataFrame
    facts: Mapping[str, Any]
    guesses: pd.DataFrame


def attack_zoo(
    zoo: Zoo,
    secret: str,
    *,
    shadows: Zoo | None = None,
    role: str = "role",
    access: str = "weights",
    attacks: Sequence[str] | None = None,
    num_queries: int = 512,
    seeds: int = 5,
    shuffled: bool = False,
    unequal: bool = False,
    seed: int = 0,
    cache: Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Report:
    """Guess a secret of the targets of a zoo from its shadows.

    Args:
        zoo: final models are used; those without a role are left out.
        secret: its column, with or without `factor_`: two values are classes, more a number; `a,b` are two numbers.
        shadows: a zoo whose shadows are used instead, such as of another architecture; without access to weights.
        role: column that says `target` or `shadow`.
        access: `weights`, with outputs besides; `probabilities`; or `labels`, predicted classes alone.
        attacks: names; by default all that the access and the zoo allow.
        num_queries: selection images that all are asked about: `zoo_views.zoo_queries`.
        seeds: of attacks with randomness.
        shuffled: a control: attacks learn from shadows with shuffled secrets, of which each of 20 shuffles is a
            seed, so that all are at chance; without the loss test, which learns nothing.
        unequal: go on although training differs between secrets; the report says so.
        seed: of the queries.
        cache: folder that keeps outputs.
        device: where models run and features are taken.
        progress: show bars.

    Raises:
        ZooError: for an unknown column, attack or access; too few models of a role; a guard that fails.
    """
    _check_counts(seeds, num_queries)
    names = _chosen(attacks, access, shadows is not None, shuffled)
    cast = cast_of(zoo, shadows, secret, role)
    space, secrets = secret_of([plain(value) for value in cast.index[cast.column]])
    guards = guards_of(cast.index, cast.column, role, secrets, cast.shadows, space, unequal)
    guards |= CONTROL if shuffled else {}
    options: dict[str, Any] = {"device": device, "progress": progress}
    asked, queries, batch = None, None, None
    if any(name in BLACK_BOX for name in names):
        batch, queries = zoo_queries(cast.zoos[-1], cast.column, space, num_queries=num_queries, seed=seed)
        asked = Views(torch.cat([zoo_outputs(each, batch, cache=cache, **options) for each in cast.zoos]))
    names = _fitting(names, attacks, queries)
    wanted = [READS[name] for name in names if name in READS]
    read = zoo_features(cast.zoos[0], cast.shadows, wanted, **options) if wanted else None
    known, targets = (joined_views(asked, read, mask.nonzero()[:, 0]) for mask in (cast.shadows, ~cast.shadows))
    adversary = Shadows(known, secrets[cast.shadows], space, queries)
    targets = seen_like(targets, "labels") if access == "labels" else targets
    truth, ratio = secrets[~cast.shadows], is_ratio(cast.column)
    table, guesses = _played(names, adversary, targets, truth, access, ratio, seeds, shuffled, device)
    told = cast.index.loc[(~cast.shadows).numpy(), ["model_id", cast.column]].reset_index(drop=True)
    sizes = _sizes_of(batch, SHUFFLES if shuffled else seeds)
    return Report(table, _facts(cast, space, truth, access, guards) | sizes, told.assign(**guesses))


def _sizes_of(batch: ImageBatch | None, seeds: int) -> dict[str, int]:
    images = () if batch is None else batch.images
    distinct = {image.numpy().tobytes() for image in images}
    return {"queries": len(images), "distinct_queries": len(distinct), "seeds": seeds}


def _check_counts(seeds: int, num_queries: int) -> None:
    if seeds < 1 or num_queries < 1:
        raise ZooError(f"seeds {seeds}, queries {num_queries}: expected at least 1 of each")


@dataclass(frozen=True, eq=False)
class Cast:
    """Models that take part, in one order.

    Attributes:
        zoos: of all models; or that of shadows and that of targets.
        index: a row a model, in the order of the zoos.
        column: of the secret.
        shadows: which models are.
    """

    zoos: tuple[Zoo, ...]
    index: pd.DataFrame
    column: str
    shadows: Tensor


def cast_of(zoo: Zoo, shadows: Zoo | None, secret: str, role: str) -> Cast:
    """The targets of a zoo, and its shadows or those of another.

    Raises:
        ZooError: for an unknown column, too few of a role, or shadows that may have learnt from the victim's images.
    """
    index = zoo.to_pandas()
    parts = [(zoo, index)]
    if shadows is not None:
        other = shadows.to_pandas()
        parts = [(shadows, other[other[column_of(other, role)] == "shadow"])]
        parts += [(zoo, index[index[column_of(index, role)] == "target"])]
        if set(parts[0][1]["model_id"]) & set(parts[1][1]["model_id"]):
            raise ZooError("a model is target and shadow: give a zoo of other models as shadows")
        worlds = [_record(part, rows) for part, rows in reversed(parts)]
        if any("worlds" in world for world in worlds):
            check_pools(*worlds)
    players = with_roles(pd.concat([rows for _, rows in parts], ignore_index=True), role)
    zoos = tuple(
        part.filter(model_id=list(rows["model_id"][rows["model_id"].isin(players["model_id"])]))
        for part, rows in parts
    )
    order = [model_id for each in zoos for model_id in each.model_ids]
    players = players.set_index("model_id").loc[order].reset_index()
    is_shadow = torch.from_numpy((players[column_of(players, role)] == "shadow").to_numpy(copy=True))
    columns = [column_of(players, name) for name in secret.split(",")]
    column = ",".join(columns)
    if len(columns) > 1:
        players[column] = list(zip(*(players[name] for name in columns), strict=True))
    return Cast(zoos, players, column, is_shadow)


def _record(zoo: Zoo, rows: pd.DataFrame) -> Mapping[str, Any]:
    """What the manifest says of the images that the first of these rows was trained on; empty for no rows."""
    return zoo.manifest["images"][rows["dataset"].iloc[0]] if len(rows) else {}


def _fitting(names: list[str], asked_for: Sequence[str] | None, queries: Queries | None) -> list[str]:
    """Without the loss test by default where queries are of no candidate distribution."""
    if asked_for or queries is None or queries.candidates is not None:
        return names
    return [name for name in names if name != "loss_test"]


def _played(
    names: Sequence[str],
    known: Shadows,
    targets: Views,
    truth: Tensor,
    access: str,
    is_ratio: bool,
    seeds: int,
    shuffled: bool,
    device: str | torch.device,
) -> tuple[pd.DataFrame, dict[str, list[Any]]]:
    """A row an attack, the best on shadows marked, and the guesses of each."""
    rows, guesses = [], {}
    for name in names:
        repeats = range(SHUFFLES if shuffled else seeds if name in WITH_SEEDS else 1)
        attack = partial(set_encoder, device=device) if name == "set_encoder" else OF_ZOOS[name]
        attack = partial(_from_shuffled, attack) if shuffled else attack
        outcome = play(known, targets, truth, attack, seeds=repeats)
        row = row_of(name, access, known.secret, truth, outcome, is_ratio=is_ratio)
        rows.append(row | {"shadow_value": None if shuffled else on_shadows(known, attack, targets.kind)})
        guesses[name] = _told(known.secret, outcome.guesses)
        if outcome.scores is not None:
            guesses[f"{name}_score"] = outcome.scores.tolist()
    table = pd.DataFrame(rows)
    values = table["shadow_value"].astype(float) * (1 if isinstance(known.secret, ClassSecret) else -1)
    table["chosen"] = values == values.max()
    table.loc[table.index[table["chosen"]][1:], "chosen"] = False
    return table, guesses


def _from_shuffled(attack: Attack, shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """The attack, which learns from shadows whose secrets were shuffled by this seed."""
    return attack(shadows.permuted(seed), targets, seed)


def _chosen(attacks: Sequence[str] | None, access: str, of_another_zoo: bool, shuffled: bool) -> list[str]:
    if access not in ACCESS:
        raise ZooError(f"unknown access {access!r}: {did_you_mean(access, ACCESS)}")
    if of_another_zoo and access == "weights":
        raise ZooError("weights of shadows of another zoo do not compare: give access probabilities or labels")
    names = list(dict.fromkeys(attacks or ()))
    for name in names:
        if name not in OF_ZOOS:
            raise ZooError(f"unknown attack {name!r}: {did_you_mean(name, list(OF_ZOOS))}")
        if name in READS and access != "weights":
            raise ZooError(f"attack {name} reads weights, but access is {access}: give --access weights")
        if shuffled and name == "loss_test":
            raise ZooError("the loss test learns nothing from shadows, whose secrets cannot be shuffled for it")
    fit = [name for name in BY_DEFAULT if access == "weights" or name not in READS]
    return names or [name for name in fit if not (shuffled and name == "loss_test")]


def row_of(
    name: str, access: str, space: Secret, truth: Tensor, outcome: Outcome, *, is_ratio: bool
) -> dict[str, Any]:
    """How an attack did, as a row of `Report.table`; advantage is over the best constant guess of these targets."""
    outcome = replace(outcome, prior_risk=prior_risk(space, truth))
    classes = isinstance(space, ClassSecret)
    value = outcome.accuracy if classes else outcome.risk
    row: dict[str, Any] = {
        "attack": name,
        "access": "weights" if name in READS else "probabilities" if access == "weights" else access,
    }
    row |= {"metric": "accuracy" if classes else "mae", "value": value.mean, "low": value.low, "high": value.high}
    row |= {"auc": float(np.mean(outcome.auc)) if outcome.auc else None, "advantage": outcome.advantage}
    leaked = _leaked(space, truth, outcome) if is_ratio else None
    return row | {"seeds": len(outcome.losses), "n_leaked": leaked}


def prior_risk(space: Secret, truth: Tensor) -> float:
    """What the best constant guess loses on these targets.

    Example:
        >>> prior_risk(ClassSecret((0.3, 0.5)), torch.tensor([0, 0, 0, 1]))
        0.25
    """
    if isinstance(space, ClassSecret):
        return 1 - truth.bincount().max().item() / len(truth)
    return (truth - truth.median(0).values).abs().mean().item()


def is_ratio(column: str) -> bool:
    """Whether a column is a share of the training data, of which there are samples to count in n_leaked.

    >>> is_ratio("factor_label_ratio"), is_ratio("last_environment")
    (True, False)
    """
    name = column.removeprefix("factor_")
    return name in SHARES or "ratio" in name or "share" in name


def _leaked(space: Secret, truth: Tensor, outcome: Outcome) -> float | None:
    """n_leaked of two ratios as frequent as each other, or of one number; 0 without an advantage."""
    if isinstance(space, ClassSecret):
        numeric = all(isinstance(value, int | float) and 0 <= value <= 1 for value in space.values)
        if len(space.values) != 2 or not numeric or 2 * int(truth.sum()) != len(truth):
            return None
        return leaked_samples(outcome.accuracy.mean, (float(space.values[0]), float(space.values[1])))
    if len(space.bounds) != 1 or min(space.bounds[0]) < 0 or max(space.bounds[0]) > 1:
        return None
    return leaked_samples_of_errors(truth[:, 0], outcome.guesses[:, 0]) if outcome.advantage > 0 else 0.0


def on_shadows(known: Shadows, attack: Attack, kind: Kind) -> float:
    """How well an attack does on half of the shadows, of each class, from the others: what attacks are chosen by."""
    order = torch.randperm(len(known.secrets), generator=torch.Generator().manual_seed(0))
    if isinstance(known.secret, ClassSecret):
        order = order[known.secrets[order].argsort(stable=True)]
    first, second = order[::2], order[1::2]
    half = Shadows(known.views.at(first), known.secrets[first], known.secret, known.queries)
    if len(first) < FEWEST_SHADOWS:
        return float("nan")
    outcome = play(half, seen_like(known.views.at(second), kind), known.secrets[second], attack)
    return (outcome.accuracy if isinstance(known.secret, ClassSecret) else outcome.risk).mean


def _told(space: Secret, guesses: Tensor) -> list[Any]:
    if isinstance(space, ClassSecret):
        return [space.values[guess] for guess in guesses.tolist()]
    return [guess[0] if len(guess) == 1 else guess for guess in guesses.tolist()]


def _facts(cast: Cast, space: Secret, truth: Tensor, access: str, guards: Mapping[str, str]) -> dict[str, Any]:
    architectures = cast.index["architecture"] + cast.index["architecture_args"]
    kinds = [set(architectures[mask.numpy()]) for mask in (cast.shadows, ~cast.shadows)]
    classes = isinstance(space, ClassSecret)
    return {
        "zoo": cast.zoos[-1].manifest["name"],
        "secret": cast.column,
        "space": f"one of {', '.join(map(str, space.values))}"
        if isinstance(space, ClassSecret)
        else ", ".join(f"a number from {low:g} to {high:g}" for low, high in space.bounds),
        "prior": "as frequent as among the targets",
        "prior_risk": prior_risk(space, truth),
        "metric": "accuracy" if classes else "MAE",
        "access": access,
        "knowledge": "shadows of the same architecture, on data of the adversary"
        if kinds[0] == kinds[1]
        else "shadows of another architecture, on data of the adversary",
        "targets": int((~cast.shadows).sum()),
        "shadows": int(cast.shadows.sum()),
        "guards": dict(guards),
    }


TEMPLATE = "attack_card.md.jinja"


def attack_card(report: Report) -> str:
    """The card as Markdown.

    Raises:
        ZooError: if the template is missing from the installation.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    rows = [_shown(row) for row in records(report.table)]
    filled = environment.from_string(template(TEMPLATE)).render(rows=rows, **report.facts)
    return filled.rstrip("\n") + "\n"


def _shown(row: dict[str, Any]) -> dict[str, str]:
    interval = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    found = {name: _number(row[name]) for name in ("auc", "advantage", "n_leaked", "shadow_value")}
    attack = row["attack"] + (" (chosen on shadows)" if row["chosen"] else "")
    return found | {"attack": attack, "access": row["access"], "seeds": str(row["seeds"]), "value": interval}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value != float("inf") else "∞"
