"""Soups and averages over epochs of a zoo, measured; tables, figures and README into the folder beside this script.

python experiments/soup.py ZOO NAME [--cache FOLDER] [--epochs-only]

NAME tells the tables of several zoos apart. README.md and figures are drawn from all tables in the folder.
"""

import time
from pathlib import Path

import pandas as pd
from harness import (
    RESULTS,
    ZOO_AND_NAME,
    gain_interval,
    interval,
    markdown,
    parser,
    points,
    provenance,
    provenance_text,
    run_main,
    save_figure,
    write_provenance,
    write_table,
)
from matplotlib import rc_context
from matplotlib.figure import Figure

from vitzoo_hf.apply.soup.comparison import METHODS, compare_soups
from vitzoo_hf.apply.soup.epochs import average_epochs
from vitzoo_hf.report.style import PALETTE, PERCENT, STYLE
from vitzoo_hf.zoo import Zoo

HERE = RESULTS / "soup"
FAMILY = ["parent_id", "head"]
LEVEL = ["stage", "factor_optimizer", "factor_lr"]
DESIGNS = {
    "one parent and head, all factors": (FAMILY, METHODS),
    "… and seed": ([*FAMILY, "factor_seed"], METHODS[:2]),
    "… and optimizer": ([*FAMILY, "factor_optimizer"], METHODS[:2]),
    "… and learning rate": ([*FAMILY, "factor_lr"], METHODS[:2]),
    "… and optimizer and learning rate": ([*FAMILY, "factor_optimizer", "factor_lr"], METHODS[:2]),
    "… and seed and optimizer": ([*FAMILY, "factor_seed", "factor_optimizer"], METHODS[:2]),
    "one head, across parents": (["head"], METHODS[:3]),
}
ACCURACIES = ["test_accuracy", "best_single_test", "oracle_test", "mean_test", "ensemble_test"]


def main() -> None:
    options = parser(__doc__, ZOO_AND_NAME)
    options.add_argument("--cache", type=Path)
    options.add_argument("--epochs-only", action="store_true")
    options.add_argument("--readme-only", action="store_true", help="draw again from the tables that are there")
    arguments = options.parse_args()
    if arguments.readme_only:
        write_readme()
        return
    zoo, start = Zoo(arguments.zoo), time.perf_counter()
    if not arguments.epochs_only:
        write_table(soups(zoo, arguments.cache), HERE / f"soups_{arguments.name}.csv", ["design"])
    averages = average_epochs(zoo)
    write_table(averages.table, HERE / f"epochs_{arguments.name}.csv", ["run_id"])
    parts = [averages.gains(by) for by in ([], LEVEL[:1], LEVEL)]
    write_table(pd.concat(parts), HERE / f"epoch_gains_{arguments.name}.csv", [*LEVEL, "average"])
    record = provenance(zoo) | {"seconds": round(time.perf_counter() - start)}
    write_provenance(HERE / f"provenance_{arguments.name}.json", record, merged=True)
    write_readme()


def soups(zoo: Zoo, cache: Path | None) -> pd.DataFrame:
    models = zoo.filter(stage="finetune", is_final=True)
    tables = []
    for name, (by, methods) in DESIGNS.items():
        found = compare_soups(models, by=by, methods=methods, cache=cache)
        tables.append(found.table.assign(design=name, left_out=len(found.left_out)))
    return pd.concat(tables)


