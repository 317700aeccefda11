"""Zoos of weights that tests draw, and damage to them."""

import pytest
import torch
from made_rows import make_row

from vitzoo_hf.format import schema
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.publish import folder as zoo_folder
from vitzoo_hf.zoo import Zoo

ARGUMENTS = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}
ARCHITECTURE = ("vit_tiny_patch16_224", ARGUMENTS, "linear", None)
LAYOUT = Architecture(*ARCHITECTURE).layout


def draw(*shape, seed=0):
    return torch.randn(*shape, LAYOUT.num_parameters, generator=torch.Generator().manual_seed(seed))


def write(folder, vectors, *, binary=True, dtype="float32", parents=None):
    """A zoo of these vectors."""
    patch = pytest.MonkeyPatch()
    patch.setattr(schema, "LIST_LIMIT", 100 if binary else 10**9)
    rows = []
    for number, vector in enumerate(vectors):
        row = make_row(number, LAYOUT.num_parameters, dtype)
        held = torch.as_tensor(vector).to(getattr(torch, dtype)).float().numpy()
        row |= {"architecture_args": schema.canonical_json(ARGUMENTS), "layout": LAYOUT.fingerprint, "weights": held}
        row |= {"weights_sha256": schema.weights_sha256(held), "parent_id": parents[number] if parents else None}
        rows.append(row)
    manifest = {
        "format": schema.FORMAT_VERSION,
        "name": "drawn",
        "blueprint_fingerprint": None,
        "factors": {"seed": "int", "lr": "float"},
        "images": {},
        "splits": {"by": "run", "seed": 0, "train": 1.0, "validation": 0.0, "test": 0.0},
        "missing_runs": {},
    }
    written = {"train": zoo_folder.Rows(len(rows), LAYOUT.num_parameters, iter(rows))}
    try:
        zoo_folder.write_zoo(folder, manifest, written, {}, "")
    finally:
        patch.undo()
    return Zoo(folder)


def epochs_zoo(folder):
    """One parent and a run of four epochs that goes away from it in a straight line, in mixed order."""
    start, away = draw(1)[0], draw(1, seed=1)[0]
    rows = []
    for number, (run, epoch, parent) in enumerate([("p", 9, None), *[("c", epoch, "p@9") for epoch in (2, 0, 3, 1)]]):
        row = make_row(number, LAYOUT.num_parameters)
        held = (start + (0.1 * epoch if run == "c" else 0) * (away + start)).numpy()
        row |= {"model_id": f"{run}@{epoch}", "run_id": run, "epoch": epoch, "parent_id": parent, "weights": held}
        row |= {"architecture_args": schema.canonical_json(ARGUMENTS), "layout": LAYOUT.fingerprint}
        rows.append(row | {"weights_sha256": schema.weights_sha256(held), "is_final": epoch in (3, 9)})
    manifest = {"format": schema.FORMAT_VERSION, "name": "epochs", "blueprint_fingerprint": None, "images": {}}
    manifest |= {"factors": {"seed": "int", "lr": "float"}, "missing_runs": {}}
    manifest |= {"splits": {"by": "run", "seed": 0, "train": 1.0, "validation": 0.0, "test": 0.0}}
    written = {"train": zoo_folder.Rows(len(rows), LAYOUT.num_parameters, iter(rows))}
    zoo_folder.write_zoo(folder, manifest, written, {}, "")
    return Zoo(folder)


def damage(zoo, model_id, folder):
    """Zero 200 bytes in the weights of a model."""
    held = zoo.row(model_id)["weights"].tobytes()
    shard = next(file for file in folder.rglob("*.parquet") if held in file.read_bytes())
    data = bytearray(shard.read_bytes())
    start = data.index(held)
    data[start + 400 : start + 600] = bytes(200)
    shard.write_bytes(data)
