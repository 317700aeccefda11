"""Colour reliance of twenty models of ViT-S size in bounded memory."""

import pytest
from peak_memory import peak_mb

LIMIT_MB = 4000

PROGRAM = """
import io
import sys
from pathlib import Path
import numpy as np
from PIL import Image
import side_by_side
from vitzoo_hf.format import schema
from vitzoo_hf.apply.distribution_inference.reliance import world_behaviour
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.publish.folder import Rows, write_zoo

folder = Path(sys.argv[1]) / "zoo"
large = ("vit_small_patch16_224", {"num_classes": 2}, "linear", None)
record = {"size": 224, "channels": 3, "mean": 0.5, "std": 0.5, "class_names": ["0", "1"]}
manifest = {
    "format": schema.FORMAT_VERSION, "name": "random", "blueprint_fingerprint": None, "factors": {"seed": "int"},
    "images": {"none": record | {"worlds": [{}]}}, "missing_runs": {},
    "splits": {"by": "run", "seed": 0, "train": 1.0, "validation": 0.0, "test": 0.0},
}
probes = []
for position in range(16):
    pixels = np.zeros((224, 224, 3), np.uint8)
    pixels[..., position % 2] = np.random.default_rng(position).integers(0, 256, (224, 224))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    probes.append({"dataset": "none", "position": position, "label": position % 2, "image": image})
rows = side_by_side.random_rows(large, 20)
largest = Architecture(*large).layout.num_parameters
write_zoo(folder, manifest, {"train": Rows(20, largest, rows)}, {"test": probes}, "")
table = world_behaviour(Zoo(folder), progress=False)
assert len(table) == 20
assert table["colour_reliance"].between(0, 1).all()
assert (table["colour_reliance"] > 0).all()
"""


@pytest.mark.slow
def test_colour_reliance_of_twenty_large_models_fits_into_four_gigabytes(tmp_path):
    assert peak_mb(PROGRAM, tmp_path, tmp_path) < LIMIT_MB
