"""A zoo opened by its id from a Hub on this machine: what is fetched, and what happens when that goes wrong."""

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import paper_zoo
import pytest
import torch
from local_hub import LocalHub

from vitzoo_hf.format import schema
from vitzoo_hf.publish import folder as zoo_folder
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.zoo import Zoo

NAMES = ("ModelZoos/lists", "ModelZoos/bytes")

START = """
import hashlib, json, pickle, time, urllib.request
import vitzoo_hf as vz
from vitzoo_hf.format import weight_reader
time.sleep = lambda seconds: None
def digest(weights):
    return hashlib.sha256(weights.tobytes()).hexdigest()
def digests(zoo, **options):
    return {row["model_id"]: digest(row["weights"]) for row in zoo.rows(**options)}
def streamed(batches):
    pairs = ((batch["model_id"], batch["weights"].numpy()) for batch in batches)
    return {model_id: digest(row) for ids, rows in pairs for model_id, row in zip(ids, rows)}
def error(call):
    try:
        call()
    except vz.ZooError as raised:
        return str(raised)
"""
RANGES = "weight_reader.FETCHED_WHOLE_BYTES = 0\n"
WEIGHTS = "GET .*/weights/"


@pytest.fixture(scope="module")
def folders(tiny_blueprint, tiny_runs, tmp_path_factory):
    """The tiny zoo in several shards: float32 lists, and bfloat16 bytes."""
    made = {}
    for name, dtype, limit in zip(NAMES, ("float32", "bfloat16"), (schema.LIST_LIMIT, 100), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zoo_folder, "ROW_GROUP_BYTES", 40_000)
            patch.setattr(zoo_folder, "SHARD_BYTES", 90_000 if dtype == "float32" else 40_000)
            patch.setattr(schema, "LIST_LIMIT", limit)
            folder = tmp_path_factory.mktemp("zoos") / name.split("/")[1]
            made[name] = pack(tiny_blueprint, tiny_runs, folder, dtype=dtype, progress=False)
    return made


@pytest.fixture
def hub(folders, tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        for name, folder in folders.items():
            hub.publish(name, folder)
        yield hub


def client(hub, home, code, *, ranges=True, **environment):
    return hub.run(f"{START}{RANGES if ranges else ''}{code}", home, **environment)


def truth(folder, model_ids=None):
    """Hashes of the weights, read from the folder."""
    rows = {row["model_id"]: hashlib.sha256(row["weights"].tobytes()).hexdigest() for row in Zoo(folder).rows()}
    return rows if model_ids is None else {model_id: rows[model_id] for model_id in model_ids}


def stored_bytes(folder, model_ids):
    reader = Zoo(folder)._reader
    return sum(reader.row_bytes(reader.rows.model_ids.to_pylist().index(model_id)) for model_id in model_ids)


def damage(hub, folder, position):
    """Flip a bit of a row's weights on the server; doing it again mends them."""
    places = Zoo(folder)._reader.places
    shard = places.files[places.file[position]]
    blob = hub.folder / hashlib.sha256((folder / shard).read_bytes()).hexdigest()
    data = bytearray(blob.read_bytes())
    data[places.offset[position] + 1001] ^= 64
    blob.write_bytes(data)
    return shard


def moved(hub, pattern=WEIGHTS):
    return sum(request.sent for request in hub.asked(pattern))


@pytest.mark.parametrize("name", NAMES)
def test_opening_and_filtering_fetch_no_weights(hub, folders, tmp_path, name):
    code = f"""
zoo = vz.Zoo({name!r})
chosen = zoo.filter(head="mlp", epoch=2)
print(json.dumps([len(zoo), chosen.model_ids, chosen.to_pandas()["test_accuracy"].tolist(), repr(zoo)]))
"""
    length, ids, accuracies, shown = client(hub, tmp_path / "home", code)
    local = Zoo(folders[name]).filter(head="mlp", epoch=2)
    assert (length, ids, accuracies) == (18, local.model_ids, local.to_pandas()["test_accuracy"].tolist())
    assert shown.startswith(f"Zoo('{name}': 18 rows of 10 runs")
    assert hub.asked("/index/")
    assert not hub.asked("/weights/|shards.json|blueprint.yaml|/probes/|README")


@pytest.mark.parametrize("name", NAMES)
def test_small_shards_are_fetched_whole_once_and_then_need_no_hub(hub, folders, tmp_path, name):
    code = f"""
zoo = vz.Zoo({name!r})
print(json.dumps([digests(zoo), streamed(vz.Zoo({name!r}).stream(batch_size=4, shuffle=True))]))
"""
    got = client(hub, tmp_path / "home", code, ranges=False)
    assert got == [truth(folders[name])] * 2
    shards = list((folders[name] / "weights").iterdir())
    assert len(shards) > 3
    assert moved(hub) == sum(shard.stat().st_size for shard in shards)
    assert len(hub.asked(WEIGHTS)) == len(shards)
    before = len(hub.requests)
    for ranges in (True, False):
        assert client(hub, tmp_path / "home", code, ranges=ranges, HF_HUB_OFFLINE="1") == got
    assert len(hub.requests) == before


def test_a_model_of_a_remote_zoo_computes_what_the_local_one_does(hub, folders, tmp_path):
    name = NAMES[0]
    model_id = Zoo(folders[name]).model_ids[5]
    code = f"""
import torch
images = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
print(json.dumps(vz.Zoo({name!r}).model({model_id!r})(images).tolist()))
"""
    logits = client(hub, tmp_path / "home", code)
    images = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    assert torch.allclose(torch.tensor(logits), Zoo(folders[name]).model(model_id)(images), atol=1e-6)


def test_offline_what_was_never_fetched_is_named(hub, folders, tmp_path):
    name = NAMES[0]
    code = f"zoo = vz.Zoo({name!r})\n"
    code += "print(json.dumps([error(lambda: zoo.row(i).weights) for i in zoo.model_ids[:1]]))"
    assert client(hub, tmp_path / "home", code, ranges=False) == [None]
    code = f"zoo = vz.Zoo({name!r})\nprint(json.dumps([error(lambda: zoo.row(i).weights) for i in zoo.model_ids]))"
    for ranges in (True, False):
        told = client(hub, tmp_path / "home", code, ranges=ranges, HF_HUB_OFFLINE="1")
        assert told[0] is None
        last = Zoo(folders[name])._reader.places.files[-1]
        assert told[-1].startswith(f"cannot get {last} of {name!r}: it is not in the cache, and HF_HUB_OFFLINE")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["digests(chosen)", "streamed(chosen.stream(batch_size=2))"])
