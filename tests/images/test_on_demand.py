"""Images on demand: the same pixels as decoded once, crops as Pillow makes them, whatever the threads."""

import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vitzoo_hf.blueprint.blueprint import Blueprint, ImagesSpec
from vitzoo_hf.evaluation.image_sets import image_sets
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images import on_demand as on_demand_images
from vitzoo_hf.images import pixels
from vitzoo_hf.images.crops import placed_crop_boxes, resized_crop_boxes, resized_crops
from vitzoo_hf.images.on_demand import OnDemandImages
from vitzoo_hf.images.pixels import PreparedImages, SmallImages
from vitzoo_hf.images.prepared import PreparedBlueprint
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.launch.cost import make_plan
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.read_ahead import mapped_ahead
from vitzoo_hf.timm_import import import_timm
from vitzoo_hf.training.checkpoint import RunFolder
from vitzoo_hf.training.feed import Draws, make_feed
from vitzoo_hf.training.stacked import train_run
from vitzoo_hf.zoo import Zoo

SPEC = ImagesSpec("folder", 16, resize=20, crop=16, decode="on_demand", mean=(0.485, 0.456, 0.406), std=0.25)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def picture(rng, height, width, channels=3):
    """Smooth, so that JPEG keeps it."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, channels), dtype=np.uint8).squeeze())
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """JPEGs and PNGs of different sizes in two classes; greyscale, RGBA, a palette and one stored sideways."""
    rng = np.random.default_rng(0)
    place = tmp_path_factory.mktemp("pictures")
    for name in ("cat", "dog"):
        (place / name).mkdir()
        for number in range(14):
            size = rng.integers(20, 90, 2)
            kind = ("jpg", "png")[number % 2]
            picture(rng, *size).save(place / name / f"{number:02}.{kind}", quality=95)
    picture(rng, 40, 33, 1).save(place / "cat" / "grey.jpg")
    picture(rng, 40, 33, 4).save(place / "cat" / "clear.png")
    picture(rng, 37, 50).quantize(32).save(place / "dog" / "palette.png")
    picture(rng, 300, 200).save(place / "dog" / "large.jpg", quality=95)
    sideways = Image.Exif()
    sideways[274] = 6
    picture(rng, 30, 60).save(place / "dog" / "sideways.jpg", exif=sideways)
    return place


def loaded(folder: Path, **changes):
    return load_images("pets", replace(SPEC, path=str(folder), **changes))


def files_of(*encoded: bytes) -> pa.ChunkedArray:
    entries = [{"bytes": data, "path": None} for data in encoded]
    return pa.chunked_array([pa.array(entries, type=datasets.Image.pa_type)])


def names(folder: Path) -> list[Path]:
    """Files in the order of their positions."""
    dataset = datasets.load_dataset("imagefolder", data_dir=str(folder))["train"]
    return [Path(row["path"]) for row in dataset.cast_column("image", datasets.Image(decode=False))["image"][:]]


def pillow_in_floats(image: np.ndarray, size: int, interpolation: str, box: list[float]) -> np.ndarray:
    floats = Image.fromarray(image.astype(np.float32))
    return np.asarray(floats.resize((size, size), FILTERS[interpolation], box=box)).clip(0, 255)


# the evaluation view


@pytest.mark.parametrize(
    "changes", [{}, {"channels": 1, "mean": 0.5}, {"interpolation": "bicubic"}, {"resize": None}]
)
def test_evaluation_is_that_of_images_decoded_once(folder, changes):
    ahead, once = loaded(folder, **changes), loaded(folder, decode="once", **changes)
    assert isinstance(ahead.pixels, OnDemandImages)
    assert isinstance(once.pixels, PreparedImages)
    assert len(ahead.pixels) == len(once.pixels) == 33
    for role in ("train", "selection", "test"):
        assert torch.equal(ahead.splits[role], once.splits[role])
        for mine, his in zip(ahead.part(role), once.part(role), strict=True):
            assert torch.equal(mine, his)
        streamed = list(ahead.batches(role, 5))
        assert [len(labels) for _, labels in streamed[:-1]] == [5] * (len(streamed) - 1)
        assert torch.equal(torch.cat([images for images, _ in streamed]), once.part(role)[0])
    assert ahead.record | {"decode": "once"} == once.record


def test_evaluation_is_that_of_pillow(folder):
    """Within 2 of 255: Pillow rounds between its passes."""
    images = loaded(folder, interpolation="bicubic")
    for position, file in enumerate(names(folder)):
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        scale = 20 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 16) // 2, (image.height - 16) // 2
        expected = np.asarray(image.crop((left, top, left + 16, top + 16))).astype(int)
        found = images.pixels.evaluation(torch.tensor([position]))[0].permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() <= 2, file


def test_memory_limit_decides_when_images_are_decoded(folder, monkeypatch):
    assert isinstance(loaded(folder, decode="auto").pixels, PreparedImages)
    monkeypatch.setattr(pixels, "PREPARED_LIMIT", 33 * 3 * 16 * 16 - 1)
    assert isinstance(loaded(folder, decode="auto").pixels, OnDemandImages)


def test_a_set_on_demand_is_never_taken_for_one_in_memory(folder):
    with pytest.raises(
        ZooError, match="images 'pets' are not in memory: take them by `batches`, or set decode: once"
    ):
        _ = loaded(folder).images


# crops


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_those_of_pillow(folder, interpolation):
    """Cut from the original image, without a detour over the prepared one."""
    images = loaded(folder, interpolation=interpolation).pixels
    everything = torch.arange(len(images))
    boxes = resized_crop_boxes(images.sizes(everything), 0.08, torch.Generator().manual_seed(1))
    found = images.crops(everything, boxes).permute(0, 2, 3, 1).numpy()
    for position, file in enumerate(names(folder)):
        if file.name == "large.jpg":
            continue
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        expected = np.asarray(image.resize((16, 16), FILTERS[interpolation], box=boxes[position].tolist()))
        if min(boxes[position, 2] - boxes[position, 0], boxes[position, 3] - boxes[position, 1]) < 64:
            assert np.array_equal(found[position], expected), file
        assert np.abs(found[position].astype(int) - expected).max() <= 12, file


def test_a_large_jpeg_is_decoded_small(folder, monkeypatch):
    """200 × 300 to 16: a quarter (50 × 75) still has two pixels for each; smooth images hardly differ."""
    images = loaded(folder).pixels
    (position,) = [number for number, file in enumerate(names(folder)) if file.name == "large.jpg"]
    box = torch.tensor([[8.0, 16.0, 192.0, 292.0]]).double()
    small = images.crops(torch.tensor([position]), box)
    monkeypatch.setattr(on_demand_images, "DETAIL", 100)
    whole = images.crops(torch.tensor([position]), box)
    assert not torch.equal(small, whole)
    assert (small.int() - whole.int()).abs().max() <= 6


def test_threads_do_not_matter(folder):
    one, many = (OnDemandImages(loaded(folder).pixels._files, loaded(folder).spec, threads) for threads in (1, 7))
    order = torch.randperm(33, generator=torch.Generator().manual_seed(3)).repeat(2)
    boxes = resized_crop_boxes(one.sizes(order), 0.2, torch.Generator().manual_seed(4))
    assert torch.equal(one.crops(order, boxes), many.crops(order, boxes))
    assert torch.equal(one.evaluation(order), many.evaluation(order))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_crops_of_many_images_are_those_of_pillow(data):
    """Drawn sizes and boxes, also of less than a pixel; Pillow in float32 does not round between its passes."""
    height, width, size = (data.draw(st.integers(1, 40)) for _ in range(3))
    interpolation = data.draw(st.sampled_from(["bilinear", "bicubic"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    arrays = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
    corners = np.sort(rng.random((3, 2, 2)), axis=1) * [width, height]
    corners[:, 1] = np.maximum(corners[:, 1], corners[:, 0] + 1e-3).clip(max=[width, height])
    boxes = torch.from_numpy(corners.reshape(3, 4))
    found = resized_crops(torch.from_numpy(arrays).unsqueeze(1), boxes, size, interpolation)
    for image, box, crop in zip(arrays, boxes.tolist(), found, strict=True):
        expected = pillow_in_floats(image, size, interpolation, box)
        assert np.abs(crop[0].numpy() - expected).max() <= 0.51


def test_whole_images_at_their_own_size_stay_as_they_are():
    images = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 9, 9]]).double().repeat(4, 1)
    for interpolation in FILTERS:
        assert torch.equal(resized_crops(images, boxes, 9, interpolation), images)


# boxes


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.01, 1), st.integers(0, 99))
def test_random_resized_boxes_lie_inside(height, width, smallest, seed):
    boxes = resized_crop_boxes(
        torch.tensor([[height, width]] * 8), smallest, torch.Generator().manual_seed(seed)
    ).numpy()
    left, top, right, bottom = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    assert (right - left >= 1).all()
    assert (bottom - top >= 1).all()
    assert np.array_equal(boxes, boxes.round())


def test_random_resized_boxes_are_spread_as_those_of_timm():
    """Mean and deviation of place and size of 20,000 boxes, beside those of timm's transform."""
    draw = import_timm().data.transforms.RandomResizedCropAndInterpolation.get_params
    random.seed(0)
    blank = Image.new("L", (500, 375))
    theirs = np.array([draw(blank, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(20_000)])
    ours = resized_crop_boxes(torch.tensor([[375, 500]] * 20_000), 0.08, torch.Generator().manual_seed(0)).numpy()
    ours = np.stack([ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]], axis=1)
    for column in range(4):
        assert ours[:, column].mean() == pytest.approx(theirs[:, column].mean(), rel=0.03)
        assert ours[:, column].std() == pytest.approx(theirs[:, column].std(), rel=0.03)
    assert (ours[:, 2] * ours[:, 3]).mean() == pytest.approx((theirs[:, 2] * theirs[:, 3]).mean(), rel=0.02)


