"""Architecture name and arguments to a timm ViT with a linear or MLP head. The only module that builds timm models.

`create` draws initial weights; `skeleton_and_layout` gives a module without weights, to be filled with views of a
flat vector.

Cost: importing timm takes about a second, so the import waits until a model is needed. A skeleton is built once an
architecture.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from threading import get_ident
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from vitzoo_hf.format.gate.values import shown
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.messages import did_you_mean, one_line
from vitzoo_hf.format.schema import HEADS, ZooError
from vitzoo_hf.timm_import import import_timm

Kind = TypeVar("Kind")

INITS = ("timm", "kaiming")
WIDEST_HEAD = 1_000_000  # a damaged row must not ask for all memory
NOT_OF_THE_MODEL = frozenset(
    {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "checkpoint_path",
        "cache_dir",
        "scriptable",
        "exportable",
        "no_jit",
        "device",
        "dtype",
    }
)
"""Arguments of `timm.create_model` that read files or place the model, which no row may give."""


def create(
    architecture: str,
    args: Mapping[str, object],
    *,
    head: str = "linear",
    head_hidden: int | None = None,
    init: str = "timm",
    seed: int | None = None,
) -> nn.Module:
    """A timm ViT with fresh weights, in training mode.

    Args:
        architecture: timm name, such as `vit_small_patch16_224`.
        args: keyword arguments of `timm.create_model`, `num_classes` among them.
        head: `linear`, or `mlp` for Linear–ReLU–Linear.
        head_hidden: width of the MLP head's hidden layer; None with a linear head.
        init: `timm` keeps timm's initialisation; `kaiming` draws every Linear and Conv2d from
            `kaiming_normal_` with biases 0.01, and an MLP head from torch's default, as in the ViT model zoo.
        seed: seed of the draw, which leaves the global generator unchanged; None draws from the global generator.

    Raises:
        ZooError: for an unknown architecture, head or init, or arguments that timm refuses.

    Example:
        >>> model = create("vit_tiny_patch16_224", dict(img_size=16, patch_size=4, in_chans=1, num_classes=10,
        ...                embed_dim=32, depth=2, num_heads=2), head="mlp", head_hidden=16, seed=0)
        >>> model.head
        Sequential(
          (0): Linear(in_features=32, out_features=16, bias=True)
          (1): ReLU()
          (2): Linear(in_features=16, out_features=10, bias=True)
        )
    """
    # before any draw: a refused call leaves the generators as they were
    _check_head(head, head_hidden)
    if init not in INITS:
        raise ZooError(f"unknown init {init!r}: {did_you_mean(init, INITS)}")
    if seed is None:
        return _build(architecture, args, head, head_hidden, init)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every CUDA generator
        return _build(architecture, args, head, head_hidden, init)


def _build(architecture: str, args: Mapping[str, object], head: str, head_hidden: int | None, init: str) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(architecture):
        raise ZooError(
            f"unknown architecture {architecture!r}: {did_you_mean(architecture, timm.list_models('*vit*'))}"
        )
    foreign = sorted(NOT_OF_THE_MODEL & set(args))
    if foreign:
        raise ZooError(f"{foreign[0]!r} is no argument of a row's architecture: it says where weights come from")
    try:
        model = timm.create_model(architecture, pretrained=False, **args)
    # what wrong arguments raise inside constructors of timm and torch; anything else is a fault and passes
    except (
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        AssertionError,
        AttributeError,
    ) as error:
        raise ZooError(
            f"timm cannot build {architecture!r} with {shown(dict(args), 2_000)}: {one_line(error)}"
        ) from None
    if not isinstance(getattr(model, "head", None), nn.Linear):
        raise ZooError(f"{architecture!r} has no linear `head` to train: a zoo needs num_classes above 0")
    if init == "kaiming":  # before the MLP head, which keeps torch's initialisation
        model.apply(_kaiming)
    if head_hidden is not None:
        features, classes = model.head.in_features, model.head.out_features
        model.head = nn.Sequential(nn.Linear(features, head_hidden), nn.ReLU(), nn.Linear(head_hidden, classes))
    return model


def _kaiming(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.constant_(module.bias, 0.01)


def _check_head(head: str, head_hidden: int | None) -> None:
    if head not in HEADS:
        raise ZooError(f"unknown head {head!r}: {did_you_mean(head, HEADS)}")
    if (head == "mlp") != (head_hidden is not None):
        raise ZooError(
            f"head {head!r} with head_hidden {head_hidden}: only an mlp head has, and needs, a hidden width"
        )
    if head_hidden is not None and not 1 <= head_hidden <= WIDEST_HEAD:
        raise ZooError(f"head_hidden is {head_hidden}; expected 1 to {WIDEST_HEAD:,}")


def module_with(skeleton: nn.Module, layout: Layout, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a skeleton in eval mode, whose parameters are these tensors themselves.

    Raises:
        ZooError: if names or shapes differ from the layout's.
    """
    wrong = [f"{name} is missing" for name in layout.names if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors.keys() - set(layout.names)]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in zip(layout.names, layout.shapes, strict=True)
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        raise ZooError(f"weights do not fit the model: {wrong[0]}; {len(wrong)} tensors differ in all")
    return _twin(skeleton, "", tensors, {})


