"""A row -> its checked vector, its layout, and a live timm ViT."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitzoo_hf import schema
from vitzoo_hf.flatten import Layout, unflatten
from vitzoo_hf.schema import ZooError
from vitzoo_hf.vit import assign, blank, layout_of


def reconstruct(row: Mapping[str, Any], *, device: str | torch.device = "cpu") -> nn.Module:
    """A live timm ViT in eval mode from any row of `load_dataset(…)` or `Zoo.rows()`.

    Args:
        row: has `weights` (list, array, tensor or little-endian bytes) and the architecture columns.
        device: where the model goes, in one copy; its parameters are views of one vector.

    Raises:
        ZooError: if columns are missing, or the weights do not fit the architecture, are not finite, or do not match
            the row's `weights_sha256`; to rebuild changed weights, give a row without it.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> reconstruct(next(Zoo.sample().rows())).training
        False
    """
    place = usable_device(device)
    vector, layout = checked_vector(row)
    model = blank(*architecture_of(row))
    return assign(model, unflatten(vector.to(place, copy=True), layout)).eval()


def architecture_of(row: Mapping[str, Any]) -> tuple[str, dict[str, Any], str, int | None]:
    """Architecture, its arguments, head and hidden width of a row: what `vit.create` takes."""
    missing = [name for name in ("architecture", "architecture_args", "head", "weights") if name not in row]
    if missing:
        raise ZooError(f"the row has no column {missing[0]!r}: take whole rows, `load_dataset(id, 'weights')`")
    head = row["head"]
    if not isinstance(head, str):
        if not 0 <= head < len(schema.HEADS):
            raise ZooError(f"unknown head {head}: its class labels are 0 (linear) and 1 (mlp)")
        head = schema.HEADS[head]
    try:
        args = json.loads(row["architecture_args"])
    except (TypeError, json.JSONDecodeError):
        raise ZooError(f"architecture_args is {row['architecture_args']!r}; expected a JSON object") from None
    hidden = row.get("head_hidden")
    return row["architecture"], args, head, None if hidden is None or hidden != hidden else int(hidden)


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ZooError: for an unknown device, or one that is not here.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ZooError(f"unknown device {device!r}: expected cpu, cuda or cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ZooError(
            f"device {str(device)!r} is not here: this torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return found


def checked_vector(row: Mapping[str, Any]) -> tuple[Tensor, Layout]:
    """The flat vector of a row and the layout of its architecture, checked against each other.

    Raises:
        ZooError: for a wrong length, a layout of another architecture, a weight that is not finite, or weights that
            are not those of the row's `weights_sha256`, if it has one.
    """
    layout = layout_of(*architecture_of(row))
    weights, name = row["weights"], row.get("model_id", "the row")
    if isinstance(weights, bytes | bytearray | memoryview):
        size = memoryview(weights).nbytes
        if size % 4:
            raise ZooError(f"{name} has {size} bytes of weights; its layout wants {4 * layout.num_parameters}")
        weights = np.frombuffer(weights, dtype="<f4")
    try:
        numbers = weights if isinstance(weights, Tensor) else torch.from_numpy(np.array(weights, dtype=np.float32))
    except (TypeError, ValueError):
        raise ZooError(f"{name} has weights that are not numbers, but {type(weights).__name__}") from None
    vector = numbers.float()
    if row.get("layout", layout.fingerprint) != layout.fingerprint:
        raise ZooError(
            f"{name} has layout {row['layout']}, its architecture {layout.fingerprint}: it was made otherwise"
        )
    if vector.shape != (layout.num_parameters,):
        raise ZooError(
            f"{name} has weights of shape {tuple(vector.shape)}; its layout wants [{layout.num_parameters}]"
        )
    bad = int(vector.numel() - vector.isfinite().sum())
    if bad:
        raise ZooError(f"{name} has {bad} weights that are not finite: it cannot be rebuilt")
    if row.get("weights_sha256", "") and schema.weights_sha256(vector.cpu().numpy()) != row["weights_sha256"]:
        raise ZooError(f"the weights of {name} do not match their hash: they were changed, or belong to another row")
    return vector, layout
