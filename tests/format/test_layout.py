import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxtyping import config

from vitzoo_hf.format.layout import Layout, flatten, unflatten
from vitzoo_hf.format.schema import ZooError

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
STATE = {"head.weight": (2, 3), "blocks.0.w": (3, 1, 2), "header.b": (2,), "scale": (), "head.0.bias": (4,)}


def state(shapes):
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.int32)


@settings(deadline=None)
@given(st.data(), st.lists(SHAPES, max_size=5))
def test_round_trip_is_exact_to_the_bit(data, shapes):
    """Any 32 bits: NaN payloads, both zeros, subnormals and infinities among them."""
    tensors = {
        f"t{number}": torch.from_numpy(data.draw(arrays(np.uint32, shape)).view(np.float32))
        for number, shape in enumerate(shapes)
    }
    back = unflatten(flatten(tensors), Layout.of(tensors))
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        assert torch.equal(bits(back[name]), bits(tensor))


def test_special_values_keep_their_bits():
    patterns = [0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC12345, 0xFFC00001, 0x7F7FFFFF]
    tensor = torch.from_numpy(np.array(patterns, np.uint32).view(np.float32)).view(2, 4)
    flat = flatten({"w": tensor.T})
    assert flat.numpy().view(np.uint32).tolist() == np.array(patterns, np.uint32).reshape(2, 4).T.ravel().tolist()


def test_tensors_lie_in_order_row_major():
    tensors = state(STATE)
    layout = Layout.of(tensors)
    assert layout.offsets == (0, 6, 12, 14, 15)
    assert layout.num_parameters == 19
    vector = flatten(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(vector[layout.place(name)], tensor.flatten())


def test_the_fingerprint_follows_names_order_and_shapes():
    def of(**shapes):
        return Layout.of(state(shapes)).fingerprint

    different = [of(a=(2, 3), b=(6,)), of(b=(6,), a=(2, 3)), of(a=(3, 2), b=(6,)), of(a=(2, 3), c=(6,)), of(a=(2, 3))]
    assert len(set(different)) == 5
    assert of(a=(2, 3), b=(6,)) == different[0]
    assert all(len(digits) == 16 for digits in different)


def test_json_round_trip():
    layout = Layout.of(state(STATE))
    assert Layout.from_json(layout.to_json()) == layout
    assert layout.to_json()[1] == {"name": "blocks.0.w", "shape": [3, 1, 2], "offset": 6}


def test_damaged_json_is_refused():
    entries = Layout.of(state(STATE)).to_json()
    for position, key, value in [(1, "offset", 7), (0, "offset", 1), (1, "shape", [3, 1, 3])]:
        damaged = copy.deepcopy(entries)
        damaged[position][key] = value
        with pytest.raises(ZooError, match=r"offsets do not follow from its shapes: layouts\.json is damaged"):
            Layout.from_json(damaged)


@pytest.mark.parametrize("entries", [[{"name": "w", "shape": [2]}], [{"shape": [2], "offset": 0}], [{}]])
def test_incomplete_json_is_refused(entries):
    with pytest.raises(ZooError, match=r"layouts\.json is damaged"):
        Layout.from_json(entries)


@pytest.mark.parametrize("length", [18, 20, 0])
def test_a_wrong_length_names_layout_and_both_lengths(length):
    layout = Layout.of(state(STATE))
    with pytest.raises(
        ZooError, match=rf"a vector of {length} values does not fit layout {layout.fingerprint}, which has 19"
    ):
        unflatten(torch.zeros(length), layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_only_float32_is_taken(dtype):
    tensors = {"fine": torch.zeros(1), "other": torch.zeros(2, dtype=dtype)}
    for take in (flatten, Layout.of):
        with pytest.raises(ZooError, match=f"tensor 'other' is {dtype}; a zoo stores float32"):
            take(tensors)


def test_unflatten_copies_nothing():
    layout = Layout.of(state(STATE))
    vector = torch.zeros(19)
    parts = unflatten(vector, layout)
    for name, part in parts.items():
        assert part.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
        part.fill_(3)
        assert (vector[layout.place(name)] == 3).all()
    assert (vector == 3).all()


def test_flatten_copies_and_detaches():
    tensors = {"w": torch.zeros(3, requires_grad=True)}
    vector = flatten(tensors)
    assert not vector.requires_grad
    vector += 1
    assert (tensors["w"] == 0).all()


def test_a_population_gains_a_leading_axis():
    layout = Layout.of(state(STATE))
    vectors = torch.randn(5, 19)
    parts = unflatten(vectors, layout)
    assert parts["blocks.0.w"].shape == (5, 3, 1, 2)
    assert parts["scale"].shape == (5,)
    for model, vector in enumerate(vectors):
        for name, part in unflatten(vector, layout).items():
            assert torch.equal(parts[name][model], part)
    parts["scale"].zero_()
    assert (vectors[:, layout.place("scale")] == 0).all()


def test_the_trunk_is_everything_but_the_head():
    layout = Layout.of(state(STATE))
    assert layout.trunk().tolist() == list(range(6, 15))
    assert layout.trunk().dtype == torch.int64
    assert Layout.of(state({"head.weight": (2,)})).trunk().tolist() == []


def test_nothing_is_a_vector_too():
    assert flatten({}).shape == (0,)
    assert unflatten(torch.empty(0), Layout.of({})) == {}


def test_parts_of_a_network():
    from vitzoo_hf.models.architecture import Architecture

    layout = Architecture("vit_tiny_patch16_224", {"depth": 2, "num_classes": 10}, "mlp", 8).layout
    blocks = layout.parts("block")
    assert list(blocks) == ["embedding", "blocks.0", "blocks.1", "norm", "head"]
    assert blocks["embedding"] == ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert [name for names in blocks.values() for name in names] == list(layout.names)
    assert layout.parts("tensor") == {name: [name] for name in layout.names}
    assert layout.parts("model") == {"model": list(layout.names)}
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="per='layer'; expected 'model', 'block' or 'tensor'"):
            layout.parts("layer")
    finally:
        config.update("jaxtyping_disable", False)
