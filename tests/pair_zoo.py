"""Tables of models at given places."""

import itertools

import numpy as np
import pandas as pd


def between(points):
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def zoo_of(points, behaviour, parent="p@1", **factors):
    """Tables of models at given places in weight space, whose disagreement is the distance of `behaviour`."""
    names = [f"r{i}@1" for i in range(len(points))]
    fixed = {"model_id": names, "parent_id": parent, "stage": "finetune", "is_final": True, "head": "linear"}
    index = pd.DataFrame(fixed | {f"factor_{name}": values for name, values in factors.items()})
    far, unlike = between(points), between(behaviour)
    rows = [
        {"model_a": names[i], "model_b": names[j], "weight_l2": far[i, j], "agreement": 1 - unlike[i, j]}
        for i, j in itertools.combinations(range(len(points)), 2)
    ]
    return pd.DataFrame(rows), index
