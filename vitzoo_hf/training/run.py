"""Train one run: supervised or contrastive pre-training, or fine-tuning from a parent's trunk.

Initial weights, data order, views and mixing each have a seed derived from the run's seed and the epoch alone, so
a run gives the same weights bit for bit on the same machine, whether it was interrupted or not. `stacked`
trains many of them together, up to rounding.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitzoo_hf.blueprint.blueprint import Blueprint, Run
from vitzoo_hf.format.layout import is_head
from vitzoo_hf.format.schema import VERSION, ZooError, fingerprint
from vitzoo_hf.images.sources import ImageSet, load_images
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.timm_import import import_timm
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.seeds import derive_seed
from vitzoo_hf.training.trainer import DivergedError, Trainer

RESUME_SECONDS = 60.0
"""At most so much training is lost with a process, or an epoch where that takes longer."""


def train_run(
    blueprint: Blueprint,
    run: Run,
    folder: Path,
    *,
    device: str = "cpu",
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train `run` into `folder / run.run_id`, from where an earlier call left off.

    Args:
        blueprint: the zoo the run belongs to.
        run: one of its runs; a fine-tuning run finds its parent's final weights in `folder`.
        folder: holds one folder a run.
        device: where to train.
        on_epoch: called with the number of completed epochs, also for those found done.

    Raises:
        DivergedError: if the loss stops being finite; this is recorded, and the run is not tried again.
        ZooError: if the parent is missing, the images cannot be had, or the folder holds another training.
    """
    if run.world is not None:
        raise ZooError(f"{run.run_id} draws training images of its own: train it by `stacked.train_stacked`")
    place = opened(blueprint, run, folder)
    if holds_all(place, run):
        place.drop_resume()
        on_epoch(run.epochs)
        return
    images = load_images(run.images, blueprint.images[run.images])
    place.check_images(images.begun_with)
    trainer = Trainer(run.recipe, images, initial_model(blueprint, run, images, folder), run.epochs, device)
    done = trainer.resume(place, run.keep_epochs)
    if done is None:
        done = 0
        if 0 in run.keep_epochs:
            place.save_epoch(0, trainer.model.state_dict(), trainer.results())
    on_epoch(done)
    saved = time.monotonic()
    for epoch in range(done + 1, run.epochs + 1):
        try:
            trainer.train_epoch(epoch)
        except DivergedError as error:
            place.record_divergence(epoch, str(error))
            raise DivergedError(f"{run.run_id} diverged in epoch {epoch}: {error}") from None
        if epoch in run.keep_epochs:
            place.save_epoch(epoch, trainer.model.state_dict(), trainer.results())
        if epoch < run.epochs and (epoch in run.keep_epochs or time.monotonic() - saved >= RESUME_SECONDS):
            place.save_resume(epoch, trainer.resume_tensors())
            saved = time.monotonic()
        on_epoch(epoch)
    place.drop_resume()


def opened(blueprint: Blueprint, run: Run, folder: Path) -> RunFolder:
    """The folder of a run that may be trained.

    Raises:
        DivergedError: if it diverged before.
        ZooError: if the folder holds another training.
    """
    place = RunFolder(folder / run.run_id)
    place.open(run_spec(blueprint, run))
    if place.divergence:
        raise DivergedError("{} diverged in epoch {epoch}: {reason}".format(run.run_id, **place.divergence))
    return place


def holds_all(place: RunFolder, run: Run) -> bool:
    """Whether every kept epoch is there in full length."""
    return set(run.keep_epochs) <= set(place.epochs()) and place.intact()


def is_finished(blueprint: Blueprint, run: Run, folder: Path) -> bool:
    """Whether `folder` holds all of this run.

    Raises:
        ZooError: if it holds another training under the same id.
    """
    place = RunFolder(folder / run.run_id)
    if not (place.path / "run.json").is_file():
        return False
    place.open(run_spec(blueprint, run))
    return holds_all(place, run)


def run_spec(blueprint: Blueprint, run: Run) -> dict[str, Any]:
    """What determines a run's weights, and what made them; its fingerprint covers the lineage.

    Paths and anything else of this machine stay out.
    """
    spec = blueprint.images[run.images].decides()
    parent = next((other for other in blueprint.runs if other.run_id == run.parent_run), None)
    decides = {
        "architecture": blueprint.architecture,
        "architecture_args": blueprint.architecture_args,
        "images": {"name": run.images, **spec},
        "recipe": run.recipe.decides,
        "stage": run.stage,
        "epochs": run.epochs,
        "keep_epochs": list(run.keep_epochs),
        **{name: asdict(part) for name, part in (("world", run.world), ("learner", run.learner)) if part},
        "parent": {"id": run.parent_id, "fingerprint": run_spec(blueprint, parent)["fingerprint"]}
        if parent
        else None,
    }
    timm = import_timm()
    versions = {"vitzoo_hf": VERSION, "torch": torch.__version__, "timm": timm.__version__}
    return {"fingerprint": fingerprint(decides), **decides, "recipe": asdict(run.recipe), "versions": versions}


def run_architecture(blueprint: Blueprint, run: Run, num_classes: int) -> Architecture:
    """The architecture of a run: a contrastive head projects, the others classify."""
    recipe = run.recipe
    outputs = recipe.projection_dim if recipe.regime == "contrastive" else num_classes
    args = blueprint.architecture_args | {"num_classes": outputs}
    return Architecture(
        blueprint.architecture, args, recipe.head, recipe.head_hidden if recipe.head == "mlp" else None
    )


def fitting_architecture(blueprint: Blueprint, run: Run, images: ImageSet) -> Architecture:
    """`run_architecture`, once it is sure that the model takes these images.

    Raises:
        ZooError: if channels or size differ.
    """
    architecture = run_architecture(blueprint, run, len(images.class_names))
    channels = architecture.args.get("in_chans", 3)
    size = architecture.args.get("img_size", images.spec.size)
    height, width = size if isinstance(size, list) else (size, size)
    if (channels, height, width) != (images.pixels.channels, images.spec.size, images.spec.size):
        raise ZooError(
            f"{blueprint.architecture} takes {channels} channels of {height}×{width}, images {run.images!r} have"
            f" {images.pixels.channels} of {images.spec.size}×{images.spec.size}: set size and channels of the images"
        )
    return architecture


def initial_model(blueprint: Blueprint, run: Run, images: ImageSet, folder: Path) -> nn.Module:
    """The model at epoch 0: seeded, with its parent's trunk if it has a parent."""
    architecture = fitting_architecture(blueprint, run, images)
    alike = run.learner is not None and run.learner.shared_init
    seed = derive_seed(0 if alike else run.recipe.seed, "init")
    model = architecture.build(init=run.recipe.init, seed=seed)
    if run.parent_id and run.parent_run:
        parent = RunFolder(folder / run.parent_run)
        tensors, _ = parent.load_epoch(int(run.parent_id.rpartition("@")[2]))
        trunk = {name: tensor for name, tensor in tensors.items() if not is_head(name)}
        model.load_state_dict(trunk | {name: t for name, t in model.state_dict().items() if is_head(name)})
    return model
