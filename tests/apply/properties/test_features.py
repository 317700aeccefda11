"""Features of weights and of behaviour, each beside the same thing computed directly."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from weight_zoo import damage, epochs_zoo

from vitzoo_hf.apply.properties import features as property_features
from vitzoo_hf.apply.properties.features import (
    Features,
    flat_features,
    norm_features,
    spectra_features,
    split_qkv,
    statistics_features,
    table_features,
)
from vitzoo_hf.apply.properties.models import prepare, ridge_path
from vitzoo_hf.apply.properties.probing import measured_features, probing_features, probing_images
from vitzoo_hf.format.layout import is_head, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.weight_columns import WeightColumns


@pytest.fixture(scope="module")
def zoo(tiny_zoo):
    return Zoo(tiny_zoo)


@pytest.fixture(scope="module")
def trunks(zoo):
    """Model -> tensor -> float64 array, heads left out and qkv taken apart, by hand."""
    found = {}
    for row in zoo.rows():
        tensors = unflatten(torch.from_numpy(row["weights"]), zoo.layouts[row["layout"]])
        parts = {}
        for name, tensor in tensors.items():
            if is_head(name):
                continue
            value = tensor.numpy().astype(np.float64)
            if ".qkv." in name:
                size = len(value) // 3
                for number, kind in enumerate("qkv"):
                    parts[name.replace("qkv", kind)] = value[number * size : (number + 1) * size]
            else:
                parts[name] = value
        found[row["model_id"]] = parts
    return found


def test_statistics_are_those_of_numpy(zoo, trunks):
    found = statistics_features(zoo)
    assert list(found.model_ids) == zoo.model_ids
    for row, model_id in zip(found.values, found.model_ids, strict=True):
        expected = {}
        for name, value in trunks[model_id].items():
            expected |= {f"{name} mean": value.mean(), f"{name} variance": value.var()}
            expected |= {f"{name} quantile_{q:g}": np.quantile(value, q) for q in (0, 0.25, 0.5, 0.75, 1)}
        assert list(found.names) == list(expected)
        np.testing.assert_allclose(row, list(expected.values()), rtol=1e-5, atol=1e-8)


def test_spectra_are_those_of_numpy(zoo, trunks):
    found = spectra_features(zoo)
    table = pd.DataFrame(found.values, found.model_ids, found.names)
    for model_id, parts in trunks.items():
        for name, value in parts.items():
            if value.ndim not in (2, 4):
                assert not [column for column in table if column.startswith(f"{name} ")]
                continue
            singular = np.linalg.svd(value.reshape(len(value), -1), compute_uv=False)
            expected = [*singular[:3], (singular**2).sum() / singular[0] ** 2]
            columns = [f"{name} {kind}" for kind in (*(f"singular_value_{i}" for i in (1, 2, 3)), "stable_rank")]
            np.testing.assert_allclose(table.loc[model_id, columns], expected, rtol=1e-6)


def test_norm_is_that_of_the_trunk(zoo, trunks):
    expected = [np.sqrt(sum((value**2).sum() for value in parts.values())) for parts in trunks.values()]
    np.testing.assert_allclose(norm_features(zoo).values[:, 0], expected, rtol=1e-12)


def flat_of(trunks):
    return np.stack([np.concatenate([value.ravel() for value in parts.values()]) for parts in trunks.values()])


def test_flat_coordinates_have_the_distances_of_the_weights(zoo, trunks):
    weights, found = flat_of(trunks), flat_features(zoo).values
    assert found.shape[1] < len(weights)
    distances = [np.linalg.norm(each[:, None] - each[None], axis=-1) for each in (weights, found)]
    np.testing.assert_allclose(*distances, atol=1e-6)


def test_pca_and_ridge_on_coordinates_are_scikit_learns_on_the_weights(zoo, trunks):
    """Fitted on some models, applied to the others: what `flat` promises."""
    weights, found = flat_of(trunks), flat_features(zoo)
    random = np.random.default_rng(0)
    order = random.permutation(len(weights))
    train, test = order[:-4], order[-4:]
    target = random.normal(size=len(train))
    pca = PCA(3, svd_solver="full").fit(weights[train])
    scores = pca.transform(weights[train])
    alpha = 1e-2 * np.linalg.norm(scores - scores.mean(0), 2) ** 2
    expected = Ridge(alpha=alpha, solver="svd").fit(scores, target).predict(pca.transform(weights[test]))
    values = torch.from_numpy(found.values)
    known, unknown = prepare(values[train], values[test], 3)
    made = ridge_path(known, torch.from_numpy(target)[:, None], unknown, [1e-2])
    np.testing.assert_allclose(made[0, :, 0], expected, rtol=1e-8, atol=1e-10)


def test_blocks_of_columns_change_nothing(zoo, monkeypatch):
    whole = flat_features(zoo).values
    monkeypatch.setattr(Zoo, "weight_columns", small_blocks(Zoo.weight_columns))
    again = flat_features(zoo).values
    np.testing.assert_allclose(again @ again.T, whole @ whole.T, atol=1e-9)


def small_blocks(method):
    return lambda self, **options: method(self, **options, block_bytes=4 * len(self) * 37)


def test_statistics_and_spectra_do_not_know_the_head(zoo):
    """At epoch 0 the trunk of a child is that of its parent, whatever its head."""
    index = zoo.to_pandas().set_index("model_id")
    children = index[(index["stage"] == "finetune") & (index["epoch"] == 0)]
    assert set(children["head"]) == {"linear", "mlp"}
    for features in (statistics_features(zoo), spectra_features(zoo), norm_features(zoo), flat_features(zoo)):
        assert not [name for name in features.names if name.startswith("head")]
        of_children, of_parents = features.of(list(children.index)), features.of(list(children["parent_id"]))
        np.testing.assert_allclose(of_children, of_parents, atol=1e-7)


def test_zoos_of_one_layout_lose_their_heads_too():
    linear = Zoo.sample().filter(head="linear", stage="finetune")
    everything = Zoo.sample().filter(stage="finetune")
    names = statistics_features(everything).names
    assert statistics_features(linear).names == names
    np.testing.assert_allclose(
        statistics_features(linear).values, statistics_features(everything).of(linear.model_ids), rtol=1e-12
    )
    flat, whole = flat_features(linear).values, flat_features(everything).of(linear.model_ids)
    np.testing.assert_allclose(np.linalg.norm(flat[0] - flat[1]), np.linalg.norm(whole[0] - whole[1]))


def test_split_qkv_keeps_every_trunk_value_in_place(zoo):
    for layout in zoo.layouts.values():
        parts = split_qkv(layout)
        assert parts.num_parameters == len(layout.trunk())
        for name, place in layout.items():
            if ".qkv." in name:
                assert parts.place(name.replace("qkv", "q")).start == place.start
                assert parts.place(name.replace("qkv", "v")).stop == place.stop


def test_probing_gives_probabilities_of_live_models(zoo):
    tuned = zoo.filter(stage="finetune")
    found = probing_features(tuned, "digits", num_images=5, seed=3)
    images, labels = probing_images(tuned, "digits", 5, 3)
    measured = measured_features(tuned, "digits", num_images=5, seed=3)
    for number, row in enumerate(tuned.rows()):
        with torch.no_grad():
            logits = reconstruct(row)(images)
        expected = logits.double().softmax(1)
        np.testing.assert_allclose(found.values[number].reshape(5, -1), expected, atol=1e-5)
        assert measured.values[number, 0] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert measured.values[number, 1] == pytest.approx(loss, abs=1e-4)


def test_probing_never_takes_a_test_image(zoo, monkeypatch):
    selection, test = (zoo.probes("digits", role) for role in ("selection", "test"))
    mixed = {
        "selection": tuple(torch.cat([a[:6], b[:3]]) for a, b in zip(test, selection, strict=True)),
        "test": test,
    }
    monkeypatch.setattr(Zoo, "probes", lambda self, dataset, role: mixed[role])
    images, labels = probing_images(zoo, "digits", 3, 0)
    assert torch.equal(images, selection[0][:3])
    assert torch.equal(labels, selection[1][:3])
    with pytest.raises(ZooError, match="digits has 3 selection images that are no test images"):
        probing_images(zoo, "digits", 4, 0)


def test_features_refuse_what_they_cannot_mean():
    table = pd.DataFrame({"z0": [1.0, np.nan]}, index=["a@1", "b@1"])
    with pytest.raises(ZooError, match=r"'embedding' of b@1 are NaN"):
        table_features("embedding", table)
    with pytest.raises(ZooError, match="'kind' of features 'embedding' is not numeric"):
        table_features("embedding", table.assign(kind="x"))
    with pytest.raises(ZooError, match="a@1 twice"):
        table_features("embedding", pd.DataFrame({"z0": [1.0, 2.0]}, index=["a@1", "a@1"]))
    with pytest.raises(ZooError, match="lack 1 models, such as c@1"):
        table_features("embedding", table.fillna(0)).of(["a@1", "c@1"])
    with pytest.raises(ZooError, match="one row a model and one name a column"):
        Features("x", ("a",), np.zeros((2, 1)), ("y",))


def test_a_diverged_model_is_named(zoo, monkeypatch):
    broken = zoo.model_ids[3]

    def rows(self):
        for model_id, vector in zip(self.model_ids, original(self), strict=True):
            yield vector * float("nan") if model_id == broken else vector

    original = WeightColumns.rows
    monkeypatch.setattr(WeightColumns, "rows", rows)
    monkeypatch.setattr(property_features, "BATCH_BYTES", 1)
    with pytest.raises(ZooError, match=f"{broken} has NaN or infinite weights"):
        norm_features(zoo)


@pytest.mark.parametrize("take", [statistics_features, spectra_features, norm_features, flat_features])
def test_a_damaged_row_is_named(tmp_path, take):
    zoo = epochs_zoo(tmp_path / "zoo")
    damage(zoo, "c@2", tmp_path / "zoo")
    with pytest.raises(ZooError, match="the weights of c@2 do not match their hash"):
        take(Zoo(tmp_path / "zoo"))
    take(Zoo(tmp_path / "zoo"), verify=False)


def test_features_are_found_by_model_id(zoo):
    features = norm_features(zoo)
    backwards = dataclasses.replace(features, model_ids=features.model_ids[::-1], values=features.values[::-1])
    np.testing.assert_array_equal(backwards.of(zoo.model_ids), features.values)
