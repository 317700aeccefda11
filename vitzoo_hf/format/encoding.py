"""A flat vector <-> what a row stores: a list of float32, or raw little-endian bytes of float32, float16 or bfloat16.

Decoding never copies float32 that is in memory already, and always compares the length with what the row says:
the formats `torch` and `numpy` of `datasets` cut trailing zero bytes off binary columns.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vitzoo_hf.format import schema
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def encoding_of(num_parameters: int, dtype: str = "float32") -> str:
    """How rows of this size are stored: `list` (float32 up to 250,000 parameters) or `binary`."""
    return "list" if dtype == "float32" and num_parameters <= schema.LIST_LIMIT else "binary"


def check_dtype(dtype: str) -> None:
    """Refuse a storage type that does not exist.

    Raises:
        ZooError: naming those that do.
    """
    if dtype not in ITEM_BYTES:
        raise ZooError(f"unknown dtype {dtype!r}: {did_you_mean(str(dtype), ITEM_BYTES)}")


def check_finite(vectors: Tensor | Sequence[Tensor], names: Iterable[str]) -> None:
    """Refuse weights that are not finite.

    Args:
        vectors: weights of P models, `[P, D]` or P vectors.
        names: the models, for messages.

    Raises:
        ZooError: for the first model with a weight that is NaN or infinite, with the number of such weights.
    """
    # one vector at a time: a mask of all of them would take a quarter of their memory
    for vector, name in zip(vectors, names, strict=True):
        finite = vector.isfinite()
        if not finite.all():
            count = int(finite.numel() - finite.sum())
            raise ZooError(f"{name} has {count} weights that are not finite: leave it out, or train it again")


def encode(vector: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """The raw little-endian bytes of a float32 vector, uint8 `[D * item size]`; float32 is not copied.

    Raises:
        ZooError: for an unknown dtype, or a finite weight that float16 cannot hold.

    Example:
        >>> encode(np.array([1.0, 0.0], np.float32), "bfloat16").tolist()
        [128, 63, 0, 0]
    """
    check_dtype(dtype)
    if dtype == "float32":
        # "<f4" fixes the byte order, which hashes and files promise on any machine
        return np.ascontiguousarray(vector, dtype="<f4").view(np.uint8)
    # numpy has no bfloat16
    narrow = torch.from_numpy(np.ascontiguousarray(vector)).to(getattr(torch, dtype))
    # float16 ends at 65504: an infinite weight would come back where a finite one was given
    if bool(torch.isinf(narrow).any()) and not np.isinf(vector).any():
        raise ZooError(f"a weight of {np.abs(vector).max():.3g} does not fit {dtype}: store float32 or bfloat16")
    return narrow.view(torch.uint8).numpy()


def widen(raw: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """The float32 vector `[D]` of raw bytes.

    Args:
        raw: uint8 `[D * item size]`.
        dtype: what the bytes are.
        out: where to put it, float32 `[D]`; without it, float32 is a view of `raw`.
    """
    if dtype == "float32":
        view = raw.view("<f4")
        if out is None:
            return view
        np.copyto(out, view)
        return out
    target = np.empty(raw.size // 2, np.float32) if out is None else out
    # torch warns of memory that may not be written to, as Arrow buffers are
    source = raw if raw.flags.writeable else raw.copy()
    torch.from_numpy(target).copy_(torch.from_numpy(source).view(getattr(torch, dtype)))
    return target


def rounded(vector: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 vector that a reader will get back when `vector` is stored as `dtype`."""
    return vector if dtype == "float32" else widen(encode(vector, dtype), dtype)


def vector_of(
    value: object, *, name: str, num_parameters: int | None, dtype: str = "float32", sha256: str | None = None
) -> np.ndarray:
    """The weights of one row as a float32 vector `[D]`, from whatever `datasets` or pyarrow handed out.

    Args:
        value: bytes, a list, an array, a tensor, an Arrow scalar, or an Arrow array of one row. float32 in an Arrow
            buffer, in bytes or in an array is not copied.
        name: id of the row, for messages.
        num_parameters: D, compared with the length; None where the row does not say.
        dtype: number format of raw bytes.
        sha256: of the vector. With it, trailing zero bytes that a format of `datasets` cut off are put back, and the
            result is compared with the hash.

    Raises:
        ZooError: if the length is wrong, or the values are not numbers.
    """
    check_dtype(dtype)
    if isinstance(value, pa.Scalar):
        # a scalar hides its buffer; an array of one row shows it
        value = pa.array([value.as_py()], value.type) if value.is_valid else None
    if isinstance(value, pa.Array | pa.ChunkedArray):
        value = _arrow_values(value, name)
    # the numpy format of `datasets` wraps bytes in an array without axes
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bytes | bytearray | memoryview):
        return _from_bytes(np.frombuffer(value, np.uint8), name, num_parameters, dtype, sha256)
    # integers and raw uint8 would turn into plausible floats; objects may hold a list of floats
    if isinstance(value, np.ndarray) and value.dtype.kind not in "fO":
        raise ZooError(f"{name} has weights of type {value.dtype}; expected floating-point numbers")
    vector = _numbers(value, name)
    if num_parameters is not None and vector.shape != (num_parameters,):
        raise ZooError(
            f"{name} has weights of shape {tuple(vector.shape)}; its layout wants [{num_parameters}]:"
            " the row is damaged, or belongs to another architecture"
        )
    return vector


def _arrow_values(values: pa.Array | pa.ChunkedArray, name: str) -> memoryview | bytes | np.ndarray:
    """The buffer of the only row of an Arrow column, without a copy."""
    if len(values) != 1:
        raise ZooError(f"{name}: {len(values)} rows of weights were given, expected one")
    if isinstance(values, pa.ChunkedArray):
        # a slice of a table may begin with empty chunks
        values = next(chunk for chunk in values.chunks if len(chunk))
    if values.null_count:
        raise ZooError(f"{name} has no weights")
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        _, offsets, data = values.buffers()
        # the buffers are read by hand: `as_py` would copy gigabytes into a bytes object
        kind = np.int64 if pa.types.is_large_binary(values.type) else np.int32
        start, stop = np.frombuffer(offsets, kind)[values.offset : values.offset + 2]
        return memoryview(data)[start:stop] if data is not None else b""
    return values.flatten().to_numpy(zero_copy_only=False)


def _from_bytes(raw: np.ndarray, name: str, num_parameters: int | None, dtype: str, sha256: str | None) -> np.ndarray:
    expected = raw.size if num_parameters is None else num_parameters * ITEM_BYTES[dtype]
    if num_parameters is not None and raw.size < expected and sha256:
        # only with a hash to prove it: without one, cut zeros and a damaged row look alike
        whole = widen(np.concatenate([raw, np.zeros(expected - raw.size, np.uint8)]), dtype)
        if schema.weights_sha256(whole) == sha256:
            return whole
    if raw.size != expected or raw.size % ITEM_BYTES[dtype]:
        raise ZooError(
            f"{name} has {raw.size} bytes of weights; its layout wants {expected}. The formats 'torch' and 'numpy' of"
            " datasets cut trailing zero bytes: read with with_format(None) or 'arrow', else the row is damaged"
        )
    return widen(raw, dtype)


def _numbers(value: object, name: str) -> np.ndarray:
    try:
        if isinstance(value, torch.Tensor):
            return value.detach().float().cpu().numpy()
        vector = np.asarray(value)
        # big-endian float32 has the same type but must be converted
        if vector.dtype == np.float32 and vector.dtype.isnative:
            return vector
        return np.array(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise ZooError(f"{name} has weights that are not numbers, but {type(value).__name__}") from None
