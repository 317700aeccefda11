"""Distribution inference on zoos of ViTs, cell by cell: trained, packed, attacked; what is finished is kept.

python experiments/distribution_inference/world_cells.py --folder FOLDER [--only null dmi_erm ...]

A cell is a blueprint of `vitzoo_hf/blueprints/distribution_inference/`, or a part of one: two levels of a secret, or
one level of what else it varies. Zoos and finished cells lie in FOLDER. Writes `distribution_inference/worlds.csv`,
with a row a cell and attack, and `worlds.json`, with machine, versions and commit.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import pandas as pd
from harness import (
    RESULTS,
    WORLDS,
    cell_files,
    parser,
    provenance,
    run_main,
    write_cell,
    write_provenance,
    write_table,
)
from sklearn.metrics import roc_curve

from vitzoo_hf.apply.distribution_inference.membership import membership_attack
from vitzoo_hf.apply.distribution_inference.reliance import world_behaviour
from vitzoo_hf.apply.distribution_inference.zoo_attacks import BY_DEFAULT, Report, attack_zoo
from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.launch.local import launch
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.zoo import Zoo

HERE = RESULTS / "distribution_inference"
LEARNERS = ("erm", "causal", "irm", "v_rex", "group_dro", "resample", "colour_randomised", "irm_product")
CONTROLS = ("early_stop", "label_smoothing", "weight_decay", "dp_sgd")
MEMBERSHIP = ("null", "label_ratio_scratch", "label_ratio_few_images", "label_ratio_resampled")
"""Cells in which membership of single images is tried too."""
OF_LABELS = ["kl_test", "calibrated_kl_test", "meta_classifier"]
WITH_SCORES = ("kl_test", "per_point_threshold_test", "threshold_test", "meta_classifier", "ridge_on_outputs")
ROC_CELLS = ("dmi_erm", "dmi_irm", "dmi_resample", "dmi_causal", "label_ratio_few_images", "null")
OTHER = {"scratch": "other_architecture", "few_images": "few_images_other_architecture"}
"""Label ratio cell -> blueprint of shadows of another architecture."""


class Cell(NamedTuple):
    """A blueprint, the column of the secret, and how the game differs from the plain one.

    Attributes:
        blueprint: of targets, and of shadows by default.
        secret: column.
        kept: conditions on rows.
        unequal: whether training may differ between secrets.
        shadows: the blueprint of shadows of another architecture.
        shuffled: whether shadows' secrets are, as a control.
    """

    blueprint: str
    secret: str
    kept: Mapping[str, Any] = MappingProxyType({})
    unequal: bool = False
    shadows: str | None = None
    shuffled: bool = False

    @property
    def name(self) -> str:
        parts = [self.blueprint, *(f"{key.removeprefix('factor_')}={value}" for key, value in self.kept.items())]
        parts += [f"shadows={self.shadows}"] if self.shadows else []
        return "-".join([*parts, *(["shuffled"] if self.shuffled else [])]).replace(" ", "")


def cells() -> Iterator[Cell]:
    yield Cell("null", "nominal")
    # Controls: an attack that beats chance on these reads the harness and not a model.
    yield Cell("null", "nominal", shuffled=True)
    for kind in ("scratch", "finetuned", "own_heads", "few_images", "resampled"):
        yield Cell(f"label_ratio_{kind}", "label_ratio")
    yield Cell("label_ratio_scratch", "label_ratio", shuffled=True)
    for kind in ("scratch", "few_images"):
        yield Cell(f"label_ratio_{kind}", "label_ratio", shadows=f"label_ratio_{OTHER[kind]}")
    yield Cell("colour_agreement", "colour_agreement")
    for learner in (*LEARNERS, *CONTROLS):
        # Early stopping takes as many steps as the loss asks for, which the guard refuses by default.
        yield Cell(f"dmi_{learner}", "last_environment", unequal=learner == "early_stop")
    for rate in (0.02, 0.05, 0.1, 0.2):
        yield Cell("s1_region_rule", "flip_rate", {"factor_flip_rate": [0.0, rate]})
    for level in (0.0, 0.25, 0.35, 0.45):
        yield Cell("s1_bis_early_stop", "flip_rate", {"factor_stop_loss": level}, unequal=level > 0)
    for kind in ("uncontrolled", "equal_steps", "equalised"):
        # The side channel is the very difference that the guard refuses.
        yield Cell(f"sc_{kind}", "num_images", unequal=kind != "equalised")
    for capacity in ("linear", "narrow", "depth1", "full"):
        yield Cell(f"s2_{capacity}", "group_ratio")
    for count in (128, 512, 2048, 8192):
        yield Cell("s3_finite_data", "group_ratio", {"factor_num_images": count})
    for weight in (1.0, 10.0, 100.0, 1000.0, 10000.0):
        yield Cell("dmi_irm_weights", "last_environment", {"factor_penalty_weight": weight})


def main() -> None:
    options = parser(__doc__, WORLDS)
    options.add_argument("--only", nargs="+", default=[], help="blueprints")
    arguments = options.parse_args()
    for part in ("cells", "guesses"):
        (arguments.folder / part).mkdir(parents=True, exist_ok=True)
    every = [Cell("smoke", "label_ratio")] if arguments.smoke else cells()
    planned = [cell for cell in every if not arguments.only or cell.blueprint in arguments.only]
    start, made = time.perf_counter(), 0
    for number, cell in enumerate(planned):
        if not file_of(cell, arguments.folder).is_file():
            measure(cell, arguments.folder, arguments.workers)
            made += 1
            # At most: finished cells that follow are counted, and cost nothing.
            left = (time.perf_counter() - start) / made * (len(planned) - number - 1)
            print(f"{cell.name}: done; at most {left / 60:.0f} minutes left", flush=True)
    write(arguments.folder, arguments.folder if arguments.smoke else HERE)


def file_of(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name}.csv"


def measure(cell: Cell, folder: Path, workers: int) -> None:
    targets = zoo_of(cell.blueprint, folder, workers).filter(is_final=True, **cell.kept)
    shadows = zoo_of(cell.shadows, folder, workers) if cell.shadows else None
    game: dict[str, Any] = {"shadows": shadows, "unequal": cell.unequal, "shuffled": cell.shuffled}
    game["cache"] = folder / "outputs"
    # Shadows of another architecture have weights of another layout.
    seen = "probabilities" if cell.shadows else "weights"
    flat = cell.blueprint.startswith("label_ratio") and not (cell.shadows or cell.shuffled)
    names = [*BY_DEFAULT, "flat_mlp"] if flat else None
    reports = [attack_zoo(targets, cell.secret, access=seen, attacks=names, **game)]
    reports += [attack_zoo(targets, cell.secret, access="labels", attacks=OF_LABELS, **game)]
    about = {"cell": cell.name, "blueprint": cell.blueprint, "secret": cell.secret, "shuffled": cell.shuffled}
    about |= {"knowledge": "other architecture" if cell.shadows else "same architecture"}
    about |= {name: reports[0].facts[name] for name in ("targets", "shadows", "prior_risk")}
    about |= {"diverged": diverged(cell, targets)} | facts(targets.filter(factor_role="target"))
    write_cell(reports[0].guesses, folder / "guesses" / f"{cell.name}.csv")
    tables = [with_r2(report) for report in reports]
    if cell.name in MEMBERSHIP:
        for held_out in (False, True):
            tables.append(membership_attack(targets, cell.secret, held_out=held_out).assign(access="membership"))
    # Last, as this file is what says that the cell is finished.
    write_cell(pd.concat(tables).assign(**about), file_of(cell, folder))


def with_r2(report: Report) -> pd.DataFrame:
    """The table, with the share of the secret's variance over targets that an attack on a number explains."""
    if report.facts["metric"] == "accuracy":
        return report.table.assign(r2=None)
    truth = report.guesses[report.facts["secret"]]
    errors = report.guesses[report.table["attack"]].sub(truth, axis=0).pow(2).mean()
    return report.table.assign(r2=(1 - errors / truth.var(ddof=0)).to_numpy())


