"""Barriers between models of a zoo before and after re-basin, and along trained curves; tables and figures.

python experiments/rebasin.py ZOO NAME [--pairs 60] [--images 1000]

Writes `rebasin/NAME_*.csv`, `rebasin/figures/NAME_*.png` and `rebasin/README.md`, whose numbers come from the tables.
Models are chosen on selection images, activations matched and curves trained on selection images; every figure is of
test images.
"""

import json
from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from harness import (
    RESULTS,
    WHOLE,
    ZOO_AND_NAME,
    header,
    parser,
    provenance,
    row,
    run_main,
    save_figure,
    write_provenance,
    write_table,
)
from matplotlib.figure import Figure

from vitzoo_hf.apply.interpolation import path_scores
from vitzoo_hf.apply.paths.paths import train_bezier
from vitzoo_hf.apply.rebasin.barriers import LADDER, RUNGS, pair_barriers, path_record, sample_pairs, summary
from vitzoo_hf.apply.rebasin.rebasin import matching_images, rebasin, some_images
from vitzoo_hf.format.schema import weights_sha256
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.report.style import PALETTE, PERCENT, STYLE, heading
from vitzoo_hf.zoo import Zoo

HERE = RESULTS / "rebasin"
# Between bad models a barrier says little: the loss is high at its ends already.
GOOD = 0.9
POPULATIONS = {
    "pretrained": "pre-trained, supervised, independent initialisations",
    "same start": "pre-trained, supervised, of one initialisation",
    "across": "fine-tuned, of parents begun apart",
    "within": "fine-tuned, of one parent",
}
RUNG_OF = {"none": "none"} | {"+".join(families): name for name, families in RUNGS.items()}
LABELS = {
    "none": "as stored",
    "mlp": "MLP hidden units",
    "heads": "+ order of heads",
    "permutations": "all permutations, residual stream too",
    "maps": "order of heads + orthogonal maps in heads",
    "residual": "+ permuted residual stream",
    "invertible": "+ invertible maps in heads",
    "rotation": "+ rotated residual stream",
}
SEED = 0
PAIR = ["population", "model_a", "model_b"]
SINGLE = "same start"


def main() -> None:
    options = parser(__doc__, ZOO_AND_NAME)
    options.add_argument("--pairs", type=int, default=60)
    options.add_argument("--within", type=int, default=20, help="pairs of fine-tuned models of one parent")
    options.add_argument("--curves", type=int, default=5, help="pairs a population with curves and exactness")
    options.add_argument("--images", type=int, default=1000)
    options.add_argument("--only", choices=["barriers", "curves", "exactness", "report"])
    options.add_argument("--again", nargs="*", default=[], choices=list(POPULATIONS))
    options.add_argument("--rung", choices=list(RUNGS), help="measure one rung alone, and keep the others' tables")
    arguments = options.parse_args()
    zoo = Zoo(arguments.zoo)
    pairs = dict(chosen_pairs(zoo, arguments.pairs, arguments.within))
    few = {population: some_pairs(chosen, arguments.curves) for population, chosen in pairs.items()}
    if arguments.rung:
        measure_rung(zoo, arguments.name, arguments.rung)
    elif arguments.only in (None, "barriers"):
        measure_barriers(zoo, pairs, arguments.images, arguments.name, arguments.again)
    if arguments.only in (None, "curves"):
        measure_curves(zoo, few, arguments.images, arguments.name)
    if arguments.only in (None, "exactness"):
        measure_exactness(zoo, few, arguments.name)
    draw_ladder(arguments.name)
    draw_paths(arguments.name)
    (HERE / "README.md").write_text(readme())
    print(HERE)


