"""Figures of synthetic zoos: a full one, and the odd ones that real blueprints lead to."""

import itertools
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.report import factors, plot_pairs
from vitzoo_hf.report import plot_models as plot
from vitzoo_hf.report import style as figure_style

GRID = {"optimizer": ["adamw", "sgd"], "lr": [0.003, 0.001, 0.0001], "head": ["linear", "mlp"], "seed": [42, 6312]}
EPOCHS = (0, 1, 5, 10, 20)


def curve(final, speed, epoch, start=0.1):
    return start + (final - start) * (1 - math.exp(-speed * epoch))


def tables(regimes=("supervised", "contrastive"), grid=GRID, epochs=EPOCHS, seed=0):
    """Index, evaluations and pairs of a zoo like the mini blueprint's, with plausible effects of its factors."""
    rng = np.random.default_rng(seed)
    rows = []

    def run(run_id, parent, regime, factors, final, speed):
        for epoch in epochs:
            accuracy = curve(final, speed, epoch) + rng.normal(0, 0.006)
            if parent is None and regime == "contrastive":
                accuracy = None
            row = {"model_id": f"{run_id}@{epoch}", "run_id": run_id, "parent_id": parent}
            row |= {"stage": "finetune" if parent else "pretrain", "epoch": epoch, "is_final": epoch == epochs[-1]}
            row |= {"dataset": "digits" if parent else "mnist5k", "head": factors.get("head", "linear")}
            row |= {"factor_regime": regime, **{f"factor_{name}": value for name, value in factors.items()}}
            row |= {"test_accuracy": accuracy, "test_loss": None if accuracy is None else -math.log(accuracy)}
            row |= {"train_accuracy": accuracy, "generalization_gap": None if accuracy is None else 0.02}
            rows.append(row)

    for i, regime in enumerate(regimes):
        base = f"{regime[:1]}l-s{42 + i}"
        run(base, None, regime, {"optimizer": "adamw", "lr": 0.003, "head": "linear", "seed": 42}, 0.94, 0.4)
        for values in itertools.product(*grid.values()):
            factors = dict(zip(grid, values, strict=True))
            lr = factors.get("lr", 0.001) * (0.12 if factors.get("optimizer") == "sgd" else 1)
            final = 0.97 - 0.09 * (max(0, math.log10(0.003 / lr))) ** 1.3 - 0.05 * (regime == "contrastive")
            final += 0.01 * (factors.get("head") == "mlp") + rng.normal(0, 0.012)
            name = "-".join(f"{key}{value}" for key, value in factors.items())
            run(f"{base}--{name}", f"{base}@{epochs[-1]}", regime, factors, final, 0.1 + 60 * lr)
    index = pd.DataFrame(rows)
    evaluations = index[index["test_accuracy"].notna()].reset_index(drop=True)
    evaluations["test_ece"] = 0.25 * (1 - evaluations["test_accuracy"]) + rng.uniform(0, 0.02, len(evaluations))
    evaluations["selection_accuracy"] = evaluations["test_accuracy"]
    return index, evaluations, pair_table(index, rng)


def pair_table(index, rng):
    final = index[index["is_final"]].to_dict("records")
    rows = []
    for a, b in itertools.combinations(final, 2):
        roots = [row["model_id"] if pd.isna(row["parent_id"]) else row["parent_id"] for row in (a, b)]
        same = roots[0] == roots[1]
        lrs = [400 * row["factor_lr"] if row.get("factor_lr", math.nan) > 0 else 0.4 for row in (a, b)]
        distance = math.hypot(*lrs) * 3 + (0 if same else 14) + rng.normal(0, 0.3) + 2
        row = {"model_a": a["model_id"], "model_b": b["model_id"], "same_parent": same, "dataset": "digits"}
        pretrained = "pretrain" in (a["stage"], b["stage"])
        agreement = min(0.99, 0.8 + 0.08 * same + sum(lrs) * 0.02 + rng.normal(0, 0.02))
        row |= {"agreement": None if pretrained else agreement, "same_head": a["head"] == b["head"]}
        row |= {"cka": min(1, 0.55 + 0.3 * same + sum(lrs) * 0.03 + rng.normal(0, 0.03)), "weight_l2": distance}
        rows.append(row | {"weight_cosine": 1 - distance / 40})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def zoo():
    return tables()


def draw(index, evaluations, pairs):
    figures = [plot.by_factor(evaluations), plot.learning_curves(index)]
    figures += [plot_pairs.pair_matrix(pairs, index, value) for value in ("agreement", "cka", "weight_l2")]
    for figure in [*figures, plot_pairs.distance_against_agreement(pairs)]:
        figure.draw_without_rendering()
        assert isinstance(figure, Figure)
    return figures


def texts(figure):
    found = [text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title, axes._left_title)]
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [*found, *(t.get_text() for legend in legends for t in (legend.get_title(), *legend.get_texts()))]


