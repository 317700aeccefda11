"""Reading the files of a zoo: from a folder, and by the real client from a Hub on this machine, which misbehaves."""

import json
import re

import pytest
from local_hub import STRANGER, LocalHub

from vitzoo_hf.format.files import FolderFiles
from vitzoo_hf.format.schema import ZooError

SHARD = "weights/train-00000-of-00001.parquet"
CONTENT = bytes(range(256)) * 4000
NAME = "ModelZoos/vit-zoo"

START = f"""
import json, pickle, threading, time
from vitzoo_hf.format.files import HubFiles
from vitzoo_hf.format.schema import ZooError
waits = []
time.sleep = waits.append
content = bytes(range(256)) * 4000
shard = {SHARD!r}
def files(revision=None, name={NAME!r}):
    return HubFiles(name, revision)
def read(files, start, length, name=shard):
    out = bytearray(length)
    files.read_into(name, start, memoryview(out))
    return bytes(out)
def error(call, *arguments):
    try:
        call(*arguments)
    except ZooError as raised:
        return str(raised)
"""


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        publish(hub)
        yield hub


def publish(hub, content=CONTENT, **manifest):
    repository = hub.repositories.get(NAME) or hub.create(NAME)
    files = {SHARD: hub.store(content, is_lfs=True), "zoo.json": hub.store(json.dumps(manifest).encode())}
    return repository.commit("main", "a zoo", files).sha


def test_a_folder(tmp_path):
    (tmp_path / "light").mkdir()
    (tmp_path / "light" / "a.bin").write_bytes(CONTENT)
    files = FolderFiles(tmp_path)
    assert (files.name, files.is_remote) == (str(tmp_path), False)
    assert files.path("light/a.bin") == files.local("light/a.bin") == tmp_path / "light" / "a.bin"
    assert files.exists("light/a.bin")
    assert not files.exists("light/b.bin")
    assert files.local("light") is None
    out = bytearray(b"-" * 20)
    files.read_into("light/a.bin", 250, memoryview(out)[5:15])
    assert out == b"-----" + CONTENT[250:260] + b"-----"
    with pytest.raises(ZooError, match=r"a.bin of .* has fewer than 1024001 bytes: it was cut"):
        files.read_into("light/a.bin", len(CONTENT) - 19, memoryview(out))
    for read in (files.path, lambda name: files.read_into(name, 0, memoryview(out))):
        with pytest.raises(ZooError, match=r"light/b.bin of .* is missing; pack the zoo again"):
            read("light/b.bin")


def test_a_range_is_one_request_for_exactly_its_bytes(hub, tmp_path):
    code = """
f = files()
f.path("zoo.json")
got = [read(f, start, length) == content[start:start + length] for start, length in ((0, 7), (1000, 500_000))]
got.append(read(f, len(content) - 3, 3) == content[-3:])
read(f, 5, 0)
print(json.dumps([got, str(f.local(shard)), f.exists(shard), f.exists("none"), f.is_remote, f.name]))
"""
    got = hub.run(START + code, tmp_path / "home")
    assert got == [[True] * 3, "None", True, False, True, NAME]
    asked = hub.asked(f"GET .*{SHARD}")
    assert [request.headers["range"] for request in asked] == [
        "bytes=0-6",
        "bytes=1000-500999",
        "bytes=1023997-1023999",
    ]
    assert sum(request.sent for request in asked) == 500_010


def test_a_cached_file_is_read_without_the_network(hub, tmp_path):
    code = """
f = files()
f.path(shard)
assert f.local(shard) == f.path(shard) and f.exists(shard)
print(json.dumps(read(f, 1000, 50) == content[1000:1050]))
"""
    assert hub.run(START + code, tmp_path / "home") is True
    before = len(hub.requests)
    assert hub.run(START + code, tmp_path / "home", HF_HUB_OFFLINE="1") is True
    assert len(hub.requests) == before


