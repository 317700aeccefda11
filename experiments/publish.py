"""Write what is worth keeping of a zoo, without its weights, into a folder beside this script.

python experiments/publish.py ZOO NAME [--training-minutes M --training-note TEXT]

The zoo has been evaluated (`vitzoo evaluate`). `figures/` and `data/` are those of `vitzoo plot`, but for tables of
more than a megabyte, whose values are in `pairs.csv`; `index.csv` has the hash of every row's weights.
"""

import json
import shutil
import tempfile
from pathlib import Path

import pandas as pd
from harness import (
    RESULTS,
    WHOLE,
    ZOO_AND_NAME,
    markdown,
    parser,
    provenance,
    run_main,
    write_provenance,
    write_table,
)

from vitzoo_hf.report.html import write_zoo_report
from vitzoo_hf.zoo import Zoo

LARGEST = 1_000_000
DIGITS = 5
# Medians and quartiles, read off a published figure to 0.005.
PAPER = {
    "supervised": {5: ".71 (.19–.78)", 10: ".77 (.53–.80)", 20: ".80 (.69–.81)", 50: ".804 (.763–.833)"},
    "contrastive": {5: ".65 (.48–.68)", 10: ".70 (.56–.72)", 20: ".73 (.63–.75)", 50: ".771 (.699–.781)"},
}
PAPER_GAP = {"supervised": ".09 (.02–.17)", "contrastive": ".15 (.11–.17)"}
PAPER_EPOCHS = (5, 10, 20, 50)


def main() -> None:
    options = parser(__doc__, ZOO_AND_NAME)
    options.add_argument("--training-minutes", type=float)
    options.add_argument("--training-note", default="")
    arguments = options.parse_args()
    folder = RESULTS / arguments.name
    zoo = Zoo(arguments.zoo)  # before the folder is made: a mistyped zoo leaves nothing behind
    folder.mkdir(exist_ok=True)
    index, evaluations, pairs = (zoo.to_pandas(config) for config in ("index", "evaluations", "pairs"))
    shutil.copy(arguments.zoo / "README.md", folder / "CARD.md")
    shutil.copy(arguments.zoo / "blueprint.yaml", folder / "blueprint.yaml")
    columns = [name for name in index if name not in ("provenance", "architecture_args", "layout")]
    # the tables are of one zoo: rows of a model that left it would not be in TABLES.md
    write_table(index[columns], folder / "index.csv", WHOLE, digits=DIGITS)
    write_table(evaluations, folder / "evaluations.csv", WHOLE, digits=DIGITS)
    write_table(pairs, folder / "pairs.csv", WHOLE, digits=DIGITS)
    write_figures(zoo, folder)
    record = origin(zoo, arguments.zoo) | {
        "training_minutes": arguments.training_minutes,
        "training_note": arguments.training_note,
    }
    write_provenance(folder / "provenance.json", record, merged=True)
    (folder / "TABLES.md").write_text(tables(index, folder / "data"))
    print(folder)


def write_figures(zoo: Zoo, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as drawn:
        write_zoo_report(zoo, Path(drawn))
        for part in ("figures", "data"):
            # What an earlier report drew and this one does not must not stay beside it.
            shutil.rmtree(folder / part, ignore_errors=True)
            (folder / part).mkdir()
            for file in sorted((Path(drawn) / part).iterdir()):
                if file.stat().st_size <= LARGEST:
                    shutil.copy(file, folder / part)


def origin(zoo: Zoo, folder: Path) -> dict:
    manifest = json.loads((folder / "zoo.json").read_text())
    first = json.loads(zoo.to_pandas("index")["provenance"].iloc[0])
    return {
        "blueprint_fingerprint": manifest["blueprint_fingerprint"],
        "trained_with": first["versions"],
        "published_with": provenance(),
    }


def tables(index: pd.DataFrame, data: Path) -> str:
    tuned = index[index["stage"] == "finetune"]
    final = tuned[tuned["is_final"]]
    levels = pd.read_csv(data / "pairs_by_level.csv")
    sections = [
        "# Tables\n\nWritten by `experiments/publish.py`. Medians (quartiles; 5 to 95 %) over fine-tuned runs.",
        accuracy_by_epoch(tuned),
        gaps(final),
        "Published: a figure of June 2024 of the same zoo, read off to ±0.005; quartiles only.",
        *(by_level(final, factor) for factor in varying_factors(final)),
        "Share of the variance that a factor explains (η² of values, PERMANOVA R² of distances) and p of a"
        " permutation test, – where levels or parents are too few for one.",
        explained(pd.read_csv(data / "factors.csv")),
        "Pairs of models with the same and with another level of a factor, medians.",
        same_and_other(levels),
    ]
    return "\n\n".join(sections) + "\n"


def spread(values: pd.Series) -> str:
    low, first, middle, third, high = values.astype(float).quantile([0.05, 0.25, 0.5, 0.75, 0.95])
    return f"{middle:.3f} ({first:.3f}–{third:.3f}; {low:.3f}–{high:.3f})"


def of_regimes(runs: pd.DataFrame, value: str) -> list[str]:
    return [spread(runs.loc[runs["factor_regime"] == regime, value]) for regime in PAPER]


def accuracy_by_epoch(tuned: pd.DataFrame) -> str:
    rows = [[str(epoch), *of_regimes(runs, "test_accuracy")] for epoch, runs in tuned.groupby("epoch")]
    rows += [[f"published, epoch {epoch}", *(PAPER[regime][epoch] for regime in PAPER)] for epoch in PAPER_EPOCHS]
    return markdown(["test accuracy after epoch", *PAPER], rows)


def gaps(final: pd.DataFrame) -> str:
    rows = [["here", *of_regimes(final, "generalization_gap")], ["published, epoch 50", *PAPER_GAP.values()]]
    return markdown(["train − test accuracy, final", *PAPER], rows)


def varying_factors(final: pd.DataFrame) -> list[str]:
    return [name for name in final if name.startswith("factor_") and final[name].nunique() > 1]


def by_level(final: pd.DataFrame, factor: str) -> str:
    rows = [
        [str(level), str(len(runs)), spread(runs["test_accuracy"]), spread(runs["generalization_gap"])]
        for level, runs in final.groupby(factor)
    ]
    return markdown([factor.removeprefix("factor_"), "models", "test accuracy", "train − test accuracy"], rows)


def explained(factors: pd.DataFrame) -> str:
    measures = list(dict.fromkeys(factors["measure"]))
    rows = []
    for factor, group in factors.groupby("factor", sort=False):
        found = group.set_index("measure")
        cells = [
            # With few levels or parents even the least possible p is above 0.05, and a p says nothing.
            f"{row.share:.2f} ({f'p {row.p:.3f}' if row.least_p <= 0.05 else '–'})"
            for row in (found.loc[measure] for measure in measures)
        ]
        rows.append([str(factor), *cells])
    return markdown(["factor", *measures], rows)


def same_and_other(levels: pd.DataFrame) -> str:
    metrics = list(dict.fromkeys(levels["metric"]))
    rows = []
    for (factor, among), group in levels.groupby(["factor", "among"], sort=False):
        median = group.set_index(["metric", "same_level"])["median"]
        rows.append([factor, among, *(f"{median[m, True]:.3f} / {median[m, False]:.3f}" for m in metrics)])
    return markdown(["factor", "pairs within", *(f"{metric}, same / other" for metric in metrics)], rows)


if __name__ == "__main__":
    run_main(main)