def _twin(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor], twins: dict[int, nn.Module]) -> nn.Module:
    """A copy of a module tree with other tensors; a submodule that is in two places is copied once."""
    if id(module) in twins:
        return twins[id(module)]
    # neither __init__, which would draw weights, nor deepcopy, which would copy them
    twin = twins[id(module)] = module.__class__.__new__(module.__class__)
    containers = (dict, list, set)
    # a hook that is put on one copy must not fire in another: the dictionaries that hold hooks are copied too
    twin.__dict__ = {
        name: value.copy() if isinstance(value, containers) else value for name, value in module.__dict__.items()
    }
    for name, parameter in module._parameters.items():
        if parameter is not None:
            twin._parameters[name] = nn.Parameter(tensors[prefix + name])
    for name, buffer in module._buffers.items():
        if buffer is not None:
            twin._buffers[name] = tensors[prefix + name]
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = _twin(child, f"{prefix}{name}.", tensors, twins)
    return twin


class _WithoutValues(TorchFunctionMode):
    """Skips filling tensors with values, which on the meta device takes long and does nothing."""

    # what initialisers call: the first ViT-S took 65 ms with these in Python decompositions, 18 without them
    FILLING = frozenset({"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"})

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        filled = args[0] if args else (kwargs or {}).get("tensor")
        if isinstance(filled, Tensor) and filled.is_meta and getattr(func, "__name__", "") in self.FILLING:
            return filled
        return func(*args, **(kwargs or {}))


_most_parameters: ContextVar[int | None] = ContextVar("most_parameters", default=None)


@contextmanager
def bounded(most_parameters: int | None) -> Iterator[None]:
    """Refuse to build a skeleton of more parameters than this; None for no limit.

    The limit is no argument of `skeleton_and_layout`: a skeleton that is there already costs nothing.
    """
    token = _most_parameters.set(most_parameters)
    try:
        yield
    finally:
        _most_parameters.reset(token)


@contextmanager
def _counting_parameters(num_classes: object) -> Iterator[None]:
    """Stop building once there are twice the allowed parameters, whichever argument asks for them."""
    most, thread, count = _most_parameters.get(), get_ident(), 0
    if most is None:
        yield
        return

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        # the linear head is replaced where a row has an MLP head, and may be larger than that
        if parameter is None or get_ident() != thread or getattr(module, "out_features", None) == num_classes:
            return
        count += parameter.numel()
        # twice: some models of timm replace a part after they made it
        if count > 2 * most:
            raise ZooError(f"it has more than the {most} weights of its row")

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


# a zoo has few architectures, so 16 skeletons keep rebuilding from making them anew
@lru_cache(maxsize=16)
def skeleton_and_layout(
    architecture: str, args_json: str, head: str, head_hidden: int | None
) -> tuple[nn.Module, Layout]:
    """A module of this architecture in eval mode and the layout of its flat weights, shared by every caller.

    It is built once an architecture, on the meta device: it holds no weights of its own.
    """
    with torch.device("meta"), _WithoutValues(), _counting_parameters(json.loads(args_json).get("num_classes")):
        model = create(architecture, json.loads(args_json), head=head, head_hidden=head_hidden).eval()
    # a flat vector holds the state dict alone: a buffer outside would stay on the meta device
    unsaved = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    if unsaved:
        raise ZooError(f"{architecture!r} keeps {sorted(unsaved)} outside its state dict; a row could not rebuild it")
    return model, Layout.of(model.state_dict())


def is_plain(model: nn.Module) -> bool:
    """Whether a timm model is the plain pre-norm ViT: learned positions, class token, GELU, no extras."""
    import_timm()
    from timm.layers import Attention, Mlp, PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    if not _is(model, VisionTransformer) or model.cls_token is None or model.pos_embed is None:
        return False
    embed = model.patch_embed
    usual = (
        _is(embed, PatchEmbed)
        and embed.flatten
        and embed.strict_img_size
        and not embed.dynamic_img_pad
        and embed.proj.bias is not None
        and isinstance(model.norm, nn.LayerNorm)
        and len(model.blocks) > 0
        # the batched forward takes one epsilon for every norm
        and model.norm.eps == model.blocks[0].norm1.eps
        and model.global_pool == "token"
        and not (model.no_embed_class or model.num_reg_tokens or model.dynamic_img_size or model.attn_pool)
        and _all_identities(embed.norm, model.norm_pre, model.patch_drop, model.fc_norm)
        and (isinstance(model.head, nn.Linear) or _is_mlp(model.head))
    )
    return usual and all(_is_plain_block(block, Block, Attention, Mlp) for block in model.blocks)


def _is_plain_block(block: nn.Module, kind: type, attention: type, mlp: type) -> bool:
    return (
        _is(block, kind)
        and _is(block.attn, attention)
        and _is(block.mlp, mlp)
        and all(isinstance(norm, nn.LayerNorm) and norm.elementwise_affine for norm in (block.norm1, block.norm2))
        and block.norm1.eps == block.norm2.eps
        and _all_identities(block.ls1, block.ls2, block.attn.q_norm, block.attn.k_norm, block.attn.norm)
        and _all_identities(block.mlp.norm)
        and getattr(block.attn, "gate", None) is None  # timm before 1.0.28 has none
        and _is(block.mlp.act, nn.GELU)
        # the batched forward computes the exact GELU, not the tanh approximation
        and block.mlp.act.approximate == "none"
        and all(part.bias is not None for part in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))
        and block.attn.attn_dim == block.attn.proj.out_features
    )


def _is(module: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a module is of exactly this class: a subclass may compute something else."""
    return type(module) is kind


def _all_identities(*modules: nn.Module) -> bool:
    return all(_is(module, nn.Identity) for module in modules)


def _is_mlp(head: nn.Module) -> bool:
    return isinstance(head, nn.Sequential) and [type(part) for part in head] == [nn.Linear, nn.ReLU, nn.Linear]
