"""Features of weights and the set encoder: loops and invariances; attacks on weights that tell a known secret."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from vitzoo_hf.apply.distribution_inference.attacks import set_encoder as set_encoders
from vitzoo_hf.apply.distribution_inference.attacks.features import (
    difference_components,
    head_features,
    last_layer,
    mlp_sets,
    sketch,
    sorted_neurons,
    tensor_features,
    views_of_mlps,
    vit_sets,
)
from vitzoo_hf.apply.distribution_inference.attacks.meta_models import standardised
from vitzoo_hf.apply.distribution_inference.attacks.set_encoder import DeepSets, SetEncoder, deep_sets, set_encoder
from vitzoo_hf.apply.distribution_inference.attacks.stacked_mlps import Widths, mlp_outputs
from vitzoo_hf.apply.distribution_inference.attacks.white_box import WHITE_BOX, label_ratio, log_odds_estimate
from vitzoo_hf.apply.distribution_inference.game import Shadows, Views, play
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, NumberSecret
from vitzoo_hf.format.layout import Layout, flatten, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.vit import create

HEADS, WIDTHS = 3, Widths(4, 6)


@pytest.fixture(scope="module")
def vit():
    args = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": HEADS}
    states = [create("vit_tiny_patch16_224", args | {"num_classes": 2}, seed=seed).state_dict() for seed in range(5)]
    generator = torch.Generator().manual_seed(0)
    vectors = torch.stack([flatten(state) for state in states])
    return vectors + 0.1 * torch.randn(vectors.shape, generator=generator), Layout.of(states[0])


def turned(vector, layout, seed):
    """The same ViT with neurons, heads, and dimensions within heads in another order, by plain indexing."""
    generator = torch.Generator().manual_seed(seed)
    parts = {name: value.clone() for name, value in unflatten(vector, layout).items()}
    width = parts["cls_token"].shape[-1]
    for block in range(2):
        name = f"blocks.{block}."
        order = torch.randperm(len(parts[name + "mlp.fc1.bias"]), generator=generator)
        parts[name + "mlp.fc1.weight"] = parts[name + "mlp.fc1.weight"][order]
        parts[name + "mlp.fc1.bias"] = parts[name + "mlp.fc1.bias"][order]
        parts[name + "mlp.fc2.weight"] = parts[name + "mlp.fc2.weight"][:, order]
        k = width // HEADS
        heads = torch.randperm(HEADS, generator=generator)
        query_key = torch.cat([head * k + torch.randperm(k, generator=generator) for head in heads])
        value = torch.cat([head * k + torch.randperm(k, generator=generator) for head in heads])
        places = torch.cat([query_key, width + query_key, 2 * width + value])
        parts[name + "attn.qkv.weight"] = parts[name + "attn.qkv.weight"][places]
        parts[name + "attn.qkv.bias"] = parts[name + "attn.qkv.bias"][places]
        parts[name + "attn.proj.weight"] = parts[name + "attn.proj.weight"][:, value]
    return flatten(parts)


def test_the_encoder_does_not_see_the_order_of_neurons_and_heads(vit):
    vectors, layout = vit
    other = torch.stack([turned(vector, layout, seed) for seed, vector in enumerate(vectors)])
    assert not torch.equal(vectors, other)
    torch.manual_seed(0)
    sets, same = vit_sets(vectors, layout, HEADS), vit_sets(other, layout, HEADS)
    encoder = SetEncoder(sets, 3).eval()
    with torch.no_grad():
        assert (encoder(sets) - encoder(same)).abs().max() < 1e-6
        assert encoder(sets).std(0).min() > 1e-4


def test_the_encoder_sees_every_parameter(vit):
    vectors, layout = vit
    vectors = vectors.clone().requires_grad_()
    torch.manual_seed(0)
    sets = vit_sets(vectors, layout, HEADS)
    SetEncoder(sets, 1).eval()(sets).sum().backward()
    for name, gradient in unflatten(vectors.grad, layout).items():
        assert (gradient != 0).any(), name
    rows = {name: values.numel() // 5 for name, values in vit_sets(vectors, layout, HEADS).items()}
    assert sum(rows.values()) == layout.num_parameters


def test_sets_of_mlps_follow_their_neurons():
    vectors = torch.randn(3, WIDTHS.layout.num_parameters, generator=torch.Generator().manual_seed(0))
    parts = unflatten(vectors, WIDTHS.layout)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    parts = {
        "hidden.weight": parts["hidden.weight"][:, order],
        "hidden.bias": parts["hidden.bias"][:, order],
        "output.weight": parts["output.weight"][:, :, order],
        "output.bias": parts["output.bias"],
    }
    other = torch.cat([part.flatten(1) for part in parts.values()], 1)
    x = torch.randn(1, 4, 9)
    torch.testing.assert_close(mlp_outputs(vectors, WIDTHS, x), mlp_outputs(other, WIDTHS, x))
    assert torch.equal(sorted_neurons(vectors, WIDTHS.layout), sorted_neurons(other, WIDTHS.layout))
    torch.manual_seed(0)
    sets, same = mlp_sets(vectors, WIDTHS.layout), mlp_sets(other, WIDTHS.layout)
    encoder, published = SetEncoder(sets, 2).eval(), DeepSets(sets, 2).eval()
    with torch.no_grad():
        assert (encoder(sets) - encoder(same)).abs().max() < 1e-6
        assert published(sets).shape == (3, 2)
    with pytest.raises(ZooError, match="not that of an MLP"):
        sorted_neurons(vectors, Layout(("w",), ((vectors.shape[1],),)))


def test_sketches_keep_inner_products_on_average():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 400, generator=generator)
    exact, found = values @ values.mT, (small := sketch(values, 96)) @ small.mT
    assert np.corrcoef(exact.flatten(), found.flatten())[0, 1] > 0.8
    assert (exact - found).mean().abs() < 2
    assert sketch(values, 400) is values


def test_components_are_those_of_scikit_learn():
    """In blocks, of differences to two bases, standardised by shadows alone."""
    generator = torch.Generator().manual_seed(0)
    bases = torch.randn(2, 30, generator=generator)
    owner = torch.arange(40) % 2
    moved = torch.randn(40, 30, generator=generator) @ torch.randn(30, 30, generator=generator)
    moved[:, 5] = 0.25  # a weight that no model changed its own way
    weights = torch.cat([bases[owner] + moved, bases])
    shadows = torch.arange(42) < 24
    place = torch.cat([40 + owner, torch.tensor([40, 41])])
    found = difference_components(weights.split(7, dim=1), shadows, torch.arange(40), place, components=5)
    known = moved[:24].double().numpy()
    spread = known.std(0)
    scaled = (moved.double().numpy() - known.mean(0)) / np.where(spread > 1e-6, spread, np.inf)
    expected = PCA(5, svd_solver="full").fit(scaled[:24]).transform(scaled)
    for one, other in zip(found.T, expected.T, strict=True):
        assert min(np.abs(one - other).max(), np.abs(one + other).max()) < 1e-3 * np.abs(other).max()
    changed = weights.clone()
    changed[30:40] += 100
    again = difference_components(changed.split(30, dim=1), shadows, torch.arange(24), place, components=5)
    np.testing.assert_allclose(np.abs(again), np.abs(found[:24]), rtol=1e-3, atol=1e-4)  # targets decide nothing
    with pytest.raises(ZooError, match="3 shadows are too few"):
        difference_components([weights], torch.arange(42) < 3, torch.arange(40), place)


def test_a_frozen_trunk_has_one_component_of_zeros_that_tells_nothing():
    weights = torch.ones(20, 6)
    found = difference_components([weights], torch.arange(20) < 12, torch.arange(20), torch.arange(20))
    assert found.shape == (20, 1)
    assert not found.any()


def test_targets_do_not_decide_how_features_are_standardised():
    own = np.random.default_rng(0).normal(size=(20, 3))
    own[:, 2] = 7
    one, seen = standardised(own, np.array([[0.0, 0.0, 9.0]]))
    other, _ = standardised(own, np.full((4, 3), 1e6))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one[:, :2].std(0), 1)
    assert seen[0, 2] == 0


def test_features_of_tensors_and_heads(vit):
    vectors, layout = vit
    weight, bias = last_layer(vectors, layout)
    parts = unflatten(vectors, layout)
    assert torch.equal(weight, parts["head.weight"])
    assert torch.equal(bias, parts["head.bias"])
    assert head_features(vectors, layout).shape == (5, 2 + 2 + 2 + 24)
    found = tensor_features(vectors, layout).numpy()
    names = len(layout.names)
    place = layout.names.index("blocks.1.mlp.fc1.weight")
    matrix = parts["blocks.1.mlp.fc1.weight"][3].double().numpy()
    assert found[3, place] == pytest.approx(matrix.mean(), rel=1e-4)
    assert found[3, 2 * names + place] == pytest.approx(np.linalg.norm(matrix), rel=1e-5)
    top = np.linalg.svd(matrix, compute_uv=False)[:8]
    assert any(
        np.allclose(found[3, start : start + 8], top, rtol=1e-5) for start in range(3 * names, found.shape[1] - 7)
    )


def test_log_odds_of_the_head_are_the_label_ratio():
    """A classifier that sees nothing learns the ratio; its biases are the closed form."""
    ratios = np.array([0.2, 0.3, 0.5, 0.9])
    bias = np.stack([np.log(1 - ratios), np.log(ratios)], 1)
    np.testing.assert_allclose(label_ratio(bias)[:, 0], ratios)
    seen = Views(features={"head_bias": bias})
    number = NumberSecret(((0.0, 1.0),))
    assert log_odds_estimate(Shadows(Views(), number.even(4), number), seen).secrets[:, 0].tolist() == pytest.approx(
        ratios
    )
    classes = ClassSecret((0.25, 0.5))
    guesses = log_odds_estimate(Shadows(Views(), classes.even(4), classes), seen)
    assert guesses.secrets.tolist() == [0, 0, 1, 1]
    with pytest.raises(ZooError, match="tell ratios, not classes such as 'east'"):
        log_odds_estimate(
            replace(Shadows(Views(), classes.even(4), classes), secret=ClassSecret(("east", "west"))), seen
        )


def mlps(count, seed, secrets):
    """MLPs whose neurons, in random order, have outgoing weights shifted by the secret."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, WIDTHS.layout.num_parameters, generator=generator)
    parts = unflatten(vectors, WIDTHS.layout)
    parts["output.weight"] += (
        2 * (2 * secrets.float() - 1)[:, None, None] * parts["hidden.weight"].mean(2)[:, None].sign()
    )
    features, sets = views_of_mlps(vectors, WIDTHS.layout)
    return Views(features=features, sets=sets)


