import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config

from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.metrics.weight_statistics import matrices_of, singular_values, spectral_norm, stable_rank


@pytest.fixture
def unchecked():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(size, seed=0):
    return torch.linalg.qr(draw(size, size, seed=seed).double())[0]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.sampled_from([1e-20, 1.0, 1e20]))
@settings(max_examples=40, deadline=None)
def test_singular_values_equal_numpy(m, n, seed, scale):
    matrices = draw(2, m, n, seed=seed) * scale
    expected = np.linalg.svd(matrices.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(matrices), expected, rtol=1e-6, atol=0)
    top = min(m, n, 3)
    np.testing.assert_allclose(singular_values(matrices, top), expected[:, :top], rtol=1e-6, atol=0)
    ranks = (expected**2).sum(1) / expected[:, 0] ** 2
    np.testing.assert_allclose(stable_rank(matrices), ranks, rtol=1e-6)


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-9, 1e-13])
def test_small_singular_values_are_accurate(smallest):
    values = torch.logspace(0, np.log10(smallest), 8, dtype=torch.float64)
    matrix = orthogonal(8) @ torch.diag(values) @ orthogonal(8, 1)
    np.testing.assert_allclose(singular_values(matrix), values, rtol=1e-6, atol=1e-15)


def test_rotations_and_transposes_change_nothing_and_scales_scale():
    matrix = draw(20, 9).double()
    values = singular_values(matrix)
    torch.testing.assert_close(singular_values(orthogonal(20) @ matrix @ orthogonal(9)), values)
    torch.testing.assert_close(singular_values(matrix.T), values)
    torch.testing.assert_close(singular_values(-3 * matrix), 3 * values)
    torch.testing.assert_close(stable_rank(-3 * matrix), stable_rank(matrix))
    assert 1 <= stable_rank(matrix) <= 9


def test_degenerate_matrices():
    assert singular_values(torch.zeros(3, 4)).tolist() == [0, 0, 0]
    assert stable_rank(torch.zeros(3, 4)).isnan()
    one = torch.outer(draw(30), draw(20, seed=1))
    torch.testing.assert_close(stable_rank(one).item(), 1.0, rtol=1e-6, atol=0)
    torch.testing.assert_close(spectral_norm(one).item(), torch.linalg.norm(one.double()).item())
    assert singular_values(one)[1:].max() < 1e-6 * spectral_norm(one)
    assert singular_values(torch.eye(5, dtype=torch.bfloat16)).tolist() == [1] * 5


def test_matrices_are_views_of_the_vectors_with_qkv_taken_apart():
    layout = Layout(
        ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "head.weight"),
        ((1, 1, 4), (4, 3, 2, 2), (12, 4), (12,), (10, 4)),
    )
    weights = draw(3, layout.num_parameters)
    found = matrices_of(weights, layout)
    tensors = unflatten(weights, layout)
    assert {name: tuple(matrix.shape) for name, matrix in found.items()} == {
        "patch_embed.proj.weight": (3, 4, 12),
        "blocks.0.attn.q.weight": (3, 4, 4),
        "blocks.0.attn.k.weight": (3, 4, 4),
        "blocks.0.attn.v.weight": (3, 4, 4),
        "head.weight": (3, 10, 4),
    }
    together = torch.cat([found[f"blocks.0.attn.{kind}.weight"] for kind in "qkv"], 1)
    assert torch.equal(together, tensors["blocks.0.attn.qkv.weight"])
    assert torch.equal(found["patch_embed.proj.weight"][1, 2], tensors["patch_embed.proj.weight"][1, 2].flatten())
    assert found["head.weight"].untyped_storage().data_ptr() == weights.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: singular_values(m[0]), r"matrices are float32 \[4\]; expected non-empty floating \[..., m, n\]"),
        (lambda m: singular_values(m.int()), r"matrices are int32 \[5, 4\]"),
        (lambda m: singular_values(m[:0]), r"matrices are float32 \[0, 4\]"),
        (lambda m: singular_values(m, 5), r"top=5 of matrices \[5, 4\]; expected 1 to 4"),
        (lambda m: singular_values(m, 0), r"top=0 of"),
        (lambda m: stable_rank(m * torch.nan), "NaN or infinite values in a matrix"),
        (lambda m: matrices_of(m, Layout(("w",), ((9,),))), "weights have 4 columns and the layout 9 values"),
    ],
)
def test_refusals(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call(draw(5, 4))


@pytest.mark.gpu
def test_cpu_and_cuda_agree():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matrices = draw(3, 20, 9)
    torch.testing.assert_close(singular_values(matrices.cuda()).cpu(), singular_values(matrices))
    torch.testing.assert_close(stable_rank(matrices.cuda()).cpu(), stable_rank(matrices))


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1, 1e200, 1e300])
def test_singular_values_of_any_scale(scale):
    """Squares over- or underflow in float64 long before the values themselves do."""
    matrices = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.linalg.svdvals(matrices)
    torch.testing.assert_close(singular_values(matrices * scale) / scale, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stable_rank(matrices * scale), stable_rank(matrices), rtol=1e-12, atol=0)
    mixed = matrices * torch.tensor([1, scale, 0], dtype=torch.float64)[:, None, None]
    assert singular_values(mixed)[2].tolist() == [0, 0, 0, 0]
    scales = torch.tensor([[1], [scale]], dtype=torch.float64)
    torch.testing.assert_close(singular_values(mixed)[:2], expected[:2] * scales, rtol=1e-6, atol=0)
