import gzip
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from fashion_stand_in import stand_in, use, write_idx, write_idx_folder
from PIL import Image
from sklearn.datasets import load_digits

from vitzoo_hf.blueprint.blueprint import ImagesSpec
from vitzoo_hf.format.schema import ZooError, canonical_json
from vitzoo_hf.images.fashion_mnist import read_idx
from vitzoo_hf.images.preparation import normalize, prepare
from vitzoo_hf.images.sources import load_images

RNG = np.random.default_rng(0)


def check_splits(images, selection=0.2, test=0.2):
    """Disjoint, complete, ascending, and every class in every part in its share."""
    positions = torch.cat([images.splits[role] for role in ("train", "selection", "test")])
    assert positions.sort().values.tolist() == list(range(len(images.labels)))
    for role, share in (("selection", selection), ("test", test)):
        assert images.splits[role].tolist() == sorted(images.splits[role].tolist())
        _, labels = images.part(role)
        for label in images.labels.unique():
            members = int((images.labels == label).sum())
            assert abs(int((labels == label).sum()) - share * members) <= 0.5


@pytest.mark.parametrize(
    ("spec", "total"), [(ImagesSpec("digits", 8), 1797), (ImagesSpec("mnist5k", 16, crop=22, selection=0.1), 5000)]
)
def test_real_images(spec, total):
    images = load_images("some", spec)
    assert images.images.shape == (total, 1, spec.size, spec.size)
    assert images.images.dtype == torch.uint8
    assert images.images.max() > 200
    assert images.images.min() == 0
    assert images.labels.dtype == torch.int64
    assert images.class_names == tuple("0123456789")
    check_splits(images, spec.selection, spec.test)


def test_digits_are_those_of_scikit_learn():
    images = load_images("digits", ImagesSpec("digits", 8))
    source = load_digits()
    assert images.labels.tolist() == source.target.tolist()
    assert np.abs(images.images[:, 0].numpy() * (16 / 255) - source.images).max() < 0.05


def test_splits_follow_their_seed_only():
    def splits(**changes):
        return load_images("digits", ImagesSpec("digits", 8, **changes)).splits

    first, again, other, bigger = splits(), splits(mean=0.1), splits(split_seed=1), splits(test=0.3)
    assert all(torch.equal(first[role], again[role]) for role in first)
    assert not torch.equal(first["test"], other["test"])
    assert len(bigger["test"]) > len(first["test"])


def test_parts_are_images_and_their_labels():
    images = load_images("digits", ImagesSpec("digits", 8))
    pixels, labels = images.part("selection")
    assert torch.equal(pixels[3], images.images[images.splits["selection"][3]])
    assert labels[3] == images.labels[images.splits["selection"][3]]
    with pytest.raises(ZooError, match="unknown role 'selecton': did you mean 'selection'"):
        images.part("selecton")


def test_the_record_feeds_a_model_and_names_no_folder(fashion):
    images = load_images("fashion", ImagesSpec("fashion-mnist", 28, mean=0.3, std=0.4, path=str(fashion)))
    record = images.record
    assert "path" not in record
    assert str(fashion) not in canonical_json(record)
    assert (record["size"], record["mean"], record["std"], record["channels"]) == (28, 0.3, 0.4, 1)
    assert record["licence"] == "MIT"
    assert record["class_names"][9] == "Ankle boot"
    batch = images.part("test")[0]
    assert torch.equal(images.normalize(batch), normalize(batch, record["mean"], record["std"]))


def test_normalising_against_float64():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = (np.arange(256) / 255 - 0.3) / 0.7
    assert np.abs(normalize(pixels, 0.3, 0.7).numpy().ravel() - expected).max() < 1e-6
    assert normalize(pixels, 0.3, 0.7).dtype == torch.float32


