"""Open a zoo and rebuild its models with `datasets`, `timm` and `torch` alone.

    python load_zoo.py PATH_OR_ID

rebuilds every final model and compares its test accuracy, recomputed on the images the zoo carries, with the stored
one.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets, get_dataset_config_names, load_dataset
from huggingface_hub import hf_hub_download
from torch import nn

try:
    import timm
except RuntimeError:  # torchvision was built for CUDA, torch was not: two of its operators, which no ViT uses, lack
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def open_rows(zoo, config="weights"):
    """All rows of a config, whatever their split."""
    return concatenate_datasets(list(load_dataset(zoo, config).values()))


def vector_of(row):
    """The float32 vector of a row, in any format of a zoo, of the length and with the hash that the row tells.

    The formats `torch` and `numpy` of `datasets` cut zero bytes off the end of binary columns; they are put back.
    """
    name, length, dtype, weights = row["model_id"], int(row["num_parameters"]), row["dtype"], row["weights"]
    if dtype not in DTYPES:
        raise ValueError(f"{name} is stored as {dtype!r}; this program reads {', '.join(DTYPES)}")
    if isinstance(weights, np.ndarray) and weights.ndim == 0:
        weights = weights.item()
    if isinstance(weights, bytes):
        size = length * DTYPES[dtype].itemsize
        if len(weights) > size:
            raise ValueError(f"{name} has {len(weights)} bytes of weights instead of {size}: it is damaged")
        vector = torch.frombuffer(bytearray(bytes(weights).ljust(size, b"\0")), dtype=DTYPES[dtype]).float()
    else:
        vector = torch.from_numpy(np.array(weights, np.float32)) if not torch.is_tensor(weights) else weights.float()
    if vector.shape != (length,):
        raise ValueError(f"{name} has weights of shape {tuple(vector.shape)} instead of ({length},): it is damaged")
    if hashlib.sha256(vector.numpy().astype("<f4").data).hexdigest() != row["weights_sha256"]:
        raise ValueError(f"the weights of {name} do not match their hash: the row is damaged")
    return vector


def rebuild(row):
    """A live timm ViT in eval mode from one row."""
    model = timm.create_model(row["architecture"], **json.loads(row["architecture_args"]))
    hidden = row["head_hidden"]
    if hidden is not None and hidden == hidden:
        features, classes = model.head.in_features, model.head.out_features
        model.head = nn.Sequential(nn.Linear(features, int(hidden)), nn.ReLU(), nn.Linear(int(hidden), classes))
    names, tensors = zip(*model.state_dict().items(), strict=True)
    parts = vector_of(row).split([tensor.numel() for tensor in tensors])
    views = {name: part.view(tensor.shape) for name, part, tensor in zip(names, parts, tensors, strict=True)}
    model.load_state_dict(views)
    return model.eval()


def held_out_images(zoo, dataset):
    """Test images as the models are fed them, and labels; None if the zoo does not carry them.

    `zoo.json` has mean and std of each dataset.
    """
    if "probes" not in get_dataset_config_names(zoo):
        return None
    manifest = Path(zoo, "zoo.json")
    if not manifest.is_file():
        manifest = Path(hf_hub_download(zoo, "zoo.json", repo_type="dataset"))
    record = json.loads(manifest.read_text())["images"][dataset]
    probes = load_dataset(zoo, "probes", split="test")
    chosen = probes.select([i for i, name in enumerate(probes["dataset"]) if name == dataset])
    if len(chosen) == 0:
        return None
    pixels = np.stack([np.atleast_3d(np.asarray(image)) for image in chosen["image"]])
    mean, std = (torch.tensor(record[name], dtype=torch.float32).view(1, -1, 1, 1) for name in ("mean", "std"))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return images, torch.tensor(chosen["label"])


@torch.inference_mode()
def main(zoo):
    """Rebuild every final model and recompute its test accuracy where that is possible."""
    rows = open_rows(zoo)
    held_out = {}
    compared = wrong = 0
    final = rows.select([i for i, is_final in enumerate(rows["is_final"]) if is_final])
    for row in final:
        model = rebuild(row)
        if row["dataset"] not in held_out:
            held_out[row["dataset"]] = held_out_images(zoo, row["dataset"])
        if row["test_accuracy"] is None or held_out[row["dataset"]] is None:
            continue
        images, labels = held_out[row["dataset"]]
        accuracy = (model(images).argmax(1) == labels).double().mean().float().item()
        compared += 1
        wrong += accuracy != row["test_accuracy"]
        print(f"{row['model_id']}: stored {row['test_accuracy']:.6f}, recomputed {accuracy:.6f}")
    print(f"{compared} accuracies recomputed")
    print(f"{len(final)} models rebuilt, {wrong} accuracies differ")
    return wrong


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]) > 0)
