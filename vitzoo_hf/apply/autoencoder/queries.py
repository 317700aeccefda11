"""Query images: what decoded networks are compared on in training, and what the originals make of them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.trained import Trained
from vitzoo_hf.corruptions import corrupted, parse_corruption
from vitzoo_hf.image_sets import statistics_of
from vitzoo_hf.population import Population
from vitzoo_hf.schema import ZooError
from vitzoo_hf.zoo import Zoo


@dataclass(frozen=True)
class Queries:
    """A pool of images, and the originals' outputs on it.

    Attributes:
        patches: of the pool.
        logits: of every training model on the pool, by its id.
    """

    patches: Float[Tensor, "Q t c"]
    logits: dict[str, Float[Tensor, "Q K"]]


def query_outputs(train: Zoo, trained: Trained, device: torch.device) -> Queries:
    """The pool of a recipe, and the outputs of training models, computed once.

    Raises:
        ZooError: if models differ in dataset, or the zoo has no selection images.
    """
    datasets = sorted(set(train.index["dataset"]))
    if len(datasets) > 1:
        raise ZooError(
            f"these models were trained on {datasets}, so no images are queries for all: filter by dataset"
        )
    images = query_images(train, datasets[0], trained.recipe).to(device)
    population = Population.from_rows(train.rows(), device)
    logits = dict(zip(population.model_ids, population(images), strict=True))
    return Queries(trained.networks.patches(images), logits)


def query_images(zoo: Zoo, dataset: str, recipe: AutoencoderRecipe) -> Float[Tensor, "Q C H W"]:
    """Images of a recipe's pool as the models of a dataset are fed them.

    Selection images; the same, corrupted; or as many of uniform noise between their least and greatest number.
    """
    images, _ = zoo.probes(dataset, "selection")
    generator = torch.Generator().manual_seed(recipe.seed)
    images = images[torch.randperm(len(images), generator=generator)[: recipe.pool]]
    if recipe.query_images == "data":
        return images
    if recipe.query_images == "noise":
        generator = torch.Generator().manual_seed(recipe.seed)
        low, high = float(images.min()), float(images.max())
        return low + (high - low) * torch.rand(images.shape, generator=generator)
    mean, std = statistics_of(zoo.manifest["images"][dataset])
    kind, severity = parse_corruption(recipe.query_images)
    pixels = (images * std + mean).clamp(0, 1)
    return (corrupted(pixels, kind, severity, seed=recipe.seed) - mean) / std
