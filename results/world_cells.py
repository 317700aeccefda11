"""Distribution inference on zoos of ViTs, cell by cell: trained, packed, attacked; what is finished is kept.

python results/world_cells.py --folder FOLDER [--only null dmi_erm ...]

A cell is a blueprint of `vitzoo_hf/blueprints/distribution_inference/`, or a part of one: two levels of a secret, or
one level of what else it varies. Zoos and finished cells lie in FOLDER. Writes `distribution_inference/worlds.csv`,
with a row a cell and attack, and `worlds.json`, with machine, versions and commit.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from vitzoo_hf.apply.distribution_inference.reliance import world_behaviour
from vitzoo_hf.apply.distribution_inference.zoo_attacks import attack_zoo
from vitzoo_hf.blueprint import Blueprint
from vitzoo_hf.environment import describe
from vitzoo_hf.launch import launch
from vitzoo_hf.pack import pack
from vitzoo_hf.zoo import Zoo

HERE = Path(__file__).parent / "distribution_inference"
LEARNERS = ("erm", "causal", "irm", "v_rex", "group_dro", "resample", "colour_randomised", "irm_product")
CONTROLS = ("early_stop", "label_smoothing", "weight_decay")


class Cell(NamedTuple):
    """A blueprint, the column of the secret, what of it is kept, and whether training may differ between secrets."""

    blueprint: str
    secret: str
    kept: dict[str, Any]
    unequal: bool = False

    @property
    def name(self) -> str:
        return "-".join([self.blueprint, *(f"{key}={value}" for key, value in self.kept.items())]).replace(" ", "")


def cells() -> Iterator[Cell]:
    yield Cell("null", "nominal", {})
    yield Cell("label_ratio_finetuned", "label_ratio", {})
    yield Cell("label_ratio_scratch", "label_ratio", {})
    for learner in LEARNERS[:2]:
        yield Cell(f"dmi_{learner}", "last_environment", {})
    for rate in (0.02, 0.05, 0.1, 0.2):
        yield Cell("s1_region_rule", "flip_rate", {"factor_flip_rate": [0.0, rate]})
    yield Cell("colour_agreement", "colour_agreement", {})
    for learner in (*LEARNERS[2:], *CONTROLS):
        yield Cell(f"dmi_{learner}", "last_environment", {})
    yield Cell("label_ratio_resampled", "label_ratio", {})
    for kind in ("uncontrolled", "equal_steps", "equalised"):
        yield Cell(f"sc_{kind}", "num_images", {}, kind != "equalised")
    for level in (0.0, 0.25, 0.35, 0.45):
        yield Cell("s1_bis_early_stop", "flip_rate", {"factor_stop_loss": level}, level > 0)
    for capacity in ("linear", "narrow", "depth1", "full"):
        yield Cell(f"s2_{capacity}", "group_ratio", {})
    for count in (128, 512, 2048, 8192):
        yield Cell("s3_finite_data", "group_ratio", {"factor_num_images": count})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[], help="blueprints")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    (arguments.folder / "cells").mkdir(parents=True, exist_ok=True)
    planned = [cell for cell in cells() if not arguments.only or cell.blueprint in arguments.only]
    start, made = time.perf_counter(), 0
    for number, cell in enumerate(planned):
        if not file_of(cell, arguments.folder).is_file():
            measure(cell, arguments.folder, arguments.workers)
            made += 1
            left = (time.perf_counter() - start) / made * (len(planned) - number - 1)
            print(f"{cell.name}: done; at most {left / 60:.0f} minutes left", flush=True)
    write(arguments.folder)


def file_of(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name}.csv"


def measure(cell: Cell, folder: Path, workers: int) -> None:
    zoo = zoo_of(cell.blueprint, folder, workers)
    part = zoo.filter(is_final=True, **cell.kept)
    report = attack_zoo(part, cell.secret, access="weights", unequal=cell.unequal)
    labels = attack_zoo(part, cell.secret, access="labels", attacks=["kl_test"], unequal=cell.unequal)
    roles = part.to_pandas()["factor_role"].value_counts()
    targets = part.filter(factor_role="target")
    about = {"cell": cell.name, "blueprint": cell.blueprint, "secret": cell.secret, **facts(targets)}
    about |= {"targets": int(roles["target"]), "shadows": int(roles["shadow"])}
    pd.concat([report.table, labels.table]).assign(**about).to_csv(file_of(cell, folder), index=False)


def facts(targets: Zoo) -> dict[str, float]:
    """Of targets, means: accuracy on test images, on flipped colours where there are any, reliance on colour."""
    table = world_behaviour(targets)
    return {name: float(table[name].mean()) for name in table.columns if name != "model_id"}


def zoo_of(blueprint: str, folder: Path, workers: int) -> Zoo:
    place = folder / "zoos" / blueprint
    if not (place / "zoo.json").is_file():
        chosen = Blueprint.load(f"distribution_inference/{blueprint}")
        launch(chosen, folder / "runs" / blueprint, workers=workers, progress=False)
        pack(chosen, folder / "runs" / blueprint, place, progress=False)
    return Zoo(place)


def write(folder: Path) -> None:
    HERE.mkdir(exist_ok=True)
    files = sorted((folder / "cells").glob("*.csv"))
    plain = {"keep_default_na": False, "na_values": [""]}  # a cell is called null
    table = pd.concat([pd.read_csv(file, **plain) for file in files], ignore_index=True)
    table.to_csv(HERE / "worlds.csv", index=False, float_format="%.6g")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    record = {key: str(value) for key, value in describe().items()} | {"commit": commit.stdout.strip()}
    (HERE / "worlds.json").write_text(json.dumps(record | {"date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")
    print(table[["cell", "attack", "access", "value", "low", "high", "advantage"]].to_string(index=False))


if __name__ == "__main__":
    main()
