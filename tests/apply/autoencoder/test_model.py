"""Tokens, scaling, losses and the model of the weight autoencoder."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from vitzoo_hf.apply.autoencoder.losses import Composite, behavioural_loss, contrastive_loss, structural_loss
from vitzoo_hf.apply.autoencoder.metrics import Networks
from vitzoo_hf.apply.autoencoder.model import Sizes, WeightAutoencoder, embedding, embedding_by_layer, windows
from vitzoo_hf.apply.autoencoder.scaling import Scaling
from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.format.layout import Layout, flatten, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.models.vit import create
from vitzoo_hf.zoo import Zoo

ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
ODD = {
    "layer scale": {"init_values": 0.1},
    "qk norm": {"qk_norm": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "no qkv bias": {"qkv_bias": False},
}
SMALL = Sizes(width=16, latent=3, heads=2, blocks=1, projection=5, linear=False)


def layout_of_vit(head="linear", **changes) -> Layout:
    return Layout.of(
        create(
            "vit_tiny_patch16_224", ARGS | changes, head=head, head_hidden=8 if head == "mlp" else None
        ).state_dict()
    )


@pytest.fixture(scope="module")
def layout() -> Layout:
    return layout_of_vit()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("width", [None, 1, 7, 500])
def test_the_round_trip_is_exact_to_the_bit(layout, width, dense):
    tokenizer = Tokenizer.of(layout, width=width, dense=dense)
    vectors = torch.randn(3, layout.num_parameters)
    vectors[0, :4] = torch.tensor([float("inf"), -0.0, 1e-42, 3.0])
    tokens = tokenizer.tokens(vectors)
    assert tokens.shape == (3, tokenizer.num_tokens, tokenizer.width)
    back = tokenizer.vectors(tokens)
    assert back.numpy().tobytes() == vectors.numpy().tobytes()
    assert tokenizer.mask.sum() == layout.num_parameters
    assert (tokens[:, ~tokenizer.mask] == 0).all()


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_any_architecture_is_tokenised_whole(changes):
    layout = layout_of_vit(**changes)
    tokenizer = Tokenizer.of(layout)
    assert sorted(tokenizer.places[tokenizer.mask].tolist()) == list(range(layout.num_parameters))


def test_a_token_is_an_output_with_its_bias():
    model = create("vit_tiny_patch16_224", ARGS, head="mlp", head_hidden=8, seed=0)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    layout = Layout.of(state)
    tokenizer = Tokenizer.of(layout)
    tokens = tokenizer.tokens(flatten(state))

    def of(layer, role):
        chosen = (tokenizer.layers == layer) & (tokenizer.roles == tokenizer.role_names.index(role))
        return [token[mask] for token, mask in zip(tokens[chosen], tokenizer.mask[chosen], strict=True)]

    key = of(2, "attn.k")
    weight, bias = state["blocks.1.attn.qkv.weight"], state["blocks.1.attn.qkv.bias"]
    assert len(key) == 16
    assert torch.equal(key[5], torch.cat([weight[16 + 5], bias[16 + 5 : 16 + 6]]))
    (norm,) = of(1, "norm2")
    assert torch.equal(norm, torch.cat([state["blocks.0.norm2.weight"], state["blocks.0.norm2.bias"]]))
    assert len(of(0, "pos_embed")) == 5
    assert torch.equal(of(0, "pos_embed")[3], state["pos_embed"][0, 3])
    assert torch.equal(of(0, "cls_token")[0], state["cls_token"].flatten())
    patch = of(0, "patch_embed.proj")
    assert torch.equal(patch[2][:-1], state["patch_embed.proj.weight"][2].flatten())
    assert len(of(3, "head.0")), len(of(3, "norm"))
    assert {int(layer) for layer in tokenizer.layers} == {0, 1, 2, 3}


def test_what_does_not_fit_is_one_line(layout):
    tokenizer = Tokenizer.of(layout)
    with pytest.raises(ZooError, match=r"5 weights were given; layout .* makes \d+"):
        tokenizer.tokens(torch.zeros(2, 5))
    with pytest.raises(ZooError, match=r"4 tokens were given"):
        tokenizer.vectors(torch.zeros(4, tokenizer.width))
    with pytest.raises(ZooError, match="tokens of width 0"):
        Tokenizer.of(layout, width=0)
    with pytest.raises(ZooError, match="without tensors"):
        Tokenizer.of(Layout((), ()))


@pytest.mark.parametrize("how", ["none", "layer", "entry"])
def test_scaling_is_inverted_and_standardises_training_models(layout, how):
    tokenizer = Tokenizer.of(layout)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, layout.num_parameters, generator=generator) * (1 + tokenizer.groups) + tokenizer.groups
    scaling = Scaling.fit(vectors.split(7), tokenizer, how)
    seen = scaling.normalised(vectors)
    torch.testing.assert_close(scaling.restored(seen), vectors)
    if how == "none":
        assert torch.equal(seen, vectors)
        return
    for group in tokenizer.groups.unique():
        values = seen[:, tokenizer.groups == group].double()
        assert abs(values.mean()) < 1e-5
        assert values.square().mean().sqrt() == pytest.approx(1, abs=1e-4)
    if how == "entry":
        assert seen.mean(0).abs().max() < 1e-4


def test_what_no_training_model_varies_is_left_as_it_is(layout):
    tokenizer = Tokenizer.of(layout)
    vectors = torch.randn(5, layout.num_parameters)
    vectors[:, tokenizer.groups == 0] = 1 / 3
    scaling = Scaling.fit([vectors], tokenizer, "entry")
    assert (scaling.std[tokenizer.groups == 0] == 1).all()
    assert scaling.normalised(vectors).isfinite().all()
    with pytest.raises(ZooError, match="train split is empty"):
        Scaling.fit([], tokenizer, "layer")
    with pytest.raises(ZooError, match="unknown scaling 'rows'"):
        Scaling.fit([vectors], tokenizer, "rows")


@pytest.fixture(scope="module", params=[False, True], ids=["transformers", "linear maps beside them"])
def autoencoder(layout, request) -> WeightAutoencoder:
    torch.manual_seed(0)
    model = WeightAutoencoder(Tokenizer.of(layout), replace(SMALL, linear=request.param)).eval()
    for last in (model.leave_encoder, model.leave_decoder):
        torch.nn.init.normal_(last.weight, std=0.02)
    return model


def test_a_model_is_encoded_alike_alone_and_among_others(layout, autoencoder):
    tokens = Tokenizer.of(layout).tokens(torch.randn(64, layout.num_parameters))
    with torch.no_grad():
        together = autoencoder.decode(autoencoder.encode(tokens))
        alone = autoencoder.decode(autoencoder.encode(tokens[17:18]))
    torch.testing.assert_close(together[17:18], alone, rtol=1e-5, atol=1e-5)


def test_tokens_of_one_model_see_each_other_and_no_other_model(layout, autoencoder):
    tokens = Tokenizer.of(layout).tokens(torch.randn(2, layout.num_parameters)).requires_grad_()
    autoencoder.encode(tokens)[0, 3].sum().backward()
    assert (tokens.grad[1] == 0).all()
    assert (tokens.grad[0].abs().sum(1) > 0).all()


def test_padding_changes_nothing(layout, autoencoder):
    tokenizer = Tokenizer.of(layout)
    assert (~tokenizer.mask).any()
    tokens = tokenizer.tokens(torch.randn(2, layout.num_parameters))
    dirty = tokens.clone()
    dirty[:, ~tokenizer.mask] = 1e6
    assert torch.equal(autoencoder.encode(tokens), autoencoder.encode(dirty))
    assert (autoencoder.decode(autoencoder.encode(tokens))[:, ~tokenizer.mask] == 0).all()
    assert torch.equal(structural_loss(dirty, tokens, tokenizer.mask), torch.tensor(0.0))
    assert torch.equal(tokenizer.vectors(dirty), tokenizer.vectors(tokens))


@given(length=st.integers(1, 60), window=st.integers(1, 20), halo=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_windows_keep_every_token_once_in_order_with_equal_context(length, window, halo):
    kept, sizes = [], set()
    for seen, keep in windows(length, window, halo):
        kept += list(range(length))[seen][keep]
        sizes.add(seen.stop - seen.start)
    assert kept == list(range(length))
    assert sizes == {min(length, window + 2 * halo)}


def test_windows_with_all_tokens_in_sight_are_the_whole_sequence(layout):
    tokenizer = Tokenizer.of(layout)
    tokens = tokenizer.tokens(torch.randn(2, layout.num_parameters))
    outputs, weights = {}, None
    for window, halo in ((0, 0), (1000, 0), (20, 0), (20, tokenizer.num_tokens)):
        sizes = Sizes(width=16, latent=3, heads=2, blocks=1, window=window, halo=halo, linear=False)
        model = WeightAutoencoder(tokenizer, sizes).eval()
        held = {name: 10 * value for name, value in model.state_dict().items() if not name.startswith("projection")}
        weights = weights or held
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            outputs[window, halo] = model.encode(tokens)
    torch.testing.assert_close(outputs[0, 0], outputs[1000, 0])
    torch.testing.assert_close(outputs[0, 0], outputs[20, tokenizer.num_tokens], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0, 0], outputs[20, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10, "heads": 4}, "width 10 of the autoencoder does not divide into 4 heads"),
        ({"latent": 0}, "latent of the autoencoder is 0"),
        ({"halo": 3}, "window 0 with a halo of 3: a halo needs a window"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(changes, message):
    with pytest.raises(ZooError, match=message):
        Sizes(**changes)


def test_a_model_is_embedded_as_the_mean_of_its_tokens(layout, autoencoder):
    latents = autoencoder.encode(Tokenizer.of(layout).tokens(torch.randn(2, layout.num_parameters)))
    assert torch.equal(embedding(latents), latents.mean(1))
    assert autoencoder.project(latents).shape == (2, 5)


def test_an_embedding_by_layer_holds_mean_and_deviation_of_each(layout, autoencoder):
    tokenizer = Tokenizer.of(layout)
    latents = autoencoder.encode(tokenizer.tokens(torch.randn(3, layout.num_parameters))).detach()
    found = embedding_by_layer(latents, tokenizer.lengths).numpy().reshape(3, len(tokenizer.lengths), 2, -1)
    start = 0
    for layer, length in enumerate(tokenizer.lengths):
        rows = latents[:, start : start + length].double().numpy()
        np.testing.assert_allclose(found[:, layer, 0], rows.mean(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[:, layer, 1], rows.std(1), rtol=1e-4, atol=1e-5)
        start += length


def test_structural_loss_is_that_of_numpy(layout):
    tokenizer = Tokenizer.of(layout)
    a, b = (torch.randn(4, layout.num_parameters) for _ in range(2))
    expected = np.mean((a.double().numpy() - b.double().numpy()) ** 2)
    loss = structural_loss(tokenizer.tokens(a), tokenizer.tokens(b), tokenizer.mask)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    normalised = structural_loss(tokenizer.tokens(a), tokenizer.tokens(b), tokenizer.mask, normalise=True)
    assert float(normalised) == pytest.approx(expected / b.double().numpy().var(), rel=1e-5)
    scaled = structural_loss(tokenizer.tokens(3 * a), tokenizer.tokens(3 * b), tokenizer.mask, normalise=True)
    assert float(scaled) == pytest.approx(float(normalised), rel=1e-5)


def test_contrastive_loss_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    views = torch.cat([first, second])
    total = 0.0
    for anchor in range(10):
        similarity = [float(functional.cosine_similarity(views[anchor], other, 0)) / 0.1 for other in views]
        others = [math.exp(value) for position, value in enumerate(similarity) if position != anchor]
        total -= math.log(math.exp(similarity[(anchor + 5) % 10]) / sum(others))
    assert float(contrastive_loss(first, second)) == pytest.approx(total / 10, rel=1e-9)
    with pytest.raises(ZooError, match="at least two models"):
        contrastive_loss(first[:1], second[:1])


def test_behavioural_losses_are_those_of_numpy():
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (torch.randn(3, 7, 4, generator=generator) for _ in range(2))

    def soft(values, temperature=1.0):
        exponents = np.exp(values.double().numpy() / temperature)
        return exponents / exponents.sum(-1, keepdims=True)

    expected = {
        "softmax": ((soft(ours) - soft(theirs)) ** 2).mean(),
        "distillation": 4 * (soft(theirs, 2) * np.log(soft(theirs, 2) / soft(ours, 2))).sum(-1).mean(),
        "logits": ((ours.double() - theirs.double()) ** 2).mean().item(),
    }
    for kind, value in expected.items():
        found = behavioural_loss(ours, theirs, kind)
        assert float(found.loss) == pytest.approx(value, rel=1e-5)
        assert found.dropped == 0
        assert float(behavioural_loss(theirs, theirs, kind).loss) == pytest.approx(0, abs=1e-7)
    with pytest.raises(ZooError, match="unknown behavioural loss 'l2'"):
        behavioural_loss(ours, theirs, "l2")


def test_networks_that_are_not_finite_are_dropped_and_counted():
    ours, theirs = torch.randn(3, 7, 4), torch.randn(3, 7, 4)
    broken = ours.clone()
    broken[1, 0, 0] = torch.nan
    found = behavioural_loss(broken, theirs)
    assert found.dropped == 1
    torch.testing.assert_close(found.loss, behavioural_loss(ours[[0, 2]], theirs[[0, 2]]).loss)
    with pytest.raises(ZooError, match="none of 3 decoded networks has finite outputs"):
        behavioural_loss(torch.full_like(ours, torch.nan), theirs)


def test_the_first_batch_sets_the_scales():
    loss = Composite(0.05, 0.1)
    parts = {"structure": torch.tensor(7.0), "behaviour": torch.tensor(0.02), "contrast": torch.tensor(3.0)}
    assert float(loss(parts)) == pytest.approx(1, abs=1e-6)
    assert loss.scales == pytest.approx({"structure": 7.0, "behaviour": 0.02, "contrast": 3.0})
    assert float(loss(parts | {"behaviour": torch.tensor(0.0)})) == pytest.approx(0.05 + 0.095, abs=1e-6)
    again = Composite(0.05, 0.1, dict(loss.scales))
    assert float(again({name: 2 * value for name, value in parts.items()})) == pytest.approx(2, abs=1e-6)
    assert float(Composite(0.0, 1.0)({"structure": torch.tensor(7.0)})) == 1
    with pytest.raises(ZooError, match=r"share of 0\.9 for behaviour, which was not computed"):
        Composite(0.0, 0.1)({"structure": torch.tensor(7.0)})
    with pytest.raises(ZooError, match=r"the share of contrast is 2\.0; expected 0 to 1"):
        Composite(2.0, 0.1)
    with pytest.raises(ZooError, match="the first structure loss is nan"):
        Composite(0.0, 1.0)({"structure": torch.tensor(torch.nan)})


@pytest.fixture(scope="module")
def rows(tiny_zoo):
    zoo = Zoo(tiny_zoo).filter(stage="finetune", is_final=True, head="mlp")
    return zoo, list(zoo.rows())[:3]


def test_decoded_networks_compute_what_rebuilt_models_do(rows):
    zoo, (row, *others) = rows
    networks = Networks.like(row)
    images = zoo.probes(row["dataset"])[0][:9]
    vectors = torch.stack([torch.from_numpy(each["weights"]) for each in (row, *others)])
    logits = networks.logits(vectors, networks.patches(images))
    with torch.no_grad():
        for found, each in zip(logits, (row, *others), strict=True):
            torch.testing.assert_close(found, reconstruct(each, copy=True)(images), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_behaviour_is_its_finite_difference(rows):
    zoo, (row, other, _) = rows
    networks = Networks.like(row)
    patches = networks.patches(zoo.probes(row["dataset"])[0][:6]).double()
    target = networks.logits(torch.from_numpy(other["weights"])[None].double(), patches)
    vector = torch.from_numpy(row["weights"])[None].double().requires_grad_()

    def loss(values):
        probabilities = networks.logits(values, patches).softmax(2)
        return (probabilities - target.softmax(2)).square().mean()

    loss(vector).backward()
    direction = torch.randn_like(vector.detach())
    step = 1e-5
    with torch.no_grad():
        difference = (loss(vector + step * direction) - loss(vector - step * direction)) / (2 * step)
    assert float((vector.grad * direction).sum()) == pytest.approx(float(difference), rel=1e-5)


def test_gradients_reach_every_weight_through_tokens_and_scaling(rows):
    zoo, (row, *_) = rows
    networks = Networks.like(row)
    tokenizer = Tokenizer.of(networks.layout)
    vectors = torch.stack([torch.from_numpy(each["weights"]) for each in rows[1]])
    scaling = Scaling.fit([vectors], tokenizer, "entry")
    tokens = tokenizer.tokens(scaling.normalised(vectors)).requires_grad_()
    restored = scaling.restored(tokenizer.vectors(tokens))
    torch.testing.assert_close(restored.detach(), vectors, rtol=1e-4, atol=1e-6)
    logits = networks.logits(restored, networks.patches(zoo.probes(row["dataset"])[0][:16]))
    behavioural_loss(logits, torch.zeros_like(logits)).loss.backward()
    named = unflatten(tokenizer.vectors(tokens.grad), networks.layout)
    silent = {name for name, value in named.items() if not value.any()}
    assert not silent
    assert (tokens.grad[:, ~tokenizer.mask] == 0).all()


def test_other_architectures_are_refused_for_behaviour():
    row = {"architecture": "vit_tiny_patch16_224", "head": "linear", "head_hidden": None, "weights": None}
    with pytest.raises(ZooError, match="a behavioural loss needs plain ViTs"):
        Networks.like(row | {"architecture_args": json.dumps(ARGS | {"init_values": 0.1})})
