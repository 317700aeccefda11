import pytest
import torch

from vitzoo_hf.convert.names import to_timm, to_transformers
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.vit import create

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
BATCH = torch.randn(3, 1, 16, 16)


@pytest.mark.parametrize("prefix", ["module.model.", "model.module.", "model._orig_mod.", "_orig_mod.module.model."])
def test_prefixes_of_several_wrappers_are_taken_off(prefix):
    state = create(NAME, ARGS, seed=0).state_dict()
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    model = to_timm(wrapped, name="x", architecture=NAME, architecture_args={"num_heads": ARGS["num_heads"]})
    assert all(torch.equal(model.tensors[name], state[name]) for name in state)


def test_arguments_against_the_config_are_refused():
    state = create(NAME, ARGS, seed=0).state_dict()
    config = {"architecture": NAME, "model_args": {"num_heads": ARGS["num_heads"]}}
    with pytest.raises(ZooError, match=r"has num_heads .* by its config.json, and 7 was given"):
        to_timm(state, name="x", architecture_args={"num_heads": 7}, config=config)


def tiny(head="linear", **changes):
    return create(NAME, ARGS | changes, head=head, head_hidden=8 if head == "mlp" else None, seed=1).eval()


def again(loaded):
    model = create(loaded.architecture, loaded.architecture_args, head=loaded.head, head_hidden=loaded.head_hidden)
    model.load_state_dict(loaded.tensors, strict=True)
    return model.eval()


def given(tensors, **options):
    return to_timm(tensors, name="x", architecture=NAME, architecture_args={"num_heads": 2}, **options)


@pytest.mark.parametrize("prefix", ["", "vit.", "module.", "module.vit.", "model.", "model.module.vit."])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_prefixes_and_heads(prefix, head):
    model = tiny(head)
    loaded = given({prefix + name: tensor for name, tensor in model.state_dict().items()})
    assert (loaded.head, loaded.head_hidden) == (head, 8 if head == "mlp" else None)
    assert list(loaded.tensors) == list(model.state_dict())
    assert torch.equal(again(loaded)(BATCH), model(BATCH))
    assert loaded.flags == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"img_size": 32},
        {"in_chans": 3},
        {"mlp_ratio": 2.0},
        {"num_classes": 7},
        {"qkv_bias": False},
        {"depth": 1},
    ],
)
def test_shapes_tell_the_arguments(changes):
    model = tiny(**changes)
    args = {"num_heads": 2} | ({"qkv_bias": False} if "qkv_bias" in changes else {})
    loaded = to_timm(model.state_dict(), name="x", architecture=NAME, architecture_args=args)
    batch = torch.randn(2, changes.get("in_chans", 1), changes.get("img_size", 16), changes.get("img_size", 16))
    assert torch.equal(again(loaded)(batch), model(batch))


def test_a_real_small_vit_is_seen_from_its_shapes():
    model = create("vit_small_patch16_224", {"num_classes": 100}, seed=0).eval()
    loaded = to_timm({f"vit.{name}": tensor for name, tensor in model.state_dict().items()}, name="x")
    assert (loaded.architecture, loaded.architecture_args) == ("vit_small_patch16_224", {"num_classes": 100})
    batch = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(again(loaded)(batch), model(batch))


