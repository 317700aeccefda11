"""Sample models, select the best on selection images, and write them as a zoo with distances to training models.

All training models and all samples are in memory at once.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.apply.autoencoder import metrics
from vitzoo_hf.apply.autoencoder.fine_tuning import FineTuning, fine_tuned, training_images
from vitzoo_hf.apply.autoencoder.rows import check_layout, results_on_test_images
from vitzoo_hf.apply.autoencoder.sampling import Score, bootstrapped, sample
from vitzoo_hf.apply.autoencoder.tokens import vectors_of
from vitzoo_hf.apply.autoencoder.trained import Trained
from vitzoo_hf.apply.candidates import candidate_scores
from vitzoo_hf.apply.made_zoos import check_folder, derived_row, write_derived
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.metrics.weight_distances import weight_distances
from vitzoo_hf.zoo import Zoo


class Generated(NamedTuple):
    """Measures of sampled models.

    Attributes:
        table: a row a model: `model_id`, `selection_accuracy`, `test_accuracy`, `nearest` (the id of the nearest
            training model) and `nearest_distance` (L2, of weights).
        diversity: mean distance of pairs of samples, divided by the mean distance of pairs of anchors.
        anchors_nearest_distance: mean L2 distance of an anchor to the nearest other anchor, for comparison.
        anchors_test_accuracy: median test accuracy of the anchors; NaN where no anchor has one.
    """

    table: pd.DataFrame
    diversity: float
    anchors_nearest_distance: float
    anchors_test_accuracy: float


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Attributes:
        count: number of models in a round.
        keep: number of models to return, which are the anchors of the next round; None returns all models of one
            round without selection.
        rounds: number of rounds; with more than one, the best of a round are the anchors of the next (bootstrap).
        mode: `joint`, `token` or `number`, see `sample`.
        bandwidth: standard deviation of the kernel, see `sample`.
        seed: seed of the draw.
    """

    count: int = 50
    keep: int | None = 10
    rounds: int = 1
    mode: str = "joint"
    bandwidth: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep is not None and not 1 <= self.keep <= self.count:
            raise ZooError(f"{self.keep} of {self.count} samples to keep: expected 1 to {self.count}")
        if self.rounds < 1:
            raise ZooError(f"{self.rounds} rounds of sampling: expected at least one")
        if self.keep is None and self.rounds > 1:
            raise ZooError(f"{self.rounds} rounds need a number of models to keep, the anchors of the next round")

    def draw(self, trained: Trained, anchors: Float[Tensor, "A D"], score: Score) -> Float[Tensor, "S D"]:
        """Sample models by these settings, sorted from the best if `keep` is set."""
        if self.keep is None:
            samples = sample(trained, anchors, self.count, mode=self.mode, bandwidth=self.bandwidth, seed=self.seed)
            return samples.weights
        best = bootstrapped(
            trained,
            anchors,
            self.count,
            score,
            rounds=self.rounds,
            # a density needs two anchors, even if one model is asked for
            keep=max(self.keep, 2),
            mode=self.mode,
            bandwidth=self.bandwidth,
            seed=self.seed,
        )
        return best.weights[: self.keep]