def test_of_large_shards_only_the_chosen_rows_are_moved(hub, folders, tmp_path, name, way):
    client(hub, tmp_path / "home", f"print(len(vz.Zoo({name!r})))")
    before = hub.bytes_served
    code = f"""
chosen = vz.Zoo({name!r}).filter(model_id=["sl-s1--sgd-lr0.001-linear@2", "cl-s1@2"])
print(json.dumps({way}))
"""
    got = client(hub, tmp_path / "home", code)
    assert len(got) == 2
    assert got == truth(folders[name], got)
    size = stored_bytes(folders[name], got)
    assert moved(hub) == size
    listed = (folders[name] / "shards.json").stat().st_size
    assert hub.bytes_served - before == size + listed


@pytest.mark.parametrize("name", NAMES)
def test_of_chosen_tensors_only_their_bytes_are_moved(hub, folders, tmp_path, name):
    code = f"""
chosen = vz.Zoo({name!r}).filter(model_id=["sl-s1--sgd-lr0.001-mlp@2", "cl-s1@2"])
def some(**options):
    batches = chosen.stream(tensors=["blocks.0.attn.*.weight", "norm.bias"], **options)
    return [[{{name: digest(t[number].numpy()) for name, t in b["tensors"].items()}}, model_id]
            for b in batches for number, model_id in enumerate(b["model_id"])]
"""
    tensors = ["blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight", "norm.bias"]
    got = client(hub, tmp_path / "home", f"{code}print(json.dumps(some(verify=False)))")
    assert [sorted(digests) for digests, _ in got] == [sorted(tensors)] * 2
    item = 2 if name.endswith("bytes") else 4
    assert moved(hub) == 2 * item * (48 * 16 + 16 * 16 + 16)
    local = Zoo(folders[name])
    for digests, model_id in got:
        held = local.model(model_id).state_dict()
        assert digests == {name: hashlib.sha256(held[name].numpy().tobytes()).hexdigest() for name in tensors}
    before = moved(hub)
    assert client(hub, tmp_path / "home", f"{code}print(json.dumps(some()))") == got
    assert moved(hub) - before >= stored_bytes(folders[name], [model_id for _, model_id in got])


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_and_a_failing_server_give_the_right_weights(hub, folders, tmp_path, ranges):
    hub.inject("cut", WEIGHTS, times=3, value=5000)
    hub.inject("fail", WEIGHTS, times=2, value=500)
    hub.inject("fail", "GET .*(index|shards.json)", times=2, value=503)
    for name in NAMES:
        code = f"print(json.dumps([digests(vz.Zoo({name!r})), streamed(vz.Zoo({name!r}).stream())]))"
        assert client(hub, tmp_path / "home", code, ranges=ranges) == [truth(folders[name])] * 2
    assert not any(fault.times for fault in hub.faults)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_damaged_byte_on_the_server_is_an_error_by_name(hub, folders, tmp_path, name, ranges):
    local = Zoo(folders[name])
    position = len(local) - 3
    shard = damage(hub, folders[name], position)
    code = f"""
zoo = vz.Zoo({name!r})
told = [error(lambda: zoo.row(model_id).weights) for model_id in zoo.model_ids]
told.append(error(lambda: list(zoo.stream())))
print(json.dumps(told))
"""
    *rows, stream = client(hub, tmp_path / "home", code, ranges=ranges)
    damaged = local.model_ids[position]
    assert stream == rows[position]
    assert stream.startswith(f"the weights of {damaged} do not match their hash: {shard} of {name!r} is damaged; ")
    assert f"hf download {name} {shard} --repo-type dataset --revision " in stream
    assert [model_id for model_id, told in zip(local.model_ids, rows, strict=True) if told] == [damaged]
    code = f"print(json.dumps([error(lambda: digests(vz.Zoo({name!r}), verify=False)), len(vz.Zoo({name!r}))]))"
    assert client(hub, tmp_path / "home", code, ranges=ranges) == [None, 18]


