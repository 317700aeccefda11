import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from vitzoo_hf import timm_import
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models import vit
from vitzoo_hf.models.architecture import Architecture

NAME = "vit_tiny_patch16_224"
ARGS = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 10,
}


def python(code: str, path: Path | None = None) -> str:
    """What a fresh interpreter prints, with `path` before everything on its import path."""
    code = f"import sys\nsys.path[:0] = {[str(path)] if path else []!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_package(folder: Path, name: str, extension: bytes | None = None) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("FAKE = True\n")
    if extension is not None:
        (folder / name / "_C.so").write_bytes(extension)


def test_timm_loads_on_this_machine_and_schemas_are_declared_only_if_needed():
    """The oracle is a plain `import torchvision` in a process of its own."""
    plain = python(
        "import torch\n"
        "try:\n    import torchvision\n    print('works')\n"
        "except ImportError:\n    print('works')\n"
        "except RuntimeError as error:\n    print('broken' if 'torchvision::nms' in str(error) else error)"
    )
    ours = python(
        "from vitzoo_hf import timm_import\n"
        "needed = timm_import.needs_operator_schemas()\n"
        "import time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "needs = timm_import.needs_operator_schemas\n"
        "timm_import.needs_operator_schemas = lambda: [needs(), time.sleep(0.2)][0]\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    timm, *others = pool.map(lambda _: timm_import.import_timm(), range(4))\n"
        "assert all(other is timm for other in others)\n"
        "assert timm_import.import_timm() is timm and timm.is_model('vit_tiny_patch16_224')\n"
        "assert bool(timm_import._declared_operators) == needed\n"
        "assert not timm_import.needs_operator_schemas()\n"
        "print('broken' if needed else 'works')"
    )
    assert ours == plain


def test_a_working_torchvision_is_left_alone(tmp_path):
    fake_package(tmp_path, "torchvision")
    fake_package(tmp_path, "timm")
    told = python(
        "import torch\n"
        "from vitzoo_hf import timm_import\n"
        "assert not timm_import.needs_operator_schemas()\n"
        "assert timm_import.import_timm().FAKE\n"
        "import torchvision\n"
        "assert torchvision.FAKE\n"
        "assert not timm_import._declared_operators\n"
        "print(hasattr(torch.ops.torchvision, 'nms'))",
        tmp_path,
    )
    assert told == "False"


@pytest.fixture
def fresh(monkeypatch):
    """As before the first import of timm, on a CPU build of torch with an extension that does not load."""
    monkeypatch.setattr(timm_import, "_declared_operators", [])
    monkeypatch.setattr(timm_import, "_torchvision_extension_loads", lambda: False)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert timm_import.needs_operator_schemas()
    return monkeypatch


def test_a_loading_extension_needs_nothing(fresh):
    fresh.setattr(timm_import, "_torchvision_extension_loads", lambda: True)
    assert not timm_import.needs_operator_schemas()


def test_an_imported_torchvision_needs_nothing(fresh):
    fresh.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    assert not timm_import.needs_operator_schemas()


@pytest.mark.parametrize("build", ["cuda", "hip"])
def test_gpu_builds_of_torch_are_never_touched(fresh, build):
    fresh.setattr(torch.version, build, "12.8")
    assert not timm_import.needs_operator_schemas()


@pytest.mark.parametrize(("extension", "loads"), [(None, True), (b"not a shared library", False)])
def test_the_extension_is_judged_by_loading_it(monkeypatch, tmp_path, extension, loads):
    fake_package(tmp_path, "torchvision", extension)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert timm_import._torchvision_extension_loads() is loads
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize(("init", "head"), [("timm", "linear"), ("kaiming", "linear"), ("kaiming", "mlp")])
def test_a_seed_gives_the_same_weights_and_leaves_the_generator(init, head):
    def make(seed):
        return vit.create(NAME, ARGS, head=head, head_hidden=8 if head == "mlp" else None, init=init, seed=seed)

    before = torch.random.get_rng_state()
    first, again, other = make(1).state_dict(), make(1).state_dict(), make(2).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight" if head == "linear" else "head.0.weight"], other[list(first)[-2]])
    assert not torch.equal(first["patch_embed.proj.weight"], other["patch_embed.proj.weight"])


def test_a_seed_leaves_the_generators_of_cuda(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", called.append)
    vit.create(NAME, ARGS, seed=1)
    assert called == []


def test_without_a_seed_the_global_generator_draws():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, two = vit.create(NAME, ARGS), vit.create(NAME, ARGS)
        torch.manual_seed(0)
        again = vit.create(NAME, ARGS)
    assert torch.equal(one.head.weight, again.head.weight)
    assert not torch.equal(one.head.weight, two.head.weight)
    assert one.training


def test_kaiming_reaches_the_trunk_and_spares_an_mlp_head():
    model = vit.create(NAME, ARGS | {"embed_dim": 64}, head="mlp", head_hidden=128, init="kaiming", seed=0)
    trunk = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith("head")
    }
    assert len(trunk) == 5
    for name, module in trunk.items():
        assert (module.bias == 0.01).all(), name
        fan_in = module.weight[0].numel()
        assert abs(module.weight.std().item() / (2 / fan_in) ** 0.5 - 1) < 0.15, name
    for layer in (model.head[0], model.head[2]):
        bound = layer.in_features**-0.5
        assert layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound
        assert not (layer.bias == 0.01).any()


