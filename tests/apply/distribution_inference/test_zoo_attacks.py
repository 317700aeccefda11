"""Attacks on zoos trained on worlds: queries of every candidate distribution, shadows of another zoo, controls."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import call
from packed_zoo import packed_zoo

from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, secret_of
from vitzoo_hf.apply.distribution_inference.zoo_attacks import BY_DEFAULT, READS, attack_card, attack_zoo
from vitzoo_hf.apply.distribution_inference.zoo_guards import guards_of
from vitzoo_hf.apply.distribution_inference.zoo_views import zoo_queries
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

TEXT = """\
name: NAME
architecture:
  name: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 4, in_chans: 3, embed_dim: WIDTH, depth: 1, num_heads: 2}
images:
  digits: {size: 8, selection: 0.4, world: two-colour, queries: 40, tests: 40}
stages:
  pretrain:
    images: digits
    epochs: 1
    settings: {lr: 0.01, batch_size: 24, epoch_steps: 30, num_images: 240}
    variants:
      - factors: {role: target, label_ratio: [0.9, 0.1]}
        replicas: 6
      - factors: {role: shadow, label_ratio: [0.9, 0.1]}
        replicas: 8
splits: {by: run, seed: 3, train: 0.6, validation: 0.2, test: 0.2}
"""


def trained(folder: Path, width: int, *changes: tuple[str, str]) -> Zoo:
    text = TEXT.replace("NAME", folder.name).replace("WIDTH", str(width))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return packed_zoo(folder, text)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("world") / "narrow", 8)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("world") / "wide", 16)


def test_query_sets_are_of_the_distributions_that_the_secret_may_have(zoo):
    secret, _ = secret_of([0.1, 0.9])
    batch, queries = zoo_queries(zoo, "factor_label_ratio", secret, num_queries=20, seed=0)
    assert queries.candidates.tolist() == [1, 0]  # worlds stand in the order of the blueprint, classes are sorted
    assert queries.origins.bincount().tolist() == [10, 10]
    assert batch.labels is not None
    assert torch.equal(queries.labels, batch.labels)
    shares = [queries.labels[queries.origins == origin].double().mean() for origin in (0, 1)]
    assert shares[0] > 0.6
    assert shares[1] < 0.4


def test_queries_of_other_distributions_are_left_out(zoo):
    """Of a secret that may be 0.1 alone among the worlds' ratios there is nothing to compare: one set of all."""
    _, queries = zoo_queries(zoo, "factor_label_ratio", ClassSecret((0.1, 0.4)), num_queries=40, seed=0)
    assert queries.candidates is None
    assert queries.origins.tolist() == [0] * 40


def test_numbers_have_a_query_set_for_each_level(tmp_path):
    text = ("label_ratio: [0.9, 0.1]", "label_ratio: [0.0, 0.5, 1.0]")
    zoo = trained(tmp_path / "levels", 8, text, ("replicas: 6", "replicas: 2"), ("replicas: 8", "replicas: 6"))
    secret, _ = secret_of([0.0, 0.5, 1.0])
    _, queries = zoo_queries(zoo, "factor_label_ratio", secret, num_queries=12, seed=0)
    assert queries.candidates.tolist() == [[0.0], [0.5], [1.0]]
    assert queries.origins.bincount().tolist() == [4, 4, 4]
    assert (queries.labels[queries.origins == 2] == 1).all()
    names = ["loss_test", "threshold_test", "kl_test", "ridge_on_outputs"]
    table = attack_zoo(zoo, "label_ratio", access="probabilities", attacks=names, num_queries=12).table
    assert (table["metric"] == "mae").all()
    assert table.set_index("attack").loc["kl_test", "value"] < 0.34


def test_every_attack_sees_a_label_ratio_and_none_when_secrets_are_shuffled(zoo):
    table = attack_zoo(zoo, "label_ratio", seeds=1).table.set_index("attack")
    assert set(table.index) == set(BY_DEFAULT)
    for name in ("loss_test", "kl_test", "per_point_threshold_test", "ridge_on_outputs"):
        assert table.loc[name, "value"] >= 0.9, name
    found = attack_zoo(zoo, "label_ratio", attacks=["kl_test"]).guesses
    assert found.groupby("factor_label_ratio")["kl_test_score"].mean().is_monotonic_increasing
    names = ["kl_test", "per_point_threshold_test", "ridge_on_outputs"]
    control = attack_zoo(zoo, "label_ratio", attacks=names, shuffled=True)
    assert (control.table["low"] < 0.5).all()
    assert (control.table["high"] > 0.5).all()
    assert (control.table["seeds"] == 20).all()
    assert "every attack should then be at chance level" in control.facts["guards"]["control"]
    with pytest.raises(ZooError, match="loss test learns nothing from shadows"):
        attack_zoo(zoo, "label_ratio", attacks=["loss_test"], shuffled=True)