def test_normalising_each_channel_against_float64():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (pixels.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    for kind in (tuple, list):
        assert np.abs(normalize(pixels, kind(mean), kind(std)).numpy() - expected).max() < 1e-6
    assert torch.equal(normalize(pixels, (0.3,) * 3, 0.7), normalize(pixels, 0.3, 0.7))


def test_unknown_sources_are_refused():
    with pytest.raises(ZooError, match=r"unknown image source 'digts': did you mean 'digits'\?; any Hugging Face"):
        load_images("x", ImagesSpec("digts", 8))


def test_a_wrong_number_of_classes_is_refused():
    with pytest.raises(ZooError, match="images 'x' have 10 classes; the blueprint says 9"):
        load_images("x", ImagesSpec("digits", 8, classes=9))
    assert len(load_images("x", ImagesSpec("digits", 8, classes=10)).class_names) == 10


# preparing


def pixels(*shape):
    return torch.from_numpy(RNG.integers(0, 256, shape, dtype=np.uint8))


def test_the_crop_is_central():
    images = pixels(2, 3, 7, 9)
    assert torch.equal(prepare(images, ImagesSpec("x", 5, crop=5)), images[..., 1:6, 2:7])
    assert torch.equal(prepare(images, ImagesSpec("x", 7)), images[..., 1:8])


def test_resizing_is_that_of_pillow():
    images = pixels(1, 1, 28, 28)
    ours = prepare(images, ImagesSpec("x", 16))[0, 0].numpy().astype(int)
    pillow = np.asarray(Image.fromarray(images[0, 0].numpy()).resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - pillow).max() <= 1


def test_bicubic_resizing_is_that_of_pillow():
    """Pillow in float32, which does not round between its passes."""
    images = pixels(1, 1, 28, 28)
    ours = prepare(images, ImagesSpec("x", 16, interpolation="bicubic"))[0, 0].numpy()
    floats = Image.fromarray(images[0, 0].numpy().astype(np.float32))
    assert np.abs(ours - np.asarray(floats.resize((16, 16), Image.Resampling.BICUBIC)).clip(0, 255)).max() <= 0.51


def test_flat_images_stay_flat():
    for value in (0, 127, 255):
        assert (prepare(torch.full((1, 1, 20, 20), value, dtype=torch.uint8), ImagesSpec("x", 13)) == value).all()


def test_a_crop_larger_than_the_images_is_refused():
    with pytest.raises(ZooError, match="images 'digits' are 8×8; crop 9 does not fit"):
        load_images("x", ImagesSpec("digits", 8, crop=9))


def test_channels():
    grey, colour = pixels(2, 1, 4, 4), pixels(2, 3, 4, 4)
    assert torch.equal(prepare(grey, ImagesSpec("x", 4, channels=3)), grey.repeat(1, 3, 1, 1))
    assert torch.equal(prepare(colour, ImagesSpec("x", 4, channels=3)), colour)
    pillow = np.asarray(Image.fromarray(colour[0].permute(1, 2, 0).numpy()).convert("L")).astype(int)
    ours = prepare(colour, ImagesSpec("x", 4, channels=1))[0, 0].numpy().astype(int)
    assert np.abs(ours - pillow).max() <= 1
    with pytest.raises(ZooError, match="images 'x' have 3 channels; 2 cannot be made of them"):
        prepare(colour, ImagesSpec("x", 4, channels=2))


# fashion-mnist: idx files


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    arrays = stand_in(100, 30)
    folder = write_idx_folder(tmp_path / "fashion", arrays)
    use(monkeypatch, arrays, tmp_path / "no-package")
    return folder


def test_fashion_mnist_keeps_its_own_test_set(fashion):
    images = load_images("fashion", ImagesSpec("fashion-mnist", 28, path=str(fashion)))
    assert images.images.shape == (130, 1, 28, 28)
    assert images.splits["test"].tolist() == list(range(100, 130))
    assert (len(images.splits["selection"]), len(images.splits["train"])) == (20, 80)
    check_splits(images, selection=20 / 130, test=30 / 130)
    written = read_idx(fashion / "t10k-images-idx3-ubyte.gz")
    assert np.array_equal(images.part("test")[0][:, 0].numpy(), written)


def test_missing_files_say_how_to_get_them(fashion, tmp_path):
    (fashion / "t10k-labels-idx1-ubyte.gz").unlink()
    told = r"need t10k-labels-idx1-ubyte\.gz in .*/fashion: choose another `path`, or drop it"
    with pytest.raises(ZooError, match=told):
        load_images("x", ImagesSpec("fashion-mnist", 28, path=str(fashion)))


def cut(data: bytes) -> bytes:
    return data[:-20]


def flip(data: bytes) -> bytes:
    return data[:200] + bytes(byte ^ 255 for byte in data[200:260]) + data[260:]


def break_stream(data: bytes) -> bytes:
    return data[:10] + b"\xff" * 8 + data[18:]


def shorten(data: bytes) -> bytes:
    return gzip.compress(gzip.decompress(data)[:-1])


def lengthen(data: bytes) -> bytes:
    return gzip.compress(gzip.decompress(data) + b"x")


def relabel(data: bytes) -> bytes:
    return gzip.compress(b"\0\0\x0d" + gzip.decompress(data)[3:])


@pytest.mark.parametrize(
    "damage", [cut, flip, break_stream, shorten, lengthen, relabel, lambda data: b"", lambda data: b"no gzip"]
)
def test_a_damaged_idx_file_is_refused(fashion, damage):
    file = fashion / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ZooError, match=r"train-images-idx3-ubyte\.gz is damaged \(.*\): get it again"):
        load_images("x", ImagesSpec("fashion-mnist", 28, path=str(fashion)))


