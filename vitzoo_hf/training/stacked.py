"""Train runs, those of one shape together: stacked weights, one forward and one update a step for all of them.

Initial weights, data order, views and mixing each have a seed derived from the run's seed and the epoch alone, so a
run that trains alone gives the same weights bit for bit on the same machine, whether it was interrupted or not.

Each run keeps its own folder, fingerprint, seeds, kept epochs, resume file and results, in a group as alone. So a
run begun with others continues alone, and the other way round. Weights from a group equal those of a run alone up to
rounding: products of matrices are batched, which adds up in another order. Only biases of attention keys may differ
by more under AdamW: their gradient is zero but for rounding, which AdamW scales up to the learning rate, and no
output depends on them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vitzoo_hf.blueprint.blueprint import Blueprint, Recipe, Run
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.pixels import PreparedImages
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.batched import BatchedViT
from vitzoo_hf.training.loop import Member, Trainer, divergence_message, train_members
from vitzoo_hf.training.private_trainer import PrivateTrainer
from vitzoo_hf.training.run import holds_all, initial_model, opened
from vitzoo_hf.training.stacked_trainer import StackedTrainer
from vitzoo_hf.training.trainer import DivergedError, SingleTrainer, usable_resume
from vitzoo_hf.training.world_trainer import WorldTrainer


def shape_of(run: Run) -> tuple[object, ...]:
    """Everything that runs must share to train together; settings that may differ get one value here."""
    recipe = replace(run.recipe, seed=0, lr=1.0, weight_decay=0.0, momentum=0.0, label_smoothing=0.0, init="timm")
    shape = (run.stage, run.images, run.epochs, run.keep_epochs, recipe)
    if run.world is None or run.learner is None:
        return shape
    learner = replace(run.learner, stop_loss=0.0)
    # opacus's optimizer holds one model
    only_run = run.run_id if learner.learner == "dp-sgd" else None
    return (*shape, only_run, learner, learner.steps(run.world, run.recipe.batch_size), learner.blocks(run.world))


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
    by_shape: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        by_shape.setdefault(shape_of(run), []).append(run)
    return [
        tuple(members[start : start + most])
        for members in by_shape.values()
        for start in range(0, len(members), most)
    ]


def stackable(blueprint: Blueprint) -> bool:
    """Whether models of this blueprint train together: plain ViTs that draw nothing themselves while they train."""
    architecture = Architecture(blueprint.architecture, blueprint.architecture_args)
    return BatchedViT.trainable(architecture.skeleton) is not None


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
    # from above: fused attention keeps no number for each pair of tokens, which are counted here
    activations = vit.tokens * vit.depth * (12 * width + 3 * vit.hidden + 2 * vit.heads * vit.tokens)
    images = run.recipe.batch_size * (2 if run.recipe.regime == "contrastive" else 1)
    pixels = 8 * math.prod(vit.image)
    # all of it float32: groups do not autocast
    return 4 * (7 * layout.num_parameters + images * (2 * activations + pixels))


def train_run(
    prepared: PreparedBlueprint,
    run: Run,
    folder: Path,
    *,
    device: str = "cpu",
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train one run into `folder / run.run_id`, from where an earlier call left off.

    Args:
        prepared: the zoo that the run belongs to.
        run: one run of the zoo; a fine-tuning run needs its parent's final weights in `folder`.
        folder: holds one folder a run.
        device: where to train.
        on_epoch: called with the number of completed epochs, also for those of earlier calls.

    Raises:
        DivergedError: if the loss stops being finite; this is recorded, and the run is not tried again.
        ZooError: if the parent is missing, the images cannot be had, or the folder holds another training.
    """
    if run.world is not None:
        raise ZooError(f"{run.run_id} draws training images of its own: train it by `stacked.train_stacked`")
    diverged = train_stacked(prepared, [run], folder, device=device, on_epoch=lambda _, epoch: on_epoch(epoch))
    if diverged:
        raise DivergedError(diverged[run.run_id])


