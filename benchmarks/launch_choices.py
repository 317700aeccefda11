"""Processes times threads on a CPU: what `launch` does, one process of one thread a core, beside one process.

python benchmarks/launch_choices.py [--smoke] [--json FILE]
"""

import multiprocessing
import os
import time
from itertools import islice
from statistics import median
from typing import Any

import side_by_side
import torch

from vitzoo_hf.blueprint.blueprint import Recipe
from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.models.vit import create
from vitzoo_hf.training.trainer import SingleTrainer

SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "27k, batch 32": ({"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}, 32, 160),
    "27k, batch 128": ({"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}, 128, 60),
    "205k, batch 128": ({"img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}, 128, 12),
    "5.5M, batch 16": ({"img_size": 64, "patch_size": 8}, 16, 8),
}
ROUNDS = 3
SMOKE = {"SIZES": {"27k, batch 32": (SIZES["27k, batch 32"][0], 32, 2)}, "ROUNDS": 1}


def main() -> None:
    given = side_by_side.parsed(side_by_side.parser(__doc__), globals(), SMOKE)
    cores = len(os.sched_getaffinity(0))
    ways = {f"{cores} processes of 1 thread (launch)": (cores, 1), f"1 process of {cores} threads": (1, cores)}
    rows = []
    for size, (args, batch, steps) in SIZES.items():
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, (processes, threads) in ways.items():
                taken[way].append(seconds_a_step(args, batch, steps, processes, threads))
        middle = {way: median(times) for way, times in taken.items()}
        best = min(middle.values())
        rows += [
            {"size": size, "way": way, "wall_ms_a_step": 1000 * middle[way], "over_the_best": middle[way] / best}
            for way in ways
        ]
    side_by_side.report("launch_choices", rows, given)


def seconds_a_step(args: dict[str, Any], batch: int, steps: int, processes: int, threads: int) -> float:
    """Wall time over all steps of all processes, which train at the same time."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Barrier(processes + 1), context.Barrier(processes + 1)
    workers = [
        context.Process(target=train, args=(args, batch, steps, threads, number, ready, go))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    ready.wait()
    start = time.perf_counter()
    go.wait()
    for worker in workers:
        worker.join()
    return (time.perf_counter() - start) / (steps * processes)


def train(args: dict[str, Any], batch: int, steps: int, threads: int, seed: int, ready: Any, go: Any) -> None:
    torch.set_num_threads(threads)
    images = load_images("digits", ImagesSpec("digits", args["img_size"]))
    model = create("vit_tiny_patch16_224", args | {"in_chans": 1, "num_classes": 10}, seed=seed)
    trainer = SingleTrainer(Recipe(batch_size=batch, label_smoothing=0.1), images, model, 1, "cpu")
    positions = torch.arange(len(trainer.labels))[None].split(batch, 1)[:-1]
    batches = [positions[step % len(positions)] for step in range(3 + steps)]
    draws = trainer.draws(1)
    fed = trainer.feed.batches(batches, draws)
    for _ in range(3):
        trainer.step(islice(fed, 1), draws, 0.0)
    ready.wait()
    go.wait()
    for _ in range(steps):
        trainer.step(islice(fed, 1), draws, 0.0)
    os._exit(0)


if __name__ == "__main__":
    main()
