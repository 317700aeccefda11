"""Storage of runs against what a run's folder holds, with uploads cut short at every place."""

import errno
import shutil
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import hashes

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.launch.ray_worker import Job, train_stored, versions
from vitzoo_hf.launch.run_storage import RESUME, RunStorage, StoredRun
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.run import run_spec

CHILD = "sl-s1--adamw-lr0.001-linear"
PARENT = "sl-s1"


@pytest.fixture(params=["memory", "local"])
def url(request, tmp_path) -> str:
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}/storage"


def run_of(blueprint, run_id):
    return next(run for run in blueprint.runs if run.run_id == run_id)


def names(storage: RunStorage, run_id: str) -> set[str]:
    return {path.rpartition("/")[2] for path in storage.fs.find(f"{storage.root}/{run_id}")}


def test_what_is_stored_is_fetched(url, tiny_blueprint, tiny_runs, tmp_path):
    storage = RunStorage(url)
    storage.check_writable()
    assert storage.survey([CHILD]) == {}
    storage.store(CHILD, tiny_runs)
    RunStorage(url).fetch(CHILD, tmp_path / "there")
    assert {file.name: file.read_bytes() for file in (tmp_path / "there" / CHILD).iterdir()} == {
        file.name: file.read_bytes() for file in (tiny_runs / CHILD).iterdir()
    }
    fingerprint = run_spec(tiny_blueprint, run_of(tiny_blueprint, CHILD))["fingerprint"]
    assert storage.survey([CHILD, PARENT]) == {CHILD: StoredRun(fingerprint, frozenset({0, 2}))}
    assert storage.survey([PARENT]) == {}


def test_only_the_epochs_that_are_asked_for_are_fetched(url, tiny_runs, tmp_path):
    storage = RunStorage(url)
    storage.store(CHILD, tiny_runs)
    storage.fetch(CHILD, tmp_path / "there", epochs=[2])
    assert {file.name for file in (tmp_path / "there" / CHILD).iterdir()} == {
        "epoch-00002.json",
        "epoch-00002.safetensors",
    }
    storage.fetch("nothing-of-it", tmp_path / "there")
    assert not list((tmp_path / "there" / "nothing-of-it").iterdir())


def test_nothing_is_copied_twice(url, tiny_runs, tmp_path, monkeypatch):
    storage = RunStorage(url)
    storage.store(CHILD, tiny_runs)
    storage.fetch(CHILD, tmp_path / "there")
    fresh = RunStorage(url)
    monkeypatch.setattr(fresh, "_get", lambda path, file: pytest.fail(f"fetched {path} again"))
    fresh.fetch(CHILD, tmp_path / "there")
    for known in (storage, fresh):
        monkeypatch.setattr(known, "_put", lambda file, name: pytest.fail(f"stored {name} again"))
    storage.store(CHILD, tiny_runs)
    fresh.store(CHILD, tmp_path / "there")


def test_weights_are_written_before_the_record_that_names_them_and_the_resume_file_last(
    url, tiny_runs, tmp_path, monkeypatch
):
    shutil.copytree(tiny_runs / CHILD, tmp_path / CHILD)
    (tmp_path / CHILD / RESUME).write_bytes(b"resume")
    (tmp_path / CHILD / "epoch-00001.safetensors").write_bytes(b"weights without a record")
    storage, order = RunStorage(url), []
    put = storage._put
    monkeypatch.setattr(storage, "_put", lambda file, name: (order.append(file.name), put(file, name)))
    storage.store(CHILD, tmp_path)
    epochs = [f"epoch-0000{epoch}.{kind}" for epoch in (0, 2) for kind in ("safetensors", "json")]
    assert order == ["run.json", "images.json", *epochs, RESUME]
    (tmp_path / CHILD / RESUME).unlink()
    storage.store(CHILD, tmp_path)
    assert names(storage, CHILD) == {"run.json", "images.json", *epochs}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    name=st.sampled_from(["run.json", *(f"epoch-0000{e}.{k}" for e in (0, 2) for k in ("json", "safetensors"))]),
    share=st.floats(0, 1, exclude_max=True),
    flip=st.booleans(),
)
def test_a_damaged_object_is_never_believed(tiny_runs, tmp_path, name, share, flip):
    """Cut short anywhere, or with one byte of the weights changed."""
    storage = RunStorage(f"memory://{uuid.uuid4().hex}")
    storage.store(CHILD, tiny_runs)
    path = f"{storage.root}/{CHILD}/{name}"
    whole = storage.fs.cat_file(path)
    if flip and name.endswith(".safetensors"):
        start = 8 + int.from_bytes(whole[:8], "little")
        at = start + int(share * (len(whole) - start))
        changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    else:
        changed = whole[: int(share * len(whole.rstrip()))]
    storage.fs.pipe_file(path, changed)
    folder = tmp_path / uuid.uuid4().hex
    storage.fetch(CHILD, folder)
    place = RunFolder(folder / CHILD)
    assert place.epochs() == [epoch for epoch in (0, 2) if f"epoch-0000{epoch}" not in name]
    assert (place.path / "run.json").exists() == (name != "run.json")
    for epoch in place.epochs():
        found, right = (RunFolder(place.path).load_epoch(epoch), RunFolder(tiny_runs / CHILD).load_epoch(epoch))
        assert all(bool((found[0][key] == right[0][key]).all()) for key in right[0])


