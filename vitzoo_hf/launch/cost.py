"""What a blueprint will cost before anything is trained: runs, rows, parameters, disk, time."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import NamedTuple

import torch

from vitzoo_hf.blueprint.blueprint import Blueprint, Recipe, Run
from vitzoo_hf.environment import default_workers
from vitzoo_hf.format.schema import SPLITS, ZooError
from vitzoo_hf.images.pixels import SmallImages
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.images.sources import ROLES, ImageSet
from vitzoo_hf.training.run import architecture_of, check_fit
from vitzoo_hf.training.trainer import SingleTrainer, full_batches

WARMUP_STEPS = 3
TIMED_STEPS = 8
PATIENCE = 20.0
PROBED_IMAGES = 4
STAND_IN = "random images"
STAND_IN_IMAGES = 256


@dataclass(frozen=True)
class Plan:
    """The cost of a zoo.

    Attributes:
        models: runs, each ending in one final model.
        rows: kept checkpoints, one row each.
        parameters: smallest and largest model.
        disk_bytes: float32 weights of all rows; training checkpoints take as much again.
        device: the device that steps were timed on.
        seconds: estimated training time on `workers` processes; None where it could not be measured.
        note: the reason that `seconds` is None, or what the estimate leaves out.
    """

    name: str
    models: int
    rows: int
    stages: dict[str, int]
    splits: dict[str, int]
    parameters: tuple[int, int]
    disk_bytes: int
    workers: int
    device: str
    seconds: float | None
    note: str

    def to_json(self) -> dict[str, object]:
        """The plan as JSON values."""
        return asdict(self)


def make_plan(blueprint: Blueprint, *, workers: int | None = None, device: str = "cpu") -> Plan:
    """Count everything and time a few real training steps of every kind of run.

    Raises:
        ZooError: if the architecture cannot be built, a run cannot train on its images, or the number of classes is
            unknown without them.
    """
    if workers is not None and workers < 1:
        raise ZooError(f"workers is {workers}; it must be at least 1")
    count = workers or default_workers(device)
    prepared = PreparedBlueprint(blueprint)
    sizes = {run.run_id: architecture_of(prepared, run).layout.num_parameters for run in blueprint.runs}
    seconds: float | None = None
    notes: list[str] = []
    try:
        images = {name: _timing_images(prepared, name) for name in blueprint.images}
    except ZooError as error:
        notes = [str(error)]
    else:
        total, notes = _estimate(prepared, images, device)
        # more workers than runs would be idle
        seconds = total / min(count, len(blueprint.runs))
    return Plan(
        name=blueprint.name,
        models=len(blueprint.runs),
        rows=blueprint.num_rows,
        stages=dict(Counter(run.stage for run in blueprint.runs)),
        splits={split: sum(run.split == split for run in blueprint.runs) for split in SPLITS},
        parameters=(min(sizes.values()), max(sizes.values())),
        # four bytes a float32 weight
        disk_bytes=sum(4 * sizes[run.run_id] * len(run.keep_epochs) for run in blueprint.runs),
        workers=count,
        device=device,
        seconds=seconds,
        note="; ".join(notes),
    )


def _estimate(
    prepared: PreparedBlueprint, images: Mapping[str, "TimingImages"], device: str
) -> tuple[float, list[str]]:
    """Single-worker seconds of training all runs, and what they leave out besides evaluation at kept epochs."""
    seconds_by_kind: dict[tuple[str, Recipe], float] = {}
    total = 0.0
    for run in prepared.blueprint.runs:
        # none of these settings changes what a step costs
        kind = (run.images, replace(run.recipe, seed=0, lr=1.0, weight_decay=0.0, momentum=0.0))
        if kind not in seconds_by_kind:
            seconds_by_kind[kind] = _seconds_per_image(prepared, run, images[run.images].images, device)
        total += seconds_by_kind[kind] * run.epochs * _images_per_epoch(run, images[run.images].num_training)
    missing = [name for name, timing in images.items() if timing.images.licence == STAND_IN]
    notes = [f"timed on random images for want of {name}, without reading files" for name in missing]
    return total, notes


def _images_per_epoch(run: Run, count: int) -> int:
    if run.world is None or run.learner is None:
        return count
    return run.learner.steps(run.world, run.recipe.batch_size) * run.recipe.batch_size


class TimingImages(NamedTuple):
    """Images to time steps on, and the number of images that a run trains on."""

    images: ImageSet
    num_training: int


def _timing_images(prepared: PreparedBlueprint, name: str) -> TimingImages:
    """The images of a blueprint; random ones where they are missing here, but the blueprint says how many there are.

    Raises:
        ZooError: if they are missing here, and so is `classes` or `count`.
    """
    spec = prepared.blueprint.images[name]
    try:
        images = prepared.images(name)
        return TimingImages(images, len(images.positions("train")))
    except ZooError:
        if spec.classes is None or spec.count is None:
            raise
    # a step costs the same whatever the pixels show; only shape and dtype matter
    generator = torch.Generator().manual_seed(0)
    side, channels = max(spec.resize or 0, spec.size), spec.channels or 3
    shape = (STAND_IN_IMAGES, channels, side, side)
    pixels = SmallImages(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), spec)
    labels = torch.arange(STAND_IN_IMAGES) % spec.classes
    names = tuple(str(number) for number in range(spec.classes))
    everything = {role: torch.arange(STAND_IN_IMAGES) for role in ROLES}
    images = ImageSet(name, spec, pixels, labels, names, STAND_IN, everything)
    return TimingImages(images, round(spec.count * (1 - spec.selection)))


def _seconds_per_image(prepared: PreparedBlueprint, run: Run, images: ImageSet, device: str) -> float:
    """Seconds of training by a few steps; with smaller batches where those of the recipe would take long."""
    architecture = architecture_of(prepared, run)
    check_fit(architecture, images)
    trainer = SingleTrainer(run.recipe, images, architecture.build(seed=0), run.epochs, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers train
    try:
        size = min(run.recipe.batch_size, len(trainer.labels))
        # a large model may take minutes for a full batch: estimate from a few images first
        probed = min(PROBED_IMAGES, size)
        # the second step: the first one also allocates
        expected = _times(trainer, probed, 2)[-1] * size / probed * (WARMUP_STEPS + TIMED_STEPS)
        if expected > PATIENCE:
            # full batches would keep the user waiting longer than PATIENCE seconds
            return median(_times(trainer, probed, 2)) / probed
        return median(_times(trainer, size, WARMUP_STEPS + TIMED_STEPS)[WARMUP_STEPS:]) / size
    finally:
        torch.set_num_threads(threads)


def _times(trainer: SingleTrainer, size: int, count: int) -> list[float]:
    """Seconds of each of `count` steps on batches of `size` images."""
    batches = full_batches(torch.arange(len(trainer.labels), device=trainer.device), size)
    timed_batches = [batches[step % len(batches)][None] for step in range(count)]
    draws = trainer.draws(1)
    times, start = [], time.perf_counter()
    for batch in trainer.feed.batches(timed_batches, draws):
        float(trainer.step(iter([batch]), draws, 0.0))  # waits for the device
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return times
