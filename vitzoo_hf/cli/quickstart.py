"""The steps of `vitzoo quickstart`: train a zoo, publish it as a dataset folder, measure it, draw its report.

A step is skipped where its result exists already, so an interrupted quickstart continues.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.evaluation.evaluate import evaluate
from vitzoo_hf.format.atomic import exclusive
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.launch.local import launch
from vitzoo_hf.publish.pack import is_packed, pack
from vitzoo_hf.report.html import write_zoo_report
from vitzoo_hf.zoo.zoo import Zoo


@dataclass(frozen=True)
class Outcome:
    """The results of a quickstart.

    Attributes:
        zoo: the folder of the zoo.
        report: the HTML page.
        already_done: whether every step had been done before.
    """

    zoo: Path
    report: Path
    already_done: bool


def quickstart(
    folder: Path,
    *,
    blueprint: Blueprint,
    workers: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Build, publish, measure and draw a zoo under `folder`.

    Args:
        folder: the parent of `runs/` (checkpoints), `zoo/` (the dataset) and `report/`.
        blueprint: the plan of the zoo.
        workers: number of training processes; by default one per core.
        progress: whether to show progress bars.
        say: a function that prints one line about a step.

    Raises:
        ZooError: if a step fails, or another process works in `folder`.
    """
    runs, place, report = folder / "runs", folder / "zoo", folder / "report" / "report.html"
    # two quickstarts in one folder would train into the same runs
    with exclusive(folder):
        # by fingerprint: an edited blueprint is trained and packed again
        packed = is_packed(blueprint, place)
        # the report comes last, so its file says that the steps before it were done
        if packed and _is_evaluated(place) and report.is_file():
            return Outcome(place, report, already_done=True)
        if not packed:
            say(f"1/4 train   {len(blueprint.runs)} runs of {blueprint.name!r} into {runs}")
            summary = launch(blueprint, runs, workers=workers, progress=progress)
            for run_id, reason in summary.diverged.items():
                say(f"    left out {run_id}: {reason}")
            say(f"2/4 publish {blueprint.num_rows} rows into {place}")
            pack(blueprint, runs, place, progress=progress)
        if not _is_evaluated(place):
            say("3/4 measure every model and every pair of final models")
            zoo = Zoo(place)
            evaluate(zoo, progress=progress).write(place)
        say(f"4/4 draw    {report}")
        write_zoo_report(Zoo(place), report.parent, say=say)
    return Outcome(place, report, already_done=False)


def _is_evaluated(place: Path) -> bool:
    try:
        zoo = Zoo(place)
        # both tables, with a row for every model: anything less is measured again
        return len(zoo.to_pandas("evaluations")) == len(zoo) and "pairs" in zoo.configs
    except ZooError:
        return False


def summary_table(zoo: Zoo) -> pd.DataFrame:
    """Average final models over seeds: one row for each combination of the other factors, best first."""
    table = zoo.to_pandas("evaluations")
    table = table[table["is_final"]]
    # seeds are averaged over; a factor with one value would only widen the table
    factors = [name for name in zoo.factors if not name.endswith("seed") and table[name].nunique(dropna=False) > 1]
    keys = ["stage", "dataset", *factors]
    # dropna=False: a factor that is null for a stage must not remove that stage
    means = table.groupby(keys, dropna=False, sort=False).agg(
        models=("model_id", "size"),
        test_accuracy=("test_accuracy", "mean"),
        test_loss=("test_loss", "mean"),
        test_ece=("test_ece", "mean"),
    )
    means = means.reset_index().sort_values("test_accuracy", ascending=False, na_position="last")
    return means.rename(columns={name: name.removeprefix("factor_") for name in factors})
