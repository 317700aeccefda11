import numpy as np
import pytest
import torch
from PIL import Image

from vitzoo_hf.evaluation.image_sets import image_sets
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo


def test_without_a_source_they_are_the_zoos_own():
    zoo = Zoo.sample()
    images, labels = image_sets(zoo, "digits")["digits"]
    own, own_labels = zoo.probes("digits", "test")
    assert torch.allclose(images, own, atol=1e-6)
    assert torch.equal(labels, own_labels)


def test_another_source_is_prepared_as_the_models_know_it(tiny_zoo):
    zoo = Zoo(tiny_zoo)
    images, labels = image_sets(zoo, "digits", data="digits")["digits"]
    assert images.shape[1:] == zoo.probes("digits", "test")[0].shape[1:]
    assert -1 <= images.min() < images.max() <= 1
    assert set(labels.tolist()) == set(range(10))


def test_a_folder_of_images_is_a_source(tiny_zoo, tmp_path):
    generator = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        for number in range(8):
            pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / str(label) / f"{number}.png")
    sets = image_sets(Zoo(tiny_zoo), "digits", data=str(tmp_path), corruptions=["gaussian_blur:1"])
    assert [images.shape[1:] for images, _ in sets.values()] == [(1, 8, 8)] * 2


def test_another_number_of_classes_is_refused(tiny_zoo, tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(8):
            Image.new("L", (8, 8), number).save(tmp_path / label / f"{number}.png")
    with pytest.raises(ZooError, match="has 2 classes; the models of 'digits' know 10"):
        image_sets(Zoo(tiny_zoo), "digits", data=str(tmp_path))


def test_an_unknown_source_is_named(tiny_zoo):
    with pytest.raises(ZooError, match="unknown image source 'digist'"):
        image_sets(Zoo(tiny_zoo), "digits", data="digist")


def test_a_crop_of_the_recipe_is_applied_to_other_sources_too():
    zoo = Zoo.sample()
    images, _ = image_sets(zoo, "mnist5k", data="mnist5k")["mnist5k"]
    own, _ = zoo.probes("mnist5k", "test")
    assert torch.allclose(images[: len(own)], own, atol=1e-6) or torch.allclose(images.sum(0), own.sum(0), atol=1e-3)


def test_classes_of_another_name_are_refused(tiny_zoo, tmp_path):
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for word in words:
        (tmp_path / word).mkdir()
        for number in range(8):
            Image.new("L", (8, 8), number).save(tmp_path / word / f"{number}.png")
    with pytest.raises(ZooError, match=r"a class of .* is 'eight' where the models of 'digits' have '0'"):
        image_sets(Zoo(tiny_zoo), "digits", data=str(tmp_path))
