"""Pack checkpoints as a zoo: a folder of Parquet that `datasets.load_dataset` opens, and that is pushed to the Hub.

The configs `weights` and `index` have a row a checkpoint, `probes` the held-out images as the models are fed them.
The folder appears complete or not at all. Each checkpoint is read once; one row group is in memory at a time.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitzoo_hf.blueprint.blueprint import Blueprint, Run
from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import read_json
from vitzoo_hf.format.encoding import check_dtype, check_finite, rounded
from vitzoo_hf.format.layout import Layout, flatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.images.sources import ImageSet, load_images
from vitzoo_hf.images.world_pool import flipped
from vitzoo_hf.publish.folder import Rows, write_zoo
from vitzoo_hf.publish.viewer import chosen_default
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.run import architecture_of, is_finished

# a larger set is left out: the zoo would be a copy of the data set
MAX_PROBES = 20_000
# images decoded at once, so that a large set is never whole in memory
PROBES_AT_ONCE = 256
TRAINED_ON = {
    "trained_images": "int",
    "trained_distinct_images": "int",
    "trained_steps": "int",
    "trained_epsilon": "float",
    "trained_environments": "string",
    "trained_sha256": "string",
}
"""Columns of runs on a world: number of training images, number of distinct ones, optimiser steps, privacy spent,
images by environment, and a hash of the images."""


def pack(
    blueprint: Blueprint,
    runs: Path,
    folder: Path,
    *,
    dtype: str = "float32",
    default_config: str | None = None,
    progress: bool = True,
) -> Path:
    """Write the finished runs of a blueprint as a zoo.

    Args:
        blueprint: the blueprint of the runs.
        runs: the folder that `launch` filled.
        folder: the zoo; an earlier zoo in it is replaced once the new one is complete.
        dtype: number format of the stored weights: float32 is exact, float16 and bfloat16 take half the size.
        default_config: config that `load_dataset` and the viewer open, `weights` or `index`; by default by size.
        progress: show a bar.

    Returns:
        `folder`.

    Raises:
        ZooError: if a run is unfinished or was trained on other images, a checkpoint is damaged or not finite, or the
            folder cannot be written.
    """
    check_dtype(dtype)
    opened = chosen_default(default_config)
    packable, missing = _runs_to_pack(blueprint, runs)
    prepared = PreparedBlueprint(blueprint)
    for run in packable:
        # before anything is written: images that changed since training would make wrong probes
        RunFolder(runs / run.run_id).check_images(prepared.images_of(run).begun_with, record=False)
    members = {split: [run for run in packable if run.split == split] for split in schema.SPLITS}
    image_sets = _image_sets(prepared)
    write_zoo(
        folder,
        _manifest(blueprint, image_sets, missing) | opened,
        {
            split: Rows(
                sum(len(run.keep_epochs) for run in part),
                max((architecture_of(prepared, run).layout.num_parameters for run in part), default=0),
                _rows(prepared, part, runs, dtype),
            )
            for split, part in members.items()
        },
        {role: _probes(blueprint, image_sets, role) for role in ("selection", "test")},
        blueprint.text,
        dtype=dtype,
        progress=progress,
    )
    return folder


def is_packed(blueprint: Blueprint, folder: Path) -> bool:
    """Return whether `folder` holds a zoo of exactly this blueprint with all its files in full length."""
    try:
        manifest = read_json(folder / schema.MANIFEST)
        same = manifest["blueprint_fingerprint"] == blueprint.fingerprint
        files = manifest["files"] | read_json(folder / schema.SHARDS)
        # sizes only: hashes would mean reading the whole zoo
        sizes = {name: (folder / name).stat().st_size for name in files}
        return same and all(sizes[name] == entry["bytes"] for name, entry in files.items())
    except (ZooError, OSError, KeyError, TypeError):
        return False


def _runs_to_pack(blueprint: Blueprint, runs: Path) -> tuple[list[Run], dict[str, str]]:
    """List the runs to pack, and why each of the other runs of the blueprint is missing."""
    packable, missing, unfinished = [], {}, []
    for run in blueprint.runs:
        divergence = RunFolder(runs / run.run_id).divergence
        if divergence:
            missing[run.run_id] = f"diverged in epoch {divergence['epoch']}"
        # parents come before their children in a blueprint, so one pass is enough
        elif run.parent_run in missing:
            missing[run.run_id] = f"its parent {run.parent_run} is missing"
        elif is_finished(blueprint, run, runs):
            packable.append(run)
        else:
            unfinished.append(run.run_id)
    if unfinished:
        raise ZooError(
            f"{len(unfinished)} of {len(blueprint.runs)} runs in {runs} are unfinished, {unfinished[0]} the first:"
            " run `vitzoo train` again"
        )
    if not packable:
        raise ZooError(f"no run of {blueprint.name!r} in {runs} can be packed: all of them diverged")
    return packable, missing


def _rows(prepared: PreparedBlueprint, members: Iterable[Run], runs: Path, dtype: str) -> Iterator[dict[str, object]]:
    """Yield the rows of runs with their weights, epochs ascending."""
    blueprint = prepared.blueprint
    for run in members:
        place = RunFolder(runs / run.run_id)
        architecture = architecture_of(prepared, run)
        args = schema.canonical_json(dict(architecture.args))
        provenance = _provenance(prepared, run, place)
        drawn = _drawn(prepared, run)
        for epoch in run.keep_epochs:
            tensors, results = place.load_epoch(epoch)
            layout = Layout.of(tensors)
            model_id, weights = schema.model_id(run.run_id, epoch), flatten(tensors)
            check_finite([weights], [model_id])
            # hashed after rounding: `weights_sha256` is of what a reader gets
            vector = rounded(weights.numpy(), dtype)
            yield {
                "model_id": model_id,
                "run_id": run.run_id,
                "parent_id": run.parent_id,
                "stage": run.stage,
                "epoch": epoch,
                "is_final": epoch == run.epochs,
                "dataset": run.images,
                "architecture": blueprint.architecture,
                "architecture_args": args,
                "head": architecture.head,
                "head_hidden": architecture.head_hidden,
                **{f"factor_{name}": run.factors[name] for name in blueprint.factor_types},
                **{f"factor_{name}": value for name, value in drawn.items()},
                **_training_record(run, results),
                **{name: results.get(name) for name in schema.RESULTS},
                "num_parameters": layout.num_parameters,
                "layout": layout.fingerprint,
                "weights_sha256": schema.weights_sha256(vector),
                "dtype": dtype,
                "provenance": provenance,
                "weights": vector,
            }


def _on_worlds(blueprint: Blueprint) -> bool:
    return any(run.world is not None for run in blueprint.runs)


def _drawn(prepared: PreparedBlueprint, run: Run) -> dict[str, int | str | None]:
    """Return the columns of `TRAINED_ON` that follow from the run's images; none in a zoo without worlds."""
    if not _on_worlds(prepared.blueprint):
        return {}
    pool = prepared.images_of(run).pool
    if run.world is None or run.learner is None or pool is None:
        return dict.fromkeys(TRAINED_ON)
    record = pool.training_draw(run.world, run.learner, run.recipe.seed).record()
    return {
        "trained_images": record["num_images"],
        "trained_distinct_images": record["num_distinct_images"],
        "trained_environments": "+".join(map(str, record["images_by_environment"])),
        "trained_sha256": record["positions_sha256"],
    }