@pytest.mark.parametrize(("dtype", "flagged"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_half_precision_is_widened_and_flagged(dtype, flagged):
    state = {name: tensor.to(dtype) for name, tensor in tiny().state_dict().items()}
    loaded = given(state)
    assert loaded.flags == [f"stored as {flagged}, widened to float32"]
    assert all(torch.equal(loaded.tensors[name], tensor.float()) for name, tensor in state.items())


def test_float64_is_taken_only_if_nothing_is_lost():
    state = {name: tensor.double() for name, tensor in tiny().state_dict().items()}
    assert given(state).flags == ["stored as float64, which float32 holds exactly"]
    state["norm.bias"] = state["norm.bias"] + 1e-12
    with pytest.raises(ZooError, match=r"x: norm.bias is float64, which float32 cannot hold exactly"):
        given(state)


def changed(**changes):
    return {name: tensor for name, tensor in (dict(tiny().state_dict()) | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(cls_token=None), r"x is not vit_tiny_patch16_224: it lacks cls_token"),
        (changed(extra=torch.zeros(2)), r"x is not vit_tiny_patch16_224: extra does not belong to it"),
        (changed(**{"norm.bias": torch.zeros(3)}), r"norm.bias has shape \(3,\), not \(16,\)"),
        (changed(**{"norm.bias": torch.zeros(16, dtype=torch.int64)}), r"norm.bias is torch.int64, not a floating"),
        (changed(**{"head.weight": None, "head.bias": None}), "x has no head"),
        ({"conv1.weight": torch.zeros(3), "head.weight": torch.zeros(2, 2)}, "x is no ViT"),
    ],
)
def test_what_does_not_fit_is_named(state, message):
    with pytest.raises(ZooError, match=message):
        given(state)


def test_heads_that_cannot_be_seen_are_asked_for():
    with pytest.raises(ZooError, match=r"how many heads a ViT of width 16 and depth 2 has cannot be seen"):
        to_timm(tiny().state_dict(), name="x")


def test_heads_of_another_width_are_never_guessed():
    """Timm would take the six heads of the small ViT for 12 features too, and compute something else."""
    model = create("vit_small_patch16_224", ARGS | {"embed_dim": 12}, seed=0)
    with pytest.raises(ZooError, match=r"x is no vit_small_patch16_224 as timm makes it \(width 12, depth 2\)"):
        to_timm(model.state_dict(), name="x", architecture="vit_small_patch16_224")


def five(tensors):
    """4.x names as 5.x has them."""
    import re

    renamed = {}
    for name, tensor in tensors.items():
        new = name.replace("vit.encoder.layer.", "vit.layers.").replace("attention.output.dense", "attention.o_proj")
        new = re.sub(r"attention\.attention\.(q|k|v)\w+", r"attention.\1_proj", new)
        new = new.replace("intermediate.dense", "mlp.fc1")
        renamed[re.sub(r"(?<!attention\.)output\.dense", "mlp.fc2", new)] = tensor
    return renamed


@pytest.mark.parametrize("version", [4, 5])
def test_transformers_names_there_and_back(version):
    model = tiny()
    config, tensors = to_transformers(model.state_dict(), architecture=NAME, architecture_args=ARGS, head="linear")
    assert config["num_attention_heads"] == 2
    loaded = to_timm(five(tensors) if version == 5 else tensors, name="x", config=config)
    assert loaded.flags == []
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(again(loaded)(BATCH), model(BATCH))


def test_another_epsilon_is_flagged():
    config, tensors = to_transformers(tiny().state_dict(), architecture=NAME, architecture_args=ARGS, head="linear")
    loaded = to_timm(tensors, name="x", config=config | {"layer_norm_eps": 1e-12})
    assert loaded.flags == ["layer_norm_eps 1e-12 in the source, 1e-6 here"]


def test_a_lost_query_is_named():
    config, tensors = to_transformers(tiny().state_dict(), architecture=NAME, architecture_args=ARGS, head="linear")
    del tensors["vit.encoder.layer.1.attention.attention.query.weight"]
    with pytest.raises(ZooError, match=r"x lacks one of query, key and value \(weight\) of block 1"):
        to_timm(tensors, name="x", config=config)


def test_a_timm_config_names_the_architecture():
    model = tiny()
    config = {"architecture": f"{NAME}.augreg_in21k", "model_args": {"num_heads": 2}}
    assert torch.equal(again(to_timm(model.state_dict(), name="x", config=config))(BATCH), model(BATCH))


def test_mlp_heads_do_not_exist_in_transformers():
    with pytest.raises(ZooError, match="transformers has no ViT with an MLP head"):
        to_transformers(tiny("mlp").state_dict(), architecture=NAME, architecture_args=ARGS, head="mlp")
