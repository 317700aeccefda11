import hashlib
import json
import struct

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitzoo_hf.format import schema
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def test_weights_come_last_and_are_typed_by_encoding():
    as_list = schema.row_features({"lr": "float", "ddp": "bool", "regime": "string", "seed": "int"})
    binary = schema.row_features({}, weights="binary")
    assert list(as_list)[-1] == "weights"
    assert as_list["weights"].feature.dtype == "float32"
    assert binary["weights"].dtype == "binary"
    kinds = {name: as_list[name].dtype for name in as_list if name.startswith("factor_")}
    assert kinds == {
        "factor_lr": "float64",
        "factor_ddp": "bool",
        "factor_regime": "string",
        "factor_seed": "int64",
    }


def test_index_is_the_row_without_weights():
    factors = {"lr": "float"}
    index = schema.row_features(factors, weights=None)
    assert "weights" not in index
    assert list(index) == list(schema.row_features(factors))[:-1]


def test_class_labels_have_fixed_codes():
    features = schema.row_features({})
    assert features["stage"].str2int(["pretrain", "finetune"]) == [0, 1]
    assert features["head"].str2int(["linear", "mlp"]) == [0, 1]


@pytest.mark.parametrize(
    "features", [schema.evaluation_features({"lr": "float"}), schema.pair_features(), schema.probe_features()]
)
def test_features_survive_their_own_json(features):
    assert type(features).from_dict(json.loads(json.dumps(features.to_dict()))) == features


def test_the_hash_is_that_of_little_endian_float32_bytes():
    values = [1.0, -0.0, 2.5]
    expected = hashlib.sha256(struct.pack("<3f", *values)).hexdigest()
    assert schema.weights_sha256(np.array(values, ">f4")) == expected
    assert schema.weights_sha256(np.array(values, "<f4").repeat(2)[::2]) == expected
    assert schema.weights_sha256(np.array([1.0, 0.0, 2.5], "<f4")) != expected


@pytest.mark.parametrize("run_id", ["sl-s42", "sl-s42--adamw-lr0.003-linear-s42", "cl-lr1e+20_x=y"])
def test_model_ids_match_the_published_pattern(run_id):
    assert schema.MODEL_ID.fullmatch(schema.model_id(run_id, 3))


@pytest.mark.parametrize("bad", ["a/b@1", "../a@1", ".a@1", "a b@1", "a@", "a@-1", "@1", "a@1\n"])
def test_unsafe_model_ids_do_not_match(bad):
    assert not schema.MODEL_ID.fullmatch(bad)


def test_splits_come_near_their_shares_and_depend_on_the_seed():
    groups = [f"run-{number}" for number in range(4000)]
    first = [schema.split_of(group, group, fractions=SHARES, seed=0) for group in groups]
    for split, share in SHARES.items():
        assert abs(first.count(split) / len(groups) - share) < 0.03
    assert first == [schema.split_of(group, group, fractions=SHARES, seed=0) for group in groups]
    assert first != [schema.split_of(group, group, fractions=SHARES, seed=1) for group in groups]


@settings(deadline=None)
@given(st.text(), st.text(), st.text(), st.integers())
def test_the_group_alone_decides_the_split(run, other, group, seed):
    here = schema.split_of(run, group, fractions=SHARES, seed=seed)
    assert here == schema.split_of(other, group, fractions=SHARES, seed=seed)
    assert here in SHARES


def test_shares_must_sum_to_one():
    with pytest.raises(ZooError, match=r"split shares of run 'a' sum to 0\.9; they must sum to 1"):
        schema.split_of("a", "a", fractions={"train": 0.5, "test": 0.4}, seed=0)


def test_fingerprints_ignore_key_order_only():
    assert schema.fingerprint({"a": 1, "b": [1, 2]}) == schema.fingerprint({"b": [1, 2], "a": 1})
    assert schema.fingerprint({"a": 1, "b": [1, 2]}) != schema.fingerprint({"a": 1, "b": [2, 1]})
    assert len(schema.fingerprint(None)) == 16
    assert len(schema.fingerprint(None, 8)) == 8


def test_long_lists_of_names_are_cut():
    hint = did_you_mean("zzz", [f"a{number}" for number in range(20)])
    assert hint.endswith("a11, … (20 in all)")


@pytest.mark.parametrize("text", ["sl s42/lr=0.1", "", "…", "a@b", "run.1_=+-", "C:\\runs\\1"])
def test_safe_ids_have_only_characters_of_run_ids_and_keep_those(text):
    assert schema.RUN_ID.fullmatch("r" + schema.safe_id(text))
    assert schema.safe_id(schema.safe_id(text, "."), ".") == schema.safe_id(text, ".")
    if schema.RUN_ID.fullmatch(text):
        assert schema.safe_id(text) == text
        assert schema.MODEL_ID.fullmatch(schema.model_id(text, 3))


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20))
def test_union_find_gives_the_least_name_of_each_connected_component(edges):
    pairs = [(f"n{first}", f"n{second}") for first, second in edges]
    graph = nx.Graph(pairs)
    for key in (None, lambda name: -int(name[1:])):
        expected = {
            name: min(component, key=key) if key else min(component)
            for component in nx.connected_components(graph)
            for name in component
        }
        assert schema.union_find(pairs, key) == expected


def test_union_find_follows_long_chains_quickly():
    chain = [(f"n{number + 1}", f"n{number}") for number in range(20_000)]
    assert set(schema.union_find(chain, lambda name: -int(name[1:])).values()) == {"n20000"}
