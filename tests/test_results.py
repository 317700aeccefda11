"""What the READMEs say of zoos that were made is what their tables hold."""

from pathlib import Path

import pandas as pd
import pytest

RESULTS = Path(__file__).parent.parent / "results"
DESK = RESULTS / "desk"


def words(file: Path) -> str:
    return " ".join(file.read_text(encoding="utf-8").split())


README, TOP = words(DESK / "README.md"), words(RESULTS.parent / "README.md")


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


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def test_lineage_in_the_readme():
    found = {}
    for zoo in ("desk", "mini"):
        table = pd.read_csv(RESULTS / "lineage" / f"{zoo}.csv")
        found[zoo] = table[table["case"] == "final"].set_index(["method", "trees_given", "score"]).sort_index()
    hubs = [found[zoo].loc[("hubs", False)] for zoo in ("desk", "mini")]
    for score in ("tree_accuracy", "edge_precision", "edge_recall", "direction_accuracy"):
        assert [float(table.loc[score, "value"]) for table in hubs] == [1, 1]
    chance = {
        score: " and ".join(f"{table.loc[score, 'chance']:.3f}" for table in hubs)
        for score in ("tree_accuracy", "edge_precision", "direction_accuracy")
    }
    assert f"tree accuracy is 1.000 on both (chance {chance['tree_accuracy']})" in TOP
    assert f"directed edges 1.000 (chance {chance['edge_precision']})" in TOP
    assert f"direction 1.000 (coin {chance['direction_accuracy']})" in TOP
    edges = [found[zoo].loc[("mother", True, "edge_recall"), "value"] for zoo in ("desk", "mini")]
    assert f"edges {edges[0]:.3f} and {edges[1]:.3f}: it joins siblings" in TOP


def test_soups_in_the_readme():
    table = pd.read_csv(RESULTS / "soup" / "soups_desk.csv")
    of_parent = table[table["design"] == "one parent and head, all factors"].groupby("method")
    accuracy, gain = of_parent["test_accuracy"].mean(), 100 * of_parent["gain"].mean()
    assert f"test accuracy {accuracy['greedy']:.3f}, gain {gain['greedy']:.2f}" in TOP
    assert f"learned soups gain {signed(gain['learned'])} points" in TOP
    ensemble = of_parent["ensemble_test"].mean()["uniform"]
    assert f"uniform ones reach {accuracy['uniform']:.3f}, the ensemble of all twelve {ensemble:.3f}" in TOP
    gains = {}
    for name in ("desk", "desk_every_epoch"):
        epochs = pd.read_csv(RESULTS / "soup" / f"epoch_gains_{name}.csv")
        gains[name] = epochs[epochs["stage"].isna()].set_index("average")
    last, chosen = gains["desk"].loc["last 2"], gains["desk"].loc["chosen on selection"]
    assert f"the last two lose {-100 * last['mean']:.2f} points over all {last['number']:.0f} runs" in TOP
    interval = " to ".join(signed(100 * chosen[side]) for side in ("low", "high"))
    assert f"averages gain {signed(100 * chosen['mean'])} ({interval}; median 0" in TOP
    every = gains["desk_every_epoch"].loc["last 2"]
    interval = " to ".join(signed(100 * every[side]) for side in ("low", "high"))
    assert f"every epoch kept gain {signed(100 * every['mean'])} ({interval};" in TOP


def test_rebasin_in_the_readme():
    summary = pd.read_csv(RESULTS / "rebasin" / "desk_summary.csv").set_index(["rung", "by", "population"])
    plain = [summary.loc[("none", "none", population)] for population in ("pretrained", "across")]
    for row in plain:
        assert f"{row['barrier']:.2f} (midpoint accuracy {row['midpoint_accuracy']:.2f})" in TOP or (
            f"{row['barrier']:.2f} ({row['midpoint_accuracy']:.2f})" in TOP
        )
    for rung in ("mlp", "heads", "permutations", "maps", "residual", "invertible", "rotation"):
        for by in ("weights", "activations"):
            cells = []
            for population in ("pretrained", "across"):
                row = summary.loc[(rung, by, population)]
                interval = " to ".join(signed(row[side]) for side in ("change_low", "change_high"))
                cells.append(f"{row['barrier']:.2f}, {signed(row['change'])} ({interval})")
            assert f"| {by} | {cells[0]} | {cells[1]} |" in TOP, rung