def test_kaiming_reaches_a_linear_head():
    assert (vit.create(NAME, ARGS, init="kaiming", seed=0).head.bias == 0.01).all()


def test_timm_init_is_timms_own():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = timm_import.import_timm().create_model(NAME, pretrained=False, **ARGS)
    model = vit.create(NAME, ARGS, seed=5)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "vit_tiny_patch16_225",
            {},
            "unknown architecture 'vit_tiny_patch16_225': did you mean 'vit_tiny_patch16_224'",
        ),
        (NAME, {"head": "mlpp", "head_hidden": 4}, "unknown head 'mlpp': did you mean 'mlp'"),
        (NAME, {"head": "mlp"}, "head 'mlp' with head_hidden None: only an mlp head has, and needs, a hidden width"),
        (NAME, {"head_hidden": 4}, "head 'linear' with head_hidden 4: only an mlp head has"),
        (NAME, {"init": "kaimin"}, "unknown init 'kaimin': did you mean 'kaiming'"),
        ("resnet18", {}, "'resnet18' "),
    ],
)
def test_unknown_names_are_refused(name, options, message):
    with pytest.raises(ZooError, match=message):
        vit.create(name, ARGS if name != "resnet18" else {}, **options)


@pytest.mark.parametrize(
    "bad",
    [
        {"foo": 1},
        {"num_heads": 3},
        {"patch_size": 0},
        {"img_size": "x"},
        {"embed_dim": -4},
        {"act_layer": "foo"},
    ],
)
def test_arguments_timm_refuses_are_named(bad):
    with pytest.raises(ZooError, match=rf"timm cannot build '{NAME}' with .*{next(iter(bad))}"):
        vit.create(NAME, ARGS | bad)


def test_a_model_without_outputs_is_refused():
    with pytest.raises(ZooError, match=r"has no linear `head` to train: a zoo needs num_classes above 0"):
        vit.create(NAME, ARGS | {"num_classes": 0})


def test_a_skeleton_holds_no_memory_and_is_shared():
    before = torch.random.get_rng_state()
    assert Architecture(NAME, ARGS | {"depth": 3}).skeleton is not None
    skeleton = Architecture(NAME, ARGS).skeleton
    assert all(tensor.is_meta for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    assert not any(module.training for module in skeleton.modules())
    assert Architecture(NAME, dict(reversed(ARGS.items()))).skeleton is skeleton
    assert Architecture(NAME, ARGS | {"depth": 2}).skeleton is not skeleton
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("head", "hidden"), [("linear", None), ("mlp", 8)])
def test_the_layout_is_that_of_a_created_model(head, hidden):
    state = vit.create(NAME, ARGS, head=head, head_hidden=hidden).state_dict()
    assert Architecture(NAME, ARGS, head, hidden).layout == Layout.of(state)


def test_a_filled_model_has_the_tensors_themselves_and_nothing_of_the_skeleton():
    state = vit.create(NAME, ARGS, seed=1).state_dict()
    model = Architecture(NAME, ARGS).module(state)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == {
        name: tensor.data_ptr() for name, tensor in state.items()
    }
    skeleton = Architecture(NAME, ARGS).skeleton
    assert skeleton.head.weight.is_meta
    shared = {id(module) for module in skeleton.modules()}
    for module in model.modules():
        assert id(module) not in shared
        assert not any(id(value) in shared for value in vars(module).values())
        assert not any(id(getattr(value, "__self__", None)) in shared for value in vars(module).values())


def test_a_filled_model_is_as_good_as_a_created_one():
    """Training it, hooks on it and deep copies of it leave other models of its architecture alone."""
    whole = vit.create(NAME, ARGS, seed=1)
    one, other = (Architecture(NAME, ARGS).module(whole.state_dict()) for _ in range(2))
    assert str(one) == str(whole.eval())
    one.train().blocks[0].register_forward_hook(lambda *arguments: calls.append(1))
    calls = []
    batch = torch.randn(2, ARGS["in_chans"], ARGS["img_size"], ARGS["img_size"])
    assert torch.equal(other(batch), whole(batch))
    assert calls == []
    assert not other.training
    one(batch).sum().backward()
    assert calls == [1]
    assert other.head.weight.grad is None
    one.head = torch.nn.Identity()
    assert isinstance(other.head, torch.nn.Linear)


def test_tensors_that_do_not_fit_are_refused():
    state = vit.create(NAME, ARGS, seed=1).state_dict()
    lacking = {name: tensor for name, tensor in state.items() if name != "cls_token"}
    for tensors, told in [
        (lacking, "cls_token is missing"),
        (state | {"extra": torch.zeros(1)}, "extra is unknown"),
        (state | {"head.bias": torch.zeros(3)}, r"head\.bias has shape \(3,\), not"),
    ]:
        with pytest.raises(ZooError, match=f"weights do not fit the model: .*{told}"):
            Architecture(NAME, ARGS).module(tensors)


@pytest.mark.parametrize("width", [0, -1, 99_999_999_999])
def test_an_absurd_hidden_width_is_refused_before_memory_is_taken(width):
    with pytest.raises(ZooError, match=rf"head_hidden is {width}; expected 1 to 1,000,000"):
        vit.create("vit_tiny_patch16_224", {"num_classes": 2}, head="mlp", head_hidden=width)
