"""Attacks on a zoo of ViTs whose secret is known to lie in one bias; the verb, its card, its guards."""

import json

import numpy as np
import pytest
from command_line import call
from secret_zoo import secret_zoo

from vitzoo_hf.apply.distribution_inference.zoo_attacks import OF_ZOOS, attack_card, attack_zoo
from vitzoo_hf.apply.distribution_inference.zoo_views import groups_of, zoo_features
from vitzoo_hf.format.layout import is_head, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_zoo):
    return secret_zoo(tmp_path_factory.mktemp("secret") / "zoo", tiny_zoo).name


@pytest.fixture(scope="module")
def report(folder, tmp_path_factory):
    return attack_zoo(Zoo(folder), "label_ratio", seeds=1, num_queries=32, cache=tmp_path_factory.mktemp("cache"))


def test_every_attack_plays_and_the_leak_is_found(report):
    table = report.table.set_index("attack")
    assert set(table.index) == set(OF_ZOOS) - {"flat_mlp", "log_odds", "loss_test"}
    for name in ("kl_test", "per_point_threshold_test", "ridge_on_outputs"):
        assert table.loc[name, "value"] > 0.9, name
    assert table.loc["head", "value"] > 0.6  # twenty shadows are few for its two hundred features
    assert table["advantage"].to_numpy() == pytest.approx(2 * table["value"].to_numpy() - 1)
    assert (table["low"] <= table["value"]).all()
    assert np.isinf(table.loc["kl_test", "n_leaked"]) or table.loc["kl_test", "n_leaked"] > 1
    assert table["chosen"].sum() == 1
    assert table.loc[table["chosen"], "shadow_value"].item() == table["shadow_value"].max()
    assert (report.facts["targets"], report.facts["shadows"]) == (20, 20)
    right = report.guesses["kl_test"] == report.guesses["factor_label_ratio"]
    assert right.mean() == pytest.approx(table.loc["kl_test", "value"])


def test_without_a_leak_there_is_chance(tmp_path, tiny_zoo):
    zoo = secret_zoo(tmp_path / "zoo", tiny_zoo, models=120, leak=0.0)
    names = ["kl_test", "threshold_test", "ridge_on_outputs", "head", "components"]
    table = attack_zoo(zoo, "label_ratio", attacks=names, num_queries=16).table
    assert (table["value"] - 0.5).abs().max() < 0.25
    assert (table["low"] <= 0.55).all()


def test_features_are_of_differences_to_the_parent(folder):
    """Heads are new, so only trunks are subtracted; an independent reading of rows."""
    import torch

    zoo = Zoo(folder)
    models = zoo.filter(stage="finetune")
    (group,) = groups_of(models)
    parent = zoo.row(group.base)
    layout = models.layouts[next(iter(models.index["layout"]))]
    found = zoo_features(models, torch.arange(len(models)) % 2 == 0, ["flat", "head_bias", "sets"])
    old = unflatten(torch.as_tensor(np.asarray(parent["weights"])), zoo.layouts[parent["layout"]])
    for number, row in enumerate(models.rows()):
        own = unflatten(torch.as_tensor(np.asarray(row["weights"])), layout)
        parts = [own[name] if is_head(name) else own[name] - old[name] for name in layout.names]
        expected = torch.cat([part.flatten() for part in parts]).double().numpy()
        np.testing.assert_allclose(found.features["flat"][number], expected, rtol=1e-6, atol=1e-7)
    assert found.features["head_bias"].shape == (len(models), 10)
    assert found.sets["neurons"].shape[0] == len(models)


def test_numbers_and_label_access(tmp_path, tiny_zoo):
    zoo = secret_zoo(tmp_path / "zoo", tiny_zoo, models=60, ratios=(0.1, 0.3, 0.5, 0.7), leak=1.0)
    found = attack_zoo(zoo, "factor_label_ratio", access="probabilities", attacks=["kl_test", "ridge_on_outputs"])
    assert (found.table["metric"] == "mae").all()
    assert (found.table["advantage"] > 0.5).all()
    assert (found.table["n_leaked"] > 1).all()
    assert found.table.loc[found.table["chosen"], "shadow_value"].item() == found.table["shadow_value"].min()
    labels = attack_zoo(zoo, "label_ratio", access="labels", seeds=1).table
    assert set(labels["access"]) == {"labels"}
    assert labels["value"].max() <= 0.4


def test_the_verb_writes_tables_and_a_card(folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--secret", "label_ratio", "--attack", "kl_test,head", "--queries", "16"]
    status, told, _ = call(capsys, "attack", folder, *options, "--out", out, "--json")
    assert status == 0
    assert [row["attack"] for row in json.loads(told)["attacks"]] == ["kl_test", "head"]
    files = {file.name for file in out.iterdir()}
    assert files == {".evaluation", "attacks.csv", "guesses.csv", "attack_card.md"}
    card = (out / "attack_card.md").read_text()
    for said in ("`factor_label_ratio`, one of 0.3, 0.5", "targets T | 20", "equal: 1024", "Responsible use"):
        assert said in card, said
    status, told, _ = call(capsys, "attack", folder, *options)
    assert (status, "Next: the same with --out FOLDER" in told) == (0, True)


def test_the_card_says_what_was_not_equal(tmp_path, tiny_zoo):
    zoo = secret_zoo(tmp_path / "zoo", tiny_zoo, examples=(1536, 2048))
    with pytest.raises(
        ZooError, match=r"training examples differ.*1536 with secret 0.3, 2048 with secret 0.5.*--unequal"
    ):
        attack_zoo(zoo, "label_ratio", attacks=["head"])
    found = attack_zoo(zoo, "label_ratio", attacks=["head"], unequal=True)
    assert "NOT equal: 1536 to 2048" in attack_card(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"secret": "ratio"}, "has no column 'ratio'"),
        ({"secret": "label_ratio", "role": "stage"}, "0 final models are a target by column stage"),
        ({"secret": "label_ratio", "access": "gradients"}, "unknown access 'gradients'"),
        ({"secret": "label_ratio", "attacks": ["kl"]}, "unknown attack 'kl'"),
        (
            {"secret": "label_ratio", "attacks": ["head"], "access": "labels"},
            "head reads weights, but access is labels",
        ),
        ({"secret": "number"}, "takes other values with other secrets"),
        ({"secret": "label_ratio", "attacks": ["loss_test"]}, "needs a query set of every candidate"),
    ],
)
def test_mistakes_are_one_line(folder, options, message):
    with pytest.raises(ZooError, match=message):
        attack_zoo(Zoo(folder), **options)
