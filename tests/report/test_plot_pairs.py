"""Agreement between its bounds, and blocks against blocks."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.report import plot_pairs
from vitzoo_hf.report.factors import NothingToDrawError


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10**6))
def test_no_pair_of_predictions_agrees_more_than_the_most(classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 60)
    right = [rng.random(60) < rng.random() for _ in range(2)]
    a, b = (np.where(known, labels, rng.integers(0, classes, 60)) for known in right)
    accuracies = [pd.Series([float((x == labels).mean())]) for x in (a, b)]
    _, most = plot_pairs.agreement_bounds(*accuracies, pd.Series([classes]))
    assert (a == b).mean() <= most[0] + 1e-12


def test_independent_errors_agree_as_often_as_simulated_ones():
    rng = np.random.default_rng(0)
    size, classes = 400_000, 5
    predictions = []
    for accuracy in (0.7, 0.4):
        wrong = rng.integers(1, classes, size)  # the label is 0, errors are even over the others
        predictions.append(np.where(rng.random(size) < accuracy, 0, wrong))
    independent, most = plot_pairs.agreement_bounds(pd.Series([0.7]), pd.Series([0.4]), pd.Series([classes]))
    assert (predictions[0] == predictions[1]).mean() == pytest.approx(independent[0], abs=0.004)
    assert most[0] == pytest.approx(0.7)


def tables():
    names = [f"r{i}@1" for i in range(5)]
    accuracy = [0.9, 0.8, 0.7, None, 0.5]
    evaluations = pd.DataFrame({"model_id": names, "test_accuracy": accuracy})
    arguments = [json.dumps({"num_classes": count} if count else {}) for count in (10, 10, 10, 10, 7)]
    index = pd.DataFrame({"model_id": names, "architecture_args": arguments})
    pairs = pd.DataFrame(
        [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]], columns=["model_a", "model_b"]
    )
    return pairs.assign(same_parent=[True, False] * 5, agreement=0.75), evaluations, index


def test_pairs_get_their_accuracies_and_bounds():
    pairs, evaluations, index = tables()
    table = plot_pairs.accuracy_table(pairs, evaluations, index)
    assert len(table) == 6  # pairs of the model without an accuracy are left out
    row = table.set_index(["model_a", "model_b"]).loc[("r0@1", "r1@1")]
    assert row[["accuracy_a", "accuracy_b", "classes", "most"]].tolist() == pytest.approx([0.9, 0.8, 10, 0.9])
    assert row["independent"] == pytest.approx(0.72 + 0.02 / 9)
    other = table[table["model_b"] == "r4@1"]
    assert other[["classes", "independent"]].isna().all(axis=None)
    assert other["most"].notna().all()
    swapped = pairs.rename(columns={"model_a": "model_b", "model_b": "model_a"})
    turned = plot_pairs.accuracy_table(swapped, evaluations, index)
    pd.testing.assert_frame_equal(turned[["independent", "most"]], table[["independent", "most"]])


def test_panels_are_those_that_were_measured():
    pairs, evaluations, index = tables()
    measured = pairs.assign(cohen_kappa=np.nan, error_consistency=0.25)
    figure = plot_pairs.agreement_against_accuracy(plot_pairs.accuracy_table(measured, evaluations, index))
    assert [axes.get_title("left") for axes in figure.axes] == ["agreement", "error consistency"]
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == [
        "different parents: 2 pairs",
        "same parent: 4 pairs",
        "the most that the two accuracies allow",
        "if errors were independent",
    ]
    unknown = plot_pairs.accuracy_table(pairs, evaluations, index[["model_id"]])
    figure = plot_pairs.agreement_against_accuracy(unknown)
    assert "if errors were independent" not in [text.get_text() for text in figure.legends[0].get_texts()]
    with pytest.raises(NothingToDrawError):
        plot_pairs.accuracy_table(pairs.assign(agreement=np.nan), evaluations, index)
    with pytest.raises(NothingToDrawError):
        plot_pairs.accuracy_table(pairs, evaluations.assign(test_accuracy=np.nan), index)


def layer_table(depths, seed=0):
    blocks = [(f"r{i}@1", block) for i, depth in enumerate(depths) for block in range(depth)]
    rng = np.random.default_rng(seed)
    rows = [(*a, *b, 1.0 if a == b else rng.uniform(-0.1, 1)) for a in blocks for b in blocks]
    return pd.DataFrame(rows, columns=["model_a", "block_a", "model_b", "block_b", "cka"])


@pytest.mark.parametrize("depths", [(1,), (2, 3), (12, 12, 12, 12), (32, 24)])
def test_blocks_are_placed_where_they_belong(depths):
    layers = layer_table(depths)
    figure = plot_pairs.layer_matrix(layers)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    matrix = np.asarray(axes.images[0].get_array())
    assert matrix.ravel().tolist() == layers["cka"].tolist()
    assert [text.get_text() for text in axes.texts] == [f"model {i}" for i in range(1, len(depths) + 1)]
    assert len(axes.get_xticks()) <= 28


def test_layers_of_a_wrong_table_are_refused():
    with pytest.raises(ZooError, match=r"^table 'layers' has no column 'block_b'"):
        plot_pairs.layer_matrix(layer_table((2,)).drop(columns="block_b"))
    with pytest.raises(NothingToDrawError):
        plot_pairs.layer_matrix(layer_table((2,)).assign(cka=np.nan))
