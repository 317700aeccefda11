"""Task arithmetic on rows: task vectors, their sums and negation, with scales chosen on selection images.

Ilharco et al. 2023, "Editing Models with Task Arithmetic": a task vector is what fine-tuning changed. Heads are
handled explicitly. Against the parent a vector has the trunk alone, as the parent's head answers with other classes;
against the child's own epoch 0, whose trunk is the parent's and whose head is the one training began with, it may
have every parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.apply.candidates import candidate_scores
from vitzoo_hf.format.layout import Layout, is_head
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.weight_distances import task_vectors
from vitzoo_hf.models.rebuild import checked_vector


@dataclass(frozen=True, eq=False)
class TaskVector:
    """A change of weights; add two, negate one, multiply one by a number.

    Attributes:
        values: float32 `[T]`.
        layout: of the values: all tensors of the models, or those of the trunk.
        name: where it is from.
    """

    values: Float[Tensor, " T"]
    layout: Layout
    name: str

    def __add__(self, other: "TaskVector") -> "TaskVector":
        if self.layout.fingerprint != other.layout.fingerprint:
            raise ZooError(f"{self.name} and {other.name} change other tensors: take both with or without the head")
        return TaskVector(self.values + other.values, self.layout, f"{self.name} + {other.name}")

    def __neg__(self) -> "TaskVector":
        return TaskVector(-self.values, self.layout, f"-({self.name})")

    def __rmul__(self, scale: int | float) -> "TaskVector":
        return TaskVector(scale * self.values, self.layout, f"{scale:g} * ({self.name})")


def task_vector(child: Mapping[str, Any], base: Mapping[str, Any], *, head: bool = False) -> TaskVector:
    """The weights of a row less those of the row it began from.

    Args:
        child: a row of `Zoo.rows()`.
        base: its parent (`parent_id`), or its own epoch 0.
        head: take the head along, which only means something where both answer with the same classes through the
            same kind of head: for the child's own epoch 0.

    Raises:
        ZooError: if the trunks differ in layout, or with `head` the rows in layout or dataset.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> child = next(Zoo.sample().filter(stage="finetune").rows())
        >>> change = task_vector(child, Zoo.sample().row(child["parent_id"]))
        >>> edited_weights(child, -1 * change).shape == child["weights"].shape
        True
    """
    (after, layout), (before, other) = (checked_vector(row) for row in (child, base))
    name = f"{child['model_id']} - {base['model_id']}"
    if head and (layout.fingerprint, child["dataset"]) != (other.fingerprint, base["dataset"]):
        raise ZooError(f"{name}: their heads are of other kinds or other classes: take the trunk alone (head=False)")
    part = layout if head else _trunk(layout)
    if not head and part.fingerprint != _trunk(other).fingerprint:
        raise ZooError(f"{name}: their trunks have other tensors, so there is no difference")
    picked = [
        torch.cat([vector[own.place(tensor)] for tensor in part.names])
        for vector, own in ((after, layout), (before, other))
    ]
    return TaskVector(task_vectors(picked[0][None], picked[1][None])[0], part, name)


def edited_weights(row: Mapping[str, Any], change: TaskVector) -> Float[Tensor, " D"]:
    """The weights of a row with a task vector added; tensors the vector does not have stay as they are.

    Raises:
        ZooError: if the row lacks a tensor of the vector, or has it in another shape.
    """
    vector, layout = checked_vector(row)
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    edited = vector.clone()
    for (name, place), shape in zip(change.layout.items(), change.layout.shapes, strict=True):
        if shapes.get(name) != shape:
            raise ZooError(
                f"{row['model_id']} has no tensor {name!r} of shape {list(shape)}, which {change.name} changes"
            )
        edited[layout.place(name)] += change.values[place]
    return edited


def random_change(like: TaskVector, seed: int) -> TaskVector:
    """Gaussian noise with the norm of a task vector in every tensor: the control for its direction."""
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(len(like.values), dtype=np.float32))
    for _, place in like.layout.items():
        length = noise[place].norm()
        noise[place] *= like.values[place].norm() / length if length > 0 else 0.0
    return TaskVector(noise, like.layout, f"noise like {like.name}")


def scale_table(
    row: Mapping[str, Any],
    change: TaskVector,
    scales: Sequence[float],
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    *,
    device: str | torch.device = "cpu",
) -> pd.DataFrame:
    """Loss and accuracy of a row with a task vector added at each of several scales: `scale`, `loss`, `accuracy`.

    Give selection images to choose a scale by, and test images for the one that was chosen. Scales run one after the
    other, so that memory is two vectors.

    Raises:
        ZooError: for no scale; as `edited_weights`.
    """
    if not scales:
        raise ZooError("no scale was given: expected some, such as [0, 0.5, 1]")
    lines = []
    for scale in scales:
        vector = edited_weights(row, scale * change)
        scores = candidate_scores(vector[None], row, images, labels, device=device)
        lines.append({"scale": float(scale), "loss": float(scores.loss), "accuracy": float(scores.accuracy)})
    return pd.DataFrame(lines)


def best_scale(selection: pd.DataFrame) -> float:
    """The scale with the highest accuracy on selection images; of equal ones that with the lowest loss.

    Raises:
        ZooError: for a table without a row.

    >>> best_scale(pd.DataFrame({"scale": [0.0, 1.0, 2.0], "loss": [2.0, 0.5, 0.4], "accuracy": [0.1, 0.9, 0.8]}))
    1.0
    """
    if not len(selection):
        raise ZooError("the table has no scale to choose: expected the rows of `scale_table`")
    return float(selection.sort_values(["accuracy", "loss"], ascending=[False, True], kind="stable")["scale"].iloc[0])


def strongest_scale(control: pd.DataFrame, *, kept: float = 0.95) -> float:
    """The largest scale at which a control task keeps this share of its accuracy at scale 0, on selection images.

    The rule by which Ilharco et al. choose how far to forget: as far as the control allows.

    Raises:
        ZooError: if the table has no scale 0.

    Example:
        >>> table = pd.DataFrame({"scale": [0.0, 0.5, 1.0], "loss": [0.1, 0.2, 0.9], "accuracy": [0.9, 0.89, 0.5]})
        >>> strongest_scale(table)
        0.5
    """
    start = control[control["scale"] == 0]
    if not len(start):
        raise ZooError("the table has no scale 0, beside which accuracy is kept or lost: give 0 among the scales")
    allowed = control[control["accuracy"] >= kept * float(start["accuracy"].iloc[0])]
    return float(allowed.loc[allowed["scale"].abs().idxmax(), "scale"])


def _trunk(layout: Layout) -> Layout:
    kept = [(name, shape) for name, shape in zip(layout.names, layout.shapes, strict=True) if not is_head(name)]
    return Layout(tuple(name for name, _ in kept), tuple(shape for _, shape in kept))
