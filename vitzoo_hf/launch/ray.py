"""Every run of a blueprint over a Ray cluster: a task a run or a group of runs, parents before children.

Checkpoints go to a storage that every machine reaches, or straight into the output folder where machines share it. A
task whose worker dies is submitted again and continues from its last checkpoint, on whatever machine has room. This
process may die too: started again, it finds what was trained and ends in the same zoo, bit for bit.
"""

import contextlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from vitzoo_hf.blueprint.blueprint import Blueprint, Run
from vitzoo_hf.format.atomic import absolute, exclusive
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.launch.local import ATTEMPTS, MOST_STACKED, Summary, named, take_orphans, unfinished
from vitzoo_hf.launch.ray_cluster import LOCAL, cluster
from vitzoo_hf.launch.ray_worker import Job, Reports, train_on_worker, versions
from vitzoo_hf.launch.run_storage import RunStorage
from vitzoo_hf.progress import progress_bar

GLANCE = 0.5


def launch_on_ray(
    blueprint: Blueprint,
    folder: Path,
    *,
    address: str = LOCAL,
    device: str = "cpu",
    num_cpus: int = 1,
    num_gpus: int | float | None = None,
    stack: int | None = None,
    storage: str | None = None,
    progress: bool = True,
) -> Summary:
    """Train every run of `blueprint` that neither `folder` nor `storage` holds yet, as tasks of Ray.

    Every machine needs the same versions of this package, torch and timm, and the images of the blueprint. With
    `num_cpus=1` the weights are those of `launch`, bit for bit, on machines of one kind.

    Args:
        blueprint: what to train.
        folder: gets one folder a run. Without `storage` every machine must see it under this path.
        address: `HOST:PORT` of a cluster, `auto` for the one this machine belongs to, or `local` to start one here.
        device: `cpu` or `cuda`.
        num_cpus: cores and torch threads of a task.
        num_gpus: GPUs of a task, also a share of one; by default 1 with `cuda`, else 0.
        stack: runs of one shape that a task may train together; by default 1 on a CPU, and up to 32 on GPUs, where
            a group that memory does not hold goes on in halves. Never so many that a machine has nothing to do.
        storage: fsspec URL that every machine reaches, for checkpoints; finished runs are copied into `folder`.
        progress: show a bar of epochs with the time left.

    Returns:
        Which runs are finished, diverged, or could not start because their parent diverged.

    Raises:
        ZooError: if a run cannot be trained or its worker died three times, if Ray, the cluster or the storage cannot
            be used, or if another process is training into `folder` or `storage`.
    """
    gpus = _resources(device, num_cpus, num_gpus)
    most = _most_stacked(blueprint, device, stack)
    folder = absolute(folder)
    place = _storage(storage, folder)
    shared = place.folder if place else folder
    with ExitStack() as entered:
        for locked_folder in filter(None, dict.fromkeys((folder, shared))):
            entered.enter_context(exclusive(locked_folder))
            for leftover in locked_folder.glob("*/.tmp-*"):
                leftover.unlink(missing_ok=True)
        if place:
            place.check_writable()
        summary = Summary()
        todo = unfinished(blueprint, folder, summary)
        if place and todo:
            todo = _unfinished_in_storage(blueprint, folder, place, todo, summary)
        if todo:
            ray = entered.enter_context(cluster(address))
            room = _room(ray, num_cpus, gpus)
            job = Job(blueprint, folder, place.url if place else None, shared, device, num_cpus, versions())
            _Tasks(ray, job, gpus, Groups(most, room), summary, progress).train(todo)
        if place:
            _copy_back(blueprint, folder, place, summary, progress)
    return summary


def _resources(device: str, num_cpus: int, num_gpus: int | float | None) -> float:
    if device not in ("cpu", "cuda"):
        raise ZooError(f"device is {device!r}; on Ray it is cpu or cuda, and Ray chooses which GPU")
    if num_cpus < 1:
        raise ZooError(f"CPUs of a run are {num_cpus}; they must be at least 1")
    gpus = float(device == "cuda") if num_gpus is None else float(num_gpus)
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise ZooError(f"GPUs of a run are {gpus:g}; give a share of one, such as 0.25, or a whole number")
    if device == "cuda" and gpus == 0:
        raise ZooError("device cuda needs GPUs: give each run a share of one, such as 0.25, or leave it at 1")
    return gpus


def _storage(url: str | None, folder: Path) -> RunStorage | None:
    """The storage; None where it is the output folder itself."""
    if url is None:
        return None
    storage = RunStorage(url)
    if storage.in_memory:
        raise ZooError(f"storage {url!r} is the memory of one process: give one that every machine reaches")
    return None if storage.folder and absolute(storage.folder) == folder else storage


def _unfinished_in_storage(
    blueprint: Blueprint, folder: Path, storage: RunStorage, todo: list[Run], summary: Summary
) -> list[Run]:
    """Runs that storage does not hold either; what only `folder` holds of parents is copied into storage."""
    from vitzoo_hf.training.run import run_spec

    stored_runs = storage.survey({run.run_id for run in blueprint.runs})
    for run in blueprint.runs:
        stored = stored_runs.get(run.run_id)
        fingerprint = run_spec(blueprint, run)["fingerprint"]
        if stored and stored.fingerprint not in (None, fingerprint):
            raise ZooError(
                f"{storage.url}/{run.run_id} holds a run trained by another blueprint ({stored.fingerprint}, not"
                f" {fingerprint}): choose another storage, or delete it there"
            )
    complete = {run_id: stored.epochs for run_id, stored in stored_runs.items()}
    remaining = [run for run in todo if not set(run.keep_epochs) <= complete.get(run.run_id, frozenset())]
    parents = {run.parent_run for run in remaining}
    for run in blueprint.runs:
        is_finished_here = run.run_id in summary.finished
        if is_finished_here and run.run_id in parents and run.epochs not in complete.get(run.run_id, ()):
            storage.store(run.run_id, folder)
    summary.finished += [run.run_id for run in todo if run not in remaining]
    return remaining


