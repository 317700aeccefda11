"""Train runs of one shape together: stacked weights, one forward and one update a step for all of them.

Each run keeps its own folder, fingerprint, seeds, kept epochs, resume file and results, in the formats of
`train_run`; so a run begun together with others continues alone, and the other way round. Weights equal those of
`train_run` up to rounding: products of matrices are batched, which adds up in another order. Only biases of attention
keys may differ by more under AdamW: their gradient is zero but for rounding, which AdamW scales up to the learning
rate, and no output depends on them.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo_hf.blueprint.blueprint import Blueprint, Recipe, Run
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.pixels import PreparedImages
from vitzoo_hf.images.sources import ImageSet, load_images
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.batched import BatchedViT
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.private_trainer import PrivateTrainer
from vitzoo_hf.training.run import RESUME_SECONDS, holds_all, initial_model, opened, train_run
from vitzoo_hf.training.stacked_trainer import StackedTrainer
from vitzoo_hf.training.trainer import NOT_FINITE, DivergedError, usable_resume
from vitzoo_hf.training.world_trainer import WorldTrainer

OWN: dict[str, Any] = {
    "seed": 0,
    "lr": 1.0,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "label_smoothing": 0.0,
    "init": "timm",
}
"""What runs of one shape may each have their own value of; here set alike."""


def shape_of(run: Run) -> tuple[Any, ...]:
    """What runs must have alike to train together."""
    alike = (run.stage, run.images, run.epochs, run.keep_epochs, replace(run.recipe, **OWN))
    if run.world is None or run.learner is None:
        return alike
    learner = replace(run.learner, stop_loss=0.0)
    alone = run.run_id if learner.learner == "dp-sgd" else None
    return (*alike, alone, learner, learner.steps(run.world, run.recipe.batch_size), learner.blocks(run.world))


def groups(runs: Sequence[Run], most: int) -> list[tuple[Run, ...]]:
    """Runs of one shape, at most `most` a group; every run in one group, in the order of the runs.

    Raises:
        ZooError: if `most` is below 1.

    Example:
        >>> runs = Blueprint.load("mini").runs
        >>> [len(group) for group in groups([run for run in runs if run.stage == "finetune"], 8)]
        [8, 4, 8, 4, 8, 4, 8, 4]
    """
    if most < 1:
        raise ZooError(f"stack is {most}; it must be at least 1")
    alike: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        alike.setdefault(shape_of(run), []).append(run)
    return [
        tuple(members[start : start + most]) for members in alike.values() for start in range(0, len(members), most)
    ]


def stackable(blueprint: Blueprint) -> bool:
    """Whether models of this blueprint train together: plain ViTs that draw nothing themselves while they train."""
    return (
        BatchedViT.trainable(Architecture(blueprint.architecture, blueprint.architecture_args).skeleton) is not None
    )


def is_plain_recipe(recipe: Recipe) -> bool:
    """Whether each step takes one batch in float32, as groups do; other runs train alone."""
    return recipe.accumulate == 1 and recipe.precision == "float32"


def memory_of(blueprint: Blueprint, run: Run) -> int:
    """Bytes that one more run in a group takes while it trains, estimated from above.

    A weight takes seven numbers: itself, its gradient twice, two that AdamW remembers, two in between. An image takes
    what autograd keeps of every block, about 12 times the width and 3 times the hidden width a token, twice.
    """
    model = Architecture(blueprint.architecture, blueprint.architecture_args).skeleton
    vit = BatchedViT.trainable(model)
    assert vit is not None
    layout = Layout.of(model.state_dict())
    width = layout.shapes[layout.names.index("norm.bias")][0]
    kept = vit.tokens * vit.depth * (12 * width + 3 * vit.hidden + 2 * vit.heads * vit.tokens)
    images = run.recipe.batch_size * (2 if run.recipe.regime == "contrastive" else 1)
    pixels = 8 * math.prod(vit.image)
    return 4 * (7 * layout.num_parameters + images * (2 * kept + pixels))


def train_stacked(
    blueprint: Blueprint,
    runs: Sequence[Run],
    folder: Path,
    *,
    device: str = "cpu",
    on_epoch: Callable[[str, int], None] = lambda run_id, epoch: None,
) -> dict[str, str]:
    """Train runs of one shape into `folder`, from where earlier calls left off.

    Runs that continue after different epochs train in as many groups. By `train_run` train single runs, models that
    `stackable` refuses, recipes that accumulate or autocast, and images that are made on demand. A run that diverges
    is recorded and leaves the group, which goes on; where memory runs out, the group goes on in halves.

    Args:
        blueprint: the zoo the runs belong to.
        runs: of one `shape_of`; fine-tuning runs find their parents' final weights in `folder`.
        folder: holds one folder a run.
        device: where to train.
        on_epoch: called with a run's id and its completed epochs, also for those found done.

    Returns:
        Run id -> what is to be said of it, for every run that diverged, now or earlier.

    Raises:
        ZooError: if the runs differ in shape, a parent is missing, the images cannot be had, or a folder holds
            another training.
    """
    if len({shape_of(run) for run in runs}) > 1:
        raise ZooError(f"{runs[0].run_id} and the other runs differ in shape: split them by `groups`")
    diverged: dict[str, str] = {}
    waiting: dict[int, list[_Member]] = {}
    together = _together(blueprint, runs)
    for run in runs:
        try:
            if not together:
                train_run(blueprint, run, folder, device=device, on_epoch=partial(on_epoch, run.run_id))
                continue
            place = opened(blueprint, run, folder)
        except DivergedError as error:
            diverged[run.run_id] = str(error)
            continue
        if holds_all(place, run):
            place.drop_resume()
            on_epoch(run.run_id, run.epochs)
        else:
            done, tensors = usable_resume(place, run.keep_epochs) or (0, {})
            waiting.setdefault(done, []).append(_Member(run, place, tensors))
    for done, members in waiting.items():
        diverged |= _train_members(blueprint, members, folder, device, done, on_epoch)
    return diverged


def _together(blueprint: Blueprint, runs: Sequence[Run]) -> bool:
    """Whether runs of one shape train as a group; a run on a world does even alone.

    Raises:
        ZooError: for runs on a world whose models cannot.
    """
    if runs[0].world is None:
        return len(runs) > 1 and stackable(blueprint) and is_plain_recipe(runs[0].recipe)
    if not stackable(blueprint):
        raise ZooError(
            f"{runs[0].run_id} draws its own images, which only plain ViTs do: choose such an architecture"
        )
    return True


def _train_members(
    blueprint: Blueprint,
    members: Sequence["_Member"],
    folder: Path,
    device: str,
    done: int,
    on_epoch: Callable[[str, int], None],
) -> dict[str, str]:
    """Train runs that all continue after epoch `done`: as a group, in halves where memory runs out, or one by one."""
    diverged: dict[str, str] = {}
    parts = [[member] for member in members]
    on_world = members[0].run.world is not None
    if on_world or (len(members) > 1 and _prepared(blueprint, members[0].run)):
        try:
            return _train_group(blueprint, members, folder, device, done, on_epoch)
        except torch.OutOfMemoryError:
            if len(members) == 1:
                raise
            parts = [list(members[: len(members) // 2]), list(members[len(members) // 2 :])]
    for part in parts:
        remaining = [member.run for member in part]
        diverged |= train_stacked(blueprint, remaining, folder, device=device, on_epoch=on_epoch)
    return diverged


def _prepared(blueprint: Blueprint, run: Run) -> bool:
    """Whether a run's images lie in memory as models take them, which groups need."""
    return isinstance(load_images(run.images, blueprint.images[run.images]).pixels, PreparedImages)


