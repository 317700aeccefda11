"""Measure an autoencoder on held-out models and held-out images, beside baselines that decode without training.

Good models are the better half of the held-out models by accuracy on selection images. All reported values are
measured on test images. All held-out and training models are in memory at once.
"""

from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.apply.autoencoder import metrics
from vitzoo_hf.apply.autoencoder.sampling import decoded, encoded
from vitzoo_hf.apply.autoencoder.tokens import vectors_of
from vitzoo_hf.apply.autoencoder.trained import Trained, untrained_model
from vitzoo_hf.apply.candidates import candidate_logits
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import SPLITS, ZooError
from vitzoo_hf.zoo import Zoo

LEAST_DIVERSITY, LEAST_CORRELATION = 0.7, 0.9
MEASURES = {
    "r2": "1 - squared error of weights over their spread about the mean of each layer",
    "r2_beyond_mean": "the same about the mean of each weight over training models",
    "accuracy": "mean over reconstructions",
    "accuracy_original": "mean over originals",
    "accuracy_good": "mean over reconstructions of good originals",
    "accuracy_good_original": "mean over good originals",
    "agreement": "share of images on which a reconstruction predicts as its original",
    "agreement_good": "the same over good originals",
    "retention": "(accuracy - chance) over that of good originals; NaN if those are at chance",
    "specificity": "agreement with the own original less that with the other good ones",
    "specificity_low": "lower end of its 95 % interval over models",
    "specificity_high": "upper end",
    "rank_correlation": "Spearman's, of accuracies of reconstructions and originals",
    "diversity": "mean distance of pairs of reconstructions over that of pairs of originals",
    "nearest_training": "mean L2 distance of a reconstruction to the nearest training model",
    "shared_errors": "images that both get wrong over images that either gets wrong",
}


class ModelColumns(TypedDict):
    """Columns with one value a held-out model."""

    model_id: list[str]
    accuracy: list[float]
    accuracy_original: list[float]
    agreement: list[float]
    good: list[bool]


@dataclass(frozen=True)
class Reconstruction:
    """Measures of one way to decode.

    Attributes:
        name: `autoencoder` or the name of a baseline.
        values: measure -> value; `MEASURES` describes them.
        layers: layer and role -> R², against the mean of the layer over training models.
        models: values of single models.
    """

    name: str
    values: dict[str, float]
    layers: dict[str, float]
    models: ModelColumns

    def failures(self, constant: "Reconstruction") -> list[str]:
        """List signs that a decoder returns a prototype; one sign is a failure, whatever the accuracy.

        Args:
            constant: the baseline that always returns the best training model.
        """
        signs, ours = [], self.values
        if not ours["agreement"] > constant.values["agreement"]:
            signs.append(
                f"agreement {ours['agreement']:.3f} is not above a constant's {constant.values['agreement']:.3f}"
            )
        if not ours["specificity_low"] > 0:
            signs.append(f"specificity {ours['specificity']:.3f} is not told from 0")
        if not ours["rank_correlation"] >= LEAST_CORRELATION:
            signs.append(f"rank correlation {ours['rank_correlation']:.2f} is below {LEAST_CORRELATION}")
        if not ours["diversity"] >= LEAST_DIVERSITY:
            signs.append(f"diversity {ours['diversity']:.2f} is below {LEAST_DIVERSITY}")
        return signs


@dataclass(frozen=True)
class HeldOut:
    """Models of a split with their predictions, on which all ways to decode are measured.

    Attributes:
        row: one of the models, for the architecture.
        model_ids: ids of P models.
        vectors: weights of the models.
        training: weights of the training models.
        predictions: classes that the models predict on test images.
        labels: labels of the test images.
        images: test images.
        good: true for the better half by accuracy on selection images.
        chance: accuracy of a random guess, one over the classes.
        best: position of the training model with the best accuracy on selection images.
    """

    row: Row
    model_ids: list[str]
    vectors: Float[Tensor, "P D"]
    training: Float[Tensor, "Q D"]
    predictions: Int64[Tensor, "P N"]
    labels: Int64[Tensor, " N"]
    images: Tensor
    good: Tensor
    chance: float
    best: int

    @classmethod
    def of(cls, zoo: Zoo, split: str = "test", device: str = "cpu") -> "HeldOut":
        """Read the models of a split of a zoo, and compute their predictions.

        Raises:
            ZooError: if the split holds fewer than four models, or models differ in dataset.
        """
        if split not in SPLITS:
            raise ZooError(f"unknown split {split!r}: {did_you_mean(split, SPLITS)}")
        members, train = zoo.filter(split=split), zoo.filter(split="train")
        # the better half needs two models, or specificity has no other original
        if len(members) < 4:
            raise ZooError(f"{len(members)} models in split {split!r}; reconstructions are judged on at least 4")
        if len(train) == 0:
            raise ZooError("no training models among those chosen, which baselines are made of: give the whole zoo")
        datasets = sorted({*members.index["dataset"], *train.index["dataset"]})
        if len(datasets) > 1:
            raise ZooError(f"models of {', '.join(datasets)}: no images test all of them; filter by dataset or stage")
        rows = list(members.rows())
        vectors, training = vectors_of(rows), vectors_of(train.rows())
        selection, selection_labels = zoo.probes(datasets[0], "selection")
        images, labels = zoo.probes(datasets[0])

        def accuracy(weights: Tensor) -> Tensor:
            logits = candidate_logits(weights, rows[0], selection, device=device).cpu()
            return (logits.argmax(2) == selection_labels).double().mean(1)

        logits = candidate_logits(vectors, rows[0], images, device=device).cpu()
        accuracies = accuracy(vectors)
        return cls(
            row=rows[0],
            model_ids=[row.model_id for row in rows],
            vectors=vectors,
            training=training,
            predictions=logits.argmax(2),
            labels=labels,
            images=images,
            # by selection images, so that test accuracies of good models are not biased upwards
            good=accuracies >= accuracies.median(),
            chance=1 / logits.shape[2],
            best=int(accuracy(training).argmax()),
        )


