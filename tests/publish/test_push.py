"""Publishing a zoo by the real client to a Hub on this machine, also one that fails in the middle."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from local_hub import STRANGER, LocalHub
from run_folders import wait_for

from vitzoo_hf.format.gate.card import with_root_hash
from vitzoo_hf.format.manifest import open_zoo
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish.push import push

NAME = "ModelZoos/vit-zoo"
SHARD = "weights/train-00000-of-00001.parquet"

START = """
import dataclasses, json, sys, time
import vitzoo_hf.publish.push
from vitzoo_hf.publish.push import push
from vitzoo_hf.format.manifest import open_zoo
from vitzoo_hf.format.schema import ZooError
waits = []
time.sleep = waits.append
def go(folder, name="ModelZoos/vit-zoo", **options):
    try:
        return dataclasses.asdict(push(folder, name, progress=False, **options))
    except ZooError as error:
        return str(error)
"""


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        yield hub


def publish(hub, folder, home, *, token="hf_owner", code="", **options):
    """One push in a process of its own: what it returned, or the error's line."""
    told = f"{START}{code}\nprint(json.dumps(go({str(folder)!r}, **{options!r})))"
    return hub.run(told, home, token=token)


def edit(folder, path, content):
    """Change a file as `vitzoo evaluate` or `vitzoo pack` does: where it is listed, the new one is."""
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if path.startswith("weights/"):
        shards = json.loads((folder / "shards.json").read_text())
        # without rows and row groups, which such short files cannot have
        edit(folder, "shards.json", json.dumps(shards | {path: entry}).encode())
        return
    manifest = json.loads((folder / "zoo.json").read_text())
    manifest["files"][path] = entry
    write_manifest(folder, manifest)


def write_manifest(folder, manifest):
    """With its hash in the card's header."""
    text = json.dumps(manifest)
    (folder / "zoo.json").write_text(text)
    card = folder / "README.md"
    card.write_text(with_root_hash(card.read_text(), hashlib.sha256(text.encode()).hexdigest()))


