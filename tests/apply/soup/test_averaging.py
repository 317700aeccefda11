import numpy as np
import pytest
import torch
from soup_zoo import noisy_zoo

from vitzoo_hf.apply.soup.averaging import (
    check_ingredients,
    greedy_soup,
    single_accuracies,
    uniform_soup,
    weighted_sums,
)
from vitzoo_hf.apply.soup.learned import _Mixture, learned_soup, onto_simplex
from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, tiny_zoo):
    return noisy_zoo(tmp_path_factory.mktemp("soup") / "zoo", tiny_zoo, runs=5, epochs=1, noise=0.05)


@pytest.fixture(scope="module")
def finals(zoo):
    return zoo.filter(is_final=True)


@pytest.fixture(scope="module")
def selection(zoo):
    return zoo.probes("digits", "selection")


def accuracy_of(weights, like, images, labels):
    """By the live timm model, not by our batched forward."""
    row = dict(like, weights=torch.as_tensor(np.asarray(weights), dtype=torch.float32), weights_sha256=None)
    with torch.inference_mode():
        return (reconstruct(row)(images).argmax(1) == labels).double().mean().item()


def test_uniform_soup_averages_every_parameter(finals):
    rows = list(finals.rows())
    expected = np.mean([row["weights"].astype(np.float64) for row in rows], axis=0)
    soup = uniform_soup(finals)
    np.testing.assert_allclose(soup.weights.numpy(), expected, rtol=6e-8, atol=1e-12)
    layout = finals.layouts[rows[0]["layout"]]
    turned = uniform_soup(finals._select_rows(finals._positions[::-1]))
    assert torch.equal(soup.weights, turned.weights)
    averaged, first = (unflatten(torch.as_tensor(v), layout) for v in (soup.weights, rows[0]["weights"]))
    assert {"cls_token", "pos_embed", "head.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= averaged.keys()
    for name, tensor in averaged.items():
        assert not torch.equal(tensor, first[name]), name


def test_soup_of_equal_models_is_that_model(tmp_path, tiny_zoo):
    zoo = noisy_zoo(tmp_path / "zoo", tiny_zoo, runs=3, epochs=1, noise=0.0).filter(is_final=True)
    weights = next(zoo.rows())["weights"]
    assert np.array_equal(uniform_soup(zoo).weights.numpy(), weights)
    soup = greedy_soup(zoo, *zoo.probes("digits", "selection"))
    assert np.array_equal(soup.weights.numpy(), weights)
    assert len(soup.ingredients) == 3  # none makes it worse, and equal is enough


def test_weighted_sums_are_linear_and_do_not_depend_on_the_order(finals):
    ids = finals.model_ids
    shares = {model_id: [float(number), 1.0] for number, model_id in enumerate(ids)}
    found = weighted_sums(finals, shares)
    matrix = np.stack([row["weights"].astype(np.float64) for row in finals.rows()])
    expected = np.array(list(shares.values())).T @ matrix
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found, weighted_sums(finals, dict(reversed(shares.items()))))
    with pytest.raises(ZooError, match="has no model 'nobody@1' to average"):
        weighted_sums(finals, {"nobody@1": [1.0]})


def test_greedy_soup_is_what_the_recipe_written_down_again_makes(finals, selection):
    rows = {row["model_id"]: row for row in finals.rows()}
    like = next(iter(rows.values()))
    single = {model_id: accuracy_of(row["weights"], row, *selection) for model_id, row in rows.items()}
    order = sorted(rows, key=lambda model_id: (-single[model_id], list(rows).index(model_id)))
    chosen, best = [], -1.0
    for model_id in order:
        trial = np.mean([rows[key]["weights"].astype(np.float64) for key in [*chosen, model_id]], axis=0)
        reached = accuracy_of(trial, like, *selection)
        if reached >= best:
            chosen, best = [*chosen, model_id], reached
    soup = greedy_soup(finals, *selection)
    assert soup.ingredients == chosen
    assert 1 < len(chosen) < len(rows)  # or the comparison would show little
    assert soup.selection_accuracy == pytest.approx(best)
    assert soup.selection_accuracy >= max(single.values()) - 1e-12
    mean = np.mean([rows[key]["weights"].astype(np.float64) for key in chosen], axis=0)
    np.testing.assert_allclose(soup.weights.numpy(), mean, rtol=6e-8, atol=1e-12)
    assert soup.num_selection_images == len(selection[1])


def test_single_accuracies_are_those_of_the_live_models(finals, selection):
    found = single_accuracies(finals, *selection)
    for row in finals.rows():
        assert found[row["model_id"]] == pytest.approx(accuracy_of(row["weights"], row, *selection))


def test_gradient_of_the_coefficients_is_that_of_autograd_through_all_weights(finals, selection):
    images, labels = selection[0][:40], selection[1][:40]
    mixture = _Mixture(finals, torch.device("cpu"))
    coefficients = torch.tensor([0.5, 0.2, 0.1, 0.3, -0.1], dtype=torch.float64)
    found = mixture.gradient(coefficients, images, labels)
    matrix = torch.stack([torch.from_numpy(row["weights"]) for row in finals.rows()])
    leaf = coefficients.float().requires_grad_()
    model = reconstruct(next(finals.rows()))
    named = unflatten(leaf @ matrix, mixture.layout)
    loss = torch.nn.functional.cross_entropy(torch.func.functional_call(model, named, (images,)), labels)
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-5)
    assert mixture.loss(coefficients, images, labels) == pytest.approx(loss.item(), rel=1e-4)