def test_offline_what_is_not_in_the_cache_is_one_line(hub, tmp_path):
    hub.run(START + "print(json.dumps(str(files().path('zoo.json'))))", tmp_path / "home")
    code = """
f = files()
f.path("zoo.json")
print(json.dumps([error(read, f, 0, 5), error(f.path, shard), f.exists(shard), error(files("v2").path, "zoo.json")]))
"""
    told = hub.run(START + code, tmp_path / "home", HF_HUB_OFFLINE="1")
    unset = "it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset it, or download the zoo before"
    assert told == [
        f"cannot get {SHARD} of {NAME!r}: {unset}",
        f"cannot get {SHARD} of {NAME!r}: {unset}",
        False,
        f"cannot get zoo.json of {NAME!r}: {unset}",
    ]


def test_one_commit_is_read_also_when_another_is_pushed_and_in_other_processes(hub, tmp_path):
    first = publish(hub, generation=1)
    hub.repositories[NAME].tags["v1"] = first
    code = """
f = files()
generation = json.loads(f.path("zoo.json").read_text())["generation"]
kept = pickle.dumps(f)
print(json.dumps([generation, f.commit, list(kept)]))
"""
    generation, commit, kept = hub.run(START + code, tmp_path / "home")
    assert (generation, commit) == (1, first)
    publish(hub, CONTENT[::-1], generation=2)
    code = f"""
old, new, tagged = pickle.loads(bytes({kept})), files(), files("v1")
generations = [json.loads(f.path("zoo.json").read_text())["generation"] for f in (old, new)]
print(json.dumps([old.commit == {first!r}, read(old, 3, 50) == content[3:53], read(tagged, 3, 50) == content[3:53],
    read(new, 3, 50) == content[::-1][3:53], pickle.loads(pickle.dumps(files())).commit == new.commit, generations]))
"""
    assert hub.run(START + code, tmp_path / "other") == [True] * 5 + [[1, 2]]


def test_a_cut_connection_is_taken_up_where_it_broke(hub, tmp_path):
    hub.inject("cut", f"GET .*{SHARD}", times=3, value=100_000)
    code = "f = files(); print(json.dumps([read(f, 1000, 500_000) == content[1000:501_000], waits]))"
    assert hub.run(START + code, tmp_path / "home") == [True, [0.5, 0.5, 0.5]]
    asked = hub.asked(f"GET .*{SHARD}")
    assert [request.headers["range"] for request in asked] == [
        f"bytes={start}-500999" for start in (1000, 101_000, 201_000, 301_000)
    ]
    assert sum(request.sent for request in asked) == 500_000


def test_a_failing_server_is_asked_again_and_a_broken_one_not_for_ever(hub, tmp_path):
    for status in (500, 502, 503, 504):
        hub.inject("fail", f"GET .*{SHARD}", value=status)
    hub.inject("fail", f"GET .*{SHARD}", value=429, Retry_After="30")
    code = """
f = files()
good = read(f, 10, 10) == content[10:20]
paused, waits[:] = list(waits), []
broken = files()
broken.attempts = 3
print(json.dumps([good, paused, error(read, broken, 10, 10, "bad.bin"), waits]))
"""
    hub.put(NAME, "bad.bin", CONTENT)
    hub.inject("fail", "GET .*bad.bin", times=99, value=503)
    good, paused, told, waits = hub.run(START + code, tmp_path / "home")
    assert (good, paused, waits) == (True, [0.5, 1.0, 2.0, 4.0, 30.0], [0.5, 1.0])
    # by httpx, or by requests
    said = "(Server error '503 Service Unavailable'|503 Server Error: Service Unavailable)"
    assert re.match(f"cannot get bad.bin of {NAME!r}: {said}", told)
    assert len(hub.asked("GET .*bad.bin")) == 3


def test_downloading_a_file_survives_a_server_error(hub, tmp_path):
    hub.inject("fail", f"GET .*{SHARD}", value=500)
    hub.inject("cut", f"GET .*{SHARD}", value=1000)
    code = "print(json.dumps(files().path(shard).read_bytes() == content))"
    assert hub.run(START + code, tmp_path / "home") is True


