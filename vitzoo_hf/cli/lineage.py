"""The verb `lineage`: recover trees and parents from weights alone, scored where the true parents are known."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vitzoo_hf.cli.options import Json, Quiet, Where, hint, open_zoo, print_json, print_table, writing_into
from vitzoo_hf.format.atomic import make_folder
from vitzoo_hf.format.messages import counted
from vitzoo_hf.format.schema import ZooError

if TYPE_CHECKING:
    import pandas

    from vitzoo_hf.apply.lineage.lineage import Forest
    from vitzoo_hf.apply.lineage.metrics import Truth
    from vitzoo_hf.zoo.zoo import Zoo

Candidates = Annotated[
    list[str] | None,
    Parameter(
        name="--candidates",
        negative=(),
        help="Condition COLUMN=VALUE for the models that are known to be roots, such as stage=pretrain; repeatable. "
        "Only final checkpoints are candidates, unless model_id=ID names another one.",
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
    """Recover from weights alone which model descends from which, and score the result where `parent_id` is known.

    The method hubs assumes that every root has children. A root without any is reported as a child of another root.

    Args:
        zoo: Folder, dataset id, or `sample`.
        method: hubs (the default), spanning, mother, mother-reversed, or candidates (the default with --candidates).
        trees: Number of trees; by default estimated from the weights.
        all_epochs: Use every stored checkpoint instead of final ones, and order the checkpoints of each run too.
        precision: Round the weights to bfloat16 or float16 first.
        out: Folder for edges.csv, scores.csv and forest.png.
        device: cpu or cuda.
    """
    from vitzoo_hf.apply.lineage.epochs import order_epochs
    from vitzoo_hf.apply.lineage.lineage import recover_lineage, truth_of

    if out is not None:
        make_folder(out)
    opened = open_zoo(zoo, where)
    models = opened if all_epochs else opened.filter(is_final=True)
    roots = None if candidates is None else _candidate_ids(models, candidates)
    progress = not (json or quiet)
    forest = recover_lineage(
        models,
        method=method or ("hubs" if roots is None else "candidates"),
        trees=trees,
        candidates=roots,
        precision=precision,
        device=device,
        progress=progress,
    )
    truth = truth_of(models.to_pandas())
    scores = [] if truth is None else score_records(forest, truth)
    epochs = None
    # an order of two checkpoints is right by chance half the time
    if all_epochs and models.to_pandas()["run_id"].value_counts().max() >= 3:
        epochs = order_epochs(models, device=device, progress=progress)
    elif all_epochs:
        forest.notes.append("no run has three checkpoints, so the order of checkpoints was not estimated")
    if out is not None:
        _write(out, forest, truth, scores, epochs)
    if json:
        _print_json(forest, scores, epochs)
        return
    _tell(forest, scores, epochs)
    if not quiet:
        _hint(zoo, out)


def _print_json(forest: "Forest", scores: list[dict[str, object]], epochs: "pandas.DataFrame | None") -> None:
    order = {} if epochs is None else {"epoch_order": epochs}
    value = {"method": forest.method, "trees": forest.num_trees, "notes": forest.notes, "scores": scores}
    print_json(value | order | {"edges": forest.edges()})


def _hint(zoo: str, out: Path | None) -> None:
    hint(
        f"Next: vitzoo lineage {quote(zoo)} --out LINEAGE writes the edges and a picture of the forest"
        if out is None
        else f"Next: look at {out / 'forest.png'}; vitzoo lineage {quote(zoo)} --method mother compares MoTHer"
    )


def score_records(forest: "Forest", truth: "Truth") -> list[dict[str, object]]:
    """List every score with its value at chance level, computed by the same scorer."""
    # by the same scorer, so that a score and its chance level are comparable
    chance = forest.baselines(truth).set_index(["baseline", "score"])
    records = []
    for score, value in forest.scores(truth).items():
        # a direction is compared with random directions, every other score with random forests
        baseline = "random_direction" if score == "direction_accuracy" else "random_forest"
        # JSON has no NaN, which a score is where this forest does not define it
        record: dict[str, object] = {"score": score, "value": None if value != value else value}
        record |= {"baseline": baseline, "chance": None, "low": None, "high": None}
        if (baseline, score) in chance.index:
            mean, low, high = map(float, chance.loc[(baseline, score)])
            record |= {"chance": mean, "low": low, "high": high}
        records.append(record)
    return records


def _candidate_ids(models: "Zoo", conditions: list[str]) -> list[str]:
    from vitzoo_hf.format.tables import parse_condition

    values = dict(parse_condition(text, models.column_types, "--candidates") for text in conditions)
    candidates = models.filter(**values)
    if not len(candidates):
        raise ZooError(f"--candidates {' '.join(conditions)} matches none of the {len(models)} models")
    # ids name checkpoints exactly; other conditions match every epoch of a run
    if "model_id" not in values:
        candidates = candidates.filter(is_final=True)
    if not len(candidates):
        raise ZooError(
            f"--candidates {' '.join(conditions)} matches no final checkpoint: name other checkpoints by model_id=ID"
        )
    return candidates.model_ids


def _write(
    out: Path,
    forest: "Forest",
    truth: "Truth | None",
    scores: list[dict[str, object]],
    epochs: "pandas.DataFrame | None",
) -> None:
    import pandas as pd

    from vitzoo_hf.apply.lineage.plot import forest_figure, lineage_table

    table = lineage_table(forest, truth)
    with writing_into(out):
        table.to_csv(out / "edges.csv", index=False)
        if scores:
            pd.DataFrame(scores).to_csv(out / "scores.csv", index=False)
        if epochs is not None:
            epochs.to_csv(out / "epochs.csv", index=False)
        forest_figure(table).savefig(out / "forest.png", dpi=110)


def _tell(forest: "Forest", scores: list[dict[str, object]], epochs: "pandas.DataFrame | None") -> None:
    counts = forest.edges()["role"].value_counts()
    models, trees = counted(len(forest.model_ids), "model", "models"), counted(forest.num_trees, "tree", "trees")
    print(f"{models} in {trees} by method {forest.method}")
    print(", ".join(f"{count} × {role}" for role, count in counts.items()))
    for number in forest.orphan_trees:
        count = int((forest.tree == number).sum())
        print(
            f"tree {number} of {counted(count, 'model', 'models')}: its root looks like a sibling, "
            "so the parent may not be in the zoo"
        )
    for note in forest.notes:
        print(note)
    if scores:
        print()
        print_table(scores)
    else:
        print("none of these models has a parent_id, so the result is not scored")
    if epochs is not None:
        means = epochs.groupby(["knowledge", "weights"])["kendall_tau"].agg(["mean", "count"]).reset_index()
        print("\norder of the checkpoints of each run: Kendall's tau, which is 0 at chance level")
        print_table(means.rename(columns={"mean": "tau", "count": "runs"}))
