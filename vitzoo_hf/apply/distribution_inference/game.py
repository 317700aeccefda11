"""The game: an adversary with shadow models whose secrets it knows guesses the secrets of targets.

An attack is a function of shadows, of what it sees of the targets, and of a seed. It never gets the targets' secrets,
which `play` alone compares with its guesses. Guards refuse cells in which something else than the secret differs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.metrics import Interval, area_under_curve, nested_interval
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, Secret, advantage
from vitzoo_hf.format.schema import ZooError

Kind = Literal["log_probabilities", "labels", "real"]
LABEL_EPSILON = 0.01


@dataclass(frozen=True, eq=False)
class Queries:
    """Inputs that models are asked about.

    Attributes:
        origins: the query set each of Q inputs is from; sets are numbered from 0.
        labels: true classes `[Q]`, or true outputs of a regression `[Q]`; None where they are unknown.
        candidates: the secret whose distribution a query set is drawn from, one a set, as secrets are stored; None
            where sets are drawn from no candidate distribution.
    """

    origins: Int64[Tensor, " Q"]
    labels: Tensor | None = None
    candidates: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Views:
    """What an adversary sees of M models.

    Attributes:
        outputs: on the queries: log-probabilities, or real outputs; None without black-box access.
        kind: of the outputs; `labels` are log-probabilities made from predicted classes alone.
        features: of the weights: name -> float64 `[M, F]`; empty without access to weights.
        sets: of the weights for the set encoder: name -> tensor with M models on the first axis.
    """

    outputs: Float[Tensor, "M Q K"] | None = None
    kind: Kind = "log_probabilities"
    features: Mapping[str, Float64[np.ndarray, "M F"]] = field(default_factory=dict)
    sets: Mapping[str, Tensor] = field(default_factory=dict)

    def answers(self) -> Float[Tensor, "M Q K"]:
        """The outputs.

        Raises:
            ZooError: if the adversary has no access to them, or some are NaN.
        """
        if self.outputs is None:
            raise ZooError("this attack reads outputs of models, and there are none: give access to probabilities")
        if self.outputs.isnan().any():
            raise ZooError("outputs of some model are NaN: leave diverged models out, and count them")
        return self.outputs

    def at(self, places: Int64[Tensor, " m"]) -> "Views":
        """Some of the models."""
        return replace(
            self,
            outputs=None if self.outputs is None else self.outputs[places],
            features={name: values[places.numpy()] for name, values in self.features.items()},
            sets={name: values[places] for name, values in self.sets.items()},
        )


def label_only(outputs: Float[Tensor, "M Q K"], *, epsilon: float = LABEL_EPSILON) -> Float[Tensor, "M Q K"]:
    """Log-probabilities of an adversary that sees the predicted class: `1 - epsilon` for it, the rest shared.

    Example:
        >>> label_only(torch.tensor([[[2.0, 1.0]]])).exp()
        tensor([[[0.9900, 0.0100]]])
    """
    K = outputs.shape[2]
    found = torch.full_like(outputs, math.log(epsilon / (K - 1)))
    return found.scatter(2, outputs.argmax(2, keepdim=True), math.log(1 - epsilon))


def seen_like(views: Views, kind: Kind) -> Views:
    """The same models, but only their predicted classes where others are known by those alone."""
    if kind == "labels" and views.kind == "log_probabilities" and views.outputs is not None:
        return replace(views, outputs=label_only(views.answers()), kind="labels")
    return views


def comparable(own: Views, targets: Views) -> Views:
    """Shadows as targets are seen.

    Raises:
        ZooError: if they cannot be.
    """
    known = seen_like(own, targets.kind)
    if known.kind != targets.kind or known.answers().shape[1:] != targets.answers().shape[1:]:
        raise ZooError(
            f"shadows answer with {known.kind} {list(known.answers().shape[1:])}, targets with {targets.kind}"
            f" {list(targets.answers().shape[1:])}: ask both the same queries"
        )
    return known


@dataclass(frozen=True, eq=False)
class Shadows:
    """Models of the adversary's own, with their secrets, and all that it knows besides."""

    views: Views
    secrets: Tensor
    secret: Secret
    queries: Queries | None = None

    def asked(self) -> Queries:
        """The queries.

        Raises:
            ZooError: if there are none.
        """
        if self.queries is None:
            raise ZooError("this attack needs the queries that outputs answer: give `queries`")
        return self.queries

    def permuted(self, seed: int) -> "Shadows":
        """With secrets in random order: an attack that learns from these knows nothing."""
        order = torch.randperm(len(self.secrets), generator=torch.Generator().manual_seed(seed))
        return replace(self, secrets=self.secrets[order])


