"""Write a model as a folder that `ViTForImageClassification.from_pretrained` of transformers 4 and 5 loads.

Models that would load there but compute something else are refused: another pooling, activation or normalization.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vitzoo_hf.convert.names import to_transformers
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.publish.place import swap

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

BLOCK_TENSORS = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")


def check_known_to_transformers(architecture: str, args: Mapping[str, object], head: str) -> float:
    """Refuse a model that the ViT of transformers would compute differently.

    Args:
        architecture: timm name.
        args: arguments of `timm.create_model`.
        head: `linear` or `mlp`.

    Returns:
        Epsilon of the model's layer normalizations.

    Raises:
        ZooError: if transformers' ViT would compute something else.
    """
    if head != "linear":
        raise ZooError("transformers has no ViT with an MLP head: choose models with --where head=linear")
    model: Any = Architecture(architecture, args, head).skeleton
    odd = _oddities(model)
    if odd:
        raise ZooError(f"transformers' ViT cannot compute {architecture} with {dict(args)}: it has {odd[0]}")
    return float(model.norm.eps)


def _oddities(model: Any) -> list[str]:
    """List what a timm ViT has that the ViT of transformers lacks."""
    if type(model).__name__ != "VisionTransformer":
        return [f"the structure of {type(model).__name__}"]
    odd = _tensor_oddities(model)
    patches = model.patch_embed
    deviations = {
        f"global_pool {model.global_pool!r}": model.global_pool != "token",
        "an image that is not square": patches.grid_size[0] != patches.grid_size[1],
        "patches that are not square": patches.patch_size[0] != patches.patch_size[1],
        "a class token without position": model.no_embed_class,
        "a normalization of patches": not isinstance(patches.norm, nn.Identity),
        "a normalization before the blocks": not isinstance(model.norm_pre, nn.Identity),
        "a normalization before the head": not isinstance(model.fc_norm, nn.Identity),
    }
    odd += [what for what, is_so in deviations.items() if is_so]
    norms = [model.norm]
    for block in model.blocks:
        attention: Any = getattr(block, "attn", None)
        if type(block).__name__ != "Block" or type(attention).__name__ != "Attention":
            odd.append(f"blocks of the kind {type(block).__name__}")
            continue
        norms += [block.norm1, block.norm2]
        # exact type: a subclass or the tanh approximation computes another function
        if type(block.mlp.act) is not nn.GELU or block.mlp.act.approximate != "none":
            odd.append(f"the activation {block.mlp.act}")
        # transformers divides by the root of the head width, without an option
        elif abs(attention.scale - attention.head_dim**-0.5) > 1e-12:
            odd.append(f"attention scaled by {attention.scale}")
        elif not all(isinstance(part, nn.Identity) for part in (attention.q_norm, attention.k_norm, block.mlp.norm)):
            odd.append("normalizations within its blocks")
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or len({norm.eps for norm in norms}) > 1:
        odd.append("other normalizations than layer norms of one epsilon")
    return odd


def _tensor_oddities(model: Any) -> list[str]:
    """List the tensors that a timm ViT lacks, or has too many, compared with the ViT of transformers."""
    names = set(model.state_dict())
    layers = ["patch_embed.proj", "norm", "head"]
    for number in range(len(model.blocks)):
        layers += [f"blocks.{number}.{part}" for part in BLOCK_TENSORS]
    expected = {"cls_token", "pos_embed"} | {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    expected |= {f"blocks.{number}.attn.qkv.weight" for number in range(len(model.blocks))}
    # `qkv_bias` is an option of both libraries, so these tensors may be absent
    biases = {f"blocks.{number}.attn.qkv.bias" for number in range(len(model.blocks))}
    absent = sorted(expected - names)
    unknown = sorted(names - expected - biases)
    return [f"no {name}" for name in absent] + [f"a tensor {name}" for name in unknown]


def write_transformers_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    architecture: Architecture,
    metadata: Mapping[str, str],
) -> None:
    """Write config.json and model.safetensors; the folder appears whole.

    Args:
        folder: the folder to write; an earlier export in it is replaced.
        tensors: timm's tensor name -> tensor.
        architecture: the network, with a linear head.
        metadata: entries for the header of the safetensors file.

    Raises:
        ZooError: if transformers has no such model, the folder holds something else, or it cannot be written.
    """
    name, args, head = architecture.name, architecture.args, architecture.head
    epsilon = check_known_to_transformers(name, args, head)
    config, renamed = to_transformers(tensors, architecture=name, architecture_args=args, head=head)
    # some ViTs of timm have another epsilon than the 1e-6 of `to_transformers`
    config["layer_norm_eps"] = epsilon
    check_replaceable(folder)
    fresh = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
        # mkdtemp makes folders that only their owner can read
        fresh.chmod(0o755)
        (fresh / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        # transformers refuses a file without the format `pt`
        save_file(renamed, fresh / WEIGHTS, metadata={**metadata, "format": "pt"})
        (fresh / WEIGHTS).chmod(0o644)
        swap(fresh, folder)
    except (OSError, SafetensorError) as error:
        raise ZooError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export, since writing there would delete it.

    Raises:
        ZooError: if the folder exists and holds anything else.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ZooError(f"{folder} exists and is no folder: choose another place, or remove it yourself")
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in (CONFIG, WEIGHTS))
    if foreign:
        raise ZooError(f"{folder} exists and holds {foreign[0]!r}: choose another folder, or remove it yourself")
