"""The one training loop: epochs, checkpoints, resume files, divergence and progress of any kind of trainer.

Costs: a kept epoch is evaluated on all training and test images. Between kept epochs a resume file is written at most
once a minute, so that a process that dies loses a minute of training, or an epoch where that takes longer.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitzoo_hf.blueprint.blueprint import Recipe, Run
from vitzoo_hf.training.checkpoint import Results, RunFolder
from vitzoo_hf.training.feed import Draws, FedBatch, Feed, Positions
from vitzoo_hf.training.seeds import derive_seed, seeded_globals

RESUME_SECONDS = 60.0
"""Least seconds between two resume files of a run, but at kept epochs."""
NOT_FINITE = "the loss or a weight is no longer finite; lower the learning rate"


@runtime_checkable
class Trainer(Protocol):
    """P models in training: how they are fed, what a step does, and what must be saved to continue."""

    device: str

    @property
    def feed(self) -> Feed:
        """Positions of training images to views that a step takes."""

    @property
    def num_models(self) -> int:
        """P, the number of models that are still in training."""

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first model, for what all recipes share."""

    def batches(self, epoch: int) -> Sequence[Positions]:
        """Positions `[P, B]` of the training images of an epoch, batch by batch."""

    def draws(self, epoch: int) -> Draws:
        """The random generators of an epoch."""

    def step(self, batches: Iterator[FedBatch], draws: Draws, position: float, count: int = 1) -> Float[Tensor, " P"]:
        """Update every model once by the mean gradient of `count` batches; returns the mean losses, detached.

        `position` is the number of completed epochs with the share of this one, for the schedule.
        """

    def end_epoch(self, losses: Float[Tensor, " P"], epoch: int) -> Bool[Tensor, " P"]:
        """Finish an epoch of these mean losses; returns which models have a finite loss and finite weights."""

    def results(self) -> list[Results]:
        """Loss, accuracy and other results of every model, measured in eval mode."""

    def state_dict(self, model: int) -> Mapping[str, Tensor]:
        """The weights of one model, by timm's names."""

    def resume_tensors(self, model: int) -> dict[str, Tensor]:
        """Weights and optimizer state of one model, for `RunFolder.save_resume`."""

    def resume(self, resumes: Sequence[Mapping[str, Tensor]], epoch: int) -> None:
        """Put every model where its resume file, written after `epoch`, has it."""

    def keep(self, models: Sequence[int]) -> None:
        """Continue with these models alone."""


@dataclass
class Member:
    """A run that trains in a group.

    Attributes:
        run: the run.
        folder: the folder of its checkpoints.
        resume: tensors of its resume file; empty for a run that begins.
    """

    run: Run
    folder: RunFolder
    resume: dict[str, Tensor]


def train_epoch(trainer: Trainer, epoch: int) -> list[int]:
    """Train all models for an epoch; returns the positions of models that are no longer finite."""
    batches, draws = trainer.batches(epoch), trainer.draws(epoch)
    accumulated = trainer.recipe.accumulate
    starts = range(0, len(batches), accumulated)
    fed = trainer.feed.batches(batches, draws)
    # on the device: reading a loss at every step would wait for the GPU
    losses = torch.zeros(trainer.num_models, device=trainer.device)
    # timm's mixing and erasing, and dropout, draw from the global generators
    with seeded_globals(derive_seed(trainer.recipe.seed, "mix", epoch)):
        for number, start in enumerate(starts):
            count = min(accumulated, len(batches) - start)
            losses += trainer.step(islice(fed, count), draws, epoch - 1 + number / len(starts), count)
    is_finite = trainer.end_epoch(losses / len(starts), epoch)
    return [model for model, finite in enumerate(is_finite.tolist()) if not finite]


def train_members(
    trainer: Trainer, members: Sequence[Member], completed: int, on_epoch: Callable[[str, int], None]
) -> dict[str, str]:
    """Train a group to its last epoch.

    Args:
        trainer: the models of the members, in order.
        members: runs of one `vitzoo_hf.training.stacked.shape_of`.
        completed: number of epochs that are behind them.
        on_epoch: called with a run's id and its completed epochs.

    Returns:
        Run id -> message, for every run that diverged.
    """
    members, diverged = list(members), {}
    # a clock that is set back must not delay resume files
    saved = time.monotonic()
    if completed == 0:
        _save(trainer, members, 0, saved)
    _report(members, completed, on_epoch)
    for epoch in range(completed + 1, members[0].run.epochs + 1):
        lost = train_epoch(trainer, epoch)
        for member in (members[model] for model in lost):
            # on disk at once: after a kill the run is not tried again
            member.folder.record_divergence(epoch, NOT_FINITE)
            diverged[member.run.run_id] = divergence_message(member.run, epoch, NOT_FINITE)
        if lost:
            remaining = [model for model in range(len(members)) if model not in lost]
            members = [members[model] for model in remaining]
            if not members:
                break
            trainer.keep(remaining)
        saved = _save(trainer, members, epoch, saved)
        _report(members, epoch, on_epoch)
    for member in members:
        # only after the last epoch is kept: until then a kill continues from it
        member.folder.drop_resume()
    return diverged


def divergence_message(run: Run, epoch: int, reason: str) -> str:
    """The message about a run that diverged."""
    return f"{run.run_id} diverged in epoch {epoch}: {reason}"


def _save(trainer: Trainer, members: Sequence[Member], epoch: int, saved: float) -> float:
    """Save a kept epoch, and the resume file where it is due; returns when the last resume file was written."""
    # first: `usable_resume` takes a resume file only where all kept epochs before it are there
    is_kept = epoch in members[0].run.keep_epochs
    if is_kept:
        for model, (member, results) in enumerate(zip(members, trainer.results(), strict=True)):
            member.folder.save_epoch(epoch, trainer.state_dict(model), results)
    if not 0 < epoch < members[0].run.epochs or not (is_kept or time.monotonic() - saved >= RESUME_SECONDS):
        return saved
    for model, member in enumerate(members):
        member.folder.save_resume(epoch, trainer.resume_tensors(model))
    return time.monotonic()


def _report(members: Sequence[Member], epoch: int, on_epoch: Callable[[str, int], None]) -> None:
    for member in members:
        on_epoch(member.run.run_id, epoch)
