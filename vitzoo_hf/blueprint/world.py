"""The distribution that a run's training images are drawn from, and how the run learns from them.

Both hold settings of a blueprint, each of which can be a generating factor of a run whose images are a `world`.

An image has a shape (its base class), a group (a style, or some of the classes), a colour and a label. For each of a
run's images the label Y is drawn, 1 with probability `label_ratio`; the shape S is Y, or the other with probability
`label_noise`; the group G is 1 with probability `group_ratio`; an image of S and G is taken from the role's part of
the pool, without repeats as far as it goes; in the region the label is then flipped with probability `flip_rate`; the
colour is that of the label with the environment's `colour_agreement`.
"""

from dataclasses import dataclass

CHOICES = {
    "role": ("target", "shadow"),
    "learner": (
        "erm",
        "causal",
        "colour-randomised",
        "irm",
        "irm-product",
        "v-rex",
        "group-dro",
        "resample",
        "dp-sgd",
    ),
    "resample_by": ("label", "group", "agreement"),
}
SHARES = (
    "label_ratio",
    "group_ratio",
    "label_noise",
    "flip_rate",
    "colour_agreement",
    "resample_to",
)
"""Settings that are probabilities or shares."""

BY_ENVIRONMENT = ("irm", "irm-product", "v-rex", "group-dro")
"""Learners whose every batch has equally many images of each environment."""


@dataclass(frozen=True)
class World:
    """Where a run's training images come from.

    Attributes:
        role: a target learns from images of the victim, a shadow from the adversary's; no image is in both.
        num_images: n, the number of images that a run draws.
        label_ratio: P(Y = 1).
        label_noise: P(S ≠ Y).
        group_ratio: P(G = 1).
        flip_rate: share of the labels that are flipped among images in the region of the image set.
        colour_agreement: P(C = Y).
        environments: the `colour_agreement` of each environment, of which a run has equally many images.
        last_environment: whether runs train on the last environment; if not, the others are topped up to n.
        nominal: has no effect on training. Vary it to build a control in which no secret can leak.
    """

    role: str = "target"
    num_images: int = 1024
    label_ratio: float = 0.5
    label_noise: float = 0.0
    group_ratio: float = 0.0
    flip_rate: float = 0.0
    colour_agreement: float = 0.5
    environments: float | tuple[float, ...] = ()
    last_environment: bool = True
    nominal: int = 0

    @property
    def agreements(self) -> tuple[float, ...]:
        """The colour agreement of every environment that is trained on.

        >>> World(environments=(0.9, 0.8, 0.6), last_environment=False).agreements
        (0.9, 0.8)
        """
        if not isinstance(self.environments, tuple):
            return (self.environments,)
        if not self.environments:
            return (self.colour_agreement,)
        return self.environments if self.last_environment else self.environments[:-1]

    @property
    def contradictions(self) -> dict[str, bool]:
        """Message about settings that exclude each other -> whether these settings do."""
        agreements = self.environments if isinstance(self.environments, tuple) else (self.environments,)
        return {
            "environments are a list of at least two colour agreements": len(agreements) == 1,
            "environments are colour agreements between 0 and 1": any(not 0 <= share <= 1 for share in agreements),
            "environments have a colour agreement each: drop colour_agreement": bool(agreements)
            and self.colour_agreement != 0.5,
            "there is no last environment to leave out: set environments": not agreements
            and not self.last_environment,
            f"{self.num_images} images cannot be shared equally among {len(self.agreements)} environments": bool(
                self.num_images % len(self.agreements)
            ),
        }


@dataclass(frozen=True)
class Learner:
    """How a run learns from the images of its world, beside what its `Recipe` says.

    Attributes:
        learner: `erm`; `causal`, which sees no colour; `colour-randomised`, which sees each image in a colour drawn
            anew; `irm` (IRMv1, squared) and `irm-product` (the published estimate without bias); `v-rex`;
            `group-dro`; `resample`, to a share that is public; `dp-sgd`, by opacus, one run at a time.
        shared_init: all runs begin at the same weights: of the whole model, or of the head on their checkpoint.
        epoch_steps: optimiser steps an epoch, whatever n; 0 makes an epoch one pass over the images.
        use_images: number of images to learn from, among the n drawn; 0 for all.
        penalty_weight: factor of the penalty of `irm`, `irm-product` and `v-rex`.
        penalty_from: number of first steps in which the penalty has at most weight 1.
        group_rate: step size of the shares of `group-dro`.
        resample_by: the property that `resample` equalises: label, group, or agreement of colour and label.
        resample_to: the public share of images that have this property.
        stop_loss: a run ends after the first epoch whose mean training loss is below; 0 for never.
        noise_multiplier: standard deviation of the noise of `dp-sgd`, in units of `clip_norm`.
        clip_norm: largest norm that the gradient of one image keeps in `dp-sgd`.
    """

    learner: str = "erm"
    shared_init: bool = False
    epoch_steps: int = 0
    use_images: int = 0
    penalty_weight: float = 0.0
    penalty_from: int = 0
    group_rate: float = 0.01
    resample_by: str = "label"
    resample_to: float = 0.5
    stop_loss: float = 0.0
    noise_multiplier: float = 1.0
    clip_norm: float = 1.0

    @property
    def by_environment(self) -> bool:
        """Whether every batch has equally many images of each environment."""
        return self.learner in BY_ENVIRONMENT

    def blocks(self, world: World) -> int:
        """Number of equal parts of a batch: one for each environment that the learner tells apart."""
        return len(world.agreements) if self.by_environment else 1

    def steps(self, world: World, batch_size: int) -> int:
        """Optimiser steps an epoch, all of them on whole batches."""
        return self.epoch_steps or (self.use_images or world.num_images) // batch_size

    def contradictions(self, world: World, batch_size: int) -> dict[str, bool]:
        """Message about settings that exclude each other -> whether these settings do."""
        num_images = self.use_images or world.num_images
        environments = len(world.agreements)
        halves = 2 if self.learner == "irm-product" else 1
        penalised = self.learner in ("irm", "irm-product", "v-rex")
        return {
            f"learner {self.learner} needs environments": self.by_environment and environments < 2,
            f"a batch of {batch_size} cannot be shared equally among {environments} environments": self.by_environment
            and bool(batch_size % (environments * halves)),
            f"learner {self.learner} has no penalty_weight": bool(self.penalty_weight) and not penalised,
            f"learner {self.learner} has no penalty_from": bool(self.penalty_from) and not penalised,
            f"learner {self.learner} has no group_rate": self.group_rate != 0.01 and self.learner != "group-dro",
            f"learner {self.learner} has no resample_by or resample_to": self.learner != "resample"
            and (self.resample_by, self.resample_to) != ("label", 0.5),
            f"learner {self.learner} needs a penalty_weight": penalised and not self.penalty_weight,
            f"a pass over {num_images} images is no whole number of batches of {batch_size}: set epoch_steps": bool(
                not self.epoch_steps and (num_images < batch_size or num_images % batch_size)
            ),
            f"use_images is {self.use_images}, more than num_images": self.use_images > world.num_images,
            f"learner {self.learner} has no noise_multiplier or clip_norm": self.learner != "dp-sgd"
            and (self.noise_multiplier, self.clip_norm) != (1.0, 1.0),
            "use_images and learners by environment cannot be had together": bool(self.use_images)
            and self.by_environment,
        }