def test_random_resized_boxes_lie_everywhere():
    """Every place that a box of a width has, the outermost included."""
    boxes = resized_crop_boxes(torch.tensor([[6, 6]] * 5000), 0.08, torch.Generator().manual_seed(0)).long()
    for start, end in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        for side in range(2, 7):
            assert sorted(set(start[end - start == side].tolist())) == list(range(6 - side + 1))


def test_an_image_too_long_for_any_draw_gives_its_centre():
    (box,) = resized_crop_boxes(torch.tensor([[10, 1000]]), 0.9, torch.Generator().manual_seed(0)).tolist()
    assert box == [493.0, 0.0, 506.0, 10.0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_placed_boxes_are_random_crops_of_resized_images(folder, interpolation):
    """Resize, then a crop at a random place: by hand with Pillow, within rounding."""
    images = loaded(folder, interpolation=interpolation)
    everything = torch.arange(33)
    boxes = placed_crop_boxes(images.pixels.sizes(everything), images.spec, torch.Generator().manual_seed(5))
    found = images.pixels.crops(everything, boxes).permute(0, 2, 3, 1).numpy().astype(int)
    places = set()
    for position, file in enumerate(names(folder)):
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        scale = 20 / min(image.size)
        wide, tall = round(image.width * scale), round(image.height * scale)
        left, top = (
            round(float(boxes[position, 0]) * wide / image.width),
            round(float(boxes[position, 1]) * tall / image.height),
        )
        assert 0 <= left <= wide - 16
        assert 0 <= top <= tall - 16
        places.add((left, top))
        resized = image.resize((wide, tall), FILTERS[interpolation])
        expected = np.asarray(resized.crop((left, top, left + 16, top + 16))).astype(int)
        assert np.abs(found[position] - expected).max() <= (12 if file.name == "large.jpg" else 2), file
    assert len(places) > 15


# small images of one size


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """As CIFAR-100: PNGs of one size, two kinds of labels, a test set."""
    rng = np.random.default_rng(1)
    place = tmp_path_factory.mktemp("small") / "set"
    place.mkdir()
    for split, count in (("train", 40), ("test", 10)):
        arrays = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        features = datasets.Features(
            {
                "img": datasets.Image(),
                "fine_label": datasets.ClassLabel(names=["a", "b", "c", "d"]),
                "coarse_label": datasets.ClassLabel(names=["x", "y"]),
            }
        )
        rows = {
            "img": [Image.fromarray(array) for array in arrays],
            "fine_label": [number % 4 for number in range(count)],
            "coarse_label": [number % 2 for number in range(count)],
        }
        part = datasets.Dataset.from_dict(rows, features=features)
        part.to_parquet(place / f"{split}-00000-of-00001.parquet")
    return f"hf:{place}"


def test_a_label_column_is_chosen(small):
    coarse = load_images("c", ImagesSpec(small, 8, label="coarse_label"))
    fine = load_images("f", ImagesSpec(small, 8, label="fine_label"))
    assert coarse.class_names == ("x", "y")
    assert fine.class_names == ("a", "b", "c", "d")
    assert torch.equal(fine.labels % 2, coarse.labels)
    with pytest.raises(ZooError, match=r"has several label columns: \['fine_label', 'coarse_label'\]; set `label`"):
        load_images("n", ImagesSpec(small, 8))
    with pytest.raises(ZooError, match="has no label column 'fine': did you mean 'fine_label'"):
        load_images("n", ImagesSpec(small, 8, label="fine"))


def test_small_images_are_kept_at_their_size(small):
    spec = ImagesSpec(small, 28, resize=32, crop=28, label="fine_label", decode="on_demand", interpolation="bicubic")
    images, once = load_images("s", spec), load_images("s", replace(spec, decode="once"))
    assert isinstance(images.pixels, SmallImages)
    assert images.pixels.images.shape == (50, 3, 8, 8)
    assert images.pixels.channels == 3
    for role in ("train", "test"):
        assert torch.equal(images.part(role)[0], once.part(role)[0])
    everything = torch.arange(50)
    boxes = placed_crop_boxes(images.pixels.sizes(everything), spec, torch.Generator().manual_seed(0))
    found = images.pixels.crops(everything, boxes)
    for raw, box, crop in zip(images.pixels.images, boxes.tolist(), found, strict=True):
        for channel, cut in zip(raw.numpy(), crop.numpy(), strict=True):
            assert np.abs(cut - pillow_in_floats(channel, 28, "bicubic", box)).max() <= 0.51


def test_images_in_memory_can_be_on_demand_too():
    spec = ImagesSpec("digits", 32, channels=3, decode="on_demand")
    images = load_images("digits", spec)
    assert images.pixels.images.shape == (1797, 1, 8, 8)
    assert torch.equal(images.part("test")[0], load_images("digits", replace(spec, decode="once")).part("test")[0])
    crops = images.pixels.crops(torch.arange(2), torch.tensor([[0, 0, 8, 8]]).double().repeat(2, 1))
    assert crops.shape == (2, 3, 32, 32)


# what goes wrong


def test_a_corrupt_image_is_named_by_its_position(folder):
    whole = next(folder.glob("*/large.jpg")).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no image", b""):
        for box in ([0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 200.0, 300.0]):
            images = OnDemandImages(files_of(whole, damaged), SPEC)
            told = r"image 1 of 'folder' cannot be decoded \(.+\): repair it or leave it out"
            with pytest.raises(ZooError, match=told):
                images.evaluation(torch.tensor([0, 1]))
            with pytest.raises(ZooError, match=told):
                images.crops(torch.tensor([1]), torch.tensor([box]).double())


def test_a_corrupt_image_stops_training(folder):
    whole = next(folder.glob("*/large.jpg")).read_bytes()
    images = loaded(folder)
    position = int(images.splits["train"][-1])
    encoded = [whole] * position + [whole[:300]] + [whole] * (32 - position)
    broken = replace(images, pixels=OnDemandImages(files_of(*encoded), images.spec))
    feed = make_feed(broken, "crop-flip", "cpu")
    batches = torch.arange(len(broken.splits["train"]))[None].split(4, 1)
    with pytest.raises(ZooError, match=f"image {position} of 'folder' cannot be decoded"):
        list(feed.batches(batches, Draws.of([0], 1, "cpu")))


def test_channels_that_cannot_be_had_are_refused(folder):
    with pytest.raises(ZooError, match="images 'folder' have 3 channels; 2 cannot be made of them"):
        loaded(folder, channels=2, mean=0.5)
    with pytest.raises(ZooError, match="images 'pets' have 1 channels; mean or std has 3 numbers"):
        loaded(folder, channels=1)


def test_a_random_place_needs_the_original_images(folder):
    told = "augmentation 'random-crop-flip' cuts from images before preparation: set decode: on_demand"
    with pytest.raises(ZooError, match=told):
        make_feed(loaded(folder, decode="once"), "random-crop-flip", "cpu")


def test_memory_stays_bounded(tmp_path):
    """400 images of 300 × 300 are 108 MB decoded; a pass over them, eight at a time, keeps a few."""
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(tmp_path / "a.jpg")
    images = OnDemandImages(files_of(*[(tmp_path / "a.jpg").read_bytes()] * 400), replace(SPEC, resize=None), 2)
    alive = []
    prepared = images._prepared

    def counted(position):
        alive.append(position)
        return prepared(position)

    images._prepared = counted
    tracemalloc.start()
    seen = 0
    for batch in mapped_ahead(images.evaluation, torch.arange(400).split(8)):
        seen += len(batch)
        assert len(alive) <= seen + 2 * 8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 400
    assert peak < 12e6


def test_work_ahead_is_in_order_and_bounded():
    made = []

    def work(item):
        made.append(item)
        return item * item

    results = mapped_ahead(work, range(20), threads=1, ahead=2)
    assert next(results) == 0
    assert len(made) <= 3
    assert list(results) == [item * item for item in range(1, 20)]
    assert made == list(range(20))
    with pytest.raises(ZeroDivisionError):
        list(mapped_ahead(lambda item: 1 // item, [1, 0, 1]))


# training

TEXT = """\
name: pets
architecture:
  name: vit_tiny_patch16_224
  args: {img_size: 16, patch_size: 8, in_chans: 3, embed_dim: 16, depth: 1, num_heads: 2}
images:
  pets: {source: folder, path: PATH, size: 16, resize: 20, crop: 16, decode: on_demand, interpolation: bicubic,
         mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], selection: 0.3, test: 0.3}
stages:
  pretrain:
    images: pets
    epochs: 3
    keep_epochs: all
    settings: {batch_size: 6}
    variants:
      - factors: {regime: supervised, augmentation: [crop-flip, random-crop-flip, none], seed: 1}
      - factors: {regime: contrastive, augmentation: simclr, seed: 1}
splits: {by: run, seed: 3, train: 0.6, validation: 0.2, test: 0.2}
"""


@pytest.fixture
def blueprint(folder, tmp_path) -> Blueprint:
    (tmp_path / "pets.yaml").write_text(TEXT.replace("PATH", str(folder)))
    return Blueprint.load(tmp_path / "pets.yaml")


def weights(folder: Path, run, epoch: int) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in RunFolder(folder / run.run_id).load_epoch(epoch)[0].values()])


@pytest.mark.parametrize("number", range(4))
def test_training_on_demand_resumed_is_training_uninterrupted(blueprint, tmp_path, number):
    run = blueprint.runs[number]
    train_run(PreparedBlueprint(blueprint), run, tmp_path / "whole")

    class Interruption(Exception):  # noqa: N818
        pass

    def stop(epoch):
        if epoch == 2:
            raise Interruption

    with pytest.raises(Interruption):
        train_run(PreparedBlueprint(blueprint), run, tmp_path / "parts", on_epoch=stop)
    train_run(PreparedBlueprint(blueprint), run, tmp_path / "parts")
    for epoch in range(4):
        assert torch.equal(weights(tmp_path / "whole", run, epoch), weights(tmp_path / "parts", run, epoch))
    whole, parts = (RunFolder(tmp_path / name / run.run_id).load_epoch(3)[1] for name in ("whole", "parts"))
    assert whole == parts
    assert not torch.equal(weights(tmp_path / "whole", run, 2), weights(tmp_path / "whole", run, 3))


def test_contrastive_views_are_two_crops(folder):
    images = loaded(folder)
    feed = make_feed(images, "crop", "cpu", views=2)
    (batch,) = feed.batches([torch.arange(6)[None]], Draws.of([0], 1, "cpu"))
    first, second = batch.inputs[0].chunk(2)
    assert first.shape == second.shape == (6, 3, 16, 16)
    assert not torch.equal(first, second)
    darkest, lightest = (images.normalize(torch.full((1, 3, 1, 1), value).byte())[0] for value in (0, 255))
    assert bool(((darkest <= first) & (first <= lightest)).all())


def test_without_augmentation_training_sees_the_evaluation_view(folder):
    images = loaded(folder)
    feed = make_feed(images, "none", "cpu")
    (batch,) = feed.batches([torch.tensor([[3, 1]])], Draws.of([0], 1, "cpu"))
    assert torch.equal(batch.inputs[0], images.normalize(images.part("train")[0][[3, 1]]))


def test_results_are_those_of_images_decoded_once(blueprint, tmp_path):
    """Without augmentation the two trainings are the same, bit for bit."""
    run = next(run for run in blueprint.runs if run.recipe.augmentation == "none")
    once = replace(blueprint, images={"pets": replace(blueprint.images["pets"], decode="once")})
    train_run(PreparedBlueprint(blueprint), run, tmp_path / "ahead")
    train_run(PreparedBlueprint(once), run, tmp_path / "once")
    assert torch.equal(weights(tmp_path / "ahead", run, 3), weights(tmp_path / "once", run, 3))
    ahead, kept = (RunFolder(tmp_path / name / run.run_id).load_epoch(3)[1] for name in ("ahead", "once"))
    assert ahead == kept


@pytest.mark.gpu
def test_small_images_are_cropped_on_the_device(small):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    spec = ImagesSpec(small, 28, resize=32, crop=28, label="fine_label", decode="on_demand", interpolation="bicubic")
    views = []
    for device in ("cpu", "cuda"):
        feed = make_feed(load_images("s", spec), "random-crop-flip", device)
        batches = [torch.arange(20, device=device)[None]]
        draws = Draws.of([0], 1, device)
        (crops,) = feed._images(batches[0], draws)
        assert crops.device.type == device
        (batch,) = feed.batches(batches, draws)
        assert batch.positions.device.type == batch.inputs.device.type == device
        views.append(crops.cpu().int())
    assert (views[0] - views[1]).abs().max() <= 1


def test_plan_pack_and_image_sets(blueprint, folder, tmp_path):
    plan = make_plan(blueprint, workers=1)
    assert plan.seconds is not None, plan.note
    for run in blueprint.runs:
        train_run(PreparedBlueprint(blueprint), run, tmp_path / "runs")
    zoo = Zoo(pack(blueprint, tmp_path / "runs", tmp_path / "zoo", progress=False))
    record = zoo.manifest["images"]["pets"]
    assert record["mean"] == [0.485, 0.456, 0.406]
    assert record["interpolation"] == "bicubic"
    assert str(folder) not in str(zoo.manifest)
    images = load_images("pets", blueprint.images["pets"])
    probes, labels = zoo.probes("pets", "test")
    held, expected = images.part("test")
    assert torch.equal(labels, expected)
    mean, std = (np.reshape(record[name], (3, 1, 1)) for name in ("mean", "std"))
    np.testing.assert_allclose(probes.numpy(), (held.numpy() / 255.0 - mean) / std, atol=1e-6)
    (named,) = image_sets(zoo, "pets", data=str(folder)).values()
    other = load_images("pets", replace(blueprint.images["pets"], selection=0.2, test=0.2))
    torch.testing.assert_close(named[0], other.normalize(other.part("test")[0]))
