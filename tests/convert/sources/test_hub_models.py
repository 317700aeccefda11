"""Models of a Hub on this machine, by the real client, through the conversion to a zoo."""

import io
import json
import threading
import time
from importlib.metadata import version

import pytest
import torch
from hub_models import CONFIG, publish, state
from local_hub import OWNER, STRANGER, LocalHub
from safetensors.torch import save

from vitzoo_hf.convert.sources.hub_models import plan_hub_models, read_list
from vitzoo_hf.format.schema import ZooError, weights_sha256
from vitzoo_hf.zoo import Zoo

START = """
import json, time
from pathlib import Path
from vitzoo_hf.convert.convert import convert
from vitzoo_hf.convert.sources.hub_models import plan_hub_models
from vitzoo_hf.convert.rows import SourceError
from vitzoo_hf.format.schema import ZooError
time.sleep = lambda seconds: None
def error(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except ZooError as raised:
        return [type(raised).__name__, str(raised)]
"""


def sha256(seed):
    return weights_sha256(torch.cat([tensor.flatten() for tensor in state(seed).values()]).numpy())


def pickled(tensors):
    held = io.BytesIO()
    torch.save(tensors, held)
    return held.getvalue()


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        publish(hub, "org/one", {"config.json": CONFIG, "model.safetensors": save(state(1))})
        publish(hub, "org/two", {"config.json": CONFIG, "pytorch_model.bin": pickled(state(2))})
        yield hub


def converted(hub, tmp_path, repositories, *, table=None, token=STRANGER):
    code = f"""{START}
table = {None if table is None else str(table)!r}
plan = plan_hub_models({repositories!r}, table=Path(table) if table else None)
done = convert(plan, Path({str(tmp_path / "zoo")!r}), progress=False)
print(json.dumps(done.refused))
"""
    refused = hub.run(code, tmp_path / "home", token=token)
    return Zoo(tmp_path / "zoo"), refused


def test_models_are_pinned_and_exact(hub, tmp_path):
    names = ["org/one", "org/two"]
    pinned = {name: hub.repositories[f"models/{name}"].branches["main"] for name in names}
    zoo, refused = converted(hub, tmp_path, names)
    assert refused == {}
    assert zoo.model_ids == ["org-one@1", "org-two@1"]
    assert list(zoo.index["weights_sha256"]) == [sha256(1), sha256(2)]
    for name, text in zip(names, zoo.index["provenance"], strict=True):
        told = json.loads(text)
        assert (told["source"], told["repository"], told["commit"]) == (name, name, pinned[name])
    assert json.loads(zoo.index["architecture_args"][0])["num_heads"] == 2
    assert all("pytorch_model" in request.path for request in hub.asked(r"GET /org/two/resolve/.*model"))


def test_only_what_is_needed_is_downloaded_when_it_is_loaded_through_short_failures(hub, tmp_path):
    publish(hub, "org/one", {"pytorch_model.bin": pickled(state(3)), "tf_model.h5": b"x" * 1000})
    code = f"{START}\nplan = plan_hub_models(['org/one'])\nprint(json.dumps([plan.name, plan.rows[0].size]))"
    assert hub.run(code, tmp_path / "home") == ["hub-models", len(save(state(1)))]
    assert not hub.asked("/resolve/")
    hub.inject("fail", "/api/models/org/one", times=2, value=503)
    # before version 1 the Hub's client does not ask again by itself, and only our attempts count
    times = 8 if int(version("huggingface_hub").split(".")[0]) >= 1 else 5
    hub.inject("fail", "/org/one/resolve/", times=times, value=503)
    zoo, _ = converted(hub, tmp_path, ["org/one"])
    assert list(zoo.index["weights_sha256"]) == [sha256(1)]
    assert not hub.asked(r"h5|pytorch_model")


def test_a_push_after_planning_does_not_change_what_is_taken(hub, tmp_path):
    held = publish(hub, "org/one", {})
    held.tags["v1"] = held.branches["main"]
    publish(hub, "org/one", {"model.safetensors": save(state(5))})

    def push_once_planned():
        while len(hub.asked("/api/models/org/one")) < 2:
            time.sleep(0.01)
        publish(hub, "org/one", {"model.safetensors": save(state(6))})
        (tmp_path / "pushed").touch()

    pusher = threading.Thread(target=push_once_planned, daemon=True)
    pusher.start()
    code = f"""
from time import sleep
{START}
plan = plan_hub_models(["org/one@v1", "org/one"])
while not Path({str(tmp_path / "pushed")!r}).exists():
    sleep(0.01)
print(convert(plan, Path({str(tmp_path / "zoo")!r}), progress=False).rows)
"""
    assert hub.run(code, tmp_path / "home") == 2
    pusher.join()
    rows = {json.loads(row["provenance"])["source"]: row for row in Zoo(tmp_path / "zoo").index}
    assert rows["org/one@v1"]["weights_sha256"] == sha256(1)
    assert rows["org/one"]["weights_sha256"] == sha256(5)


