import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from vitzoo_hf import plot_pairs
from vitzoo_hf.plot import NothingToDrawError


def pairs_of(places, **columns):
    ids = [f"m{number}@1" for number in range(len(places))]
    rows = [
        {"model_a": ids[i], "model_b": ids[j], "weight_l2": float(np.linalg.norm(places[i] - places[j]))}
        | {name: value(i, j) for name, value in columns.items()}
        for i, j in itertools.combinations(range(len(ids)), 2)
    ]
    return pd.DataFrame(rows)


def evaluations_of(count, **columns):
    table = pd.DataFrame({"model_id": [f"m{number}@1" for number in range(count)], "stage": "finetune"})
    table = table.assign(is_final=True, test_accuracy=np.linspace(0.5, 0.9, count))
    return table.assign(**columns)


def test_a_map_of_points_in_the_plane_keeps_their_distances():
    places = np.random.default_rng(0).normal(size=(9, 2))
    found = plot_pairs.embedded(pairs_of(places), "weight_l2")
    again = found[["x", "y"]].to_numpy()
    distances = np.linalg.norm(places[:, None] - places, axis=-1)
    assert np.allclose(np.linalg.norm(again[:, None] - again, axis=-1), distances)


def test_models_without_all_distances_are_left_off_the_map():
    pairs = pairs_of(np.random.default_rng(0).normal(size=(6, 2)))
    lost = (pairs["model_a"] == "m2@1") | (pairs["model_b"] == "m2@1")
    found = plot_pairs.embedded(pairs.assign(weight_l2=pairs["weight_l2"].mask(lost)), "weight_l2")
    assert list(found["model_id"]) == ["m0@1", "m1@1", "m3@1", "m4@1", "m5@1"]
    with pytest.raises(NothingToDrawError, match="too few for a map"):
        plot_pairs.embedded(pairs[:3], "weight_l2")


def test_separation_tells_groups_from_noise():
    generator = np.random.default_rng(0)
    places = np.concatenate([generator.normal(size=(10, 2)), generator.normal(size=(10, 2)) + 20])
    silhouette, share = plot_pairs.separation(places, pd.Series(["a"] * 10 + ["b"] * 10))
    assert silhouette > 0.8
    assert share <= 2 / (plot_pairs.PERMUTATIONS + 1)
    silhouette, share = plot_pairs.separation(places, pd.Series(["a", "b"] * 10))
    assert abs(silhouette) < 0.2
    assert share > 0.05
    assert np.isnan(plot_pairs.separation(places, pd.Series(["a"] * 20))).all()


@pytest.mark.parametrize("factor", [["a", "b"] * 5, [1, 2] * 5, ["same"] * 10])
def test_figures_draw(factor):
    places = np.random.default_rng(0).normal(size=(10, 3))
    agreement = {"agreement": lambda i, j: 0.5 + 0.01 * (i + j), "cohen_kappa": lambda i, j: 0.4}
    pairs = pairs_of(places, same_parent=lambda i, j: i % 2 == j % 2, **agreement)
    evaluations = evaluations_of(10, factor_kind=factor, test_loss=1.0, test_ece=0.1)
    for figure in (
        plot_pairs.overview(evaluations),
        plot_pairs.modes(evaluations, pairs),
        plot_pairs.agreement_against_accuracy(evaluations, pairs),
    ):
        assert isinstance(figure, Figure)
        figure.draw_without_rendering()


def test_the_line_of_independent_errors_is_where_independent_models_lie():
    generator = np.random.default_rng(0)
    labels = np.zeros(200_000, int)
    wrong = [np.where(generator.random(labels.size) < 0.3, 1 + model, 0) for model in range(2)]
    assert (wrong[0] == wrong[1]).mean() == pytest.approx(0.7**2, abs=0.005)


def test_tables_of_earlier_versions_have_no_kappa_and_no_figure():
    pairs = pairs_of(np.eye(5), same_parent=lambda i, j: True, agreement=lambda i, j: 0.5)
    with pytest.raises(NothingToDrawError, match="has no kappa: evaluate the zoo again"):
        plot_pairs.agreement_against_accuracy(evaluations_of(5), pairs)


def test_layers_are_in_the_order_of_models_and_blocks():
    blocks = [(model, block) for model in ("z", "a") for block in range(11)]
    rows = [(*one, *other, i / 22 + j / 1000) for i, one in enumerate(blocks) for j, other in enumerate(blocks)]
    table = pd.DataFrame(rows, columns=["model_a", "block_a", "model_b", "block_b", "cka"])
    shown = plot_pairs.layer_matrix(
        table.sample(frac=1, random_state=0).sort_values(["model_a"], ascending=False, kind="stable")
    )
    matrix = plot_pairs.layer_matrix(table).axes[0].images[0].get_array()
    assert np.allclose(matrix, [[i / 22 + j / 1000 for j in range(22)] for i in range(22)])
    assert isinstance(shown, Figure)
