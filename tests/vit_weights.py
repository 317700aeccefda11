"""Small ViTs with weights that no symmetry leaves alone, and their forward in float64 by timm."""

import torch

from vitzoo_hf.apply.rebasin.symmetries import sizes_of, to_tensors
from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.format.schema import canonical_json
from vitzoo_hf.models.architecture import Architecture

ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3}


def vit_row(seed, *, width=12, heads=3, depth=2, mlp_ratio=2, head_hidden=None):
    """A row of a random ViT: every tensor is drawn, norms around 1 and all biases among them."""
    args = {**ARGS, "embed_dim": width, "num_heads": heads, "depth": depth, "mlp_ratio": mlp_ratio}
    head = "linear" if head_hidden is None else "mlp"
    layout = Architecture("vit_tiny_patch16_224", args, head, head_hidden).layout
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        values = torch.randn(shape, generator=generator) * 0.4
        parts.append((values + 1 if "norm" in name and name.endswith("weight") else values).flatten())
    return {
        "model_id": f"random{seed}@0",
        "architecture": "vit_tiny_patch16_224",
        "architecture_args": canonical_json(args),
        "head": head,
        "head_hidden": head_hidden,
        "num_parameters": layout.num_parameters,
        "layout": layout.fingerprint,
        "dtype": "float32",
        "provenance": "{}",
        "weights": torch.cat(parts),
    }


def tensors_of(row):
    return to_tensors(row["weights"], sizes_of(row)[1])


def logits_of(row, vector):
    """Logits of timm's own module, in float64, on the same random images."""
    layout = sizes_of(row)[1]
    model = Architecture.of(row).module(unflatten(vector.double(), layout))
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    with torch.inference_mode():
        return model(images)