def job(blueprint, url) -> Job:
    return Job(blueprint, Path("/nowhere"), url, None, "cpu", 1, versions())


def store_until(count, cut):
    """`RunStorage._put` that dies at write number `count`, leaving the first half of the object if `cut`."""
    real, written = RunStorage._put, []

    def put(self, file, name):
        written.append(name)
        if len(written) > count:
            if cut:
                self.fs.pipe_file(f"{self.root}/{name}", file.read_bytes()[: file.stat().st_size // 2])
            raise KeyboardInterrupt(name)
        real(self, file, name)

    return put


@pytest.mark.parametrize("cut", [False, True], ids=["nothing", "half an object"])
@pytest.mark.parametrize("count", range(7))
def test_killed_at_any_write_a_run_continues_to_the_same_weights(
    count, cut, tiny_blueprint, tiny_runs, tmp_path, monkeypatch
):
    url = f"memory://{uuid.uuid4().hex}"
    storage = RunStorage(url)
    storage.store(PARENT, tiny_runs)
    run, epochs = run_of(tiny_blueprint, CHILD), {}
    with monkeypatch.context() as patch:
        patch.setattr(RunStorage, "_put", store_until(count, cut))
        try:
            train_stored(job(tiny_blueprint, url), [run], epochs.__setitem__)
        except KeyboardInterrupt:
            assert count < 6
        else:
            assert count == 6
    train_stored(job(tiny_blueprint, url), [run], epochs.__setitem__)
    assert epochs == {CHILD: 2}
    storage.fetch(CHILD, tmp_path)
    expected = {name: sha for name, sha in hashes(tiny_runs).items() if name.startswith(f"{CHILD}/")}
    assert hashes(tmp_path) == expected
    assert storage.survey([CHILD])[CHILD].epochs == {0, 2}
    assert RESUME not in names(storage, CHILD)


def test_a_damaged_parent_is_named(tiny_blueprint, tiny_runs):
    url = f"memory://{uuid.uuid4().hex}"
    storage = RunStorage(url)
    storage.store(PARENT, tiny_runs)
    storage.fs.pipe_file(f"{storage.root}/{PARENT}/epoch-00002.safetensors", b"short")
    with pytest.raises(ZooError, match=rf"{url}/sl-s1 is damaged: delete it there, and train again"):
        train_stored(job(tiny_blueprint, url), [run_of(tiny_blueprint, CHILD)], print)


def test_a_full_disk_leaves_the_object_as_it_was(tiny_runs, tmp_path, monkeypatch):
    storage = RunStorage(str(tmp_path / "storage"))
    storage.store(CHILD, tiny_runs)
    before = {file: file.read_bytes() for file in (tmp_path / "storage" / CHILD).iterdir()}

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vitzoo_hf.launch.run_storage.shutil.copyfile", full)
    with pytest.raises(ZooError, match=r"cannot write .*run.json: No space left on device"):
        RunStorage(str(tmp_path / "storage")).store(CHILD, tiny_runs)
    assert {file: file.read_bytes() for file in (tmp_path / "storage" / CHILD).iterdir()} == before


def test_errors_of_a_backend_are_one_line(tiny_runs, tmp_path, monkeypatch):
    storage = RunStorage(f"memory://{uuid.uuid4().hex}")

    class ClientError(Exception):
        pass

    def denied(*arguments, **options):
        raise ClientError("AccessDenied\nwith a request id")

    for name in ("pipe_file", "put_file", "find"):
        monkeypatch.setattr(storage.fs, name, denied)
    for call in (storage.check_writable, lambda: storage.store(CHILD, tiny_runs), lambda: storage.survey([CHILD])):
        with pytest.raises(
            ZooError, match=r"^cannot (write|write into|read) memory\S*: AccessDenied$|^cannot write /"
        ):
            call()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("runs", "'runs' is neither a URL nor an absolute path"),
        ("file://runs", "'file://runs' is neither a URL nor an absolute path"),
        ("local://./runs", "'local://./runs' is neither a URL nor an absolute path"),
        ("s4://bucket/runs", "'s4://bucket/runs' cannot be used: Protocol not known: s4"),
        ("/runs/[a]", r"has one of \*, \? and \["),
    ],
)
def test_urls_that_cannot_be_used_are_one_line(url, message):
    with pytest.raises(ZooError, match=message):
        RunStorage(url)


def test_a_missing_backend_is_named(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ZooError, match=r"'s3://bucket/runs' needs a package .* not installed here: Install s3fs"):
        RunStorage("s3://bucket/runs")
