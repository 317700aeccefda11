"""Symmetries change weights and never a function; canonical forms too."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vit_weights import logits_of, tensors_of, vit_row

from vitzoo_hf.apply.rebasin.canonical import balance_heads, canonical, fold_norms
from vitzoo_hf.apply.rebasin.symmetries import (
    FAMILIES,
    Sizes,
    Symmetry,
    apply,
    check_families,
    head_parts,
    order_of,
    sizes_of,
    to_tensors,
    transform,
    zero_mean_basis,
)
from vitzoo_hf.format.schema import ZooError

ALONE = [("mlp",), ("heads",), ("maps",), ("maps", "invertible"), ("residual",)]
ALL = FAMILIES[:5]


@pytest.mark.parametrize("head_hidden", [None, 5], ids=["linear", "mlp"])
@pytest.mark.parametrize("families", [*ALONE, ALL], ids="+".join)
def test_no_family_changes_the_function(families, head_hidden):
    row = vit_row(1, head_hidden=head_hidden)
    sizes, layout = sizes_of(row)
    g = Symmetry.random(sizes, seed=3, families=families)
    exact = row["weights"].double()
    changed = apply(exact, layout, g)
    assert (changed - exact).norm() > 1
    torch.testing.assert_close(logits_of(row, changed), logits_of(row, exact), rtol=0, atol=1e-10)
    rounded = apply(row["weights"], layout, g)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(logits_of(row, rounded), logits_of(row, exact), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_hidden", [None, 5], ids=["linear", "mlp"])
def test_the_rotated_canonical_form_computes_the_same(head_hidden):
    row = vit_row(2, head_hidden=head_hidden)
    sizes, layout = sizes_of(row)
    exact = row["weights"].double()
    folded = canonical(exact, layout, sizes, FAMILIES)
    rotated = apply(folded, layout, Symmetry.random(sizes, seed=1, families=FAMILIES))
    for vector in (folded, rotated):
        assert (vector - exact).norm() > 1
        torch.testing.assert_close(logits_of(row, vector), logits_of(row, exact), rtol=0, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), head_hidden=st.sampled_from([None, 5]))
def test_elements_are_a_group_that_acts(seed, head_hidden):
    row = vit_row(seed, head_hidden=head_hidden)
    sizes, layout = sizes_of(row)
    vector = canonical(row["weights"].double(), layout, sizes, ("residual", "rotation"))
    f, g, h = (Symmetry.random(sizes, seed=seed + step, families=FAMILIES) for step in (1, 2, 3))
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(apply(apply(vector, layout, f), layout, g), apply(vector, layout, g.after(f)), **close)
    torch.testing.assert_close(apply(apply(vector, layout, g), layout, g.inverse()), vector, **close)
    torch.testing.assert_close(apply(vector, layout, Symmetry.identity(sizes)), vector, rtol=0, atol=0)
    for left, right in ((h.after(g.after(f)), h.after(g).after(f)), (g.after(g.inverse()), Symmetry.identity(sizes))):
        for one, other in zip(dataclasses.astuple(left), dataclasses.astuple(right), strict=True):
            torch.testing.assert_close(one, other, **close)


def test_random_elements_follow_their_seed_and_families():
    sizes = Sizes(depth=2, width=12, heads=3, hidden=24, classifier=5)
    one, same, other = (Symmetry.random(sizes, seed=seed, families=FAMILIES) for seed in (1, 1, 2))
    assert torch.equal(one.residual, same.residual)
    assert not torch.equal(one.residual, other.residual)
    assert one.sizes == sizes
    ones = torch.ones(12, dtype=torch.float64)
    torch.testing.assert_close(one.residual @ ones, ones)
    torch.testing.assert_close(one.residual.T @ one.residual, torch.eye(12, dtype=torch.float64))
    assert order_of(one.residual) is None
    only = Symmetry.random(sizes, seed=1, families=("heads",))
    nothing = Symmetry.identity(sizes)
    assert torch.equal(only.hidden, nothing.hidden)
    assert not torch.equal(only.heads, nothing.heads)
    basis = zero_mean_basis(5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    assert basis.sum(0).abs().max() < 1e-12


def test_a_sign_of_one_channel_is_no_symmetry():
    row = vit_row(1)
    sizes, layout = sizes_of(row)
    vector = canonical(row["weights"].double(), layout, sizes, ("residual", "rotation"))
    signs = torch.eye(sizes.width, dtype=torch.float64)
    signs[0, 0] = -1
    flipped = apply(vector, layout, dataclasses.replace(Symmetry.identity(sizes), residual=signs))
    assert (logits_of(row, flipped) - logits_of(row, vector)).abs().max() > 1e-3


def test_balanced_heads_are_the_least_of_their_orbit():
    row = vit_row(4)
    sizes, _ = sizes_of(row)
    tensors = tensors_of(row)
    balance_heads(tensors, sizes)
    first = head_parts(tensors, 0, sizes.heads)
    torch.testing.assert_close(first.query @ first.query.mT, first.key @ first.key.mT)
    torch.testing.assert_close(first.value @ first.value.mT, first.output.mT @ first.output)
    least = sum(part.square().sum() for part in first)
    vector, layout = row["weights"].double(), sizes_of(row)[1]
    for seed in range(5):
        g = Symmetry.random(sizes, seed=seed, families=("maps", "invertible"))
        orbit = dict(tensors)
        transform(orbit, g)
        assert sum(part.square().sum() for part in head_parts(orbit, 0, sizes.heads)) > least
        again = to_tensors(apply(vector, layout, g), layout)
        balance_heads(again, sizes)
        torch.testing.assert_close(sum(part.square().sum() for part in head_parts(again, 0, sizes.heads)), least)


def test_folded_norms_are_plain_and_their_void_parts_gone():
    tensors = tensors_of(vit_row(5, head_hidden=4))
    fold_norms(tensors)
    assert all((tensors[name] == 1).all() for name in tensors if "norm" in name and name.endswith("weight"))
    assert all((tensors[name] == 0).all() for name in tensors if "norm" in name and name.endswith("bias"))
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "head.0.weight"):
        assert tensors[name].mean(1).abs().max() < 1e-12
    for name in ("blocks.1.attn.proj.weight", "blocks.0.mlp.fc2.bias", "patch_embed.proj.weight"):
        assert tensors[name].mean(0).abs().max() < 1e-12


def test_mistakes_are_told():
    row = vit_row(1)
    sizes, layout = sizes_of(row)
    with pytest.raises(ZooError, match="cannot be rotated, only permuted: fold the norms first"):
        apply(row["weights"], layout, Symmetry.random(sizes, seed=0, families=FAMILIES))
    with pytest.raises(ZooError, match=r"a symmetry of ViTs with Sizes\(.*hidden=7"):
        apply(row["weights"], layout, Symmetry.identity(sizes._replace(hidden=7)))
    with pytest.raises(ZooError, match="unknown family of symmetries 'head': did you mean 'heads'"):
        check_families(["head"])
    with pytest.raises(ZooError, match="family 'rotation' widens 'residual': give both"):
        check_families(["rotation"])
    args = row["architecture_args"].replace("{", '{"qk_norm": true, ', 1)
    with pytest.raises(ZooError, match="parts whose symmetries are not known"):
        sizes_of({**row, "architecture_args": args})
