"""The weights of all rows in blocks of columns, so that pairs of models are measured without holding them all.

Each block `[P, c]` is some columns of every model. Where `shards.json` says where rows lie, its pieces are read from
the shards as they are, one `pread` or HTTP range a row, while the block before is used; rows of older zoos are first
decoded into a temporary file. Memory is two blocks, whatever the number of models and weights.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from vitzoo_hf.format.layout import Layout, trunk_layout
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.read_ahead import mapped_ahead
from vitzoo_hf.zoo.row_source import RowSource

BLOCK_BYTES = 64_000_000
COLUMNS_UNIT = 4096  # blocks wider than this are a multiple of it: what weights are multiplied in

Run = tuple[slice, int]
"""Columns of the common layout, and where they start in the vector of a row."""


class WeightColumns:
    """Blocks of columns of the weights of a zoo's rows, in the order of their layout; made by `Zoo.weight_columns`.

    Iterating reads every weight once and gives `(columns, block)`: a slice of the common layout, and the weights in
    these columns, float32 `[P, c]`. The memory of a block is used again: a block holds until the next is asked for.
    Rows are compared with their hashes only after `verified`, or by `vitzoo verify`.

    Args:
        source: the rows.
        device: where blocks go.
        num_workers: threads that read the rows of a block.
        block_bytes: memory of a block.

    Attributes:
        layout: the layout that all models share, or the layout of their trunk where heads differ.
        model_ids: ids of the models, along the first axis of every block.

    Raises:
        ZooError: if there is no row, rows differ in layout beyond the head, or an argument is below 1.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        device: str | torch.device = "cpu",
        num_workers: int = 1,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if num_workers < 1 or block_bytes < 1:
            raise ZooError(f"num_workers is {num_workers} and block_bytes {block_bytes}; both must be at least 1")
        self.source, self.device, self.num_workers = source, usable_device(device), num_workers
        self.positions = source.positions.tolist()
        if not self.positions:
            raise ZooError("there are no weights to read: the filter matches no row")
        self.model_ids = source.model_ids
        self.layout = common_layout({layout_id: source.layouts[layout_id] for layout_id in source.used_layouts})
        runs = [_runs(self.layout, source.layouts[layout_id]) for layout_id in source.used_layouts]
        self._runs = {
            position: runs[code] for position, code in zip(self.positions, source.layout_codes.tolist(), strict=True)
        }
        width = max(1, block_bytes // (4 * len(self.positions)))
        if width > COLUMNS_UNIT:
            width -= width % COLUMNS_UNIT
        self.width = min(width, self.layout.num_parameters)
        self._decoded: _DecodedRows | None = None
        self._verify = False

    @property
    def num_bytes(self) -> int:
        """Size of all weights of the common layout, as float32."""
        return 4 * len(self.positions) * self.layout.num_parameters

    def verified(self) -> "WeightColumns":
        """Compare each row with its hash when it is first read, which reads the whole row; returns these columns."""
        self._verify = True
        return self

    def blocks(self, wanted: Sequence[slice] | None = None) -> list[slice]:
        """The columns of each block, restricted to blocks that overlap `wanted`."""
        size = self.layout.num_parameters
        blocks = [slice(start, min(start + self.width, size)) for start in range(0, size, self.width)]
        if wanted is None:
            return blocks
        return [
            block for block in blocks if any(part.start < block.stop and block.start < part.stop for part in wanted)
        ]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        return self.read()

    def read(self, wanted: Sequence[slice] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Like `__iter__`, restricted to blocks that overlap `wanted`."""
        self._decode_where_needed()
        blocks = self.blocks(wanted)
        pinned = self.device.type == "cuda"
        buffers = [torch.empty(len(self.positions), self.width, pin_memory=pinned) for _ in blocks[:2]]
        shares = np.array_split(np.arange(len(self.positions)), min(self.num_workers, len(self.positions)))
        jobs = (
            (share.tolist(), columns, buffers[number % 2].numpy())
            for number, columns in enumerate(blocks)
            for share in shares
        )
        # ahead by exactly one block: a block later would be read into the buffer that the caller still uses
        with closing(mapped_ahead(self._read, jobs, threads=self.num_workers, ahead=len(shares))) as filled:
            for number, columns in enumerate(blocks):
                for _ in shares:
                    next(filled)
                block = buffers[number % 2][:, : columns.stop - columns.start]
                yield columns, block.to(self.device)

    def rows(self) -> Iterator[Tensor]:
        """The weights of one model after the other in the common layout, float32 `[D]`, each in memory of its own."""
        self._decode_where_needed()
        columns = slice(0, self.layout.num_parameters)
        for position in self.positions:
            vector = np.empty(columns.stop, np.float32)
            self._fill(position, columns, vector)
            yield torch.from_numpy(vector).to(self.device)

    def _read(self, job: tuple[list[int], slice, np.ndarray]) -> None:
        """Fill some rows of a block."""
        rows, columns, buffer = job
        for row in rows:
            self._fill(self.positions[row], columns, buffer[row, : columns.stop - columns.start])

    def _fill(self, position: int, columns: slice, out: np.ndarray) -> None:
        if self._decoded is not None and position in self._decoded.rows:
            self._decoded.read_into(position, columns.start, out)
        else:
            parts = list(_overlaps(self._runs[position], columns))
            self.source.reader.read_parts(position, parts, out, verify=self._verify)

    def _decode_where_needed(self) -> None:
        """Write rows whose place in a shard is not known into a temporary file, once."""
        without_place = [position for position in self.positions if self.source.reader.places.offset[position] < 0]
        if self._decoded is not None or not without_place:
            return
        decoded = _DecodedRows(self.layout.num_parameters)
        vector = np.empty(self.layout.num_parameters, np.float32)
        for position in without_place:
            self._fill(position, slice(0, vector.size), vector)
            decoded.append(position, vector)
        self._decoded = decoded


class _DecodedRows:
    """Vectors of float32 in a temporary file without a name, which is deleted with the last object that uses it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: dict[int, int] = {}
        file = tempfile.TemporaryFile()  # noqa: SIM115
        self._descriptor = file.fileno()
        weakref.finalize(self, file.close)

    def append(self, position: int, vector: np.ndarray) -> None:
        data, start, done = vector.view(np.uint8).data, 4 * self.size * len(self.rows), 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], start + done)
        self.rows[position] = len(self.rows)

    def read_into(self, position: int, start: int, out: np.ndarray) -> None:
        data, begin, done = out.view(np.uint8).data, 4 * (self.size * self.rows[position] + start), 0
        while done < len(data):
            done += os.preadv(self._descriptor, [data[done:]], begin + done)


