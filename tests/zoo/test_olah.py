"""Reading a zoo through `olah`, a mirror of the Hub by other people: a check of us that is not our own server.

`pip install olah==0.5.4` into an environment of its own, and name its program `olah-cli` in VITZOO_OLAH.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitzoo_hf.zoo import Zoo

OLAH = os.environ.get("VITZOO_OLAH") or shutil.which("olah-cli")
NAME = "ModelZoos/vit-zoo"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OLAH is None, reason="no olah-cli on PATH, nor named in VITZOO_OLAH"),
]


@pytest.fixture(scope="module")
def mirror(tiny_zoo, tmp_path_factory):
    """The address of a mirror that serves the tiny zoo from a git repository, and never asks the real Hub."""
    folder = tmp_path_factory.mktemp("olah")
    repository = Path(shutil.copytree(tiny_zoo, folder / "mirrors" / "datasets" / NAME))
    author = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in (
        ["init", "-q", "-b", "main"],
        ["add", "-A"],
        [*author, "commit", "-q", "-m", "a zoo"],
        ["tag", "v1"],
    ):
        subprocess.run(["git", *command], cwd=repository, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    basic = {"host": "127.0.0.1", "port": port, "repos-path": str(folder / "repos")}
    lines = [f"{name} = {json.dumps(value)}" for name, value in basic.items()]
    lines += [f"mirrors-path = [{json.dumps(str(folder / 'mirrors'))}]", "[accessibility]", "offline = true"]
    (folder / "olah.toml").write_text("\n".join(["[basic]", *lines]))
    command = [str(OLAH), "--config", str(folder / "olah.toml"), "--log-path", str(folder / "logs")]
    with (folder / "said").open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, cwd=folder)
    try:
        wait_for(port, server, folder / "said")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=120)


def wait_for(port, server, said):
    for _ in range(2400):
        assert server.poll() is None, said.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"olah does not answer: {said.read_text()}")


def read(mirror, home, code):
    """The JSON value that Python code prints, which runs as a client of the mirror."""
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment |= {"HF_ENDPOINT": mirror, "HF_HOME": str(home), "HOME": str(home), "NO_PROXY": "*"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    return json.loads(told.stdout)


def test_load_dataset_gives_what_the_folder_does(mirror, tiny_zoo, tmp_path):
    code = f"""
import json
from datasets import load_dataset
def same(a, b):
    arrow = lambda rows: rows.with_format("arrow")[:]
    return a.keys() == b.keys() and all(a[s].features == b[s].features and arrow(a[s]).equals(arrow(b[s])) for s in a)
names = [None, "weights", "index", "evaluations", "pairs", "probes"]
got = [same(load_dataset({NAME!r}, name), load_dataset({str(tiny_zoo)!r}, name)) for name in names]
print(json.dumps([got, load_dataset({NAME!r}, "index", revision="v1", split="train").num_rows]))
"""
    got, rows = read(mirror, tmp_path, code)
    assert got == [True] * 6
    assert rows == len(Zoo(tiny_zoo).filter(split="train"))


def test_a_zoo_opens_and_its_models_are_exact(mirror, tiny_zoo, tmp_path):
    code = f"""
import hashlib, json
import vitzoo_hf as vz
zoo = vz.Zoo({NAME!r}).filter(head="mlp")
digests = {{row["model_id"]: hashlib.sha256(row["weights"].tobytes()).hexdigest() for row in zoo.rows()}}
batches = [batch["model_id"] for batch in zoo.stream(batch_size=3)]
model = zoo.model(zoo.model_ids[0])
print(json.dumps([digests, sum(batches, []), type(model).__name__, zoo.probes("digits")[0].shape]))
"""
    digests, streamed, model, images = read(mirror, tmp_path, code)
    local = Zoo(tiny_zoo).filter(head="mlp")
    assert digests == {row["model_id"]: row["weights_sha256"] for row in local.rows()}
    assert (sorted(streamed), model) == (sorted(local.model_ids), "VisionTransformer")
    assert images == list(local.probes("digits")[0].shape)


def test_a_mirror_without_ranges_is_one_clear_line(mirror, tmp_path):
    code = f"""
import json
import vitzoo_hf as vz
from vitzoo_hf.format import weight_reader
weight_reader.FETCHED_WHOLE_BYTES = 0
zoo = vz.Zoo({NAME!r})
try:
    zoo.row(zoo.model_ids[0]).weights
except vz.ZooError as error:
    print(json.dumps(str(error)))
"""
    told = read(mirror, tmp_path, code)
    assert told.startswith(
        "cannot read a part of weights/train-00000-of-00001.parquet of 'ModelZoos/vit-zoo': 127.0.0.1"
    )
    assert told.endswith("sends whole files only; read from the Hub itself, or download the zoo first")


def test_an_unknown_zoo_is_one_clear_line(mirror, tmp_path):
    code = """
import json
import vitzoo_hf as vz
try:
    vz.Zoo("ModelZoos/none")
except vz.ZooError as error:
    print(json.dumps(str(error)))
"""
    told = read(mirror, tmp_path, code)
    assert told.startswith("cannot get zoo.json of 'ModelZoos/none': ")
    assert "\n" not in told
