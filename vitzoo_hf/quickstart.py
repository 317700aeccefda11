"""The whole way at once: train a zoo, publish it as a dataset folder, open it, measure it, draw it.

Every step is skipped where its result is already there, so an interrupted quickstart continues.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from vitzoo_hf.blueprint import Blueprint
from vitzoo_hf.evaluate import common_dataset, evaluate, layer_similarity
from vitzoo_hf.folders import exclusive
from vitzoo_hf.launch import launch
from vitzoo_hf.pack import is_packed, pack
from vitzoo_hf.report import write_report
from vitzoo_hf.schema import ZooError
from vitzoo_hf.zoo import Zoo

LAYER_MODELS = 4
LAYER_IMAGES = 500


@dataclass(frozen=True)
class Outcome:
    """Where quickstart left its results, and whether it had anything to do."""

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
    """Build, publish, open and measure a zoo under `folder`.

    Args:
        folder: gets `runs/` (checkpoints), `zoo/` (the dataset) and `report/`.
        blueprint: what to build.
        workers: training processes; by default one a core.
        progress: show bars.
        say: told what happens, a line at a time.

    Raises:
        ZooError: if a step fails, or another process works in `folder`.
    """
    runs, place, report = folder / "runs", folder / "zoo", folder / "report" / "report.html"
    with exclusive(folder):
        packed = is_packed(blueprint, place)
        done = packed and _is_evaluated(place) and report.is_file()
        if done:
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
        return len(zoo.to_pandas("evaluations")) == len(zoo) and "pairs" in zoo.configs
    except ZooError:
        return False


def write_zoo_report(zoo: Zoo, folder: Path, *, say: Callable[[str], None] = print) -> Path:
    """Figures, their data and a self-contained `report.html` of an evaluated zoo.

    Blocks are compared for up to 4 models on up to 500 test images that the zoo carries.

    Args:
        zoo: an evaluated zoo.
        folder: created where missing.
        say: told why blocks are not compared.

    Raises:
        ZooError: if the zoo is not evaluated, or the folder cannot be written.
    """
    index, evaluations = zoo.to_pandas(), zoo.to_pandas("evaluations")
    final = index[index["is_final"]]
    facts = {
        "models": f"{len(final)} ({(final['stage'] == 'pretrain').sum()} pre-trained)",
        "rows": f"{len(index)} checkpoints",
        "parameters": f"{index['num_parameters'].min():,}–{index['num_parameters'].max():,}",
        "architecture": ", ".join(sorted(set(index["architecture"]))),
        "images": ", ".join(dict.fromkeys(index["dataset"])),
    }
    return write_report(
        index,
        evaluations,
        zoo.to_pandas("pairs"),
        folder,
        title=zoo.manifest["name"],
        facts=facts,
        layers=_layers(zoo, evaluations, say),
    )


def models_to_compare(evaluations: pd.DataFrame) -> pd.DataFrame:
    """The best final model of each of up to 4 parents: by selection accuracy, else the first in the zoo.

    Fine-tuned models where there are any, on the dataset that most of them have; a model without a parent counts as
    a lineage of its own. Fine-tuned models that have no test accuracy, since their training diverged, are left out.

    Args:
        evaluations: columns `model_id`, `parent_id`, `stage`, `is_final`, `dataset`, `selection_accuracy`,
            `test_accuracy`.

    Returns:
        Rows of `evaluations`, in their order.
    """
    final = evaluations[evaluations["is_final"]]
    tuned = final[(final["stage"] == "finetune") & final["test_accuracy"].notna()]
    final = final[final["stage"] != "finetune"] if tuned.empty else tuned
    final = final[final["dataset"] == common_dataset(final)] if len(final) else final
    lineage = final["parent_id"].fillna(final["model_id"])
    order = final.sort_values("selection_accuracy", ascending=False, kind="stable", na_position="last").index
    return final.loc[order][~lineage[order].duplicated()].head(LAYER_MODELS).sort_index()


def _layers(zoo: Zoo, evaluations: pd.DataFrame, say: Callable[[str], None]) -> pd.DataFrame | None:
    chosen = models_to_compare(evaluations[evaluations["model_id"].isin(zoo.model_ids)])
    if chosen.empty:
        say("blocks are not compared layer by layer: no final model has finite outputs")
        return None
    try:
        images, _ = zoo.probes(str(chosen["dataset"].iloc[0]))
    except ZooError as error:
        say(f"blocks are not compared layer by layer: {error}")
        return None
    return layer_similarity(zoo.filter(model_id=list(chosen["model_id"])), images[:LAYER_IMAGES])


def summary_table(zoo: Zoo) -> pd.DataFrame:
    """Final models, averaged over seeds: one row a combination of the other factors, best first."""
    table = zoo.to_pandas("evaluations")
    table = table[table["is_final"]]
    factors = [name for name in zoo.factors if not name.endswith("seed") and table[name].nunique(dropna=False) > 1]
    keys = ["stage", "dataset", *factors]
    means = table.groupby(keys, dropna=False, sort=False).agg(
        models=("model_id", "size"),
        test_accuracy=("test_accuracy", "mean"),
        test_loss=("test_loss", "mean"),
        test_ece=("test_ece", "mean"),
    )
    means = means.reset_index().sort_values("test_accuracy", ascending=False, na_position="last")
    return means.rename(columns={name: name.removeprefix("factor_") for name in factors})