def test_an_empty_idx_file_is_refused(fashion):
    file = fashion / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(b""))
    with pytest.raises(ZooError, match="is damaged"):
        read_idx(file)


def test_images_and_labels_must_be_as_many(fashion):
    write_idx(fashion / "train-labels-idx1-ubyte.gz", np.zeros(99, np.uint8))
    with pytest.raises(ZooError, match="100 images and 99 labels"):
        load_images("x", ImagesSpec("fashion-mnist", 28, path=str(fashion)))


# folders and Hugging Face datasets


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.builder.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Flat colours, so that resizing keeps them: cats red, dogs green; shapes and modes differ."""
    folder = tmp_path / "pictures"
    for name, colour in (("cat", (200, 0, 0)), ("dog", (0, 150, 0))):
        (folder / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (20 + number, 24), colour).save(folder / name / f"{number}.png")
    Image.new("RGBA", (30, 30), (200, 0, 0, 255)).save(folder / "cat" / "3.png")
    return folder


def test_a_folder_of_pictures(pictures):
    images = load_images("pets", ImagesSpec("folder", 16, path=str(pictures)))
    assert images.images.shape == (20, 3, 16, 16)
    assert images.class_names == ("cat", "dog")
    assert images.labels.bincount().tolist() == [10, 10]
    check_splits(images)
    for picture, label in zip(images.images, images.labels, strict=True):
        colour = torch.tensor([(200, 0, 0), (0, 150, 0)][int(label)])
        assert (picture == colour.view(3, 1, 1)).all()
    assert "path" not in images.record


def test_a_folder_in_grey(pictures):
    images = load_images("pets", ImagesSpec("folder", 16, channels=1, path=str(pictures)))
    assert images.images.shape == (20, 1, 16, 16)
    assert images.images[images.labels == 0].unique().tolist() == [60]


def test_a_folder_with_a_test_set(pictures, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(pictures, folder / "train")
    (folder / "test" / "dog").mkdir(parents=True)
    (folder / "test" / "cat").mkdir(parents=True)
    shutil.copy(pictures / "dog" / "0.png", folder / "test" / "dog" / "a.png")
    shutil.copy(pictures / "cat" / "0.png", folder / "test" / "cat" / "a.png")
    images = load_images("pets", ImagesSpec("folder", 16, path=str(folder)))
    assert images.splits["test"].tolist() == [20, 21]
    assert sorted(images.labels[20:].tolist()) == [0, 1]


def test_classes_that_would_be_lost_are_refused(pictures):
    (pictures / "fish").mkdir()
    with pytest.raises(ZooError, match=r"class 'fish' in .*pictures has no images: add some, or remove its folder"):
        load_images("pets", ImagesSpec("folder", 16, path=str(pictures)))
    (pictures / "fish").rmdir()
    shutil.rmtree(pictures / "dog")
    with pytest.raises(ZooError, match=r"pictures has one class, 'cat'; expected a subfolder for each of several"):
        load_images("pets", ImagesSpec("folder", 16, path=str(pictures)))


def test_pictures_of_sixteen_bits_keep_their_brightness(pictures):
    for name in ("cat", "dog"):
        for number in range(10):
            Image.fromarray(np.full((20, 20), 100 * 256 + 17, np.uint16)).save(pictures / name / f"{number}.png")
    images = load_images("deep", ImagesSpec("folder", 16, path=str(pictures)))
    assert images.images.unique().tolist() == [100]


@pytest.mark.parametrize("path", [None, "/no/such/folder"])
def test_a_folder_must_be_there(path):
    with pytest.raises(ZooError, match=rf"images 'folder' need `path`, .*; given {path!r}"):
        load_images("x", ImagesSpec("folder", 16, path=path))


def test_too_few_images_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "few" / name / "0.png")
    with pytest.raises(ZooError, match=r"no image is left for .*; 2 images are too few"):
        load_images("x", ImagesSpec("folder", 8, path=str(tmp_path / "few")))


def made(values, labels, names):
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.ClassLabel(names=names), "other": datasets.Value("int64")}
    )
    pictures = [Image.fromarray(np.full((10, 10), value, np.uint8)) for value in values]
    return datasets.Dataset.from_dict(
        {"img": pictures, "fine": labels, "other": list(range(len(labels)))}, features=features
    )


def save(folder: Path, **parts) -> str:
    folder.mkdir()
    for split, part in parts.items():
        part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return f"hf:{folder}"


def test_a_hugging_face_dataset(tmp_path):
    labels = [0, 1] * 10
    source = save(tmp_path / "set", train=made(range(20), labels, ["x", "y"]))
    images = load_images("mine", ImagesSpec(source, 10, channels=1))
    assert images.labels.tolist() == labels
    assert images.images[:, 0, 0, 0].tolist() == list(range(20))
    assert images.class_names == ("x", "y")


def test_a_validation_set_serves_as_test_where_test_labels_are_hidden(tmp_path):
    """As in ILSVRC/imagenet-1k, whose test labels are all -1."""
    source = save(
        tmp_path / "set",
        train=made(range(20), [0, 1] * 10, ["x", "y"]),
        validation=made([100, 101], [1, 0], ["x", "y"]),
        test=made([200, 201], [-1, -1], ["x", "y"]),
    )
    images = load_images("mine", ImagesSpec(source, 10, channels=1))
    pixels, labels = images.part("test")
    assert pixels[:, 0, 0, 0].tolist() == [100, 101]
    assert labels.tolist() == [1, 0]


def test_a_dataset_without_pictures_is_refused(tmp_path):
    part = made([1, 2], [0, 1], ["x", "y"])
    for column, told in (("img", "no Image column"), ("fine", "no ClassLabel column")):
        source = save(tmp_path / column, train=part.remove_columns(column))
        with pytest.raises(ZooError, match=rf"has {told}; its columns are \["):
            load_images("x", ImagesSpec(source, 10))


def test_a_dataset_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ZooError, match=r"cannot load the image dataset '.*/none'"):
        load_images("x", ImagesSpec(f"hf:{tmp_path}/none", 10))


def test_resize_comes_before_the_crop():
    """Resize(8) of the shorter side, centre crop of 4: the middle half of each side."""
    ramp = torch.arange(32, dtype=torch.uint8).mul(4).view(1, 1, 1, 32).expand(1, 1, 16, 32)
    prepared = prepare(ramp, ImagesSpec("x", size=4, crop=4, resize=8))
    assert prepared.shape == (1, 1, 4, 4)
    expected = torch.arange(6, 10) * 8 + 2
    assert (prepared[0, 0, 0].long() - expected).abs().max() <= 1
