"""Write `autoencoder/README.md` from the tables beside it: python experiments/autoencoder/report.py"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pandas as pd
from harness import RESULTS, header, row, run_main

HERE = RESULTS / "autoencoder"
ARMS = ("S", "B", "S+B", "C+S", "C+B", "C+S+B")
MEASURES = {
    "r2_beyond_mean": "R²",
    "accuracy": "accuracy",
    "agreement": "agreement",
    "retention": "retention",
    "specificity": "specificity",
    "rank_correlation": "rank correlation",
    "diversity": "diversity",
}
BASELINES = ("constant best", "mean weights", "nearest training model", "untrained", "pca")
INTRODUCTION = """# The weight autoencoder on populations of ViTs of 2,794 parameters

Written by `experiments/autoencoder/report.py` from the CSV files beside it.

```
for name in shared independent; do
  vitzoo train results/autoencoder/$name.yaml --out RUNS/$name --stack 64
  vitzoo pack results/autoencoder/$name.yaml RUNS/$name --out ZOOS/$name
done
vitzoo rebasin ZOOS/independent s1094@30 --by activations --out ZOOS/aligned

grid() { name=$1; shift; python experiments/autoencoder/grid.py ZOOS/$name $name --runs GRIDS/$name "$@"; }
grid shared --steps 800 --rates 1e-3 3e-3 --seeds 0
grid shared --steps 800 --rates 3e-3 --seeds 1 2 --arms S B S+B C+S C+B
grid shared --steps 800 --rates 1e-3 --seeds 1 2 --arms C+S+B
grid shared --steps 800 --rates 3e-3 --seeds 0 --variants "structure 0.02" "structure 0.5" "queries 16" \\
  "noise queries" "queries of low contrast" distillation logits "scaling layer" "no linear map" \\
  "S, no linear map" "B, no linear map"
for name in independent aligned; do
  grid $name --steps 1000 --rates 2e-3 --seeds 0 1 2 --arms S S+B
  grid $name --steps 1000 --rates 2e-3 --seeds 0 --variants "latent 15"
done
grid aligned --steps 1000 --rates 2e-3 --seeds 0 --variants "noise queries"

curve() { name=$1; shift; python experiments/autoencoder/curve.py ZOOS/$name $name --folder CURVES/$name "$@"; }
curve independent --steps 1000 --sizes 64 256 1024
curve aligned --steps 1000 --sizes 64 128 256 512 1024
curve aligned --steps 250 3000 --sizes 1024

python experiments/autoencoder/use.py ZOOS/shared shared --runs GRIDS/shared
python experiments/autoencoder/report.py
```

On `shared`, seeds 1 and 2 are at the learning rate that the arm chose on seed 0.

`shared`: 256 fine-tunes of one parent. `independent`: 1,280 models, each from initial weights of its own. `aligned`:
the same after symmetries brought each as near as they can to s1094@30, the training model that is best on selection
images; their functions are unchanged. Three epochs of each run are rows. Training runs train the autoencoder,
validation runs choose its learning rate, test runs are reported on, on images that no model and no query saw. Cells
of a grid have equal steps; rates with one seed were compared on that one. R² is beyond the
mean of training models; retention is `(accuracy - chance) / (accuracy of originals - chance)` over the better half of
the originals by selection images; specificity is agreement with the own original less that with the others. Signs of
a prototype in place of reconstructions, of which one is enough to fail: agreement not above that of the constant best
model, specificity not told from 0, rank correlation of accuracies below 0.9, diversity below 0.7.
"""

CONCLUSIONS = """## What reproduces from the paper on ViTs, and what does not

Meynent et al. 2025 measured convolutional networks from independent initial weights. On these ViTs:

- Reproduces: structure is not enough. From independent initial weights S decodes networks that do not work,
  whatever its R²; behaviour added to it agrees more, at a lower R², on all three populations; contrast changes
  little on top; queries of noise, or of low contrast, give less than images of the data; the published recipe
  without linear maps drifts to a prototype (diversity), as the published generated models do.
- Does not: B alone is no constant predictor here. Weights are centred on their means over training models, and
  from there, or from principal components, it finds its way. Nor does S+B by itself work on independent initial
  weights at a rate of 0.53 latent numbers a parameter: it fits its training models and not the others. Two things
  let it generalise, and add up: alignment by symmetries, and a higher rate (15 numbers a token, 0.79 a parameter).
- Not better than simple decoders everywhere: on fine-tunes of one parent, global PCA and the nearest training
  model agree more with the originals; on aligned models, a constant best model does at the lower rate, and global
  PCA is as good at the higher one.