def train_stacked(
    prepared: PreparedBlueprint,
    runs: Sequence[Run],
    folder: Path,
    *,
    device: str = "cpu",
    on_epoch: Callable[[str, int], None] = lambda run_id, epoch: None,
) -> dict[str, str]:
    """Train runs of one shape into `folder`, from where earlier calls left off.

    Runs that continue after different epochs train in as many groups. One by one train models that `stackable`
    refuses, recipes that accumulate or autocast, and images that are made on demand. A run that diverges is recorded
    and leaves the group, which goes on; where memory runs out, the group goes on in halves.

    Args:
        prepared: the zoo that the runs belong to.
        runs: runs of one `shape_of`; fine-tuning runs need their parents' final weights in `folder`.
        folder: holds one folder a run.
        device: where to train.
        on_epoch: called with a run's id and its completed epochs, also for those of earlier calls.

    Returns:
        Run id -> message, for every run that diverged, now or earlier.

    Raises:
        ZooError: if the runs differ in shape, a parent is missing, the images cannot be had, or a folder holds
            another training.
    """
    blueprint = prepared.blueprint
    if len({shape_of(run) for run in runs}) > 1:
        raise ZooError(f"{runs[0].run_id} and the other runs differ in shape: split them by `groups`")
    if runs[0].world is not None and not stackable(blueprint):
        raise ZooError(
            f"{runs[0].run_id} draws its own images, which only plain ViTs do: choose such an architecture"
        )
    if len(runs) > 1 and not _fits_group(blueprint, runs[0]):
        return _one_by_one(prepared, runs, folder, device, on_epoch)
    diverged: dict[str, str] = {}
    members_by_epoch: dict[int, list[Member]] = {}
    for run in runs:
        run_folder = opened(blueprint, run, folder)
        if run_folder.divergence:
            diverged[run.run_id] = divergence_message(run, **run_folder.divergence)
        elif holds_all(run_folder, run):
            # left where a kill came between the last epoch and its removal
            run_folder.drop_resume()
            on_epoch(run.run_id, run.epochs)
        else:
            completed, tensors = usable_resume(run_folder, run.keep_epochs) or (0, {})
            members_by_epoch.setdefault(completed, []).append(Member(run, run_folder, tensors))
    for completed, members in members_by_epoch.items():
        diverged |= _train_group(prepared, members, folder, device, completed, on_epoch)
    return diverged


def _one_by_one(
    prepared: PreparedBlueprint,
    runs: Sequence[Run],
    folder: Path,
    device: str,
    on_epoch: Callable[[str, int], None],
) -> dict[str, str]:
    diverged: dict[str, str] = {}
    for run in runs:
        diverged |= train_stacked(prepared, [run], folder, device=device, on_epoch=on_epoch)
    return diverged


def _fits_group(blueprint: Blueprint, run: Run) -> bool:
    """Whether runs like this one train in groups, as far as it shows without their images."""
    return run.world is not None or (stackable(blueprint) and is_plain_recipe(run.recipe))


def _train_group(
    prepared: PreparedBlueprint,
    members: Sequence[Member],
    folder: Path,
    device: str,
    completed: int,
    on_epoch: Callable[[str, int], None],
) -> dict[str, str]:
    """Train runs that all continue after epoch `completed`: together, in halves, or one by one."""
    runs = [member.run for member in members]
    # the crop of an image on demand is decoded for one model alone, which a group would wait for
    if len(runs) > 1 and not isinstance(prepared.images_of(runs[0]).pixels, PreparedImages):
        return _one_by_one(prepared, runs, folder, device, on_epoch)
    try:
        # the trainer gets no name here, or it would keep its memory while the halves train
        return train_members(_begin(prepared, members, folder, device, completed), members, completed, on_epoch)
    except torch.OutOfMemoryError:
        if len(runs) == 1:
            raise
    # outside of `except`: the error's traceback holds the trainer and its memory
    diverged: dict[str, str] = {}
    for half in (runs[: len(runs) // 2], runs[len(runs) // 2 :]):
        diverged |= train_stacked(prepared, half, folder, device=device, on_epoch=on_epoch)
    return diverged


def _begin(
    prepared: PreparedBlueprint, members: Sequence[Member], folder: Path, device: str, completed: int
) -> Trainer:
    """The trainer of these members, in the state after epoch `completed`."""
    runs = [member.run for member in members]
    first, images = runs[0], prepared.images_of(runs[0])
    for member in members:
        member.folder.check_images(images.begun_with)
    models = [initial_model(prepared, run, folder) for run in runs]
    trainer: Trainer
    if first.learner is not None:
        kind = PrivateTrainer if first.learner.learner == "dp-sgd" else WorldTrainer
        trainer = kind(runs, images, models, device)
    elif len(runs) > 1:
        trainer = StackedTrainer([run.recipe for run in runs], images, models, first.epochs, device)
    else:
        trainer = SingleTrainer(first.recipe, images, models[0], first.epochs, device)
    if completed:
        trainer.resume([member.resume for member in members], completed)
    return trainer
