"""Membership scores against a slow loop, and the attack on models that remember what they were trained on."""

import numpy as np
import pandas as pd
import pytest
import torch
from packed_zoo import packed_zoo
from secret_zoo import secret_zoo

from vitzoo_hf.apply.distribution_inference.membership import (
    PERCENTS,
    Candidates,
    log_odds,
    membership_attack,
    membership_features,
    trained_on,
)
from vitzoo_hf.apply.distribution_inference.metrics import area_under_curve
from vitzoo_hf.apply.distribution_inference.zoo_attacks import attack_zoo
from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.zoo import Zoo

TEXT = """\
name: remembered
architecture:
  name: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 4, in_chans: 3, embed_dim: 16, depth: 1, num_heads: 2}
images:
  digits: {size: 8, selection: 0.4, world: two-colour, queries: 40, tests: 40}
stages:
  pretrain:
    images: digits
    epochs: 2
    settings:
      lr: 0.003
      schedule: cosine
      batch_size: 10
      epoch_steps: 200
      num_images: 40
      learner: resample
      resample_by: label
      resample_to: 0.5
    variants:
      - factors: {role: target, label_ratio: [0.5, 0.15]}
        replicas: 12
      - factors: {role: shadow, label_ratio: [0.5, 0.15]}
        replicas: 16
splits: {by: run, seed: 3, train: 0.6, validation: 0.2, test: 0.2}
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Zoo:
    return packed_zoo(tmp_path_factory.mktemp("membership"), TEXT, together=28)


def slow_features(answers, references, unseen, labels, leave_one_out):
    """One number at a time; quantiles by interpolation between sorted scores."""
    rows = []
    for model in range(len(answers)):
        scores = []
        for image in range(len(labels)):
            held = [
                float(references[other][image])
                for other in range(len(references))
                if unseen[other][image] and not (leave_one_out and other == model)
            ]
            mean = sum(held) / len(held)
            variance = sum((value - mean) ** 2 for value in held) / (len(held) - 3)
            scores.append((float(answers[model][image]) - mean) / (variance * (1 + 1 / len(held))) ** 0.5)
        summaries = []
        for label in (0, 1):
            own = sorted(score for score, held in zip(scores, labels, strict=True) if held == label)
            mean = sum(own) / len(own)
            found = [mean, (sum((score - mean) ** 2 for score in own) / len(own)) ** 0.5]
            for percent in PERCENTS:
                place = percent / 100 * (len(own) - 1)
                low = int(place)
                high = min(low + 1, len(own) - 1)
                found.append(own[low] + (place - low) * (own[high] - own[low]))
            summaries.append(found)
        rows.append([*summaries[0], *summaries[1], *(b - a for a, b in zip(*summaries, strict=True))])
    return np.array(rows)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_features_are_those_of_a_slow_loop(leave_one_out):
    generator = torch.Generator().manual_seed(1)
    references = torch.randn(14, 23, generator=generator) * 3 - 20
    answers = references if leave_one_out else torch.randn(5, 23, generator=generator) - 19
    unseen = torch.rand(14, 23, generator=generator) < 0.9
    labels = torch.tensor([0] * 10 + [1] * 13)
    found = membership_features(answers, references, unseen, labels, leave_one_out=leave_one_out)
    expected = slow_features(answers.tolist(), references.tolist(), unseen.tolist(), labels.tolist(), leave_one_out)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_features_stay_under_another_unit_of_each_image_and_another_order_of_images():
    generator = torch.Generator().manual_seed(2)
    references, answers = torch.randn(12, 30, generator=generator), torch.randn(4, 30, generator=generator)
    labels = torch.arange(30) % 2
    unseen = torch.ones(12, 30, dtype=torch.bool)
    expected = membership_features(answers, references, unseen, labels)
    scale, offset = torch.rand(30, generator=generator) + 0.5, torch.randn(30, generator=generator)
    changed = membership_features(answers * scale + offset, references * scale + offset, unseen, labels)
    np.testing.assert_allclose(changed, expected, atol=1e-4)
    order = torch.randperm(30, generator=generator)
    again = membership_features(answers[:, order], references[:, order], unseen, labels[order])
    np.testing.assert_allclose(again, expected, atol=1e-9)


def test_scores_of_models_that_saw_nothing_have_one_law_whoever_is_asked():
    """Mean 0 and deviation 1 for few references and for many, for a new model and for one left out."""
    generator = torch.Generator().manual_seed(3)
    answers, labels = torch.randn(60, 4000, generator=generator), torch.arange(4000) % 2
    unseen = torch.rand(60, 4000, generator=generator) < 0.5
    few = membership_features(answers, answers, unseen, labels, leave_one_out=True)
    many = membership_features(torch.randn(60, 4000, generator=generator), answers, torch.ones_like(unseen), labels)
    for found in (few, many):
        np.testing.assert_allclose(found[:, [0, 9]].mean(0), 0, atol=0.02)
        np.testing.assert_allclose(found[:, [1, 10]].mean(0), 1, atol=0.02)


def test_images_that_no_shadow_or_model_can_score_are_refused():
    answers, labels = torch.zeros(9, 4), torch.tensor([0, 1, 0, 1])
    unseen = torch.ones(9, 4, dtype=torch.bool)
    assert np.isfinite(membership_features(answers, answers, unseen, labels, leave_one_out=True)).all()
    unseen[0, 0] = False
    with pytest.raises(ZooError, match="7 shadows were not trained on some image"):
        membership_features(answers, answers, unseen, labels, leave_one_out=True)
    with pytest.raises(ZooError, match=r"labels are \[0\]"):
        membership_features(answers, answers, unseen, torch.zeros(4, dtype=torch.int64))


def test_candidates_are_of_their_part_in_every_look_of_the_worlds(zoo):
    blueprint = Blueprint.parse(zoo.blueprint_text)
    images = load_images("digits", blueprint.images["digits"])
    pool = images.pool
    chosen = Candidates.of(pool, "victim", 100, seed=1)
    assert len(chosen) == len(set(chosen.positions.tolist())) == 100
    assert set(chosen.positions.tolist()) <= set(pool.parts["victim"].tolist())
    assert chosen.labels.bincount().tolist() == [50, 50]
    assert torch.equal(chosen.labels, pool.shapes[chosen.positions])
    assert len(Candidates.of(pool, "victim", 10**6, seed=1)) == len(pool.parts["victim"])
    assert not torch.equal(chosen.positions, Candidates.of(pool, "victim", 100, seed=2).positions)
    some = chosen.take(torch.tensor([3, 60]))
    looks = list(some.looks(pool, torch.tensor([0, 1])))
    assert len(looks) == 2  # no world has group 1
    for colour, look in enumerate(looks):
        assert torch.equal(look[:, colour], pool.pixels[0, some.positions])
        assert not look[:, [1 - colour, 2]].any()
    with pytest.raises(ZooError, match="1 candidate images; expected at least two"):
        Candidates.of(pool, "victim", 1, seed=0)


def test_targets_know_their_own_images_better(zoo):
    """Membership comes from the record of each draw, scores from the models' answers; they agree."""
    blueprint = Blueprint.parse(zoo.blueprint_text)
    images = load_images("digits", blueprint.images["digits"])
    own, shadows = (zoo.filter(factor_role=role, is_final=True) for role in ("target", "shadow"))
    chosen = Candidates.of(images.pool, "victim", 1000, seed=0)
    members = trained_on(own, images.pool, blueprint, chosen)
    distinct = torch.tensor(own.to_pandas()["factor_trained_distinct_images"].to_list())
    assert torch.equal(members.sum(1), distinct)  # all images of the part are candidates
    assert not trained_on(shadows, images.pool, blueprint, chosen).any()
    answers = log_odds(own, images, chosen)
    scores = (answers - log_odds(shadows, images, chosen).mean(0)).double()
    areas = [area_under_curve(row, held) for row, held in zip(scores, members, strict=True)]
    assert np.mean(areas) > 0.6


