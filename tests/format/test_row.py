"""A row as a value: a read-only mapping whose weights are read when they are first asked for."""

import copy
import dataclasses
import json
import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jaxtyping import config

from vitzoo_hf.format import schema
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.weight_reader import WeightReader
from vitzoo_hf.models.population import Population
from vitzoo_hf.models.rebuild import reconstruct, weights_of
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.zoo import SAMPLE

COLUMNS = {"model_id": "a@3", "run_id": "a", "epoch": 3, "is_final": True, "factor_lr": 0.1, "weights": [0.5, 1.0]}


@pytest.fixture
def zoo():
    return Zoo.sample()


@pytest.fixture
def unchecked():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def reads(monkeypatch):
    """Positions of the rows whose weights were read."""
    positions, read = [], WeightReader.read

    def noted(self, position, **options):
        positions.append(position)
        return read(self, position, **options)

    monkeypatch.setattr(WeightReader, "read", noted)
    return positions


def unreadable():
    raise ZooError("the weights of a@3 do not match their hash")


def test_a_row_is_a_mapping_of_its_columns():
    row = Row(COLUMNS)
    assert dict(row) == COLUMNS
    assert list(row) == list(row.keys()) == list(COLUMNS)
    assert len(row) == len(COLUMNS)
    assert row["factor_lr"] == row.get("factor_lr") == 0.1
    assert row.get("nothing", 7) == 7
    assert "weights" in row
    assert "nothing" not in row
    assert row == COLUMNS
    with pytest.raises(KeyError, match="nothing"):
        row["nothing"]


def test_a_row_is_read_only(zoo):
    row = next(zoo.rows())
    with pytest.raises(TypeError, match="does not support item assignment"):
        row["epoch"] = 4
    with pytest.raises(TypeError, match="support item deletion"):
        del row["epoch"]
    for name in ("epoch", "weights", "model_id", "anything"):
        with pytest.raises(AttributeError):
            setattr(row, name, 4)


def test_changes_are_made_in_a_copy():
    columns = dict(COLUMNS)
    row = Row(columns)
    columns["epoch"] = 9
    changed = dict(row)
    changed["epoch"] = 4
    assert (row | {"epoch": 5, "new": 1}) == COLUMNS | {"epoch": 5, "new": 1}
    assert ({"epoch": 5, "new": 1} | row) == {"new": 1} | COLUMNS
    assert type(row | {}) is dict
    assert row.epoch == 3


@pytest.mark.parametrize(
    "look",
    [
        lambda row: len(row) == 26 or True,
        lambda row: "weights" in row,
        list,
        repr,
        lambda row: row["epoch"],
        lambda row: row.get("nothing"),
        lambda row: (row.name, row.factors, row.head, row.stage, row.num_parameters, row.layout, row.verified),
        copy.copy,
        Row.of,
    ],
)
def test_looking_at_a_row_reads_no_weights(zoo, reads, look):
    for row in zoo.rows():
        look(row)
    assert reads == []


def test_weights_are_read_once(zoo, reads):
    row = list(zoo.rows())[5]
    vector = row.weights
    assert row["weights"] is vector
    assert row.weights is weights_of(row) is copy.copy(row).weights is vector
    assert vector.dtype == np.float32
    assert len(vector) == row.num_parameters
    reconstruct(row)
    assert reads == [5]


def expect_another_hash(zoo, position):
    hashes = zoo._reader.rows.sha256.to_pylist()
    hashes[position] = "0" * 64
    zoo._reader.rows = dataclasses.replace(zoo._reader.rows, sha256=pa.array(hashes))


def test_a_damaged_row_raises_when_its_weights_are_asked_for_and_names_the_model(zoo, monkeypatch):
    bad = zoo.model_ids[2]
    expect_another_hash(zoo, 2)
    rows = {row.model_id: row for row in zoo.rows()}
    for model_id, row in rows.items():
        if model_id != bad:
            assert row.weights_sha256 == schema.weights_sha256(row.weights)
    first = [lambda row: row["weights"], lambda row: row.weights, lambda row: row | {}]
    for ask in [*first, dict, pickle.dumps, reconstruct, *first]:
        with pytest.raises(ZooError, match=f"the weights of {re.escape(bad)} do not match their hash"):
            ask(rows[bad])
    assert rows[bad].epoch == zoo.index["epoch"][2]