def test_wrong_answers_are_refused(hub, tmp_path):
    hub.put(NAME, "large.bin", bytes(40_000_000))
    hub.inject("ignore range", "GET .*large.bin")
    code = """
f = files()
print(json.dumps([error(read, f, 10, 10, "large.bin"), error(read, f, len(content) - 5, 10),
    error(read, f, len(content), 1), waits]))
"""
    whole, short, after, waits = hub.run(START + code, tmp_path / "home")
    assert "127.0.0.1 sends whole files only" in whole
    assert "is not what the zoo says: bytes 1023995 to 1024004 were asked for, 1023995-1023999/1024000 came" in short
    assert "the file ends before what was asked for" in after
    assert waits == []
    assert hub.asked("GET .*large.bin")[0].sent < 20_000_000  # what the connection itself holds


def test_a_redirect_to_another_host_is_followed_without_the_token_and_until_it_expires(tmp_path):
    with LocalHub(tmp_path / "hub", cdn=True) as hub:
        publish(hub)
        hub.repositories[NAME].private = True
        code = (
            "f = files(); print(json.dumps([read(f, start, 50) == content[start:start+50] for start in (0, 99, 7)]))"
        )
        assert hub.run(START + code, tmp_path / "home") == [True] * 3
        assert len(hub.asked("/resolve/.*parquet")) == 1
        assert len(hub.asked("/cdn/")) == 3
        assert all("authorization" in request.headers for request in hub.asked("/resolve/"))
        assert not any("authorization" in request.headers for request in hub.asked("/cdn/"))
        code = f"""
import urllib.request
f = files()
first = read(f, 0, 50) == content[:50]
urllib.request.urlopen({hub.endpoint!r} + "/expire").read()
print(json.dumps([first, read(f, 9, 50) == content[9:59]]))
"""
        with pytest.MonkeyPatch.context() as patch:
            import local_hub_requests

            def expire(handler):
                handler.hub.link_key += 1
                return {}

            patch.setattr(local_hub_requests, "ROUTES", [*local_hub_requests.ROUTES, ("GET", "/expire", expire)])
            assert hub.run(START + code, tmp_path / "other") == [True, True]


def test_errors_are_one_line_that_says_what_to_do(hub, tmp_path):
    hub.create("ModelZoos/secret", private=True)
    hub.create("ModelZoos/gated").gated = True
    hub.put("ModelZoos/secret", "zoo.json", b"{}")
    hub.put("ModelZoos/gated", "zoo.json", b"{}")
    code = """
def told(name, file="zoo.json", revision=None):
    return error(files(revision, name).path, file)
print(json.dumps([told("ModelZoos/none"), told("ModelZoos/secret"), told("ModelZoos/gated"),
    error(read, files(), 0, 1, "no.bin"), told("ModelZoos/vit-zoo", revision="v9"),
    told("ModelZoos/vit-zoo", "no.bin")]))
"""
    none, secret, gated, no_range, revision, no_file = hub.run(START + code, tmp_path / "home", token=STRANGER)
    for name, line in (("none", none), ("secret", secret)):
        assert line.startswith(
            f"cannot get zoo.json of 'ModelZoos/{name}': no folder here, and no dataset on the Hub"
        )
        assert "`hf auth login`" in line
    assert f"ask at {hub.endpoint}/datasets/ModelZoos/gated" in gated
    assert no_range == f"cannot get no.bin of {NAME!r}: the dataset has no such file: it is no zoo, or not all of one"
    assert no_file == no_range
    assert revision == f"cannot get zoo.json of {NAME!r}: it has no branch, tag or commit 'v9': check `revision`"
    code = "print(json.dumps(error(files().path, 'zoo.json')))"
    assert "the Hub refuses your token" in hub.run(START + code, tmp_path / "wrong", token="hf_wrong")
    assert hub.run(START + code, tmp_path / "nobody", token=None) is None
    refused = hub.run(START + code, tmp_path / "new", HF_ENDPOINT="http://127.0.0.1:9")
    assert re.match(r"cannot get zoo.json of 'ModelZoos/vit-zoo': no connection to http://127.0.0.1:9 \(", refused)


def test_threads_share_the_files(hub, tmp_path):
    code = """
f, good = files(), []
def work(start):
    good.append(read(f, start, 1000) == content[start:start + 1000])
threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([good, len(f.commit)]))
"""
    assert hub.run(START + code, tmp_path / "home") == [[True] * 8, 40]
    assert len(hub.asked("GET .*/main/zoo.json")) == 1