def chosen_pairs(zoo: Zoo, count: int, within: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Population -> pairs; of fine-tuned models those of at least 0.9 accuracy on selection images."""
    index = zoo.to_pandas()
    first = index[(index["stage"] == "pretrain") & index["is_final"] & (index["factor_regime"] == "supervised")]
    begun = initial_trunks(zoo)
    if len(first) > 1:
        found = sample_pairs(first, None)
        yield "pretrained", [pair for pair in found if begun[run_of(pair[0])] != begun[run_of(pair[1])]]
        if same := [pair for pair in found if begun[run_of(pair[0])] == begun[run_of(pair[1])]]:
            yield "same start", same
    table = zoo.to_pandas("evaluations")
    good = table.loc[table["selection_accuracy"] >= GOOD, "model_id"]
    tuned = index[(index["stage"] == "finetune") & index["is_final"] & index["model_id"].isin(good)]
    parents = dict(zip(tuned["model_id"], tuned["parent_id"].map(run_of), strict=True))
    across = [
        (one, other)
        for one, other in sample_pairs(tuned, None, kind="across")
        if begun[parents[one]] != begun[parents[other]]
    ]
    drawn = np.random.default_rng(SEED).permutation(len(across))[:count]
    yield "across", [across[number] for number in sorted(drawn)]
    yield "within", sample_pairs(tuned, within, seed=SEED, kind="within")


def run_of(model_id: str) -> str:
    return model_id.split("@")[0]


def initial_trunks(zoo: Zoo) -> dict[str, str]:
    """Pre-training run -> hash of the trunk it began with: runs of one seed may have begun alike."""
    rows = zoo.filter(stage="pretrain", epoch=0).rows()
    return {row["run_id"]: weights_sha256(row["weights"][zoo.layouts[row["layout"]].trunk()]) for row in rows}


def measure_barriers(zoo: Zoo, pairs: dict, images: int, name: str, again: list[str]) -> None:
    """Barriers of all populations, or of some with the rows of the others left as they are."""
    for population, population_pairs in pairs.items():
        if not again or population in again:
            table = pair_barriers(zoo, population_pairs, LADDER, points=9, num_images=images, seed=SEED)
            write_barriers(table.assign(population=population, images=images), name)
    write_provenance(HERE / f"{name}_provenance.json", provenance(zoo), merged=True)


def measure_rung(zoo: Zoo, name: str, rung: str) -> None:
    """One rung, of the pairs and on as many images as an earlier run measured the others."""
    stored = pd.read_csv(HERE / f"{name}_barriers.csv", keep_default_na=False)
    variants = [variant for variant in LADDER if variant.families == RUNGS[rung]]
    for population, group in stored.groupby("population", sort=False):
        pairs = list(group[["model_a", "model_b"]].drop_duplicates().itertuples(index=False, name=None))
        images = int(group["images"].iloc[0])
        table = pair_barriers(zoo, pairs, variants, points=9, num_images=images, seed=SEED)
        # Pairs as stored were measured with the other rungs, and stay as they are.
        aligned = table[table["families"] != "none"]
        write_barriers(aligned.assign(population=population, images=images), name)
    write_provenance(HERE / f"{name}_provenance.json", provenance(zoo), merged=True)


def write_barriers(table: pd.DataFrame, name: str) -> None:
    """Merge barriers into the table, then write the medians of all its pairs."""
    file = HERE / f"{name}_barriers.csv"
    write_table(table, file, [*PAIR, "families"], order=by_pair_and_rung)
    # From the file: medians are of the pairs of all runs, at the digits that readers have.
    table = pd.read_csv(file, keep_default_na=False)
    groups = table.groupby("population", sort=False)
    medians = pd.concat([summary(group, seed=SEED).assign(population=key) for key, group in groups])
    medians.insert(0, "rung", medians["families"].map(RUNG_OF))
    write_table(medians, HERE / f"{name}_summary.csv", WHOLE, digits=5)


def by_pair_and_rung(table: pd.DataFrame) -> list[tuple[int, int]]:
    """Rank rows by pair as they come, then up the ladder: a rung measured later lies beside the rungs of its pair."""
    pairs = list(zip(*(table[name] for name in PAIR), strict=True))
    places = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    rungs = {families: place for place, families in enumerate(RUNG_OF)}
    return [(places[pair], rungs[families]) for pair, families in zip(pairs, table["families"], strict=True)]


def measure_curves(zoo: Zoo, pairs: dict, images: int, name: str) -> None:
    """Straight paths and trained Bézier curves, before and after the richest re-basin, of some pairs."""
    points, summaries = [], []
    for population, chosen in pairs.items():
        for first, second in chosen:
            one, other = zoo.row(first), zoo.row(second)
            test = some_images(*zoo.probes(one["dataset"]), images, SEED)
            selection = zoo.probes(one["dataset"], "selection")
            matching = matching_images(zoo, one["dataset"], SEED)
            found = rebasin(one, other, by="both", images=matching, seed=SEED)
            ends = {
                "as stored": tuple(torch.from_numpy(row["weights"]) for row in (one, other)),
                "re-basin": (found.target, found.aligned),
            }
            for state, (start, end) in ends.items():
                control = train_bezier(start, end, one, *selection, seed=SEED)
                for path, middle in (("straight", None), ("Bézier", control)):
                    scores = path_scores(start, end, one, *test, control=middle, points=9)
                    about = {"population": population, "model_a": first, "model_b": second}
                    about |= {"images": len(test[1]), "state": state, "path": path}
                    summaries.append(about | path_record(scores))
                    points += [
                        about | {"t": t, "loss": loss, "accuracy": accuracy}
                        for t, loss, accuracy in zip(*(part.tolist() for part in scores), strict=True)
                    ]
        # After each population, so that an interrupted run loses one.
        write_table(pd.DataFrame(points), HERE / f"{name}_curves.csv", PAIR, digits=5)
        write_table(pd.DataFrame(summaries), HERE / f"{name}_paths.csv", PAIR, digits=5)


def some_pairs(chosen: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return [chosen[number] for number in sorted(np.random.default_rng(SEED).permutation(len(chosen))[:count])]


def measure_exactness(zoo: Zoo, pairs: dict, name: str) -> None:
    """How far a re-basin moves logits, computed in float64 from the float32 weights it gives."""
    records = []
    for population, chosen in pairs.items():
        for first, second in chosen:
            one, other = zoo.row(first), zoo.row(second)
            images = some_images(*zoo.probes(one["dataset"]), 200, SEED)[0]
            matching = matching_images(zoo, one["dataset"], SEED)
            stored = float64_logits(other, torch.from_numpy(other["weights"]), images)
            with torch.inference_mode():
                # What a change of logits is judged against: float32 moves them by this much anyway.
                rounding = float((reconstruct(other)(images).double() - stored).abs().max())
            for rung, families in RUNGS.items():
                found = rebasin(one, other, families=families, by="both", images=matching, seed=SEED)
                change = float((float64_logits(other, found.aligned, images) - stored).abs().max())
                about = {"population": population, "model_a": first, "model_b": second, "rung": rung}
                records.append(about | {"change": change, "rounding_of_a_float32_forward": rounding})
    # Three digits, as these are sizes of rounding errors.
    write_table(pd.DataFrame(records), HERE / f"{name}_exactness.csv", [*PAIR, "rung"], digits=3)


def float64_logits(row: dict, weights: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    # In float32 rounding would hide whether a symmetry is exact.
    model = reconstruct({**row, "weights": weights, "weights_sha256": None}, copy=True).double()
    with torch.inference_mode():
        return model(images.double())


def draw_ladder(name: str) -> None:
    """Median barrier of loss and accuracy on each rung, by way of alignment."""
    table = pd.read_csv(HERE / f"{name}_summary.csv", keep_default_na=False)
    populations = [name for name in dict.fromkeys(table["population"]) if name != SINGLE]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * len(populations) + 1, 4.6), layout="constrained")
        axes = figure.subplots(1, len(populations), sharey=True, squeeze=False)[0]
        for axis, population in zip(axes, populations, strict=True):
            group = table[table["population"] == population].set_index("rung")
            stored = group.loc["none"]
            axis.axhline(stored["barrier"], color="#6b7280", linestyle="--", linewidth=1, label="as stored")
            for number, (way, colour) in enumerate(zip(("weights", "activations", "both"), PALETTE, strict=False)):
                part = group[group["by"] == way]
                # Side by side, as intervals of the three ways overlap.
                places = np.array([list(RUNGS).index(rung) for rung in part.index]) + 0.16 * (number - 1)
                errors = [part["barrier"] - part["barrier_low"], part["barrier_high"] - part["barrier"]]
                style = {"fmt": "o-", "ms": 4, "color": colour, "linewidth": 1, "capsize": 2}
                axis.errorbar(places, part["barrier"], errors, label=f"by {way}", **style)
            axis.set_xticks(range(len(RUNGS)), [LABELS[rung] for rung in RUNGS], rotation=40, ha="right")
            axis.set_title(f"{POPULATIONS[population]}\n{stored['pairs']} pairs", fontsize=8)
        axes[0].set_ylim(0, 1.1 * table["barrier_high"].max())
        axes[0].set_ylabel("barrier of test loss (nats)")
        axes[0].legend(fontsize=7, loc="lower left")
        told = "Median over pairs, bootstrap intervals of 95 %; families of symmetries added from left to right"
        heading(figure, f"What each family of symmetries buys ({name})", told)
        save_figure(figure, HERE / "figures" / f"{name}_ladder.png")


def draw_paths(name: str) -> None:
    """Median test error along straight paths and Bézier curves."""
    table = pd.read_csv(HERE / f"{name}_curves.csv")
    populations = [name for name in dict.fromkeys(table["population"]) if name != SINGLE]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(populations) + 1, 3.2), layout="constrained")
        axes = figure.subplots(1, len(populations), sharey=True, squeeze=False)[0]
        for axis, population in zip(axes, populations, strict=True):
            group = table[table["population"] == population]
            for state, colour in zip(("as stored", "re-basin"), PALETTE, strict=False):
                for path, line in (("straight", "-"), ("Bézier", "--")):
                    part = group[(group["state"] == state) & (group["path"] == path)].groupby("t")["accuracy"]
                    median = 1 - part.median()
                    axis.plot(median.index, median, line, color=colour, label=f"{path}, {state}")
            axis.set_title(POPULATIONS[population], fontsize=8)
            axis.set_xlabel("position t")
        axes[0].yaxis.set_major_formatter(PERCENT)
        axes[0].set_ylabel("test error")
        axes[-1].legend(fontsize=7)
        told = "Median over pairs; control points trained on selection images"
        heading(figure, f"Along straight paths and Bézier curves ({name})", told)
        save_figure(figure, HERE / "figures" / f"{name}_paths.png")


def readme() -> str:
    names = sorted(file.name.removesuffix("_summary.csv") for file in HERE.glob("*_summary.csv"))
    sections = [
        "# Re-basin and paths\n\nWritten by `experiments/rebasin.py` from the tables beside it. Barriers are on test"
        " images (nats; the largest rise of the loss over the line between the ends, 9 points); fine-tuned models"
        f" are those of at least {GOOD} accuracy on selection images, on which activations are matched and curves"
        " trained."
        " Intervals are of 95 %, by resampling pairs, which share models: they are rather too narrow.",
        *(section(name) for name in names),
    ]
    return "\n\n".join(sections) + "\n"


def section(name: str) -> str:
    table = pd.read_csv(HERE / f"{name}_summary.csv", keep_default_na=False)
    pairs = pd.read_csv(HERE / f"{name}_barriers.csv", keep_default_na=False)
    moved = pairs[pairs["families"] != "none"]
    about = json.loads((HERE / f"{name}_provenance.json").read_text())
    exact = pd.read_csv(HERE / f"{name}_exactness.csv")
    told = [
        f"## {name}",
        f"The largest change of a logit by {len(exact)} re-basins is {exact['change'].max():.1e}, computed in"
        " float64; a float32 forward of the stored models rounds by up to"
        f" {exact['rounding_of_a_float32_forward'].max():.1e}."
        f" Over all {len(moved)} aligned models, computed in float32, it is {moved['logit_change'].max():.1e}"
        f" ({(moved['logit_change'] > 1e-5).mean():.0%} above 1e-5).",
        *(ladder_table(table[table["population"] == key], title) for key, title in POPULATIONS.items()),
        curve_table(pd.read_csv(HERE / f"{name}_paths.csv")),
        f"![ladder](figures/{name}_ladder.png)\n\n![paths](figures/{name}_paths.png)",
        f"{about['cores']} cores of {about['system']}, torch {about['torch']}, timm {about['timm']}, commit"
        f" {about['commit']}; {', '.join(told_images(pairs))} test images.",
    ]
    return "\n\n".join(part for part in told if part)


def told_images(pairs: pd.DataFrame) -> list[str]:
    return [f"{key}: {images}" for key, images in pairs.groupby("population", sort=False)["images"].first().items()]


def ladder_table(table: pd.DataFrame, title: str) -> str:
    if table.empty:
        return ""
    head = ["symmetries", "by", "barrier", "change of a pair", "pairs that fell"]
    head += ["accuracy barrier", "midpoint accuracy"]
    lines = [header(*head)]
    # A single pair cannot be resampled, and its interval has no width.
    alone = table["pairs"].iloc[0] == 1
    for rung in table.itertuples():
        stored = rung.rung == "none"
        spread = "" if alone else f" ({rung.barrier_low:.3f} to {rung.barrier_high:.3f})"
        change = f"{rung.change:+.3f}" + ("" if alone else f" ({rung.change_low:+.3f} to {rung.change_high:+.3f})")
        cells = [LABELS[rung.rung], "–" if stored else rung.by, f"{rung.barrier:.3f}{spread}"]
        cells += ["–", "–"] if stored else [change, f"{rung.lower:.0%}"]
        cells += [f"{rung.accuracy_barrier:.3f}", f"{rung.midpoint_accuracy:.3f}"]
        lines.append(row(*cells))
    return f"### {title}: {table['pairs'].iloc[0]} pairs, medians\n\n" + "\n".join(lines)


def curve_table(table: pd.DataFrame) -> str:
    head = ("pairs", "path", "ends", "barrier", "accuracy barrier", "midpoint accuracy", "mode connectivity")
    lines = [header(*head)]
    for (population, path, state), group in table.groupby(["population", "path", "state"], sort=False):
        median = group[["barrier", "accuracy_barrier", "midpoint_accuracy", "mode_connectivity"]].median()
        lines.append(row(f"{len(group)} {population}", path, state, *(f"{value:.3f}" for value in median)))
    return "### Paths: medians; re-basin is the last rung by both\n\n" + "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