def diverged(cell: Cell, zoo: Zoo) -> int:
    """Runs of the cell, of either role, that are not in the zoo: they are left out, not counted as guesses."""
    lost = [
        run
        for run in Blueprint.load(f"distribution_inference/{cell.blueprint}").runs
        if run.run_id in zoo.manifest["missing_runs"]
    ]
    known = {
        name.removeprefix("factor_"): value if isinstance(value, list) else [value]
        for name, value in cell.kept.items()
    }
    return sum(all(run.factors[name] in values for name, values in known.items()) for run in lost)


def facts(targets: Zoo) -> dict[str, float]:
    """Means over targets: accuracy on test images, also in other colours, reliance on colour, losses."""
    behaviour = world_behaviour(targets, progress=False)
    index = targets.to_pandas()
    found = {name: float(behaviour[name].mean()) for name in behaviour.columns if name != "model_id"}
    trained = ("train_loss", "train_accuracy", "test_loss", "generalization_gap", "factor_trained_steps")
    found |= {name.removeprefix("factor_"): float(index[name].mean()) for name in trained if name in index}
    return found


def zoo_of(blueprint: str, folder: Path, workers: int) -> Zoo:
    place = folder / "zoos" / blueprint
    if not (place / "zoo.json").is_file():
        chosen = Blueprint.load(f"distribution_inference/{blueprint}")
        launch(chosen, folder / "runs" / blueprint, workers=workers, progress=False)
        pack(chosen, folder / "runs" / blueprint, place, progress=False)
    return Zoo(place)


