"""Folders shared by processes of tests: built once, whole or not at all, and watched for changes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shared_folders
from shared_folders import PREFIX, UNUSED_SECONDS, SharedFolders, root_of

CODE = """
import sys, time
from pathlib import Path
from shared_folders import SharedFolders

def build(folder):
    (folder / "first").write_text("1")
    (Path({root!r}) / "builds").open("a").write("x")
    time.sleep(float(sys.argv[1]))
    (folder / "second").write_text("2")

print(SharedFolders(Path({root!r})).get("some", build))
"""


def build(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("content")


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    script = folder / "builder.py"
    script.write_text(CODE.format(root=str(folder / "root")))
    environment = os.environ | {"PYTHONPATH": f"{shared_folders.TESTS}:{shared_folders.TESTS.parent}"}
    return subprocess.Popen(
        [sys.executable, script, str(seconds)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_two_processes_build_once_and_a_killed_one_leaves_nothing(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    killed = start(tmp_path, 600)
    while not list(root.glob("*/partial-*/first")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    both = [start(tmp_path, 0.5) for _ in range(2)]
    first, second = (Path(process.communicate(timeout=120)[0].strip()) for process in both)
    assert first == second
    assert (first / "second").read_text() == "2"
    assert (root / "builds").read_text() == "xx"
    assert not list(root.glob("*/partial-*"))


def test_a_changed_file_fails_the_session_and_the_next_builds_again(tmp_path):
    folders = SharedFolders(tmp_path)
    whole = folders.get("some", build)
    folders.check_all()
    (whole / "sub" / "file").write_text("contents")
    for check in (folders.check_all, lambda: SharedFolders(tmp_path).get("some", build)):
        with pytest.raises(pytest.fail.Exception, match="a test changed the shared folder"):
            check()
        assert not whole.exists()
        assert SharedFolders(tmp_path).get("some", build) == whole
        (whole / "other").touch()


def test_other_code_has_another_folder_and_late_edits_share_nothing(tmp_path, monkeypatch):
    first = SharedFolders(tmp_path).get("some", build)
    code = shared_folders.TESTS.parent / "vitzoo_hf" / "world.py"
    edited = shared_folders.AT_START | {code: b"edited"}
    monkeypatch.setattr(shared_folders, "AT_START", edited)
    with pytest.raises(pytest.fail.Exception, match="the code changed since this session began"):
        SharedFolders(tmp_path).get("some", build)
    monkeypatch.setattr(shared_folders, "hashes_of_files", lambda: edited)
    assert SharedFolders(tmp_path).get("some", build).parent != first.parent


def test_folders_out_of_use_are_removed(tmp_path):
    stale, fresh = (tmp_path / f"{PREFIX}{name}-0" for name in ("stale", "fresh"))
    for folder, age in ((stale, UNUSED_SECONDS + 60), (fresh, UNUSED_SECONDS - 600)):
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    SharedFolders(tmp_path).get("some", build)
    assert (stale.exists(), fresh.exists()) == (False, True)


@pytest.mark.parametrize(
    ("basetemp", "in_worker", "root"),
    [
        ("/tmp/pytest-of-me/pytest-3", False, "/tmp/pytest-of-me"),
        ("/tmp/pytest-of-me/pytest-3/popen-gw0", True, "/tmp/pytest-of-me"),
        ("/home/me/given", False, "/home/me/given"),
        ("/home/me/given/popen-gw0", True, "/home/me/given"),
    ],
)
def test_folders_lie_where_pytest_may_write(basetemp, in_worker, root):
    assert root_of(Path(basetemp), in_worker) == Path(root)
