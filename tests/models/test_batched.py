import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitzoo_hf.models import vit
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.batched import BatchedViT

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
OTHERS = [
    {"qkv_bias": False},
    {"qk_norm": True},
    {"init_values": 0.1},
    {"class_token": False, "global_pool": "avg"},
    {"global_pool": "avg"},
    {"global_pool": "map"},
    {"reg_tokens": 2},
    {"no_embed_class": True},
    {"pre_norm": True},
    {"final_norm": False},
    {"pos_embed": "none"},
    {"dynamic_img_size": True},
    {"act_layer": "relu"},
    {"act_layer": "gelu_tanh"},
    {"norm_layer": "rmsnorm"},
    {"scale_attn_norm": True},
    {"scale_mlp_norm": True},
    {"proj_bias": False},
    {"fc_norm": True},
]


def models_of(args, count=3, **options):
    models = [vit.create(NAME, args, seed=seed, **options).eval() for seed in range(count)]
    generator = torch.Generator().manual_seed(0)
    for model in models:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return models


def stacked(models):
    return {name: torch.stack([model.state_dict()[name] for model in models]) for name in models[0].state_dict()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    patch=st.sampled_from([1, 2, 4]),
    channels=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.sampled_from([4, 8]),
    depth=st.integers(1, 3),
    mlp_ratio=st.sampled_from([1.0, 4.0]),
    mlp=st.booleans(),
    count=st.integers(1, 4),
    batch=st.integers(1, 5),
)
def test_every_plain_vit_gives_what_its_module_gives(
    grid, patch, channels, heads, width, depth, mlp_ratio, mlp, count, batch
):
    size = (grid[0] * patch, grid[1] * patch)
    args = {"img_size": size, "patch_size": patch, "in_chans": channels, "embed_dim": width * heads, "depth": depth}
    args |= {"num_heads": heads, "mlp_ratio": mlp_ratio, "num_classes": 4}
    models = models_of(args, count, **({"head": "mlp", "head_hidden": 5} if mlp else {}))
    batched = BatchedViT.of(models[0])
    images = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        outputs = batched(stacked(models), batched.patches(images), "token")
        for number, model in enumerate(models):
            features = model.forward_head(model.forward_features(images), pre_logits=True)
            torch.testing.assert_close(outputs.logits[number], model.head(features), atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(outputs.features[number], features, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("readout", ["token", "mean"])
def test_blocks_are_those_of_forward_intermediates(readout):
    models = models_of(SMALL)
    batched = BatchedViT.of(models[0])
    images = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        blocks = batched(stacked(models), batched.patches(images), readout).blocks
        for number, model in enumerate(models):
            told = model.forward_intermediates(
                images, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
            )
            for layer, (spatial, prefix) in enumerate(told):
                expected = prefix[:, 0] if readout == "token" else spatial.mean(1)
                torch.testing.assert_close(blocks[number, layer], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_other_architectures_are_not_taken_for_plain_ones(other):
    assert BatchedViT.of(vit.create(NAME, SMALL | other)) is None


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"]
)
def test_other_families_are_not_taken_for_plain_ones(name):
    assert BatchedViT.of(vit.create(name, {"num_classes": 3, "depth": 1, "embed_dim": 12, "num_heads": 2})) is None


def test_a_vit_s_of_the_paper_is_plain():
    batched = Architecture("vit_small_patch16_224", {"num_classes": 100}, "mlp", 256).batched
    assert (batched.tokens, batched.heads, batched.depth, batched.widest) == (197, 6, 12, 197 * 1536)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_gives_what_the_cpu_gives(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    models = models_of(SMALL)
    batched = BatchedViT.of(models[0])
    images = torch.randn(5, 1, 8, 8)
    here = batched(stacked(models), batched.patches(images)).logits
    there = {name: value.to("cuda", dtype) for name, value in stacked(models).items()}
    logits = batched(there, batched.patches(images.to("cuda", dtype))).logits.float().cpu()
    torch.testing.assert_close(logits, here, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=1e-3)
