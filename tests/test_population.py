import datasets
import pytest
import torch

import vitzoo_hf as vz
from vitzoo_hf.schema import ZooError
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo):
    return Zoo(tiny_zoo)


@pytest.fixture(scope="module")
def images(zoo):
    return zoo.probes("digits")[0]


def test_mixed_heads_answer_in_the_order_of_the_rows(zoo, images):
    chosen = zoo.filter(stage="finetune")
    population = vz.Population.from_rows(chosen.rows())
    logits = population(images)
    assert len(population.groups) == 2
    assert logits.shape == (len(chosen), len(images), 10)
    for position, model_id in enumerate(chosen.model_ids):
        with torch.inference_mode():
            alone = zoo.model(model_id)(images)
        assert torch.allclose(logits[position], alone, atol=1e-6)


def test_features_are_what_the_head_reads(zoo, images):
    population = vz.Population.from_rows(zoo.filter(is_final=True).rows())
    features = population.features(images)
    for position, model_id in enumerate(population.model_ids):
        model = zoo.model(model_id)
        with torch.inference_mode():
            expected = model.forward_features(images)[:, 0]
        assert torch.allclose(features[position], expected, atol=1e-6)


def test_rows_of_load_dataset_serve_as_well(tiny_zoo, zoo, images):
    rows = datasets.load_dataset(str(tiny_zoo), split="train")
    population = vz.Population.from_rows(rows)
    assert population.model_ids == list(rows["model_id"])
    assert torch.equal(
        population.features(images[:4]),
        vz.Population.from_rows(zoo.filter(split="train").rows()).features(images[:4]),
    )


def test_different_outputs_do_not_stack(zoo, images):
    with pytest.raises(ZooError, match=r"these models have \[10, 32\] outputs"):
        vz.Population.from_rows(zoo.rows())(images)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (1, 8, 8)])
def test_bad_image_shapes_are_refused(zoo, shape):
    population = vz.Population.from_rows(zoo.filter(stage="finetune").rows())
    with pytest.raises(Exception, match=r"images|N C H W"):
        population(torch.zeros(shape))


def test_wrong_image_size_names_the_model(zoo):
    population = vz.Population.from_rows(zoo.filter(stage="finetune").rows())
    with pytest.raises(ZooError, match=r"cannot take images of shape \(2, 1, 16, 16\)"):
        population(torch.zeros(2, 1, 16, 16))


def test_an_empty_population_is_refused():
    with pytest.raises(ZooError, match="at least one row"):
        vz.Population.from_rows([])


def test_trunks_leave_out_exactly_the_heads(zoo):
    population = vz.Population.from_rows(zoo.filter(is_final=True).rows())
    trunks = population.trunks()
    for position, model_id in enumerate(population.model_ids):
        state = zoo.model(model_id).state_dict()
        trunk = torch.cat([value.flatten() for name, value in state.items() if not name.startswith("head.")])
        assert torch.equal(trunks[position], trunk)


@pytest.mark.gpu
def test_cuda_answers_as_the_cpu_does(zoo, images):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = list(zoo.filter(stage="finetune").rows())
    there = vz.Population.from_rows(rows, device="cuda")(images)
    assert there.is_cuda
    assert torch.allclose(there.cpu(), vz.Population.from_rows(rows)(images), atol=1e-4)
