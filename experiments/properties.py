"""Predict the properties of a zoo's models and keep the table, the figure and a README in `properties/`.

python experiments/properties.py ZOO NAME [--trees lightgbm] [--repeats N] [--shuffles N]
python experiments/properties.py ZOO NAME --final

Ridge predicts every target from all features; trees a few of them (`TREE_TARGETS`), in one repeat with one shuffle.
With --final, only final rows, unseen lineages, ridge and the features read from weights, in a minute.
Without a zoo only the README is written, from the tables that are there.
"""

import json
import time
from pathlib import Path

import pandas as pd
from harness import RESULTS, markdown, parser, provenance, run_main, save_figure, write_provenance, write_table

from vitzoo_hf.apply.properties.plot import plot_properties
from vitzoo_hf.apply.properties.properties import predict_properties
from vitzoo_hf.zoo import Zoo

FOLDER = RESULTS / "properties"
TREE_FEATURES = ("statistics", "probing_64")
FINAL_FEATURES = ("constant", "norm", "statistics", "flat")
TREE_TARGETS = ("test_accuracy", "generalization_gap", "epoch", "factor_optimizer", "factor_lr")
LARGEST_FIGURE = 300_000
DIGITS = 5
CELL = ["target", "rows", "features", "model", "split"]
"""Columns that tell cells apart; a cell has a row a metric."""
SHOWN = {"r2": "R²", "balanced_accuracy": "balanced accuracy"}
INTRODUCTION = """# Predicted properties

Written by `experiments/properties.py` from the CSV files beside it. A cell is the score, its 95 % interval over
held-out groups, and in brackets the mean of what shuffled labels give: R² of numbers, balanced accuracy of
classes. The files also hold Kendall's tau, mean absolute error, accuracy, the 5th and 95th percentile of shuffled
labels, and counts.

Features: `constant` none at all (the mean, or the class of most); `epoch` the number of epochs; `training_log` epoch,
loss and accuracy on training images; of the trunk alone, `norm`, `statistics` (mean, variance and five quantiles of
each tensor), `spectra` (three singular values and stable rank of each matrix), `flat` (256 principal components of
the flat weights); of the whole model, head included, `probing_N` its class probabilities on N selection images and
`measured_64` accuracy and loss on 64 of them, for which labels are needed. Test accuracy is that of test images, and
no selection image that equals one is used.

Two splits, for two questions. *Unseen runs*: parents and siblings of a held-out run are among the models trained on,
and weights tell the parent; what a prediction owes to recognising the parent, the shuffled labels show where they are
permuted between lineages (regime, ddp, parent seed: shuffled labels are predicted as well as true ones). *Unseen
lineages*: nothing that descends from the same pre-trained model is trained on.

Penalties are chosen inside the training models and trees have fixed settings; nothing was chosen by these scores.
Intervals hold for the models that predict as they are: training on other models would add to them, and few lineages
(ten in `desk`) make their intervals rough. Where levels are balanced, the most frequent level among training models
is a rare one among the others, so constant predictions and shuffled labels fall below chance. Trees have one shuffle,
not a band.

Two things to know when reading. In the grid of `desk` no contrastive parent is `ddp`: whoever tells the regime and
calls every supervised parent ddp has a balanced accuracy of 0.8 for ddp across lineages. And `mini` has two lineages:
one is trained on, the other is another random initialisation, and a linear reading of its trunk is extrapolation,
with R² far below 0. Probing reads no trunk, and keeps part of what it told.

The table `desk` counts two pre-trained models as two lineages, `sl-ddp-s6312` and `sl-no-ddp-s6312`, that start from
identical initial weights: with one of them in training, flat weights of its children tell those of the other. Unseen
lineages were not quite unseen there. `vitzoo properties` now takes parents of equal initial weights for one lineage,
and `desk_final` is measured so, on final rows, with the features that are read from weights alone but spectra (4
repeats). With the twins apart, in 4 repeats as well, and then together: test accuracy by statistics has R² 0.470 and
0.390, the generalisation gap 0.498 and 0.435; the balanced accuracy of the optimizer is 0.890 and 0.858, that of the
seed by flat weights 0.564 and 0.505, which is chance. `ddp` by statistics goes up; the twins differ in it. What
the table `desk` says of unseen lineages from spectra, from probing, by trees and of all rows was not measured again;
splits by run do not change.
"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("zoo", type=Path, nargs="?")
    options.add_argument("name", nargs="?")
    options.add_argument("--trees", default="lightgbm")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--shuffles", type=int, default=10)
    options.add_argument("--final", action="store_true")
    arguments = options.parse_args()
    if arguments.zoo is not None and arguments.final:
        measure_final(arguments.zoo, arguments.name, arguments.repeats, arguments.shuffles)
    elif arguments.zoo is not None:
        measure(arguments.zoo, arguments.name, arguments.trees, arguments.repeats, arguments.shuffles)
    (FOLDER / "README.md").write_text(readme())


def measure(place: Path, name: str, trees: str, repeats: int, shuffles: int) -> None:
    start, zoo = time.perf_counter(), Zoo(place)
    file = FOLDER / f"{name}.csv"
    table = predict_properties(zoo, repeats=repeats, shuffles=shuffles, progress=True)
    write_table(table, file, CELL, digits=DIGITS)
    options = {"models": [trees], "repeats": 1, "shuffles": 1, "progress": True}
    for features in TREE_FEATURES:
        boosted = predict_properties(zoo, targets=TREE_TARGETS, features=[features], **options)
        # At once, as trees take most of the time and an interrupted run then loses one set of features.
        write_table(boosted, file, CELL, digits=DIGITS)
    figure = FOLDER / "figures" / f"{name}.png"
    # Ridge alone: trees predict a few targets and would leave gaps.
    save_figure(plot_properties(table), figure)
    # The figure is committed.
    assert figure.stat().st_size <= LARGEST_FIGURE
    note_provenance(name, start, repeats, shuffles)


def measure_final(place: Path, name: str, repeats: int, shuffles: int) -> None:
    start, zoo = time.perf_counter(), Zoo(place).filter(is_final=True)
    options = {"features": FINAL_FEATURES, "splits": ["lineage"], "repeats": repeats, "shuffles": shuffles}
    table = predict_properties(zoo, **options, progress=True)
    write_table(table, FOLDER / f"{name}.csv", CELL, digits=DIGITS)
    note_provenance(name, start, repeats, shuffles)


def note_provenance(name: str, start: float, repeats: int, shuffles: int) -> None:
    minutes = (time.perf_counter() - start) / 60
    # Rounded to 0 minutes, a short run would read as one that was not timed.
    settings = {"minutes": f"{max(minutes, 1):.0f}", "repeats": repeats, "shuffles": shuffles}
    write_provenance(FOLDER / f"{name}.json", provenance() | settings, merged=True)


def readme() -> str:
    sections = [INTRODUCTION]
    for file in sorted(FOLDER.glob("*.csv")):
        table = pd.read_csv(file)
        about = json.loads(file.with_suffix(".json").read_text())
        sections.append(f"## {file.stem}\n")
        if (FOLDER / "figures" / f"{file.stem}.png").exists():
            sections.append(f"![Properties of {file.stem}](figures/{file.stem}.png)\n")
        sections += [of_split(table, split) for split in ("run", "lineage") if split in set(table["split"])]
        sections.append(provenance_note(about))
    return "\n".join(sections)


def of_split(table: pd.DataFrame, split: str) -> str:
    part = table[(table["split"] == split) & table["metric"].isin(SHOWN)]
    counts = part.groupby("rows", sort=False)[["n_test", "n_groups"]].max()
    told = "; ".join(f"{rows} rows: {row.n_test} of {row.n_groups} {split}s" for rows, row in counts.iterrows())
    targets = part[["target", "rows", "metric"]].drop_duplicates().values.tolist()
    head = ["features", *(f"{target.removeprefix('factor_')}, {rows}" for target, rows, _ in targets)]
    lines = []
    for (features, model), cells in part.groupby(["features", "model"], sort=False):
        found = cells.set_index(["target", "rows"])
        keys = [(target, rows) for target, rows, _ in targets]
        label = features if model == "ridge" else f"{features}, {model}"
        lines.append([label, *(cell(found.loc[key]) if key in found.index else "–" for key in keys)])
    return f"Unseen {split}s ({told}):\n\n{markdown(head, lines)}\n"


def cell(row: pd.Series) -> str:
    interval = "" if pd.isna(row["low"]) else f" {row['low']:.2f}–{row['high']:.2f}"
    return f"**{row['value']:.2f}**{interval} ({row['shuffled']:.2f})".replace("-", "−")


def provenance_note(about: dict) -> str:
    return (
        f"{about['minutes']} minutes on {about['cores']} cores that others share ({about['system']}), Python"
        f" {about['python']}, torch {about['torch']}, vitzoo-hf {about['vitzoo-hf']} at {about['commit']};"
        f" {about['repeats']} repeats of 5 folds, {about['shuffles']} shuffles each.\n"
    )


if __name__ == "__main__":
    run_main(main)
