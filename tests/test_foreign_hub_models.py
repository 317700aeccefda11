"""Models of a Hub on this machine become a zoo, by the real client."""

import io
import json

import pytest
import torch
from local_hub import STRANGER, LocalHub
from safetensors.torch import save

from vitzoo_hf.foreign.hub_models import plan_hub_models, read_list
from vitzoo_hf.foreign.names import to_transformers
from vitzoo_hf.schema import ZooError
from vitzoo_hf.vit import create
from vitzoo_hf.zoo import Zoo

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


def model_of(seed):
    return create(NAME, ARGS, seed=seed).eval()


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        for name in ("a/timm", "b/transformers", "c/pickle", "d/private", "e/none"):
            hub.create(name, private=name == "d/private")
        timm_config = json.dumps({"architecture": NAME, "model_args": {"num_heads": 2}}).encode()
        hub.put("a/timm", "config.json", timm_config)
        hub.put("a/timm", "model.safetensors", save(model_of(1).state_dict()))
        config, tensors = to_transformers(
            model_of(2).state_dict(), architecture=NAME, architecture_args=ARGS, head="linear"
        )
        hub.put("b/transformers", "config.json", json.dumps(config).encode())
        hub.put("b/transformers", "model.safetensors", save(tensors))
        buffer = io.BytesIO()
        torch.save(model_of(3).state_dict(), buffer)
        for name in ("c/pickle", "d/private"):
            hub.put(name, "pytorch_model.bin", buffer.getvalue())
            hub.put(name, "config.json", timm_config)
        yield hub


CODE = """
import json
from vitzoo_hf.cli import run
from contextlib import redirect_stdout
import io
said = io.StringIO()
with redirect_stdout(said):
    status = run(["convert", {source!r}, "--out", {out!r}, "--quiet"{more}])
print(json.dumps([status, said.getvalue().splitlines()]))
"""


def converted(hub, tmp_path, source, *, more="", **options):
    code = CODE.format(source=str(source), out=str(tmp_path / "zoo"), more=more)
    return hub.run(code, tmp_path / "home", **options)


def logits(zoo, model_id):
    torch.manual_seed(0)
    batch = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        return zoo.model(model_id)(batch), batch


def test_a_list_of_models_becomes_a_zoo_and_what_is_not_there_is_named(hub, tmp_path):
    models = tmp_path / "models.txt"
    models.write_text("a/timm  # ours\n\nb/transformers\nc/pickle@main\nd/private\ne/none\nf/unknown\n")
    status, said = converted(hub, tmp_path, models, token=STRANGER)
    assert status == 0
    assert said[0].startswith("3 rows in ")
    refused = dict(line.removeprefix("refused: ").split(": ", 1) for line in said if line.startswith("refused: "))
    assert refused.keys() == {"d/private", "e/none", "f/unknown"}
    assert "no model on the Hub that you can see" in refused["f/unknown"]
    assert refused["e/none"] == "it has neither model.safetensors nor pytorch_model.bin"
    zoo = Zoo(tmp_path / "zoo")
    for number, model_id in enumerate(zoo.model_ids, start=1):
        found, batch = logits(zoo, model_id)
        with torch.inference_mode():
            assert torch.equal(found, model_of(number)(batch))
    told = json.loads(zoo.row(zoo.model_ids[0])["provenance"])
    assert told["repository"] == "a/timm"
    assert told["commit"] == hub.repositories["a/timm"].branches["main"]


def test_a_private_model_with_its_token_and_factors_from_a_table(hub, tmp_path):
    (tmp_path / "factors.csv").write_text("repo,run_id,lr,augmented\nd/private,mine,0.001,true\n")
    status, said = converted(hub, tmp_path, "hf:d/private", more=f", '--table', {str(tmp_path / 'factors.csv')!r}")
    assert (status, said[0][:6]) == (0, "1 rows")
    (row,) = Zoo(tmp_path / "zoo").rows()
    assert (row["run_id"], row["factor_lr"], row["factor_augmented"]) == ("mine", 0.001, True)


def test_a_hub_that_is_busy_is_asked_again(hub, tmp_path):
    hub.inject("fail", "GET /api/models/a/timm", times=2, value=503)
    status, said = converted(hub, tmp_path, "hf:a/timm")
    assert (status, said[0][:6]) == (0, "1 rows")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no model"),
        ("# nothing\n", "lists no model"),
        ("a/b\nnonsense\n", r"models.txt:2: 'nonsense' is no model id"),
    ],
)
def test_a_list_with_a_mistake_is_one_line(tmp_path, text, message):
    (tmp_path / "models.txt").write_text(text)
    with pytest.raises(ZooError, match=message):
        read_list(tmp_path / "models.txt")


@pytest.mark.parametrize("told", ["a", "a/b/c", "../x/y", "a/b@", "-a/b", "a b/c"])
def test_what_is_no_id_is_named(told):
    with pytest.raises(ZooError, match="is no model id: expected ORG/NAME or ORG/NAME@REVISION"):
        plan_hub_models([told])