@dataclass(frozen=True, eq=False)
class Guesses:
    """What an attack says of T targets.

    Attributes:
        secrets: int64 `[T]` for classes, float64 `[T, V]` for numbers.
        scores: of a binary secret, larger for class 1; None where an attack has none.
    """

    secrets: Tensor
    scores: Float64[Tensor, " T"] | None = None


Attack = Callable[[Shadows, Views, int], Guesses]


@dataclass(frozen=True, eq=False)
class Outcome:
    """How well an attack did.

    Attributes:
        losses: of each target under each seed: 1 for an error, or the absolute error.
        prior_risk: what the best guess without a model loses.
        auc: area under the curve of a binary secret, a value a seed; empty without scores.
        guesses: of the first seed.
        scores: of a binary secret, mean over seeds, larger for class 1; None where an attack has none.
    """

    losses: Float64[Tensor, "S T"]
    prior_risk: float
    auc: tuple[float, ...]
    guesses: Tensor
    scores: Float64[Tensor, " T"] | None = None

    @property
    def risk(self) -> Interval:
        """Mean loss over seeds and targets."""
        return nested_interval(self.losses[None])

    @property
    def accuracy(self) -> Interval:
        """Share of targets guessed right; for classes."""
        mean, low, high = self.risk
        return Interval(1 - mean, 1 - high, 1 - low)

    @property
    def advantage(self) -> float:
        """`1 - risk / prior risk`."""
        return advantage(self.losses.mean().item(), self.prior_risk)


def play(
    shadows: Shadows, targets: Views, secrets: Tensor, attack: Attack, *, seeds: Sequence[int] = (0,)
) -> Outcome:
    """Let an attack guess, and compare.

    Args:
        shadows: what the adversary has.
        targets: what it sees.
        secrets: of the targets; the attack does not get them.
        attack: to play.
        seeds: of its repetitions.

    Raises:
        ZooError: from an attack that lacks access, or fits another kind of secret.
    """
    losses, areas, scores, first = [], [], [], None
    for seed in seeds:
        guesses = attack(shadows, targets, seed)
        losses.append(shadows.secret.losses(guesses.secrets, secrets))
        first = guesses.secrets if first is None else first
        if guesses.scores is not None:
            scores.append(guesses.scores)
        if (
            guesses.scores is not None
            and isinstance(shadows.secret, ClassSecret)
            and 0 < secrets.sum() < len(secrets)
        ):
            areas.append(area_under_curve(guesses.scores, secrets == 1))
    assert first is not None
    mean = torch.stack(scores).mean(0) if scores else None
    return Outcome(torch.stack(losses), shadows.secret.prior_risk, tuple(areas), first, mean)


def check_equal(what: str, values: Sequence[float | int], secrets: Sequence[Any]) -> None:
    """Refuse a cell in which models differ in something that would give the secret away.

    Args:
        what: such as `training examples` or `optimiser steps`.
        values: one a model.
        secrets: of the models.

    Raises:
        ZooError: naming two values, and the secrets that have them: two different ones, where there are.

    Example:
        >>> check_equal("training examples", [2048, 2048], [0.3, 0.5])
    """
    others = [place for place, value in enumerate(values) if value != values[0]]
    if not others:
        return
    other = next((place for place in others if secrets[place] != secrets[0]), others[0])
    raise ZooError(
        f"{what} differ between models: {values[0]:g} with secret {secrets[0]}, {values[other]:g} with secret"
        f" {secrets[other]}; make them equal, or attacks read that instead of the distribution"
    )