def common_layout(layouts: dict[str, Layout]) -> Layout:
    """The layout that models share: the only one, or the layout of their trunk where heads differ.

    Raises:
        ZooError: naming the layouts, if they differ beyond the head.
    """
    if len(layouts) == 1:
        return next(iter(layouts.values()))
    trunks = {layout_id: trunk_layout(layout) for layout_id, layout in layouts.items()}
    if len({trunk.fingerprint for trunk in trunks.values()}) > 1:
        shown = ", ".join(
            f"{layout_id}: {len(trunk.names)} tensors of {trunk.num_parameters} weights"
            for layout_id, trunk in sorted(trunks.items())
        )
        raise ZooError(
            f"these models have {len(trunks)} layouts that differ beyond the head ({shown}), so their weights have "
            "no distance: filter by `layout` or `architecture`"
        )
    return next(iter(trunks.values()))


def _runs(common: Layout, layout: Layout) -> list[Run]:
    """Where the columns of the common layout lie in vectors of `layout`, neighbours joined."""
    runs: list[Run] = []
    places = dict(layout.items())
    for name, columns in common.items():
        start = places[name].start
        if runs and runs[-1][1] - runs[-1][0].start == start - columns.start:
            runs[-1] = (slice(runs[-1][0].start, columns.stop), runs[-1][1])
        else:
            runs.append((columns, start))
    return runs


def _overlaps(runs: Sequence[Run], columns: slice) -> Iterator[slice]:
    """The slices of a row's vector that hold these columns."""
    for run, start in runs:
        first, last = max(run.start, columns.start), min(run.stop, columns.stop)
        if first < last:
            yield slice(start + first - run.start, start + last - run.start)