def test_figures_of_a_full_zoo_name_the_factors_strongest_first(zoo):
    figures = draw(*zoo)
    titles = [axes.get_title("left") for axes in figures[0].axes]
    assert titles == list(factors.explained_variance(zoo[1]).index)
    assert titles[:2] == ["lr", "optimizer"]
    assert "lr" in texts(figures[1])
    assert {"lr:", "cl-s43", "sl-s42"} <= set(texts(figures[2]))


def test_explained_variance_is_one_way_eta_squared(zoo):
    shares = factors.explained_variance(zoo[1])
    models = zoo[1].query("is_final and stage == 'finetune'")
    y = models["test_accuracy"].to_numpy()
    for name in ("lr", "optimizer", "head", "seed", "regime"):
        # R² of the least-squares fit on one indicator a level
        column = models[f"factor_{name}"].to_numpy()
        indicators = (column[:, None] == np.array(sorted(set(column)))).astype(float)
        residual = y - indicators @ np.linalg.lstsq(indicators, y, rcond=None)[0]
        assert shares[name] == pytest.approx(1 - residual @ residual / ((y - y.mean()) ** 2).sum(), abs=1e-12)


def models_table(**columns):
    size = len(next(iter(columns.values())))
    fixed = {"model_id": [f"r{i}@1" for i in range(size)], "stage": "finetune", "is_final": True}
    return pd.DataFrame({**fixed, **columns})


def test_explained_variance_at_its_ends():
    table = models_table(test_accuracy=[0.1, 0.1, 0.9, 0.9], factor_a=[1, 1, 2, 2], factor_b=["x", "y", "x", "y"])
    assert factors.explained_variance(table).to_dict() == pytest.approx({"a": 1, "b": 0})
    assert factors.explained_variance(table.assign(test_accuracy=0.5)).isna().all()
    plot.by_factor(table.assign(test_accuracy=0.5)).draw_without_rendering()


def test_only_final_fine_tuned_models_count(zoo):
    index = zoo[0]
    models = factors.final_models(index)
    assert len(models) == 48
    assert set(models["stage"]) == {"finetune"}
    pretrained = factors.final_models(index[index["stage"] == "pretrain"])
    assert list(pretrained["run_id"]) == ["sl-s42"]


def test_factors_of_all_types_become_levels():
    table = models_table(
        test_accuracy=np.linspace(0, 1, 40),
        factor_constant=[1.0] * 40,
        factor_flag=[True, False] * 20,
        factor_lr=[1e-5, 0.001, None, 3.0] * 10,
        factor_sampled=np.geomspace(1e-4, 1, 40),
        factor_name=[f"n{i}" for i in range(40)],
        factor_seed=list(range(20)) * 2,
        head=["linear", "mlp"] * 20,
        parent_id=["a@1"] * 20 + ["b@1"] * 20,
    )
    levels = factors.varying_factors(table)
    assert list(levels) == ["flag", "lr", "sampled", "seed", "parent"]  # head repeats flag
    assert list(levels["flag"].cat.categories) == ["false", "true"]
    assert list(levels["lr"].cat.categories) == ["1e-05", "0.001", "3", "none"]
    assert levels["sampled"].value_counts().tolist() == [8] * 5
    assert levels["seed"].nunique() == 20
    assert list(levels["parent"].cat.categories) == ["a", "b"]
    plot.by_factor(table).draw_without_rendering()


@pytest.mark.parametrize(
    ("regimes", "grid"),
    [
        (["supervised"], GRID),
        (["contrastive"], {"lr": [0.001, 0.003]}),
        (["supervised"], {"lr": [0.001, 0.003]}),
        (["supervised"], {"seed": [1, 2]}),
        (["supervised", "contrastive"], {"seed": [1]}),
        (["supervised"] * 12, {"seed": [1, 2], "lr": [0.001, 0.003]}),
        (["supervised"], {"lr": list(np.geomspace(1e-4, 1e-2, 30))}),
        (["supervised"], {"optimizer": [f"optimizer-with-a-long-name-{i}" for i in range(14)], "seed": [1, 2]}),
    ],
    ids=[
        "one lineage",
        "no accuracy before",
        "one factor",
        "3 models",
        "4 models",
        "12 lineages",
        "sampled",
        "many levels",
    ],
)
def test_figures_of_odd_zoos(regimes, grid):
    draw(*tables(regimes, grid, epochs=(0, 3)))


def test_random_factors_and_missing_pairs(zoo):
    index, evaluations, pairs = zoo
    some = pairs.assign(cka=pairs["cka"].where(pairs.index % 7 > 0))
    assert "no value" in texts(plot_pairs.pair_matrix(some, index, "cka"))
    assert "no value" not in texts(plot_pairs.pair_matrix(pairs, index, "cka"))
    plot_pairs.pair_matrix(pairs[pairs.index % 5 > 0], index).draw_without_rendering()
    for column in [c for c in evaluations if c.startswith("factor_")]:
        evaluations = evaluations.drop(columns=column)
    assert set(factors.explained_variance(evaluations).index) == {"head", "parent"}