def test_packing_a_world_names_the_attack_and_its_card_counts_images(zoo, capsys, tmp_path):
    made = Path(zoo.name).parent
    status, out, err = call(capsys, "pack", made / "zoo.yaml", made / "runs", "--out", tmp_path / "zoo")
    assert status == 0, err
    assert f"Next: vitzoo attack {tmp_path / 'zoo'} --secret label_ratio" in out + err
    images, _ = zoo_queries(zoo, "factor_label_ratio", ClassSecret((0.1, 0.9)), num_queries=40, seed=0)
    report = attack_zoo(zoo, "label_ratio", attacks=["kl_test"], num_queries=40, seeds=1)
    distinct = len(torch.unique(images.images.flatten(1), dim=0))
    assert report.facts["distinct_queries"] == distinct
    told = attack_card(report)
    assert (f"| 40 selection images, {distinct} different ones |" in told) == (distinct < 40)
    same = replace(report, facts=report.facts | {"distinct_queries": 31})
    assert "| 40 selection images, 31 different ones |" in attack_card(same)


def test_shadows_of_another_architecture(zoo, wide):
    report = attack_zoo(zoo, "label_ratio", shadows=wide, access="probabilities", seeds=1)
    assert set(report.table["attack"]) == set(BY_DEFAULT) - set(READS)
    assert report.table.set_index("attack").loc["kl_test", "value"] >= 0.9
    assert "shadows of another architecture" in report.facts["knowledge"]
    assert (report.facts["targets"], report.facts["shadows"]) == (12, 16)
    targets = zoo.filter(factor_role="target").model_ids
    assert list(report.guesses["model_id"]) == targets
    same = attack_zoo(zoo, "label_ratio", shadows=zoo.filter(factor_role="shadow"), access="labels", seeds=1)
    alone = attack_zoo(zoo, "label_ratio", access="labels", seeds=1)
    assert same.guesses.equals(alone.guesses)
    with pytest.raises(ZooError, match="weights of shadows of another zoo do not compare"):
        attack_zoo(zoo, "label_ratio", shadows=wide)


def test_fewer_queries_than_distributions(zoo):
    with pytest.raises(ZooError, match="1 queries of 2 distributions"):
        attack_zoo(zoo, "label_ratio", num_queries=1)


def test_the_verb_takes_shadows_of_another_zoo(zoo, wide, capsys):
    given = ["--secret", "label_ratio", "--access", "labels", "--attack", "kl_test", "loss_test", "--quiet"]
    status, told, _ = call(capsys, "attack", zoo.name, "--shadows", wide.name, *given)
    assert (status, "loss_test" in told) == (0, True)
    given = ["--secret", "label_ratio", "--attack", "kl_test", "--quiet"]
    status, told, _ = call(capsys, "attack", zoo.name, "--shuffled", *given)
    assert (status, "control: secrets of shadows were shuffled" in told) == (0, True)


def test_a_role_that_training_did_not_know_is_refused(zoo):
    index = zoo.to_pandas()
    secret, secrets = secret_of(index["factor_label_ratio"].tolist())
    index["own_role"] = ["target", "shadow"] * (len(index) // 2)
    shadows = torch.from_numpy((index["own_role"] == "shadow").to_numpy(copy=True))
    with pytest.raises(ZooError, match="own_role calls some models targets"):
        guards_of(index, "factor_label_ratio", "own_role", secrets, shadows, secret, False)


def test_several_numbers_are_guessed_at_once(tmp_path, capsys):
    text = ("label_ratio: [0.9, 0.1]", "label_ratio: [0.1, 0.5, 0.9], colour_agreement: [0.0, 0.5, 1.0]")
    zoo = trained(tmp_path / "pairs", 8, text, ("replicas: 6", "replicas: 2"), ("replicas: 8", "replicas: 4"))
    both = "label_ratio,colour_agreement"
    report = attack_zoo(zoo, both, seeds=1)
    table = report.table.set_index("attack")
    assert set(table.index) == set(BY_DEFAULT) - {"loss_test"}
    assert table.loc[["kl_test", "ridge_on_outputs"], "advantage"].min() > 0.3
    assert table["n_leaked"].isna().all()
    assert report.facts["space"] == "a number from 0.1 to 0.9, a number from 0 to 1"
    guesses = torch.tensor(report.guesses["kl_test"].tolist())
    truth = torch.tensor(report.guesses["factor_label_ratio,factor_colour_agreement"].tolist())
    assert table.loc["kl_test", "value"] == pytest.approx((guesses - truth).abs().mean().item(), abs=1e-6)
    for number in (0, 1):
        assert torch.corrcoef(torch.stack([guesses[:, number], truth[:, number]]))[0, 1] > 0.5
    status, told, _ = call(capsys, "attack", zoo.name, "--secret", both, "--attack", "kl_test", "--quiet")
    assert (status, "kl_test" in told) == (0, True)
