"""Task arithmetic on rows: task vectors, their sums and negation, with scales selected on selection images.

Ilharco et al. 2023, "Editing Models with Task Arithmetic": a task vector is the change of weights by
fine-tuning. Against the parent, a task vector has the trunk alone, because the parent's head has other classes.
Against the child's own epoch 0, it may have every parameter, because epoch 0 has the parent's trunk and the head that
training began with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitzoo_hf.apply.candidates import candidate_scores
from vitzoo_hf.format.layout import Layout, trunk_layout
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.weight_distances import task_vectors
from vitzoo_hf.models.rebuild import checked_vector


@dataclass(frozen=True, eq=False)
class TaskVector:
    """A change of weights, with addition, negation and multiplication by a number.

    Attributes:
        values: the change, float32 `[D]`.
        layout: names and shapes of the changed tensors: all tensors of the models, or the trunk alone.
        name: description for error messages.
    """

    values: Float[Tensor, " D"]
    layout: Layout
    name: str

    def __add__(self, other: "TaskVector") -> "TaskVector":
        if self.layout.fingerprint != other.layout.fingerprint:
            raise ZooError(
                f"{self.name} and {other.name} change different tensors: take both with the head, or both without"
            )
        return TaskVector(self.values + other.values, self.layout, f"{self.name} + {other.name}")

    def __neg__(self) -> "TaskVector":
        return TaskVector(-self.values, self.layout, f"-({self.name})")

    def __rmul__(self, scale: int | float) -> "TaskVector":
        return TaskVector(scale * self.values, self.layout, f"{scale:g} * ({self.name})")


def task_vector(child: RowLike, base: RowLike, *, head: bool = False) -> TaskVector:
    """The weights of a row less the weights that its training began from.

    Args:
        child: a row of `Zoo.rows()`.
        base: the child's parent (`parent_id`), or the child's own epoch 0.
        head: include the head. This is meaningful only if both rows have the same classes and kind of head, as the
            child's own epoch 0 has.

    Raises:
        ZooError: if the trunks differ in layout, or, with `head`, the rows differ in layout or dataset.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> child = next(Zoo.sample().filter(stage="finetune").rows())
        >>> change = task_vector(child, Zoo.sample().row(child["parent_id"]))
        >>> edited_weights(child, -1 * change).shape == child["weights"].shape
        True
    """
    child, base = Row.of(child), Row.of(base)
    (after, layout), (before, other) = (checked_vector(row) for row in (child, base))
    name = f"{child.name} - {base.name}"
    # equal shapes are not enough: ten digits and ten garments have equal heads
    if head and (layout.fingerprint, child.dataset) != (other.fingerprint, base.dataset):
        raise ZooError(f"{name}: their heads differ in kind or classes: take the trunk alone (head=False)")
    part = layout if head else trunk_layout(layout)
    if not head and part.fingerprint != trunk_layout(other).fingerprint:
        raise ZooError(f"{name}: their trunks have different tensors, so there is no difference: take its own parent")
    # by name, because heads of other sizes shift the tensors behind them
    ends = [
        torch.cat([vector[places.place(tensor)] for tensor in part.names])
        for vector, places in ((after, layout), (before, other))
    ]
    return TaskVector(task_vectors(ends[0][None], ends[1][None])[0], part, name)


def edited_weights(row: RowLike, change: TaskVector) -> Float[Tensor, " D"]:
    """The weights of a row plus a task vector; tensors that are not in the task vector keep their values.

    Raises:
        ZooError: if the row lacks a tensor of the task vector, or has it in another shape.
    """
    row = Row.of(row)
    vector, layout = checked_vector(row)
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    # the vector may share memory with the row of the caller
    edited = vector.clone()
    for (name, place), shape in zip(change.layout.items(), change.layout.shapes, strict=True):
        if shapes.get(name) != shape:
            raise ZooError(f"{row.name} has no tensor {name!r} of shape {list(shape)}, which {change.name} changes")
        edited[layout.place(name)] += change.values[place]
    return edited


def random_change(like: TaskVector, seed: int) -> TaskVector:
    """Gaussian noise with the norm of a task vector in every tensor: a control for the vector's direction."""
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(len(like.values), dtype=np.float32))
    for _, place in like.layout.items():
        length = noise[place].norm()
        # tensor by tensor, because norms of task vectors differ by layer
        noise[place] *= like.values[place].norm() / length if length > 0 else 0.0
    return TaskVector(noise, like.layout, f"noise like {like.name}")


def scale_table(
    row: RowLike,
    change: TaskVector,
    scales: Sequence[float],
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    *,
    device: str | torch.device = "cpu",
) -> pd.DataFrame:
    """Loss and accuracy of a row with a task vector added at each of several scales: `scale`, `loss`, `accuracy`.

    Select a scale on selection images, and report the selected one on test images.

    Raises:
        ZooError: for no scale, or if the row lacks a tensor of the task vector or has it in another shape.
    """
    if not scales:
        raise ZooError("no scale was given: expected some, such as [0, 0.5, 1]")
    lines = []
    for scale in scales:  # one at a time, so that memory is two vectors
        vector = edited_weights(row, scale * change)
        scores = candidate_scores(vector[None], row, images, labels, device=device)
        lines.append({"scale": float(scale), "loss": float(scores.loss), "accuracy": float(scores.accuracy)})
    return pd.DataFrame(lines)


def best_scale(selection: pd.DataFrame) -> float:
    """The scale with the highest accuracy on selection images; ties go to the lowest loss.

    Raises:
        ZooError: for a table without a row.

    Example:
        >>> best_scale(pd.DataFrame({"scale": [0.0, 1.0, 2.0], "loss": [2.0, 0.5, 0.4], "accuracy": [0.1, 0.9, 0.8]}))
        1.0
    """
    if not len(selection):
        raise ZooError("the table has no scale to select: expected the rows of `scale_table`")
    # stable, so that of scales equal in both measures the first is taken
    return float(selection.sort_values(["accuracy", "loss"], ascending=[False, True], kind="stable")["scale"].iloc[0])


def strongest_scale(control: pd.DataFrame, *, kept: float = 0.95) -> float:
    """The largest scale at which a control task retains the share `kept` of its accuracy at scale 0.

    Ilharco et al. select the scale of forgetting by this rule, on selection images.

    Raises:
        ZooError: if the table has no scale 0.

    Example:
        >>> table = pd.DataFrame({"scale": [0.0, 0.5, 1.0], "loss": [0.1, 0.2, 0.9], "accuracy": [0.9, 0.89, 0.5]})
        >>> strongest_scale(table)
        0.5
    """
    start = control[control["scale"] == 0]
    if not len(start):
        raise ZooError("the table has no scale 0, the reference of accuracy: give 0 among the scales")
    allowed = control[control["accuracy"] >= kept * float(start["accuracy"].iloc[0])]
    # the scale 0 is always allowed, so there is one
    return float(allowed.loc[allowed["scale"].abs().idxmax(), "scale"])
