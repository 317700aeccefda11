"""Generated models as a zoo, chosen on selection images, with how far they are from models that were known."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import records
from vitzoo_hf.metrics.weight_distances import weight_distances
from vitzoo_hf.zoo import Zoo


class Generated(NamedTuple):
    """What was sampled.

    Attributes:
        table: a row a model: `model_id`, `selection_accuracy`, `test_accuracy`, `nearest` (the id of the nearest
            training model) and `nearest_distance` (L2, of weights).
        diversity: mean distance of pairs of them over that of pairs of anchors.
        anchors_nearest_distance: mean L2 distance of an anchor to the nearest other one, to hold distances against.
        anchors_test_accuracy: median of the anchors; NaN where none was measured.
    """

    table: pd.DataFrame
    diversity: float
    anchors_nearest_distance: float
    anchors_test_accuracy: float


@dataclass(frozen=True)
class Sampling:
    """How models are sampled.

    Attributes:
        count: of models a round.
        keep: how many models are kept, and are the anchors of the next round; None keeps all of one round unchosen.
        rounds: more than one bootstraps: the best of a round are the anchors of the next.
        mode: as for `sample`.
        bandwidth: likewise.
        seed: of the draw.
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
        """Models by these settings, the best first where they are chosen."""
        if self.keep is None:
            drawn = sample(trained, anchors, self.count, mode=self.mode, bandwidth=self.bandwidth, seed=self.seed)
            return drawn.weights
        best = bootstrapped(
            trained,
            anchors,
            self.count,
            score,
            rounds=self.rounds,
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
    """Sample around the training models of a zoo, keep the best by selection images, write them as a zoo.

    Args:
        zoo: filtered to the prompts; models of the train split are the anchors. All are held in memory. Its selection
            images choose, its test images are reported on.
        trained: the autoencoder.
        folder: the new zoo; earlier samples that are there are replaced.
        how: 50 models, of which the best 10 are kept, by default.
        tuning: train those that are kept on, on the training images of the zoo's blueprint.
        device: where models are measured and trained on.

    Raises:
        ZooError: as `sample` and `bootstrapped`; if the anchors differ in layout or dataset, the zoo has no selection
            images, or as `check_folder`, `training_images` and `fine_tuned`.
    """
    check_folder(folder, zoo, "samples_of")
    how = how or Sampling()
    anchors, dataset = _prompts(zoo, trained)
    index, rows = records(anchors.to_pandas()), list(anchors.rows())
    training = vectors_of(rows)
    images, labels = anchors.probes(dataset, "selection")

    def score(vectors: Float[Tensor, "P D"]) -> Float64[Tensor, " P"]:
        return candidate_scores(vectors, rows[0], images, labels, device=device).accuracy.cpu()

    learned = training_images(zoo, dataset) if tuning else None
    weights = how.draw(trained, training, score)
    if tuning and learned:
        *_, weights = fine_tuned(trained.networks, weights, *learned, tuning, device=device)
        weights = weights[score(weights).argsort(descending=True)] if how.keep else weights
    selection = score(weights).tolist()
    losses, accuracies = results_on_test_images(anchors, weights, [rows[0]] * len(weights), device)
    record: dict[str, Any] = {
        "sampled": asdict(how),
        "fine_tuned": asdict(tuning) if tuning else None,
        "autoencoder": trained.fingerprint,
        "anchors": [row["model_id"] for row in index],
        "chosen_on": {"dataset": dataset, "role": "selection", "images": len(labels)} if how.keep else None,
    }
    made = []
    for number, (vector, chosen, loss, right) in enumerate(zip(weights, selection, losses, accuracies, strict=True)):
        provenance = record | {"selection_accuracy": chosen}
        name = f"sample-{how.mode}-s{how.seed}-{number}"
        made.append(derived_row(anchors, index, name, vector, provenance, test_loss=loss, test_accuracy=right))
    write_derived(anchors, made, folder, "samples")
    columns = {"model_id": [row["model_id"] for row in made], "selection_accuracy": selection}
    table = pd.DataFrame(columns | {"test_accuracy": accuracies} | _nearest(weights, training, rows))
    return Generated(table, _diversity(weights, training), _apart(training), _median_accuracy(index))


def _prompts(zoo: Zoo, trained: Trained) -> tuple[Zoo, str]:
    """The training models of a zoo, and the one dataset they were trained on."""
    anchors = zoo.filter(split="train")
    if len(anchors) == 0:
        raise ZooError(f"{zoo.name} has no training models among those chosen, which prompts are: loosen the filter")
    check_layout(anchors, trained)
    datasets = sorted(set(anchors.index["dataset"]))
    if len(datasets) > 1:
        raise ZooError(f"anchors of {', '.join(datasets)}: samples need one task, filter by dataset")
    return anchors, datasets[0]


def _nearest(
    weights: Float[Tensor, "P D"], training: Float[Tensor, "Q D"], rows: list[dict[str, Any]]
) -> dict[str, list[Any]]:
    near = metrics.nearest(weights, training)
    names = [rows[place]["model_id"] for place in near.position.tolist()]
    return {"nearest": names, "nearest_distance": near.distance.tolist()}


def _diversity(weights: Float[Tensor, "P D"], training: Float[Tensor, "Q D"]) -> float:
    return metrics.diversity(weights, training) if len(weights) > 1 else float("nan")


def _apart(training: Float[Tensor, "Q D"]) -> float:
    """Mean distance of a model to the nearest other one."""
    far = weight_distances(training).fill_diagonal_(float("inf"))
    return float(far.min(1).values.mean())


def _median_accuracy(index: list[dict[str, Any]]) -> float:
    known = [row["test_accuracy"] for row in index if row["test_accuracy"] is not None]
    return float(torch.tensor(known, dtype=torch.float64).median()) if known else float("nan")
