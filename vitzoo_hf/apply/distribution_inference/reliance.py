"""Reliance of models of a two-colour world on colour: the change of their outputs when only the colour changes.

Leakage of colour–label agreement should follow reliance, not accuracy in other worlds (Mahajan et al. 2021).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.zoo_views import world_of
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.behavior import accuracy
from vitzoo_hf.models.population import Population
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

if TYPE_CHECKING:
    import pandas

CHUNK_NUMBERS = 2**26
"""Numbers of weights and outputs in memory at once."""


def recoloured(images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Exchange the two colours of images of a two-colour world: channels 0 and 1.

    Args:
        images: images, normalised with one mean and deviation for both channels, as `Zoo.probes` gives them.

    Example:
        >>> recoloured(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)).flatten()
        tensor([2., 1., 3.])
    """
    # exact for normalised images too, since both channels share one mean and deviation
    return images[:, [1, 0, 2]]


def colour_reliance(logits: Float[Tensor, "P N C"], other: Float[Tensor, "P N C"]) -> Float[Tensor, " P"]:
    """Mean absolute change of P(Y = 1) when N images change colour: `mean |p(x) − p(recoloured x)|`, in [0, 1].

    Args:
        logits: outputs of P models on the images.
        other: outputs of these models on these images in the other colour.

    Raises:
        ZooError: for shapes that differ, or other than two classes.

    Example:
        >>> sure = torch.tensor([[[100.0, 0.0]]])
        >>> colour_reliance(sure, sure), colour_reliance(sure, sure.flip(2))
        (tensor([0.]), tensor([1.]))
    """
    if logits.shape != other.shape or logits.shape[2] != 2:
        raise ZooError(
            f"logits {list(logits.shape)} and {list(other.shape)}; expected two of [P, N, 2], on the same images in"
            " both colours"
        )
    return (logits.softmax(2)[..., 1] - other.softmax(2)[..., 1]).abs().mean(1)


def world_behaviour(
    zoo: Zoo, dataset: str | None = None, *, device: str | torch.device = "cpu", progress: bool = True
) -> "pandas.DataFrame":
    """Measure every model of a world on the zoo's test images; one row a model, in the order of the zoo.

    Columns: `model_id`; `accuracy`, on test images drawn equally from the worlds of the zoo; `flipped_accuracy`, on
    images whose colour agrees with the label in one of ten, NaN for a zoo without such images; `colour_reliance`.

    Args:
        zoo: zoo of the models; weights are read in parts that fit in memory.
        dataset: dataset of the world; the only world of the zoo by default.
        device: device that runs the models.
        progress: show a bar.

    Raises:
        ZooError: if the zoo has no world, or has several and `dataset` is not given.
    """
    import pandas

    name = world_of(zoo, dataset)
    images, labels = zoo.probes(name, "test")
    # one population runs all sets, so weights are read once
    sets = [images, recoloured(images)]
    has_flipped = f"{name}-flipped" in zoo.manifest["images"]
    if has_flipped:
        flipped_images, flipped_labels = zoo.probes(f"{name}-flipped", "test")
        sets.append(flipped_images)
    records = []
    members = zoo.filter(dataset=name)
    with progress_bar("measuring", "model", shown=progress, total=len(members)) as bar:
        # three sets of images with two outputs each
        for rows in rows_in_parts(members, 6 * len(images)):
            population = Population.from_rows(rows, device=device)
            logits = [population(part) for part in sets]
            measured = {
                "accuracy": accuracy(logits[0], labels.to(logits[0].device)),
                "flipped_accuracy": accuracy(logits[2], flipped_labels.to(logits[2].device))
                if has_flipped
                else torch.full((len(rows),), torch.nan),
                "colour_reliance": colour_reliance(logits[0], logits[1]),
            }
            columns = {column: values.double().tolist() for column, values in measured.items()}
            ids = [row.model_id for row in rows]
            records.append(pandas.DataFrame({"model_id": ids} | columns))
            bar.update(len(rows))
    return pandas.concat(records, ignore_index=True)


def rows_in_parts(zoo: Zoo, outputs: int) -> Iterator[list[Row]]:
    """Yield rows in parts whose weights and outputs are at most `CHUNK_NUMBERS` numbers; a part has at least one row.

    Args:
        zoo: zoo of the rows, read in its order.
        outputs: numbers of outputs of a model that are in memory with its weights.
    """
    part: list[Row] = []
    size = 0
    for row in zoo.rows():
        needed = row["num_parameters"] + outputs
        # a model beyond the bound still gets a part of its own
        if part and size + needed > CHUNK_NUMBERS:
            yield part
            part, size = [], 0
        part.append(row)
        size += needed
    if part:
        yield part
