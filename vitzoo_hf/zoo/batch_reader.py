"""Planned batches to tensors: read ahead by threads, and copied to CUDA through pinned memory.

Cost: `threads + 1` batches `[B, D]` of host memory, pinned where they go to CUDA.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.read_ahead import mapped_ahead
from vitzoo_hf.zoo.row_source import HandedOut, RowSource

ALIGNMENT = 256  # of memory of a device

LIGHT_ROWS = 512  # whose light columns are made ready at once

Columns = tuple[dict[str, Tensor], dict[str, list[object]]]
"""Numeric light columns of a batch, and the texts."""

Batch = dict[str, Any]
"""`weights`, float32 `[B, D]`; a tensor or list for each column; `tensors`, `lengths`, `repeated` and `place`."""


@dataclass(frozen=True)
class Job:
    """A batch to read.

    Attributes:
        rows: places of the rows in the source: int64 `[B]`.
        repeated: whether other ranks hand out the same rows in this epoch.
        place: epoch, and batches of the plan that are done once this one is.
    """

    rows: np.ndarray
    repeated: bool
    place: dict[str, int]


@dataclass
class _Slot:
    """Host memory for one batch, and the event of the copy that must end before the memory is filled again."""

    buffer: Tensor | None = None
    copy_event: torch.cuda.Event | None = None


@dataclass(frozen=True)
class Loaded:
    """A batch, and the event of its copy to the device."""

    batch: Batch
    copy_event: torch.cuda.Event | None


@dataclass(frozen=True)
class BatchReader:
    """Reads planned batches.

    Attributes:
        source: the rows.
        parts: what rows of each layout hand out.
        named: whether `tensors` maps names to views.
        pad: whether rows of any length share a batch, with zeros behind the shorter.
        dtype: number format of numeric columns that may be null.
        verify: compare every row with its hash when it is first read.
        reuse: hand out the same memory again.
        threads: number of threads that read ahead, a batch each.
        with_weights: whether weights are handed out at all.
        copy_stream: the CUDA stream that batches are copied on; None to leave them in host memory.
    """

    source: RowSource
    parts: list[HandedOut]
    named: bool
    pad: bool
    dtype: torch.dtype
    verify: bool
    reuse: bool
    threads: int
    with_weights: bool
    copy_stream: torch.cuda.Stream | None

    def read_ahead(self, jobs: Iterable[Job]) -> Iterator[Loaded]:
        """Load batches in their order, `threads` of them at a time while earlier ones are used."""
        # a slot more than batches read ahead, for the one in use: a slot comes round when its batch was given back
        slots = itertools.cycle([_Slot() for _ in range(self.threads + 1)])
        pairs = zip(self._with_columns(iter(jobs)), slots, strict=False)
        if self.threads == 0:
            return map(self._load, pairs)
        return mapped_ahead(self._load, pairs, threads=self.threads, ahead=self.threads)

    def _with_columns(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Columns]]:
        """Jobs with light columns, taken from Arrow for many rows at once: those of one row take a millisecond."""
        for job in jobs:
            block = [job, *itertools.islice(jobs, LIGHT_ROWS // len(job.rows))]
            numbers, texts = self.source.light(np.concatenate([part.rows for part in block]), self.dtype)
            start = 0
            for part in block:
                of_job = slice(start, start + len(part.rows))
                start = of_job.stop
                yield (
                    part,
                    (
                        {name: values[of_job] for name, values in numbers.items()},
                        {name: values[of_job] for name, values in texts.items()},
                    ),
                )

    def _load(self, pair: tuple[tuple[Job, Columns], _Slot]) -> Loaded:
        (job, (numbers, texts)), slot = pair
        source = self.source
        codes = source.layout_codes[job.rows].tolist()
        sizes = [self.parts[code].layout.num_parameters for code in codes]
        if self.pad:
            numbers["lengths"] = torch.tensor(sizes)
        numbers["repeated"] = torch.full((len(codes),), job.repeated)
        sharing = [part.layout.num_parameters for part in self.parts] if self.pad else sizes
        width = max(sharing) if self.with_weights else 0
        weights = self._host_memory(len(codes), width, slot, numbers)
        if self.with_weights:
            self._fill(weights.numpy(), source.positions[job.rows].tolist(), codes, sizes)
        if self.copy_stream is not None:
            weights, numbers = self._sent(slot, weights, numbers, self.copy_stream)
        # first: accelerate takes the size of a batch from its first entry
        batch: Batch = {"weights": weights} if self.with_weights else {}
        batch |= {name: numbers[name] if name in numbers else texts[name] for name in source.columns}
        batch |= {name: values for name, values in numbers.items() if name not in batch}
        if self.named and self.with_weights:
            batch["tensors"] = unflatten(weights, self.parts[codes[0]].layout)
        return Loaded(batch | {"place": job.place}, slot.copy_event)

    def _fill(self, weights: np.ndarray, positions: list[int], codes: list[int], sizes: list[int]) -> None:
        for vector, position, code, size in zip(weights, positions, codes, sizes, strict=True):
            parts = self.parts[code].parts
            if parts is None:
                self.source.reader.read_into(position, vector[:size], verify=self.verify)
            else:
                self.source.reader.read_parts(position, parts, vector[:size], verify=self.verify)
            vector[size:] = 0

    def _host_memory(self, rows: int, width: int, slot: _Slot, numbers: Mapping[str, Tensor]) -> Tensor:
        """Memory for weights `[B, D]`: fresh, or that of the slot where it is reused or only staged for a device.

        Staged memory begins with the numeric columns, so that one copy takes all of a batch.
        """
        staged = self.copy_stream is not None
        if not (staged or self.reuse):
            return torch.from_numpy(np.empty((rows, width), np.float32))  # numpy asks for huge pages, torch does not
        if slot.copy_event is not None:
            slot.copy_event.synchronize()
        start = sum(map(_padded_bytes, numbers.values())) if staged else 0
        size = start + 4 * rows * width
        if slot.buffer is None or slot.buffer.numel() < size:
            slot.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=staged)
        return slot.buffer[start:size].view(torch.float32).view(rows, width)

    def _sent(
        self, slot: _Slot, weights: Tensor, numbers: Mapping[str, Tensor], copy_stream: torch.cuda.Stream
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch on the device, by one copy that nothing waits for; the slot has the event of its end."""
        assert slot.buffer is not None
        start = 0
        for values in numbers.values():
            slot.buffer[start : start + values.nbytes].copy_(values.view(torch.uint8))
            start += _padded_bytes(values)
        # a stream of its own: on the caller's stream the copy would wait for the kernels that use the batch before
        with torch.cuda.stream(copy_stream):
            sent = slot.buffer[: start + weights.nbytes].to(copy_stream.device, non_blocking=True)
            slot.copy_event = torch.cuda.Event()
            slot.copy_event.record(copy_stream)
        columns, position = {}, 0
        for name, values in numbers.items():
            columns[name] = sent[position : position + values.nbytes].view(values.dtype)
            position += _padded_bytes(values)
        return sent[start:].view(torch.float32).view_as(weights), columns


def _padded_bytes(values: Tensor) -> int:
    """Bytes of a column with its padding: what comes next starts where any dtype may."""
    return -(-values.nbytes // ALIGNMENT) * ALIGNMENT
