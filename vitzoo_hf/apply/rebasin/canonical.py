"""Canonical forms of plain ViTs: weights of the same function for which more symmetries become orthogonal.

`fold_norms` moves the scales and shifts of LayerNorms into the layers behind them: the residual stream can then be
rotated, as Ashkboos et al. 2024 (SliceGPT) do with RMSNorm, and Theus et al. 2025 for merging transformers.
`balance_heads` selects, among all invertible maps inside a head, those with the least ‖Q‖² + ‖K‖² and ‖V‖² + ‖O‖².
The remaining freedom is orthogonal. So orthogonal maps align models over all invertible maps, with the best
conditioning.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.apply.rebasin.symmetries import (
    HeadParts,
    Sizes,
    Tensors,
    check_families,
    head_parts,
    set_head_parts,
    to_tensors,
    to_vector,
)
from vitzoo_hf.format.layout import Layout

WRITERS = ("attn.proj", "mlp.fc2")


def canonical(
    vector: Float[Tensor, " D"], layout: Layout, sizes: Sizes, families: Sequence[str]
) -> Float[Tensor, " D"]:
    """The form of a model in which some families of symmetries are aligned; its function is the same to rounding.

    Args:
        vector: weights of a plain ViT.
        layout: layout of the vector.
        sizes: sizes of the ViT.
        families: `rotation` folds norms, `invertible` balances heads; other families need no change.

    Raises:
        ZooError: for families that `check_families` refuses.
    """
    tensors = to_tensors(vector, layout)
    prepare(tensors, sizes, families)
    return to_vector(tensors, vector)


def prepare(tensors: Tensors, sizes: Sizes, families: Sequence[str]) -> None:
    """Bring float64 tensors into the form in which some families of symmetries are aligned."""
    families = check_families(families)
    # norms first: balancing reads the weights that folding changes
    if "rotation" in families:
        fold_norms(tensors)
    if "invertible" in families:
        balance_heads(tensors, sizes)


def fold_norms(tensors: Tensors) -> None:
    """Give every LayerNorm scale 1 and shift 0, and remove all means that LayerNorm subtracts anyway.

    The scale of a norm moves into the columns of the next layer, and its shift into the bias. The mean over channels
    of everything that writes into the stream is removed, and the mean over columns of everything that reads from it.
    The class token and the bias of patches move into the positions, because they act only as a sum.
    """
    blocks = sorted({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    readers = [(f"blocks.{block}.norm1", f"blocks.{block}.attn.qkv") for block in blocks]
    readers += [(f"blocks.{block}.norm2", f"blocks.{block}.mlp.fc1") for block in blocks]
    readers += [("norm", "head.0" if "head.0.weight" in tensors else "head")]
    for norm, layer in readers:
        scale, shift = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
        weight = tensors[f"{layer}.weight"]
        # before the weight is scaled: W (s x + b) = (W s) x + W b
        tensors[f"{layer}.bias"] = tensors[f"{layer}.bias"] + weight @ shift
        weight = weight * scale
        # normalised inputs have mean zero, so the mean of a row has no effect
        tensors[f"{layer}.weight"] = weight - weight.mean(1, keepdim=True)
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = torch.ones_like(scale), torch.zeros_like(shift)
    positions = tensors["pos_embed"].clone()
    # timm puts the class token at position 0
    positions[:, :1] += tensors["cls_token"]
    positions[:, 1:] += tensors["patch_embed.proj.bias"]
    tensors["pos_embed"] = positions - positions.mean(2, keepdim=True)
    for name in ("cls_token", "patch_embed.proj.bias"):
        tensors[name] = torch.zeros_like(tensors[name])
    # LayerNorm subtracts the mean over channels, so writers need none
    for layer in ("patch_embed.proj", *(f"blocks.{block}.{writer}" for block in blocks for writer in WRITERS)):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            tensors[name] = tensors[name] - tensors[name].mean(0, keepdim=True)


def balance_heads(tensors: Tensors, sizes: Sizes) -> None:
    """Make Q Qᵀ = K Kᵀ and V Vᵀ = Oᵀ O in every head, by the singular values of the products Qᵀ K and O V."""
    for block in range(sizes.depth):
        query, key, value, output = head_parts(tensors, block, sizes.heads)
        key, value = key.clone(), value.clone()
        name = f"blocks.{block}.attn.proj.bias"
        # The bias of values moves to proj, because the weights of attention sum to 1. The bias of keys adds one
        # number to all logits of a query, which softmax ignores.
        tensors[name] = tensors[name] + (output @ value[..., -1:]).sum(0)[:, 0]
        key[..., -1], value[..., -1] = 0, 0
        query, key = _balanced(query, key)
        value, output = _balanced(value, output.mT)
        set_head_parts(tensors, block, HeadParts(query, key, value, output.mT))


def _balanced(
    first: Float64[Tensor, "h k n"], second: Float64[Tensor, "h k m"]
) -> tuple[Float64[Tensor, "h k n"], Float64[Tensor, "h k m"]]:
    """Other factors of the product firstᵀ second: S^½ Uᵀ and S^½ Vᵀ of its singular value decomposition."""
    # QR first, so that the decomposition is of k × k matrices, not of n × m
    first_basis, first_inner = torch.linalg.qr(first.mT)
    second_basis, second_inner = torch.linalg.qr(second.mT)
    left, values, right = torch.linalg.svd(first_inner @ second_inner.mT)
    # equal shares of the singular values give both factors the least sum of squared norms
    root = values.sqrt()[..., None, :]
    return (first_basis @ (left * root)).mT, (second_basis @ (right.mT * root)).mT
