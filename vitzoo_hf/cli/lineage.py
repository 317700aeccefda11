"""The verb that finds lineage: trees and parents from weights alone, scored where the truth is known."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from vitzoo_hf.cli.options import Json, Quiet, Where, hint, open_zoo, print_json, print_table, table_records
from vitzoo_hf.format.atomic import make_folder
from vitzoo_hf.format.messages import counted
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    from vitzoo_hf.apply.lineage.lineage import Forest
    from vitzoo_hf.zoo.zoo import Zoo

Candidates = Annotated[
    list[str] | None,
    Parameter(
        name="--candidates",
        negative=(),
        help="COLUMN=VALUE of the models that are known to be roots, such as stage=pretrain; repeatable. "
        "Final checkpoints only, unless model_id=ID names them.",
    ),
]


def lineage(
    zoo: str,
    *,
    method: str | None = None,
    trees: int | None = None,
    candidates: Candidates = None,
    where: Where = None,
    all_epochs: Annotated[bool, Parameter(negative=())] = False,
    precision: str = "float32",
    out: Path | None = None,
    device: str = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find which models descend from which, from their weights alone; score it where `parent_id` tells the truth.

    hubs takes every tree to be a root and its children: roots without any children come out as children of another.

    Args:
        zoo: Folder, dataset id, or `sample`.
        method: hubs (the default), spanning, mother, mother-reversed; candidates, the default with --candidates.
        trees: How many trees; told from the weights by default.
        all_epochs: Take every kept checkpoint, not final ones alone, and also order the checkpoints of each run.
        precision: Round weights to bfloat16 or float16 first.
        out: Folder for edges.csv, scores.csv and forest.png.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.lineage.epochs import order_epochs
    from vitzoo_hf.apply.lineage.lineage import recover_lineage, truth_of

    if out is not None:
        make_folder(out)
    opened = open_zoo(zoo, where)
    models = opened if all_epochs else opened.filter(is_final=True)
    known = None if candidates is None else _candidate_ids(models, candidates)
    chosen: Any = method or ("hubs" if known is None else "candidates")
    options: dict[str, Any] = {"device": device, "progress": not (json or quiet)}
    forest = recover_lineage(models, method=chosen, trees=trees, candidates=known, precision=precision, **options)
    truth = truth_of(models.to_pandas())
    scores = [] if truth is None else score_records(forest, truth)
    epochs = None
    if all_epochs and models.to_pandas()["run_id"].value_counts().max() >= 3:
        epochs = order_epochs(models, **options)
    elif all_epochs:
        forest.notes.append("no run has three checkpoints here, so there is no order of checkpoints to find")
    if out is not None:
        _write(out, forest, truth, scores, epochs)
    if json:
        value = {"method": forest.method, "trees": forest.num_trees, "notes": forest.notes, "scores": scores}
        if epochs is not None:
            value["epoch_order"] = table_records(epochs)
        print_json(value | {"edges": table_records(forest.edges())})
        return
    _tell(forest, scores, epochs)
    if not quiet:
        hint(
            f"Next: vitzoo lineage {quote(zoo)} --out LINEAGE writes the edges and a picture of the forest"
            if out is None
            else f"Next: look at {out / 'forest.png'}; vitzoo lineage {quote(zoo)} --method mother compares MoTHer"
        )


def score_records(forest: "Forest", truth: Any) -> list[dict[str, Any]]:
    """Each score beside what chance reaches by the same scorer."""
    chance = forest.baselines(truth).set_index(["baseline", "score"])
    records = []
    for score, value in forest.scores(truth).items():
        baseline = "random_direction" if score == "direction_accuracy" else "random_forest"
        record: dict[str, Any] = {"score": score, "value": None if value != value else value}
        record |= {"baseline": baseline, "chance": None, "low": None, "high": None}
        if (baseline, score) in chance.index:
            mean, low, high = map(float, chance.loc[(baseline, score)])
            record |= {"chance": mean, "low": low, "high": high}
        records.append(record)
    return records


def _candidate_ids(models: "Zoo", conditions: list[str]) -> list[str]:
    from vitzoo_hf.format.tables import parse_condition

    wanted = dict(parse_condition(text, models.column_types, "--candidates") for text in conditions)
    chosen = models.filter(**wanted)
    if not len(chosen):
        raise ZooError(f"--candidates {' '.join(conditions)} matches none of the {len(models)} models")
    if "model_id" not in wanted:
        chosen = chosen.filter(is_final=True)
    if not len(chosen):
        raise ZooError(
            f"--candidates {' '.join(conditions)} matches no final checkpoint: others are candidates only by "
            "model_id=ID"
        )
    return chosen.model_ids


def _write(out: Path, forest: "Forest", truth: Any, scores: list[dict[str, Any]], epochs: Any) -> None:
    import pandas as pd

    from vitzoo_hf.apply.lineage.plot import forest_figure, lineage_table

    table = lineage_table(forest, truth)
    try:
        table.to_csv(out / "edges.csv", index=False)
        if scores:
            pd.DataFrame(scores).to_csv(out / "scores.csv", index=False)
        if epochs is not None:
            epochs.to_csv(out / "epochs.csv", index=False)
        forest_figure(table).savefig(out / "forest.png", dpi=110)
    except OSError as error:
        raise ZooError(f"cannot write into {out}: {error.strerror}") from None


def _tell(forest: "Forest", scores: list[dict[str, Any]], epochs: Any) -> None:
    counts = forest.edges()["role"].value_counts()
    models, trees = counted(len(forest.model_ids), "model", "models"), counted(forest.num_trees, "tree", "trees")
    print(f"{models} in {trees} by method {forest.method}")
    print(", ".join(f"{count} × {role}" for role, count in counts.items()))
    for number in forest.orphan_trees:
        count = int((forest.tree == number).sum())
        print(
            f"tree {number} of {counted(count, 'model', 'models')}: its root looks like a sibling, "
            "so the parent may not be among them"
        )
    for note in forest.notes:
        print(note)
    if scores:
        print()
        print_table(scores)
    else:
        print("no model of these has a parent_id, so there is nothing to score by")
    if epochs is not None:
        means = epochs.groupby(["knowledge", "weights"])["kendall_tau"].agg(["mean", "count"]).reset_index()
        print("\norder of each run's checkpoints, Kendall's tau, 0 by chance")
        print_table(table_records(means.rename(columns={"mean": "tau", "count": "runs"})))
