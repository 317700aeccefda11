"""What the READMEs say of zoos that were made is what their tables hold."""

import importlib
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from places import REPOSITORY

from vitzoo_hf.apply.autoencoder.model import Sizes
from vitzoo_hf.apply.autoencoder.tokens import Tokenizer
from vitzoo_hf.blueprint.blueprint import Blueprint
from vitzoo_hf.models.architecture import Architecture

RESULTS = REPOSITORY / "results"
DESK, AUTOENCODER = RESULTS / "desk", RESULTS / "autoencoder"


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
    table = pd.read_csv(AUTOENCODER / f"{population}_arms.csv")
    test = table[(table["split"] == "test") & table["chosen"]]
    for name in DECODERS[population]:
        arm, method = (name, "autoencoder") if name in ("S", "S+B") else ("S", name.lower())
        part = test[(test["arm"] == arm) & (test["method"] == method)]
        columns = ["agreement", "retention", "specificity", "rank_correlation", "diversity"]
        shown = " | ".join(f"{part[column].mean():.3f}".replace("-0.000", "0.000") for column in columns)
        assert f"| {population} | {name} | {shown} |" in TOP, name


@pytest.mark.parametrize("population", ["independent", "aligned"])
def test_autoencoder_of_a_higher_rate_in_the_readme(population):
    found = higher_rate(population, "autoencoder")
    columns = ["agreement", "retention", "specificity", "rank_correlation", "diversity"]
    shown = " | ".join(f"{found[column]:.3f}" for column in columns)
    assert f"| {population} | S+B, 15 numbers a token | {shown} |" in TOP


def higher_rate(population: str, method: str) -> pd.Series:
    """The one row of the variant with 15 numbers a token, on test models."""
    table = pd.read_csv(AUTOENCODER / f"{population}_variants.csv")
    chosen = table["variant"].eq("latent 15") & table["split"].eq("test") & table["method"].eq(method)
    (row,) = (row for _, row in table[chosen].iterrows())
    return row


def reported(population: str, arm: str, method: str = "autoencoder") -> pd.DataFrame:
    """Test models at the chosen learning rate, a row a seed."""
    table = pd.read_csv(AUTOENCODER / f"{population}_arms.csv")
    chosen = table["split"].eq("test") & table["chosen"] & table["arm"].eq(arm) & table["method"].eq(method)
    found = table[chosen].set_index("seed").sort_index()
    assert list(found.index) == [0, 1, 2]
    return found


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def test_autoencoder_on_shared_initial_weights_in_the_readme():
    s, sb, b = (reported("shared", arm) for arm in ("S", "S+B", "B"))
    removed = 100 * (1 - (1 - sb["agreement"]) / (1 - s["agreement"]))
    assert f"removes {removed.min():.0f} to {removed.max():.0f} % of the disagreements of S; both pass" in TOP
    assert s["failures"].isna().all()
    assert sb["failures"].isna().all()
    ours, pca, nearest = (
        sb["agreement"].mean(),
        *(reported("shared", "S+B", method)["agreement"].mean() for method in ("pca", "nearest training model")),
    )
    assert pca > nearest > ours > nearest - 0.01, "PCA and narrowly the nearest training model agree more"
    assert abs(b["agreement"].mean() - ours) < 0.005, "B alone reaches as much as S+B"