def evaluate_autoencoder(
    zoo: Zoo, trained: Trained, *, split: str = "test", device: str = "cpu"
) -> list[Reconstruction]:
    """Measure the autoencoder, then its baselines, on the models of a split; see `reconstructed` and `baselines`.

    Raises:
        ZooError: if the split holds fewer than four models, or models differ in dataset.
    """
    held_out = HeldOut.of(zoo, split, device)
    return [reconstructed(held_out, trained, device), *baselines(held_out, trained, device)]


def reconstructed(held_out: HeldOut, trained: Trained, device: str = "cpu") -> Reconstruction:
    """Measure the autoencoder."""
    vectors = decoded(trained, encoded(trained, held_out.vectors))
    return _measured("autoencoder", vectors, held_out, trained, device)


def baselines(held_out: HeldOut, trained: Trained, device: str = "cpu") -> list[Reconstruction]:
    """Measure ways to decode that need no training.

    - `constant best`: the training model with the best accuracy on selection images.
    - `mean weights`: the mean of the training models.
    - `nearest training model`: the training model at the least L2 distance.
    - `untrained`: the autoencoder before its first step.
    - `pca`: projection on as many components as a model has latent numbers, or as the training models span.
    """
    model = untrained_model(trained.tokenizer, trained.recipe, trained.components)
    # the untrained model has the scaling and components of the trained one: only training differs
    untrained = replace(trained, model=model.to(trained.model.index_table.device))
    outputs = {
        "constant best": held_out.training[held_out.best].expand_as(held_out.vectors),
        "mean weights": held_out.training.mean(0).expand_as(held_out.vectors),
        "nearest training model": held_out.training[metrics.nearest(held_out.vectors, held_out.training).position],
        "untrained": decoded(untrained, encoded(untrained, held_out.vectors)),
        "pca": _pca(held_out, trained.tokenizer.num_tokens * trained.recipe.sizes.latent),
    }
    return [_measured(name, vectors, held_out, trained, device) for name, vectors in outputs.items()]


def _pca(held_out: HeldOut, numbers: int) -> Float[Tensor, "P D"]:
    """Project held-out models on the first principal components of training models."""
    mean = held_out.training.double().mean(0)
    _, _, axes = torch.linalg.svd(held_out.training.double() - mean, full_matrices=False)
    # centred rows span one dimension fewer than there are models
    components = axes[: min(numbers, len(held_out.training) - 1)]
    return ((held_out.vectors.double() - mean) @ components.T @ components + mean).float()


def _measured(
    name: str, vectors: Float[Tensor, "P D"], held_out: HeldOut, trained: Trained, device: str
) -> Reconstruction:
    predictions = candidate_logits(vectors, held_out.row, held_out.images, device=device).cpu().argmax(2)
    right, original_right = (
        (classes == held_out.labels).double().mean(1) for classes in (predictions, held_out.predictions)
    )
    good = held_out.good
    shares = metrics.own_agreement(predictions, held_out.predictions)
    # among good originals alone: models at chance agree with nothing, whatever is decoded
    specificities = metrics.specificity(predictions[good], held_out.predictions[good])
    low, high = _interval(specificities)
    mean = held_out.training.double().mean(0)
    layer_mean = trained.tokenizer.layer_means(mean)
    layers = metrics.layer_r2(vectors, held_out.vectors, layer_mean, trained.tokenizer)
    errors = metrics.shared_errors(predictions, held_out.predictions, held_out.labels)
    values = {
        "r2": _total_r2(vectors, held_out.vectors, layer_mean),
        "r2_beyond_mean": _total_r2(vectors, held_out.vectors, mean),
        "accuracy": float(right.mean()),
        "accuracy_original": float(original_right.mean()),
        "accuracy_good": float(right[good].mean()),
        "accuracy_good_original": float(original_right[good].mean()),
        "agreement": float(shares.mean()),
        "agreement_good": float(shares[good].mean()),
        "retention": _retention(right[good], original_right[good], held_out.chance),
        "specificity": float(specificities.mean()),
        "specificity_low": low,
        "specificity_high": high,
        "rank_correlation": metrics.rank_correlation(right, original_right),
        "diversity": metrics.diversity(vectors, held_out.vectors),
        "nearest_training": float(metrics.nearest(vectors, held_out.training).distance.mean()),
        "shared_errors": float(errors.nanmean()),
    }
    models: ModelColumns = {
        "model_id": held_out.model_ids,
        "accuracy": right.tolist(),
        "accuracy_original": original_right.tolist(),
        "agreement": shares.tolist(),
        "good": good.tolist(),
    }
    return Reconstruction(
        name, values, dict(zip(trained.tokenizer.layer_names, layers.tolist(), strict=True)), models
    )


def _retention(decoded: Float[Tensor, " P"], original: Float[Tensor, " P"], chance: float) -> float:
    return float(metrics.retention(decoded, original, chance)) if original.mean() > chance else float("nan")


def _total_r2(decoded: Tensor, original: Tensor, mean: Tensor) -> float:
    error = (decoded.double() - original.double()).square().sum()
    return float(1 - error / (original.double() - mean).square().sum())


def _interval(values: Float[Tensor, " P"], draws: int = 1000) -> tuple[float, float]:
    """Percentile bootstrap interval of 95 % for the mean over models."""
    # a fixed seed, so that equal models have equal intervals in every call
    generator = torch.Generator().manual_seed(0)
    resampled = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = values[resampled].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