def _training_record(run: Run, results: Mapping[str, Any]) -> dict[str, int | float | None]:
    """Return the columns of `TRAINED_ON` that training recorded."""
    if run.world is None:
        return {}
    return {"factor_trained_steps": int(results["steps"]), "factor_trained_epsilon": results.get("epsilon")}


def _provenance(prepared: PreparedBlueprint, run: Run, place: RunFolder) -> str:
    """Return the column `provenance` of a run's rows, as JSON."""
    blueprint, hashes, spec = prepared.blueprint, prepared.images_of(run).sha256, place.spec
    world: dict[str, object] = {name: spec[name] for name in ("world", "learner") if name in spec}
    return schema.canonical_json(
        {
            "blueprint": blueprint.name,
            "blueprint_fingerprint": blueprint.fingerprint,
            "run_fingerprint": spec["fingerprint"],
            "recipe": spec["recipe"],
            **world,
            "images": spec["images"] | ({"sha256": hashes} if hashes else {}),
            "epochs": spec["epochs"],
            "versions": spec["versions"],
        }
    )


def _probes(blueprint: Blueprint, image_sets: Iterable[ImageSet], role: str) -> list[dict[str, object]]:
    """Return the probe images of every dataset that has at most `MAX_PROBES` of them."""
    rows: list[dict[str, object]] = []
    for images in image_sets:
        if len(images.splits[role]) <= MAX_PROBES and (role == "test" or not _is_flipped(blueprint, images)):
            rows += list(_probe_rows(images, role))
    return rows


def _image_sets(prepared: PreparedBlueprint) -> list[ImageSet]:
    """Return the image sets that runs train on, and `NAME-flipped` where worlds correlate colour and label.

    In a flipped set colour agrees with the label in one of ten images: a model that reads the label from the colour
    is wrong there.
    """
    blueprint = prepared.blueprint
    used = dict.fromkeys(run.images for run in blueprint.runs)
    sets = [prepared.images(name) for name in used]
    for name in used:
        spec = blueprint.images[name]
        if any(set(world.agreements) != {0.5} for world in spec.worlds):
            # an agreement of 0.5 is no correlation, so there is nothing to flip
            mirrored = tuple(dict.fromkeys(map(flipped, spec.worlds)))
            sets.append(load_images(f"{name}-flipped", replace(spec, worlds=mirrored)))
    return sets


def _is_flipped(blueprint: Blueprint, images: ImageSet) -> bool:
    return images.name not in blueprint.images


def _probe_rows(images: ImageSet, role: str) -> Iterator[dict[str, object]]:
    from PIL import Image

    # in the order of `batches`, which are zipped with it below
    positions = iter(images.positions(role).tolist())
    for batch, labels in images.batches(role, PROBES_AT_ONCE):
        for image, label in zip(batch.numpy(), labels.tolist(), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG")
            yield {
                "dataset": images.name,
                "position": next(positions),
                "label": label,
                "image": {"bytes": buffer.getvalue(), "path": None},
            }


def _manifest(blueprint: Blueprint, image_sets: Iterable[ImageSet], missing: Mapping[str, str]) -> dict[str, object]:
    return {
        "format": schema.FORMAT_VERSION,
        "name": blueprint.name,
        "blueprint_fingerprint": blueprint.fingerprint,
        "factors": blueprint.factor_types | (TRAINED_ON if _on_worlds(blueprint) else {}),
        "images": {images.name: images.record for images in image_sets},
        "splits": blueprint.splits,
        "missing_runs": dict(missing),
    }