def test_the_repair_that_the_error_names_repairs(hub, folders, tmp_path):
    name = NAMES[0]
    damage(hub, folders[name], 0)
    code = f"print(json.dumps([error(lambda: digests(vz.Zoo({name!r})))]))"
    (told,) = client(hub, tmp_path / "home", code, ranges=False)
    damage(hub, folders[name], 0)
    assert client(hub, tmp_path / "home", code, ranges=False) == [told]
    command = told.split("`")[1].split()
    assert command[0] == "hf"
    tool = str(Path(sys.executable).parent / "hf")
    subprocess.run([tool, *command[1:]], env=hub.environment(tmp_path / "home"), check=True, capture_output=True)
    assert client(hub, tmp_path / "home", code, ranges=False) == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_push_in_mid_read_does_not_mix_versions(hub, folders, tmp_path, monkeypatch, ranges):
    import local_hub_requests

    name, (old, new) = "ModelZoos/moving", folders.values()
    hub.publish(name, old)
    push = ("GET", "/push", lambda handler: {"commit": handler.hub.publish(name, new)})
    monkeypatch.setattr(local_hub_requests, "ROUTES", [*local_hub_requests.ROUTES, push])
    code = f"""
zoo = vz.Zoo({name!r})
rows, batches = zoo.rows(), iter(zoo.stream(batch_size=4))
first, batch = next(rows), next(batches)
urllib.request.urlopen({hub.endpoint!r} + "/push").read()
old = {{first["model_id"]: digest(first["weights"])}} | {{row["model_id"]: digest(row["weights"]) for row in rows}}
again = pickle.loads(pickle.dumps(zoo))
print(json.dumps([old, streamed([batch, *batches]), digests(again), digests(vz.Zoo({name!r}))]))
"""
    *before, after = client(hub, tmp_path / "home", code, ranges=ranges)
    assert before == [truth(old)] * 3
    assert after == truth(new)


def test_shards_that_a_push_left_as_they_were_are_not_fetched_again(hub, folders, tmp_path):
    name = NAMES[0]
    code = f"zoo = vz.Zoo({name!r})\nprint(json.dumps([digests(zoo), zoo._at_hand.commit]))"
    rows, before = client(hub, tmp_path / "home", code, ranges=False)
    fetched = moved(hub)
    hub.put(name, "notes.md", b"of another commit")
    for ranges in (True, False):
        again, after = client(hub, tmp_path / "home", code, ranges=ranges)
        assert again == rows
        assert after != before
    assert moved(hub) == fetched


@pytest.mark.parametrize("ranges", [True, False])
def test_workers_of_a_data_loader_read_a_remote_zoo(hub, folders, tmp_path, ranges):
    name = NAMES[1]
    code = f"""
from torch.utils.data import DataLoader
zoo = vz.Zoo({name!r})
first = zoo.row(zoo.model_ids[0]).weights
stream = zoo.stream(batch_size=3, shuffle=True, columns=["model_id"])
seen = []
for epoch in range(2):
    stream.set_epoch(epoch)
    batches = list(DataLoader(stream, batch_size=None, num_workers=2))
    seen.append([model_id for batch in batches for model_id in batch["model_id"]])
    assert streamed(batches) == {truth(folders[name])!r}
print(json.dumps(seen))
"""
    seen = client(hub, tmp_path / "home", code, ranges=ranges)
    assert [len(ids) for ids in seen] == [18, 18]
    assert seen[0] != seen[1]


def test_the_index_of_a_terabyte_opens_with_less_than_a_megabyte(hub, tmp_path):
    name = "ModelZoos/paper"
    paper_zoo.write_light_files(tmp_path / "paper")
    hub.publish(name, tmp_path / "paper")
    code = f"""
zoo = vz.Zoo({name!r})
chosen = zoo.filter(**{paper_zoo.WHERE!r})
print(json.dumps([len(zoo), len(chosen), len(set(zoo.to_pandas()["run_id"])), chosen.model_ids[0]]))
"""
    rows, chosen, runs, first = client(hub, tmp_path / "home", code)
    assert (rows, chosen, runs) == (12_900, 40, 250)
    assert "-mlp-" in first
    assert hub.bytes_served < 1_000_000
    listed = json.loads((tmp_path / "paper" / "shards.json").read_text())
    assert len(listed) == pytest.approx(2_580, abs=3)
    assert sum(entry["bytes"] for entry in listed.values()) > 1.1e12
    ends = itertools.chain.from_iterable(entry["groups"] for entry in listed.values())
    assert sum(count for count, _ in ends) == 12_900
