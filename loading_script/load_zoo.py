"""Open a zoo and rebuild its models with `datasets`, `timm` and `torch` alone.

    python load_zoo.py PATH_OR_ID

rebuilds every final model and compares its test accuracy, recomputed on the images the zoo carries, with the stored
one. Beside a CPU build of torch, timm needs a torchvision that loads; `import vitzoo_hf.vit` shows a way around.
"""

import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from datasets import concatenate_datasets, load_dataset
from huggingface_hub import hf_hub_download
from torch import nn


def open_rows(zoo, config="weights"):
    """All rows of a config, whatever their split."""
    return concatenate_datasets(list(load_dataset(zoo, config).values()))


def rebuild(row):
    """A live timm ViT in eval mode from one row."""
    model = timm.create_model(row["architecture"], **json.loads(row["architecture_args"]))
    if row["head_hidden"]:
        features, classes = model.head.in_features, model.head.out_features
        model.head = nn.Sequential(
            nn.Linear(features, row["head_hidden"]), nn.ReLU(), nn.Linear(row["head_hidden"], classes)
        )
    weights = row["weights"]
    vector = np.frombuffer(weights, "<f4") if isinstance(weights, bytes) else np.asarray(weights, np.float32)
    names, tensors = zip(*model.state_dict().items(), strict=True)
    parts = torch.from_numpy(vector.copy()).split([tensor.numel() for tensor in tensors])
    views = {name: part.view(tensor.shape) for name, part, tensor in zip(names, parts, tensors, strict=True)}
    model.load_state_dict(views)
    return model.eval()


def held_out_images(zoo, dataset):
    """Test images as the models are fed them, and labels; `zoo.json` has mean and std of each dataset."""
    manifest = Path(zoo, "zoo.json")
    if not manifest.is_file():
        manifest = Path(hf_hub_download(zoo, "zoo.json", repo_type="dataset"))
    record = json.loads(manifest.read_text())["images"][dataset]
    probes = load_dataset(zoo, "probes", split="test")
    chosen = probes.select([i for i, name in enumerate(probes["dataset"]) if name == dataset])
    pixels = np.stack([np.atleast_3d(np.asarray(image)) for image in chosen["image"]])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - record["mean"]) / record["std"]
    return images, torch.tensor(chosen["label"])


@torch.inference_mode()
def main(zoo):
    """Rebuild every final model and recompute its test accuracy."""
    rows = open_rows(zoo)
    held_out = {}
    wrong = 0
    final = rows.select([i for i, is_final in enumerate(rows["is_final"]) if is_final])
    for row in final:
        model = rebuild(row)
        if row["test_accuracy"] is None:
            continue
        if row["dataset"] not in held_out:
            held_out[row["dataset"]] = held_out_images(zoo, row["dataset"])
        images, labels = held_out[row["dataset"]]
        accuracy = (model(images).argmax(1) == labels).double().mean().float().item()
        wrong += accuracy != row["test_accuracy"]
        print(f"{row['model_id']}: stored {row['test_accuracy']:.6f}, recomputed {accuracy:.6f}")
    print(f"{len(final)} models rebuilt, {wrong} accuracies differ")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) > 0)