def test_log_odds_are_those_of_the_models_one_by_one(zoo):
    blueprint = Blueprint.parse(zoo.blueprint_text)
    images = load_images("digits", blueprint.images["digits"])
    some = zoo.filter(is_final=True, model_id=zoo.filter(is_final=True).model_ids[:2])
    chosen = Candidates.of(images.pool, "adversary", 12, seed=0)
    found = log_odds(some, images, chosen)
    for number, model_id in enumerate(some.model_ids):
        for image in range(12):
            margins = []
            for look in chosen.looks(images.pool, torch.tensor([image])):
                with torch.no_grad():
                    shares = some.model(model_id)(images.normalize(look)).double().softmax(1)[0]
                share = shares[chosen.labels[image]].item()
                margins.append(np.log(share / (1 - share)))
            assert found[number, image].item() == pytest.approx(np.mean(margins), abs=1e-3)


@pytest.fixture(scope="module")
def found(zoo) -> pd.DataFrame:
    return membership_attack(zoo, "label_ratio", num_candidates=400)


def test_membership_tells_the_ratio_that_resampling_hides(zoo, found):
    assert list(found["attack"]) == ["membership"]
    assert found["low"][0] > 0.5
    table = attack_zoo(zoo, "label_ratio", access="probabilities", attacks=["kl_test"], num_queries=40).table
    assert list(found.columns) == list(table.columns)


def test_held_out_images_are_asked_about_instead(zoo, found):
    """Query images, which shadows and targets share: an attack of its own name, on other answers."""
    control = membership_attack(zoo, "label_ratio", held_out=True)
    assert list(control["attack"]) == ["held_out_images"]
    assert control["auc"][0] != found["auc"][0]


def test_mistakes_are_told(zoo, tmp_path, tiny_zoo):
    with pytest.raises(ZooError, match="no column 'label_rati'"):
        membership_attack(zoo, "label_rati")
    with pytest.raises(ZooError, match="final models are a target"):
        membership_attack(zoo.filter(factor_role="shadow"), "label_ratio")
    with pytest.raises(ZooError, match="has these worlds: none"):
        membership_attack(secret_zoo(tmp_path / "secret", tiny_zoo), "label_ratio")
    blueprint = Blueprint.parse(zoo.blueprint_text)
    pool = load_images("digits", blueprint.images["digits"]).pool
    chosen = Candidates.of(pool, "victim", 10, seed=0)
    fewer = Blueprint.parse(zoo.blueprint_text.replace("replicas: 16", "replicas: 1"))
    with pytest.raises(ZooError, match="is no run on a world in the blueprint"):
        trained_on(zoo, pool, fewer, chosen)
    other = load_images("digits", Blueprint.parse(TEXT.replace("0.4", "0.3")).images["digits"]).pool
    with pytest.raises(ZooError, match="was trained on other images"):
        trained_on(zoo, other, blueprint, chosen)
