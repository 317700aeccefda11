"""A run on its way to training: its architecture, its initial weights, and the folder that its checkpoints go to."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from vitzoo_hf.blueprint.blueprint import Blueprint, Run
from vitzoo_hf.format.layout import is_head
from vitzoo_hf.format.schema import VERSION, ZooError, fingerprint
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.timm_import import import_timm
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.seeds import derive_seed


def opened(blueprint: Blueprint, run: Run, folder: Path) -> RunFolder:
    """The folder of a run in `folder`, made where it is missing and checked to hold the same training.

    Raises:
        ZooError: if it holds another training, or cannot be made.
    """
    run_folder = RunFolder(folder / run.run_id)
    run_folder.open(run_spec(blueprint, run))
    return run_folder


def holds_all(run_folder: RunFolder, run: Run) -> bool:
    """Whether every kept epoch is there in full length."""
    return set(run.keep_epochs) <= set(run_folder.epochs()) and run_folder.intact()


def is_finished(blueprint: Blueprint, run: Run, folder: Path) -> bool:
    """Whether `folder` holds all of this run.

    Raises:
        ZooError: if it holds another training under the same id.
    """
    # a run that never began must leave no folder behind
    if not (folder / run.run_id / "run.json").is_file():
        return False
    return holds_all(opened(blueprint, run, folder), run)


def run_spec(blueprint: Blueprint, run: Run) -> dict[str, object]:
    """Everything that determines a run's weights, and the versions that made them, as JSON values.

    Its fingerprint covers the lineage. Paths and anything else of this machine stay out.
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
        # left out where there is none: blueprints had no worlds at first, and old fingerprints hold
        **{name: asdict(part) for name, part in (("world", run.world), ("learner", run.learner)) if part},
        "parent": {"id": run.parent_id, "fingerprint": run_spec(blueprint, parent)["fingerprint"]}
        if parent
        else None,
    }
    # for provenance alone: other versions may continue a run
    timm = import_timm()
    versions = {"vitzoo_hf": VERSION, "torch": torch.__version__, "timm": timm.__version__}
    # readers get every setting; the fingerprint leaves newer ones out at their default
    return {"fingerprint": fingerprint(decides), **decides, "recipe": asdict(run.recipe), "versions": versions}


def architecture_of(prepared: PreparedBlueprint, run: Run) -> Architecture:
    """The architecture of a run, with one output a class; the head of a contrastive run projects instead.

    Raises:
        ZooError: if the number of classes follows from images that cannot be had on this machine.
    """
    blueprint, recipe = prepared.blueprint, run.recipe
    is_projection = recipe.regime == "contrastive"
    outputs = recipe.projection_dim if is_projection else prepared.num_classes(run.images)
    return Architecture(
        blueprint.architecture,
        blueprint.architecture_args | {"num_classes": outputs},
        recipe.head,
        recipe.head_hidden if recipe.head == "mlp" else None,
    )


def check_fit(architecture: Architecture, images: ImageSet) -> None:
    """Check that a model takes these images.

    Raises:
        ZooError: if channels or size differ.
    """
    channels, size = architecture.args.get("in_chans", 3), architecture.args.get("img_size", images.spec.size)
    # arguments come from YAML and JSON, where a pair is a list
    height, width = size if isinstance(size, list) else (size, size)
    if (channels, height, width) != (images.pixels.channels, images.spec.size, images.spec.size):
        raise ZooError(
            f"{architecture.name} takes {channels} channels of {height}×{width}, images {images.name!r} have"
            f" {images.pixels.channels} of {images.spec.size}×{images.spec.size}: set size and channels of the images"
        )


def initial_model(prepared: PreparedBlueprint, run: Run, folder: Path) -> nn.Module:
    """The model at epoch 0: seeded, with its parent's trunk if it has a parent.

    Raises:
        ZooError: if the model does not take the images, or `folder` lacks the parent's final weights.
    """
    architecture = architecture_of(prepared, run)
    check_fit(architecture, prepared.images_of(run))
    # a label ratio read from heads: 0.94 of runs with one initial head, 0.59 with a random head each
    is_shared = run.learner is not None and run.learner.shared_init
    model = architecture.build(init=run.recipe.init, seed=derive_seed(0 if is_shared else run.recipe.seed, "init"))
    if run.parent_id and run.parent_run:
        parent = RunFolder(folder / run.parent_run)
        tensors, _ = parent.load_epoch(int(run.parent_id.rpartition("@")[2]))
        # the parent's head may have other classes, or be a projection
        trunk = {name: tensor for name, tensor in tensors.items() if not is_head(name)}
        model.load_state_dict(trunk | {name: t for name, t in model.state_dict().items() if is_head(name)})
    return model
