"""A row to its checked vector, its layout, and a live timm ViT."""

import numpy as np
import torch
from torch import Tensor, nn

from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.row import Row, RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture


def reconstruct(
    row: RowLike, *, device: str | torch.device = "cpu", verify: bool = True, copy: bool = False
) -> nn.Module:
    """A live timm ViT in eval mode from any row of `load_dataset(…)` or `Zoo.rows()`.

    Args:
        row: a row with `weights` (list, array, tensor, or bytes of the row's `dtype`) and the architecture columns,
            or a table of one row, which `with_format("arrow")` gives.
        device: where the model goes, in one copy; its parameters are views of one vector.
        verify: refuse weights that are not finite or do not match the row's `weights_sha256`. Rows of `Zoo.rows()`
            are verified when they are read, and again only after a model shared their memory.
        copy: on the CPU, parameters are views of the row's own memory where it is float32 and may be written to, so
            that nothing is copied; give True for a model whose training does not change the row.

    Raises:
        ZooError: if columns are missing, or the weights do not fit the architecture, are not finite, or do not match
            the row's `weights_sha256`; to rebuild changed weights, give a row without it.

    Example:
        >>> from vitzoo_hf.zoo import Zoo
        >>> reconstruct(next(Zoo.sample().rows())).training
        False
    """
    target, row = usable_device(device), Row.of(row)
    architecture = Architecture.of(row)
    vector = architecture.vector_of(row, verify=verify)
    if not copy:
        row.lend()  # training the model changes the row
    # a copy to another device is a copy already
    vector = vector.to(target) if target.type != "cpu" or not copy else vector.clone()
    return architecture.module(unflatten(vector, architecture.layout))


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it; `cuda` with the index of the current one.

    Raises:
        ZooError: for an unknown device, or a device that this machine lacks.
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
    # the current device is one of the thread: another thread would take "cuda" for another GPU
    return torch.device("cuda", torch.cuda.current_device()) if target == torch.device("cuda") else target


def weights_of(row: RowLike) -> np.ndarray:
    """The weights of any row as a float32 vector `[D]`, without a copy where they are float32 in memory.

    Takes every encoding and dtype of the format; the length is compared with `num_parameters`.

    Args:
        row: a row of `load_dataset(…)` in any format, or of `Zoo.rows()`.

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
    """The flat vector of a row, float32 `[D]` and writable, with the layout of its architecture.

    Raises:
        ZooError: see `Architecture.vector_of`.
    """
    row = Row.of(row)
    architecture = Architecture.of(row)
    return architecture.vector_of(row, verify=verify), architecture.layout
