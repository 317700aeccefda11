import numpy as np
import pandas as pd
import pytest
import torch
from soup_zoo import noisy_zoo

from vitzoo_hf.apply.intervals import gains, paired_difference
from vitzoo_hf.apply.soup.comparison import compare_soups, group_text, soup_groups
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo import Zoo


def logits_of(row, images):
    with torch.inference_mode():
        return reconstruct(row)(images).double()


def test_baselines_are_those_computed_by_hand(tiny_zoo):
    zoo = Zoo(tiny_zoo).filter(stage="finetune", is_final=True)
    found = compare_soups(zoo, by=["parent_id", "head"], methods=["uniform", "greedy"], progress=False)
    assert len(found.table) == len(found.soups) == 8
    assert found.left_out == {}
    images, labels = zoo.probes("digits")
    chosen_on = zoo.probes("digits", "selection")
    for line in found.table[found.table["method"] == "uniform"].to_dict("records"):
        rows = list(zoo.filter(parent_id=line["parent_id"], head=line["head"]).rows())
        assert line["candidates"] == line["ingredients"] == len(rows) == 2
        logits = torch.stack([logits_of(row, images) for row in rows])
        single = [(each.argmax(1) == labels).double().mean().item() for each in logits]
        selection = [(logits_of(row, chosen_on[0]).argmax(1) == chosen_on[1]).double().mean().item() for row in rows]
        best = int(np.argmax(selection))
        assert line["best_single"] == rows[best]["model_id"]
        assert line["best_single_selection"] == pytest.approx(selection[best])
        assert line["best_single_test"] == pytest.approx(single[best])
        assert line["oracle_test"] == pytest.approx(max(single))
        assert line["mean_test"] == pytest.approx(np.mean(single))
        right = logits.softmax(-1).mean(0).argmax(1) == labels
        assert line["ensemble_test"] == pytest.approx(right.double().mean().item())
        right = logits.mean(0).argmax(1) == labels
        assert line["logit_ensemble_test"] == pytest.approx(right.double().mean().item())
        mean = np.mean([row["weights"].astype(np.float64) for row in rows], axis=0).astype(np.float32)
        soup = logits_of(dict(rows[0], weights=mean, weights_sha256=None), images)
        assert line["test_accuracy"] == pytest.approx((soup.argmax(1) == labels).double().mean().item())
        assert line["gain"] == pytest.approx(line["test_accuracy"] - line["best_single_test"])
        assert line["over_ensemble"] == pytest.approx(line["test_accuracy"] - line["ensemble_test"])
        assert line["gain_low"] <= line["gain"] <= line["gain_high"]
    greedy = found.table[found.table["method"] == "greedy"]
    assert (greedy["selection_accuracy"] >= greedy["best_single_selection"]).all()


def test_comparison_is_the_same_again_and_from_a_cache(tiny_zoo, tmp_path):
    zoo = Zoo(tiny_zoo).filter(stage="finetune", is_final=True, head="mlp")
    options = {"by": ["head"], "methods": ["greedy", "learned"], "progress": False}
    first = compare_soups(zoo, cache=tmp_path, **options)
    again = compare_soups(zoo, cache=tmp_path, **options)
    pd.testing.assert_frame_equal(first.table, again.table)
    assert any(tmp_path.iterdir())
    assert first.soups[0].group == {"head": "mlp"}
    assert first.soups[0].num_test_images == len(zoo.probes("digits")[1])


def test_groups_of_one_model_are_named_and_others_refused(tiny_zoo):
    zoo = Zoo(tiny_zoo).filter(stage="finetune", is_final=True)
    some = zoo.filter(model_id=[*zoo.filter(head="mlp").model_ids, zoo.filter(head="linear").model_ids[0]])
    groups, left_out = soup_groups(some, ["head"])
    assert [group for group, _ in groups] == [{"head": "mlp"}]
    assert list(left_out) == ["head=linear"]
    assert left_out["head=linear"].startswith("one model only, ")
    with pytest.raises(ZooError, match="nothing to average: each of 8 groups has one model only"):
        soup_groups(zoo, ["model_id"])
    with pytest.raises(ZooError, match="nothing to average: the filter matches no model"):
        soup_groups(zoo.filter(model_id=[]), ["head"])
    with pytest.raises(ZooError, match=r"unknown column 'lr' to group by: did you mean 'factor_lr'"):
        soup_groups(zoo, ["lr"])
    with pytest.raises(ZooError, match=r"models of one head, .* group by it with --by"):
        soup_groups(zoo, ["parent_id"])
    with pytest.raises(ZooError, match="unknown method 'gredy': did you mean 'greedy'"):
        compare_soups(zoo, methods=["gredy"], progress=False)
    assert group_text({}) == "all"


def test_a_zoo_without_selection_images_is_refused(tmp_path, tiny_zoo):
    zoo = noisy_zoo(tmp_path / "zoo", tiny_zoo, runs=2, epochs=1, roles=("test",)).filter(is_final=True)
    with pytest.raises(ZooError, match="carries no selection images of 'digits'"):
        compare_soups(zoo, by=["head"], progress=False)


def test_a_model_whose_outputs_are_not_finite_is_named(tmp_path, tiny_zoo):
    def broken(row):
        return {"weights": np.full_like(row["weights"], np.nan)} if row["model_id"] == "run1@1" else {}

    zoo = noisy_zoo(tmp_path / "zoo", tiny_zoo, runs=2, epochs=1, change=broken).filter(is_final=True)
    with pytest.raises(ZooError, match=r"run1@1 .*leave it out with --where"):
        compare_soups(zoo, by=["head"], methods=["uniform"], progress=False)


def test_paired_interval_is_that_of_resampled_images():
    generator = np.random.default_rng(3)
    right, other = (torch.from_numpy(generator.random(400) < share) for share in (0.8, 0.7))
    found = paired_difference(right, other, resamples=20_000, seed=1)
    difference = right.double().numpy() - other.double().numpy()
    drawn = difference[generator.integers(400, size=(20_000, 400))].mean(1)
    assert found.mean == pytest.approx(difference.mean())
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.003)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.003)
    swapped = paired_difference(other, right, resamples=20_000, seed=1)
    assert swapped.mean == pytest.approx(-found.mean)


def test_gains_are_those_of_textbook_formulas():
    values = [0.01, 0.02, -0.005, 0.03, 0.0, 0.015, 0.011]
    found = gains(values)
    assert (found.number, found.share_better, found.share_worse) == (7, 5 / 7, 1 / 7)
    assert found.median == pytest.approx(np.median(values))
    assert found.sign_p == pytest.approx(2 * (6 + 1) / 2**6)  # 5 of 6 or more, both sides
    assert found.low < found.mean < found.high
    assert found.wilcoxon_p < 0.1
    assert gains([0.0, 0.0])[1:] == (0, 0, 0, 0, 0, 0, 1.0, 1.0)
    with pytest.raises(ValueError, match="0 differences"):
        gains([])