def in_folder(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_pushed_is_the_folder_and_only_changes_go_again(hub, zoo_copy, tmp_path):
    home = tmp_path / "home"
    (zoo_copy / ".tmp-abc").write_bytes(b"half a file")
    (zoo_copy / "weights" / ".hidden.parquet").write_bytes(b"half a file")
    (zoo_copy / "notes.txt").write_bytes(b"mine")
    dry = publish(hub, zoo_copy, home, dry_run=True, tag="v1")
    assert hub.repositories == {}
    assert not [request for request in hub.requests if request.method not in ("GET", "HEAD")]

    first = publish(hub, zoo_copy, home, tag="v1", message="The first")
    there = {path: content for path, content in in_folder(zoo_copy).items() if "/." not in f"/{path}"}
    assert there.pop("notes.txt") == b"mine"
    there["README.md"] = with_id(there["README.md"])
    held = hub.files(NAME)
    attributes = held.pop(".gitattributes")
    assert held == there
    repository = hub.repositories[NAME]
    assert [commit.title for commit in repository.commits.values()] == ["initial commit", "The first"]
    assert repository.tags == {"format-1": first["commit"], "v1": first["commit"]}
    assert first["commit"] == repository.branches["main"]
    assert first["url"] == f"{hub.endpoint}/datasets/{NAME}"
    assert dict(first["uploaded"]) == {path: len(content) for path, content in there.items()}
    assert (first["unchanged"], first["deleted"], first["left_out"]) == (0, [], ["notes.txt"])
    assert first["tags"] == ["format-1", "v1"]
    assert dry == first | {"commit": None}
    assert not repository.private

    before = len(hub.requests)
    again = publish(hub, zoo_copy, home)
    assert again == first | {"uploaded": [], "unchanged": len(there), "tags": ["format-1"]}
    assert {request.method for request in hub.requests[before:]} == {"GET"}

    edit(zoo_copy, "evaluations/train-00000-of-00001.parquet", b"PAR1 other numbers")
    hub.put(NAME, "figures/mine.png", b"a user's own")
    before = len(hub.requests)
    second = publish(hub, zoo_copy, home)
    names = [path for path, _ in second["uploaded"]]
    assert names == ["evaluations/train-00000-of-00001.parquet", "zoo.json", "README.md"]
    assert second["unchanged"] == len(there) - 3
    assert sum(request.method == "PUT" for request in hub.requests[before:]) == 1
    assert hub.files(NAME) == in_published(zoo_copy) | {
        ".gitattributes": attributes,
        "figures/mine.png": b"a user's own",
    }
    assert hub.files(NAME, "v1") == there | {".gitattributes": attributes}
    assert repository.tags == {"format-1": second["commit"], "v1": first["commit"]}


def with_id(card):
    return card.replace(b"ORG/tiny", NAME.encode())


def in_published(folder):
    held = {path: content for path, content in in_folder(folder).items() if "/." not in f"/{path}"}
    held["README.md"] = with_id(held["README.md"])
    return {path: content for path, content in held.items() if path != "notes.txt"}


def test_what_a_former_zoo_left_is_deleted_and_the_users_files_are_not(hub, zoo_copy, tmp_path):
    publish(hub, zoo_copy, tmp_path / "home")
    hub.put(NAME, "weights/train-00001-of-00002.parquet", b"of an interrupted push")
    for path in ("weights/notes.md", "extra/a.parquet", "LICENSE"):
        hub.put(NAME, path, b"mine")
    shutil.rmtree(zoo_copy / "pairs")
    (zoo_copy / "blueprint.yaml").unlink()
    manifest = json.loads((zoo_copy / "zoo.json").read_text())
    gone = ["pairs/full-00000-of-00001.parquet", "blueprint.yaml"]
    for path in gone:
        del manifest["files"][path]
    write_manifest(zoo_copy, manifest)
    dry, done = (publish(hub, zoo_copy, tmp_path / "home", dry_run=dry) for dry in (True, False))
    assert done["deleted"] == dry["deleted"] == sorted([*gone, "weights/train-00001-of-00002.parquet"])
    held = hub.files(NAME)
    assert held.keys() - in_folder(zoo_copy).keys() == {
        ".gitattributes",
        "weights/notes.md",
        "extra/a.parquet",
        "LICENSE",
    }


def test_a_cut_upload_is_made_good_and_an_interrupted_push_continues(hub, zoo_copy, tmp_path):
    hub.inject("cut upload", "PUT /lfs/", times=2, value=5000)
    hub.inject("fail", "POST .*/(create|preupload|batch|tag)", times=4, value=500)
    hub.inject("fail", "POST .*/commit/main", value=503)
    hub.inject("fail", "GET /api/datasets/.*(refs|tree)", times=2, value=502)
    done = publish(hub, zoo_copy, tmp_path / "home")
    assert hub.repositories[NAME].tags == {"format-1": done["commit"]}
    assert len(hub.repositories[NAME].commits) == 2

    content = os.urandom(50_000)
    edit(zoo_copy, "weights/train-00000-of-00002.parquet", content)
    edit(zoo_copy, "weights/train-00001-of-00002.parquet", content[::-1])
    failing = hashlib.sha256(content).hexdigest()
    hub.inject("cut upload", f"PUT /lfs/{failing}", times=99, value=20_000)
    failed = publish(hub, zoo_copy, tmp_path / "home")
    assert failed.startswith(f"cannot push to {NAME!r}: no connection to {hub.endpoint} (")
    assert hub.repositories[NAME].branches["main"] == done["commit"]
    hub.faults.clear()
    before = len(hub.requests)
    again = publish(hub, zoo_copy, tmp_path / "home")
    sent = [request.path for request in hub.requests[before:] if request.method == "PUT"]
    assert sent == [f"/lfs/{failing}"]
    assert hub.files(NAME)["weights/train-00000-of-00002.parquet"] == content
    assert len(hub.repositories[NAME].commits) == 3
    assert again["commit"] == hub.repositories[NAME].tags["format-1"]


def test_a_lost_answer_makes_no_second_commit_and_somebody_elses_is_not_overwritten(hub, zoo_copy, tmp_path):
    hub.inject("lose the answer", "POST .*/commit/main")
    done = publish(hub, zoo_copy, tmp_path / "home")
    assert [commit.title for commit in hub.repositories[NAME].commits.values()] == [
        "initial commit",
        "Publish the zoo tiny",
    ]
    assert done["commit"] == hub.repositories[NAME].branches["main"] == hub.repositories[NAME].tags["format-1"]
    edit(zoo_copy, "weights/test-00000-of-00001.parquet", b"PAR1")
    code = """
import huggingface_hub
original = huggingface_hub.HfApi.preupload_lfs_files
def first_somebody_else(self, *arguments, **given):
    other = huggingface_hub.HfApi()
    if not getattr(self, "done", False):
        self.done = True
        options = {"repo_id": "ModelZoos/vit-zoo", "repo_type": "dataset"}
        other.upload_file(path_or_fileobj=b"mine", path_in_repo="mine.txt", **options)
    return original(self, *arguments, **given)
huggingface_hub.HfApi.preupload_lfs_files = first_somebody_else
huggingface_hub.hf_api.HfApi.preupload_lfs_files = first_somebody_else
"""
    code = code.replace("other = huggingface_hub.HfApi()", "other = huggingface_hub.HfApi(); other.done = True")
    refused = publish(hub, zoo_copy, tmp_path / "home", code=code)
    assert refused == f"somebody else has just pushed to {NAME}: look what, and push again"
    assert hub.files(NAME)["mine.txt"] == b"mine"
    assert isinstance(publish(hub, zoo_copy, tmp_path / "home"), dict)
    assert hub.files(NAME)["mine.txt"] == b"mine"


def test_many_changes_take_several_commits_with_card_and_manifest_last(hub, zoo_copy, tmp_path):
    code = "vitzoo_hf.publish.push.COMMIT_OPERATIONS, vitzoo_hf.publish.push.UPLOAD_FILES = 5, 2"
    done = publish(hub, zoo_copy, tmp_path / "home", code=code)
    commits = list(hub.repositories[NAME].commits.values())
    count = -(-(len(done["uploaded"]) - 2) // 3)
    assert [commit.title for commit in commits[1:]] == [
        f"Publish the zoo tiny ({number} of {count})" for number in range(1, count + 1)
    ]
    shards = {path for path in in_folder(zoo_copy) if path.startswith("weights/")}
    assert shards <= commits[-(-len(shards) // 3)].files.keys()
    assert not [commit for commit in commits[:-1] if commit.files.keys() & {"zoo.json", "README.md"}]
    assert hub.files(NAME).keys() - {".gitattributes"} == in_folder(zoo_copy).keys()


def test_shards_are_listed_in_a_file_of_their_own_or_in_the_manifest(zoo_copy):
    manifest, shards = (json.loads((zoo_copy / name).read_text()) for name in ("zoo.json", "shards.json"))
    listed = open_zoo(zoo_copy).listed
    assert listed[SHARD] == shards[SHARD]
    assert listed.keys() - shards.keys() == manifest["files"].keys() >= {"shards.json"}
    del manifest["files"]["shards.json"]
    manifest["files"] |= {path: listed[path] for path in shards}
    write_manifest(zoo_copy, manifest)
    (zoo_copy / "shards.json").unlink()
    assert open_zoo(zoo_copy).listed == {path: entry for path, entry in listed.items() if path != "shards.json"}
    (zoo_copy / SHARD).write_bytes(b"short")
    with pytest.raises(ZooError, match=r"train-00000-of-00001.parquet has 5 bytes, not \d+: it was cut"):
        push(zoo_copy, NAME)


def test_a_private_zoo_and_who_may_push(hub, zoo_copy, tmp_path):
    login = "run `hf auth login`, or set HF_TOKEN"
    assert publish(hub, zoo_copy, tmp_path / "home", token=None) == f"not logged in to the Hub: {login}"
    told = publish(hub, zoo_copy, tmp_path / "home", token="hf_wrong")
    assert told == f"cannot push to {NAME!r}: the Hub refuses your token, or you have none: {login}"
    told = publish(hub, zoo_copy, tmp_path / "home", token=STRANGER)
    assert told.startswith(f"cannot push to {NAME!r}: your token does not allow it: {login} with one that does")
    assert hub.repositories == {}
    done = publish(hub, zoo_copy, tmp_path / "home", private=True)
    assert hub.repositories[NAME].private
    assert publish(hub, zoo_copy, tmp_path / "home", private=True)["commit"] == done["commit"]
    hub.repositories[NAME].private = False
    edit(zoo_copy, SHARD, b"secret")
    told = publish(hub, zoo_copy, tmp_path / "home", private=True)
    assert told == f"{NAME} is public already, nothing was uploaded: make it private in its settings first"
    told = publish(hub, zoo_copy, tmp_path / "home", token=STRANGER)
    assert "your token does not allow it" in told
    assert hub.repositories[NAME].branches["main"] == done["commit"]


def test_tags_do_not_move(hub, zoo_copy, tmp_path):
    done = publish(hub, zoo_copy, tmp_path / "home", tag="v1")
    assert publish(hub, zoo_copy, tmp_path / "home", tag="v1")["commit"] == done["commit"]
    edit(zoo_copy, SHARD, b"another")
    before = len(hub.requests)
    for dry_run in (True, False):
        told = publish(hub, zoo_copy, tmp_path / "home", tag="v1", dry_run=dry_run)
        assert told == f"{NAME} has a tag 'v1' on another version: tags do not move, choose a new one"
    assert {request.method for request in hub.requests[before:]} == {"GET"}
    for tag in ("a b", "main", "format-1", "..", "-x", "a..b"):
        with pytest.raises(ZooError, match=f"'{tag}' cannot be a tag"):
            push(zoo_copy, NAME, tag=tag)


def test_a_tag_that_an_interrupted_push_left_behind_is_set_by_the_next(hub, zoo_copy, tmp_path):
    hub.inject("fail", "POST .*/tag/", times=99, value=500)
    told = publish(hub, zoo_copy, tmp_path / "home", tag="v1")
    # by httpx, or by requests
    assert re.search("500 (Internal Server Error|Server Error: Internal Server Error)", told)
    hub.faults.clear()
    done = publish(hub, zoo_copy, tmp_path / "home", tag="v1")
    assert (done["uploaded"], len(hub.repositories[NAME].commits)) == ([], 2)
    assert hub.repositories[NAME].tags == {"format-1": done["commit"], "v1": done["commit"]}


def test_what_is_no_zoo_is_not_pushed_nor_pushed_over(hub, zoo_copy, tmp_path):
    hub.create("ModelZoos/other")
    hub.put("ModelZoos/other", "data/rows.csv", b"1,2")
    hub.create("ModelZoos/script")
    hub.put("ModelZoos/script", "script.py", b"")
    hub.create("ModelZoos/ignoring")
    hub.put("ModelZoos/ignoring", "zoo.json", b"{}")
    hub.put("ModelZoos/ignoring", ".gitignore", b"*.yaml")
    code = f"""
print(json.dumps([go({str(zoo_copy)!r}, "ModelZoos/" + name) for name in ("other", "script", "ignoring")]))
"""
    other, script, ignoring = hub.run(START + code, tmp_path / "home")
    assert other == "ModelZoos/other holds data/rows.csv and is no zoo: choose another name, or empty it yourself"
    assert script.startswith("ModelZoos/script holds script.py, which keeps everybody from loading it")
    assert "ModelZoos/ignoring does not hold what was pushed: blueprint.yaml differs" in ignoring
    assert hub.files("ModelZoos/other").keys() == {".gitattributes", "data/rows.csv"}


def test_a_damaged_folder_is_refused_before_anything_is_sent(zoo_copy, hub, tmp_path):
    with pytest.raises(ZooError, match=r"is not a zoo: it has no zoo\.json"):
        push(tmp_path, NAME)
    for name in ("vit-zoo", "a/b/c", "datasets/x/", "a--b/c", "../x", "ORG/-x"):
        with pytest.raises(ZooError, match="is no dataset id: expected ORG/NAME"):
            push(zoo_copy, name)
    (zoo_copy / "vit-zoo.py").touch()
    with pytest.raises(ZooError, match=r"vit-zoo.py in .* is named like the dataset"):
        push(zoo_copy, NAME)
    (zoo_copy / "vit-zoo.py").unlink()
    good = (zoo_copy / SHARD).read_bytes()
    (zoo_copy / SHARD).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    told = publish(hub, zoo_copy, tmp_path / "home")
    assert f"{zoo_copy / SHARD} does not match its hash: it is damaged; pack the zoo again" in told
    assert hub.files(NAME).keys() == {".gitattributes"}
    for content, expected in ((good[:-1], r"bytes, not \d+: it was cut"), (None, "is missing")):
        (zoo_copy / SHARD).unlink()
        if content is not None:
            (zoo_copy / SHARD).write_bytes(content)
        with pytest.raises(ZooError, match=rf"{SHARD} (of .* {expected}|has \d+ {expected})"):
            push(zoo_copy, NAME)
    (zoo_copy / SHARD).write_bytes(good)
    card = (zoo_copy / "README.md").read_text()
    for text in (card.replace("configs:", "config:"), card.split("---", 2)[2], "---\n- :\n  x: [\n---\n"):
        (zoo_copy / "README.md").write_text(text)
        with pytest.raises(ZooError, match=r"README.md must begin with a YAML header that has `configs`"):
            push(zoo_copy, NAME)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", ".git/config", "a//b", "weights/.x", "a\\b", ""])
def test_a_manifest_that_names_what_is_no_file_of_a_zoo_is_refused(zoo_copy, path):
    manifest = json.loads((zoo_copy / "zoo.json").read_text())
    manifest["files"][path] = {"bytes": 1, "sha256": "0"}
    write_manifest(zoo_copy, manifest)
    with pytest.raises(ZooError, match="which is no file of a zoo"):
        push(zoo_copy, NAME)


def test_an_edited_card_is_pushed_too(hub, zoo_copy, tmp_path):
    publish(hub, zoo_copy, tmp_path / "home")
    card = (zoo_copy / "README.md").read_text() + "\nA word on these models.\n"
    (zoo_copy / "README.md").write_text(card)
    sent = card.replace("ORG/tiny", NAME).encode()
    assert publish(hub, zoo_copy, tmp_path / "home")["uploaded"] == [["README.md", len(sent)]]
    assert hub.files(NAME)["README.md"] == sent


def test_ctrl_c_leaves_the_dataset_as_it_was(hub, zoo_copy, tmp_path):
    hub.inject("fail", "PUT /lfs/", times=10_000, value=503, Retry_After="1")
    code = f"from vitzoo_hf.publish.push import push; push({str(zoo_copy)!r}, {NAME!r}, progress=False)"
    client = subprocess.Popen(
        [sys.executable, "-c", code], env=hub.environment(tmp_path / "home"), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: hub.asked("PUT /lfs/"))
    client.send_signal(signal.SIGINT)
    hub.faults.clear()
    _, said = client.communicate(timeout=180)
    assert client.returncode != 0
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert [commit.title for commit in hub.repositories[NAME].commits.values()] == ["initial commit"]
    assert publish(hub, zoo_copy, tmp_path / "home")["commit"] == hub.repositories[NAME].branches["main"]


def test_the_card_names_the_dataset_it_is_in(hub, zoo_copy, tmp_path):
    before = (zoo_copy / "README.md").read_text()
    assert 'load_dataset("ORG/tiny"' in before
    publish(hub, zoo_copy, tmp_path / "home")
    card = hub.files(NAME)["README.md"].decode()
    assert card == before.replace("ORG/tiny", NAME)
    assert (zoo_copy / "README.md").read_text() == before
