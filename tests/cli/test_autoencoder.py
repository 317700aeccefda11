"""Rows through an autoencoder, and the verbs encode, decode and sample."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from autoencoder.cells import Cell, Judge, cells, chosen_rates, measure_cell
from safetensors.torch import load_file

from vitzoo_hf.apply.autoencoder.model import Sizes
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.rows import encode_rows, read_latents
from vitzoo_hf.apply.autoencoder.trained import load_autoencoder
from vitzoo_hf.apply.candidates import candidate_scores
from vitzoo_hf.cli.app import run
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.verify import verify

RECIPE = """steps: 5
batch_size: 2
queries: 8
pool: 40
sizes: {width: 16, latent: 4, heads: 2, blocks: 1, projection: 5}
"""
CHOSEN = ("--where", "stage=finetune", "--where", "head=mlp")


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo).filter(stage="finetune", head="mlp")


@pytest.fixture(scope="module")
def place(tiny_zoo, tmp_path_factory):
    """A folder where `encode --train` was run."""
    folder = tmp_path_factory.mktemp("verbs")
    (folder / "recipe.yaml").write_text(RECIPE)
    arguments = ["--autoencoder", folder / "ae", "--train", folder / "recipe.yaml", "--arm", "S+B"]
    arguments += ["--latents", folder / "latents.safetensors", *CHOSEN, "--quiet"]
    assert run(["encode", str(tiny_zoo), *map(str, arguments)]) == 0
    return folder


def test_embeddings_are_means_over_tokens_and_features_of_properties(zoo, place, tiny_zoo, capsys):
    trained = load_autoencoder(place / "ae")
    assert trained.recipe.structure == 0.1
    table = pd.read_csv(place / "ae" / "embeddings.csv")
    assert list(table["model_id"]) == zoo.model_ids
    for number, row in enumerate(zoo.rows()):
        with torch.no_grad():
            latents = trained.encode(torch.from_numpy(row["weights"])[None])[0]
        np.testing.assert_allclose(table.iloc[number, 1:].astype(float), latents.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            load_file(place / "latents.safetensors")[row["model_id"]], latents, rtol=1e-4, atol=1e-6
        )
    given = ["--autoencoder", str(place / "ae"), "--out", str(place / "again.parquet"), "--json"]
    assert run(["encode", str(tiny_zoo), *given, *CHOSEN]) == 0
    assert json.loads(capsys.readouterr().out)["numbers"] == 4
    pd.testing.assert_frame_equal(pd.read_parquet(place / "again.parquet"), table, check_dtype=False)
    assert run(["encode", str(tiny_zoo), *given, "--pool", "layers", *CHOSEN]) == 0
    assert json.loads(capsys.readouterr().out)["numbers"] == 8 * len(trained.tokenizer.lengths)


def test_reconstructions_are_a_zoo_that_says_where_it_is_from(zoo, place, tiny_zoo, capsys):
    out = place / "reconstructions"
    given = [str(tiny_zoo), "--autoencoder", str(place / "ae"), *CHOSEN]
    assert run(["decode", *given, "--out", str(out), "--quiet"]) == 0
    assert "reconstructions in" in capsys.readouterr().out
    assert verify(out, progress=False).intact
    made, trained = Zoo(out), load_autoencoder(place / "ae")
    images, labels = zoo.probes("digits")
    for row in made.rows():
        source = json.loads(row["provenance"])["reconstruction_of"]
        original = zoo.row(source["model_id"])
        assert source["weights_sha256"] == original["weights_sha256"]
        with torch.no_grad():
            vector = trained.decode(trained.encode(torch.from_numpy(original["weights"])[None]))
        np.testing.assert_allclose(row["weights"], vector[0], rtol=1e-4, atol=1e-6)
        for column in ("factor_lr", "factor_optimizer", "parent_id", "epoch", "is_final", "dataset"):
            assert row[column] == original[column]
        scores = candidate_scores(torch.from_numpy(row["weights"])[None], original, images, labels)
        assert row["test_accuracy"] == pytest.approx(float(scores.accuracy))
        assert made.splits_of([row["model_id"]]) == zoo.splits_of([source["model_id"]])
    table = pd.read_csv(out / "reconstructions.csv")
    assert sorted(table["original"]) == sorted(zoo.model_ids)
    assert run(["decode", *given, "--latents", str(place / "latents.safetensors"), "--out", str(place / "b")]) == 0
    again = {row["model_id"]: row["weights"] for row in Zoo(place / "b").rows()}
    for row in made.rows():
        np.testing.assert_allclose(again[row["model_id"]], row["weights"], rtol=1e-4, atol=1e-6)


def test_samples_are_a_zoo_the_best_first(zoo, place, tiny_zoo, capsys):
    given = [str(tiny_zoo), "--autoencoder", str(place / "ae"), *CHOSEN, "--count", "6"]
    assert run(["sample", *given, "--out", str(place / "s"), "--keep", "3", "--rounds", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    made = Zoo(place / "s")
    assert verify(place / "s", progress=False).intact
    assert [row["model_id"] for row in told["table"]] == made.model_ids
    scores = [row["selection_accuracy"] for row in told["table"]]
    assert scores == sorted(scores, reverse=True)
    training = torch.stack([torch.from_numpy(row["weights"]) for row in zoo.filter(split="train").rows()])
    weights = torch.stack([torch.from_numpy(row["weights"]) for row in made.rows()])
    far = (weights[:, None] - training[None]).double().norm(dim=2).min(1).values
    assert [row["nearest_distance"] for row in told["table"]] == pytest.approx(far.tolist(), rel=1e-5)
    apart = [(weights[i] - weights[j]).norm() for i in range(3) for j in range(i)]
    known = [(training[i] - training[j]).norm() for i in range(len(training)) for j in range(i)]
    assert told["diversity"] == pytest.approx(float(np.mean(apart) / np.mean(known)), rel=1e-4)
    record = json.loads(made.row(made.model_ids[0])["provenance"])
    assert sorted(record["anchors"]) == sorted(zoo.filter(split="train").model_ids)
    assert run(["sample", *given, "--out", str(place / "all"), "--keep", "0", "--fine-tune", "1", "--quiet"]) == 0
    assert len(Zoo(place / "all")) == 6


def test_mistakes_are_one_line(place, tiny_zoo, tmp_path, capsys):
    own = ["--autoencoder", str(place / "ae")]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a").write_text("mine")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for arguments, message in (
        (["encode", *own, "--where", "stage=finetune"], "filter, such as by `head`"),
        (["encode", "--autoencoder", str(tmp_path)], "holds no autoencoder.safetensors: train one"),
        (["encode", *own, *CHOSEN, "--out", "a.txt"], "ends in .csv or .parquet"),
        (["encode", *own, *CHOSEN, "--arm", "S"], "give --train too"),
        (["decode", *own, *CHOSEN, "--out", str(tmp_path / "notes")], "exists and is not a zoo"),
        (
            ["decode", *own, *CHOSEN, "--out", str(tmp_path / "x"), "--latents", str(tmp_path / "junk.safetensors")],
            "cannot read",
        ),
        (["sample", *own, *CHOSEN, "--out", str(tmp_path / "x"), "--keep", "-1"], "--keep -1"),
        (["sample", *own, *CHOSEN, "--out", str(tmp_path / "x"), "--rounds", "0"], "0 rounds of sampling"),
        (["encode", *own, *CHOSEN, "--latents", str(place / "ae" / "autoencoder.safetensors")], "give another file"),
        (["sample", *own, *CHOSEN, "--out", str(tmp_path / "x"), "--keep", "0", "--rounds", "2"], "2 rounds need"),
        (["sample", *own, *CHOSEN, "--out", str(tmp_path / "x"), "--fine-tune", "-1"], "--fine-tune -1"),
    ):
        assert run([arguments[0], str(tiny_zoo), *arguments[1:], "--quiet"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_latents_of_another_autoencoder_are_refused(zoo, place, tmp_path):
    trained = load_autoencoder(place / "ae")
    with torch.no_grad():
        trained.model.index_table += 1
    with pytest.raises(ZooError, match="holds latents of another autoencoder"):
        read_latents(place / "latents.safetensors", trained)
    with pytest.raises(ZooError, match="no models among those chosen"):
        encode_rows(zoo.filter(epoch=99), trained)


def test_arms_have_equal_steps_and_views_where_they_need_them():
    recipe = AutoencoderRecipe(steps=7)
    found = list(cells(recipe, ["S", "C+S", "S+B"], [1e-3, 2e-3], [0, 1]))
    assert len(found) == len({cell.name for cell in found}) == 12
    assert {cell.recipe.steps for cell in found} == {7}
    assert {cell.arm: cell.recipe.noise for cell in found} == {"S": 0.0, "C+S": 0.1, "S+B": 0.0}


def test_a_cell_is_measured_once_on_validation_and_test_models(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("autoencoder.cells.SPLITS", ("train",))
    sizes = Sizes(width=16, latent=4, heads=2, blocks=1)
    cell = Cell("S", AutoencoderRecipe(steps=4, batch_size=2, sizes=sizes).arm("S"))
    steps: list[int] = []
    first = measure_cell(Judge(zoo), cell, tmp_path, on_step=lambda step, losses: steps.append(step))
    again = measure_cell(Judge(zoo), cell, tmp_path, on_step=lambda step, losses: steps.append(step))
    assert steps == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(
        first.where(first != "", np.nan), again.where(again != "", np.nan), check_dtype=False
    )
    assert set(first["method"]) >= {"autoencoder", "constant best", "untrained", "pca"}
    models = pd.read_csv(tmp_path / cell.name / "models.csv")
    own = models[models["method"] == "autoencoder"]
    assert list(own["model_id"]) == zoo.filter(split="train").model_ids
    mean = first.set_index("method").loc["autoencoder", "agreement"]
    assert own["agreement"].mean() == pytest.approx(mean)
    history = pd.read_csv(tmp_path / cell.name / "history.csv")
    assert list(history["step"]) == [1, 4]


def test_rates_are_chosen_on_validation_models_alone():
    rows = [
        ("S", rate, seed, split, value)
        for rate, values in {1e-3: (0.8, 0.2), 2e-3: (0.6, 0.9)}.items()
        for seed in (0, 1)
        for split, value in zip(("validation", "test"), values, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["arm", "lr", "seed", "split", "agreement"])
    table = table.assign(method="autoencoder", variant="")
    assert chosen_rates(table) == {"S": 1e-3}
    lucky = table.assign(agreement=0.99, lr=2e-3, seed=7)
    assert chosen_rates(pd.concat([table, lucky])) == {"S": 1e-3}
    with pytest.raises(ZooError, match="no seed was trained at all of its rates"):
        chosen_rates(pd.concat([table[table["lr"] == 1e-3], lucky]))
    with pytest.raises(ZooError, match="no autoencoder on validation models"):
        chosen_rates(table[table["split"] == "test"])
