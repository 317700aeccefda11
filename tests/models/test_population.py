import subprocess
import sys

import datasets
import pytest
import torch

import vitzoo_hf as vz
from vitzoo_hf.evaluation.precision import precision_effect
from vitzoo_hf.format.layout import flatten
from vitzoo_hf.format.schema import ZooError, canonical_json
from vitzoo_hf.models import population as population_module
from vitzoo_hf.models import vit
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
        model = zoo.model(model_id).double()  # the oracle rounds less than both float32 forwards, on any processor
        with torch.inference_mode():
            expected = model.forward_features(images.double())[:, 0]
        assert torch.allclose(features[position].double(), expected, rtol=0, atol=1e-5)


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


ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def row_of(name, args, seed, **head):
    model = vit.create(name, args, seed=seed, **head)
    return {
        "model_id": f"{name}-{seed}",
        "architecture": name,
        "architecture_args": canonical_json(args),
        "head": head.get("head", "linear"),
        "head_hidden": head.get("head_hidden"),
        "weights": flatten(model.state_dict()).numpy(),
    }, model.eval()


@pytest.mark.parametrize("count", [1, 7, 64, 65, 200])
def test_tiles_of_any_size_give_what_the_models_give_alone(count):
    rows, models = zip(*[row_of("vit_tiny_patch16_224", ARGS, seed) for seed in range(70)], strict=True)
    images = torch.randn(count, 1, 8, 8)
    logits = vz.Population.from_rows(rows)(images)
    with torch.inference_mode():
        alone = torch.stack([model(images) for model in models])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)


def test_the_same_call_gives_the_same_bits(zoo, images):
    rows = list(zoo.filter(stage="finetune").rows())
    first, second = (vz.Population.from_rows(rows)(images) for _ in range(2))
    assert torch.equal(first, second)


def test_architectures_that_are_not_plain_run_as_modules():
    args = ARGS | {"reg_tokens": 2, "init_values": 0.1}
    rows, models = zip(*[row_of("vit_tiny_patch16_224", args, seed) for seed in range(3)], strict=True)
    images = torch.randn(300, 1, 8, 8)
    population = vz.Population.from_rows(rows)
    assert "the module itself" in population.describe(300)[0]
    with torch.inference_mode():
        torch.testing.assert_close(population(images), torch.stack([model(images) for model in models]))
        told = models[1].forward_intermediates(
            images, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
        )
    for readout, expected in (("token", told[1][1][:, 0]), ("mean", told[1][0].mean(1))):
        blocks = population.block_features(images, readout)
        assert blocks.shape == (3, 2, 300, 16)
        torch.testing.assert_close(blocks[1, 1], expected)


def test_all_layers_of_all_models_have_one_cka_matrix(zoo, images):
    population = vz.Population.from_rows(zoo.filter(stage="finetune").rows())
    blocks = population.block_features(images)
    models, layers = blocks.shape[:2]
    matrix = vz.cka(blocks.flatten(0, 1)).unflatten(0, (models, layers)).unflatten(2, (models, layers))
    assert torch.allclose(matrix[0, -1, 2, 0], vz.cka([blocks[0, -1], blocks[2, 0]])[0, 1])


def test_mixed_architectures_have_outputs_of_their_own():
    rows = [
        row_of("vit_tiny_patch16_224", ARGS, 0)[0],
        row_of("vit_tiny_patch16_224", ARGS | {"depth": 3}, 1)[0],
        row_of("vit_tiny_patch16_224", ARGS | {"embed_dim": 8}, 2)[0],
    ]
    population = vz.Population.from_rows(rows)
    images = torch.randn(4, 1, 8, 8)
    each = population.each(images, readout="token")
    assert [one.blocks.shape for one in each] == [(1, 2, 4, 16), (1, 3, 4, 16), (1, 2, 4, 8)]
    assert population(images).shape == (3, 4, 3)
    with pytest.raises(ZooError, match="differ in feature width or depth"):
        population.features(images)


