"""An autoencoder on held-out models and held-out images, beside decoders that need no autoencoder.

Good models are the better half of the held-out ones by their accuracy on selection images; everything reported is on
test images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.apply.autoencoder import metrics
from vitzoo_hf.apply.autoencoder.tokens import vectors_of
from vitzoo_hf.apply.autoencoder.trained import Trained, untrained_model
from vitzoo_hf.apply.candidates import candidate_logits
from vitzoo_hf.format.messages import did_you_mean
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
BATCH = 64


@dataclass(frozen=True)
class Reconstruction:
    """What was measured of one way to decode.

    Attributes:
        name: `autoencoder` or a baseline.
        values: measure -> value; `MEASURES` says what each is.
        layers: role and layer -> R², against the mean of the layer over training models.
        models: column -> a value a model: `model_id`, `accuracy`, `accuracy_original`, `agreement`, `good`.
    """

    name: str
    values: dict[str, float]
    layers: dict[str, float]
    models: dict[str, list[Any]]

    def failures(self, constant: "Reconstruction") -> list[str]:
        """Signs of a prototype in place of reconstructions; one is enough to fail, whatever the accuracy.

        Args:
            constant: the baseline that decodes the best training model always.
        """
        found, ours = [], self.values
        if not ours["agreement"] > constant.values["agreement"]:
            found.append(
                f"agreement {ours['agreement']:.3f} is not above a constant's {constant.values['agreement']:.3f}"
            )
        if not ours["specificity_low"] > 0:
            found.append(f"specificity {ours['specificity']:.3f} is not told from 0")
        if not ours["rank_correlation"] >= LEAST_CORRELATION:
            found.append(f"rank correlation {ours['rank_correlation']:.2f} is below {LEAST_CORRELATION}")
        if not ours["diversity"] >= LEAST_DIVERSITY:
            found.append(f"diversity {ours['diversity']:.2f} is below {LEAST_DIVERSITY}")
        return found


@dataclass(frozen=True)
class HeldOut:
    """Models of a split and what they predict, which all ways to decode are judged on.

    Attributes:
        row: one of them, for the architecture.
        model_ids: P names.
        vectors: their weights.
        training: weights of the training models.
        predictions: of the originals on test images.
        labels: of the test images.
        images: test images.
        good: the better half on selection images.
        chance: one over the classes.
        best: position of the best training model on selection images.
    """

    row: Mapping[str, Any]
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
        """Those of a zoo.

        Raises:
            ZooError: if the split holds fewer than four models, or models differ in dataset.
        """
        if split not in SPLITS:
            raise ZooError(f"unknown split {split!r}: {did_you_mean(split, SPLITS)}")
        held, train = zoo.filter(split=split), zoo.filter(split="train")
        if len(held) < 4:
            raise ZooError(f"{len(held)} models in split {split!r}; reconstructions are judged on at least 4")
        if len(train) == 0:
            raise ZooError("no training models among those chosen, which baselines are made of: give the whole zoo")
        datasets = sorted({*held.index["dataset"], *train.index["dataset"]})
        if len(datasets) > 1:
            raise ZooError(f"models of {', '.join(datasets)}: no images test all of them; filter by dataset or stage")
        rows = list(held.rows())
        vectors, training = vectors_of(rows), vectors_of(train.rows())
        selection, selection_labels = zoo.probes(datasets[0], "selection")
        images, labels = zoo.probes(datasets[0])

        def accuracy(weights: Tensor) -> Tensor:
            logits = candidate_logits(weights, rows[0], selection, device=device).cpu()
            return (logits.argmax(2) == selection_labels).double().mean(1)

        logits = candidate_logits(vectors, rows[0], images, device=device).cpu()
        ranked = accuracy(vectors)
        return cls(
            row=rows[0],
            model_ids=[row["model_id"] for row in rows],
            vectors=vectors,
            training=training,
            predictions=logits.argmax(2),
            labels=labels,
            images=images,
            good=ranked >= ranked.median(),
            chance=1 / logits.shape[2],
            best=int(accuracy(training).argmax()),
        )


def evaluate_autoencoder(
    zoo: Zoo, trained: Trained, *, split: str = "test", device: str = "cpu"
) -> list[Reconstruction]:
    """The autoencoder, then its baselines, on the models of a split; see `reconstructed` and `baselines`.

    Raises:
        ZooError: if the split holds fewer than four models, or models differ in dataset.
    """
    held = HeldOut.of(zoo, split, device)
    return [reconstructed(held, trained, device), *baselines(held, trained, device)]


def reconstructed(held: HeldOut, trained: Trained, device: str = "cpu") -> Reconstruction:
    """The autoencoder."""
    return _measured("autoencoder", _through(trained, held.vectors, device), held, trained, device)


def baselines(held: HeldOut, trained: Trained, device: str = "cpu") -> list[Reconstruction]:
    """Ways to decode that take no training.

    `constant best`, the training model that is best on selection images; `mean weights` of training models; `nearest
    training model`; `untrained`, the autoencoder before its first step; `pca` of as many numbers as the latents, or
    as training models allow.
    """
    model = untrained_model(trained.tokenizer, trained.recipe, trained.components)
    untrained = replace(trained, model=model.to(trained.model.index_table.device))
    decoded = {
        "constant best": held.training[held.best].expand_as(held.vectors),
        "mean weights": held.training.mean(0).expand_as(held.vectors),
        "nearest training model": held.training[metrics.nearest(held.vectors, held.training).position],
        "untrained": _through(untrained, held.vectors, device),
        "pca": _pca(held, trained.tokenizer.num_tokens * trained.recipe.sizes.latent),
    }
    return [_measured(name, vectors, held, trained, device) for name, vectors in decoded.items()]


def _through(trained: Trained, vectors: Float[Tensor, "P D"], device: str) -> Float[Tensor, "P D"]:
    trained.model.eval()
    with torch.no_grad():
        return torch.cat([trained.decode(trained.encode(part.to(device))).cpu() for part in vectors.split(BATCH)])


def _pca(held: HeldOut, numbers: int) -> Float[Tensor, "P D"]:
    """Projection on the first principal components of training models."""
    mean = held.training.double().mean(0)
    _, _, axes = torch.linalg.svd(held.training.double() - mean, full_matrices=False)
    kept = axes[: min(numbers, len(held.training) - 1)]
    return ((held.vectors.double() - mean) @ kept.T @ kept + mean).float()


def _measured(
    name: str, vectors: Float[Tensor, "P D"], held: HeldOut, trained: Trained, device: str
) -> Reconstruction:
    predictions = candidate_logits(vectors, held.row, held.images, device=device).cpu().argmax(2)
    right, original_right = ((found == held.labels).double().mean(1) for found in (predictions, held.predictions))
    good = held.good
    own = metrics.own_agreement(predictions, held.predictions)
    specific = metrics.specificity(predictions[good], held.predictions[good])
    low, high = _interval(specific)
    mean = held.training.double().mean(0)
    layers = metrics.layer_r2(vectors, held.vectors, _layer_means(mean, trained), trained.tokenizer)
    errors = metrics.shared_errors(predictions, held.predictions, held.labels)
    values = {
        "r2": _total_r2(vectors, held.vectors, _layer_means(mean, trained)),
        "r2_beyond_mean": _total_r2(vectors, held.vectors, mean),
        "accuracy": float(right.mean()),
        "accuracy_original": float(original_right.mean()),
        "accuracy_good": float(right[good].mean()),
        "accuracy_good_original": float(original_right[good].mean()),
        "agreement": float(own.mean()),
        "agreement_good": float(own[good].mean()),
        "retention": _retention(right[good], original_right[good], held.chance),
        "specificity": float(specific.mean()),
        "specificity_low": low,
        "specificity_high": high,
        "rank_correlation": metrics.rank_correlation(right, original_right),
        "diversity": metrics.diversity(vectors, held.vectors),
        "nearest_training": float(metrics.nearest(vectors, held.training).distance.mean()),
        "shared_errors": float(errors.nanmean()),
    }
    models = {
        "model_id": held.model_ids,
        "accuracy": right.tolist(),
        "accuracy_original": original_right.tolist(),
        "agreement": own.tolist(),
        "good": good.tolist(),
    }
    return Reconstruction(name, values, dict(zip(_layer_names(trained), layers.tolist(), strict=True)), models)


def _retention(decoded: Float[Tensor, " P"], original: Float[Tensor, " P"], chance: float) -> float:
    return float(metrics.retention(decoded, original, chance)) if original.mean() > chance else float("nan")


def _layer_means(mean: Float[Tensor, " D"], trained: Trained) -> Float[Tensor, " D"]:
    groups = trained.tokenizer.groups
    size = groups.bincount().double()
    return (torch.zeros_like(size).index_add_(0, groups, mean.double()) / size)[groups]


def _total_r2(decoded: Tensor, original: Tensor, mean: Tensor) -> float:
    error = (decoded.double() - original.double()).square().sum()
    return float(1 - error / (original.double() - mean).square().sum())


def _layer_names(trained: Trained) -> Sequence[str]:
    tokenizer = trained.tokenizer
    of_token = (tokenizer.layers * len(tokenizer.role_names) + tokenizer.roles).unique().tolist()
    roles = tokenizer.role_names
    return [f"{key // len(roles)} {roles[key % len(roles)]}" for key in of_token]


def _interval(values: Float[Tensor, " P"], draws: int = 1000) -> tuple[float, float]:
    """95 % of the mean over models, by the bootstrap."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = values[chosen].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
