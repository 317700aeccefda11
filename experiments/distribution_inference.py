"""Replicate the published synthetic tasks of distribution inference, and write tables, figures and criteria.

python experiments/distribution_inference.py --tier smoke|standard [--only A A-bis B C DMI] [--runs FOLDER]

Interrupted, the same command continues: a finished cell is a table in the folder of --runs and is not run again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from replication import TIERS, cells_of, criteria, gather, run_replication
from replication_plot import plot_replication

from vitzoo_hf.environment import describe
from vitzoo_hf.format.atomic import make_folder
from vitzoo_hf.format.schema import ZooError

HERE = Path(__file__).parents[1] / "results" / "distribution_inference"
EXPERIMENTS = ("A", "A-bis", "B", "C", "DMI")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    try:
        run(given)
    except ZooError as error:
        sys.exit(f"{parser.prog}: {error}")
    except OSError as error:
        sys.exit(f"{parser.prog}: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(f"\n{parser.prog}: interrupted; the same command continues")


def run(given: argparse.Namespace) -> None:
    """Run some cells, then write what all finished cells of the tier show."""
    cells = cells_of(given.tier)
    chosen = [cell for cell in cells if cell.experiment in given.only]
    if not chosen:
        raise ZooError(f"the {given.tier} tier has no cell of {', '.join(given.only)}: give --tier standard")
    runs = given.runs or HERE / f"runs-{given.tier}"
    make_folder(given.out)
    options = {"device": given.device, "stop_after": given.stop_after, "provenance": provenance(), "progress": True}
    left = run_replication(chosen, TIERS[given.tier], runs, **options)
    finished = [cell for cell in cells if (runs / f"{cell.name}.csv").is_file()]
    if finished:
        write(gather(finished, runs), given, whole=len(finished) == len(cells))
    print(f"{left} cells left" if finished else f"{left} cells left, none finished yet: the same command goes on")


def write(table: pd.DataFrame, given: argparse.Namespace, *, whole: bool) -> None:
    """Table and figure under the name of the tier, or as partial ones where cells of it are missing."""
    stem = "replication" if given.tier == "standard" else f"replication_{given.tier}"
    stem += "" if whole else "_partial"
    table.to_csv(given.out / f"{stem}.csv", index=False, float_format="%.5g", lineterminator="\n")
    plot_replication(table).savefig(given.out / f"{stem}.png", dpi=110)
    if given.tier == "smoke":
        print("Too few targets and shadows for a verdict, which is the standard tier's; as far as they show:")
    for found in criteria(table):
        verdict = {True: "met", False: "MISSED", None: "open"}[found.met]
        print(f"{found.name} {verdict}: {found.expected}; {found.found}")
    print(f"{len(table)} rows in {given.out / stem}.csv")


def provenance() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE.parent, capture_output=True, text=True)
    about = {key: str(value) for key, value in describe().items()}
    told = ", ".join(f"{key} {about[key]}" for key in ("system", "cores", "python", "torch", "numpy"))
    return f"{told}, commit {commit.stdout.strip()}"


if __name__ == "__main__":
    main()
