"""Figures of factors say what their tables say."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from pair_zoo import zoo_of

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.report import factor_tables, plot_factors
from vitzoo_hf.report import style as figure_style

COLUMNS = ["measure", "factor", "share", "p", "least_p"]


def test_shares_stand_in_their_cells_and_what_no_test_can_tell_has_no_p():
    rows = [("test_accuracy", "lr", 0.5, 0.001, 0.001), ("test_accuracy", "regime", 0.1, 1.0, 1.0)]
    rows += [("cka", "lr", 0.25, 0.3, 0.001), ("cka", "regime", np.nan, np.nan, 0.001)]
    rows += [("test_accuracy", "all, additive", 0.75, 0.002, 0.001)]
    figure = plot_factors.variance(pd.DataFrame(rows, columns=COLUMNS))
    figure.draw_without_rendering()
    texts = {(round(text.get_position()[0]), round(text.get_position()[1])): [] for text in figure.axes[0].texts}
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        texts[(round(x), round(y))].append((text.get_text(), text.get_weight()))
    assert texts[(0, 0)] == [("0.50", "bold"), ("p 0.001", "normal")]
    assert texts[(0, 1)] == [("0.10", "normal"), ("–", "normal")]
    assert texts[(1, 0)] == [("0.25", "normal"), ("p 0.300", "normal")]
    assert texts[(1, 1)] == [("not defined", "normal")]
    assert texts[(0, 2)] == [("0.75", "bold"), ("p 0.002", "normal")]


def test_silhouettes_are_blue_above_chance_and_hollow_without_a_test():
    columns = ["space", "factor", "silhouette", "chance_5", "chance_95", "least_p"]
    rows = [
        ("weight_l2", name, value, -0.1, 0.1, least)
        for name, value, least in (("a", 0.5, 0.001), ("b", 0.0, 0.001), ("c", 0.7, 1.0))
    ]
    figure = plot_factors.separation(pd.DataFrame(rows, columns=columns))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "a", "b"]
    blue, grey, hollow = axes.collections
    assert blue.get_offsets().tolist() == [[0.5, 1]]
    assert to_hex(blue.get_facecolor()[0]).upper() == figure_style.PALETTE[0]
    assert grey.get_offsets().tolist() == [[0, 2]]
    assert hollow.get_offsets().tolist() == [[0.7, 0]]
    assert len(hollow.get_facecolor()) == 0


@pytest.mark.parametrize("parents", [1, 2, 4])
def test_boxes_are_the_quantiles_of_each_group(parents):
    rng = np.random.default_rng(0)
    names = [f"p{i % parents}@1" for i in range(16)]
    regime = [int(name[1]) % 2 for name in names]
    points = rng.normal(size=(16, 2))
    pairs, index = zoo_of(points, points / 20, names, lr=np.arange(16) // 8, regime=regime)
    table = factor_tables.level_pairs_table(pairs, index)
    figure = plot_factors.level_pairs(table)
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == {1: ["lr"], 2: ["regime", "parent", "lr *"], 4: ["parent", "regime †", "lr *"]}[parents]
    medians = [line for line in figure.axes[0].lines if line.get_linewidth() == 1.6]
    drawn = sorted((line.get_xdata()[0], round(float(np.mean(line.get_ydata())))) for line in medians)
    part = table[table["metric"] == "weight_l2"]
    order = [label.split(" ")[0] for label in labels]
    assert drawn == sorted((row.median, order.index(row.factor)) for row in part.itertuples())


def test_a_table_without_its_columns_is_refused():
    for draw in (plot_factors.variance, plot_factors.separation, plot_factors.level_pairs):
        with pytest.raises(ZooError, match="has no column"):
            draw(pd.DataFrame({"x": [1]}))