def design_table(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the groups of each design, with the intervals of the gains over resampled groups."""
    lines = []
    for (design, method), groups in table.groupby(["design", "method"], sort=False):
        line = {"groups": len(groups), "candidates": groups["candidates"].mean()}
        line |= {"ingredients": groups["ingredients"].mean()} | groups[ACCURACIES].mean().to_dict()
        for name in ("gain", "over_ensemble"):
            line |= {name: gain_interval(groups[name])}
        line |= {"significant": f"{(groups['gain_low'] > 0).sum()} / {(groups['gain_high'] < 0).sum()}"}
        lines.append({"soups of": design, "method": method} | line)
    return pd.DataFrame(lines)


def shown(table: pd.DataFrame) -> str:
    return markdown(list(table), [[cell(value) for value in line] for line in table.itertuples(index=False)])


def cell(value: object) -> str:
    if isinstance(value, float):
        return (
            "–" if value != value else f"{value:.3g}" if abs(value) >= 1 or 0 < abs(value) < 0.01 else f"{value:.3f}"
        )
    return str(value)


def by_level(table: pd.DataFrame) -> pd.DataFrame:
    """Uniform soups of two seeds that share everything else, by optimizer and learning rate."""
    pairs = table[(table["design"] == "… and optimizer and learning rate") & (table["method"] == "uniform")]
    lines = []
    for (optimizer, lr), groups in pairs.groupby(["factor_optimizer", "factor_lr"]):
        lines.append(
            {
                "two seeds of": f"{optimizer} {lr:g}",
                "groups": len(groups),
                "best single": groups["best_single_test"].mean(),
                "uniform soup": groups["test_accuracy"].mean(),
                "gain": gain_interval(groups["gain"]),
            }
        )
    return pd.DataFrame(lines)


def gain_table(table: pd.DataFrame) -> pd.DataFrame:
    """Gains in points of test accuracy, with shares and tests."""
    factors = [name for name in ("stage", "factor_optimizer", "factor_lr") if name in table]
    columns = table[[*factors, "average"]].copy()
    columns["runs"] = table["number"]
    columns["gain, points"] = [interval(row.mean, row.low, row.high) for row in table.itertuples(index=False)]
    columns["median"] = [points(value) for value in table["median"]]
    columns["better / worse"] = [f"{r.share_better:.0%} / {r.share_worse:.0%}" for r in table.itertuples()]
    columns["p, sign / signed rank"] = [f"{r.sign_p:.2g} / {r.wilcoxon_p:.2g}" for r in table.itertuples()]
    return columns


def names(start: str) -> list[str]:
    return sorted(file.stem.removeprefix(start) for file in HERE.glob(f"{start}*.csv"))


def draw_soups(name: str, table: pd.DataFrame) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots()
        family = table[table["design"] == next(iter(DESIGNS))]
        greedy = family[family["method"] == "greedy"].reset_index()
        # Positions, which hold for all methods: their groups come in one order.
        order = greedy.sort_values("best_single_test").index
        places = range(len(order))
        for colour, (told, values) in zip(
            PALETTE,
            {
                "ensemble of all candidates": family[family["method"] == "uniform"]["ensemble_test"],
                "best single by test (oracle)": greedy["oracle_test"],
                "best single by selection": greedy["best_single_test"],
                "greedy soup": greedy["test_accuracy"],
                "learned soup": family[family["method"] == "learned"]["test_accuracy"],
                "mean of candidates": family[family["method"] == "uniform"]["mean_test"],
                "uniform soup": family[family["method"] == "uniform"]["test_accuracy"],
            }.items(),
            strict=False,
        ):
            # A ring, since a greedy soup of one ingredient is the best single model and lies on its mark.
            hollow = told == "best single by selection"
            axes.plot(
                places,
                values.to_numpy()[order],
                "o",
                color=colour,
                label=told,
                markersize=9 if hollow else 5,
                markerfacecolor="none" if hollow else colour,
            )
        axes.set_xticks(list(places), [str(place + 1) for place in places])
        axes.set(xlabel="parent and head, by accuracy of the best single model", ylabel="test accuracy")
        axes.set_title(f"Soups of the {name} zoo: twelve fine-tuned models of one parent and head each")
        axes.yaxis.set_major_formatter(PERCENT)
        figure.legend(loc="outside right center")
        save_figure(figure, HERE / "figures" / f"soups_{name}.png")


def draw_epochs(name: str, table: pd.DataFrame) -> None:
    table = table[table["stage"] == "finetune"]
    groups = list(table.groupby(["factor_optimizer", "factor_lr"]))
    # The gain of the last epoch over itself is 0 in every run.
    averages = [average for average in dict.fromkeys(table["average"]) if average != "last epoch"]
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots()
        for number, average in enumerate(averages):
            values = [100 * runs.loc[runs["average"] == average, "gain"] for _, runs in groups]
            places = [place + (number - (len(averages) - 1) / 2) * 0.18 for place in range(len(groups))]
            drawn = axes.boxplot(values, positions=places, widths=0.15, patch_artist=True, showfliers=False)
            for part in ("boxes", "medians"):
                for line in drawn[part]:
                    line.set_color(PALETTE[number] if part == "boxes" else "white")
            axes.plot([], [], "s", color=PALETTE[number], label=average)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(groups)), [f"{optimizer}\n{lr:g}" for (optimizer, lr), _ in groups])
        axes.set(ylabel="gain over the last epoch, points")
        axes.set_title(f"Averages over kept epochs, {name}: {table['run_id'].nunique()} fine-tuning runs")
        figure.legend(loc="outside right center")
        save_figure(figure, HERE / "figures" / f"epochs_{name}.png")


def write_readme() -> None:
    sections = [
        "# Soups and epoch averaging\n\nWritten by `experiments/soup.py`; every number is from a CSV beside this"
        " file. Choices are made on selection images, and figures are of test images. Intervals are 95 % bootstraps:"
        " in the CSVs over test images, paired; in the tables here over groups or runs, which share parents and test"
        " images and are not quite independent.",
        (HERE / "NOTES.md").read_text().strip(),
    ]
    for name in names("soups_"):
        table = pd.read_csv(HERE / f"soups_{name}.csv")
        draw_soups(name, table)
        sections += [f"## Soups of {name}", f"![Soups](figures/soups_{name}.png)", shown(design_table(table))]
        sections += [
            "`gain`: points of test accuracy over the best single model by selection; `over_ensemble`: over the mean"
            " of the probabilities of the soup's own ingredients. `significant`: groups whose own interval over test"
            " images lies above / below zero. `oracle_test` is the best single model by test images, which nobody"
            " could have chosen. `left_out` in the CSV counts groups of one model."
        ]
        sections += [shown(by_level(table))]
    for name in names("epoch_gains_"):
        table = pd.read_csv(HERE / f"epoch_gains_{name}.csv")
        draw_epochs(name, pd.read_csv(HERE / f"epochs_{name}.csv"))
        whole = table[table["stage"].isna()].drop(columns=["stage", "factor_optimizer", "factor_lr"])
        split = table[table["factor_lr"].notna()]
        sections += [f"## Epochs of {name}", f"![Epochs](figures/epochs_{name}.png)", shown(gain_table(whole))]
        sections += [shown(gain_table(split))]
    sections += ["## Provenance"]
    for name in names("epochs_"):
        sections.append(f"{name}: {provenance_text(HERE / f'provenance_{name}.json')}")
    (HERE / "README.md").write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    run_main(main)