def test_an_unknown_readout_or_precision_is_named(zoo, images):
    rows = list(zoo.filter(stage="finetune").rows())
    with pytest.raises(ZooError, match="unknown readout 'tokne': did you mean 'token'"):
        vz.Population.from_rows(rows).block_features(images, "tokne")
    with pytest.raises(ZooError, match="unknown precision 'float8'"):
        vz.Population.from_rows(rows, precision="float8")


@pytest.mark.parametrize("plain", [True, False])
def test_where_memory_runs_out_tiles_are_halved_and_nothing_is_lost(monkeypatch, plain):
    args = ARGS if plain else ARGS | {"reg_tokens": 1}
    rows, models = zip(*[row_of("vit_tiny_patch16_224", args, seed) for seed in range(2)], strict=True)
    images = torch.randn(50, 1, 8, 8)
    population = vz.Population.from_rows(rows)
    whole, sizes = population_module.forward, []

    def cramped(group, tensors, inputs, readout):
        sizes.append(len(inputs))
        if len(inputs) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(group, tensors, inputs, readout)

    monkeypatch.setattr(population_module, "forward", cramped)
    logits = population(images)
    assert max(size for size in sizes if size <= 7) in (4, 6)
    with torch.inference_mode():
        torch.testing.assert_close(logits, torch.stack([model(images) for model in models]), atol=1e-5, rtol=1e-4)


def test_an_image_that_does_not_fit_at_all_is_said(monkeypatch):
    population = vz.Population.from_rows([row_of("vit_tiny_patch16_224", ARGS, 0)[0]])

    def full(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(population_module, "forward", full)
    with pytest.raises(ZooError, match="a single image does not fit into the memory of cpu"):
        population(torch.randn(9, 1, 8, 8))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_near_and_its_effect_is_told(zoo, images, precision):
    rows = list(zoo.filter(stage="finetune").rows())
    exact = vz.Population.from_rows(rows)
    rounded = vz.Population.from_rows(rows, precision=precision)
    logits = rounded(images)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, exact(images))
    labels = zoo.probes("digits")[1]
    effect = precision_effect(rows, images, labels, precision)
    same = (logits.argmax(-1) == exact(images).argmax(-1)).double().mean()
    assert effect == {
        "agreement": same,
        "accuracy_difference": (vz.accuracy(logits, labels) - vz.accuracy(exact(images), labels)).abs().max(),
        "largest_logit_difference": (logits - exact(images)).abs().max(),
    }
    assert effect["agreement"] > 0.95


def test_the_way_is_described(zoo):
    lines = vz.Population.from_rows(zoo.filter(stage="finetune").rows()).describe(4)
    assert all("batched products, tiles of" in line and "float32 on cpu" in line for line in lines)


@pytest.mark.slow
def test_compiled_forwards_give_the_same():
    code = """
import torch
import vitzoo_hf as vz

rows = list(vz.Zoo.sample().filter(stage="finetune", head="linear").rows())
images = torch.randn(70, 1, 16, 16)
compiled = vz.Population.from_rows(rows, compiled=True)(images)
torch.testing.assert_close(compiled, vz.Population.from_rows(rows)(images), atol=1e-5, rtol=1e-4)
"""  # the type checks of tests cannot be compiled
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
def test_graphs_on_cuda_give_the_same(zoo, images):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = list(zoo.filter(stage="finetune").rows())
    graphed = vz.Population.from_rows(rows, device="cuda", compiled=True)
    plain = vz.Population.from_rows(rows, device="cuda")(images)
    for _ in range(3):
        assert torch.allclose(graphed(images), plain, atol=1e-4)


@pytest.mark.parametrize(("precision", "expected"), [("float32", "highest"), ("tf32", "high")])
def test_products_are_taken_as_the_precision_says(zoo, images, monkeypatch, precision, expected):
    """Whatever the process has set, which is as before afterwards."""
    whole, settings = population_module.forward, []

    def noted(*arguments):
        settings.append(torch.get_float32_matmul_precision())
        return whole(*arguments)

    monkeypatch.setattr(population_module, "forward", noted)
    rows = zoo.filter(stage="finetune").rows()
    torch.set_float32_matmul_precision("medium")
    try:
        vz.Population.from_rows(rows, precision=precision)(images)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(settings) == {expected}