def write(folder: Path, out: Path) -> None:
    """Merge the finished cells of a folder into the tables of results."""
    table = pd.concat([read(file) for file in cell_files(folder / "cells")], ignore_index=True)
    worlds = out / "worlds.csv"
    write_table(with_all_columns(table, worlds), worlds, ["cell"])
    curves = roc(table, folder)
    if len(curves):
        write_table(curves, out / "roc.csv", ["cell"], digits=4)
    write_provenance(out / "worlds.json", provenance(), merged=True)
    print(table[["cell", "attack", "access", "value", "low", "high", "advantage"]].to_string(index=False))


def read(file: Path) -> pd.DataFrame:
    """Read a table in which one cell is called null, and an empty field is a missing number."""
    return pd.read_csv(file, keep_default_na=False, na_values=[""])


def with_all_columns(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Add the columns of the stored table that no cell of this run measures, such as membership, as empty ones."""
    if not file.is_file():
        return table
    columns = read(file).columns
    # A column that the stored table lacks stays, and write_table refuses it.
    return table.reindex(columns=[*columns, *(name for name in table if name not in columns)])


def roc(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Points of the ROC curves of some cells, each of the attack on outputs that is best on held-out shadows."""
    seen = table[(table["access"] == "probabilities") & table["attack"].isin(WITH_SCORES)]
    parts = []
    for cell, rows in seen[seen["cell"].isin(ROC_CELLS)].groupby("cell"):
        attack = rows.set_index("attack")["shadow_value"].idxmax()
        guesses = pd.read_csv(folder / "guesses" / f"{cell}.csv")
        positive = guesses.iloc[:, 1] == guesses.iloc[:, 1].max()
        false, true, _ = roc_curve(positive, guesses[f"{attack}_score"])
        points = {"false_positive_rate": false, "true_positive_rate": true}
        parts.append(pd.DataFrame({"cell": cell, "attack": attack} | points))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


if __name__ == "__main__":
    run_main(main)
