"""Features from behaviour: outputs of models on a few held-out images, a baseline of features of weights.

The images are *selection* images, so that no feature is measured on the images of test accuracy. Every model runs
once.
"""

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitzoo_hf.apply.properties.features import Features
from vitzoo_hf.evaluation.outputs_cache import digest_of
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.behavior import accuracy, cross_entropy
from vitzoo_hf.models.population import Population
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

CHUNK_BYTES = 2**28


def probing_features(
    zoo: Zoo,
    dataset: str,
    *,
    num_images: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Features:
    """Class probabilities of every model on the same few images: whole models, heads included.

    Args:
        zoo: classifiers of the classes of `dataset`.
        dataset: name of the dataset whose selection images are used.
        num_images: number of images.
        seed: seed of the draw of images.
        device: where the models run.
        progress: show a bar.

    Returns:
        Features `probing_N`, `[P, N * K]`.

    Raises:
        ZooError: if the zoo carries no selection or test images, too few of them, or heads differ in classes.

    Example:
        >>> zoo = Zoo.sample().filter(stage="finetune")
        >>> probing_features(zoo, "digits", num_images=4).values.shape
        (6, 40)
    """
    images, _ = probing_images(zoo, dataset, num_images, seed)
    logits, model_ids = _logits(zoo, images, device, progress)
    # probabilities, because logits of a model that is certain would dominate a linear predictor
    probabilities = logits.softmax(-1).numpy()
    classes = probabilities.shape[2]
    names = tuple(f"image {image} class {label}" for image in range(num_images) for label in range(classes))
    return Features(f"probing_{num_images}", model_ids, probabilities.reshape(len(model_ids), -1), names)


def measured_features(
    zoo: Zoo,
    dataset: str,
    *,
    num_images: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Features:
    """Accuracy and cross-entropy on the images of `probing_features`, for which labels are needed.

    Example:
        >>> zoo = Zoo.sample().filter(stage="finetune")
        >>> measured_features(zoo, "digits", num_images=4).names
        ('accuracy', 'cross-entropy')
    """
    images, labels = probing_images(zoo, dataset, num_images, seed)
    logits, model_ids = _logits(zoo, images, device, progress)
    values = torch.stack([accuracy(logits, labels).double(), cross_entropy(logits, labels).double()], 1)
    return Features(f"measured_{num_images}", model_ids, values.numpy(), ("accuracy", "cross-entropy"))


def probing_images(
    zoo: Zoo, dataset: str, num_images: int, seed: int
) -> tuple[Float[Tensor, "N C H W"], Int64[Tensor, " N"]]:
    """Draw labelled selection images that equal no test image, pixel by pixel.

    Raises:
        ZooError: if the zoo does not carry selection and test images, or too few selection images.
    """
    images, labels = zoo.probes(dataset, "selection")
    tested = {digest_of(image[None]) for image in zoo.probes(dataset, "test")[0]}
    # the two roles may share an image, since public datasets hold duplicates
    free = [place for place, image in enumerate(images) if digest_of(image[None]) not in tested]
    if not 1 <= num_images <= len(free):
        raise ZooError(
            f"num_images is {num_images}; {dataset} has {len(free)} selection images that are no test images: "
            "ask for 1 to as many"
        )
    # sorted, so that columns of features follow the order of the images in the zoo
    places = np.sort(np.random.default_rng(seed).choice(free, num_images, replace=False))
    return images[places], labels[places]


def _logits(
    zoo: Zoo, images: Float[Tensor, "N C H W"], device: str | torch.device, progress: bool
) -> tuple[Float64[Tensor, "P N K"], tuple[str, ...]]:
    """Logits of every model on every image, some models at a time."""
    ids = zoo.model_ids
    # by the largest model, because heads of one zoo may differ in size
    largest = max(zoo.to_pandas()["num_parameters"])
    size = max(1, CHUNK_BYTES // (4 * int(largest)))
    logits = []
    with progress_bar("probing", "model", shown=progress, total=len(ids)) as bar:
        for first in range(0, len(ids), size):
            chunk = ids[first : first + size]
            population = Population.from_rows(zoo.filter(model_id=chunk).rows(), device)
            logits.append(population(images).double().cpu())
            bar.update(len(chunk))
    if len({part.shape[2] for part in logits}) > 1:
        raise ZooError("models differ in the number of classes: filter by `dataset`")
    return torch.cat(logits), tuple(ids)
