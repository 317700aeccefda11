"""Secrets of a training distribution that an adversary guesses: one of k classes, a number, or several numbers.

Secrets of P models are one tensor: int64 `[P]` for classes, float64 `[P, V]` for V numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vitzoo_hf.format.schema import ZooError

MAX_CLASSES = 12
# shares such as three times 1/3 sum to 1 only up to rounding
TOLERANCE = 1e-9


@dataclass(frozen=True)
class ClassSecret:
    """One of k classes.

    Attributes:
        values: values of the classes, such as the ratios 0.3 and 0.5.
        prior: probability of each; equal by default.

    Raises:
        ZooError: for fewer than two classes, or a prior that does not sum to 1.

    Example:
        >>> secret = ClassSecret((0.3, 0.5))
        >>> secret.prior_risk, secret.even(4).tolist()
        (0.5, [0, 1, 0, 1])
    """

    values: tuple[object, ...]
    prior: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.values)) < 2 or len(set(self.values)) != len(self.values):
            raise ZooError(f"a secret with the classes {list(self.values)}: expected at least two, all different")
        if not self.prior:
            # the only way to set a field of a frozen dataclass
            object.__setattr__(self, "prior", (1 / len(self.values),) * len(self.values))
        wrong = len(self.prior) != len(self.values) or min(self.prior) < 0
        if wrong or abs(sum(self.prior) - 1) > TOLERANCE:
            raise ZooError(f"a prior {list(self.prior)} of {len(self.values)} classes: expected shares that sum to 1")

    @property
    def prior_risk(self) -> float:
        """Share of errors of the best guess without a model."""
        return 1 - max(self.prior)

    def even(self, count: int) -> Int64[Tensor, " P"]:
        """Repeat the classes in turn, for an equal prior."""
        return torch.arange(count) % len(self.values)

    def uniform(self, count: int, seed: int) -> Int64[Tensor, " P"]:
        """Independent draws from the prior."""
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(torch.tensor(self.prior), count, replacement=True, generator=generator)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensor of secrets."""
        return torch.int64

    def encoded(self, value: object) -> int | None:
        """Encode a value as the number of its class; None if the value is not a class."""
        return self.values.index(value) if value in self.values else None

    def losses(self, guesses: Int64[Tensor, " P"], secrets: Int64[Tensor, " P"]) -> Float64[Tensor, " P"]:
        """1 for an error, 0 for a right guess."""
        return (guesses != secrets).double()


@dataclass(frozen=True)
class NumberSecret:
    """V numbers, each in an interval.

    Attributes:
        bounds: lowest and highest value of each number.
        levels: values of each number, equally likely; None if a number is uniform in its interval.

    Raises:
        ZooError: for an empty interval, or levels outside of it.

    Example:
        >>> secret = NumberSecret(((0.0, 1.0),))
        >>> secret.prior_risk, secret.even(4)[:, 0].tolist()
        (0.25, [0.0, 0.25, 0.5, 0.75])
    """

    bounds: tuple[tuple[float, float], ...]
    levels: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self.bounds or any(not low < high for low, high in self.bounds):
            raise ZooError(f"a secret with the intervals {list(self.bounds)}: expected low < high for each number")
        for (low, high), levels in zip(self.bounds, self.levels or (), strict=self.levels is not None):
            if not levels or min(levels) < low or max(levels) > high:
                raise ZooError(f"levels {list(levels)} of a number in {low:g} to {high:g}: expected values in there")

    @property
    def prior_risk(self) -> float:
        """Mean absolute error of the best guess without a model, the median, over the numbers."""
        if self.levels is None:
            return sum(high - low for low, high in self.bounds) / (4 * len(self.bounds))
        values = [torch.tensor(levels, dtype=torch.float64) for levels in self.levels]
        return sum((part - part.median()).abs().mean().item() for part in values) / len(values)

    def even(self, count: int) -> Float64[Tensor, "P 1"]:
        """Even grid from the lowest value up to, but without, the highest; or the levels in turn.

        Raises:
            ZooError: for several numbers, which have no grid: draw them by `uniform`.
        """
        if len(self.bounds) != 1:
            raise ZooError(f"an even grid of {len(self.bounds)} numbers: draw them by `uniform`")
        if self.levels is not None:
            levels = torch.tensor(self.levels[0], dtype=torch.float64)
            return levels[torch.arange(count) % len(levels)][:, None]
        low, high = self.bounds[0]
        return low + (high - low) * torch.arange(count, dtype=torch.float64)[:, None] / count

    def uniform(self, count: int, seed: int) -> Float64[Tensor, "P V"]:
        """Independent draws from the prior."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(count, len(self.bounds), dtype=torch.float64, generator=generator)
        columns = []
        for number, (low, high) in enumerate(self.bounds):
            if self.levels is None:
                columns.append(low + (high - low) * drawn[:, number])
                continue
            levels = torch.tensor(self.levels[number], dtype=torch.float64)
            columns.append(levels[(drawn[:, number] * len(levels)).long()])
        return torch.stack(columns, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensor of secrets."""
        return torch.float64

    def encoded(self, value: object) -> tuple[float] | None:
        """Encode the value of a single number; None if the value is not a level."""
        is_level = self.levels is not None and len(self.bounds) == 1 and value in self.levels[0]
        return (float(value),) if is_level and isinstance(value, int | float) else None

    def losses(self, guesses: Float64[Tensor, "P V"], secrets: Float64[Tensor, "P V"]) -> Float64[Tensor, " P"]:
        """Absolute error, the mean over the numbers."""
        return (guesses - secrets).abs().mean(1)


