"""Batches of weights in a fixed or shuffled order, resumable to the batch, shared between ranks and workers.

All batches of an epoch are planned from the seed, the epoch and the index. Ranks take every `world_size`-th of them,
and workers of a `DataLoader` take turns, so the loop of a rank sees the same batches whatever reads them.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import usable_device
from vitzoo_hf.zoo.batch_reader import Batch, BatchReader, Job, Loaded
from vitzoo_hf.zoo.index import plain
from vitzoo_hf.zoo.plan import Plan, PlannedRows, stepped
from vitzoo_hf.zoo.row_source import RowSource, check_names, handed_out
from vitzoo_hf.zoo.stream_position import Cursor, SharedPosition, checked_state, is_count

if TYPE_CHECKING:
    import datasets


class Stream(IterableDataset[Batch]):
    """Batches of rows for a training loop; made by `Zoo.stream`.

    Iterating gives one epoch; the next iteration in this process gives the next one, in another order if shuffled. An
    iteration that is left early is begun anew by the next one, and continued by `state_dict` and `load_state_dict`.

    A `torch.utils.data.DataLoader(stream, batch_size=None, num_workers=…)` gives the same batches in the same order.
    There, call `set_epoch` before every epoch, as for `datasets`: persistent workers see it too. Where other ranks
    share the batches, all have equally many: `repeated` marks rows that fill up the last round.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        batch_size: int,
        device: str | torch.device = "cpu",
        tensors: str | Sequence[str] | None = None,
        pad: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        verify: bool = True,
        reuse: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
        ):
            _check_whole(name, value, least)
        if not rank < world_size:
            raise ZooError(f"rank {rank} of {world_size}: ranks count from 0 to world_size - 1")
        if dtype not in (torch.float32, torch.float64):
            raise ZooError(f"dtype is {dtype}; columns of numbers are torch.float64 or torch.float32")
        self.source, self.batch_size, self.device = source, int(batch_size), usable_device(device)
        self._parts = handed_out(source, tensors)
        self.tensors = tensors if tensors is None or isinstance(tensors, str) else list(tensors)
        self.pad, self.dtype = pad, dtype
        self.shuffle, self.seed, self.drop_last = shuffle, int(seed), drop_last
        self.num_workers, self.verify, self.reuse = num_workers, verify, reuse
        self.rank, self.world_size = int(rank), int(world_size)
        self._with_weights, self._left_out = True, frozenset[str]()
        self._steps: tuple[slice, ...] = ()
        self._functions: tuple[tuple[str, Callable[[Batch], Any]], ...] = ()
        self._position = SharedPosition()
        self._cursor: Cursor | None = None
        self._worker_state: Mapping[str, int] | None = None
        self._copy_stream: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict[str, object]:
        hidden = ("_copy_stream", "_planned")  # a stream of the device belongs to its process
        return {name: value for name, value in self.__dict__.items() if name not in hidden} | {"_copy_stream": None}

    def __len__(self) -> int:
        """Batches of a whole epoch for this rank, equally many for every rank.

        Raises:
            TypeError: after `filter`, as nobody knows before reading.
        """
        if any(kind == "filter" for kind, _ in self._functions):
            raise TypeError("a filtered stream has no length")
        return self._share(self.num_shards)

    def __iter__(self) -> "StreamIterator":
        return StreamIterator(self)

    @property
    def epoch(self) -> int:
        """Epoch of the next iteration."""
        return self._position.epoch

    @property
    def column_names(self) -> list[str]:
        """Entries of a batch, as `datasets` names them."""
        return list(self.features)

    @property
    def features(self) -> "datasets.Features":
        """Type of each entry of a row, as `datasets` has them; `split` is made when rows are read."""
        import datasets

        columns = plain(self.source.table.select(list(self.source.columns)).slice(0, 0))
        features = datasets.Features.from_arrow_schema(columns.schema)
        weights = {"weights": datasets.List(datasets.Value("float32"))} if self._with_weights else {}
        return datasets.Features(weights | dict(features))

    @property
    def num_shards(self) -> int:
        """Number of batches in the plan of an epoch: as many readers can share the stream with work for each."""
        count = self._planned.num_batches(self.batch_size, only_full=self.drop_last)
        return len(stepped(count, self._steps))

    def take(self, n: int) -> "Stream":
        """The first `n` batches of every epoch."""
        return self._with_step(slice(0, _check_whole("n", n, 0)))

    def skip(self, n: int) -> "Stream":
        """All but the first `n` batches of every epoch."""
        return self._with_step(slice(_check_whole("n", n, 0), None))

    def shard(self, num_shards: int, index: int) -> "Stream":
        """Every `num_shards`-th batch of the plan, from number `index` on.

        Raises:
            ZooError: for an index outside the shards, or more shards than batches.
        """
        _check_whole("num_shards", num_shards, 1)
        if not _check_whole("index", index, 0) < num_shards <= max(1, self.num_shards):
            raise ZooError(
                f"shard {index} of {num_shards}: shards count from 0, and {self.num_shards} batches are to be shared"
            )
        return self._with_step(slice(index, None, num_shards))

    def map(self, function: Callable[[Batch], Mapping[str, Any]]) -> "Stream":
        """Update every batch with what `function` makes of it, in the process that reads."""
        return self._derived(_functions=(*self._functions, ("map", function)))

    def filter(self, function: Callable[[Batch], bool]) -> "Stream":
        """Batches for which `function` is true; `Zoo.filter` chooses rows, without reading the others.

        Raises:
            ZooError: where other ranks share the batches, as their numbers would differ.
        """
        if self.world_size > 1:
            raise ZooError("filter of a stream leaves ranks with unequal numbers of batches: use Zoo.filter for rows")
        return self._derived(_functions=(*self._functions, ("filter", function)))

    def select_columns(self, column_names: str | Sequence[str]) -> "Stream":
        """Only these entries of a batch; without `weights` none are read.

        Raises:
            ZooError: for an unknown one.
        """
        names = [column_names] if isinstance(column_names, str) else column_names
        check_names("column_names", names)
        # beside light columns
        added = {"weights", *(["lengths"] if self.pad else ["tensors"] if self.tensors is not None else [])}
        names_of_batch = [*self.source.columns, *sorted(added)]
        for name in names:
            if name not in names_of_batch:
                raise ZooError(f"unknown column {name!r}: {did_you_mean(name, names_of_batch)}")
        columns = tuple(name for name in self.source.columns if name in names)
        source = RowSource(self.source.positions, self.source.table, columns, self.source.layouts, self.source.reader)
        return self._derived(
            source=source,
            _with_weights=self._with_weights and not added.isdisjoint(names),
            _left_out=self._left_out | added.difference(names),
        )

    def set_epoch(self, epoch: int) -> None:
        """Make this the epoch of the next iteration, counted from 0.

        Where it is the epoch already, nothing changes: a loaded state is continued.
        """
        _check_whole("epoch", epoch, 0)
        self._cursor = self._worker_state = None
        self._position.set(int(epoch), self._position.batches if epoch == self._position.epoch else 0)

    def state_dict(self, *, after: Mapping[str, Any] | None = None) -> dict[str, int | str]:
        """The place of the newest iteration in the plan, which any number of ranks and workers can continue.

        Args:
            after: the last batch that was used; needed where workers of a `DataLoader` read, as they are ahead.

        Raises:
            ZooError: if workers read and no batch is given, or it is no batch of a stream.
        """
        if after is not None:
            place = after.get("place") if isinstance(after, Mapping) else None
            if not isinstance(place, Mapping) or not all(is_count(place.get(key)) for key in ("epoch", "batches")):
                raise ZooError(f"after is a {type(after).__name__} without a place; expected a batch as it came")
            cursor = Cursor(int(place["epoch"]), int(place["batches"]), self.world_size)
        elif self._cursor is not None:
            cursor = self._cursor
        elif get_worker_info() is None and self._position.workers_read:
            raise ZooError(
                "workers of a DataLoader read this stream ahead of the loop: give the last batch that was used,"
                " stream.state_dict(after=batch), or use torchdata's StatefulDataLoader"
            )
        else:
            cursor = Cursor(self._position.epoch, self._position.batches, self.world_size)
        return cursor.state(self._plan_fingerprint, self.num_shards)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from `state_dict`; rank, world size, workers and loader may be others.

        Raises:
            ZooError: if the state is of a stream with other rows or another order, or of an earlier version.
        """
        numbers = self._checked(state)
        self._cursor = None
        if get_worker_info() is None:
            self._position.set(numbers["epoch"], numbers["batches"])
        else:
            # for the next iteration of this worker alone: the loop may have set another epoch meanwhile
            self._worker_state = numbers

    def _checked(self, state: Mapping[str, object]) -> Mapping[str, int]:
        numbers = checked_state(state, self._plan_fingerprint, self.num_shards)
        info = get_worker_info()
        workers = info.num_workers if info is not None else 0
        if "workers" in numbers and (numbers["workers"], numbers["world_size"]) != (workers, self.world_size):
            raise ZooError(
                f"this state is of a loader with {numbers['workers']} workers in a world of {numbers['world_size']},"
                f" here are {workers} in {self.world_size}: to change that, save stream.state_dict(after=batch)"
            )
        return numbers

    @cached_property
    def _planned(self) -> PlannedRows:
        if self.pad:
            return self.source.planned([0] * len(self._parts))
        shapes: dict[str, int] = {}
        return self.source.planned([shapes.setdefault(part.layout.fingerprint, len(shapes)) for part in self._parts])

    @cached_property
    def _plan_fingerprint(self) -> str:
        steps = [[step.start, step.stop, step.step] for step in self._steps]
        settings = [self.batch_size, self.shuffle, self.seed, self.drop_last, steps]
        return self._planned.fingerprint(self.source.id_bytes(), settings)

    def _share(self, batches: int) -> int:
        """How many batches each rank gets of these."""
        return batches // self.world_size if self.drop_last else -(-batches // self.world_size)

    def _with_step(self, step: slice) -> "Stream":
        return self._derived(_steps=(*self._steps, step))

    def _derived(self, **changes: object) -> "Stream":
        """A stream that differs in these attributes, at the beginning of the same epoch."""
        stream = copy.copy(self)
        for name in ("_planned", "_plan_fingerprint"):
            stream.__dict__.pop(name, None)
        stream.__dict__ |= changes | {"_position": SharedPosition(self.epoch), "_cursor": None, "_worker_state": None}
        return stream

    def _new_cursor(self, numbers: Mapping[str, int] | None = None) -> Cursor:
        """The cursor of an iteration that begins now, which the stream remembers as its newest.

        Args:
            numbers: of a checked state; by default the place where the next iteration starts.
        """
        info, position = get_worker_info(), self._position
        if numbers is None:
            numbers, self._worker_state = self._worker_state, None
        cursor = Cursor(position.epoch, position.batches, self.world_size)
        if info is not None:
            cursor.worker, cursor.workers = info.id, info.num_workers
            cursor.is_spent = numbers is None and not position.begin(info.id)
        if numbers is not None:
            cursor.epoch, cursor.first, cursor.done = numbers["epoch"], numbers["batches"], numbers.get("done", 0)
        self._cursor = cursor
        return cursor

    def _end(self, cursor: Cursor) -> None:
        """Go to the next epoch, unless somebody has; workers leave that to the loop."""
        if get_worker_info() is None:
            if self._position.epoch == cursor.epoch:
                self._position.set(cursor.epoch + 1, 0)
            if self._cursor is cursor:
                self._cursor = None

    def _read(self, cursor: Cursor) -> Iterator[Loaded]:
        """The batches of this rank and worker from the place of a cursor on, read ahead."""
        if self.device.type == "cuda" and self._copy_stream is None:
            # one for all batches, as each stream of the device has a pool of memory
            self._copy_stream = torch.cuda.Stream(self.device)
        reader = BatchReader(
            self.source,
            self._parts,
            named=self.tensors is not None and not self.pad,
            pad=self.pad,
            dtype=self.dtype,
            verify=self.verify,
            reuse=self.reuse,
            threads=self.num_workers,
            with_weights=self._with_weights,
            copy_stream=self._copy_stream,
        )
        return reader.read_ahead(self._jobs(cursor))

    def _jobs(self, cursor: Cursor) -> Iterator[Job]:
        plan = Plan.of(
            self._planned,
            self.batch_size,
            only_full=self.drop_last,
            shuffle=self.shuffle,
            seed=self.seed,
            epoch=cursor.epoch,
        )
        numbers = stepped(len(plan), self._steps)
        count = self._share(len(numbers) - cursor.first)
        done = cursor.done
        while cursor.number(done) < count:
            number = cursor.first + cursor.number(done) * self.world_size + self.rank
            done += 1
            place = {"epoch": cursor.epoch, "batches": min(cursor.after(done), len(numbers))}
            # beyond the end only where ranks would have unequal numbers: from the beginning again
            yield Job(plan.batch(numbers[number % len(numbers)]), number >= len(numbers), place)


class StreamIterator(Iterator[Batch]):
    """One iteration of a stream, with a cursor of its own; torchdata's `StatefulDataLoader` saves and loads it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._cursor = stream._new_cursor()
        self._batches: Iterator[Loaded] | None = None

    def __next__(self) -> Batch:
        # said here: an error in `__iter__` would end a persistent worker without a word
        if self._cursor.is_spent:
            raise ZooError(
                f"the rest of epoch {self._cursor.epoch} was read by this DataLoader: call"
                f" stream.set_epoch({self._cursor.epoch + 1}) before its next iteration"
            )
        # begun at the first batch: a state may be loaded before
        if self._batches is None:
            self._batches = self._stream._read(self._cursor)
        for loaded in self._batches:
            if loaded.copy_event is not None:
                cuda_stream = torch.cuda.current_stream(self._stream.device)
                cuda_stream.wait_event(loaded.copy_event)
                # without this the allocator may hand the memory out while kernels of the caller still read it
                loaded.batch["weights"].record_stream(cuda_stream)
            # counted before the batch is handed out: a state taken while the caller uses it must not repeat it
            self._cursor.done += 1
            batch = self._with_functions(loaded.batch)
            if batch is not None:
                return batch
        self._stream._end(self._cursor)
        raise StopIteration

    def state_dict(self) -> dict[str, int | str]:
        """The place of this iteration."""
        return self._cursor.state(self._stream._plan_fingerprint, self._stream.num_shards)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from `state_dict`.

        Raises:
            ZooError: see `Stream.load_state_dict`.
        """
        self._cursor, self._batches = self._stream._new_cursor(self._stream._checked(state)), None

    def _with_functions(self, batch: Batch) -> Batch | None:
        batch = {name: entry for name, entry in batch.items() if name not in self._stream._left_out}
        for kind, function in self._stream._functions:
            result = function(batch)
            if kind == "filter" and not result:
                return None
            if kind == "map":
                if not isinstance(result, Mapping):
                    raise ZooError(f"map: the function gave {type(result).__name__}; expected a mapping of entries")
                batch = batch | dict(result)
        return batch


def _check_whole(name: str, value: object, least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ZooError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return int(value)