def _most_stacked(blueprint: Blueprint, device: str, stack: int | None) -> int:
    from vitzoo_hf.training.stacked import stackable

    if stack is None:
        return MOST_STACKED if device == "cuda" and stackable(blueprint) else 1
    if stack < 1:
        raise ZooError(f"stack is {stack}; it must be at least 1")
    return stack


def _room(ray: Any, num_cpus: int, num_gpus: float) -> int:
    """How many tasks the cluster has room for; tasks that fit nowhere are refused, rather than waited for."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needed = {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount > 0}
    room = sum(min(int(machine.get(name, 0) / needed[name]) for name in needed) for machine in machines)
    if room < 1:
        raise ZooError(
            f"no machine of the cluster has {num_cpus} CPUs and {num_gpus:g} GPUs for a run: ask for less, or add one"
        )
    return room


def _copy_back(blueprint: Blueprint, folder: Path, storage: RunStorage, summary: Summary, progress: bool) -> None:
    """Copy what was trained into `folder`, where `pack` looks for it."""
    from vitzoo_hf.training.run import is_finished

    trained = [run for run in blueprint.runs if run.run_id in {*summary.finished, *summary.diverged}]
    missing = [run for run in trained if not is_finished(blueprint, run, folder)]
    with progress_bar("fetching", "run", shown=progress and bool(missing), total=len(missing)) as bar:
        for run in missing:
            storage.fetch(run.run_id, folder)
            if run.run_id in summary.finished and not is_finished(blueprint, run, folder):
                raise ZooError(f"{storage.url}/{run.run_id} is damaged: delete it there, and train again")
            bar.update()


class Groups(NamedTuple):
    """Runs that may train together, and the tasks that the cluster has room for."""

    most: int
    room: int

    def of(self, ready: Sequence[Run]) -> list[tuple[Run, ...]]:
        """Runs of one shape, no more together than leave every place in the cluster its share."""
        from vitzoo_hf.training.stacked import groups

        return groups(ready, min(self.most, math.ceil(len(ready) / self.room))) if ready else []


class _Tasks:
    """Tasks of Ray and the runs they train."""

    def __init__(self, ray: Any, job: Job, gpus: float, groups: Groups, summary: Summary, progress: bool) -> None:
        self.ray, self.groups, self.summary, self.progress = ray, groups, summary, progress
        self.task = ray.remote(num_cpus=job.threads, num_gpus=gpus, max_retries=0)(train_on_worker)
        self.job = ray.put(job)
        self.reports = ray.remote(num_cpus=0, max_restarts=-1)(Reports).remote()
        self.running: dict[Any, tuple[Run, ...]] = {}
        self.deaths: dict[str, int] = {}
        self.epochs: dict[str, int] = {}

    def train(self, todo: list[Run]) -> None:
        waiting, total = list(todo), sum(run.epochs for run in todo)
        self.bar = progress_bar("training", "epoch", shown=self.progress, total=total)
        try:
            while waiting or self.running:
                total -= sum(run.epochs for run in take_orphans(waiting, self.summary))
                self.bar.total = total
                self._submit_ready(waiting)
                done, _ = self.ray.wait(list(self.running), timeout=GLANCE) if self.running else ([], [])
                for reference in done:
                    self._receive(reference, self.running.pop(reference))
                self._show()
        finally:
            for reference in self.running:
                self.ray.cancel(reference, force=True)
            self.bar.close()

    def _submit_ready(self, waiting: list[Run]) -> None:
        finished = set(self.summary.finished)
        ready = [run for run in waiting if run.parent_run is None or run.parent_run in finished]
        for group in self.groups.of(ready):
            for run in group:
                waiting.remove(run)
            self._submit(group)

    def _submit(self, runs: tuple[Run, ...]) -> None:
        self.running[self.task.remote(self.job, [run.run_id for run in runs], self.reports)] = runs

    def _receive(self, reference: Any, runs: tuple[Run, ...]) -> None:
        try:
            kind, value = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"training {named(runs)} failed:\n{error}") from None
        except self.ray.exceptions.RayError as error:
            self._submit_again(runs, error)
            return
        if kind == "mistake":
            raise ZooError(value)
        self.summary.diverged |= value
        self.summary.finished += [run.run_id for run in runs if run.run_id not in value]
        self.epochs |= {run.run_id: run.epochs for run in runs}

    def _submit_again(self, runs: tuple[Run, ...], error: Exception) -> None:
        for run in runs:
            self.deaths[run.run_id] = self.deaths.get(run.run_id, 0) + 1
        if any(self.deaths[run.run_id] >= ATTEMPTS for run in runs):
            reason = str(error).strip().splitlines()[0]
            raise ZooError(
                f"the worker training {named(runs)} died {ATTEMPTS} times ({reason}); if memory ran out, give each"
                " run more CPUs so that fewer share a machine, or stack fewer; the same command continues"
            )
        self._submit(runs)

    def _show(self) -> None:
        """Bring the bar up to what tasks reported; while the reports' machine is being replaced, leave it."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            reported = self.ray.get(self.reports.all.remote(), timeout=GLANCE)
            training = {run.run_id for runs in self.running.values() for run in runs}
            self.epochs |= {run_id: epoch for run_id, epoch in reported.items() if run_id in training}
        self.bar.update(sum(self.epochs.values()) - self.bar.n)
