"""Every run of a blueprint on this machine: one single-threaded worker process a core, parents before children.

Finished runs are skipped and unfinished ones continue, so the answer to any interruption is to launch again.
A worker that dies is replaced and its runs tried again; if this process dies, its workers end by themselves.
On a CUDA device a worker trains many small runs of one shape together, because there launching kernels is the cost.
"""

import math
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from vitzoo_hf.blueprint.blueprint import Blueprint, Run
from vitzoo_hf.environment import default_workers
from vitzoo_hf.format.atomic import exclusive
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.progress import progress_bar

ATTEMPTS = 3
MOST_STACKED = 32
STACKED_ON_WORLDS = 32
"""Runs on a world are small, and half of what they cost alone is the launching of operations."""
MEMORY_SHARE = 0.5
"""Share of a device's free memory that groups of runs are planned to take; the rest is for estimates too low."""


@dataclass
class Summary:
    """The outcome of every run, by run id."""

    finished: list[str] = field(default_factory=list)
    diverged: dict[str, str] = field(default_factory=dict)
    orphaned: list[str] = field(default_factory=list)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    runs: tuple[Run, ...] = ()
    epochs: dict[str, int] = field(default_factory=dict)


def launch(
    blueprint: Blueprint,
    folder: Path,
    *,
    workers: int | None = None,
    stack: int | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Summary:
    """Train every run of `blueprint` that `folder` does not hold yet.

    Args:
        blueprint: the zoo to train.
        folder: gets one folder a run.
        workers: processes; by default one a core, or one for a CUDA device.
        stack: runs of one shape that a worker may train together; by default one on a CPU, or 32 that draw images of
            their own, and on a CUDA device as many as its free memory holds, up to 32. Models other than plain ViTs
            train one by one.
        device: where to train.
        progress: show a bar of epochs with the time left.

    Returns:
        Which runs are finished, diverged, or could not start because their parent diverged.

    Raises:
        ZooError: if a run cannot be trained, or another process is training into `folder`.
        KeyboardInterrupt: after stopping the workers; launching again continues.
    """
    if workers is not None and workers < 1:
        raise ZooError(f"workers is {workers}; it must be at least 1")
    if stack is not None and stack < 1:
        raise ZooError(f"stack is {stack}; it must be at least 1")
    if device != "cpu":
        from vitzoo_hf.models.rebuild import usable_device

        usable_device(device)
    with exclusive(folder) as folder:
        # under the lock no other process writes here, so these are of a process that died
        for leftover in folder.glob("*/.tmp-*"):
            leftover.unlink(missing_ok=True)
        summary = Summary()
        todo = unfinished(blueprint, folder, summary)
        if todo:
            count = min(workers or default_workers(device), len(todo))
            most = default_stack(blueprint, device, count) if stack is None else stack
            _Pool(blueprint, folder, device, most, summary, progress).train(todo, count)
    return summary


def default_stack(blueprint: Blueprint, device: str, workers: int) -> int:
    """Runs that one of `workers` processes trains together: one on a CPU, but for runs on a world."""
    if not device.startswith("cuda"):
        return STACKED_ON_WORLDS if any(run.world is not None for run in blueprint.runs) else 1
    import torch

    from vitzoo_hf.training.stacked import memory_of, stackable

    if not stackable(blueprint):
        return 1
    # all workers share the memory of one device
    free, _ = torch.cuda.mem_get_info(device)
    largest = max(memory_of(blueprint, run) for run in blueprint.runs)
    return max(1, min(MOST_STACKED, int(MEMORY_SHARE * free / workers / largest)))


def unfinished(blueprint: Blueprint, folder: Path, summary: Summary) -> list[Run]:
    """Runs still to train; those that are finished go into `summary`."""
    from vitzoo_hf.training.run import is_finished

    todo = []
    for run in blueprint.runs:
        if is_finished(blueprint, run, folder):
            summary.finished.append(run.run_id)
        else:
            todo.append(run)
    return todo


def take_orphans(waiting: list[Run], summary: Summary) -> list[Run]:
    """Move runs whose parent will never be finished from `waiting` into `summary`; returns them."""
    lost = set(summary.diverged) | set(summary.orphaned)
    orphans = [run for run in waiting if run.parent_run in lost]
    summary.orphaned += [run.run_id for run in orphans]
    waiting[:] = [run for run in waiting if run not in orphans]
    return orphans


class _Pool:
    """Worker processes and the runs they are given."""

    def __init__(
        self, blueprint: Blueprint, folder: Path, device: str, stack: int, summary: Summary, progress: bool
    ) -> None:
        self.blueprint, self.folder, self.device, self.stack = blueprint, folder, device, stack
        self.summary = summary
        self.attempts: dict[str, int] = {}
        self.progress = progress
        self.workers: list[_Worker] = []
        self.total = 0

    def train(self, todo: Sequence[Run], count: int) -> None:
        waiting = list(todo)
        self.total = sum(run.epochs for run in waiting)
        self.bar = progress_bar("training", "epoch", shown=self.progress, total=self.total)
        try:
            self.workers = [self._spawn() for _ in range(count)]
            while waiting or any(worker.runs for worker in self.workers):
                self.total -= sum(run.epochs for run in take_orphans(waiting, self.summary))
                self.bar.total = self.total
                self._assign(waiting)
                busy = [worker for worker in self.workers if worker.runs]
                if not busy:
                    break
                # the sentinel too: a worker that dies sends nothing
                ready = set(wait([end for worker in busy for end in (worker.connection, worker.process.sentinel)]))
                for worker in busy:
                    if worker.connection in ready:
                        self._receive(worker, waiting)
                    elif worker.process.sentinel in ready:
                        self._replace(worker, waiting)
        finally:
            self._stop()

    def _assign(self, waiting: list[Run]) -> None:
        for worker in self.workers:
            if worker.runs:
                continue
            group = self._next_group(waiting)
            if not group:
                return
            for run in group:
                waiting.remove(run)
            worker.runs, worker.epochs = group, dict.fromkeys((run.run_id for run in group), 0)
            try:
                worker.connection.send([run.run_id for run in group])
            except (BrokenPipeError, ConnectionResetError):
                self._replace(worker, waiting)

    def _next_group(self, waiting: list[Run]) -> tuple[Run, ...]:
        """Runs whose parents are finished, to train together: no more than leave every worker its share."""
        from vitzoo_hf.training.stacked import groups

        finished = set(self.summary.finished)
        ready = [run for run in waiting if run.parent_run is None or run.parent_run in finished]
        share = math.ceil(len(ready) / len(self.workers))
        return groups(ready, min(self.stack, share))[0] if ready else ()

    def _receive(self, worker: _Worker, waiting: list[Run]) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._replace(worker, waiting)
            return
        if kind == "epoch":
            run_id, epoch = value
            self.bar.update(epoch - worker.epochs[run_id])
            worker.epochs[run_id] = epoch
            return
        runs, worker.runs = worker.runs, ()
        if kind == "mistake":
            raise ZooError(value)
        if kind == "failure":
            raise RuntimeError(f"training {named(runs)} failed:\n{value}")
        self.summary.diverged |= value
        self.summary.finished += [run.run_id for run in runs if run.run_id not in value]
        self.bar.update(sum(run.epochs - worker.epochs[run.run_id] for run in runs))

    def _replace(self, worker: _Worker, waiting: list[Run]) -> None:
        """Put a fresh process in the place of a dead one and its runs back in front of the queue."""
        worker.process.join()
        code, runs = worker.process.exitcode, worker.runs
        for run in runs:
            self.attempts[run.run_id] = self.attempts.get(run.run_id, 0) + 1
        if any(self.attempts[run.run_id] >= ATTEMPTS for run in runs):
            fewer = "fewer workers" if len(runs) == 1 else "fewer workers or a smaller stack"
            raise ZooError(
                f"the worker training {named(runs)} died {ATTEMPTS} times (exit code {code});"
                f" if memory ran out, train with {fewer}"
            )
        waiting[:0] = runs
        self.bar.update(-sum(worker.epochs.values()))
        worker.connection.close()
        fresh = self._spawn()
        worker.process, worker.connection, worker.runs, worker.epochs = fresh.process, fresh.connection, (), {}

    def _spawn(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with _single_threaded_children():
            process = context.Process(
                target=_work, args=(theirs, self.blueprint, self.folder, self.device), daemon=True
            )
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _stop(self) -> None:
        for worker in self.workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()
        self.bar.close()


def named(runs: Sequence[Run]) -> str:
    """The first run, and how many there are besides."""
    return runs[0].run_id + (f" and {len(runs) - 1} with it" if len(runs) > 1 else "")


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _work(connection: Connection, blueprint: Blueprint, folder: Path, device: str) -> None:
    """A worker: trains the runs it is sent until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from vitzoo_hf.images.prepared import PreparedBlueprint
    from vitzoo_hf.training.stacked import train_stacked

    torch.set_num_threads(1)
    prepared = PreparedBlueprint(blueprint)
    runs = {run.run_id: run for run in blueprint.runs}
    try:
        while True:
            group = [runs[run_id] for run_id in connection.recv()]
            try:
                diverged = train_stacked(
                    prepared,
                    group,
                    folder,
                    device=device,
                    on_epoch=lambda run_id, epoch: connection.send(("epoch", (run_id, epoch))),
                )
                connection.send(("done", diverged))
            except ZooError as error:
                connection.send(("mistake", str(error)))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception:
                connection.send(("failure", traceback.format_exc()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
