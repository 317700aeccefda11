"""Positions of rows -> their weights, from the shards of a zoo, each compared with its hash when it is first read.

`shards.json` says where the weights of every row group end, so a vector is one read of a file, one mapping of it,
or one range of a URL, and no Parquet is decoded. Shards of zoos without that list are read through pyarrow.
"""

import copy
import mmap
import os
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitzoo_hf.format import schema
from vitzoo_hf.format.encoding import ITEM_BYTES, vector_of, widen
from vitzoo_hf.format.files import FolderFiles, HubFiles
from vitzoo_hf.format.messages import REPAIR, one_line
from vitzoo_hf.format.schema import ZooError

MAPPED_BYTES = 1_000_000
"""Vectors at least this large are mapped from a local file instead of being copied."""

FETCHED_WHOLE_BYTES = 64_000_000
"""A remote shard up to this size goes into the Hub's cache whole; of larger ones only the rows asked for are read."""

# Row groups of older zoos stay decoded up to this size, as rows are read one by one in order.
DECODED_BYTES = 256_000_000
# Far below the usual limit of 1,024 descriptors a process, of which several zoos may be open.
OPEN_FILES = 64


@dataclass(frozen=True)
class RowTable:
    """What the reader needs of the index, one entry a row, in the index's order.

    Attributes:
        model_ids: Arrow array of texts.
        num_parameters: int64 `[rows]`.
        dtype_codes: place of each row's dtype in `dtype_names`: int64 `[rows]`.
        dtype_names: number formats that occur.
        sha256: Arrow array of texts.
    """

    model_ids: pa.Array
    num_parameters: np.ndarray
    dtype_codes: np.ndarray
    dtype_names: list[str]
    sha256: pa.Array

    @classmethod
    def of(cls, table: pa.Table) -> "RowTable":
        """The columns of an index."""
        # one chunk each: a position is then found without a search
        ids, dtypes, sha256 = (
            pa.concat_arrays([pa.array([], pa.string()), *table[name].cast(pa.string()).chunks])
            for name in ("model_id", "dtype", "weights_sha256")
        )
        coded = dtypes.dictionary_encode()
        sizes = np.array(table["num_parameters"], dtype=np.int64)
        return cls(ids, sizes, np.asarray(coded.indices, dtype=np.int64), coded.dictionary.to_pylist(), sha256)

    def __len__(self) -> int:
        return len(self.num_parameters)

    def take(self, positions: np.ndarray) -> "RowTable":
        """Only these rows."""
        return RowTable(
            self.model_ids.take(pa.array(positions)),
            self.num_parameters[positions],
            self.dtype_codes[positions],
            self.dtype_names,
            self.sha256.take(pa.array(positions)),
        )

    def model_id(self, position: int) -> str:
        """The id of a row."""
        return str(self.model_ids[position].as_py())

    def dtype(self, position: int) -> str:
        """The number format that the weights of a row are stored in."""
        return self.dtype_names[self.dtype_codes[position]]

    @property
    def row_bytes(self) -> np.ndarray:
        """Bytes that the weights of each row take in its shard: int64 `[rows]`."""
        item = np.array([ITEM_BYTES[name] for name in self.dtype_names], np.int64)
        return self.num_parameters * item[self.dtype_codes]


@dataclass(frozen=True)
class Places:
    """Where rows lie: shard, row group, row in the group, byte offset in the file (-1 where it is not known)."""

    files: list[str]
    file: np.ndarray
    group: np.ndarray
    row: np.ndarray
    offset: np.ndarray

    def take(self, positions: np.ndarray) -> "Places":
        """The places of these rows, with the files that hold them."""
        used, file = np.unique(self.file[positions], return_inverse=True)
        rest = (self.group[positions], self.row[positions], self.offset[positions])
        return Places([self.files[number] for number in used.tolist()], file, *rest)

    def groups(self) -> np.ndarray:
        """Number of the row group of each row, counted over all shards: ascending `[rows]`."""
        new = (np.diff(self.file, prepend=-1) != 0) | (np.diff(self.group, prepend=-1) != 0)
        return np.cumsum(new) - 1


class _OpenFile:
    """A descriptor that is closed when the last user of it is gone."""

    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_RDONLY)
        # not closed by whoever drops it from the cache: another thread may be reading
        weakref.finalize(self, os.close, self.descriptor)