def test_rows_without_verification_are_verified_when_they_are_rebuilt(zoo):
    expect_another_hash(zoo, 0)
    row = next(zoo.rows(verify=False))
    assert len(row.weights) == row.num_parameters
    assert not row.verified
    changed = Row(dict(row) | {"weights": row.weights + 1}, verified=False)
    with pytest.raises(ZooError, match="do not match their hash"):
        reconstruct(changed)


def test_a_model_that_shares_the_memory_of_a_row_makes_it_unverified(zoo):
    row = next(zoo.rows())
    twin = copy.copy(row)
    assert row.verified
    model = reconstruct(row, copy=True)
    assert row.verified
    model = reconstruct(row)
    assert not row.verified
    assert not twin.verified
    next(model.parameters()).data += 1
    with pytest.raises(ZooError, match="do not match their hash"):
        reconstruct(twin)


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("duplicate", [lambda row: pickle.loads(pickle.dumps(row)), copy.deepcopy])
def test_pickles_and_deep_copies_hold_the_weights(zoo, is_read, duplicate):
    row = next(zoo.rows())
    if is_read:
        assert len(row.weights)
    twin = duplicate(row)
    assert type(twin) is Row
    assert not twin.verified  # the memory that was copied may have been written to
    assert dict(twin) | {"weights": None} == dict(row) | {"weights": None}
    assert twin.weights.tobytes() == row.weights.tobytes()
    twin.weights[0] += 1
    assert twin.weights[0] != row.weights[0]


def test_rows_make_a_dataset(zoo):
    rows = list(zoo.rows())
    dataset = datasets.Dataset.from_list(rows)
    assert dataset.column_names == list(rows[0])
    assert dataset["model_id"][:] == zoo.model_ids
    for row, stored in zip(rows, dataset.with_format("numpy"), strict=True):
        assert np.asarray(stored["weights"], np.float32).tobytes() == row.weights.tobytes()


def test_class_numbers_of_load_dataset_become_names(tiny_zoo):
    stored = datasets.load_dataset(str(tiny_zoo), "weights", split="train")
    names = {row.model_id: (row.stage, row.head) for row in Zoo(tiny_zoo).rows()}
    assert {value for pair in names.values() for value in pair} == {*schema.STAGES, *schema.HEADS}
    for columns in stored:
        assert isinstance(columns["stage"], int)
        row = Row.of(columns)
        assert (row.stage, row.head) == names[row.model_id]
    for column, meaning in (("stage", r"0 \(pretrain\) and 1 \(finetune\)"), ("head", r"0 \(linear\) and 1 \(mlp\)")):
        with pytest.raises(ZooError, match=rf"^unknown {column} 2: its class labels are {meaning}$"):
            getattr(Row({column: 2}), column)


def test_typed_attributes(zoo):
    index = zoo.to_pandas()
    for number, row in enumerate(zoo.rows()):
        line = index.iloc[number]
        for name in [
            "model_id",
            "run_id",
            "stage",
            "epoch",
            "is_final",
            "dataset",
            "head",
            "num_parameters",
            "layout",
        ]:
            assert getattr(row, name) == line[name] == row[name], name
        assert row.parent_id == row["parent_id"]
        assert (row.head_hidden is None) == (row.head == "linear")
        assert {f"factor_{name}" for name in row.factors} == set(zoo.factors)
        assert row.factors == {name.removeprefix("factor_"): row[name] for name in zoo.factors}
        assert row.name == row.model_id
    assert Row({}).name == "the row"
    assert Row({"head_hidden": float("nan")}).head_hidden is None
    assert [Row({}).__getattribute__(name) for name in ("parent_id", "stage", "dataset", "layout")] == [None] * 4


@pytest.mark.parametrize(
    "name", ["model_id", "run_id", "epoch", "is_final", "head", "weights", "architecture", "architecture_args"]
)
def test_a_missing_column_gives_one_clear_line(name):
    row = Row({"nothing": 0})
    expected = rf"^the row has no column '{name}': take whole rows, `load_dataset\(id, 'weights'\)`$"
    with pytest.raises(ZooError, match=expected):
        row.required(name)
    if hasattr(Row, name):
        with pytest.raises(ZooError, match=expected):
            getattr(row, name)


