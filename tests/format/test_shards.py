import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_rows import make_row

from vitzoo_hf.format import schema, shards
from vitzoo_hf.format.encoding import ITEM_BYTES
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.shards import write_parquet

FACTORS = {"seed": "int", "lr": "float"}


def write(file, groups, encoding):
    return write_parquet(file, schema.row_features(FACTORS, weights=encoding), groups, {})


@pytest.mark.parametrize(("encoding", "dtype"), [("list", "float32"), *(("binary", dtype) for dtype in ITEM_BYTES)])
@pytest.mark.parametrize("sizes", [[1], [3], [2, 1], [1, 1, 1]])
def test_weights_lie_in_the_file_as_they_are(tmp_path, encoding, dtype, sizes):
    numbers = iter(range(10))
    groups = [[make_row(next(numbers), 7 + 13 * k, dtype) for k in range(size)] for size in sizes]
    ends = write(tmp_path / "x.parquet", groups, encoding)
    data = (tmp_path / "x.parquet").read_bytes()
    assert [count for count, _ in ends] == sizes
    for rows, (_, end) in zip(groups, ends, strict=True):
        for row in reversed(rows):
            raw = row["weights"].astype("<f4")
            if dtype == "bfloat16":
                raw = (raw.view(np.uint32) >> 16).astype("<u2")
            elif dtype == "float16":
                raw = raw.astype("<f2")
            assert data[end - raw.nbytes : end] == raw.tobytes()
            end -= raw.nbytes + (4 if encoding == "binary" else 0)


def test_the_bytes_of_a_row_group_are_these(tmp_path):
    """Readers rely on them: if this fails, the format has changed, or pyarrow writes Parquet in another way."""
    row = make_row(0, 6)
    (_, end), (_, other) = write(tmp_path / "x.parquet", [[row], [make_row(1, 6)]], "binary")
    data = (tmp_path / "x.parquet").read_bytes()
    assert data[end - 28 : end].hex() == "18000000000000000000803c0000003d0000403d0000803d0000a03d"
    assert data[other - 24 : other].hex() == "000080bc000000000000803c0000003d0000403d0000803d"
    (_, end), *_ = write(tmp_path / "x.parquet", [[row, row]], "list")
    listed = (tmp_path / "x.parquet").read_bytes()[end - 48 : end].hex()
    assert listed == "000000000000803c0000003d0000403d0000803d0000a03d" * 2


def test_light_columns_are_compressed_weights_are_not(tmp_path):
    write(tmp_path / "x.parquet", [[make_row(0)]], "binary")
    group = pq.read_metadata(tmp_path / "x.parquet").row_group(0)
    for position in range(group.num_columns):
        column = group.column(position)
        raw = column.path_in_schema == "weights"
        assert column.compression == ("UNCOMPRESSED" if raw else "ZSTD")
        assert column.has_offset_index
        assert not (raw and (column.has_dictionary_page or column.is_stats_set))


def test_a_row_put_into_a_light_table_changes_few_bytes(tmp_path):
    def text(number):
        return "".join(hashlib.sha256(f"{number}-{part}".encode()).hexdigest() for part in range(40))

    rows = [make_row(number) | {"provenance": text(number)} for number in range(1000)]
    files = []
    for version in (rows, [make_row(5000) | {"provenance": text(5000)}, *rows]):
        write_parquet(tmp_path / "x.parquet", schema.row_features(FACTORS, weights=None), [version], {})
        files.append((tmp_path / "x.parquet").read_bytes())
    old, new = files
    block = 512
    held = {old[start : start + block] for start in range(len(old))}
    fresh = len(new)
    position = 0
    while position + block <= len(new):
        if new[position : position + block] in held:
            fresh -= block
            position += block
        else:
            position += 1
    assert fresh < 0.5 * len(new)


def test_a_pyarrow_that_pages_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "WHOLE_PAGE", 64)
    with pytest.raises(ZooError, match=r"x.parquet: this pyarrow .* does not write weights as one page"):
        write(tmp_path / "x.parquet", [[make_row(0, 5000), make_row(1, 5000)]], "list")
