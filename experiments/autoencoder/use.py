"""What autoencoders of a grid are good for: generated models, and properties predicted from embeddings.

python experiments/autoencoder/use.py ZOO NAME --runs FOLDER [--arms S S+B] [--seeds 0 1 2]

FOLDER is that of `experiments/autoencoder/grid.py` for the same ZOO and NAME. Writes `NAME_generated.csv` and
`NAME_properties.csv` into `autoencoder/`, and their figure.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import pandas as pd
import torch
from harness import ZOO_AND_NAME, provenance, run_main, save_figure, write_provenance, write_table
from matplotlib import rc_context
from matplotlib.figure import Figure

from autoencoder.cells import chosen_rates
from autoencoder.grid import HERE, gathered, population
from vitzoo_hf.apply.autoencoder import metrics
from vitzoo_hf.apply.autoencoder.fine_tuning import FineTuning, fine_tuned, training_images
from vitzoo_hf.apply.autoencoder.metrics import Networks
from vitzoo_hf.apply.autoencoder.rows import POOLS, encode_rows
from vitzoo_hf.apply.autoencoder.sampling import sample
from vitzoo_hf.apply.autoencoder.trained import Trained, load_autoencoder, untrained_model
from vitzoo_hf.apply.candidates import candidate_logits
from vitzoo_hf.apply.properties.features import table_features
from vitzoo_hf.apply.properties.properties import predict_properties
from vitzoo_hf.report.style import PALETTE, PERCENT, STYLE, heading
from vitzoo_hf.zoo import Zoo

COUNT, KEEP, EPOCHS = 50, 10, 5
TARGETS, FEATURES = ("test_accuracy", "generalization_gap", "epoch"), ("constant", "statistics", "flat", "probing_64")


def main() -> None:
    parser = harness.parser(__doc__, ZOO_AND_NAME)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=["S", "S+B"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bandwidths", nargs="+", type=float, default=[0.2, 1.0])
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    zoo, rates = population(arguments.zoo), chosen_rates(gathered(arguments.runs, "measures.csv"))
    cells = {
        (arm, int(folder.name.rpartition("-s")[2])): load_autoencoder(folder)
        for arm in arguments.arms
        for folder in sorted(arguments.runs.glob(f"{arm}-lr{rates[arm]:g}-s*"))
        if folder.name.rpartition("-s")[2] in map(str, arguments.seeds)
    }
    prompts = Prompts(zoo)
    rows = [row for seed in sorted({seed for _, seed in cells}) for row in prompts.without_autoencoder(seed)]
    for (arm, seed), trained in cells.items():
        for bandwidth in arguments.bandwidths:
            print(f"generating by {arm}, seed {seed}, bandwidth {bandwidth:g}", flush=True)
            drawn = sample(trained, prompts.vectors, COUNT, bandwidth=bandwidth, seed=seed).weights
            rows.append({"method": arm, "bandwidth": bandwidth, "seed": seed} | prompts.judged(drawn, seed))
    table = pd.DataFrame(rows)
    write_table(table, HERE / f"{arguments.name}_generated.csv", ["method", "bandwidth", "seed"])
    figure = draw(table)
    save_figure(figure, HERE / "figures" / f"{arguments.name}_generated.png")
    print(table.drop(columns="seed").groupby(["method", "bandwidth"], dropna=False).mean().round(3).T.to_string())
    predicted = properties(zoo, cells)
    write_table(predicted, HERE / f"{arguments.name}_properties.csv", ["features", "seed"])
    shown = predicted[predicted["metric"] == "r2"]
    print(shown.groupby(["features", "target"])["value"].mean().unstack().round(3).to_string())
    write_provenance(HERE / f"provenance_{arguments.name}_use.json", provenance(zoo), merged=True)


class Prompts:
    """The better half of the training models by selection images, and what samples around them are held against."""

    def __init__(self, zoo: Zoo) -> None:
        rows = list(zoo.filter(split="train").rows())
        self.row, dataset = rows[0], rows[0]["dataset"]
        self.training = torch.stack([torch.from_numpy(row["weights"]) for row in rows])
        self.selection, self.test = zoo.probes(dataset, "selection"), zoo.probes(dataset)
        self.learned = training_images(zoo, dataset)
        right = self.right(self.training, self.selection)
        # By selection images: samples around these prompts are judged on test images.
        self.vectors = self.training[right >= right.median()]
        held = torch.stack([torch.from_numpy(row["weights"]) for row in zoo.filter(split="test").rows()])
        self.held_accuracy = self.right(held, self.test)
        self.held_distance = float(metrics.nearest(held, self.training).distance.mean())

    def right(self, vectors: torch.Tensor, images: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (candidate_logits(vectors, self.row, images[0]).argmax(2) == images[1]).double().mean(1)

    def judged(self, drawn: torch.Tensor, seed: int) -> dict[str, float]:
        """COUNT samples, the KEEP best of them by selection images, and these trained on."""
        kept = drawn[self.right(drawn, self.selection).argsort(descending=True)[:KEEP]]
        accuracy, near = self.right(kept, self.test), metrics.nearest(kept, self.training)
        ours = candidate_logits(kept, self.row, self.test[0]).argmax(2)
        nearest = candidate_logits(self.training[near.position], self.row, self.test[0]).argmax(2)
        found = {
            "median_all": float(self.right(drawn, self.test).median()),
            "median_kept": float(accuracy.median()),
            "best_kept": float(accuracy.max()),
            "diversity": metrics.diversity(kept, self.vectors),
            "nearest_distance": float(near.distance.mean()),
            "agreement_with_nearest": float(metrics.own_agreement(ours, nearest).mean()),
            "shared_errors_with_nearest": float(metrics.shared_errors(ours, nearest, self.test[1]).nanmean()),
            "zoo_median": float(self.held_accuracy.median()),
            "zoo_best": float(self.held_accuracy.max()),
            "zoo_nearest_distance": self.held_distance,
            "prompts_median": float(self.right(self.vectors, self.test).median()),
        }
        tuning = fine_tuned(Networks.like(self.row), kept, *self.learned, FineTuning(EPOCHS, seed=seed))
        for epoch, weights in enumerate(tuning, 1):
            tuned = self.right(weights, self.test)
            found |= {f"median_epoch_{epoch}": float(tuned.median()), f"best_epoch_{epoch}": float(tuned.max())}
        return found

    def without_autoencoder(self, seed: int) -> Iterator[dict[str, float | str]]:
        """Prompts as they are; means of two; prompts with noise as far away as held-out models are."""
        generator = torch.Generator().manual_seed(seed)
        first, second = (
            self.vectors[torch.randint(len(self.vectors), (COUNT,), generator=generator)] for _ in range(2)
        )
        noise = torch.randn(first.shape, generator=generator) * self.training.std(0)
        # Nearer noise would keep its prompt's accuracy for no merit of its own.
        noise *= self.held_distance / noise.norm(dim=1, keepdim=True)
        for name, drawn in (("prompts", first), ("means of two", (first + second) / 2), ("noise", first + noise)):
            yield {"method": name, "seed": seed} | self.judged(drawn, seed)


def properties(zoo: Zoo, cells: dict[tuple[str, int], Trained]) -> pd.DataFrame:
    """R² over held-out models alone, which no autoencoder was trained on; cross-validated over their runs."""
    held = zoo.filter(split="test")
    given = list(FEATURES)
    for (arm, seed), trained in cells.items():
        for pool in POOLS:
            table = encode_rows(held, trained, pool=pool).embeddings.set_index("model_id")
            given.append(table_features(f"{arm} by {pool}, seed {seed}", table))
        if arm == "S+B":
            start = untrained_model(trained.tokenizer, trained.recipe, trained.components)
            # In place: tokenizer, scaling and components stay, so that only what was learnt is taken away.
            trained.model.load_state_dict(start.state_dict())
            for pool in POOLS:
                table = encode_rows(held, trained, pool=pool).embeddings.set_index("model_id")
                given.append(table_features(f"untrained by {pool}, seed {seed}", table))
    # By run: epochs of one run are near copies, and all models of `shared` are one lineage.
    found = predict_properties(held, targets=TARGETS, features=given, splits=["run"], shuffles=5)
    parts = found["features"].str.extract(r"^(?P<features>.*?)(?:, seed (?P<seed>\d+))?$")
    return found.assign(features=parts["features"], seed=parts["seed"])


def draw(table: pd.DataFrame) -> Figure:
    """Accuracy of what is kept against its distance to the nearest training model."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.5, 3.8), layout="constrained")
        axis = figure.subplots()
        heading(figure, "Generated models", "median accuracy of the kept, a point a seed; dashed: held-out models")
        axis.axhline(table["zoo_median"][0], color="#9ca3af", linestyle="--", linewidth=0.8)
        axis.axvline(table["zoo_nearest_distance"][0], color="#9ca3af", linestyle="--", linewidth=0.8)
        named = table.assign(bandwidth=table["bandwidth"].map(lambda value: "" if pd.isna(value) else f" {value:g}"))
        for number, (name, part) in enumerate(named.groupby(named["method"] + named["bandwidth"])):
            color = PALETTE[number % len(PALETTE)]
            axis.scatter(part["nearest_distance"], part["median_kept"], s=18, label=name, color=color)
        axis.set(xlabel="L2 distance to the nearest training model", ylabel="accuracy")
        axis.yaxis.set_major_formatter(PERCENT)
        axis.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    run_main(main)
