import numpy as np
import pandas as pd
import pytest
import torch

from vitzoo_hf.apply.paths.arithmetic import (
    best_scale,
    edited_weights,
    random_change,
    scale_table,
    strongest_scale,
    task_vector,
)
from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo):
    return Zoo(tiny_zoo)


@pytest.fixture(scope="module")
def child(zoo):
    supervised = zoo.filter(stage="finetune", is_final=True, head="mlp", factor_regime="supervised")
    return next(supervised.filter(factor_optimizer="adamw").rows())


@pytest.fixture(scope="module")
def parent(zoo, child):
    return zoo.row(child["parent_id"])


@pytest.fixture(scope="module")
def start(zoo, child):
    return zoo.row(f"{child['run_id']}@0")


def named(zoo, row, weights=None):
    vector = torch.as_tensor(row["weights"] if weights is None else weights)
    return unflatten(vector, zoo.layouts[row["layout"]])


def test_trunk_vector_is_child_less_parent_name_by_name(zoo, child, parent):
    change = task_vector(child, parent)
    after, before = named(zoo, child), named(zoo, parent)
    found = unflatten(change.values, change.layout)
    assert set(found) == {name for name in after if not name.startswith("head.")}
    for name, tensor in found.items():
        assert torch.equal(tensor, after[name] - before[name])


def test_adding_to_the_start_gives_the_child_back_and_scale_zero_changes_nothing(zoo, child, parent, start):
    whole = task_vector(child, start, head=True)
    np.testing.assert_allclose(edited_weights(start, whole), child["weights"], rtol=0, atol=1e-6)
    trunk = task_vector(child, parent)
    edited = named(zoo, start, edited_weights(start, trunk))
    for name, tensor in edited.items():
        target = named(zoo, start if name.startswith("head.") else child)[name]
        torch.testing.assert_close(tensor, target, rtol=0, atol=1e-6)
    assert np.array_equal(edited_weights(start, 0 * whole).numpy(), start["weights"])
    assert not np.shares_memory(edited_weights(start, whole).numpy(), start["weights"])


def test_epoch_zero_is_the_parent_in_the_trunk(child, parent, start):
    torch.testing.assert_close(task_vector(child, start).values, task_vector(child, parent).values)


def test_sums_scales_and_negation_are_those_of_vectors(child, parent, start):
    one, two = task_vector(child, parent), task_vector(start, parent)
    noise = random_change(one, seed=2)
    torch.testing.assert_close((0.5 * one + -noise).values, 0.5 * one.values - noise.values)
    torch.testing.assert_close(edited_weights(start, one + -one), torch.from_numpy(start["weights"]))
    assert float(two.values.norm()) < 1e-6
    with pytest.raises(ZooError, match="change different tensors: take both with the head, or both without"):
        one + task_vector(child, start, head=True)


def test_noise_has_the_norms_of_the_vector_and_not_its_direction(child, parent):
    change = task_vector(child, parent)
    noise = random_change(change, seed=2)
    for name, place in change.layout.items():
        torch.testing.assert_close(noise.values[place].norm(), change.values[place].norm(), msg=name)
    cosine = torch.cosine_similarity(noise.values, change.values, dim=0)
    assert abs(float(cosine)) < 0.1
    assert torch.equal(noise.values, random_change(change, seed=2).values)
    assert not torch.equal(noise.values, random_change(change, seed=3).values)


def test_heads_of_other_kinds_or_classes_are_refused(zoo, child, parent):
    with pytest.raises(ZooError, match=r"heads differ in kind or classes: take the trunk alone"):
        task_vector(child, parent, head=True)
    other = next(zoo.filter(stage="finetune", head="linear").rows())
    with pytest.raises(ZooError, match=r"has no tensor 'head.* which .* changes"):
        edited_weights(other, task_vector(child, zoo.row(f"{child['run_id']}@0"), head=True))


def test_scale_table_is_that_of_the_live_model(zoo, child, parent, start):
    images, labels = zoo.probes("digits", "selection")
    change = task_vector(child, parent)
    table = scale_table(child, change, [-1.0, 0.0, 0.5], images, labels)
    for line in table.to_dict("records"):
        weights = torch.from_numpy(child["weights"]).clone()
        weights[: len(change.values)] += line["scale"] * change.values  # the head comes last in timm's layout
        with torch.inference_mode():
            logits = reconstruct(dict(child, weights=weights, weights_sha256=None))(images)
        assert line["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
        assert line["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    with pytest.raises(ZooError, match="no scale was given"):
        scale_table(child, change, [], images, labels)


def test_scales_are_chosen_by_the_rules():
    table = pd.DataFrame(
        {"scale": [0.0, -0.5, -1.0, -1.5], "loss": [0.3, 0.3, 0.2, 2.0], "accuracy": [0.8, 0.79, 0.8, 0.2]}
    )
    assert best_scale(table) == -1.0
    assert strongest_scale(table) == -1.0
    assert strongest_scale(table, kept=0.2) == -1.5
    with pytest.raises(ZooError, match="the table has no scale 0"):
        strongest_scale(table[1:])


def test_no_scale_is_told():
    with pytest.raises(ZooError, match="no scale to select"):
        best_scale(pd.DataFrame({"scale": [], "loss": [], "accuracy": []}))