def test_the_encoder_reads_what_no_single_weight_tells():
    """Signs of outgoing and incoming weights agree, or not: to one weight at a time both look the same."""
    secret = ClassSecret((0, 1))
    secrets, truth = secret.even(160), secret.even(60)
    shadows, targets = Shadows(mlps(160, 1, secrets), secrets, secret), mlps(60, 2, truth)
    outcome = play(shadows, targets, truth, set_encoder)
    assert outcome.accuracy.mean > 0.9


def test_networks_repeat_themselves_and_learn_nothing_from_permuted_secrets(monkeypatch):
    monkeypatch.setattr(set_encoders, "MOST_EPOCHS", 5)
    secret = ClassSecret((0, 1))
    secrets, truth = secret.even(60), secret.even(100)
    shadows, targets = Shadows(mlps(60, 1, secrets), secrets, secret), mlps(100, 2, truth)
    for attack in (set_encoder, deep_sets):
        one, again = (play(shadows.permuted(0), targets, truth, attack) for _ in range(2))
        assert torch.equal(one.guesses, again.guesses)
        assert abs(one.accuracy.mean - 0.5) < 0.25


def test_numbers_are_read_off_weights():
    secret = NumberSecret(((0.0, 1.0),))
    secrets, truth = secret.even(160), secret.even(50)
    views = []
    for count, seed, values in ((160, 1, secrets), (50, 2, truth)):
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(count, WIDTHS.layout.num_parameters, generator=generator)
        vectors[:, -1] = 3 * values[:, 0].float()
        features, sets = views_of_mlps(vectors, WIDTHS.layout)
        views.append(Views(features=features, sets=sets))
    shadows = Shadows(views[0], secrets, secret)
    for attack in (WHITE_BOX["flat_mlp"], WHITE_BOX["sorted_mlp"], deep_sets):
        assert play(shadows, views[1], truth, attack).advantage > 0.3


def test_mistakes_are_one_line():
    secret = ClassSecret((0, 1))
    shadows = Shadows(Views(), secret.even(10), secret)
    with pytest.raises(ZooError, match="reads 'components' off weights"):
        WHITE_BOX["components"](shadows, Views(), 0)
    with pytest.raises(ZooError, match="reads weights as sets"):
        set_encoder(shadows, Views())
    broken = Views(features={"head": np.full((10, 2), np.nan)})
    with pytest.raises(ZooError, match="NaN or infinite"):
        WHITE_BOX["head"](replace(shadows, views=broken), broken, 0)
    wide = Views(features={"flat": np.zeros((10, 200_001))})
    with pytest.raises(ZooError, match="200,001 flat weights"):
        WHITE_BOX["flat_mlp"](replace(shadows, views=wide), wide, 0)
