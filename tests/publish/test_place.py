import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vitzoo_hf.evaluation.evaluate import evaluate
from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import exclusive
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish import folder as zoo_folder
from vitzoo_hf.publish.folder import Storage, write_config
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.publish.place import beside, fresh_folder, held, swap
from vitzoo_hf.zoo import Zoo

HOLDER = """
import sys, time
from pathlib import Path
from vitzoo_hf.publish.place import fresh_folder, held

if __name__ == "__main__":
    with held(Path(sys.argv[1])), fresh_folder(Path(sys.argv[1])) as fresh:
        (fresh / "half").write_text("half a file")
        print("held", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds a place, in the middle of writing."""
    script, started = tmp_path / "holder.py", []
    script.write_text(HOLDER)

    def start(place):
        process = subprocess.Popen([sys.executable, str(script), str(place)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_writers_of_one_folder_are_refused(holder, tiny_blueprint, tiny_runs, tmp_path):
    process = holder(tmp_path / "zoo")
    with pytest.raises(ZooError, match=r"another process writes .*zoo: wait for it, or choose another folder"):
        pack(tiny_blueprint, tiny_runs, tmp_path / "zoo", progress=False)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ZooError, match="another process writes"):
        pack(tiny_blueprint, tiny_runs, tmp_path / "link" / "zoo", progress=False)
    # the writer was not disturbed; once it is dead, what it left is removed
    assert (beside(tmp_path / "zoo", "writing") / "half").is_file()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(Zoo(pack(tiny_blueprint, tiny_runs, tmp_path / "zoo", progress=False))) == 18
    assert not beside(tmp_path / "zoo", "writing").exists()


@pytest.mark.parametrize("other", ["zoo-big", "zoo-old-zoo", "zoo.writing", "zoo-"])
def test_writing_leaves_writers_of_other_folders_alone(other, holder, tiny_blueprint, tiny_runs, tmp_path):
    process = holder(tmp_path / other)
    pack(tiny_blueprint, tiny_runs, tmp_path / "zoo", progress=False)
    pack(tiny_blueprint, tiny_runs, tmp_path / "zoo", progress=False)
    assert (beside(tmp_path / other, "writing") / "half").read_text() == "half a file"
    assert process.poll() is None


def test_tables_are_not_written_into_a_zoo_that_is_replaced(holder, zoo_copy):
    report = evaluate(Zoo(zoo_copy), progress=False)
    holder(zoo_copy)
    with pytest.raises(ZooError, match="another process writes"):
        report.write(zoo_copy)


def test_a_zoo_is_not_replaced_while_tables_are_written(zoo_copy, tiny_blueprint, tiny_runs, monkeypatch):
    def pack_meanwhile(*arguments):
        with pytest.raises(ZooError, match="another process writes"), held(zoo_copy):
            pass

    report = evaluate(Zoo(zoo_copy), progress=False)
    monkeypatch.setattr(zoo_folder, "_write_unchanged", pack_meanwhile)
    report.write(zoo_copy)
    assert len(Zoo(zoo_copy).to_pandas("evaluations")) == len(report.evaluations)
    assert [path.name for path in zoo_copy.iterdir() if path.name.startswith(".")] == []


def test_tables_that_come_between_the_renames_of_a_zoo_make_no_folder(
    zoo_copy, tiny_blueprint, tiny_runs, monkeypatch
):
    """The folder is missing there: a folder for a lock would keep the new zoo out, and the old one would be lost."""
    ids, refusals = Zoo(zoo_copy).model_ids, []
    features = schema.evaluation_features(Zoo(zoo_copy).manifest["factors"])
    original = Path.replace

    def replace(self, target):
        if self == beside(zoo_copy, "writing"):
            with pytest.raises(ZooError) as refusal:
                write_config(zoo_copy, "evaluations", {"train": []}, features)
            refusals.append(str(refusal.value))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    # a writer that had looked at the zoo before it was moved away
    monkeypatch.setattr(zoo_folder, "open_files", lambda *arguments: None)
    pack(tiny_blueprint, tiny_runs, zoo_copy, progress=False)
    assert len(refusals) == 1
    assert "another process writes" in refusals[0]
    assert Zoo(zoo_copy).model_ids == ids
    assert not beside(zoo_copy, "replaced").exists()


def test_tables_are_written_into_a_zoo_whose_place_cannot_be_locked(zoo_copy, monkeypatch):
    report, access = evaluate(Zoo(zoo_copy), progress=False), os.access
    # as on a mount: root, who may run these tests, could write everywhere else
    monkeypatch.setattr(os, "access", lambda path, mode: path != zoo_copy.parent and access(path, mode))
    report.write(zoo_copy)
    assert not beside(zoo_copy, "lock").exists()
    with exclusive(zoo_copy), pytest.raises(ZooError, match="another process is working in"):
        report.write(zoo_copy)


def replace_and_die(fresh, place):
    """What `swap` does, killed between its renames."""
    original = Path.replace

    def replace(self, target):
        if self == fresh:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, target)

    Path.replace = replace
    swap(fresh, place)


@pytest.mark.parametrize("made_since", [False, True])
def test_a_zoo_that_was_moved_away_comes_back(made_since, zoo_copy):
    ids = Zoo(zoo_copy).model_ids
    fresh = zoo_copy.with_name("fresh")
    fresh.mkdir()
    child = multiprocessing.get_context("fork").Process(target=replace_and_die, args=(fresh, zoo_copy))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not zoo_copy.exists()
    if made_since:
        zoo_copy.mkdir()
    with held(zoo_copy):
        assert Zoo(zoo_copy).model_ids == ids
    assert not beside(zoo_copy, "replaced").exists()


def test_a_folder_that_could_not_be_written_is_not_left_behind(tmp_path):
    with held(tmp_path / "zoo"), fresh_folder(tmp_path / "zoo") as fresh:
        (fresh / "half").write_text("half")
    assert [path.name for path in tmp_path.iterdir()] == [".zoo.lock"]


@pytest.mark.parametrize(
    ("count", "gigabytes", "files"), [(8, 0.5, 2), (800, 0.5, 160), (12_900, 7.6, 150), (100_000, 10, 882)]
)
def test_files_grow_with_the_zoo(count, gigabytes, files):
    storage = Storage("float32", 22_050_664, count)
    assert storage.shard_rows * storage.row_bytes / 1e9 == pytest.approx(gigabytes, rel=0.15)
    assert -(-count // storage.shard_rows) == pytest.approx(files, rel=0.02)
