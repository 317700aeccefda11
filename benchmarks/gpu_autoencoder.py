"""Steps of the weight autoencoder on the GPU: two arms, float32, bfloat16 and compiled, beside the CPU.

python benchmarks/gpu_autoencoder.py --out FOLDER [--simulate]
"""

import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import gpu_shared
import torch

from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.zoo import SAMPLE, Zoo

RUNS, STEPS, CPU_STEPS, WARM = 24, 60, 4, 3
ARMS = ("S", "C+S+B")
WAYS = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, compiled": {"precision": "bfloat16", "compile": True},
}
SMALL = {"RUNS": 2, "STEPS": 2, "CPU_STEPS": 2}


def main(figures: gpu_shared.Figures) -> None:
    if figures.simulated:
        globals().update(SMALL)
    # both of tests/, which is on the path by now
    from small_autoencoder import SMALL as SMALL_RECIPE
    from soup_zoo import noisy_zoo

    with tempfile.TemporaryDirectory() as folder:
        zoo = noisy_zoo(Path(folder) / "zoo", SAMPLE, runs=RUNS, epochs=1)
        recipe = AutoencoderRecipe(views=("mlp", "heads"))
        recipe = SMALL_RECIPE if figures.simulated else recipe
        for arm in ARMS:
            for name, changes in WAYS.items():
                with figures.row(arm=arm, way=name, trained_on="cuda", batch_size=recipe.batch_size) as row:
                    row |= steps(zoo, replace(recipe.arm(arm), **changes, steps=STEPS), "cuda")
            with figures.row(arm=arm, way="float32", trained_on="cpu", batch_size=recipe.batch_size) as row:
                row |= steps(zoo, replace(recipe.arm(arm), steps=CPU_STEPS), "cpu")


def steps(zoo: Zoo, recipe: AutoencoderRecipe, device: str) -> dict[str, object]:
    """Milliseconds a step, the stream's batch included; the first steps compile and fill caches."""
    ends: list[float] = []
    losses: list[float] = []

    def on_step(step: int, parts: dict[str, float]) -> None:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
        losses.append(parts["loss"])

    start = time.perf_counter()
    train_autoencoder(zoo, recipe, device=device, on_step=on_step)
    durations = [1e3 * (end - begin) for begin, end in itertools.pairwise(ends)]
    return {
        "ms_a_step": median(durations[min(WARM, len(durations) - 1) :]),
        "s_to_first_step": ends[0] - start,
        "steps": len(ends),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


if __name__ == "__main__":
    gpu_shared.main("autoencoder", __doc__, main)