@dataclass
class _Member:
    """A run of a group, its folder, and what it continues from."""

    run: Run
    place: RunFolder
    resume: dict[str, Tensor]


def _train_group(
    blueprint: Blueprint,
    members: Sequence[_Member],
    folder: Path,
    device: str,
    done: int,
    on_epoch: Callable[[str, int], None],
) -> dict[str, str]:
    """Train a group to the end from epoch `done`; returns what is to be said of the runs that diverged."""
    left = list(members)
    diverged: dict[str, str] = {}
    trainer = _begun(blueprint, left, folder, device, done)
    saved = time.monotonic()
    if done == 0:
        _save(trainer, left, 0, saved)
    _tell(left, done, on_epoch)
    for epoch in range(done + 1, left[0].run.epochs + 1):
        lost = trainer.train_epoch(epoch)
        for model in lost:
            left[model].place.record_divergence(epoch, NOT_FINITE)
            run_id = left[model].run.run_id
            diverged[run_id] = f"{run_id} diverged in epoch {epoch}: {NOT_FINITE}"
        if lost:
            kept = [model for model in range(len(left)) if model not in lost]
            left = [left[model] for model in kept]
            trainer.keep(kept)
        if not left:
            break
        saved = _save(trainer, left, epoch, saved)
        _tell(left, epoch, on_epoch)
    for member in left:
        member.place.drop_resume()
    return diverged


def _begun(blueprint: Blueprint, members: Sequence[_Member], folder: Path, device: str, done: int) -> StackedTrainer:
    """The trainer of a group, as it was after epoch `done`."""
    first = members[0].run
    images = load_images(first.images, blueprint.images[first.images])
    for member in members:
        member.place.check_images(images.begun_with)
    models = [initial_model(blueprint, member.run, images, folder) for member in members]
    trainer = _trainer([member.run for member in members], images, models, device)
    if done:
        trainer.resume([member.resume for member in members], done)
    return trainer


def _trainer(runs: list[Run], images: ImageSet, models: list[nn.Module], device: str) -> StackedTrainer:
    learner = runs[0].learner
    if learner is None:
        return StackedTrainer([run.recipe for run in runs], images, models, runs[0].epochs, device)
    kind = PrivateTrainer if learner.learner == "dp-sgd" else WorldTrainer
    return kind(runs, images, models, device)


def _save(trainer: StackedTrainer, members: Sequence[_Member], epoch: int, saved: float) -> float:
    """Weights and results where this epoch is kept, and what is needed to continue; returns when that was."""
    kept = epoch in members[0].run.keep_epochs
    if kept:
        for model, (member, results) in enumerate(zip(members, trainer.results(), strict=True)):
            member.place.save_epoch(epoch, trainer.state_dict(model), results)
    if not 0 < epoch < members[0].run.epochs or not (kept or time.monotonic() - saved >= RESUME_SECONDS):
        return saved
    for model, member in enumerate(members):
        member.place.save_resume(epoch, trainer.resume_tensors(model))
    return time.monotonic()


def _tell(members: Sequence[_Member], epoch: int, on_epoch: Callable[[str, int], None]) -> None:
    for member in members:
        on_epoch(member.run.run_id, epoch)