def test_properties_in_the_readme():
    table = pd.read_csv(RESULTS / "properties" / "desk.csv")
    chosen = table[(table["target"] == "test_accuracy") & (table["rows"] == "all") & (table["metric"] == "r2")]
    ridge = chosen[chosen["model"] == "ridge"].set_index(["features", "split"])
    run, lineage = (ridge.loc[("statistics", split)] for split in ("run", "lineage"))
    told = [f"{row['value']:.2f} ({row['low']:.2f}–{row['high']:.2f})" for row in (run, lineage)]
    assert f"has R² {told[0]} from statistics for unseen runs" in TOP
    assert f"shuffled labels have {run['shuffled']:.2f}, but {told[1]} for unseen lineages" in TOP
    flat, probing = (
        [ridge.loc[(name, split), "value"] for split in ("run", "lineage")] for name in ("flat", "probing_16")
    )
    assert f"Flat weights fall from {flat[0]:.2f} to {flat[1]:.2f}" in TOP
    assert f"has {probing[0]:.2f} and {probing[1]:.2f}**" in TOP


DECODERS = {
    "shared": ("S", "S+B", "nearest training model", "PCA"),
    "independent": ("S", "S+B", "PCA"),
    "aligned": ("S", "S+B", "constant best", "nearest training model", "PCA"),
}


@pytest.mark.parametrize("population", DECODERS)
def test_autoencoder_in_the_readme(population):
    table = pd.read_csv(RESULTS / "autoencoder" / f"{population}_arms.csv")
    test = table[(table["split"] == "test") & table["chosen"]]
    for name in DECODERS[population]:
        arm, method = (name, "autoencoder") if name in ("S", "S+B") else ("S", name.lower())
        part = test[(test["arm"] == arm) & (test["method"] == method)]
        columns = ["agreement", "retention", "specificity", "rank_correlation", "diversity"]
        shown = " | ".join(f"{part[column].mean():.3f}".replace("-0.000", "0.000") for column in columns)
        assert f"| {population} | {name} | {shown} |" in TOP, name


@pytest.mark.parametrize("population", ["independent", "aligned"])
def test_autoencoder_of_a_higher_rate_in_the_readme(population):
    table = pd.read_csv(RESULTS / "autoencoder" / f"{population}_variants.csv")
    chosen = table["variant"].eq("latent 15") & table["split"].eq("test") & table["method"].eq("autoencoder")
    found = table[chosen].iloc[0]
    columns = ["agreement", "retention", "specificity", "rank_correlation", "diversity"]
    shown = " | ".join(f"{found[column]:.3f}" for column in columns)
    assert f"| {population} | S+B, 15 numbers a token | {shown} |" in TOP
    pca = table[table["variant"].eq("latent 15") & table["split"].eq("test") & table["method"].eq("pca")].iloc[0]
    assert f"({100 * pca['agreement']:.0f} %, {100 * pca['retention']:.0f} %)" in TOP


def test_autoencoder_claims_and_arithmetic_in_the_readme():
    table = pd.read_csv(RESULTS / "autoencoder" / "shared_arms.csv")
    ours = table[(table["split"] == "test") & table["chosen"] & (table["method"] == "autoencoder")]
    s, sb = (ours[ours["arm"] == arm].set_index("seed") for arm in ("S", "S+B"))
    removed = 100 * (1 - (1 - sb["agreement"]) / (1 - s["agreement"]))
    assert f"removes {removed.min():.0f} to {removed.max():.0f} % of the disagreements of S" in TOP
    assert sb["failures"].isna().all()
    independent = pd.read_csv(RESULTS / "autoencoder" / "independent_arms.csv")
    alone = independent[(independent["split"] == "test") & (independent["method"] == "autoencoder")]
    beyond = alone.loc[alone["arm"] == "S", "r2_beyond_mean"].mean()
    assert f"S has an R² of {beyond:.2f} beyond the mean" in TOP
    additions = pd.read_csv(RESULTS / "arithmetic" / "additions_desk.csv")
    loss = -100 * additions["gain"].mean()
    assert f"is {loss:.1f} points" in TOP
    assert f"{len(additions)} pairs) below the better child" in TOP


def test_distribution_inference_in_the_readme():
    table = pd.read_csv(RESULTS / "distribution_inference" / "worlds.csv", keep_default_na=False)
    kl = table[(table["attack"] == "kl_test") & (table["access"] == "probabilities")].set_index("cell")["value"]
    assert f"in {kl['dmi_erm']:.3f} of the cases after ERM, {kl['dmi_causal']:.3f} after a causal" in TOP
    assert f"{kl['null']:.3f} where nothing differs" in TOP
    weights = table[(table["access"] == "weights") & table["cell"].eq("dmi_erm")]
    assert (
        weights.loc[weights["attack"].isin(["head", "components", "statistics", "set_encoder"]), "low"] < 0.5
    ).all()
