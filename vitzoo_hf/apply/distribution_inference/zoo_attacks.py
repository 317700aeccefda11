"""Run attacks on a zoo whose rows have a secret and a role: guards, a table of results, and a card in Markdown.

Costs: all models run once on the queries, and weights are read once for all features, once more for components; an
attack is repeated for each seed.
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
"""Attack on weights -> the features that it reads."""
OF_ZOOS: dict[str, Attack] = {
    **BLACK_BOX,
    **{name: WHITE_BOX[name] for name in READS if name in WHITE_BOX},
    "set_encoder": set_encoder,
}
BY_DEFAULT = tuple(name for name in OF_ZOOS if name not in ("flat_mlp", "log_odds"))
SHUFFLES = 20
CONTROL = {"control": "secrets of shadows were shuffled: every attack should then be at chance level"}
WITH_SEEDS = ("meta_classifier", "flat_mlp", "set_encoder")


@dataclass(frozen=True, eq=False)
class Report:
    """Results of attacks.

    Attributes:
        table: a row an attack.
        facts: facts of the game for the card: secret, prior, access, knowledge, sizes, guards.
        guesses: a row a target: model, secret, the guess of each attack, and, if the attack has scores, its score as
            `ATTACK_score`, larger for the second class.
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
        zoo: zoo of the models; final models with a role are used.
        secret: column, with or without `factor_`: two values are classes, more are a number, `a,b` are two numbers.
        shadows: zoo of other shadows, such as of another architecture; it excludes access to weights.
        role: column with the values `target` and `shadow`.
        access: `weights`, which includes outputs; `probabilities`; or `labels`, predicted classes alone.
        attacks: names of attacks; by default all that the access and the zoo allow.
        num_queries: number of selection images that all models answer, see `zoo_queries`.
        seeds: number of repetitions of attacks with randomness.
        shuffled: run a control, at chance level: attacks learn from 20 shuffles of secrets, without the loss test.
        unequal: continue although training differs between secrets; the report says so.
        seed: seed of the queries.
        cache: folder that caches outputs.
        device: device that runs models and computes features.
        progress: show bars.

    Raises:
        ZooError: for an unknown column, attack or access; too few models of a role; a guard that fails.
    """
    _check_counts(seeds, num_queries)
    names = _selected(attacks, access, shadows is not None, shuffled)
    cast = cast_of(zoo, shadows, secret, role)
    space, secrets = secret_of([plain(value) for value in cast.index[cast.column]])
    guards = guards_of(cast.index, cast.column, role, secrets, cast.shadows, space, unequal)
    guards |= CONTROL if shuffled else {}
    outputs, queries, batch = None, None, None
    if any(name in BLACK_BOX for name in names):
        batch, queries = zoo_queries(cast.zoos[-1], cast.column, space, num_queries=num_queries, seed=seed)
        parts = [zoo_outputs(part, batch, cache=cache, device=device, progress=progress) for part in cast.zoos]
        outputs = Views(torch.cat(parts))
    names = _fitting(names, attacks, queries)
    reads = [READS[name] for name in names if name in READS]
    weights = zoo_features(cast.zoos[0], cast.shadows, reads, device=device, progress=progress) if reads else None
    of_shadows = joined_views(outputs, weights, cast.shadows.nonzero()[:, 0])
    targets = joined_views(outputs, weights, (~cast.shadows).nonzero()[:, 0])
    adversary = Shadows(of_shadows, secrets[cast.shadows], space, queries)
    targets = seen_like(targets, "labels") if access == "labels" else targets
    truth, ratio = secrets[~cast.shadows], is_ratio(cast.column)
    table, guesses = _played(names, adversary, targets, truth, access, ratio, seeds, shuffled, device)
    answers = cast.index.loc[(~cast.shadows).numpy(), ["model_id", cast.column]].reset_index(drop=True)
    sizes = _sizes_of(batch, SHUFFLES if shuffled else seeds)
    return Report(table, _facts(cast, space, truth, access, guards) | sizes, answers.assign(**guesses))


def _sizes_of(batch: ImageBatch | None, seeds: int) -> dict[str, int]:
    images = () if batch is None else batch.images
    distinct = {image.numpy().tobytes() for image in images}
    return {"queries": len(images), "distinct_queries": len(distinct), "seeds": seeds}


def _check_counts(seeds: int, num_queries: int) -> None:
    if seeds < 1 or num_queries < 1:
        raise ZooError(f"seeds {seeds}, queries {num_queries}: expected at least 1 of each")


@dataclass(frozen=True, eq=False)
class Cast:
    """Targets and shadows of a game, in one order.

    Attributes:
        zoos: one zoo of all models; or the zoo of shadows, then the zoo of targets.
        index: a row a model, in the order of the zoos.
        column: column of the secret.
        shadows: true for shadows.
    """

    zoos: tuple[Zoo, ...]
    index: pd.DataFrame
    column: str
    shadows: Tensor


def cast_of(zoo: Zoo, shadows: Zoo | None, secret: str, role: str) -> Cast:
    """Select the targets of a zoo, and its shadows or the shadows of another zoo.

    Raises:
        ZooError: for an unknown column, too few models of a role, or shadows that may have learnt from images
            of the victim.
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
        # only worlds record how their pool was split
        if any("worlds" in world for world in worlds):
            check_pools(*worlds)
    players = with_roles(pd.concat([rows for _, rows in parts], ignore_index=True), role)
    zoos = tuple(
        part.filter(model_id=list(rows["model_id"][rows["model_id"].isin(players["model_id"])]))
        for part, rows in parts
    )
    order = [model_id for part in zoos for model_id in part.model_ids]
    # models are read zoo by zoo, so the index follows that order
    players = players.set_index("model_id").loc[order].reset_index()
    # a copy, because pandas may give a read-only array, of which torch warns
    is_shadow = torch.from_numpy((players[column_of(players, role)] == "shadow").to_numpy(copy=True))
    columns = [column_of(players, name) for name in secret.split(",")]
    column = ",".join(columns)
    if len(columns) > 1:
        players[column] = list(zip(*(players[name] for name in columns), strict=True))
    return Cast(zoos, players, column, is_shadow)