def test_what_cannot_be_had_is_named_and_the_rest_goes_on(hub, tmp_path):
    weights = save(state(3))
    hub.create("models/org/private", private=True)
    publish(hub, "org/gated", {"config.json": CONFIG, "model.safetensors": weights}).gated = True
    publish(hub, "org/text", {"README.md": b"text"})
    publish(hub, "org/sharded", {"model.safetensors.index.json": b"{}"})
    publish(hub, "org/cut", {"config.json": CONFIG, "model.safetensors": weights[:-100]})
    publish(hub, "org/empty", {"config.json": CONFIG, "model.safetensors": b""})
    publish(hub, "org/config", {"config.json": b"[", "model.safetensors": weights})
    publish(hub, "org/other", {"config.json": CONFIG, "model.safetensors": save({"x": torch.zeros(1)})})
    names = ["missing", "private", "gated", "text", "sharded", "cut", "empty", "config", "other", "one@v9", "one"]
    zoo, refused = converted(hub, tmp_path, [f"org/{name}" for name in names])
    for name, reason in {
        "missing": "cannot find org/missing: no model on the Hub that you can see",
        "private": "no model on the Hub that you can see: check the name; for a private one run `hf auth login`",
        "gated": f"its owner grants access: ask at {hub.endpoint}/org/gated, then run `hf auth login`",
        "text": "it has neither model.safetensors nor pytorch_model.bin",
        "sharded": "its weights are in several files: download it, and convert its folder",
        "cut": "damaged",
        "empty": "is empty",
        "config": "config.json of org/config cannot be read",
        "other": "has no head",
        "one@v9": "it has no such branch, tag or commit",
    }.items():
        assert reason in refused.pop(f"org/{name}")
    assert refused == {}
    assert zoo.model_ids == ["org-one@1"]


def test_a_token_opens_what_is_private(hub, tmp_path):
    publish(hub, "org/one", {}).private = True
    code = f"{START}\nprint(json.dumps(len(plan_hub_models(['org/one']).rows)))"
    assert hub.run(code, tmp_path / "home", token=OWNER) == 1
    assert hub.run(code, tmp_path / "home", token=STRANGER) == 0


def test_a_table_gives_factors(hub, tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text(
        "repo,run_id,epoch,parent_id,lr\norg/two,ft,3,pre@7,0.1\norg/one,pre,7,,0.2\norg/gone,x,1,,1\norg/no,y,1,,1\n"
    )
    zoo, refused = converted(hub, tmp_path, ["org/one", "org/two", "org/gone"], table=table)
    assert zoo.model_ids == ["pre@7", "ft@3"]
    assert list(zoo.index["factor_lr"]) == [0.2, 0.1]
    assert refused.pop("org/no") == "mine.csv line 5: 'org/no' is not among the models to convert"
    assert "cannot find org/gone" in refused.pop("org/gone")
    assert refused == {}


@pytest.mark.parametrize("pattern", ["/api/models/org/two", "/org/two/resolve/"])
def test_a_hub_that_fails_for_long_refuses_nothing(hub, tmp_path, pattern):
    hub.inject("fail", pattern, times=1000, value=503)
    code = f"""{START}
def run():
    return convert(plan_hub_models(["org/one", "org/two"]), Path({str(tmp_path / "zoo")!r}), progress=False)
print(json.dumps(error(run)))
"""
    kind, message = hub.run(code, tmp_path / "home")
    assert kind == "SourceError"
    assert "org/two" in message
    assert "the same command continues later" in message
    hub.faults.clear()
    if "api" not in pattern:
        zoo, refused = converted(hub, tmp_path, ["org/one", "org/two"])
        assert (len(zoo), refused) == (2, {})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "no connection to http://127.0.0.1:9"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids"),
        ({"HF_TOKEN": "hf_wrong"}, "the Hub refuses your token"),
    ],
)
def test_no_network_is_one_line(hub, tmp_path, environment, message):
    code = f"{START}\nprint(json.dumps(error(plan_hub_models, ['org/one', 'org/two'])))"
    kind, said = hub.run(code, tmp_path / "home", **environment)
    assert kind == "SourceError"
    assert message in said
    assert "\n" not in said


def test_a_list_of_models(tmp_path):
    file = tmp_path / "models.txt"
    file.write_text("# mine\norg/one  # good\n\norg/two@v1.0\r\norg/two@refs/pr/1\n")
    assert read_list(file) == ["org/one", "org/two@v1.0", "org/two@refs/pr/1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("org/one\norg one\n", "models.txt line 2: 'org one' is no model; expected ORG/NAME"),
        ("one\n", "line 1: 'one' is no model"),
        ("../one\n", "is no model"),
        ("org/one\n\norg/one\n", "line 3: 'org/one' is also in line 1: keep one"),
        ("# nothing\n", "lists no model"),
    ],
)
def test_mistakes_in_a_list_are_named(tmp_path, text, message):
    file = tmp_path / "models.txt"
    file.write_text(text)
    with pytest.raises(ZooError, match=message):
        read_list(file)


def test_mistakes_in_names_are_one_line(tmp_path):
    with pytest.raises(ZooError, match="cannot be read: No such file"):
        read_list(tmp_path / "none.txt")
    with pytest.raises(ZooError, match="'vit' is no model of the Hub; expected ORG/NAME"):
        plan_hub_models(["vit"])
    with pytest.raises(ZooError, match="'a/b' is given twice"):
        plan_hub_models(["a/b", "a/b"])
