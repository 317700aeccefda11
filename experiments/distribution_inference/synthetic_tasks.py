"""Worlds of known distribution for small MLPs: the published synthetic tasks, and their mended forms.

A teacher labels normal inputs: the secret changes the teacher (A) or the mean of the inputs (B, C). Environments of a
structural causal model: the secret is whether the last one is among the training data (distributional membership).
Settings are those of Hartmann et al., "Distribution Inference Risks: Identifying and Mitigating Sources of Leakage",
SaTML 2023, and of its published code.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.attacks.stacked_mlps import Training, Widths, mlp_outputs, squared_error
from vitzoo_hf.training.world_losses import (
    annealed,
    half_scale_gradients,
    invariance_penalty,
    invariance_product,
    scale_gradients,
)

INPUTS, SPREAD = 4, 2.0
TEACHER = Widths(INPUTS, 32)
# Published data have 512 examples an environment, three or four: the number alone tells the secret.
PUBLISHED_ROWS = (1536, 2048)
# A multiple of 12 parts equally among three and among four environments.
EQUAL_ROWS = (2040, 2040)
RISK_SHARE = 0.1
ANNEALING_STEPS, INVARIANCE_WEIGHT = 512, 10.0
LEARNERS = ("erm", "causal", "irm", "irm_squared")


@dataclass(frozen=True, eq=False)
class Samples:
    """Examples of P data sets, one a model: `inputs` `[P, I, n]` and `targets` `[P, n]`."""

    inputs: Float[Tensor, "P I n"]
    targets: Float[Tensor, "P n"]

    def select(self, features: int) -> "Samples":
        """The same examples with the first inputs alone."""
        return replace(self, inputs=self.inputs[:, :features])


@dataclass(frozen=True, eq=False)
class TeacherWorld:
    """Inputs `N(mean, 2²)` in each of four dimensions, labelled by a teacher without noise.

    Attributes:
        teachers: of secret 0 and of secret 1, `[2, D]`; equal where the secret is in the inputs.
        shift: the mean of inputs is `shift * (2 s - 1)` for secret s in 0 to 1.
    """

    teachers: Float[Tensor, "2 D"]
    shift: float

    @classmethod
    def conditional(cls, epsilon: float, seed: int) -> "TeacherWorld":
        """Task A: the second teacher is the first with noise of this size on every parameter; inputs are the same."""
        first, second = _teachers(seed)
        return cls(torch.stack([first, first + epsilon * second]), 0.0)

    @classmethod
    def covariate(cls, seed: int) -> "TeacherWorld":
        """Tasks B and C: one teacher; the secret moves the mean of inputs from -1 to 1."""
        first, _ = _teachers(seed)
        return cls(first.expand(2, -1).clone(), 1.0)

    def draw(self, secrets: Float[Tensor, " P"], n: int, generator: torch.Generator) -> Samples:
        """A data set of n examples for each secret."""
        noise = torch.randn(len(secrets), INPUTS, n, generator=generator)
        inputs = SPREAD * noise + self.shift * (2 * secrets - 1)[:, None, None]
        # A secret that is a number moves the inputs alone: both teachers are one there.
        labels = mlp_outputs(self.teachers[(secrets > 0.5).long()], TEACHER, inputs)
        return Samples(inputs, labels)


def _teachers(seed: int) -> tuple[Tensor, Tensor]:
    """Two independent draws of every weight and bias from N(0, 1)."""
    draws = torch.randn(2, TEACHER.layout.num_parameters, generator=torch.Generator().manual_seed(seed))
    return draws[0], draws[1]


def draw_environments(count: int, environments: int, rows: int, generator: torch.Generator) -> Samples:
    """Data sets over the first environments, as many examples of each, environment by environment.

    `X1 ~ N(0, 1)`, `Y = X1 + N(0, 1)`, `X2 = Y + N(0, (0.5 + i)²)` in environment i: X1 is the cause of Y,
    X2 an effect.

    Args:
        count: number of data sets, P.
        environments: E, from 1 to 4.
        rows: of a data set; a multiple of E.
        generator: of the draws.

    Raises:
        ValueError: for rows that environments cannot share equally.
    """
    if rows % environments:
        raise ValueError(f"{rows} rows of {environments} environments; expected a multiple of their number")
    noise = torch.randn(3, count, environments, rows // environments, generator=generator)
    cause = noise[0]
    label = cause + noise[1]
    effect = label + noise[2] * (0.5 + torch.arange(environments))[:, None]
    return Samples(torch.stack([cause.flatten(1), effect.flatten(1)], 1), label.flatten(1))


@dataclass(frozen=True)
class Learner:
    """A way to train on environments: `causal` sees the cause alone, the others the effect too."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in LEARNERS:
            raise ValueError(f"learner {self.name!r}; expected one of {', '.join(LEARNERS)}")

    @property
    def widths(self) -> Widths:
        """Of its MLP, with two hidden units."""
        return Widths(1 if self.name == "causal" else 2, 2)

    @property
    def training(self) -> Training:
        """As published."""
        if self.name.startswith("irm"):
            return Training(lr=1e-2, weight_decay=1e-3, steps=2048, batch_size=None, optimizer="sgd")
        return Training(lr=1e-2, weight_decay=1e-3, epochs=10)

    def loss(self, environments: int, seed: int) -> Callable[[Tensor, Tensor, int], Tensor]:
        """Of outputs and targets `[P, E * n]`, environment by environment."""
        if self.name == "irm":
            generator = torch.Generator().manual_seed(seed)
            return partial(_irm_product_loss, environments=environments, generator=generator)
        return partial(_irm_squared_loss, environments=environments) if self.name == "irm_squared" else squared_error


def flipped(samples: Samples) -> Samples:
    """The same examples with the sign of the effect turned.

    >>> draw = draw_environments(1, 3, 6, torch.Generator().manual_seed(0))
    >>> bool((flipped(draw).inputs[:, 1] == -draw.inputs[:, 1]).all())
    True
    """
    return replace(samples, inputs=samples.inputs * torch.tensor([1.0, -1.0])[:, None])


def _irm_product_loss(
    outputs: Tensor, targets: Tensor, step: int, *, environments: int, generator: torch.Generator
) -> Tensor:
    """As published: a tenth of the risks, and derivatives on two halves multiplied, without lower bound."""
    f, y = (values.unflatten(1, (environments, -1)) for values in (outputs, targets))
    first, second = half_scale_gradients(f, y, torch.randperm(f.shape[2], generator=generator))
    return RISK_SHARE * (f - y).square().mean(2).sum(1) + invariance_product(first, second)


def _irm_squared_loss(outputs: Tensor, targets: Tensor, step: int, *, environments: int) -> Tensor:
    """The squared penalty, whose weight rises after the first quarter of the steps."""
    f, y = (values.unflatten(1, (environments, -1)) for values in (outputs, targets))
    weight = 1.0 if step < ANNEALING_STEPS else INVARIANCE_WEIGHT
    return annealed((f - y).square().mean(2).sum(1), invariance_penalty(scale_gradients(f, y)), weight)
