"""Arms of the weight autoencoder on a population: trained, measured, drawn, into the folder beside this script.

python experiments/autoencoder/grid.py ZOO NAME --runs FOLDER [--arms S S+B] [--rates 2e-3] [--seeds 0 1 2]
python experiments/autoencoder/grid.py ZOO NAME --runs FOLDER --variants all|NAME... [--rates 2e-3] [--seeds 0]

ZOO is a population made by `results/autoencoder/NAME.yaml`; `aligned` is `independent` after `vitzoo rebasin`.
What FOLDER holds already is not trained again; an interrupted
training continues. Two processes of one thread each share the cells.
"""

import argparse
import multiprocessing
import sys
import time
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import pandas as pd
import torch
from harness import (
    RESULTS,
    WHOLE,
    ZOO_AND_NAME,
    merge,
    provenance,
    run_main,
    save_figure,
    write_provenance,
    write_table,
)
from matplotlib import rc_context
from matplotlib.figure import Figure

from autoencoder.cells import (
    AUTOENCODER,
    HISTORY,
    LAYERS,
    MODELS,
    VARIANTS,
    Cell,
    Judge,
    cells,
    chosen_rates,
    measure_cell,
    read_table,
    variants,
)
from vitzoo_hf.apply.autoencoder.recipe import ARMS, AutoencoderRecipe
from vitzoo_hf.report.style import PALETTE, PERCENT, STYLE, heading
from vitzoo_hf.zoo import Zoo

HERE = RESULTS / "autoencoder"
CELL = ["arm", "variant", "lr", "seed", "steps"]
"""Columns that tell cells apart."""
TOLD_EVERY = 100


def main() -> None:
    arguments = parser().parse_args()
    zoo = Zoo(arguments.zoo)  # before processes start, each of which takes seconds to say that there is none
    if not arguments.draw_only:
        jobs = [(cell, arguments.runs, arguments.zoo) for cell in planned(arguments)]
        # Not fork: it copies locks of torch's threads, which nothing in the new process ever opens.
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            # Cells differ in cost by arm: one at a time, so that no process waits for a batch of dear ones.
            for name, seconds in pool.imap_unordered(run, jobs, chunksize=1):
                print(f"{name}: done after {seconds:.0f} s", flush=True)
    write(arguments.name, arguments.runs, zoo)


def parser() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__, ZOO_AND_NAME)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scaling", default="entry")
    parser.add_argument("--steps", type=int, default=AutoencoderRecipe().steps)
    parser.add_argument("--variants", nargs="+", default=[], help="ablations at the first of the rates, or all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--draw-only", action="store_true", help="tables and figures of the cells that are finished")
    return parser


def planned(arguments: argparse.Namespace) -> list[Cell]:
    """The cells that a command asks for."""
    recipe = replace(AutoencoderRecipe(), scaling=arguments.scaling, steps=arguments.steps)
    if arguments.variants:
        names = list(VARIANTS) if arguments.variants == ["all"] else arguments.variants
        return list(variants(replace(recipe, lr=arguments.rates[0]), names, arguments.seeds))
    return list(cells(recipe, arguments.arms, arguments.rates, arguments.seeds))


@cache
def judge_of(zoo: Path) -> Judge:
    """Make the judge of a process, which measures the baselines once.

    Jobs call this, not the initializer of the pool: a pool starts a process whose initializer fails again, for ever.
    """
    torch.set_num_threads(1)
    return Judge(population(zoo))


def run(job: tuple[Cell, Path, Path]) -> tuple[str, float]:
    """Train and measure one cell in one thread."""
    cell, folder, zoo = job
    judge = judge_of(zoo)
    start = time.perf_counter()

    def tell(step: int, losses: dict[str, float]) -> None:
        if step % TOLD_EVERY == 0:
            left = (time.perf_counter() - start) / step * (cell.recipe.steps - step)
            print(f"{cell.name}: step {step}, loss {losses['loss']:.4g}, {left:.0f} s left", flush=True)

    measure_cell(judge, cell, folder, on_step=tell)
    return cell.name, time.perf_counter() - start


def population(folder: Path) -> Zoo:
    """The models trained on digits: a parent, on other images, is none of them."""
    return Zoo(folder).filter(dataset="digits")


def write(name: str, runs: Path, zoo: Zoo) -> None:
    """Tables, figures and provenance of all finished cells of a population."""
    table = merged_measures(name, gathered(runs, "measures.csv"))
    rates = chosen_rates(table)
    table["chosen"] = (table["variant"] == "") & (table["lr"] == table["arm"].map(rates))
    table = table.sort_values(["variant", "split", "method", "arm", "lr", "seed"])
    # Whole, as these are merged already: a cell of this run may change which rates of the stored ones are chosen.
    write_table(table[table["variant"] == ""], HERE / f"{name}_arms.csv", WHOLE)
    if (table["variant"] != "").any():
        write_table(table[table["variant"] != ""], HERE / f"{name}_variants.csv", WHOLE)
    history = write_part(gathered(runs, HISTORY), HERE / f"{name}_history.csv", rates)
    models = gathered(runs, MODELS)
    models = write_part(models[reported(models)], HERE / f"{name}_models.csv", rates)
    layers = gathered(runs, LAYERS)
    write_part(layers[reported(layers)], HERE / f"{name}_layers.csv", rates)
    figures = {"accuracy": draw_accuracy(models), "agreement": draw_agreement(models), "losses": draw_losses(history)}
    for kind, figure in figures.items():
        save_figure(figure, HERE / "figures" / f"{name}_{kind}.png")
    write_provenance(HERE / f"provenance_{name}.json", provenance(zoo), merged=True)
    columns = ["arm", "variant", "lr", "seed", "r2", "accuracy_good", "agreement", "retention", "specificity"]
    shown = table[(table["split"] == "test") & (table["method"] == AUTOENCODER)]
    print(shown[[*columns, "rank_correlation", "diversity", "failures"]].to_string(index=False))


