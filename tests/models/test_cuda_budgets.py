"""Populations on a CUDA device: the CPU's outputs, in as many kernels and copies as tiles ask for."""

import pytest
import torch
from simulated_cuda import SimulatedCuda
from simulated_kernels import DeviceTensor

import vitzoo_hf as vz
from vitzoo_hf.models import tiles
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def rows():
    return list(Zoo.sample().filter(stage="finetune").rows())


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))


OUTPUTS = {
    "logits": lambda population, images: population(images),
    "features": lambda population, images: population.features(images),
    "both": lambda population, images: torch.cat(population.outputs(images), -1),
    "blocks": lambda population, images: population.block_features(images),
    "blocks, mean": lambda population, images: population.block_features(images, "mean"),
    "each": lambda population, images: torch.cat([outputs.logits for outputs in population.each(images)]),
    "trunks": lambda population, images: population.trunks(),
}


@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_outputs_are_those_of_the_cpu(simulated_cuda, rows, images, outputs, place):
    result = outputs(vz.Population.from_rows(rows, device="cuda"), images.to(place))
    assert isinstance(result, DeviceTensor)
    torch.testing.assert_close(result.cpu(), outputs(vz.Population.from_rows(rows), images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precisions(simulated_cuda, rows, images, precision):
    result = vz.Population.from_rows(rows, device="cuda", precision=precision)(images)
    expected = vz.Population.from_rows(rows, precision=precision)(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.cpu(), expected, rtol=0.05, atol=0.05)


@pytest.fixture
def small_device():
    """Too small for the weights, which stay on the CPU."""
    with SimulatedCuda(memory=1000) as device:
        yield device


def test_weights_that_stay_on_the_cpu_are_copied_while_a_model_runs(small_device, rows, images):
    population = vz.Population.from_rows(rows, device="cuda")
    small_device.reset()
    result = population(images)
    assert 2 <= small_device.h2d - small_device.blocking_copies <= len(rows)  # two architectures
    assert small_device.syncs == 0
    torch.testing.assert_close(result.cpu(), vz.Population.from_rows(rows)(images), rtol=1e-5, atol=1e-5)


def test_only_the_images_are_waited_for(small_device, rows, images):
    population = vz.Population.from_rows(rows, device="cuda")
    small_device.reset()
    population(images)
    assert small_device.blocking_copies <= 1


def test_a_forward_costs_kernels_of_a_tile_and_no_sync(simulated_cuda, rows, images):
    costs = []
    for some in (rows, rows * 2):
        population = vz.Population.from_rows(some, device="cuda")
        with simulated_cuda.budget(syncs=0):
            population(images.to("cuda"))
        costs.append(simulated_cuda.kernels)
    assert costs[0] == costs[1] <= 80  # two architectures of two blocks


def test_compiled_tiles_outlive_the_next_one(simulated_cuda, rows, images, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", {"cpu": 1, "cuda": 1})
    result = vz.Population.from_rows(rows, device="cuda", compiled=True)(images)
    torch.testing.assert_close(result.cpu(), vz.Population.from_rows(rows)(images), rtol=1e-5, atol=1e-5)


def test_a_device_has_its_index(simulated_cuda, rows):
    assert vz.Population.from_rows(rows, device="cuda").device == torch.device("cuda", 0)


def test_tiles_do_not_depend_on_memory_that_is_free_for_a_moment(simulated_cuda, rows, images, monkeypatch):
    asked = []
    memory = torch.cuda.mem_get_info
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *place: asked.append(place) or memory(*place))
    population = vz.Population.from_rows(rows, device="cuda")
    asked.clear()
    population(images)
    assert len(asked) <= 1


VIT_S = {"img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 384, "depth": 12, "num_heads": 6}


def test_a_forward_of_250_vit_s_on_10_000_images_is_1_2_million_kernels(simulated_cuda):
    architecture = Architecture("vit_small_patch16_224", VIT_S | {"num_classes": 100}, "linear", None)
    place = torch.device("cuda", 0)
    with simulated_cuda.without_values():
        vectors = list(enumerate(torch.empty(2, architecture.layout.num_parameters, device=place)))
        group = tiles.group_of(architecture, vectors, place, False, place)
        population = vz.Population(["one", "two"], [group], place, "bfloat16")
        images = torch.empty(1000, 3, 224, 224, device=place)
        with simulated_cuda.budget(kernels=1_200_000 // (125 * 10), syncs=0):  # 250 models are 125 pairs
            population(images)
