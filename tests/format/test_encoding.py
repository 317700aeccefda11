import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitzoo_hf.format import schema
from vitzoo_hf.format.encoding import ITEM_BYTES, check_finite, encode, encoding_of, rounded, vector_of, widen
from vitzoo_hf.format.schema import ZooError

VECTOR = np.array([1.5, -2.0, 3.25, 0.0, 0.0], np.float32)


def read(value, dtype="float32", size=5, **options):
    return vector_of(value, name="m@1", num_parameters=size, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", "0000c03f000000c0000050400000000000000000"),
        ("float16", "003e00c0804200000000"),
        ("bfloat16", "c03f00c0504000000000"),
    ],
)
def test_the_stored_bytes_are_these_for_ever(dtype, expected):
    assert encode(VECTOR, dtype).tobytes().hex() == expected
    assert read(bytes.fromhex(expected), dtype).tolist() == VECTOR.tolist()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_float32_comes_back_bit_for_bit(values):
    vector = np.array(values, np.float32)
    assert widen(encode(vector), "float32").tobytes() == vector.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=40))
def test_half_precision_rounds_as_torch_does_and_only_once(dtype, values):
    vector = np.array(values, np.float32)
    expected = torch.from_numpy(vector).to(getattr(torch, dtype)).float().numpy()
    once = rounded(vector, dtype)
    assert once.tobytes() == expected.tobytes()
    assert rounded(once, dtype).tobytes() == once.tobytes()
    out = np.empty_like(vector)
    assert widen(encode(vector, dtype), dtype, out) is out
    assert out.tobytes() == once.tobytes()


def test_a_weight_beyond_float16_is_refused():
    with pytest.raises(ZooError, match=r"a weight of 7e\+04 does not fit float16: store float32 or bfloat16"):
        encode(np.array([7e4], np.float32), "float16")


def test_an_unknown_dtype_is_named():
    with pytest.raises(ZooError, match=r"unknown dtype 'float8'"):
        encode(VECTOR, "float8")


def test_small_float32_is_a_list_everything_else_bytes():
    assert encoding_of(schema.LIST_LIMIT) == "list"
    assert encoding_of(schema.LIST_LIMIT + 1) == "binary"
    assert encoding_of(10, "bfloat16") == "binary"


def table_of(kind, dtype="float32"):
    raw = [encode(vector, dtype).tobytes() for vector in (VECTOR + 1, VECTOR, VECTOR + 2)]
    values = raw if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else [VECTOR + 1, VECTOR, VECTOR + 2]
    return pa.chunked_array([pa.array(values, kind)])


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 5)],
)
def test_arrow_is_read_without_a_copy_wherever_the_row_lies(kind):
    column = table_of(kind)
    for value in (column.slice(1, 1), column.chunk(0).slice(1, 1)):
        vector = read(value)
        assert vector.tolist() == VECTOR.tolist()
        buffers = [buffer for buffer in column.chunk(0).buffers() if buffer is not None]
        address = vector.__array_interface__["data"][0]
        assert any(buffer.address <= address < buffer.address + buffer.size for buffer in buffers)
    assert read(column[1]).tolist() == VECTOR.tolist()


@pytest.mark.parametrize("form", [None, "numpy", "torch", "arrow"])
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_no_format_of_datasets_loses_trailing_zeros(form, dtype):
    """Two of them cut the zero bytes off: that is mended where the hash proves it, and loud elsewhere."""
    rows = datasets.Dataset.from_dict({"weights": [encode(VECTOR, dtype).tobytes()]}).with_format(form)
    value = rows[0]["weights"]
    assert read(value, dtype, sha256=schema.weights_sha256(VECTOR)).tolist() == VECTOR.tolist()
    if form in ("numpy", "torch"):
        with pytest.raises(
            ZooError, match=r"m@1 has \d+ bytes of weights; its layout wants \d+.*with_format\(None\)"
        ):
            read(value, dtype)
        with pytest.raises(ZooError, match="bytes of weights"):
            read(value, dtype, sha256=schema.weights_sha256(VECTOR + 1))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (VECTOR[:3], r"m@1 has weights of shape \(3,\); its layout wants \[5\]"),
        (encode(VECTOR).tobytes()[:-1], "m@1 has 19 bytes of weights; its layout wants 20"),
        (encode(VECTOR).tobytes() + b"\0", "m@1 has 21 bytes of weights; its layout wants 20"),
        (["a"] * 5, "m@1 has weights that are not numbers, but list"),
        (pa.array([None], pa.binary()), "m@1 has no weights"),
        (pa.array([b"", b""]), "2 rows of weights were given, expected one"),
    ],
)
def test_what_does_not_fit_is_named(value, message):
    with pytest.raises(ZooError, match=message):
        read(value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_model_with_weights_that_are_not_finite_is_named_with_their_number(bad):
    weights = torch.zeros(3, 4)
    check_finite(weights, "abc")
    check_finite([weights[0], torch.zeros(7)], "ab")
    weights[1, 1:3] = weights[2, 0] = bad
    for vectors in (weights, list(weights)):
        with pytest.raises(ZooError, match=r"^b has 2 weights that are not finite: leave it out, or train it again$"):
            check_finite(vectors, "abc")
    with pytest.raises(ValueError, match="zip"):
        check_finite(torch.zeros(2, 4), "abc")