def test_simplex_projection_is_the_nearest_point():
    from scipy.optimize import minimize

    for seed in range(5):
        values = np.random.default_rng(seed).normal(size=6)
        found = onto_simplex(torch.from_numpy(values)).numpy()
        assert found.min() >= 0
        assert found.sum() == pytest.approx(1)
        best = minimize(
            lambda x, values=values: ((x - values) ** 2).sum(),
            np.full(6, 1 / 6),
            bounds=[(0, None)] * 6,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            options={"ftol": 1e-14},
        )
        np.testing.assert_allclose(found, best.x, atol=1e-5)
    inside = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(onto_simplex(inside), inside)


@pytest.mark.parametrize("convex", [True, False])
def test_learned_soup_lowers_the_loss_and_is_the_same_again(finals, selection, convex):
    soup = learned_soup(finals, *selection, convex=convex, epochs=4, batch_size=64)
    again = learned_soup(finals, *selection, convex=convex, epochs=4, batch_size=64)
    assert torch.equal(soup.weights, again.weights)
    assert soup.method == ("learned" if convex else "unconstrained")
    shares = torch.tensor(list(soup.coefficients.values()))
    if convex:
        assert shares.min() >= 0
        assert shares.sum().item() == pytest.approx(1)
    mixture = _Mixture(finals, torch.device("cpu"))
    equal = torch.full((len(finals),), 1 / len(finals), dtype=torch.float64)
    assert mixture.loss(shares.double(), *selection) < mixture.loss(equal, *selection)
    matrix = np.stack([row["weights"].astype(np.float64) for row in finals.rows()])
    np.testing.assert_allclose(soup.weights.numpy(), shares.double().numpy() @ matrix, rtol=1e-4, atol=1e-6)
    images, details = len(selection[1]), soup.details
    assert details["images_to_fit"] + details["images_to_choose"] == images


def test_learned_soup_starts_where_it_is_told_and_refuses_what_makes_no_sense(finals, selection):
    ids = finals.model_ids
    soup = learned_soup(finals, *selection, start={ids[2]: 1.0}, epochs=1, lr=1e-9)
    assert soup.coefficients[ids[2]] == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ZooError, match="start names 'nobody@1'"):
        learned_soup(finals, *selection, start={"nobody@1": 1.0})
    with pytest.raises(ZooError, match="kept=1"):
        learned_soup(finals, *selection, kept=1.0)
    with pytest.raises(ZooError, match="1 selection images cannot be divided"):
        learned_soup(finals, selection[0][:1], selection[1][:1])


def test_what_has_no_soup_is_refused_in_one_line(tiny_zoo, finals):
    zoo = Zoo(tiny_zoo)
    with pytest.raises(ZooError, match="at least two models, and the filter matches none"):
        check_ingredients(zoo.filter(model_id=[]))
    with pytest.raises(ZooError, match=r"at least two models, and there is one, run0@1: widen --where"):
        uniform_soup(finals.filter(run_id="run0"))
    with pytest.raises(ZooError, match="models of one head, and these 8 have linear, mlp"):
        uniform_soup(zoo.filter(stage="finetune", is_final=True))


def test_contrastive_models_are_refused_where_accuracy_is_needed(tmp_path, tiny_zoo):
    def contrastive(row):
        return {"provenance": '{"recipe": {"regime": "contrastive"}}'}

    zoo = noisy_zoo(tmp_path / "zoo", tiny_zoo, runs=2, epochs=1, change=contrastive).filter(is_final=True)
    assert uniform_soup(zoo).num_selection_images == 0
    for make in (greedy_soup, learned_soup):
        with pytest.raises(ZooError, match=r"2 of 2 models have no classifier, run0@1 the first .* is a projection"):
            make(zoo, *zoo.probes("digits", "selection"))


def test_weights_that_are_not_finite_are_named(tmp_path, tiny_zoo):
    def broken(row):
        if row["model_id"] == "run1@1":
            row["weights"][5] = np.nan
        return {}

    zoo = noisy_zoo(tmp_path / "zoo", tiny_zoo, runs=2, epochs=1, change=broken).filter(is_final=True)
    for make in (uniform_soup, lambda zoo: learned_soup(zoo, *zoo.probes("digits", "selection"))):
        with pytest.raises(ZooError, match="run1@1 has 1 weights that are not finite: leave it out with --where"):
            make(zoo)


@pytest.mark.gpu
def test_soups_on_cuda_are_those_on_the_cpu(finals, selection):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.testing.assert_close(uniform_soup(finals, device="cuda").weights.cpu(), uniform_soup(finals).weights)
    assert greedy_soup(finals, *selection, device="cuda").ingredients == greedy_soup(finals, *selection).ingredients
    learned = [learned_soup(finals, *selection, epochs=1, device=place).weights.cpu() for place in ("cpu", "cuda")]
    torch.testing.assert_close(*learned, rtol=1e-3, atol=1e-4)


def test_incomplete_figures_are_told(finals, selection):
    known = single_accuracies(finals, *selection)
    known.pop(finals.model_ids[0])
    with pytest.raises(ZooError, match=r"1 of .* candidates have no accuracy, .* the first: give one for every"):
        greedy_soup(finals, *selection, accuracies=known)
    first, second = finals.model_ids[:2]
    with pytest.raises(ZooError, match="models have 1 to 2 coefficients: give every model the same number"):
        weighted_sums(finals, {first: [1.0], second: [1.0, 2.0]})