def merged_measures(name: str, fresh: pd.DataFrame) -> pd.DataFrame:
    """The measures of these cells and of all others that are stored, which may come from another folder of runs."""
    fresh = fresh.assign(chosen=False)  # a column of the stored tables, which `write` fills for all cells together
    of_arms = fresh["variant"] == ""
    parts = {"arms": fresh[of_arms], "variants": fresh[~of_arms]}
    merged = [merge(part, HERE / f"{name}_{kind}.csv", CELL) for kind, part in parts.items()]
    return read_table(StringIO(pd.concat(merged).to_csv(index=False)))


def write_part(table: pd.DataFrame, file: Path, rates: dict[str, float]) -> pd.DataFrame:
    """Merge the rows of the grid's cells into a table, which then holds those at the chosen learning rates."""
    rows = merge(of_grid(table, rates), file, CELL)
    shown = of_grid(rows.assign(lr=pd.to_numeric(rows["lr"])), rates)
    write_table(rows.loc[shown.index], file, WHOLE)
    return read_table(file)


def reported(table: pd.DataFrame) -> pd.Series:
    """Rows of reconstructions of test models."""
    return (table["method"] == AUTOENCODER) & (table["split"] == "test")


def of_grid(table: pd.DataFrame, rates: dict[str, float]) -> pd.DataFrame:
    """Rows of the grid's cells at the chosen learning rates."""
    return table[(table["variant"] == "") & (table["lr"] == table["arm"].map(rates))]


def gathered(runs: Path, file: str) -> pd.DataFrame:
    """One table of all cells."""
    return pd.concat([read_table(path) for path in sorted(runs.glob(f"*/{file}"))], ignore_index=True)


def panels(table: pd.DataFrame, title: str, told: str) -> tuple[Figure, dict]:
    """One panel an arm, in the order of the arms."""
    arms = [arm for arm in ARMS if (table["arm"] == arm).any()]
    with rc_context(STYLE):
        figure = Figure(figsize=(max(6.5, 2.9 * len(arms)), 3.6), layout="constrained")
        axes = figure.subplots(1, len(arms), squeeze=False, sharey=True)[0]
        heading(figure, title, told)
    return figure, dict(zip(arms, axes, strict=True))


def draw_accuracy(models: pd.DataFrame) -> Figure:
    figure, axes = panels(models, "Accuracy of originals and their reconstructions", "held-out models and images")
    with rc_context(STYLE):
        for arm, axis in axes.items():
            part = models[models["arm"] == arm]
            axis.plot([0, 1], [0, 1], color="#9ca3af", linewidth=0.8)
            axis.scatter(part["accuracy_original"], part["accuracy"], s=5, alpha=0.6, color=PALETTE[0])
            axis.set(title=arm, xlim=(0, 1), ylim=(0, 1), xlabel="original")
            axis.xaxis.set_major_formatter(PERCENT)
            axis.yaxis.set_major_formatter(PERCENT)
    next(iter(axes.values())).set_ylabel("reconstruction")
    return figure


def draw_agreement(models: pd.DataFrame) -> Figure:
    figure, axes = panels(models, "Agreement with one's own original", "share of held-out images; held-out models")
    with rc_context(STYLE):
        for arm, axis in axes.items():
            axis.hist(models.loc[models["arm"] == arm, "agreement"], bins=25, range=(0, 1), color=PALETTE[0])
            axis.set(title=arm, xlim=(0, 1), xlabel="agreement")
            axis.xaxis.set_major_formatter(PERCENT)
    next(iter(axes.values())).set_ylabel("models")
    return figure


def draw_losses(history: pd.DataFrame) -> Figure:
    figure, axes = panels(history, "Losses over training", "each over its value at the first step; one line a seed")
    with rc_context(STYLE):
        for arm, axis in axes.items():
            for position, part in enumerate(("structure", "behaviour", "contrast")):
                for number, (_, run_) in enumerate(history[history["arm"] == arm].groupby("seed")):
                    values = run_[part] if part in run_ else pd.Series(dtype=float)
                    if values.notna().any():
                        label = part if number == 0 else None
                        # Parts of the loss have different units, so that only their changes share an axis.
                        axis.plot(run_["step"], values / values.iloc[0], color=PALETTE[position], label=label)
            axis.set(title=arm, xlabel="step", yscale="log")
            axis.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    run_main(main)