def test_autoencoder_on_other_initial_weights_in_the_readme():
    s = reported("independent", "S")[["r2_beyond_mean", "retention"]].mean()
    assert f"R² of {s['r2_beyond_mean']:.2f} beyond the mean, and {percent(s['retention'])} of the accuracy" in TOP
    aligned = reported("aligned", "S+B")
    assert f"Aligned, it keeps {percent(aligned['retention'].mean())} of the accuracy" in TOP
    assert aligned["failures"].notna().all()
    best = reported("aligned", "S+B", "constant best")["agreement"]
    assert (best > aligned["agreement"]).all(), "the best training model, always decoded, agrees more"
    higher = higher_rate("aligned", "autoencoder")
    told = f"it keeps {percent(higher['retention'])}, agrees on {percent(higher['agreement'])} and fails by"
    correlation = f"{higher['rank_correlation']:.2f}"
    assert f"{told} the rank correlation of accuracies alone, {correlation} where 0.9 is asked" in TOP
    assert higher["failures"] == f"rank correlation {correlation} is below 0.9"
    aligned_pca, plain_pca = (higher_rate(population, "pca") for population in ("aligned", "independent"))
    shown = [f"({percent(row['agreement'])}, {percent(row['retention'])})" for row in (aligned_pca, plain_pca)]
    assert f"does as well there {shown[0]}, but not without alignment {shown[1]}" in TOP
    for column in ("agreement", "retention"):
        assert abs(aligned_pca[column] - higher[column]) < 0.01, "PCA does as well"
    alone = reported("independent", "S+B")["retention"].mean()
    by_rate, by_alignment = higher_rate("independent", "autoencoder")["retention"], aligned["retention"].mean()
    assert higher["retention"] > max(by_rate, by_alignment) > min(by_rate, by_alignment) > 2 * alone, "they add up"


def test_autoencoder_sizes_in_the_readmes():
    blueprint = Blueprint.load(AUTOENCODER / "independent.yaml")
    args = {**blueprint.architecture_args, "num_classes": 10}
    layout = Architecture(blueprint.architecture, args).layout
    tokens, numbers = Tokenizer.of(layout).num_tokens, layout.num_parameters
    usual = Sizes().latent
    assert f"ViTs of {numbers:,} parameters" in TOP
    assert f"{tokens * usual:,} latent numbers a model ({usual} a token)" in TOP
    assert f"PCA, of at most {tokens * usual:,} components" in TOP
    assert f"15 latent numbers a token as well, {tokens * 15 / numbers:.2f} a parameter (one seed)" in TOP
    own = words(AUTOENCODER / "README.md")
    assert f"at a rate of {tokens * usual / numbers:.2f} latent numbers a parameter" in own
    assert f"(15 numbers a token, {tokens * 15 / numbers:.2f} a parameter)" in own


