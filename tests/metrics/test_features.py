import numpy as np
import pytest
import torch
from gram_oracle import randn

from vitzoo_hf.metrics import features as centred_features
from vitzoo_hf.metrics.features import CentredFeatures

WHOLE = slice(0, 50)


@pytest.fixture(params=[2**29, 2**12, 1], ids=["held", "blocks", "one image a block"])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(centred_features, "BLOCK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_models_are_centred_and_scaled_whatever_the_memory(block_bytes, dtype):
    models = [(randn(50, width, seed=width) * width + 3).to(dtype) for width in (4, 4, 7, 1, 4)]
    centred = CentredFeatures(models, 4)
    assert centred.runs == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert centred.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for p, model in enumerate(models):
        expected = model.double().numpy()
        expected = expected - expected.mean(0)
        read = centred.read(slice(p, p + 1), WHOLE)[0]
        np.testing.assert_allclose(read * centred.scales[p], expected, atol=1e-5 * np.abs(expected).max())
        assert read.abs().max().item() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(centred.squares[p], (read.double() ** 2).sum(1), rtol=1e-6)
        assert torch.equal(centred.read(slice(p, p + 1), slice(7, 9))[0], read[7:9])


def test_block_pairs_cover_the_upper_triangle_once(block_bytes):
    models = [randn(50, width, seed=width) for width in (4, 4, 7)]
    centred = CentredFeatures(models, 4)
    count = torch.zeros(50, 50)
    for first, second, left, right in centred.block_pairs():
        count[first, second] += 1
        for run, a, b in zip(centred.runs, left, right, strict=True):
            assert torch.equal(a, centred.read(run, first))
            assert torch.equal(b, centred.read(run, second))
        size = sum(block.nbytes for block in left)
        assert size <= max(block_bytes, 15 * 4)
    assert torch.equal(count.triu(), torch.ones(50, 50).triu())
    assert {block.stop - block.start for block in centred.blocks()[:-1]} <= {2**12 // 60, 1}


def test_the_second_centring_removes_the_rounding_of_the_first_mean(block_bytes):
    features = torch.randint(9, (2, 3001, 3), generator=torch.Generator().manual_seed(0)) + 2.0**23 - 9
    centred = CentredFeatures(features, 4)
    assert centred.read(slice(0, 2), slice(0, 3001)).double().mean(1).abs().max() < 1e-6


def test_constant_columns_are_zero_and_do_not_set_the_scale():
    model = torch.cat([randn(50, 2), torch.full((50, 1), 1e9), torch.full((50, 1), 1e30)], 1)
    model[3, 2] += 64
    centred = CentredFeatures([model, torch.full((50, 4), 0.1)], 4)
    read = centred.read(slice(0, 2), WHOLE)
    assert not read[0, :, 2:].any()
    assert not read[1].any()
    assert 1 < centred.scales[0] < 10
    assert centred.scales[1] == 0


def test_constant_columns_whose_mean_overflows_are_refused_rather_than_nan():
    with pytest.raises(ValueError, match=r"NaN or infinite features in 1 of 2 models \(positions 1\)"):
        CentredFeatures([randn(50, 2), torch.full((50, 2), 3e38)], 4)


def test_subnormal_features_keep_their_size():
    features = randn(1, 50, 2) * 1e-40
    read = CentredFeatures(features, 4).read(slice(0, 1), WHOLE)
    assert read.abs().max().item() == pytest.approx(1, abs=1e-3)