Secret = ClassSecret | NumberSecret
Secrets = Int64[Tensor, " P"] | Float64[Tensor, "P V"]


def secret_of(values: Sequence[Any], *, as_classes: bool | None = None) -> tuple[Secret, Tensor]:
    """Infer the space of secrets from a column of values, and encode the values.

    - Text, truth values and two different numbers are classes.
    - More than two different numbers are a number with these levels.
    - Tuples of numbers are several numbers.

    Args:
        values: value of each model, shadows and targets together.
        as_classes: true for classes, false for a number; None decides by the rules above.

    Raises:
        ZooError: for a missing value, fewer than two different ones, or more than 12 classes.

    Example:
        >>> secret, secrets = secret_of([0.3, 0.5, 0.3])
        >>> secret.values, secrets.tolist()
        ((0.3, 0.5), [0, 1, 0])
        >>> secret_of([(0.3, 1.0), (0.5, 2.0)])[0].bounds
        ((0.3, 0.5), (1.0, 2.0))
    """
    # NaN differs from itself
    if any(value is None or value != value for value in values):
        raise ZooError("some models have no secret: leave them out, such as by --where")
    if values and all(isinstance(value, tuple) for value in values):
        parts = [secret_of(part, as_classes=False) for part in zip(*values, strict=True)]
        numbers = torch.cat([part for _, part in parts], 1)
        levels = tuple(tuple(column.unique().tolist()) for column in numbers.T)
        return NumberSecret(tuple((part[0], part[-1]) for part in levels), levels), numbers
    # sorted, so that numbers of classes do not depend on the order of the models
    distinct = sorted(set(values))
    if len(distinct) < 2:
        raise ZooError(
            f"every model has the secret {distinct[0]!r}: expected at least two different ones"
            if distinct
            else "there is no model with a secret"
        )
    # bool is a subclass of int
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct)
    if as_classes if as_classes is not None else not numeric or len(distinct) == 2:
        if len(distinct) > MAX_CLASSES:
            raise ZooError(f"{len(distinct)} different secrets as classes: expected at most {MAX_CLASSES}")
        return ClassSecret(tuple(distinct)), torch.tensor([distinct.index(value) for value in values])
    if not numeric:
        raise ZooError(f"secrets such as {distinct[0]!r} are no numbers: take them as classes")
    numbers = torch.tensor(values, dtype=torch.float64)[:, None]
    bounds = ((float(distinct[0]), float(distinct[-1])),)
    return NumberSecret(bounds, (tuple(map(float, distinct)),)), numbers


def advantage(risk: float, prior_risk: float) -> float:
    """`1 - risk / prior risk`: 0 for the best guess without the model, 1 for an attack without errors.

    Example:
        >>> advantage(0.1, 0.5)  # of a balanced binary secret: twice the accuracy less 1
        0.8
    """
    return (prior_risk - risk) / prior_risk
