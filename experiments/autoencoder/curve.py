"""Held-out reconstructions against the number of training runs and of steps: does an autoencoder generalise?

python experiments/autoencoder/curve.py ZOO NAME --folder FOLDER [--sizes 64 256 1024] [--steps 1000] [--arms S S+B]

ZOO is `independent`, every model from initial weights of its own, or `aligned`, the same after `vitzoo rebasin`. What
FOLDER holds is not trained again. Adds its rows to `autoencoder/NAME_curve.csv` and draws the figure of all curves.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import pandas as pd
import torch
from harness import (
    ZOO_AND_NAME,
    cell_files,
    provenance,
    run_main,
    save_figure,
    write_cell,
    write_provenance,
    write_table,
)
from matplotlib import rc_context
from matplotlib.figure import Figure

from autoencoder.grid import HERE, population
from vitzoo_hf.apply.autoencoder.evaluation import HeldOut, reconstructed
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.report.style import PALETTE, PERCENT, STYLE, heading
from vitzoo_hf.zoo import Zoo

SEEN = 50
"""Training runs on which the fit is told, the first ones of each subset."""


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(1)
    zoo = population(arguments.zoo)
    held = HeldOut.of(zoo, "test")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for arm, size, recipe in planned(arguments):
        measure(zoo, held, size, arm, recipe, arguments.folder)
    write(arguments.name, arguments.folder, zoo)


def parser() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__, ZOO_AND_NAME)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--steps", nargs="+", type=int, default=[1000])
    parser.add_argument("--arms", nargs="+", default=["S+B"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lr", type=float, default=AutoencoderRecipe().lr)
    return parser


def planned(arguments: argparse.Namespace) -> Iterator[tuple[str, int, AutoencoderRecipe]]:
    """Arm, training runs and recipe of each training that a command asks for."""
    for seed in arguments.seeds:
        for arm in arguments.arms:
            for steps in arguments.steps:
                for size in arguments.sizes:
                    recipe = replace(AutoencoderRecipe(), steps=steps, seed=seed, lr=arguments.lr).arm(arm)
                    yield arm, size, recipe


def subset(zoo: Zoo, size: int, seed: int) -> Zoo:
    """The zoo with so many of its training runs."""
    # Sorted, as a set of text has another order in every process.
    runs = sorted(set(zoo.filter(split="train").index["run_id"]))
    order = torch.randperm(len(runs), generator=torch.Generator().manual_seed(seed)).tolist()
    # The first of one order: small subsets lie in large ones, so that points differ by added runs alone.
    return zoo.filter(run_id=[runs[place] for place in order[:size]])


def measure(zoo: Zoo, held: HeldOut, size: int, arm: str, recipe: AutoencoderRecipe, folder: Path) -> None:
    file = folder / f"{arm}-{size}-{recipe.steps}-s{recipe.seed}.csv"
    if file.is_file():
        return
    start, train = time.perf_counter(), subset(zoo, size, recipe.seed)
    trained = train_autoencoder(train, recipe)
    about = {"arm": arm, "runs": size, "steps": recipe.steps, "seed": recipe.seed, "lr": recipe.lr}
    seen = HeldOut.of(subset(zoo, min(size, SEEN), recipe.seed), "train")
    rows = [
        about | {"models": name} | reconstructed(models, trained).values
        for name, models in (("held out", held), ("training", seen))
    ]
    write_cell(pd.DataFrame(rows), file)
    told = ", ".join(f"{row['models']} {row['retention']:.3f}" for row in rows)
    print(f"{file.stem}: retention {told}, {time.perf_counter() - start:.0f} s", flush=True)


def write(name: str, folder: Path, zoo: Zoo) -> None:
    table = pd.concat([pd.read_csv(file) for file in cell_files(folder)], ignore_index=True)
    order = ["arm", "steps", "runs", "seed", "models"]
    write_table(table, HERE / f"{name}_curve.csv", [*order[:-1], "lr"], order=order)
    figure = draw({file.stem.removesuffix("_curve"): pd.read_csv(file) for file in sorted(HERE.glob("*_curve.csv"))})
    save_figure(figure, HERE / "figures" / "curve.png")
    write_provenance(HERE / f"provenance_{name}_curve.json", provenance(zoo), merged=True)
    print(table[[*order, "r2_beyond_mean", "agreement", "retention"]].to_string(index=False))


def draw(tables: dict[str, pd.DataFrame]) -> Figure:
    """Retention of good models against the runs trained on, at most steps; and against steps, at most runs."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.8), layout="constrained")
        heading(
            figure, "Reconstructions of held-out models", "retention of good ones by S+B; dotted: training models"
        )
        axes = figure.subplots(1, 2, sharey=True)
        for number, (name, table) in enumerate(tables.items()):
            table = table[table["arm"] == "S+B"]
            # Most points have one number of steps; others would mix two effects into the curve over runs.
            by_runs = table[table["steps"] == table["steps"].mode()[0]]
            by_steps = table[table["runs"] == table["runs"].max()]
            for axis, part, column in ((axes[0], by_runs, "runs"), (axes[1], by_steps, "steps")):
                for models, line in (("held out", "-"), ("training", ":")):
                    mean = part[part["models"] == models].groupby(column)["retention"].mean()
                    label = name if models == "held out" else None
                    axis.plot(mean.index, mean, line, marker="o", markersize=3, color=PALETTE[number], label=label)
                axis.set(xlabel="training " + column if column == "runs" else column, xscale="log", ylim=(0, 1))
                axis.yaxis.set_major_formatter(PERCENT)
        axes[0].set_ylabel("retention")
        axes[0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    run_main(main)