def test_autoencoder_readme_is_what_its_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS.parent / "experiments")
    from autoencoder import report as autoencoder_report

    assert autoencoder_report.report() == (AUTOENCODER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def autoencoder_commands() -> dict[str, list[list[str]]]:
    """Script -> the arguments of its commands in the README, as bash gives them."""
    block = (AUTOENCODER / "README.md").read_text(encoding="utf-8").split("```")[1]
    told = """vitzoo() { :; }; python() { printf '%s\\0' "$@"; printf '\\n'; }"""
    found: dict[str, list[list[str]]] = {}
    output = subprocess.run(["bash", "-euc", told + block], check=True, capture_output=True, text=True).stdout
    for line in output.splitlines():
        script, *arguments = line.split("\0")[:-1]
        found.setdefault(Path(script).stem, []).append(arguments)
    return found


@pytest.mark.parametrize("population", ["shared", "independent", "aligned"])
def test_commands_of_the_autoencoder_give_the_committed_cells(population, autoencoder_commands, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS.parent / "experiments")
    from autoencoder import grid

    asked = [grid.parser().parse_args(arguments) for arguments in autoencoder_commands["grid"]]
    cells = [cell for one in asked if one.name == population for cell in grid.planned(one)]
    wanted = {tuple(cell.labels.values()) for cell in cells}
    assert len(wanted) == len(cells)
    tables = [pd.read_csv(AUTOENCODER / f"{population}_{kind}.csv") for kind in ("arms", "variants")]
    table = pd.concat(tables).fillna({"variant": ""})
    assert wanted == set(table[["arm", "variant", "lr", "seed", "steps"]].itertuples(index=False, name=None))


def test_commands_of_the_autoencoder_give_the_committed_curves_and_uses(autoencoder_commands, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS.parent / "experiments")
    from autoencoder import curve

    asked = [curve.parser().parse_args(each) for each in autoencoder_commands["curve"]]
    assert {one.name for one in asked} == {file.stem[: -len("_curve")] for file in AUTOENCODER.glob("*_curve.csv")}
    for name in {one.name for one in asked}:
        plans = [plan for one in asked if one.name == name for plan in curve.planned(one)]
        wanted = sorted((arm, size, recipe.steps, recipe.seed, recipe.lr) for arm, size, recipe in plans)
        table = pd.read_csv(AUTOENCODER / f"{name}_curve.csv")[["arm", "runs", "steps", "seed", "lr"]]
        assert wanted == sorted(table.drop_duplicates().itertuples(index=False, name=None))
    used = [arguments[1] for arguments in autoencoder_commands["use"]]
    assert used == [file.stem[: -len("_generated")] for file in AUTOENCODER.glob("*_generated.csv")]


@pytest.mark.parametrize("study", ["lineage", "properties", "rebasin"])
def test_readmes_are_what_their_scripts_write_from_the_tables(study):
    script = importlib.import_module(study)
    assert script.readme() == (RESULTS / study / "README.md").read_text(encoding="utf-8")


def test_arithmetic_in_the_readme():
    additions = pd.read_csv(RESULTS / "arithmetic" / "additions_desk.csv")
    loss = -100 * additions["gain"].mean()
    assert f"is {loss:.1f} points" in TOP
    assert f"{len(additions)} pairs) below the better child" in TOP


def test_distribution_inference_criteria_and_readmes_are_what_their_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS.parent / "experiments")
    from distribution_inference import report as distribution_report

    folder, worlds = RESULTS / "distribution_inference", distribution_report.read("worlds.csv")
    table = distribution_report.criteria_table(distribution_report.read("replication.csv"), worlds)
    pd.testing.assert_frame_equal(table, distribution_report.read("criteria.csv"))
    assert distribution_report.report(table, worlds) == (folder / "README.md").read_text(encoding="utf-8")
    top = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    for line in distribution_report.summary(distribution_report.Worlds(worlds)):
        assert line in top
    trained = pd.read_csv(RESULTS.parent / "benchmarks" / "results" / "world_training.csv")
    seconds, ratio = trained["wall_s"][0], trained["over_together"][1]
    assert f"(512 of them train in {seconds:.0f} s on two cores, {ratio:.1f} times as fast" in " ".join(top.split())
    found = table.set_index("criterion")["found"]["Z11"]
    reliance, without = re.findall(r"colour reliance ([\d.]+) \(([\d.]+) without", found)[0]
    told = f"goes with reliance on colour (rank correlation {reliance}; {without} without DP-SGD"
    assert told in " ".join(top.split())


def test_what_the_report_says_of_learners_and_of_missed_criteria_in_words(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS.parent / "experiments")
    from distribution_inference import report as distribution_report

    worlds = distribution_report.Worlds(distribution_report.read("worlds.csv"))
    best = {name: worlds.best(name) for name in distribution_report.LEARNERS}
    erm = best["dmi_erm"]["value"]
    for name in ("dmi_causal", "dmi_colour_randomised"):
        assert best[name]["low"] <= 0.5 <= best[name]["high"], name
    assert best["dmi_resample"]["value"] < 0.65
    for name in ("dmi_label_smoothing", "dmi_weight_decay", "dmi_group_dro"):
        assert best[name]["value"] > erm - 0.02, name
    for name in ("dmi_early_stop", "dmi_irm_product", "dmi_irm", "dmi_v_rex"):
        assert best[name]["low"] > 0.5, name
        assert best[name]["high"] < erm, name
    for name in ("dmi_irm", "dmi_v_rex"):
        assert best[name]["accuracy"] < best["dmi_erm"]["accuracy"]
    assert best["dmi_v_rex"]["colour_reliance"] < 0.1
    reliance = {name: row["colour_reliance"] for name, row in best.items()}
    assert max(reliance, key=reliance.__getitem__) == "dmi_dp_sgd"
    table = distribution_report.read("replication.csv").query("experiment == 'C'")
    errors = table.set_index(["mended", "knob", "attack"])["value"].sort_index()
    few, many = ({mended: errors[mended, n] for mended in (False, True)} for n in (512, 2048))
    assert few[False]["published_meta_classifier"] < many[False]["published_meta_classifier"]
    assert few[True]["published_meta_classifier"] > many[True]["published_meta_classifier"]
    for mended in (False, True):
        for values in (few[mended], many[mended]):
            assert values["meta_classifier"] < values["published_meta_classifier"]
