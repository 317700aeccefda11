"""How far models of a two-colour world rely on colour: what they answer when images change colour and nothing else.

Reliance, not accuracy elsewhere, is what leakage of colour–label agreement should follow (Mahajan et al. 2021).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitzoo_hf.apply.distribution_inference.zoo_views import world_of
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.behavior import accuracy
from vitzoo_hf.models.population import Population
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.zoo import Zoo

if TYPE_CHECKING:
    import pandas

CHUNK_NUMBERS = 2**26
"""Weights, and numbers of outputs, that are held at once."""


def recoloured(images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Images of a two-colour world in the other colour: channels 0 and 1 exchanged.

    Args:
        images: normalised with one mean and deviation for both channels, as `Zoo.probes` gives them.

    Example:
        >>> recoloured(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)).flatten()
        tensor([2., 1., 3.])
    """
    return images[:, [1, 0, 2]]


def colour_reliance(logits: Float[Tensor, "P N K"], other: Float[Tensor, "P N K"]) -> Float[Tensor, " P"]:
    """Mean absolute change of P(Y = 1) when N images change colour: `mean |p(x) − p(recoloured x)|`, in [0, 1].

    Args:
        logits: of P models on the images.
        other: of the same models on the same images in the other colour.

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
    """What every model of a world does on the zoo's test images; one row a model, in the order of the zoo.

    Columns: `model_id`; `accuracy`, on test images drawn equally from the worlds of the zoo; `flipped_accuracy`, on
    images whose colour agrees with the label in one of ten, NaN where colour never mattered; `colour_reliance`.

    Args:
        zoo: its rows are measured; weights are read in parts that fit in memory.
        dataset: of the world; the only one by default.
        device: where models run.
        progress: show a bar.

    Raises:
        ZooError: if the zoo has no world, or several and none is named.
    """
    import pandas

    name = world_of(zoo, dataset)
    images, labels = zoo.probes(name, "test")
    sets = [images, recoloured(images)]
    has_flipped = f"{name}-flipped" in zoo.manifest["images"]
    if has_flipped:
        flipped_images, flipped_labels = zoo.probes(f"{name}-flipped", "test")
        sets.append(flipped_images)
    records = []
    chosen = zoo.filter(dataset=name)
    with progress_bar("measuring", "model", shown=progress, total=len(chosen)) as bar:
        for rows in rows_in_parts(chosen, 6 * len(images)):
            population = Population.from_rows(rows, device=device)
            logits = [population(each) for each in sets]
            measured = {
                "accuracy": accuracy(logits[0], labels.to(logits[0].device)),
                "flipped_accuracy": accuracy(logits[2], flipped_labels.to(logits[2].device))
                if has_flipped
                else torch.full((len(rows),), torch.nan),
                "colour_reliance": colour_reliance(logits[0], logits[1]),
            }
            columns = {column: values.double().tolist() for column, values in measured.items()}
            ids = [row["model_id"] for row in rows]
            records.append(pandas.DataFrame({"model_id": ids} | columns))
            bar.update(len(rows))
    return pandas.concat(records, ignore_index=True)


def rows_in_parts(zoo: Zoo, outputs: int) -> Iterator[list[dict[str, Any]]]:
    """Rows with their weights, as many at a time as `CHUNK_NUMBERS` leaves room for; at least one.

    Args:
        zoo: its rows are read in their order.
        outputs: numbers that are held of a model beside its weights.
    """
    part: list[dict[str, Any]] = []
    size = 0
    for row in zoo.rows():
        needed = row["num_parameters"] + outputs
        if part and size + needed > CHUNK_NUMBERS:
            yield part
            part, size = [], 0
        part.append(row)
        size += needed
    if part:
        yield part