def test_a_row_that_cannot_be_read_raises_each_time():
    row = Row(COLUMNS, unreadable)
    assert (len(row), row.epoch) == (len(COLUMNS), 3)
    for _ in range(2):
        with pytest.raises(ZooError, match="the weights of a@3 do not match"):
            row.weights  # noqa: B018


def test_tables_of_one_row(tiny_zoo):
    table = pq.read_table(next((tiny_zoo / "weights").glob("train-*")))
    ids = table["model_id"].to_pylist()
    zoo = Zoo(tiny_zoo)
    for number in (0, 3):
        row = Row.of(table.slice(number, 1))
        assert row.model_id == ids[number]
        assert row.weights.tobytes() == zoo.row(ids[number]).weights.tobytes()
        assert json.loads(row["architecture_args"])["num_classes"] == 10
    for count in (0, 2):
        with pytest.raises(ZooError, match=rf"^a table of {count} rows was given; expected one row"):
            Row.of(table.slice(0, count))
    assert Row.of(pa.table({"model_id": ["a@1"], "head": [1]})).head == "mlp"


def test_a_row_is_handed_on_as_it_is():
    row = Row(COLUMNS)
    assert Row.of(row) is row
    assert Row.of(COLUMNS) == row
    assert Row.of(COLUMNS) is not row


@pytest.mark.parametrize("change", ["item", "dict", "attribute", "pickle", "deepcopy"])
def test_changed_weights_never_pass_for_those_of_the_hash(change):
    row = next(Zoo.sample().rows())
    if change == "item":
        row["weights"][0] += 1
    elif change == "dict":
        dict(row)["weights"][:] = 0
    elif change == "attribute":
        row.weights[0] += 1
    else:
        row["weights"][0] += 1
        row = pickle.loads(pickle.dumps(row)) if change == "pickle" else copy.deepcopy(row)
    for rebuild in (reconstruct, lambda row: Population.from_rows([row])):
        with pytest.raises(ZooError, match="do not match their hash"):
            rebuild(row)


def test_threads_that_ask_at_once_get_one_array():
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for row in [*Zoo.sample().rows()] * 5:
            barrier = threading.Barrier(6)

            def ask(row=row, barrier=barrier):
                barrier.wait()
                return row["weights"]

            with ThreadPoolExecutor(6) as threads:
                arrays = [future.result() for future in [threads.submit(ask) for _ in range(6)]]
            assert all(array is row["weights"] for array in arrays)
    finally:
        sys.setswitchinterval(switch)


@pytest.mark.parametrize("given", ["a", None, 3, ["model_id"], np.zeros(3), pd.Index(["a"])])
def test_what_is_no_row_is_one_line(given, unchecked):
    for use in (Row.of, reconstruct, lambda row: Population.from_rows([row])):
        with pytest.raises(ZooError, match=f"a row is of type {type(given).__name__}; expected") as error:
            use(given)
        assert "\n" not in str(error.value)


def test_a_record_batch_of_one_row_is_a_row():
    row = next(Zoo.sample().rows())
    batch = pa.RecordBatch.from_pylist([{"model_id": row.model_id, "weights": row.weights.tolist()}])
    assert np.array_equal(Row.of(batch).weights, row.weights)


def test_rows_of_pandas_are_rows(tmp_path):
    sample = Zoo.sample()
    frame = datasets.load_dataset(str(SAMPLE), "weights", split="train", cache_dir=str(tmp_path)).with_format(
        "pandas"
    )
    for number in (0, len(frame) - 1):
        row = frame[number]
        for given in (row, row.iloc[0], row.iloc[0].to_dict()):
            found = reconstruct(given).state_dict()
            expected = sample.model(row["model_id"].iloc[0]).state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert Row.of(frame[0]).parent_id is None
    assert type(Row.of(frame[0])["factor_lr"]) is float
    with pytest.raises(ZooError, match="a table of 2 rows was given; expected one row"):
        Row.of(frame[:2])
