"""The game of distribution inference: an adversary knows the secrets of shadow models and guesses those of targets.

An attack is a function of shadows, views of the targets, and a seed. It never gets the secrets of targets: only
`play` compares them with its guesses. Guards refuse a cell in which anything but the secret differs between models.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.metrics import Interval, area_under_curve, nested_interval
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, Secret, advantage
from vitzoo_hf.format.schema import ZooError

Kind = Literal["log_probabilities", "labels", "real"]
LABEL_EPSILON = 0.01
"""Probability that a label-only adversary leaves to all other classes, so that logarithms are finite."""


@dataclass(frozen=True, eq=False)
class Queries:
    """Facts about the Q inputs that models answer.

    Attributes:
        origins: number, from 0, of the query set of each input.
        labels: true classes `[Q]`, or true outputs of a regression `[Q]`; None if they are unknown.
        candidates: secret of the distribution that a query set is drawn from, one for each set, encoded like secrets
            of models; None if sets are not drawn from candidate distributions.
    """

    origins: Int64[Tensor, " Q"]
    labels: Tensor | None = None
    candidates: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Views:
    """Data on P models that an adversary can access.

    Attributes:
        outputs: log-probabilities, or real outputs, on the queries; None without black-box access.
        kind: kind of the outputs; `labels` are log-probabilities made from predicted classes alone.
        features: name -> features of weights, float64 `[P, F]`; empty without access to weights.
        sets: name -> sets of weights for the set encoder, with P models on the first axis.
    """

    outputs: Float[Tensor, "P Q C"] | None = None
    kind: Kind = "log_probabilities"
    features: Mapping[str, Float64[np.ndarray, "P F"]] = field(default_factory=dict)
    sets: Mapping[str, Tensor] = field(default_factory=dict)

    def answers(self) -> Float[Tensor, "P Q C"]:
        """Return the outputs.

        Raises:
            ZooError: if the adversary has no access to outputs, or some are NaN.
        """
        if self.outputs is None:
            raise ZooError("this attack reads outputs of models, and there are none: give access to probabilities")
        # infinite log-probabilities pass: a model may give a class no probability
        if self.outputs.isnan().any():
            raise ZooError("outputs of some model are NaN: leave diverged models out, and count them")
        return self.outputs

    def at(self, places: Int64[Tensor, " m"]) -> "Views":
        """Select models by their places."""
        return replace(
            self,
            outputs=None if self.outputs is None else self.outputs[places],
            # features are numpy arrays, all else are tensors
            features={name: values[places.numpy()] for name, values in self.features.items()},
            sets={name: values[places] for name, values in self.sets.items()},
        )


def label_only(outputs: Float[Tensor, "P Q C"], *, epsilon: float = LABEL_EPSILON) -> Float[Tensor, "P Q C"]:
    """Log-probabilities of a label-only adversary: `1 - epsilon` for the predicted class, the rest shared.

    Example:
        >>> label_only(torch.tensor([[[2.0, 1.0]]])).exp()
        tensor([[[0.9900, 0.0100]]])
    """
    C = outputs.shape[2]
    log_probabilities = torch.full_like(outputs, math.log(epsilon / (C - 1)))
    return log_probabilities.scatter(2, outputs.argmax(2, keepdim=True), math.log(1 - epsilon))


def seen_like(views: Views, kind: Kind) -> Views:
    """Reduce log-probabilities to predicted classes if `kind` is `labels`; other views are returned unchanged."""
    if kind == "labels" and views.kind == "log_probabilities" and views.outputs is not None:
        return replace(views, outputs=label_only(views.answers()), kind="labels")
    return views


def comparable(shadows: Views, targets: Views) -> Views:
    """Convert views of shadows to the kind of outputs of the targets.

    Raises:
        ZooError: if kinds cannot be converted, or the shapes of outputs differ.
    """
    views = seen_like(shadows, targets.kind)
    if views.kind != targets.kind or views.answers().shape[1:] != targets.answers().shape[1:]:
        raise ZooError(
            f"shadows answer with {views.kind} {list(views.answers().shape[1:])}, targets with {targets.kind}"
            f" {list(targets.answers().shape[1:])}: ask both the same queries"
        )
    return views


@dataclass(frozen=True, eq=False)
class Shadows:
    """Models of the adversary with their secrets, the space of secrets, and the queries."""

    views: Views
    secrets: Tensor
    secret: Secret
    queries: Queries | None = None

    def asked(self) -> Queries:
        """Return the queries.

        Raises:
            ZooError: if there are no queries.
        """
        if self.queries is None:
            raise ZooError("this attack needs the queries that outputs answer: give `queries`")
        return self.queries

    def permuted(self, seed: int) -> "Shadows":
        """Shuffle the secrets: an attack that learns from the result is at chance level."""
        order = torch.randperm(len(self.secrets), generator=torch.Generator().manual_seed(seed))
        return replace(self, secrets=self.secrets[order])


@dataclass(frozen=True, eq=False)
class Guesses:
    """Guesses of an attack for T targets.

    Attributes:
        secrets: guessed secrets: int64 `[T]` for classes, float64 `[T, V]` for numbers.
        scores: scores for a binary secret, larger for class 1; None if the attack has no scores.
    """

    secrets: Tensor
    scores: Float64[Tensor, " T"] | None = None


Attack = Callable[[Shadows, Views, int], Guesses]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Result of an attack.

    Attributes:
        losses: loss of each target under each seed: 1 for an error, or the absolute error.
        prior_risk: loss of the best guess without a model.
        auc: area under the curve of a binary secret, one value for each seed; empty without scores.
        guesses: guesses under the first seed.
        scores: scores for a binary secret, mean over seeds, larger for class 1; None if the attack has no scores.
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
        """Share of targets with the right guess, if secrets are classes."""
        mean, low, high = self.risk
        # the ends exchange, because accuracy falls where the loss grows
        return Interval(1 - mean, 1 - high, 1 - low)

    @property
    def advantage(self) -> float:
        """`1 - risk / prior risk`."""
        return advantage(self.losses.mean().item(), self.prior_risk)


def play(
    shadows: Shadows, targets: Views, secrets: Tensor, attack: Attack, *, seeds: Sequence[int] = (0,)
) -> Outcome:
    """Run an attack once for each seed, and compare its guesses with the secrets.

    Args:
        shadows: shadows of the adversary.
        targets: views of the targets.
        secrets: secrets of the targets; the attack does not get them.
        attack: the attack.
        seeds: seeds of the repetitions.

    Raises:
        ZooError: from an attack that lacks access, or does not take this kind of secret.
    """
    losses, areas, scores, first = [], [], [], None
    for seed in seeds:
        guesses = attack(shadows, targets, seed)
        losses.append(shadows.secret.losses(guesses.secrets, secrets))
        # guesses of the first seed are reported; averages of classes mean nothing
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


def check_equal(what: str, values: Sequence[float | int], secrets: Sequence[object]) -> None:
    """Refuse a cell in which models differ in a number that would give the secret away.

    Args:
        what: name of the number, such as `training examples` or `optimiser steps`.
        values: the number of each model.
        secrets: secrets of the models.

    Raises:
        ZooError: naming two values and their secrets, which differ if possible.

    Example:
        >>> check_equal("training examples", [2048, 2048], [0.3, 0.5])
    """
    differing = [place for place, value in enumerate(values) if value != values[0]]
    if not differing:
        return
    # preferably of another secret, which shows what the number would give away
    example = next((place for place in differing if secrets[place] != secrets[0]), differing[0])
    raise ZooError(
        f"{what} differ between models: {values[0]:g} with secret {secrets[0]}, {values[example]:g} with secret"
        f" {secrets[example]}; make them equal, or attacks read that instead of the distribution"
    )