def test_models_are_ordered_by_lineage_and_placed_at_their_pairs(zoo):
    index, _, pairs = zoo
    shuffled = pairs.sample(frac=1, random_state=1)
    rows, _ = plot_pairs._by_lineage(pd.unique(shuffled[["model_a", "model_b"]].to_numpy().ravel()), index)
    assert rows["lineage"].is_monotonic_increasing
    assert [list(part["tuned"]) for _, part in rows.groupby("lineage")] == [[False] + [True] * 24] * 2
    matrix = plot_pairs.pair_matrix(shuffled, index, "weight_l2").axes[0].images[0].get_array()
    place = {model: i for i, model in enumerate(rows["model_id"])}
    for pair in pairs.iloc[::97].itertuples():
        assert matrix[place[pair.model_a], place[pair.model_b]] == pair.weight_l2
        assert matrix[place[pair.model_b], place[pair.model_a]] == pair.weight_l2


def test_lineage_goes_to_the_root_and_survives_a_circle():
    index = models_table(test_accuracy=[0.1, 0.2, 0.3], parent_id=[None, "r0@1", "r1@1"])
    index = index.assign(run_id=["r0", "r1", "r2"])
    assert set(plot_pairs._by_lineage(index["model_id"], index)[0]["lineage"]) == {"r0"}
    circle = index.assign(parent_id=["r2@1", "r0@1", "r1@1"])
    assert len(plot_pairs._by_lineage(index["model_id"], circle)[0]) == 3


def test_rank_correlation_within_each_group():
    x = np.arange(10.0)
    pairs = pd.DataFrame({"weight_l2": [*x, *x], "agreement": [*(x / 10), *(1 - x**2 / 100)]})
    figure = plot_pairs.distance_against_agreement(pairs.assign(same_parent=[True] * 10 + [False] * 10))
    assert texts(figure)[-2:] == [
        "different parents: 10 pairs, Spearman -1.00",
        "same parent: 10 pairs, Spearman +1.00",
    ]


def test_nothing_to_draw_is_told_apart_from_a_wrong_table(zoo):
    index, evaluations, pairs = zoo
    for draw_empty in (
        lambda: plot.by_factor(evaluations.assign(test_accuracy=np.nan)),
        lambda: plot.learning_curves(index.assign(test_accuracy=np.nan)),
        lambda: plot_pairs.pair_matrix(pairs.assign(agreement=np.nan), index),
        lambda: plot_pairs.distance_against_agreement(pairs.assign(agreement=np.nan)),
    ):
        with pytest.raises(factors.NothingToDrawError):
            draw_empty()
    plot_pairs.pair_matrix(pairs, index.assign(test_accuracy=np.nan), "cka").draw_without_rendering()


def test_errors_are_one_clear_line(zoo):
    index, evaluations, pairs = zoo
    with pytest.raises(
        ZooError, match=r"^table 'evaluations' has no column 'test_accuracy': did you mean 'accuracy'\?$"
    ):
        plot.by_factor(evaluations[["model_id", "stage", "is_final"]].assign(accuracy=1.0))
    with pytest.raises(ZooError, match=r"^table 'index' has no rows"):
        plot.learning_curves(index[:0])
    with pytest.raises(ZooError, match=r"table 'pairs' has no column 'ckaa': did you mean 'cka'\?"):
        plot_pairs.pair_matrix(pairs, index, "ckaa")
    with pytest.raises(ZooError, match=r"table 'index' lacks 'cl-s43--.*same zoo"):
        plot_pairs.pair_matrix(pairs, index[index["factor_regime"] == "supervised"])


def test_style_does_not_leak(zoo):
    before = {key: matplotlib.rcParams[key] for key in figure_style.STYLE}
    plot.by_factor(zoo[1])
    assert {key: matplotlib.rcParams[key] for key in figure_style.STYLE} == before


def test_gap_and_accuracy_are_drawn_over_epochs_and_over_one(zoo):
    index = zoo[0].assign(generalization_gap=zoo[0]["test_accuracy"] / 10)
    figure = plot.learning_curves(index)
    assert [axes.get_ylabel() for axes in figure.axes] == ["test accuracy"] * 2 + ["training − test accuracy"] * 2
    line = figure.axes[3].lines[0]
    part = index[(index["stage"] == "finetune") & (index["epoch"] == 20) & (index["factor_lr"] == 0.0001)]
    assert line.get_ydata()[-1] == pytest.approx(part["generalization_gap"].median())
    plot.learning_curves(index[index["is_final"]].drop(columns="generalization_gap")).draw_without_rendering()
    assert len(plot.by_factor(index, "generalization_gap").axes) == 5


def test_the_overview_has_a_panel_for_whatever_was_measured(zoo):
    models = zoo[1].assign(test_brier=0.5, test_entropy=np.nan)
    shown = [axes.get_xlabel() for axes in plot.population_overview(models).axes if axes.get_visible()]
    assert shown == [plot.OVERVIEW[name] for name in plot.OVERVIEW if name != "test_entropy"]
