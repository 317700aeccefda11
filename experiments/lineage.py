"""Recover the lineage of zoos in easy and hard cases, and write tables, figures and README.md into results/lineage.

python experiments/lineage.py [ZOO …]

A zoo is named by its blueprint. README.md is written from the CSV files of all zoos that are there, also where no zoo
is given, below the text of `lineage/about.md`.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from harness import RESULTS, markdown, parser, provenance_line, run_main, save_figure, write_table

from vitzoo_hf.apply.lineage.costs import TrunkMeasures, measure_trunks
from vitzoo_hf.apply.lineage.epochs import order_epochs, random_taus
from vitzoo_hf.apply.lineage.lineage import Forest, forest_of
from vitzoo_hf.apply.lineage.metrics import SCORES, Truth, truth_of
from vitzoo_hf.apply.lineage.plot import forest_figure, lineage_table
from vitzoo_hf.zoo import Zoo

HERE = RESULTS / "lineage"
CASES = {
    "final": "all final models",
    "bf16": "the same, weights rounded to bfloat16",
    "high lr": "pre-trained models and the children of AdamW, lr 0.003",
    "children": "children alone, all parents left out",
    "adamw children": "children of AdamW alone, all parents left out",
    "epochs": "every kept checkpoint a node",
}
ORDERED = ["stage", "factor_optimizer", "factor_lr", "knowledge", "weights", "checkpoints"]
"""Columns that tell groups of runs apart whose checkpoints are ordered."""
SHOWN = ("tree_accuracy", "edge_precision", "edge_recall", "direction_accuracy", "root_accuracy")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("zoos", nargs="*", type=Path)
    for path in options.parse_args().zoos:
        zoo = Zoo(path)
        name = zoo.manifest["name"]
        start = time.perf_counter()
        rows, missing = [], []
        for case, models, precision in cases(zoo):
            scores, orphans = measure(name, case, models, precision)
            rows += scores
            missing += orphans
            print(f"{name}: {case} after {time.perf_counter() - start:.0f} s", flush=True)
        missing += left_out_one_by_one(name, zoo.filter(is_final=True))
        write(pd.DataFrame(rows), f"{name}.csv", ["zoo", "case"])
        write(pd.DataFrame(missing), f"{name}_missing_parents.csv", ["zoo", "rule", "case"])
        write(epoch_table(name, zoo), f"{name}_epochs.csv", ["zoo", *ORDERED])
        write(wrong_edges(name, zoo.filter(is_final=True)), f"{name}_wrong_edges.csv", ["zoo", "method"])
    (HERE / "README.md").write_text(readme(), encoding="utf-8")


def write(table: pd.DataFrame, file: str, keys: list[str]) -> None:
    write_table(table.assign(provenance=provenance_line()), HERE / file, keys, digits=5)


def cases(zoo: Zoo) -> Iterator[tuple[str, Zoo, str]]:
    final = zoo.filter(is_final=True)
    index = final.to_pandas()
    children = final.filter(stage="finetune")
    high = (index["stage"] == "pretrain") | ((index["factor_optimizer"] == "adamw") & (index["factor_lr"] == 3e-3))
    yield "final", final, "float32"
    yield "bf16", final, "bfloat16"
    yield "high lr", final.filter(model_id=list(index.loc[high, "model_id"])), "float32"
    yield "children", children, "float32"
    yield "adamw children", children.filter(factor_optimizer="adamw"), "float32"
    yield "epochs", zoo, "float32"


def measure(name: str, case: str, models: Zoo, precision: str) -> tuple[list[dict], list[dict]]:
    index = models.to_pandas()
    truth = truth_of(index)
    assert truth is not None
    columns = models.weight_columns()
    measures = measure_trunks(columns, precision=precision)
    count = int(truth.tree.max()) + 1
    rows, orphans = [], []
    for method in ("hubs", "spanning", "mother", "mother-reversed"):
        for given in (None, count):
            forest = forest_of(measures, columns, method, trees=given, precision=precision)
            rows += score_rows({"zoo": name, "case": case, "method": method}, forest, truth, given)
            if method == "hubs" and given is None:
                orphans.append(missing_row(name, case, forest, truth, measures))
                if case in ("final", "high lr"):
                    picture(name, case, forest, truth)
            if case == "final" and given == count and method == "mother":
                picture(name, f"{case} {method}", forest, truth)
    known = (index["stage"] == "pretrain").to_numpy() & index["is_final"].to_numpy()
    # Cases of children alone hold no candidate for a parent.
    if known.any():
        forest = forest_of(measures, columns, "candidates", roots=known)
        rows += score_rows({"zoo": name, "case": case, "method": "candidates"}, forest, truth, None)
    return rows, orphans


def score_rows(about: dict, forest: Forest, truth: Truth, given: int | None) -> list[dict]:
    chance = forest.baselines(truth).set_index(["baseline", "score"])
    found = forest.scores(truth)
    rows = []
    for score in SCORES:
        # Direction is scored on recovered edges, so that chance turns each of these and draws no new ones.
        baseline = "random_direction" if score == "direction_accuracy" else "random_forest"
        row = about | {"trees_given": given is not None, "models": len(forest.model_ids)}
        row |= {"trees_found": forest.num_trees, "true_trees": int(truth.tree.max()) + 1}
        row |= {"edges_found": int((forest.parent >= 0).sum()), "score": score, "value": found[score]}
        if (baseline, score) in chance.index:
            mean, low, high = chance.loc[(baseline, score)]
            row |= {"baseline": baseline, "chance": mean, "chance_low": low, "chance_high": high}
        rows.append(row)
    return rows


def missing_row(name: str, case: str, forest: Forest, truth: Truth, measures: TrunkMeasures) -> dict:
    """Trees whose parent is missing in truth, and by the rule of method hubs."""
    said = set(forest.orphan_trees)
    here = [bool(set(truth.roots) & set(np.flatnonzero(forest.tree == tree))) for tree in range(forest.num_trees)]
    return {
        "zoo": name,
        "rule": "sibling (roots unknown), per tree",
        "case": case,
        "parent_present": sum(here),
        "false_positives": sum(present and tree in said for tree, present in enumerate(here)),
        "parent_missing": here.count(False),
        "false_negatives": sum(not present and tree not in said for tree, present in enumerate(here)),
    }


def left_out_one_by_one(name: str, final: Zoo) -> list[dict]:
    """Each pre-trained model is left out in turn, and its children have no parent among the candidates."""
    columns = final.weight_columns()
    measures = measure_trunks(columns)
    index = final.to_pandas()
    truth = truth_of(index)
    assert truth is not None
    known = (index["stage"] == "pretrain").to_numpy()
    refused_wrongly = present = kept_wrongly = missing = 0
    for left_out in np.flatnonzero(known):
        kept = np.arange(len(known)) != left_out
        # Measured once and cut: leaving a model out changes no distance between the others.
        part = TrunkMeasures(
            [measures.model_ids[row] for row in np.flatnonzero(kept)],
            measures.distance[np.ix_(kept, kept)],
            measures.mean_absolute[np.ix_(kept, kept)],
            measures.kurtosis[kept],
        )
        parent = forest_of(part, columns, "candidates", roots=known[kept]).parent
        true = truth.parent[kept]
        orphan, child = true == left_out, (true >= 0) & (true != left_out)
        missing, kept_wrongly = missing + orphan.sum(), kept_wrongly + (orphan & (parent >= 0)).sum()
        present, refused_wrongly = present + child.sum(), refused_wrongly + (child & (parent < 0)).sum()
    row = {"zoo": name, "rule": "projection (candidates known), per child", "case": "each parent left out in turn"}
    row |= {"parent_present": present, "false_positives": refused_wrongly}
    return [row | {"parent_missing": missing, "false_negatives": kept_wrongly}]


def epoch_table(name: str, zoo: Zoo) -> pd.DataFrame:
    found = order_epochs(zoo, progress=False)
    runs = zoo.to_pandas().drop_duplicates("run_id").set_index("run_id")
    found = found.join(runs[["stage", "factor_optimizer", "factor_lr"]], on="run_id")
    # A zoo has few pre-training runs: split by factors, their groups would be of one or two.
    found["factor_optimizer"] = found["factor_optimizer"].astype(object).where(found["stage"] == "finetune", "all")
    found["factor_lr"] = found["factor_lr"].astype(float).where(found["stage"] == "finetune", np.nan)
    rows = []
    for values, group in found.groupby(ORDERED, dropna=False):
        low, high = np.quantile(random_taus(int(values[-1]), len(group)), [0.025, 0.975])
        row = {"zoo": name} | dict(zip(ORDERED, values, strict=True)) | {"runs": len(group)}
        row |= {"kendall_tau": group["kendall_tau"].mean(), "absolute_tau": group["kendall_tau"].abs().mean()}
        rows.append(row | {"chance": 0.0, "chance_low": low, "chance_high": high})
    return pd.DataFrame(rows)


def wrong_edges(name: str, final: Zoo) -> pd.DataFrame:
    """What minimum trees join instead of parent and child, and whether kurtosis tells those apart."""
    columns, index = final.weight_columns(), final.to_pandas()
    measures, truth = measure_trunks(columns), truth_of(index)
    assert truth is not None
    path = index[["factor_optimizer", "factor_seed", "head"]].astype(str).agg("|".join, axis=1).to_numpy(dtype=object)
    child = np.flatnonzero(truth.parent >= 0)
    larger = (measures.kurtosis[child] > measures.kurtosis[truth.parent[child]]).mean()
    rows = []
    for method in ("spanning", "mother", "mother-reversed"):
        parent = forest_of(measures, columns, method, trees=int(truth.tree.max()) + 1).parent
        ends = [(node, source) for node, source in enumerate(parent.tolist()) if source >= 0]
        # Either way, as the direction of an edge has a score of its own.
        wrong = [(a, b) for a, b in ends if truth.parent[a] != b and truth.parent[b] != a]
        siblings = [(a, b) for a, b in wrong if truth.parent[a] >= 0 and truth.parent[a] == truth.parent[b]]
        row = {"zoo": name, "method": method, "edges": len(ends), "true_either_way": len(ends) - len(wrong)}
        row |= {"siblings": len(siblings), "one_path": sum(path[a] == path[b] for a, b in siblings)}
        rows.append(row | {"children_of_larger_kurtosis": larger})
    return pd.DataFrame(rows)


def picture(name: str, case: str, forest: Forest, truth: Truth) -> None:
    figure = forest_figure(lineage_table(forest, truth), f"{name}: {CASES.get(case, case)}")
    save_figure(figure, HERE / "figures" / f"{name}_{case.replace(' ', '_')}.png", dpi=90)


def shown(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}"


def readme() -> str:
    # An underscore begins the suffix of a zoo's other tables: a zoo with one in its name is not shown.
    names = sorted(file.stem for file in HERE.glob("*.csv") if "_" not in file.stem)
    sections = [(HERE / "about.md").read_text(encoding="utf-8").strip()]
    for name in names:
        scores = pd.read_csv(HERE / f"{name}.csv")
        sections.append(f"## {name}\n\n{score_table(scores)}")
        sections.append(f"![{name}]({(Path('figures') / f'{name}_final.png').as_posix()})")
    missing = pd.concat([pd.read_csv(HERE / f"{name}_missing_parents.csv") for name in names])
    sections.append("## No parent among the candidates\n\n" + missing_table(missing))
    epochs = pd.concat([pd.read_csv(HERE / f"{name}_epochs.csv") for name in names])
    sections.append("## Order of checkpoints\n\n" + tau_table(epochs))
    wrong = pd.concat([pd.read_csv(HERE / f"{name}_wrong_edges.csv") for name in names])
    sections.append("## Wrong edges of minimum trees\n\n" + wrong_table(wrong))
    told = sorted({f"{name}: {pd.read_csv(HERE / f'{name}.csv')['provenance'].iloc[0]}" for name in names})
    return "\n\n".join([*sections, "Measured on " + "; ".join(told) + "."]) + "\n"


def score_table(scores: pd.DataFrame) -> str:
    rows = []
    keys = ["case", "method", "trees_given"]
    for (case, method, given), group in scores.groupby(keys, sort=False):
        value = group.set_index("score")["value"]
        told = "candidates known" if method == "candidates" else "their number" if given else "nothing"
        trees = f"{group['trees_found'].iloc[0]} of {group['true_trees'].iloc[0]}"
        rows.append([case, method, told, trees, *(shown(value[score]) for score in SHOWN)])
    for case, group in scores[scores["method"] == "hubs"].groupby("case", sort=False):
        first = group[~group["trees_given"]].set_index("score")
        spans = ((first["chance"][score], first["chance_low"][score], first["chance_high"][score]) for score in SHOWN)
        cells = ["–" if pd.isna(mean) else f"{shown(mean)} ({shown(low)}–{shown(high)})" for mean, low, high in spans]
        rows.append([case, "*chance*", "sizes of trees", "", *cells])
    return markdown(["case", "method", "given", "trees", *(score.replace("_", " ") for score in SHOWN)], rows)


def missing_table(missing: pd.DataFrame) -> str:
    rows = [
        [
            row.zoo,
            row.rule,
            row.case,
            f"{row.false_positives} of {row.parent_present}",
            f"{row.false_negatives} of {row.parent_missing}",
        ]
        for row in missing.itertuples()
    ]
    return markdown(["zoo", "rule", "case", "present, said missing", "missing, not noticed"], rows)


def wrong_table(wrong: pd.DataFrame) -> str:
    rows = []
    for row in wrong.itertuples():
        counts = [str(value) for value in (row.edges, row.true_either_way, row.siblings, row.one_path)]
        rows.append([row.zoo, row.method, *counts, shown(row.children_of_larger_kurtosis)])
    head = ["zoo", "method, number of trees given", "edges", "parent and child, either way", "siblings"]
    head += ["of these one seed, head, optimizer", "children of larger kurtosis than their parent"]
    return markdown(head, rows)


def tau_table(epochs: pd.DataFrame) -> str:
    rows = []
    for row in epochs.itertuples():
        rate = "" if pd.isna(row.factor_lr) else f"{row.factor_lr:g}"
        run = f"{row.stage} {row.factor_optimizer} {rate}".replace("all", "").strip()
        chance = f"0 ({row.chance_low:.2f}–{row.chance_high:.2f})"
        cells = [f"{row.kendall_tau:.3f}", f"{row.absolute_tau:.3f}", chance]
        rows.append([row.zoo, run, str(row.runs), str(row.checkpoints), row.knowledge, row.weights, *cells])
    head = ["zoo", "runs of", "runs", "checkpoints", "known", "weights", "tau", "size of tau", "chance"]
    return markdown(head, rows)


if __name__ == "__main__":
    run_main(main)
