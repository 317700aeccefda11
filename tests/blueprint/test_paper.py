"""The blueprint of the paper's zoo, on folders of images with the class counts of ImageNet and CIFAR-100."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitzoo_hf as vz
from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.timm_import import import_timm
from vitzoo_hf.training import trainer
from vitzoo_hf.training.stacked import train_run

KEPT = {
    "sl-no-ddp-s42",
    "sl-ddp-s1957",
    "cl-no-ddp-s42",
    "sl-no-ddp-s42--adamw-lr0.001-linear-s42",
    "sl-no-ddp-s42--sgd-lr0.001-mlp-s42",
    "cl-no-ddp-s42--adamw-lr0.001-mlp-s6312",
}
TEST_IMAGES = 12


def write_images(folder: Path, classes: int, size: tuple[int, int]) -> None:
    generator = np.random.default_rng(classes)
    for label in range(classes):
        for part, count in (("train", 2), ("test", 1 if label < TEST_IMAGES else 0)):
            place = folder / part / f"class{label:04d}"
            place.mkdir(parents=True)
            for number in range(count):
                small = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                Image.fromarray(small).resize(size).save(place / f"{number}.jpg")
            if not count:
                place.rmdir()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Blueprint:
    """The blueprint, with a few runs, one epoch, small batches and images that lie here."""
    folder = tmp_path_factory.mktemp("stand-in")
    write_images(folder / "imagenet", 1000, (90, 70))
    write_images(folder / "cifar", 100, (32, 32))
    text = Blueprint.load("vit_small_imagenet_cifar100").text
    for old, new in (
        ("source: hf:ILSVRC/imagenet-1k", f"source: folder\n    path: {folder}/imagenet"),
        ("source: hf:uoft-cs/cifar100", f"source: folder\n    path: {folder}/cifar"),
        ("    label: fine_label\n", ""),
        ("selection: 0.01", "selection: 0.5"),
        ("selection: 0.02", "selection: 0.5"),
        ("epochs: 90", "epochs: 1"),
        ("epochs: 50", "epochs: 1"),
        ("keep_epochs: all", "keep_epochs: [1]"),
        ("batch_size: 256", "batch_size: 6"),
        ("batch_size: 96", "batch_size: 6"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    file = folder / "paper.yaml"
    file.write_text(text)
    return Blueprint.load(file)


@pytest.mark.slow
def test_a_few_steps_of_each_stage_make_a_zoo(stand_in, tmp_path, monkeypatch):
    every, parts = trainer.full_batches, trainer.batches_of
    monkeypatch.setattr(trainer, "full_batches", lambda *arguments: every(*arguments)[:2])
    monkeypatch.setattr(trainer, "batches_of", lambda *arguments: parts(*arguments)[:4])
    batches = ImageSet.batches
    monkeypatch.setattr(ImageSet, "batches", lambda *arguments: islice(batches(*arguments), 1))
    monkeypatch.setattr(trainer, "EVALUATION_BATCH", TEST_IMAGES)
    few = replace(stand_in, runs=tuple(run for run in stand_in.runs if run.run_id in KEPT))
    assert len(few.runs) == len(KEPT)
    for run in few.runs:
        train_run(PreparedBlueprint(few), run, tmp_path / "runs")
    folder = pack(few, tmp_path / "runs", tmp_path / "zoo", progress=False)
    zoo = vz.Zoo(folder)
    assert sorted(zoo.index["run_id"]) == sorted(KEPT)
    assert {row["weights"].shape[1] for row in zoo.stream(batch_size=1)} == {22_050_664, 21_704_164, 21_789_924}

    images = zoo.probes("imagenet-1k")[0]
    assert images.shape == (TEST_IMAGES, 3, 224, 224)
    timm = import_timm()
    model = zoo.model("sl-ddp-s1957@1")
    ours = timm.create_model("vit_small_patch16_224", num_classes=1000).eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(ours(images[:2]), model(images[:2]))
    tuned = zoo.model("sl-no-ddp-s42--sgd-lr0.001-mlp-s42@1")
    head = torch.nn.Sequential(torch.nn.Linear(384, 256), torch.nn.ReLU(), torch.nn.Linear(256, 100))
    theirs = timm.create_model("vit_small_patch16_224", num_classes=100)
    theirs.head = head
    theirs.load_state_dict(tuned.state_dict(), strict=True)

    report = vz.evaluate(zoo, progress=False)
    measured = report.evaluations.set_index("model_id")["test_accuracy"]
    recorded = zoo.to_pandas().set_index("model_id")["test_accuracy"]
    assert measured.dropna().to_dict() == pytest.approx(recorded.dropna().to_dict())
    assert len(report.pairs) == 15  # of six models; trunks of one layout