def _record(zoo: Zoo, rows: pd.DataFrame) -> Mapping[str, object]:
    """Record in the manifest of the training images of the first row; empty for no rows."""
    return zoo.manifest["images"][rows["dataset"].iloc[0]] if len(rows) else {}


def _fitting(names: list[str], asked_for: Sequence[str] | None, queries: Queries | None) -> list[str]:
    """Drop the loss test from the defaults if queries are not drawn from candidate distributions."""
    if asked_for or queries is None or queries.candidates is not None:
        return names
    return [name for name in names if name != "loss_test"]


def _played(
    names: Sequence[str],
    shadows: Shadows,
    targets: Views,
    truth: Tensor,
    access: str,
    is_ratio: bool,
    seeds: int,
    shuffled: bool,
    device: str | torch.device,
) -> tuple[pd.DataFrame, dict[str, list[object]]]:
    """Play attacks: a row an attack, with the best on shadows marked, and the guesses of each attack."""
    rows, guesses = [], {}
    for name in names:
        repeats = range(SHUFFLES if shuffled else seeds if name in WITH_SEEDS else 1)
        attack = partial(set_encoder, device=device) if name == "set_encoder" else OF_ZOOS[name]
        attack = partial(_from_shuffled, attack) if shuffled else attack
        outcome = play(shadows, targets, truth, attack, seeds=repeats)
        row = row_of(name, access, shadows.secret, truth, outcome, is_ratio=is_ratio)
        rows.append(row | {"shadow_value": None if shuffled else on_shadows(shadows, attack, targets.kind)})
        guesses[name] = _values(shadows.secret, outcome.guesses)
        if outcome.scores is not None:
            guesses[f"{name}_score"] = outcome.scores.tolist()
    table = pd.DataFrame(rows)
    # accuracy is best when large, an error when small
    values = table["shadow_value"].astype(float) * (1 if isinstance(shadows.secret, ClassSecret) else -1)
    table["chosen"] = values == values.max()
    # of equal attacks only the first is chosen
    table.loc[table.index[table["chosen"]][1:], "chosen"] = False
    return table, guesses


def _from_shuffled(attack: Attack, shadows: Shadows, targets: Views, seed: int = 0) -> Guesses:
    """Run an attack on shadows whose secrets are shuffled by the seed."""
    return attack(shadows.permuted(seed), targets, seed)


