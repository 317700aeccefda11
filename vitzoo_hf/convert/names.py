"""Translate tensor names of other libraries to timm's and back, and find the architecture of a state dict.

Known are timm's names, with the prefixes of wrappers, and the names of ViT models of transformers 4 and 5. The
architecture comes from the caller, a config.json, or the shapes where they leave no doubt.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitzoo_hf.convert.rows import LoadedModel
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture

# wrappers: training frameworks, DataParallel, torch.compile; the last is a module that holds a ViT
PREFIXES = ("model.", "module.", "_orig_mod.", "vit.")
# the standard sizes of ViT all have heads of this width
HEAD_DIM = 64
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}

FROM_TRANSFORMERS = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"layers\.(\d+)\.attention\.(q|k|v)_proj\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.attention\.o_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"layers\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"blocks.\1.mlp.\2.\3"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"classifier\.(\w+)", r"head.\1"),
)


def to_timm(
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    architecture: str | None = None,
    architecture_args: Mapping[str, object] | None = None,
    config: Mapping[str, object] | None = None,
) -> LoadedModel:
    """Bring a state dict under timm's names, in timm's order, and find its architecture.

    Args:
        tensors: tensors of a file; half precision is widened to float32, which is noted in `flags`.
        name: name of the checkpoint in messages.
        architecture: timm name, if it is known; further arguments follow from the shapes.
        architecture_args: arguments of `timm.create_model` that do not follow from the shapes.
        config: a config.json of timm or transformers that lies beside the checkpoint.

    Raises:
        ZooError: if names or shapes are not exactly those of the architecture, or it cannot be found out.
    """
    flags: list[str] = []
    renamed = {key: _float32(key, tensor, name, flags) for key, tensor in _timm_names(tensors, name).items()}
    config_name, config_args = _architecture_of_config(config or {}, name, flags)
    architecture = architecture or config_name
    user_args = dict(architecture_args or {})
    for key, value in user_args.items():
        if key in config_args and config_args[key] != value:
            raise ZooError(f"{name} has {key} {config_args[key]!r} by its config.json, and {value!r} was given")
    args = config_args | user_args
    head, hidden = _head(renamed, name)
    shape_name, shape_args = _architecture_of_shapes(renamed, name, needs_name=architecture is None)
    _check_sizes(args, shape_args, name)
    architecture = architecture or shape_name
    args = _fitting(architecture, shape_args, args, head, hidden, renamed)
    if {"embed_dim", "depth"} & args.keys() and "num_heads" not in args:
        size = f"width {shape_args['embed_dim']}, depth {shape_args['depth']}"
        raise ZooError(
            f"{name} is no {architecture} as timm makes it ({size}), and its heads cannot be seen from its weights:"
            " give num_heads in --architecture-args"
        )
    layout = Architecture(architecture, args, head, hidden).layout
    _compare(renamed, layout, architecture, name)
    # the order decides the flat vector, and so its hash
    ordered = {key: renamed[key].contiguous() for key in layout.names}
    return LoadedModel(ordered, architecture, args, head, hidden, flags)


def _timm_names(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Rename tensors as timm does, after removing prefixes in any order and number."""
    stripped = dict(tensors)
    while any(all(key.startswith(prefix) for key in stripped) for prefix in PREFIXES[:3]) and stripped:
        for prefix in PREFIXES[:3]:
            stripped = _without_prefix(stripped, prefix)
    if any("embeddings." in key for key in stripped):
        return _from_transformers(stripped, name)
    # last: names of transformers, some of which begin with it, were brought to their own table above
    return _without_prefix(stripped, PREFIXES[3])


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not all(key.startswith(prefix) for key in tensors):
        return tensors
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _from_transformers(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(("pooler.", "vit.pooler.")):
            raise ZooError(f"{name} has a pooler, which timm's ViT has not: save it with add_pooling_layer=False")
        bare = key.removeprefix("vit.")
        for pattern, replacement in FROM_TRANSFORMERS:
            if re.fullmatch(pattern, bare, re.ASCII):
                new = re.sub(pattern, replacement, bare, flags=re.ASCII)
                # version 4 writes `query`, version 5 `q_proj`; one letter serves both
                new = re.sub(r"\.attn\.([qkv])\w*\.", r".attn.\1.", new)
                break
        else:
            raise ZooError(f"{name} has a tensor {key!r} that no ViT of transformers has")
        if new in renamed:
            raise ZooError(f"{name} has {key!r} under another name too: keep one of the two")
        renamed[new] = tensor
    return _joined(renamed, name)


def _joined(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Concatenate query, key and value of each block to timm's one `qkv`."""
    joined: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"blocks\.(.+)\.attn\.([qkv])\.(\w+)", key)
        if match is None:
            joined[key] = tensor
        else:
            parts.setdefault((match[1], match[3]), {})[match[2]] = tensor
    for (block, kind), projections in parts.items():
        if len(projections) < 3:
            raise ZooError(f"{name} lacks one of query, key and value ({kind}) of block {block}")
        if len({tensor.shape for tensor in projections.values()}) > 1 or projections["q"].dim() == 0:
            raise ZooError(f"{name}: query, key and value ({kind}) of block {block} differ in shape")
        # torch.cat would widen the narrower type without a word
        if len({tensor.dtype for tensor in projections.values()}) > 1:
            raise ZooError(f"{name}: query, key and value ({kind}) of block {block} differ in type")
        joined[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([projections[part] for part in "qkv"])
    return joined


def _float32(key: str, tensor: Tensor, name: str, flags: list[str]) -> Tensor:
    if not tensor.is_floating_point():
        raise ZooError(f"{name}: {key} is {tensor.dtype}, not a floating-point tensor")
    if tensor.dtype == torch.float32:
        return tensor
    wide = tensor.float()
    # float64 is refused where it would be rounded: the row promises the weights of the source
    if tensor.dtype == torch.float64 and not torch.equal(wide.double(), tensor):
        raise ZooError(f"{name}: {key} is float64, which float32 cannot hold exactly: convert it first")
    how = "which float32 holds exactly" if tensor.dtype == torch.float64 else "widened to float32"
    flag = f"stored as {str(tensor.dtype).removeprefix('torch.')}, {how}"
    if flag not in flags:
        flags.append(flag)
    return wide


def _head(tensors: Mapping[str, Tensor], name: str) -> tuple[str, int | None]:
    if "head.weight" in tensors:
        return "linear", None
    if "head.2.weight" in tensors and "head.0.weight" in tensors and tensors["head.0.weight"].dim() == 2:
        return "mlp", int(tensors["head.0.weight"].shape[0])
    raise ZooError(f"{name} has no head: `head.weight`, or `head.0` and `head.2` of an MLP, are needed for a row")


def _architecture_of_shapes(
    tensors: Mapping[str, Tensor], name: str, *, needs_name: bool
) -> tuple[str, dict[str, int | float]]:
    """Read architecture and arguments from the shapes of tensors."""
    try:
        patches = tensors["patch_embed.proj.weight"]
        width, channels, patch, _ = patches.shape
        tokens = tensors["pos_embed"].shape[1]
        blocks = {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")}
        depth = len(blocks)
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        last = tensors.get("head.weight", tensors.get("head.2.weight"))
        classes = last.shape[0] if last is not None else 0
    except (KeyError, ValueError, IndexError):
        raise ZooError(f"{name} is no ViT: it lacks patch_embed.proj.weight, pos_embed or blocks") from None
    # a class token takes one of the positions; without a further one there is no patch
    if blocks != set(range(depth)) or not patches.numel() or tokens <= ("cls_token" in tensors):
        raise ZooError(f"{name} is no ViT: its blocks are not numbered from 0, or it has no patches")
    side = round((tokens - ("cls_token" in tensors)) ** 0.5)
    args: dict[str, int | float] = {"img_size": side * patch, "patch_size": patch, "in_chans": channels}
    args |= {"num_classes": classes, "embed_dim": width, "depth": depth, "mlp_ratio": hidden / width}
    if not needs_name:
        return "", args
    # the number of heads leaves no trace in the shapes: only standard sizes of ViT have a known one
    if width not in SIZES or width // HEAD_DIM * HEAD_DIM != width or depth != (24 if width == 1024 else 12):
        raise ZooError(
            f"{name}: how many heads a ViT of width {width} and depth {depth} has cannot be seen from its weights:"
            " give the architecture, such as --architecture vit_small_patch16_224, and --architecture-args"
        )
    return f"vit_{SIZES[width]}_patch{patch}_224", args


def _check_sizes(args: Mapping[str, object], shape_args: Mapping[str, int | float], name: str) -> None:
    """Refuse arguments that contradict the shapes before a model of that size, which may be huge, is built."""
    for key in ("depth", "embed_dim"):
        if args.get(key) is not None and args[key] != shape_args[key]:
            raise ZooError(f"{name} has {key} {shape_args[key]}; {args[key]!r} is what its config or table says")
    heads = args.get("num_heads")
    if heads is not None and not (isinstance(heads, int) and heads > 0):
        raise ZooError(f"{name} is to have num_heads {heads!r}; expected a whole number above 0")


def _fitting(
    architecture: str,
    shape_args: Mapping[str, int | float],
    given_args: Mapping[str, object],
    head: str,
    hidden: int | None,
    tensors: Mapping[str, Tensor],
) -> dict[str, object]:
    """Find the fewest arguments that give the shapes: the given ones, and those where the default differs."""
    args = dict(given_args) | {"num_classes": shape_args["num_classes"]}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    # added one at a time, until the layout fits: arguments at their default stay out of the row
    for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "mlp_ratio"):
        try:
            layout = Architecture(architecture, args, head, hidden).layout
        except ZooError:
            layout = None
        if layout is not None and dict(zip(layout.names, layout.shapes, strict=True)) == shapes:
            break
        if name not in args and not _is_default(architecture, args, name, shape_args[name], head, hidden):
            args[name] = shape_args[name]
    return args


def _is_default(
    architecture: str, args: Mapping[str, object], name: str, value: int | float, head: str, hidden: int | None
) -> bool:
    try:
        plain = Architecture(architecture, args, head, hidden).layout
        return plain == Architecture(architecture, {**args, name: value}, head, hidden).layout
    except ZooError:
        return False


def _architecture_of_config(
    config: Mapping[str, Any], name: str, flags: list[str]
) -> tuple[str | None, dict[str, object]]:
    """Read architecture and arguments from a config.json; None without either."""
    if isinstance(config.get("architecture"), str):
        model_args = config.get("model_args") or {}
        if not isinstance(model_args, Mapping):
            raise ZooError(f"the config.json of {name} has model_args that are no object")
        return config["architecture"].split(".")[0], dict(model_args)
    if config.get("model_type") != "vit" and "ViT" not in str(config.get("architectures")):
        return None, {}
    try:
        args = {
            "img_size": config.get("image_size", 224),
            "patch_size": config.get("patch_size", 16),
            "in_chans": config.get("num_channels", 3),
            "embed_dim": config.get("hidden_size", 768),
            "depth": config.get("num_hidden_layers", 12),
            "num_heads": config.get("num_attention_heads", 12),
            "mlp_ratio": config.get("intermediate_size", 3072) / config.get("hidden_size", 768),
            "qkv_bias": config.get("qkv_bias", True),
        }
    except (TypeError, ArithmeticError):
        raise ZooError(f"the config.json of {name} is not one of a ViT: its sizes are no numbers") from None
    if config.get("hidden_act", "gelu") != "gelu":
        raise ZooError(f"{name} uses {config['hidden_act']!r}; zoos hold ViTs with gelu")
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ZooError(f"the config.json of {name} has layer_norm_eps {eps!r}; expected a number from 0 to 1")
    # timm builds every ViT with 1e-6, so outputs differ a little from those in the source
    if abs(eps - 1e-6) > 1e-9:
        flags.append(f"layer_norm_eps {eps} in the source, 1e-6 here")
    return "vit_base_patch16_224", args


def _compare(tensors: Mapping[str, Tensor], layout: Layout, architecture: str, name: str) -> None:
    expected = dict(zip(layout.names, layout.shapes, strict=True))
    wrong = [f"it lacks {key}" for key in expected if key not in tensors]
    wrong += [f"{key} does not belong to it" for key in tensors if key not in expected]
    wrong += [
        f"{key} has shape {tuple(tensors[key].shape)}, not {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if wrong:
        raise ZooError(f"{name} is not {architecture}: {wrong[0]} ({len(wrong)} tensors differ)")


def to_transformers(
    tensors: Mapping[str, Tensor], *, architecture: str, architecture_args: Mapping[str, object], head: str
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Make the config.json and tensors that transformers 4 and 5 load as `ViTForImageClassification`.

    Args:
        tensors: timm's tensor name -> tensor.
        architecture: timm name.
        architecture_args: arguments of `timm.create_model`.
        head: `linear`; transformers has no MLP head.

    Raises:
        ZooError: for an MLP head, or a ViT that transformers does not have.
    """
    if head != "linear":
        raise ZooError("transformers has no ViT with an MLP head: choose rows with --where head=linear")
    _, shape_args = _architecture_of_shapes(tensors, architecture, needs_name=False)
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        renamed |= _for_transformers(key, tensor, architecture)
    heads = architecture_args.get("num_heads") or _heads_of(architecture, architecture_args)
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": shape_args["img_size"],
        "patch_size": shape_args["patch_size"],
        "num_channels": shape_args["in_chans"],
        "hidden_size": shape_args["embed_dim"],
        "num_hidden_layers": shape_args["depth"],
        "num_attention_heads": heads,
        # the ratio was a division, so its product may miss the integer by a rounding error
        "intermediate_size": round(shape_args["mlp_ratio"] * shape_args["embed_dim"]),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(number): f"LABEL_{number}" for number in range(int(shape_args["num_classes"]))},
        "label2id": {f"LABEL_{number}": number for number in range(int(shape_args["num_classes"]))},
        "torch_dtype": "float32",
    }
    return config, renamed


def _for_transformers(key: str, tensor: Tensor, architecture: str) -> dict[str, Tensor]:
    if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", key):
        # timm stacks query, key and value along the first axis, in this order
        parts = tensor.chunk(3)
        start = f"vit.encoder.layer.{match[1]}.attention.attention"
        return {
            # chunks are views of one tensor, which safetensors does not save
            f"{start}.{part}.{match[2]}": value.contiguous()
            for part, value in zip(("query", "key", "value"), parts, strict=True)
        }
    for pattern, new in TO_TRANSFORMERS:
        if re.fullmatch(pattern, key):
            return {re.sub(pattern, new, key): tensor.contiguous()}
    raise ZooError(f"{architecture} has a tensor {key!r}, which transformers' ViT has not")


TO_TRANSFORMERS = (
    (r"cls_token", "vit.embeddings.cls_token"),
    (r"pos_embed", "vit.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"vit.embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"vit.encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"vit.encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"vit.encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"vit.encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"vit.encoder.layer.\1.output.dense.\2"),
    (r"norm\.(\w+)", r"vit.layernorm.\1"),
    (r"head\.(\w+)", r"classifier.\1"),
)


def _heads_of(architecture: str, args: Mapping[str, object]) -> int:
    model: Any = Architecture(architecture, args).skeleton
    return int(model.blocks[0].attn.num_heads)
