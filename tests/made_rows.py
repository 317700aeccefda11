"""Rows of the weights config that no run trained."""

import numpy as np

from vitzoo_hf.format import schema
from vitzoo_hf.format.encoding import rounded


def make_row(number, size=100, dtype="float32"):
    vector = rounded((np.arange(size, dtype=np.float32) - number) / 64, dtype)
    return {
        "model_id": f"m{number}@1",
        "run_id": f"m{number}",
        "parent_id": None,
        "stage": "pretrain",
        "epoch": 1,
        "is_final": True,
        "dataset": "digits",
        "architecture": "vit_tiny_patch16_224",
        "architecture_args": "{}",
        "head": "linear",
        "head_hidden": None,
        "factor_seed": number,
        "factor_lr": 0.001,
        **dict.fromkeys(schema.RESULTS, 0.5),
        "num_parameters": size,
        "layout": "0" * 16,
        "weights_sha256": schema.weights_sha256(vector),
        "dtype": dtype,
        "provenance": "{}",
        "weights": vector,
    }