def _selected(attacks: Sequence[str] | None, access: str, of_another_zoo: bool, shuffled: bool) -> list[str]:
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
) -> dict[str, object]:
    """Make the row of an attack in `Report.table`; its advantage is over the best constant guess for the targets."""
    outcome = replace(outcome, prior_risk=prior_risk(space, truth))
    classes = isinstance(space, ClassSecret)
    value = outcome.accuracy if classes else outcome.risk
    row: dict[str, object] = {
        "attack": name,
        "access": "weights" if name in READS else "probabilities" if access == "weights" else access,
    }
    row |= {"metric": "accuracy" if classes else "mae", "value": value.mean, "low": value.low, "high": value.high}
    row |= {"auc": float(np.mean(outcome.auc)) if outcome.auc else None, "advantage": outcome.advantage}
    leaked = _leaked(space, truth, outcome) if is_ratio else None
    return row | {"seeds": len(outcome.losses), "n_leaked": leaked}


def prior_risk(space: Secret, truth: Tensor) -> float:
    """Loss of the best constant guess on the targets.

    Example:
        >>> prior_risk(ClassSecret((0.3, 0.5)), torch.tensor([0, 0, 0, 1]))
        0.25
    """
    if isinstance(space, ClassSecret):
        return 1 - truth.bincount().max().item() / len(truth)
    return (truth - truth.median(0).values).abs().mean().item()


def is_ratio(column: str) -> bool:
    """Whether a column is a share of the training data, for which n_leaked counts samples.

    >>> is_ratio("factor_label_ratio"), is_ratio("last_environment")
    (True, False)
    """
    name = column.removeprefix("factor_")
    return name in SHARES or "ratio" in name or "share" in name


def _leaked(space: Secret, truth: Tensor, outcome: Outcome) -> float | None:
    """n_leaked of two equally frequent ratios, or of one number; 0 without an advantage."""
    if isinstance(space, ClassSecret):
        ratios = [float(value) for value in space.values if isinstance(value, int | float) and 0 <= value <= 1]
        if len(space.values) != 2 or len(ratios) != 2 or 2 * int(truth.sum()) != len(truth):
            return None
        return leaked_samples(outcome.accuracy.mean, (ratios[0], ratios[1]))
    if len(space.bounds) != 1 or min(space.bounds[0]) < 0 or max(space.bounds[0]) > 1:
        return None
    return leaked_samples_of_errors(truth[:, 0], outcome.guesses[:, 0]) if outcome.advantage > 0 else 0.0


def on_shadows(shadows: Shadows, attack: Attack, kind: Kind) -> float:
    """Measure an attack on half of the shadows of each class, learnt from the other half, to select the best."""
    order = torch.randperm(len(shadows.secrets), generator=torch.Generator().manual_seed(0))
    if isinstance(shadows.secret, ClassSecret):
        # sorted by class: every second shadow then halves each class
        order = order[shadows.secrets[order].argsort(stable=True)]
    first, second = order[::2], order[1::2]
    half = Shadows(shadows.views.at(first), shadows.secrets[first], shadows.secret, shadows.queries)
    if len(first) < FEWEST_SHADOWS:
        return float("nan")
    outcome = play(half, seen_like(shadows.views.at(second), kind), shadows.secrets[second], attack)
    return (outcome.accuracy if isinstance(shadows.secret, ClassSecret) else outcome.risk).mean


def _values(space: Secret, guesses: Tensor) -> list[object]:
    if isinstance(space, ClassSecret):
        return [space.values[guess] for guess in guesses.tolist()]
    return [guess[0] if len(guess) == 1 else guess for guess in guesses.tolist()]


def _facts(cast: Cast, space: Secret, truth: Tensor, access: str, guards: Mapping[str, str]) -> dict[str, object]:
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
    """Write the card of an attack as Markdown.

    Raises:
        ZooError: if the template is missing from the installation.
    """
    # late, because only the card needs Jinja
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    rows = [_shown(row) for row in records(report.table)]
    filled = environment.from_string(template(TEMPLATE)).render(rows=rows, **report.facts)
    return filled.rstrip("\n") + "\n"


def _shown(row: dict[str, Any]) -> dict[str, str]:
    interval = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    numbers = {name: _number(row[name]) for name in ("auc", "advantage", "n_leaked", "shadow_value")}
    attack = row["attack"] + (" (chosen on shadows)" if row["chosen"] else "")
    return numbers | {"attack": attack, "access": row["access"], "seeds": str(row["seeds"]), "value": interval}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value != float("inf") else "∞"
