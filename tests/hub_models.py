"""Models for a Hub on this machine: what their files hold, and how they get there."""

import functools
import json

from vitzoo_hf.models.vit import create

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 10}
CONFIG = json.dumps({"architecture": NAME, "model_args": ARGS}).encode()


@functools.cache
def state(seed):
    return dict(create(NAME, ARGS, seed=seed).state_dict())


def publish(hub, name, files):
    if f"models/{name}" not in hub.repositories:
        hub.create(f"models/{name}")
    for path, content in files.items():
        hub.put(f"models/{name}", path, content)
    return hub.repositories[f"models/{name}"]