class WeightReader:
    """Reads weights of rows by their position in the index; safe to use from many threads, and to pickle.

    Args:
        files: files of the zoo.
        shards: from `read_shards`.
        rows: what the index says of each row.
        keep: whether small shards of a dataset go into the Hub's cache.
    """

    def __init__(
        self,
        files: FolderFiles | HubFiles,
        shards: Mapping[str, Mapping[str, Any]],
        rows: RowTable,
        *,
        keep: bool = True,
    ) -> None:
        self.files, self.rows, self.keep = files, rows, keep
        self.places = _places(files, shards, rows)
        self._shards = {name: (entry["bytes"], entry["sha256"]) for name, entry in shards.items()}
        self._local_files: dict[str, Path] = {}
        # shared by all filters of a zoo: a row is hashed once a process
        self._verified = np.zeros(len(rows), dtype=bool)
        self._unpickled()

    def _unpickled(self) -> None:
        self._open_files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._decoded: OrderedDict[tuple[str, int], pa.Array] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, object]:
        hidden = ("_open_files", "_decoded", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._unpickled()

    def of_rows(self, positions: np.ndarray) -> "WeightReader":
        """A reader of these rows alone, by their place in `positions`; what was verified stays so."""
        reader = copy.copy(self)
        reader.rows, reader.places = self.rows.take(positions), self.places.take(positions)
        reader._shards = {name: self._shards[name] for name in reader.places.files}
        reader._local_files = {}
        reader._verified = self._verified[positions]
        reader._unpickled()
        return reader

    def row_bytes(self, position: int) -> int:
        """Bytes that the weights of a row take in its shard."""
        return int(self.rows.num_parameters[position]) * ITEM_BYTES[self.rows.dtype(position)]

    def read(self, position: int, *, verify: bool = True) -> np.ndarray:
        """The vector of a row, float32 `[D]`: one's own, writable, whatever is written into it stays in memory.

        A large one is a private mapping of its file, which takes memory only where it is written to.
        """
        local = self._local(position)
        mappable = self.rows.dtype(position) == "float32" and self.row_bytes(position) >= MAPPED_BYTES
        if local is not None and mappable and self.places.offset[position] >= 0:
            vector = self._mapped(position, local)
            self._check(position, vector, verify)
            return vector
        vector = np.empty(int(self.rows.num_parameters[position]), np.float32)
        self.read_into(position, vector, verify=verify)
        return vector

    def read_into(self, position: int, out: np.ndarray, *, verify: bool = True) -> None:
        """Read the vector of a row into `out`, float32 `[D]`."""
        size = int(self.rows.num_parameters[position])
        if self.places.offset[position] < 0:
            np.copyto(out, self._decode(position))
        elif self.rows.dtype(position) == "float32":
            self._read_bytes(position, 0, out.view(np.uint8))
        else:
            raw = np.empty(size * ITEM_BYTES[self.rows.dtype(position)], np.uint8)
            self._read_bytes(position, 0, raw)
            widen(raw, self.rows.dtype(position), out)
        self._check(position, out, verify)

    def read_parts(self, position: int, parts: Sequence[slice], out: np.ndarray, *, verify: bool = True) -> None:
        """Read these slices of a row's vector one behind the other into `out`.

        Only their bytes are read, but for the first reading of a row that is to be verified, which reads all of it.
        """
        first = verify and not self._verified[position]
        if first or self.places.offset[position] < 0:
            # a hash covers the whole vector, so a part cannot be verified alone
            whole = self.read(position, verify=verify)
        item = ITEM_BYTES[self.rows.dtype(position)]
        filled = 0
        for part in parts:
            target = out[filled : filled + part.stop - part.start]
            filled += target.size
            if first or self.places.offset[position] < 0:
                np.copyto(target, whole[part])
            elif item == 4:
                self._read_bytes(position, part.start * item, target.view(np.uint8))
            else:
                raw = np.empty(target.size * item, np.uint8)
                self._read_bytes(position, part.start * item, raw)
                widen(raw, self.rows.dtype(position), target)

    def _check(self, position: int, vector: np.ndarray, verify: bool) -> None:
        if not verify or self._verified[position]:
            return
        if schema.weights_sha256(vector) != self.rows.sha256[position].as_py():
            repair = self.files.repair(self._file(position))
            raise ZooError(f"the weights of {self.rows.model_id(position)} do not match their hash: {repair}")
        # only after the comparison: a row that failed is compared, and refused, again
        self._verified[position] = True

    def _file(self, position: int) -> str:
        return self.places.files[self.places.file[position]]

    def _local(self, position: int) -> Path | None:
        """The shard of a row on this machine, fetched if it is small; None where only ranges of it are read."""
        name = self._file(position)
        if name not in self._local_files:
            num_bytes, sha256 = self._shards[name]
            local = self.files.local(name, sha256)
            # one download of a small shard is cheaper than a request a row
            small = self.keep and num_bytes <= FETCHED_WHOLE_BYTES
            if local is None and (small or not self.files.is_remote):
                local = self.files.path(name)
            if local is None:
                return None
            self._local_files[name] = local
        return self._local_files[name]

    def _mapped(self, position: int, file: Path) -> np.ndarray:
        start = int(self.places.offset[position])
        # the operating system maps whole pages
        aligned = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = start - aligned + self.row_bytes(position)
        try:
            # ACCESS_COPY: training a model on its row must never write into the zoo
            mapping = mmap.mmap(self._opened(file).descriptor, length, access=mmap.ACCESS_COPY, offset=aligned)
        except (OSError, ValueError) as error:
            raise self._unreadable(position, error) from None
        return np.frombuffer(mapping, "<f4", count=int(self.rows.num_parameters[position]), offset=start - aligned)

    def _read_bytes(self, position: int, start: int, out: np.ndarray) -> None:
        """Read `out.size` bytes from byte `start` of a row's weights."""
        local = self._local(position)
        begin = int(self.places.offset[position]) + start
        if local is None:
            self.files.read_into(self._file(position), begin, out.data)
            return
        try:
            opened, done = self._opened(local), 0
            while done < out.size:
                # reads at a position without moving the descriptor, which threads share
                got = os.preadv(opened.descriptor, [out[done:].data], begin + done)
                if got == 0:
                    raise OSError("the file was cut")
                done += got
        except OSError as error:
            raise self._unreadable(position, error) from None

    def _opened(self, file: Path) -> _OpenFile:
        with self._lock:
            # taken out and put back: the end of the dictionary is the most recently used
            opened = self._open_files.pop(file, None) or _OpenFile(file)
            self._open_files[file] = opened
            while len(self._open_files) > OPEN_FILES:
                self._open_files.popitem(last=False)
            return opened

    def _decode(self, position: int) -> np.ndarray:
        """The vector of a row of a shard that says nothing of its offsets, from its decoded row group."""
        name, group = self._file(position), int(self.places.group[position])
        with self._lock:
            held = self._decoded.pop((name, group), None)
            if held is None:
                held = self._row_group(position, name, group)
            self._decoded[name, group] = held
            # more than one, so that a single huge row group is not decoded anew for every row
            while len(self._decoded) > 1 and sum(array.nbytes for array in self._decoded.values()) > DECODED_BYTES:
                self._decoded.popitem(last=False)
        return vector_of(
            held.slice(int(self.places.row[position]), 1),
            name=self.rows.model_id(position),
            num_parameters=int(self.rows.num_parameters[position]),
            dtype=self.rows.dtype(position),
        )

    def _row_group(self, position: int, name: str, group: int) -> pa.Array:
        try:
            file = pq.ParquetFile(self.files.path(name), page_checksum_verification=True)
            table = file.read_row_group(group, columns=["model_id", "weights"])
            weights = table["weights"].combine_chunks()
            # cheap: lengths and offsets; the values are compared by hash
            weights.validate(full=False)
            row = int(self.places.row[position])
            # without offsets the order of rows is an assumption: the id proves it
            if table["model_id"][row].as_py() != self.rows.model_id(position):
                raise ZooError(f"{name}, row group {group}, does not hold the rows the index says; {REPAIR}")
            return weights
        except (OSError, pa.ArrowException, IndexError) as error:
            raise self._unreadable(position, error) from None

    def _unreadable(self, position: int, error: Exception) -> ZooError:
        where = f"{self._file(position)}, row group {self.places.group[position]}"
        return ZooError(f"{where}, cannot be read ({one_line(error)}); {REPAIR}")


def _places(files: FolderFiles | HubFiles, shards: Mapping[str, Mapping[str, Any]], rows: RowTable) -> Places:
    pairs = [
        np.array(entry.get("groups") or _groups_of(files, name), np.int64).reshape(-1, 2)
        for name, entry in shards.items()
    ]
    counts, ends = np.concatenate([np.empty((0, 2), np.int64), *pairs]).T
    # before any array is made: counts are a stranger's, and may ask for terabytes
    if counts.sum() != len(rows):
        raise ZooError(f"{files.name}: {counts.sum()} rows of weights for {len(rows)} of the index; {REPAIR}")
    # of each group, then of each row
    groups = [len(part) for part in pairs]
    file = np.repeat(np.arange(len(pairs)), groups)
    gap = np.repeat(np.array([entry.get("gap", 0) for entry in shards.values()], np.int64), groups)
    group = np.concatenate([np.empty(0, np.int64), *(np.arange(count) for count in groups)])
    start = np.cumsum(counts) - counts
    of_row = np.repeat(np.arange(len(counts)), counts)
    # counted from the end: headers before the first vector vary in length, the end does not
    reach = np.cumsum(rows.row_bytes + gap[of_row])
    behind = reach[(start + counts - 1)[of_row]] - reach + rows.row_bytes
    short = np.flatnonzero((ends[of_row] > 0) & (behind > ends[of_row]))
    if len(short):
        row, at = short[0], of_row[short[0]]
        raise ZooError(
            f"{files.name}: row group {group[at]} of {list(shards)[file[at]]} ends at byte {ends[at]}, before its"
            f" {behind[row]} bytes of weights; {REPAIR}"
        )
    offset = np.where(ends[of_row] > 0, ends[of_row] - behind, -1)
    return Places(list(shards), file[of_row], group[of_row], np.arange(len(rows)) - start[of_row], offset)


def _groups_of(files: FolderFiles | HubFiles, name: str) -> list[tuple[int, int]]:
    """Rows of each row group, from the footer of a shard that `shards.json` says nothing of."""
    try:
        metadata = pq.read_metadata(files.path(name))
    except (OSError, pa.ArrowException) as error:
        raise ZooError(f"{name} of {files.name} cannot be read ({one_line(error)}); {REPAIR}") from None
    return [(metadata.row_group(group).num_rows, 0) for group in range(metadata.num_row_groups)]
