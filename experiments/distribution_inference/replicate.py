"""Replicate the published synthetic tasks of distribution inference, and write tables, figures and criteria.

python experiments/distribution_inference/replicate.py --tier smoke|standard [--only A A-bis B C DMI] [--runs FOLDER]

Interrupted, the same command continues: a finished cell is a table in the folder of --runs and is not run again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import pandas as pd
import torch
from harness import RESULTS, provenance_line, run_main, save_figure, write_table

from distribution_inference.replication import TIERS, cells_of, criteria, gather, run_replication
from distribution_inference.replication_plot import plot_replication
from vitzoo_hf.format.atomic import make_folder
from vitzoo_hf.format.schema import ZooError

HERE = RESULTS / "distribution_inference"
CELL = ["experiment", "knob", "mended", "learner"]
"""Columns that tell cells apart; worlds are pooled."""
EXPERIMENTS = ("A", "A-bis", "B", "C", "DMI")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--tier", choices=TIERS, default="smoke")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="some experiments")
    parser.add_argument(
        "--runs", type=Path, help="folder of finished cells; results/distribution_inference/runs-TIER"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the tables and figures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds after which no cell begins")
    given = parser.parse_args()
    torch.set_num_threads(1)
    run(given)


def run(given: argparse.Namespace) -> None:
    """Run some cells, then write what all finished cells of the tier show."""
    cells = cells_of(given.tier)
    chosen = [cell for cell in cells if cell.experiment in given.only]
    if not chosen:
        raise ZooError(f"the {given.tier} tier has no cell of {', '.join(given.only)}: give --tier standard")
    runs = given.runs or HERE / f"runs-{given.tier}"
    # Before hours of training, which must not end at a folder that cannot be written.
    make_folder(given.out)
    options = {
        "device": given.device,
        "stop_after": given.stop_after,
        "provenance": provenance_line(),
        "progress": True,
    }
    left = run_replication(chosen, TIERS[given.tier], runs, **options)
    finished = [cell for cell in cells if (runs / f"{cell.name}.csv").is_file()]
    if finished:
        write(gather(finished, runs), given, whole=len(finished) == len(cells))
    print(f"{left} cells left" if finished else f"{left} cells left, none finished yet: the same command goes on")


def write(table: pd.DataFrame, given: argparse.Namespace, *, whole: bool) -> None:
    """Table and figure under the name of the tier, or as partial ones where cells of it are missing."""
    stem = "replication" if given.tier == "standard" else f"replication_{given.tier}"
    # A figure of some cells must not pass for that of the tier.
    stem += "" if whole else "_partial"
    write_table(table, given.out / f"{stem}.csv", CELL, digits=5)
    save_figure(plot_replication(table), given.out / f"{stem}.png")
    if given.tier == "smoke":
        print("Too few targets and shadows for a verdict, which is the standard tier's; as far as they show:")
    for found in criteria(table):
        verdict = {True: "met", False: "MISSED", None: "open"}[found.met]
        print(f"{found.name} {verdict}: {found.expected}; {found.found}")
    print(f"{len(table)} rows in {given.out / stem}.csv")


if __name__ == "__main__":
    run_main(main)
