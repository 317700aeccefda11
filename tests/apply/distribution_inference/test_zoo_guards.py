"""What gives a secret away besides the distribution: every guard, on indices made by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret, secret_of
from vitzoo_hf.apply.distribution_inference.zoo_attacks import attack_zoo, is_ratio, prior_risk
from vitzoo_hf.apply.distribution_inference.zoo_guards import check_pools, guards_of, with_roles
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

COUNT = 80


def index(**columns) -> pd.DataFrame:
    """Eighty models: two roles, two secrets, as many of each combination, all else alike."""
    rows = np.arange(COUNT)
    fixed = {"is_final": True, "factor_role": np.array(["target", "shadow"])[rows % 2], "epoch": 4, "head": "linear"}
    fixed |= {"architecture": "vit", "factor_label_ratio": np.array([0.3, 0.5])[rows // 2 % 2], "factor_seed": rows}
    fixed |= {"factor_trained_images": 512.0, "factor_trained_steps": 50.0, "factor_trained_sha256": rows.astype(str)}
    return pd.DataFrame(fixed | columns)


def guards(table: pd.DataFrame, unequal: bool = False) -> dict[str, str]:
    secret, secrets = secret_of(table["factor_label_ratio"].tolist())
    shadows = torch.from_numpy((table["factor_role"] == "shadow").to_numpy(copy=True))
    return guards_of(table, "factor_label_ratio", "role", secrets, shadows, secret, unequal)


SECOND = np.arange(COUNT) // 2 % 2 == 1
"""Models with the second secret."""


def mostly(value, other, rare: int = 10):
    """A value with the second secret and another with the first, but for one model in ten of either."""
    return np.where(SECOND ^ (np.arange(COUNT) % rare == 0), value, other)


def test_a_balanced_cell_passes():
    told = guards(index(factor_lr=np.where(np.arange(COUNT) // 4 % 2, 0.1, 0.2)))
    assert told["training examples"] == "equal: 512 for every model"
    assert told["other factors"] == "the same values, as often, with every secret"
    assert told["training data"] == "no training set is that of a target and of a shadow"


def test_a_cell_that_lost_a_model_passes():
    guards(index(factor_lr=np.where(np.arange(COUNT) // 4 % 2, 0.1, 0.2)).iloc[1:].reset_index(drop=True))


@pytest.mark.parametrize(
    "values",
    [
        np.where(SECOND, 0.1, 0.2),
        mostly(0.01, 0.0003),
        mostly(0.1, np.nan),
        100 * np.where(SECOND, 0.5, 0.3) + np.arange(COUNT) / COUNT,
    ],
    ids=["other values", "more often", "missing", "many values"],
)
def test_a_factor_that_goes_with_the_secret_is_refused(values):
    table = index(factor_lr=values)
    with pytest.raises(ZooError, match="factor_lr takes other values with other secrets"):
        guards(table)
    assert guards(table, unequal=True)["other factors"] == "NOT alike: factor_lr"


def test_a_record_that_one_model_lacks_is_still_compared():
    steps = np.where(SECOND, 50.0, 20.0)
    steps[0] = np.nan
    with pytest.raises(ZooError, match=r"optimiser steps differ.*20 with secret 0.3, 50 with secret 0.5"):
        guards(index(factor_trained_steps=steps))
    shared = np.arange(COUNT).astype(str).astype(object)
    shared[:3] = [None, "same", "same"]
    with pytest.raises(ZooError, match="1 training sets are those of a target and of a shadow"):
        guards(index(factor_trained_sha256=shared))
    missing = np.full(COUNT, 512.0)
    missing[0] = np.nan
    told = guards(index(factor_trained_images=missing))
    assert told["training examples"] == "equal: 512 for every model, of the 79 of 80 models that record it"


def test_too_few_of_a_class_or_of_a_role():
    rows = np.arange(COUNT)
    few = index().drop(rows[(rows % 2 == 1) & SECOND][:-3]).reset_index(drop=True)
    with pytest.raises(
        ZooError, match=r"3 models with secret 0.5 are a shadow: expected at least 4 of each of \[0.3"
    ):
        guards(few)
    with pytest.raises(ZooError, match="15 final models are a shadow by column factor_role: expected at least 16"):
        with_roles(index().drop(rows[rows % 2 == 1][15:]), "role")


def test_pools_that_are_parted_otherwise_are_refused():
    with pytest.raises(
        ZooError, match="split_seed 1, those of the targets 0: shadows may have learnt from the victim"
    ):
        check_pools({"source": "digits", "split_seed": 0}, {"source": "digits", "split_seed": 1})


def test_the_prior_is_that_of_the_targets():
    truth = torch.tensor([0] * 8 + [1])
    assert prior_risk(ClassSecret((0.2, 0.5)), truth) == pytest.approx(1 / 9)
    numbers, values = secret_of([0.1, 0.2, 0.4, 0.4])
    assert prior_risk(numbers, values) == pytest.approx(np.abs(values.numpy() - 0.3).mean())


@pytest.mark.parametrize(
    ("column", "expected"),
    [("factor_label_ratio", True), ("colour_agreement", True), ("last_environment", False), ("factor_lr", False)],
)
def test_samples_are_counted_of_ratios_alone(column, expected):
    assert is_ratio(column) == expected


def test_no_seeds_or_queries():
    with pytest.raises(ZooError, match="seeds 0, queries 512: expected at least 1 of each"):
        attack_zoo(Zoo.sample(), "label_ratio", seeds=0)
