"""A row -> its checked vector, its layout, and a live timm ViT."""

import numpy as np
import torch
from torch import Tensor, nn

from vitzoo_hf.format import schema
from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture


def reconstruct(
    row: RowLike, *, device: str | torch.device = "cpu", verify: bool = True, copy: bool = False
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
    target, row = usable_device(device), Row.of(row)
    vector, layout = checked_vector(row, verify=verify)
    if not copy:
        row.lend()  # training the model changes the row
    vector = vector.to(target) if target.type != "cpu" or not copy else vector.clone()
    return Architecture.of(row).module(unflatten(vector, layout))


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ZooError: for an unknown device, or one that is not here.
    """
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ZooError(f"unknown device {device!r}: expected cpu, cuda or cuda:N") from None
    if target.type == "meta":
        raise ZooError("device 'meta' holds no numbers: expected cpu, cuda or cuda:N")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ZooError(
            f"device {str(device)!r} is not here: this torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return target


def weights_of(row: RowLike) -> np.ndarray:
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
    return Row.of(row).weights


def checked_vector(row: RowLike, *, verify: bool = True) -> tuple[Tensor, Layout]:
    """The flat vector of a row and the layout of its architecture, checked against each other.

    The vector may be written to: memory that may not be is copied.

    Raises:
        ZooError: for a wrong length, a layout of another architecture and, if it is to be verified, a weight that is
            not finite, or weights that are not those of the row's `weights_sha256`, if it has one.
    """
    row = Row.of(row)
    layout = Architecture.of(row).layout
    if row.layout is not None and row.layout != layout.fingerprint:
        raise ZooError(
            f"{row.name} has layout {row.layout}, its architecture {layout.fingerprint}: it was made otherwise"
        )
    if "weights" in row and isinstance(row["weights"], Tensor):
        vector = row["weights"].detach().float()
    else:
        values = row.weights
        vector = torch.from_numpy(values if values.flags.writeable else values.copy())
    if vector.shape != (layout.num_parameters,):
        raise ZooError(
            f"{row.name} has weights of shape {tuple(vector.shape)}; its layout wants [{layout.num_parameters}]"
        )
    if verify and not row.verified:
        _verify(vector, row.weights_sha256, row.name)
    return vector, layout


def _verify(vector: Tensor, sha256: str | None, name: str) -> None:
    values = vector.cpu().numpy()
    finite = np.isfinite(values)
    if not finite.all():
        raise ZooError(f"{name} has {(~finite).sum()} weights that are not finite: it cannot be rebuilt")
    if sha256 and schema.weights_sha256(values) != sha256:
        raise ZooError(f"the weights of {name} do not match their hash: they were changed, or belong to another row")