def write_samples(
    zoo: Zoo,
    trained: Trained,
    folder: Path,
    how: Sampling | None = None,
    *,
    tuning: FineTuning | None = None,
    device: str = "cpu",
) -> Generated:
    """Sample around the training models of a zoo, select the best on selection images, write them as a zoo.

    Args:
        zoo: zoo filtered to the prompts; models of the train split are the anchors. Its selection images select
            samples, and its test images measure them.
        trained: the autoencoder.
        folder: folder of the new zoo; earlier samples in it are replaced.
        how: settings; by default 50 models, of which the best 10 are written.
        tuning: settings to fine-tune the selected models on the training images of the zoo's blueprint.
        device: device that measures and fine-tunes models.

    Raises:
        ZooError: if settings are impossible, the anchors differ in layout or dataset, the zoo has no selection
            images, the folder holds something else, training images are missing, or fine-tuning diverges.
    """
    check_folder(folder, zoo, "samples_of")
    how = how or Sampling()
    anchors, dataset = _prompts(zoo, trained)
    index, rows = records(anchors.to_pandas()), list(anchors.rows())
    training = vectors_of(rows)
    images, labels = anchors.probes(dataset, "selection")

    def accuracy(vectors: Float[Tensor, "P D"]) -> Float64[Tensor, " P"]:
        return candidate_scores(vectors, rows[0], images, labels, device=device).accuracy.cpu()

    # before sampling: missing training images should fail at once
    train_set = training_images(zoo, dataset) if tuning else None
    weights = how.draw(trained, training, accuracy)
    if tuning and train_set:
        *_, weights = fine_tuned(trained.networks, weights, *train_set, tuning, device=device)
        # fine-tuning changes the order; the id of a sample is its rank
        weights = weights[accuracy(weights).argsort(descending=True)] if how.keep else weights
    selection = accuracy(weights).tolist()
    losses, accuracies = results_on_test_images(anchors, weights, [rows[0]] * len(weights), device)
    record: dict[str, object] = {
        "sampled": asdict(how),
        "fine_tuned": asdict(tuning) if tuning else None,
        "autoencoder": trained.fingerprint,
        "anchors": [row["model_id"] for row in index],
        "chosen_on": {"dataset": dataset, "role": "selection", "images": len(labels)} if how.keep else None,
    }
    new_rows = []
    for number, (vector, score, loss, right) in enumerate(zip(weights, selection, losses, accuracies, strict=True)):
        provenance = record | {"selection_accuracy": score}
        name = f"sample-{how.mode}-s{how.seed}-{number}"
        new_rows.append(derived_row(anchors, index, name, vector, provenance, test_loss=loss, test_accuracy=right))
    write_derived(anchors, new_rows, folder, "samples")
    columns = {"model_id": [row["model_id"] for row in new_rows], "selection_accuracy": selection}
    table = pd.DataFrame(columns | {"test_accuracy": accuracies} | _nearest(weights, training, rows))
    of_anchors = _median_accuracy([row["test_accuracy"] for row in index])
    return Generated(table, _diversity(weights, training), _apart(training), of_anchors)


def _prompts(zoo: Zoo, trained: Trained) -> tuple[Zoo, str]:
    """Select the training models of a zoo, and name their only dataset."""
    anchors = zoo.filter(split="train")
    if len(anchors) == 0:
        raise ZooError(f"{zoo.name} has no training models among those chosen, which prompts are: loosen the filter")
    check_layout(anchors, trained)
    datasets = sorted(set(anchors.index["dataset"]))
    if len(datasets) > 1:
        raise ZooError(f"anchors of {', '.join(datasets)}: samples need one task, filter by dataset")
    return anchors, datasets[0]


def _nearest(
    weights: Float[Tensor, "P D"], training: Float[Tensor, "Q D"], rows: list[Row]
) -> dict[str, list[str] | list[float]]:
    near = metrics.nearest(weights, training)
    names = [rows[place].model_id for place in near.position.tolist()]
    return {"nearest": names, "nearest_distance": near.distance.tolist()}


def _diversity(weights: Float[Tensor, "P D"], training: Float[Tensor, "Q D"]) -> float:
    return metrics.diversity(weights, training) if len(weights) > 1 else float("nan")


def _apart(training: Float[Tensor, "Q D"]) -> float:
    """Mean distance of a model to the nearest other model."""
    # infinite, or every model would be its own nearest
    far = weight_distances(training).fill_diagonal_(float("inf"))
    return float(far.min(1).values.mean())


def _median_accuracy(results: list[float | None]) -> float:
    accuracies = [result for result in results if result is not None]
    return float(torch.tensor(accuracies, dtype=torch.float64).median()) if accuracies else float("nan")
