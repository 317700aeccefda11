import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from soup_zoo import noisy_zoo

from vitzoo_hf.apply.soup.epochs import average_epochs, coefficients_of_last, exponential_coefficients
from vitzoo_hf.cli.app import run
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, tiny_zoo):
    return noisy_zoo(tmp_path_factory.mktemp("epochs") / "zoo", tiny_zoo, runs=3, epochs=4, noise=0.05)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=20, unique=True), st.floats(0, 0.99))
def test_exponential_average_is_the_recursion(epochs, decay):
    shares = exponential_coefficients(epochs, decay)
    values = {epoch: float(epoch) ** 0.5 for epoch in epochs}
    average = None
    for epoch in sorted(epochs):
        average = values[epoch] if average is None else decay * average + (1 - decay) * values[epoch]
    assert sum(shares[epoch] * values[epoch] for epoch in epochs) == pytest.approx(average)
    assert sum(shares.values()) == pytest.approx(1)


def test_coefficients_out_of_range_are_refused():
    assert coefficients_of_last([30, 1, 10], 2) == {10: 0.5, 30: 0.5}
    with pytest.raises(ZooError, match="the last 4 of 3 kept epochs"):
        coefficients_of_last([1, 2, 3], 4)
    with pytest.raises(ZooError, match=r"decay 1\.0 over 2 epochs"):
        exponential_coefficients([1, 2], 1.0)


def test_averages_are_those_made_by_hand(zoo):
    found = average_epochs(zoo, last=[2, 3, 9], decays=[0.5], progress=False)
    assert list(found.soups) == ["run0", "run1", "run2"]
    images, labels = zoo.probes("digits")
    for run_id, lines in found.table.groupby("run_id"):
        rows = {row["epoch"]: row for row in zoo.filter(run_id=run_id).rows()}
        vectors = {epoch: row["weights"].astype(np.float64) for epoch, row in rows.items()}
        expected = {
            "last epoch": vectors[4],
            "last 2": (vectors[3] + vectors[4]) / 2,
            "last 3": (vectors[2] + vectors[3] + vectors[4]) / 3,
            "exponential 0.5": vectors[4] / 2 + vectors[3] / 4 + vectors[2] / 8 + vectors[1] / 8,
        }
        assert list(lines["average"]) == list(expected)  # a run of four epochs has no last 9, and no epoch 0
        for line in lines.to_dict("records"):
            row = dict(rows[4], weights=expected[line["average"]].astype(np.float32), weights_sha256=None)
            with torch.inference_mode():
                logits = reconstruct(row)(images)
            assert line["test_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
            assert line["test_loss"] == pytest.approx(
                torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4
            )
        last = float(lines["test_accuracy"].iloc[0])
        np.testing.assert_allclose(lines["gain"], lines["test_accuracy"] - last)
        (chosen,) = lines[lines["is_chosen"]].to_dict("records")
        best = lines.sort_values(["selection_accuracy", "selection_loss"], ascending=[False, True]).iloc[0]
        assert chosen["average"] == best["average"]
        np.testing.assert_allclose(
            found.soups[run_id].weights.numpy(), expected[chosen["average"]], rtol=1e-5, atol=1e-7
        )


def test_gains_count_every_run_once_an_average(zoo):
    found = average_epochs(zoo, last=[2], decays=[], progress=False)
    table = found.gains()
    assert list(table["average"]) == ["last 2", "chosen on selection"]
    assert (table["number"] == 3).all()
    expected = found.table.loc[found.table["average"] == "last 2", "gain"]
    assert table["mean"].iloc[0] == pytest.approx(expected.mean())
    assert list(found.gains(["head"])["head"]) == ["linear", "linear"]


def test_averaging_noise_away_gains_and_the_order_of_rows_does_not_matter(zoo):
    found = average_epochs(zoo, last=[3], decays=[], progress=False)
    assert found.gains()["mean"].iloc[0] > 0  # noise is independent here: three average better than one
    turned = zoo._select_rows(zoo._positions[::-1])
    again = average_epochs(turned, last=[3], decays=[], progress=False)
    for run_id, soup in found.soups.items():
        torch.testing.assert_close(soup.weights, again.soups[run_id].weights, rtol=2e-7, atol=0)


def test_runs_that_have_no_average_are_named(tiny_zoo, tmp_path, zoo):
    with pytest.raises(ZooError, match="10 keep no two trained epochs, 0 have no classifier"):
        average_epochs(Zoo(tiny_zoo), progress=False)

    def contrastive(row):
        return {"provenance": '{"recipe": {"regime": "contrastive"}}'} if row["run_id"] == "run1" else {}

    mixed = noisy_zoo(tmp_path / "zoo", tiny_zoo, runs=2, epochs=2, change=contrastive)
    assert average_epochs(mixed, progress=False).left_out == {"run1": "has no classifier, so no accuracy"}


def test_the_verb_averages_epochs(capsys, zoo, tmp_path):
    out = tmp_path / "soups"
    assert run(["soup", zoo.name, "--method", "epochs", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    chosen = [line for line in told["table"] if line["is_chosen"]]
    soups = Zoo(out)
    assert len(soups) == len(chosen) == 3
    assert sorted(soups.index["test_accuracy"]) == pytest.approx(sorted(line["test_accuracy"] for line in chosen))
    record = json.loads(next(soups.rows())["provenance"])
    assert {entry["model_id"].split("@")[0] for entry in record["ingredients"]} == {"run0"}
    assert run(["soup", zoo.name, "--method", "epochs", "--out", str(out), "--quiet"]) == 0
    assert "3 runs in" in capsys.readouterr().out


def test_the_verb_takes_the_last_epochs_and_the_decay_that_are_given(zoo, tmp_path, capsys):
    chosen = ["soup", zoo.name, "--out", str(tmp_path / "averages"), "--method"]
    assert run([*chosen, "epochs", "--last", "2,4,99", "--decay", "0.25"]) == 0
    assert "no run has 99 stored epochs beside epoch 0" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "averages" / "epochs.csv")
    assert set(table["average"]) == {"last epoch", "last 2", "last 4", "exponential 0.25"}
    for wrong, told in (
        (["epochs", "--last", "1"], "--last 1: expected K,K…, whole numbers of at least 2"),
        (["epochs", "--last", "2,"], "--last 2,: expected"),
        (["epochs", "--decay", "1"], "--decay 1: expected a number from 0 to below 1"),
        (["uniform", "--last", "2"], "--last and --decay do not apply to --method uniform"),
    ):
        assert run([*chosen, *wrong]) == 1
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
