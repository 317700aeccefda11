"""Held-out images that a zoo carries, prepared as its models were trained."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from vitzoo_hf.format.messages import REPAIR
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.tables import LightTables
from vitzoo_hf.images.preparation import normalize


def load_probes(tables: LightTables, prepared: Mapping[str, Any], dataset: str, role: str) -> tuple[Tensor, Tensor]:
    """Images and labels; see `Zoo.probes`.

    Args:
        tables: light configs of the zoo.
        prepared: dataset -> how its images are prepared, as `images` of zoo.json says.
        dataset: a `dataset` of the index.
        role: `test` or `selection`.

    Raises:
        ZooError: if the zoo does not carry them.
    """
    import datasets

    name = tables.files.name
    every_dataset = tables.read("probes", role)
    known = [] if every_dataset is None else sorted(set(every_dataset["dataset"].to_pylist()))
    if every_dataset is None or dataset not in known:
        raise ZooError(f"{name} carries no {role} images of {dataset!r}; it has them of: {known or 'none'}")
    table = every_dataset.filter(pc.equal(every_dataset["dataset"], dataset))
    record = prepared.get(dataset)
    if record is None:
        raise ZooError(f"zoo.json of {name} does not say how images of {dataset!r} are prepared; {REPAIR}")
    images = datasets.Dataset(table).with_format("numpy")["image"][:]
    pixels = torch.from_numpy(np.stack([np.atleast_3d(image) for image in images])).permute(0, 3, 1, 2)
    return normalize(pixels, record["mean"], record["std"]), torch.tensor(table["label"].to_pylist())
