"""What a blueprint will cost before anything is trained: runs, rows, parameters, disk, time."""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from vitzoo_hf.blueprint import Blueprint, Run
from vitzoo_hf.images import load_images
from vitzoo_hf.launch import default_workers
from vitzoo_hf.schema import SPLITS, ZooError
from vitzoo_hf.train import architecture_args, fitting_args, head_hidden
from vitzoo_hf.trainer import Trainer, full_batches
from vitzoo_hf.vit import create, layout_of

WARMUP_STEPS = 3
TIMED_STEPS = 8


@dataclass(frozen=True)
class Plan:
    """The cost of a zoo.

    Attributes:
        models: runs, each ending in one final model.
        rows: kept checkpoints, one row each.
        parameters: smallest and largest model.
        disk_bytes: float32 weights of all rows; training checkpoints take as much again.
        seconds: estimated training time on `workers` processes; None where it could not be measured.
        note: why `seconds` is None.
    """

    name: str
    models: int
    rows: int
    stages: dict[str, int]
    splits: dict[str, int]
    parameters: tuple[int, int]
    disk_bytes: int
    workers: int
    seconds: float | None
    note: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def make_plan(blueprint: Blueprint, *, workers: int | None = None, device: str = "cpu") -> Plan:
    """Count everything and time a few real training steps of every kind of run.

    Raises:
        ZooError: if the architecture cannot be built, or the number of classes is unknown without the images.
    """
    count = workers or default_workers(device)
    sizes = {run.run_id: _num_parameters(blueprint, run) for run in blueprint.runs}
    seconds, note = None, ""
    try:
        seconds = _estimate(blueprint, device) / min(count, len(blueprint.runs))
    except ZooError as error:
        note = str(error)
    return Plan(
        name=blueprint.name,
        models=len(blueprint.runs),
        rows=blueprint.num_rows,
        stages=dict(Counter(run.stage for run in blueprint.runs)),
        splits={split: sum(run.split == split for run in blueprint.runs) for split in SPLITS},
        parameters=(min(sizes.values()), max(sizes.values())),
        disk_bytes=sum(4 * sizes[run.run_id] * len(run.keep_epochs) for run in blueprint.runs),
        workers=count,
        seconds=seconds,
        note=note,
    )


def _num_parameters(blueprint: Blueprint, run: Run) -> int:
    spec = blueprint.images[run.images]
    classes = spec.classes or len(load_images(run.images, spec).class_names)
    args = architecture_args(blueprint, run, classes)
    return layout_of(blueprint.architecture, args, run.recipe.head, head_hidden(run.recipe)).num_parameters


def _estimate(blueprint: Blueprint, device: str) -> float:
    """Single-worker seconds of training all runs; evaluation at kept epochs is not counted."""
    timed: dict[tuple[Any, ...], float] = {}
    total = 0.0
    for run in blueprint.runs:
        recipe = run.recipe
        kind = (
            run.images,
            recipe.regime,
            recipe.optimizer,
            recipe.batch_size,
            recipe.head,
            recipe.augmentation,
        )
        if kind not in timed:
            timed[kind] = _seconds_per_epoch(blueprint, run, device)
        total += timed[kind] * run.epochs
    return total


def _seconds_per_epoch(blueprint: Blueprint, run: Run, device: str) -> float:
    images = load_images(run.images, blueprint.images[run.images])
    args = fitting_args(blueprint, run, images)
    model = create(blueprint.architecture, args, head=run.recipe.head, head_hidden=head_hidden(run.recipe), seed=0)
    trainer = Trainer(run.recipe, images, model, run.epochs, device)
    batches = full_batches(torch.arange(len(trainer.labels), device=device), run.recipe.batch_size)
    chosen = [batches[step % len(batches)] for step in range(WARMUP_STEPS + TIMED_STEPS)]
    views, crops = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        start = time.perf_counter()
        for batch in trainer.feed.batches(chosen, crops):
            float(trainer.step([batch], views))
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
    finally:
        torch.set_num_threads(threads)
    return median(times[WARMUP_STEPS:]) * len(trainer.labels) / min(run.recipe.batch_size, len(trainer.labels))