- Provenance: `provenance_*.json` name the commit that drew the tables; cells were trained at earlier commits of
  the same day whose changes to training (compilation, windows in contrast, checks) do not touch what these
  recipes compute.
"""


def main() -> None:
    (HERE / "README.md").write_text(report())


def report() -> str:
    """The README, from the tables."""
    parts = [INTRODUCTION]
    for name in ("shared", "independent", "aligned"):
        if (HERE / f"{name}_arms.csv").is_file():
            parts.append("\n".join(population(name)))
    curves = [pd.read_csv(file).assign(zoo=file.stem.removesuffix("_curve")) for file in HERE.glob("*_curve.csv")]
    if curves:
        parts.append("\n".join(curve(pd.concat(curves))))
    for name in ("shared", "independent", "aligned"):
        parts += ["\n".join(lines) for lines in (generated(name), predicted(name)) if lines]
    parts.append(CONCLUSIONS)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(HERE / f"{name}.csv", keep_default_na=False, na_values=["nan", ""])


def population(name: str) -> Iterator[str]:
    table = read(f"{name}_arms")
    test = table[(table["split"] == "test") & table["chosen"]]
    ours = test[test["method"] == "autoencoder"]
    originals = ours["accuracy_original"].iloc[0]
    yield f"## `{name}`: arms, held-out models\n"
    yield f"Mean over seeds, and the extremes; originals have accuracy {originals:.3f}.\n"
    yield header("arm", "lr", "seeds", *MEASURES.values(), "signs of a prototype")
    for arm in (arm for arm in ARMS if (ours["arm"] == arm).any()):
        part = ours[ours["arm"] == arm]
        failed = int(part["failures"].notna().sum())
        yield row(
            arm, f"{part['lr'].iloc[0]:g}", len(part), *(spread(part[key]) for key in MEASURES), f"{failed} cells"
        )
    # Baselines do not depend on the arm: the rows of one arm and seed stand for all.
    first = test[(test["seed"] == test["seed"].min()) & (test["arm"] == ours["arm"].iloc[0])].set_index("method")
    for method in BASELINES:
        yield row(method, "", "", *(f"{first.loc[method, key]:.3f}" for key in MEASURES), "")
    yield ""
    yield from verdicts(name, ours, first)
    file = HERE / f"{name}_variants.csv"
    if file.is_file():
        varied = read(f"{name}_variants")
        varied = varied[(varied["split"] == "test") & (varied["method"] == "autoencoder")]
        yield f"\n### `{name}`: variants of an arm in one thing\n"
        yield header("arm", "variant", "seeds", *MEASURES.values())
        for (arm, variant), part in varied.groupby(["arm", "variant"]):
            yield row(arm, variant, len(part), *(spread(part[key]) for key in MEASURES))
    yield f"\n![accuracy](figures/{name}_accuracy.png)\n![agreement](figures/{name}_agreement.png)"
    yield f"![losses](figures/{name}_losses.png)"


def verdicts(name: str, ours: pd.DataFrame, baselines: pd.DataFrame) -> Iterator[str]:
    arms = {arm: part.set_index("seed") for arm, part in ours.groupby("arm")}
    if "S" in arms and name == "independent":
        S = arms["S"]
        worst = f"R² {S['r2'].min():.3f} or more (beyond the mean {S['r2_beyond_mean'].min():.3f})"
        # The claim of the paper has two halves: a high R² that goes with networks that do not work.
        met = bool((S["r2"] >= 0.5).all() and (S["retention"] <= 0.4).all())
        yield told(met, f"structure is not enough: S has {worst}, retention {S['retention'].max():.3f} at most")
    if {"S", "S+B"} <= set(arms) and name == "shared":
        S, SB = arms["S"], arms["S+B"]
        # In disagreements: from an agreement of 0.9 on, even a large improvement is a small difference.
        removed = 1 - (1 - SB["agreement"]) / (1 - S["agreement"])
        yield told(bool((removed >= 0.15).all()), f"S+B removes {share(removed)} of the disagreements of S, by seed")
        yield told(bool((SB["retention"] >= 0.97).all()), f"S+B: retention {spread(SB['retention'])}")
        gap = (SB["accuracy"] - SB["accuracy_original"]).abs()
        yield told(bool((gap <= 0.02).all()), f"S+B: mean accuracy off by {spread(gap)}")
        lost = S["r2_beyond_mean"] - SB["r2_beyond_mean"]
        yield told(bool((lost <= 0.25).all()), f"S+B: R² below that of S by {spread(lost)}")
        more = SB["specificity"] - S["specificity"]
        yield told(bool((more >= -0.005).all()), f"S+B: specificity above that of S by {spread(more)}")
        yield told(bool((SB["rank_correlation"] >= 0.9).all()), f"rank correlation {spread(SB['rank_correlation'])}")
        yield told(bool((SB["diversity"] >= 0.7).all()), f"S+B: diversity {spread(SB['diversity'])}")
        constant = baselines.loc["constant best", "agreement"]
        above = bool((SB["agreement"] > constant).all())
        yield told(above, f"S+B: agreement {spread(SB['agreement'])}, of a constant {constant:.3f}")
    if "B" in arms:
        # Published B alone ends as a constant predictor; a margin, as a constant may win by chance.
        escaped = arms["B"]["agreement"] > baselines.loc["constant best", "agreement"] + 0.05
        state = "escaped the plateau" if escaped.all() else "stayed at what a constant gives"
        yield f"- B alone {state}: agreement {spread(arms['B']['agreement'])}."


def curve(table: pd.DataFrame) -> Iterator[str]:
    yield "## Does it generalise to models of other initial weights?\n"
    yield "S+B on more and more training runs and steps, judged on the same held-out models.\n"
    yield header(
        "zoo", "arm", "runs", "steps", "seeds", "retention", "on training models", "agreement", "specificity"
    )
    keys = ["zoo", "arm", "steps", "runs"]
    for key, part in table.groupby(keys):
        held, seen = (part[part["models"] == models] for models in ("held out", "training"))
        zoo, arm, steps, runs = key
        measured = (held["retention"], seen["retention"], held["agreement"], held["specificity"])
        yield row(zoo, arm, runs, steps, len(held), *map(spread, measured))
    yield "\n![curve](figures/curve.png)"


def generated(name: str) -> list[str]:
    if not (HERE / f"{name}_generated.csv").is_file():
        return []
    table = read(f"{name}_generated")
    zoo = table.iloc[0]
    lines = [
        f"## `{name}`: generated models\n",
        "50 samples around the better half of the training models, of which the 10 best by selection images are kept;"
        f" figures on test images. Held-out models: median {zoo['zoo_median']:.3f}, best {zoo['zoo_best']:.3f},"
        f" {zoo['zoo_nearest_distance']:.2f} from the nearest training model. `epoch n`: kept ones trained on.\n",
        header("method", "bandwidth", "median of all", "of the kept", "best", "diversity", "nearest", "epoch 1",
               "epoch 5", "shared errors"),
    ]  # fmt: skip
    columns = ["median_all", "median_kept", "best_kept", "diversity", "nearest_distance"]
    columns += ["median_epoch_1", "median_epoch_5", "shared_errors_with_nearest"]
    # Methods without an autoencoder have no bandwidth, and would be dropped as missing.
    for (method, bandwidth), part in table.groupby(["method", "bandwidth"], dropna=False):
        width = "" if pd.isna(bandwidth) else f"{bandwidth:g}"
        lines.append(row(method, width, *(spread(part[column]) for column in columns)))
    ours = table[(table["method"] == "S+B") & (table["bandwidth"] == table["bandwidth"].min())]
    met = bool((ours["median_kept"] >= ours["zoo_median"] - 0.02).all() and (ours["diversity"] >= 0.3).all())
    close = spread(ours["median_kept"])
    lines.append("\n" + told(met, f"kept S+B samples: median {close}, diversity {spread(ours['diversity'])}"))
    return [*lines, f"\n![generated](figures/{name}_generated.png)"]


def predicted(name: str) -> list[str]:
    if not (HERE / f"{name}_properties.csv").is_file():
        return []
    table = read(f"{name}_properties")
    table = table[(table["metric"] == "r2") & (table["rows"] == "all")]
    lines = [
        f"## `{name}`: properties of held-out models from embeddings\n",
        "R² of ridge, cross-validated over runs of held-out models; in brackets shuffled labels. Spread: seeds.\n",
        header("features", "numbers", *table["target"].unique()),
    ]
    for features, part in table.groupby("features"):
        cells = []
        for _, each in part.groupby("target", sort=False):
            cells.append(f"{spread(each['value'])} [{each['shuffled'].mean():.2f}]")
        lines.append(row(features, int(part["num_features"].iloc[0]), *cells))
    return lines


def told(met: bool, text: str) -> str:
    return f"- {'met' if met else 'MISSED'}: {text}."


def spread(values: pd.Series) -> str:
    if len(values) == 1:
        return f"{values.iloc[0]:.3f}"
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def share(values: pd.Series) -> str:
    return ", ".join(f"{100 * value:.0f} %" for value in values)


if __name__ == "__main__":
    run_main(main)
