"""Runs on a real Ray cluster of this machine, workers and drivers killed, against the runs of `launch`."""

import contextlib
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from places import TESTS
from ray_processes import processes_of, workers_at_a_task
from run_folders import hashes, wait_for

from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.format.atomic import exclusive
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.launch import ray as ray_launch
from vitzoo_hf.launch import ray_worker
from vitzoo_hf.launch.local import launch
from vitzoo_hf.launch.ray import launch_on_ray
from vitzoo_hf.launch.ray_worker import Job, train_on_worker, versions
from vitzoo_hf.launch.run_storage import RunStorage
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.stacked import shape_of, train_stacked

TASK = "train_on_worker"


@pytest.fixture
def start():
    """`vitzoo train --ray` in a session of its own, with all that Ray starts; the end of the test ends it."""
    started = []

    def begin(blueprint: Path, folder: Path, *arguments: object) -> subprocess.Popen[str]:
        code = "from vitzoo_hf.cli import main; main()"
        command = [sys.executable, "-c", code, "train", blueprint, "--out", folder, "--ray", *arguments, "--quiet"]
        process = subprocess.Popen(
            list(map(str, command)), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        for left in processes_of(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        process.communicate()


def finish(process: subprocess.Popen[str], seconds: float = 120) -> str:
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors
    return output


def kill_worker(process: subprocess.Popen[str], until) -> None:
    wait_for(until)
    wait_for(lambda: workers_at_a_task(process.pid, TASK))
    os.kill(workers_at_a_task(process.pid, TASK)[0], signal.SIGKILL)


def kill_driver(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "runs"
    launch(Blueprint.load(TESTS / "small.yaml"), folder, workers=1, progress=False)
    return folder


def test_a_killed_worker_continues_from_its_last_upload_to_the_same_zoo(start, small_runs, tmp_path):
    pytest.importorskip("ray")
    storage = tmp_path / "storage"
    process = start(TESTS / "small.yaml", tmp_path / "runs", "--storage", f"file://{storage}")
    kill_worker(process, lambda: len(list(storage.glob("s1/epoch-*.json"))) > 3)
    before = {file: file.stat().st_mtime_ns for file in storage.glob("s1/epoch-*.json")}
    assert "2 runs finished" in finish(process)
    assert 3 < len(before) < 13
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert hashes(tmp_path / "runs") == hashes(storage) == hashes(small_runs)
    wait_for(lambda: not processes_of(process.pid))


@pytest.mark.slow
def test_a_worker_and_then_the_driver_killed_give_the_same_zoo(start, tiny_blueprint, tiny_runs, tmp_path):
    pytest.importorskip("ray")
    storage, runs = tmp_path / "storage", tmp_path / "runs"
    arguments = (TESTS / "tiny.yaml", runs, "--storage", storage)
    process = start(*arguments)
    kill_worker(process, lambda: list(storage.glob("*/run.json")))
    wait_for(lambda: list(storage.glob("*--*/epoch-00000.json")))
    kill_driver(process)
    assert len(hashes(storage)) < len(hashes(tiny_runs))
    assert "10 runs finished" in finish(start(*arguments))
    assert hashes(runs) == hashes(storage) == hashes(tiny_runs)
    assert not [*storage.rglob(".tmp-*"), *runs.rglob(".tmp-*"), *storage.rglob("resume.*"), *runs.rglob("resume.*")]
    again = pack(tiny_blueprint, runs, tmp_path / "zoo", progress=False)
    first = pack(tiny_blueprint, tiny_runs, tmp_path / "first", progress=False)
    assert {file.name: file.read_bytes() for file in again.rglob("*.parquet")} == {
        file.name: file.read_bytes() for file in first.rglob("*.parquet")
    }


@pytest.mark.slow
def test_a_shared_folder_alone_will_do_and_what_is_finished_is_skipped(start, tiny_runs, tmp_path):
    pytest.importorskip("ray")
    process = start(TESTS / "tiny.yaml", tmp_path)
    wait_for(lambda: list(tmp_path.glob("*--*/epoch-00002.json")))
    kill_driver(process)
    assert "10 runs finished" in finish(start(TESTS / "tiny.yaml", tmp_path))
    assert hashes(tmp_path) == hashes(tiny_runs)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("epoch-*")}
    assert "10 runs finished" in finish(start(TESTS / "tiny.yaml", tmp_path))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("epoch-*")} == before


@pytest.mark.slow
def test_ctrl_c_ends_the_cluster_too(start, tmp_path):
    pytest.importorskip("ray")
    process = start(TESTS / "small.yaml", tmp_path / "runs", "--storage", tmp_path / "storage")
    wait_for(lambda: list((tmp_path / "storage").glob("s1/epoch-*.json")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "the same command continues" in errors
    wait_for(lambda: not processes_of(process.pid))


NODE = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
print(cluster.address, *(node.all_processes["raylet"][0].process.pid for node in nodes), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_machine_that_dies_leaves_its_run_to_another(start, small_runs, tmp_path):
    pytest.importorskip("ray")
    machines = subprocess.Popen(
        [sys.executable, "-c", NODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    address, *raylets = machines.stdout.readline().split()
    storage = tmp_path / "storage"
    process = start(TESTS / "small.yaml", tmp_path / "runs", address, "--storage", storage)
    wait_for(lambda: len(list(storage.glob("s1/epoch-*.json"))) > 3)
    (worker,) = workers_at_a_task(machines.pid, TASK)
    (raylet,) = {str(int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1]))} & set(raylets)
    os.kill(int(raylet), signal.SIGKILL)
    assert "2 runs finished" in finish(process)
    assert hashes(tmp_path / "runs") == hashes(small_runs)
    machines.communicate("")
    wait_for(lambda: not processes_of(machines.pid))


class DeadWorkerError(Exception):
    """Stands for the errors of Ray."""


class FailedTaskError(DeadWorkerError):
    """Stands for an exception inside a task."""


class FakeRay:
    """Ray in this process: a task runs when it is waited for, and ends as `ends` says."""

    def __init__(self, ends, cpus: float = 1) -> None:
        self.ends, self.cpus, self.trained, self.groups = ends, cpus, [], []
        self.exceptions = SimpleNamespace(RayError=DeadWorkerError, RayTaskError=FailedTaskError)

    def nodes(self):
        return [
            {"Alive": True, "Resources": {"CPU": self.cpus}},
            {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        ]

    def put(self, value):
        return value

    def remote(self, **options):
        def decorate(target):
            if isinstance(target, type):
                actor = target()
                return SimpleNamespace(remote=lambda: SimpleNamespace(all=SimpleNamespace(remote=actor.all)))
            assert options["max_retries"] == 0
            return SimpleNamespace(remote=lambda job, run_ids, reports: ("task", tuple(run_ids)))

        return decorate

    def wait(self, references, timeout):
        return references[:1], references[1:]

    def get(self, reference, timeout=None):
        if isinstance(reference, dict):
            return reference
        run_ids = reference[1]
        self.trained += run_ids
        self.groups.append(run_ids)
        end = self.ends(*run_ids)
        if isinstance(end, Exception):
            raise end
        return end

    def cancel(self, reference, force):
        assert force


@pytest.fixture
def fake(monkeypatch):
    def make(ends, **options):
        ray = FakeRay(ends, **options)

        @contextmanager
        def cluster(address):
            yield ray

        monkeypatch.setattr(ray_launch, "cluster", cluster)
        return ray

    return make


def test_parents_come_first_and_children_of_the_diverged_are_left_out(fake, tiny_blueprint, tmp_path):
    ray = fake(lambda run_id: ("done", {"cl-s1": "too fast"} if run_id == "cl-s1" else {}))
    summary = launch_on_ray(tiny_blueprint, tmp_path, progress=False)
    assert summary.diverged == {"cl-s1": "too fast"}
    assert sorted(summary.orphaned) == sorted(run.run_id for run in tiny_blueprint.runs if run.parent_run == "cl-s1")
    assert sorted(summary.finished) == sorted(
        run.run_id for run in tiny_blueprint.runs if run.run_id.startswith("sl-s1")
    )
    assert ray.trained.index("sl-s1") < ray.trained.index("sl-s1--sgd-lr0.001-mlp")


def test_a_worker_that_always_dies_is_given_up_with_a_hint(fake, tiny_blueprint, tmp_path):
    ray = fake(lambda run_id: DeadWorkerError("worker was killed\nby something"))
    with pytest.raises(ZooError, match=r"training sl-s1 died 3 times \(worker was killed\); if memory ran out"):
        launch_on_ray(tiny_blueprint, tmp_path, progress=False)
    assert ray.trained.count("sl-s1") == 3


def test_runs_of_one_shape_are_tasks_together_and_no_place_is_left_idle(fake, tmp_path):
    blueprint = Blueprint.load("mini")
    runs = {run.run_id: run for run in blueprint.runs}
    sizes = {}
    for cpus in (1, 2, 64):
        ray = fake(lambda *run_ids: ("done", {}), cpus=cpus)
        assert len(launch_on_ray(blueprint, tmp_path / str(cpus), stack=8, progress=False).finished) == len(runs)
        assert sorted(ray.trained) == sorted(runs)
        for group in ray.groups:
            assert len({shape_of(runs[run_id]) for run_id in group}) == 1
        sizes[cpus] = max(map(len, ray.groups))
    assert sizes == {1: 6, 2: 6, 64: 1}
    with pytest.raises(ZooError, match="stack is 0; it must be at least 1"):
        launch_on_ray(blueprint, tmp_path / "none", stack=0, progress=False)


def test_runs_that_diverge_in_a_group_leave_the_others(fake, tmp_path):
    fake(lambda *run_ids: ("done", {run_ids[0]: "too fast"} if len(run_ids) > 1 else {}))
    summary = launch_on_ray(Blueprint.load("mini"), tmp_path, stack=8, progress=False)
    assert (len(summary.diverged), len(summary.finished), summary.orphaned) == (8, 42, [])


def test_a_group_on_a_worker_trains_what_a_group_here_trains(tmp_path):
    blueprint = Blueprint.load(TESTS / "small.yaml")
    first = replace(blueprint.runs[0], epochs=2, keep_epochs=(0, 2))
    runs = tuple(replace(first, run_id=f"s{s}", recipe=replace(first.recipe, seed=s)) for s in (1, 2))
    blueprint = replace(blueprint, runs=runs)
    job = Job(blueprint, tmp_path / "nothing", str(tmp_path / "storage"), None, "cpu", 1, versions())
    assert train_on_worker(job, ["s1", "s2"], reports()) == ("done", {})
    assert train_stacked(PreparedBlueprint(blueprint), runs, tmp_path / "here") == {}
    assert hashes(tmp_path / "storage") == hashes(tmp_path / "here")
    assert len(hashes(tmp_path / "here")) == 4


def test_a_worker_may_die_twice(fake, tiny_blueprint, tmp_path):
    left = {run.run_id: 2 for run in tiny_blueprint.runs}

    def ends(run_id):
        left[run_id] -= 1
        return DeadWorkerError("killed") if left[run_id] >= 0 else ("done", {})

    fake(ends)
    assert len(launch_on_ray(tiny_blueprint, tmp_path, progress=False).finished) == 10


def test_a_mistake_in_a_task_is_one_line_and_a_failure_keeps_its_traceback(fake, tiny_blueprint, tmp_path):
    fake(lambda run_id: ("mistake", "no images here"))
    with pytest.raises(ZooError, match=r"^no images here$"):
        launch_on_ray(tiny_blueprint, tmp_path, progress=False)
    fake(lambda run_id: FailedTaskError("Traceback: KeyError"))
    with pytest.raises(RuntimeError, match=r"training sl-s1 failed:\nTraceback: KeyError"):
        launch_on_ray(tiny_blueprint, tmp_path, progress=False)


def test_runs_that_fit_nowhere_are_refused(fake, tiny_blueprint, tmp_path):
    fake(pytest.fail, cpus=2)
    with pytest.raises(ZooError, match="no machine of the cluster has 4 CPUs and 0 GPUs"):
        launch_on_ray(tiny_blueprint, tmp_path, num_cpus=4, progress=False)
    with pytest.raises(ZooError, match=r"no machine of the cluster has 1 CPUs and 0\.5 GPUs"):
        launch_on_ray(tiny_blueprint, tmp_path, device="cuda", num_gpus=0.5, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cpus": 0}, "CPUs of a run are 0"),
        ({"num_gpus": -1}, "GPUs of a run are -1"),
        ({"num_gpus": 1.5}, r"GPUs of a run are 1\.5"),
        ({"device": "cuda", "num_gpus": 0}, "device cuda needs GPUs"),
        ({"device": "cuda:1"}, "Ray chooses which GPU"),
        ({"storage": "memory://x"}, "the memory of one process"),
        ({"storage": "/dev/null/x"}, "cannot write into /dev/null/x"),
    ],
)
def test_options_that_cannot_be_are_one_line(options, message, tiny_blueprint, tmp_path):
    with pytest.raises(ZooError, match=message):
        launch_on_ray(tiny_blueprint, tmp_path, progress=False, **options)


def test_two_launches_cannot_share_a_folder_or_a_storage(tiny_blueprint, tmp_path):
    for held in ("runs", "storage"):
        with exclusive(tmp_path / held), pytest.raises(ZooError, match=f"another process is working in .*/{held}"):
            launch_on_ray(tiny_blueprint, tmp_path / "runs", storage=f"file://{tmp_path}/storage", progress=False)


def test_the_output_folder_may_be_the_storage(fake, tiny_blueprint, runs_copy):
    fake(pytest.fail)
    summary = launch_on_ray(tiny_blueprint, runs_copy, storage=f"file://{runs_copy}", progress=False)
    assert len(summary.finished) == 10


def test_what_storage_holds_is_fetched_and_not_trained(fake, tiny_blueprint, tiny_runs, tmp_path):
    fake(pytest.fail)
    for run in tiny_blueprint.runs:
        RunStorage(str(tmp_path / "storage")).store(run.run_id, tiny_runs)
    summary = launch_on_ray(tiny_blueprint, tmp_path / "runs", storage=str(tmp_path / "storage"), progress=False)
    assert len(summary.finished) == 10
    assert hashes(tmp_path / "runs") == hashes(tiny_runs)
    damaged = tmp_path / "storage" / "sl-s1" / "epoch-00002.safetensors"
    held = bytearray(damaged.read_bytes())
    held[-1] ^= 1
    damaged.write_bytes(held)
    with pytest.raises(ZooError, match=r"storage/sl-s1 is damaged: delete it there, and train again"):
        launch_on_ray(tiny_blueprint, tmp_path / "fresh", storage=str(tmp_path / "storage"), progress=False)


def test_parents_that_only_the_folder_holds_go_into_storage(fake, tiny_blueprint, tiny_runs, tmp_path):
    RunStorage(str(tmp_path / "runs")).store("sl-s1", tiny_runs)
    ray = fake(lambda run_id: ("done", {run_id: "for the test"}))
    launch_on_ray(tiny_blueprint, tmp_path / "runs", storage=str(tmp_path / "storage"), progress=False)
    assert set(hashes(tmp_path / "storage")) == {"sl-s1/epoch-00002.json"}
    assert "sl-s1" not in ray.trained
    assert "sl-s1--sgd-lr0.001-mlp" in ray.trained


def test_another_training_in_storage_is_refused(fake, tiny_blueprint, tiny_runs, tmp_path):
    fake(pytest.fail)
    RunStorage(str(tmp_path / "storage")).store("sl-s1", tiny_runs)
    first = tiny_blueprint.runs[0]
    other = replace(first, recipe=replace(first.recipe, lr=0.1))
    blueprint = replace(tiny_blueprint, runs=(other, *tiny_blueprint.runs[1:]))
    with pytest.raises(ZooError, match=r"storage/sl-s1 holds a run trained by another blueprint"):
        launch_on_ray(blueprint, tmp_path / "runs", storage=str(tmp_path / "storage"), progress=False)


def reports() -> SimpleNamespace:
    told = []
    return SimpleNamespace(told=told, tell=SimpleNamespace(remote=lambda run_id, epoch: told.append((run_id, epoch))))


def test_a_worker_names_what_is_wrong_with_its_machine(tiny_blueprint, tmp_path):
    right = Job(tiny_blueprint, tmp_path, None, tmp_path, "cpu", 1, versions())
    for job, message in (
        (replace(right, versions=versions() | {"torch": "0.1"}), "install the same everywhere"),
        (right, f"does not see {tmp_path}: share it between the machines"),
        (replace(right, shared=None, device="cuda:99"), "device 'cuda:99' is not here"),
    ):
        end, text = train_on_worker(job, ["sl-s1"], reports())
        assert end == "mistake"
        assert message in text


def test_a_worker_reports_epochs_and_divergence(tiny_blueprint, tmp_path):
    job = Job(tiny_blueprint, tmp_path / "nothing", str(tmp_path / "storage"), None, "cpu", 1, versions())
    told = reports()
    assert train_on_worker(job, ["sl-s1"], told) == ("done", {})
    assert told.told == [("sl-s1", 0), ("sl-s1", 1), ("sl-s1", 2)]
    first = tiny_blueprint.runs[0]
    wild = replace(first, recipe=replace(first.recipe, lr=1e30))
    job = replace(
        job,
        blueprint=replace(tiny_blueprint, runs=(wild, *tiny_blueprint.runs[1:])),
        storage=str(tmp_path / "wild"),
    )
    for _ in range(2):
        end, diverged = train_on_worker(job, ["sl-s1"], reports())
        assert (end, "diverged in epoch 1" in diverged["sl-s1"]) == ("done", True)
    assert RunFolder(tmp_path / "wild" / "sl-s1").divergence["epoch"] == 1
    assert not (tmp_path / "nothing").exists()


def test_scratch_of_killed_workers_is_removed_and_that_of_others_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, young, busy = (tmp_path / f"{ray_worker.SCRATCH}{name}" for name in ("dead", "young", "busy"))
    for folder in (dead, young, busy):
        folder.mkdir()
    with exclusive(busy):
        for folder in (dead, busy):
            os.utime(folder, (0, 0))
        with ray_worker._scratch() as own:
            assert set(tmp_path.iterdir()) == {young, busy, own}
    assert set(tmp_path.iterdir()) == {young, busy}


def test_ray_that_is_not_installed_is_one_line(tiny_blueprint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ZooError, match=r"Ray is not installed: run `pip install 'vitzoo-hf\[ray\]'`"):
        launch_on_ray(tiny_blueprint, tmp_path, progress=False)


def test_a_relative_or_linked_folder_is_locked_once(fake, tiny_blueprint, tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("runs")
    jobs = []
    ray = fake(lambda run_id: ("done", {}))
    monkeypatch.setattr(ray, "put", jobs.append)
    for folder in ("runs", "link", "link/../runs"):
        assert len(launch_on_ray(tiny_blueprint, Path(folder), progress=False).finished) == 10
    assert {(job.folder, job.shared) for job in jobs} == {(tmp_path / "runs", tmp_path / "runs")}
    launch_on_ray(tiny_blueprint, Path("runs"), storage=str(tmp_path / "link"), progress=False)
    assert jobs[-1].storage is None
