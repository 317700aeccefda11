import pytest
import torch

from vitzoo_hf.evaluation.outputs_cache import OutputsCache, digest_of
from vitzoo_hf.format.schema import ZooError

ROW = {
    "weights_sha256": "ab",
    "architecture": "vit",
    "architecture_args": "{}",
    "head": "linear",
    "head_hidden": None,
}
PARTS = {"logits": torch.randn(3, 2).numpy(), "features": torch.randn(3, 5).numpy()}


def test_what_is_written_is_read(tmp_path):
    cache = OutputsCache(tmp_path, "float32")
    assert not cache.has(ROW, "d" * 64)
    cache.write(ROW, "d" * 64, PARTS)
    assert cache.has(ROW, "d" * 64)
    for name, values in PARTS.items():
        assert torch.equal(cache.read(ROW, "d" * 64, name), torch.from_numpy(values))


@pytest.mark.parametrize(
    "other", [{"weights_sha256": "ac"}, {"head": "mlp"}, {"architecture_args": '{"num_heads":2}'}, {"head_hidden": 3}]
)
def test_another_model_is_another_entry(tmp_path, other):
    cache = OutputsCache(tmp_path, "float32")
    cache.write(ROW, "d" * 64, PARTS)
    assert not cache.has(ROW | other, "d" * 64)


def test_other_images_and_precisions_are_other_entries(tmp_path):
    OutputsCache(tmp_path, "float32").write(ROW, "d" * 64, PARTS)
    assert not OutputsCache(tmp_path, "float32").has(ROW, "e" * 64)
    assert not OutputsCache(tmp_path, "bfloat16").has(ROW, "d" * 64)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "record"])
def test_a_damaged_entry_is_none(tmp_path, damage):
    cache = OutputsCache(tmp_path, "float32")
    cache.write(ROW, "d" * 64, PARTS)
    file = cache.place(ROW, "d" * 64) / ("record.json" if damage == "record" else "logits.npy")
    held = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"flip": held[:-1] + bytes([held[-1] ^ 1]), "cut": held[:-4], "record": b"{"}[damage])
    assert not cache.has(ROW, "d" * 64)
    cache.write(ROW, "d" * 64, PARTS)
    assert cache.has(ROW, "d" * 64)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="cannot keep outputs in"):
        OutputsCache(tmp_path / "file", "float32").write(ROW, "d" * 64, PARTS)


def test_a_digest_is_of_shape_and_values():
    images = torch.randn(2, 1, 4, 4)
    assert digest_of(images) == digest_of(images.clone())
    assert digest_of(images) == digest_of(images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2))
    assert (
        len({digest_of(images), digest_of(images.double()), digest_of(images.view(1, 2, 4, 4)), digest_of(-images)})
        == 4
    )


def test_a_temporary_cache_leaves_nothing():
    with OutputsCache.opened(None, "float32") as cache:
        cache.write(ROW, "d" * 64, PARTS)
        folder = cache.folder
    assert not folder.exists()
