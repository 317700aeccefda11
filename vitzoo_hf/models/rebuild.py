"""A row -> its checked vector, its layout, and a live timm ViT."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from vitzoo_hf.format import schema
from vitzoo_hf.format.encoding import vector_of
from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.vit import filled, layout_of


class VerifiedRow(dict[str, Any]):
    """A row whose weights were compared with its hash when they were read; changing an entry ends that."""

    verified = True

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.verified = False


def reconstruct(
    row: Mapping[str, Any] | pa.Table, *, device: str | torch.device = "cpu", verify: bool = True, copy: bool = False
) -> nn.Module:
    """A live timm ViT in eval mode from any row of `load_dataset(…)` or `Zoo.rows()`.

    Args:
        row: has `weights` (list, array, tensor, or bytes of the row's `dtype`) and the architecture columns; or a
            table of one row, as `with_format("arrow")` gives it.
        device: where the model goes, in one copy; its parameters are views of one vector.
        verify: refuse weights that are not finite or not those of the row's `weights_sha256`. Rows of `Zoo.rows()`
            were verified when they were read and are not again, unless a model shares their memory.
        copy: on the CPU, parameters are views of the row's own memory where it is float32 and may be written to, so
            that nothing is copied; give True for a model that leaves its row alone when it is trained.

    Raises:
        ZooError: if columns are missing, or the weights do not fit the architecture, are not finite, or do not match
            the row's `weights_sha256`; to rebuild changed weights, give a row without it.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> reconstruct(next(Zoo.sample().rows())).training
        False
    """
    place = usable_device(device)
    vector, layout = checked_vector(row, verify=verify)
    if isinstance(row, VerifiedRow) and not copy:
        row.verified = False  # who trains the model changes the row
    own = vector.to(place) if place.type != "cpu" or not copy else vector.clone()
    return filled(*architecture_of(row), unflatten(own, layout))


def architecture_of(row: Mapping[str, Any] | pa.Table) -> tuple[str, dict[str, Any], str, int | None]:
    """Architecture, its arguments, head and hidden width of a row: what `vit.create` takes."""
    columns = row.column_names if isinstance(row, pa.Table) else row
    missing = [name for name in ("architecture", "architecture_args", "head", "weights") if name not in columns]
    if missing:
        raise ZooError(f"the row has no column {missing[0]!r}: take whole rows, `load_dataset(id, 'weights')`")
    row = light_values(row)
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
    if found.type == "meta":
        raise ZooError("device 'meta' holds no numbers: expected cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ZooError(
            f"device {str(device)!r} is not here: this torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return found


def light_values(row: Mapping[str, Any] | pa.Table) -> Mapping[str, Any]:
    """The columns of a row but its weights, as Python values.

    Raises:
        ZooError: for a table that has not exactly one row.
    """
    if not isinstance(row, pa.Table):
        return row
    if row.num_rows != 1:
        raise ZooError(f"a table of {row.num_rows} rows was given; expected one row, such as `rows[0]`")
    return {name: row[name][0].as_py() for name in row.column_names if name != "weights"}


def weights_of(row: Mapping[str, Any] | pa.Table) -> np.ndarray:
    """The weights of any row as a float32 vector `[D]`, without a copy where they are float32 in memory.

    Takes every encoding and dtype of the format; the length is compared with `num_parameters`.

    Args:
        row: of `load_dataset(…)` in any format, or of `Zoo.rows()`.

    Raises:
        ZooError: if there are no weights, or not as many as the row says.

    Example:
        >>> import pyarrow.parquet as pq
        >>> from vitzoo_hf.zoo import SAMPLE
        >>> rows = pq.read_table(next((SAMPLE / "weights").glob("train-*")))
        >>> weights_of(rows.slice(0, 1)).shape
        (26922,)
    """
    if "weights" not in (row.column_names if isinstance(row, pa.Table) else row):
        raise ZooError("the row has no column 'weights': take whole rows, `load_dataset(id, 'weights')`")
    light = light_values(row)
    size = light.get("num_parameters")
    return vector_of(
        row["weights"],
        name=light.get("model_id", "the row"),
        num_parameters=None if size is None else int(size),
        dtype=light.get("dtype") or "float32",
        sha256=light.get("weights_sha256"),
    )


def checked_vector(row: Mapping[str, Any] | pa.Table, *, verify: bool = True) -> tuple[Tensor, Layout]:
    """The flat vector of a row and the layout of its architecture, checked against each other.

    The vector is one's own to write to: memory that may not be written to is copied.

    Raises:
        ZooError: for a wrong length, a layout of another architecture and, if it is to be verified, a weight that is
            not finite, or weights that are not those of the row's `weights_sha256`, if it has one.
    """
    layout = layout_of(*architecture_of(row))
    light = light_values(row)
    name = light.get("model_id", "the row")
    if light.get("layout", layout.fingerprint) != layout.fingerprint:
        raise ZooError(
            f"{name} has layout {light['layout']}, its architecture {layout.fingerprint}: it was made otherwise"
        )
    if isinstance(row["weights"], Tensor):
        vector = row["weights"].detach().float()
    else:
        values = weights_of(row)
        vector = torch.from_numpy(values if values.flags.writeable else values.copy())
    if vector.shape != (layout.num_parameters,):
        raise ZooError(
            f"{name} has weights of shape {tuple(vector.shape)}; its layout wants [{layout.num_parameters}]"
        )
    if verify and not getattr(row, "verified", False):
        _verify(vector, light.get("weights_sha256"), name)
    return vector, layout


def _verify(vector: Tensor, sha256: str | None, name: str) -> None:
    values = vector.cpu().numpy()
    finite = np.isfinite(values)
    if not finite.all():
        raise ZooError(f"{name} has {(~finite).sum()} weights that are not finite: it cannot be rebuilt")
    if sha256 and schema.weights_sha256(values) != sha256:
        raise ZooError(f"the weights of {name} do not match their hash: they were changed, or belong to another row")
