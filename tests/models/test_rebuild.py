import json

import numpy as np
import pytest
import torch

import vitzoo_hf as vz
from vitzoo_hf.format.layout import Layout, flatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import checked_vector, reconstruct
from vitzoo_hf.models.vit import create
from vitzoo_hf.zoo import Zoo

ARCHITECTURE = "vit_tiny_patch16_224"
ARGS = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 10,
}


def make_row(head="linear", **changes):
    hidden = 8 if head == "mlp" else None
    model = create(ARCHITECTURE, ARGS, head=head, head_hidden=hidden, seed=3).eval()
    state = model.state_dict()
    row = {
        "model_id": "sl-s1@2",
        "architecture": ARCHITECTURE,
        "architecture_args": json.dumps(ARGS),
        "head": head,
        "head_hidden": hidden,
        "layout": Layout.of(state).fingerprint,
        "weights": flatten(state).numpy(),
    }
    return model, row | changes


FORMS = {
    "list": lambda vector: vector.tolist(),
    "array": lambda vector: vector,
    "float64 array": lambda vector: vector.astype(np.float64),
    "big-endian array": lambda vector: vector.astype(">f4"),
    "read-only array": lambda vector: np.frombuffer(vector.tobytes(), np.float32),
    "tensor": lambda vector: torch.from_numpy(vector),
    "bytes": lambda vector: vector.astype("<f4").tobytes(),
    "memoryview": lambda vector: memoryview(vector.astype("<f4").tobytes()),
}


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_gives_the_same_model(head, form):
    model, row = make_row(head)
    rebuilt = reconstruct(row | {"weights": FORMS[form](row["weights"])})
    assert list(rebuilt.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name].view(torch.int32), tensor.view(torch.int32)), name
    batch = torch.randn(3, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(rebuilt(batch), model(batch))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_head_may_be_its_class_label(head):
    model, row = make_row(head)
    coded = ["linear", "mlp"].index(head)
    for code in (coded, np.int64(coded)):
        assert str(reconstruct(row | {"head": code}).head) == str(model.head)


def test_the_model_is_live_and_one_vector():
    _, row = make_row()
    model = reconstruct(row)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == 1
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert model.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("form", ["tensor", "array"])
def test_nothing_is_copied_where_the_row_may_be_written_to(form):
    _, row = make_row()
    row["weights"] = FORMS[form](row["weights"])
    model = reconstruct(row)
    assert next(model.parameters()).untyped_storage().data_ptr() == torch.as_tensor(row["weights"]).data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_leaves_the_row_alone(form):
    _, row = make_row()
    row["weights"] = FORMS[form](row["weights"])
    before = checked_vector(row)[0].clone()
    one, other = reconstruct(row, copy=True), reconstruct(row, copy=True)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert torch.equal(before, checked_vector(row)[0])
    assert other.head.weight.abs().sum() > 0


@pytest.mark.parametrize("form", ["read-only array", "bytes", "memoryview", "list"])
def test_memory_that_is_not_to_be_written_to_never_is(form):
    _, row = make_row()
    row["weights"] = FORMS[form](row["weights"])
    before = checked_vector(row)[0].clone()
    with torch.no_grad():
        for parameter in reconstruct(row).parameters():
            parameter.zero_()
    assert torch.equal(before, checked_vector(row)[0])


def test_a_row_without_layout_column_is_taken():
    _, row = make_row()
    del row["layout"]
    assert checked_vector(row)[0].shape == (row["weights"].size,)


def test_another_layout_is_refused():
    _, row = make_row(layout="0123456789abcdef")
    told = r"sl-s1@2 has layout 0123456789abcdef, but its architecture gives layout [0-9a-f]{16}"
    with pytest.raises(ZooError, match=told):
        reconstruct(row)


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_length_is_refused(form):
    _, row = make_row()
    size = row["weights"].size
    row["weights"] = FORMS[form](row["weights"][:-1])
    with pytest.raises(ZooError, match=rf"sl-s1@2 has weights of shape \({size - 1},\); its layout wants \[{size}\]"):
        reconstruct(row)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_bytes_cut_within_a_number_are_refused(cut):
    _, row = make_row()
    with pytest.raises(ZooError, match=r"sl-s1@2 has \d+ bytes of weights; its layout wants \d+"):
        reconstruct(row | {"weights": row["weights"].tobytes()[:-cut]})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(bad):
    _, row = make_row()
    row["weights"][[5, 9]] = bad
    with pytest.raises(ZooError, match="sl-s1@2 has 2 weights that are not finite"):
        reconstruct(row)


@pytest.mark.parametrize("column", ["architecture", "architecture_args", "head", "weights"])
def test_a_missing_column_is_named(column):
    _, row = make_row()
    del row[column]
    with pytest.raises(ZooError, match=rf"the row has no column '{column}': take whole rows"):
        reconstruct(row)


def test_a_head_of_no_known_class_is_refused():
    _, row = make_row()
    for code in (-1, 2):
        with pytest.raises(ZooError, match=rf"unknown head {code}"):
            reconstruct(row | {"head": code})


@pytest.mark.gpu
def test_cuda_gets_one_vector():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model, row = make_row()
    there = reconstruct(row, device="cuda")
    assert all(parameter.is_cuda for parameter in there.parameters())
    assert len({parameter.untyped_storage().data_ptr() for parameter in there.parameters()}) == 1
    assert torch.equal(flatten(there.state_dict()).cpu(), flatten(model.state_dict()))


def test_changed_weights_are_refused_while_the_row_has_its_hash():
    from vitzoo_hf.zoo import Zoo

    row = next(Zoo.sample().rows())
    changed = row["weights"].copy()
    changed[3] += 1
    with pytest.raises(ZooError, match=r"the weights of .* do not match their hash"):
        reconstruct(row | {"weights": changed})
    reconstruct({name: value for name, value in row.items() if name != "weights_sha256"} | {"weights": changed})


def test_a_row_that_a_model_shares_is_hashed_again(tiny_zoo):
    row = next(Zoo(tiny_zoo).rows())
    with torch.no_grad():
        for parameter in vz.reconstruct(row).parameters():
            parameter.zero_()
    for again in (
        vz.reconstruct,
        lambda row: vz.reconstruct(row, copy=True),
        lambda row: vz.Population.from_rows([row]),
    ):
        with pytest.raises(ZooError, match="do not match their hash"):
            again(row)


def test_a_row_whose_model_has_a_copy_stays_as_it_was(tiny_zoo):
    row = next(Zoo(tiny_zoo).rows())
    with torch.no_grad():
        for parameter in vz.reconstruct(row, copy=True).parameters():
            parameter.zero_()
    assert vz.reconstruct(row).head.weight.any()


def test_weights_of_another_type_are_refused(tiny_zoo):
    row = dict(next(Zoo(tiny_zoo).rows()))
    with pytest.raises(ZooError, match="has weights of type int32; expected floating-point numbers"):
        vz.weights_of(row | {"weights": row["weights"].astype("int32")})
