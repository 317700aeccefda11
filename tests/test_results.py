"""What the README of the desk zoo says is what its tables hold."""

from pathlib import Path

import pandas as pd
import pytest

DESK = Path(__file__).parent.parent / "results" / "desk"
README = " ".join((DESK / "README.md").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def final() -> pd.DataFrame:
    index = pd.read_csv(DESK / "index.csv")
    return index[(index["stage"] == "finetune") & index["is_final"]]


def test_counts():
    index = pd.read_csv(DESK / "index.csv")
    assert f"{index['run_id'].nunique()} models, {len(index)} checkpoints" in README
    assert index["weights_sha256"].str.fullmatch("[0-9a-f]{64}").all()


def test_accuracies_and_gaps(final):
    accuracy = {regime: runs["test_accuracy"] for regime, runs in final.groupby("factor_regime")}
    middle = {regime: values.median() for regime, values in accuracy.items()}
    assert f"{middle['supervised']:.2f} (supervised parents) and {middle['contrastive']:.2f} (contrastive)" in README
    lower = {regime: values.quantile(0.25) for regime, values in accuracy.items()}
    assert f"the lower quartile is {lower['supervised']:.2f} and {lower['contrastive']:.2f}" in README
    (gap,) = {f"{runs['generalization_gap'].median():.2f}" for _, runs in final.groupby("factor_regime")}
    assert f"({gap} for both)" in README


def test_what_factors_explain():
    factors = pd.read_csv(DESK / "data" / "factors.csv").set_index(["factor", "measure"])
    percent = {key: f"{100 * share:.0f}" for key, share in factors["share"].items()}
    parent = {measure: percent["parent", measure] for measure in ("weight_l2", "weight_cosine", "agreement")}
    assert (
        f"explains {parent['weight_l2']} % of the variance of L2 distances and {parent['weight_cosine']} %" in README
    )
    optimizer, lr = ({m: percent[f, m] for m in ("test_accuracy", "agreement")} for f in ("optimizer", "lr"))
    assert f"{optimizer['test_accuracy']} % and {lr['test_accuracy']} % of the variance of accuracy" in README
    assert f"and {optimizer['agreement']} % and {lr['agreement']} % of that of agreement" in README
    assert f"the parent {percent['parent', 'test_accuracy']} % and {parent['agreement']} %" in README
    for factor in ("optimizer", "lr", "head", "seed"):
        assert factors.loc[(factor, "weight_l2"), "share"] < 0.01


def test_pairs_of_like_and_unlike():
    levels = (
        pd.read_csv(DESK / "data" / "pairs_by_level.csv")
        .set_index(["factor", "metric", "same_level"])["median"]
        .sort_index()
    )
    cosine, agreement = (levels["parent", metric] for metric in ("weight_cosine", "agreement"))
    assert f"the cosine is {cosine[True]:.2f}, between parents {cosine[False]:.2f}" in README
    assert f"agree no more ({agreement[True]:.3f}) than children of two ({agreement[False]:.3f})" in README
    optimizer = levels["optimizer", "agreement"]
    assert f"with the same optimizer ({optimizer[True]:.2f} against {optimizer[False]:.2f})" in README
