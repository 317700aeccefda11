"""Every zoo we write against the limits of the Hub's dataset viewer, as `viewer_rules.py` implements them."""

import base64
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import viewer_rules as rules
from places import SAMPLE

from vitzoo_hf.evaluation.evaluate import evaluate
from vitzoo_hf.format import schema
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.shards import write_parquet
from vitzoo_hf.publish import viewer
from vitzoo_hf.publish.card import card_text
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.publish.viewer import default_config
from vitzoo_hf.zoo import Zoo

VIT_S = 22_050_664
FACTORS = {"lr": "float", "optimizer": "string"}


def row_of(number: int, parameters: int, dtype: str) -> dict:
    recipe = {"recipe": {"lr": 0.001, "optimizer": "adamw"}, "note": "x" * 700}
    run = f"sl-s{number}"
    return {
        "model_id": f"{run}@90",
        "run_id": run,
        "parent_id": None,
        "stage": "pretrain",
        "epoch": 90,
        "is_final": True,
        "dataset": "imagenet",
        "architecture": "vit_small_patch16_224",
        "architecture_args": "{}",
        "head": "linear",
        "head_hidden": None,
        "factor_lr": 10.0 ** -(number % 3),
        "factor_optimizer": ["adamw", "sgd"][number % 2],
        **dict.fromkeys(schema.RESULTS, 0.5),
        "num_parameters": parameters,
        "layout": "0" * 16,
        "weights_sha256": f"{number:064x}",
        "dtype": dtype,
        "provenance": json.dumps(recipe),
    }


def write_zoo(folder: Path, *, parameters: int, rows: int, dtype: str = "float32", weights: bool = True) -> Path:
    """A zoo of one split with large models; with `weights=False` as it is before its shards were fetched."""
    light = [row_of(number, parameters, dtype) for number in range(rows)]
    write_parquet(
        folder / "index" / "train-00000-of-00001.parquet", schema.row_features(FACTORS, weights=None), [light], {}
    )
    shard = folder / "weights" / "train-00000-of-00001.parquet"
    if weights:
        vector = np.ones(parameters, np.float32)
        groups = ([row | {"weights": vector}] for row in light)
        write_parquet(shard, schema.row_features(FACTORS, weights="binary"), groups, {})
    size = shard.stat().st_size if weights else rows * parameters * 4
    shards = {"weights/train-00000-of-00001.parquet": {"bytes": size, "sha256": "0" * 64, "rows": rows}}
    (folder / "shards.json").write_text(json.dumps(shards))
    manifest = {"format": 1, "name": "synthetic", "factors": FACTORS, "images": {}, "files": {}, "missing_runs": {}}
    (folder / "zoo.json").write_text(json.dumps(manifest))
    (folder / "README.md").write_text(card_text(folder, manifest), encoding="utf-8")
    return folder


def default_of(folder: Path) -> str:
    (name,) = [config["config_name"] for config in rules.header(folder)["configs"] if config.get("default")]
    return name


@pytest.mark.parametrize(
    ("parameters", "encoding", "dtype", "expected"),
    [
        (27_000, "list", "float32", "weights"),
        (29_767, "list", "float32", "weights"),
        (29_768, "list", "float32", "index"),
        (250_000, "list", "float32", "index"),
        (120_000, "binary", "float32", "weights"),
        (120_001, "binary", "float32", "index"),
        (240_000, "binary", "bfloat16", "weights"),
        (240_001, "binary", "float16", "index"),
        (750_000, "binary", "float32", "index"),
        (5_717_416, "binary", "float32", "index"),
        (VIT_S, "binary", "float32", "index"),
        (VIT_S, "binary", "bfloat16", "index"),
    ],
)
def test_whole_rows_are_the_default_while_a_page_of_them_can_be_read(parameters, encoding, dtype, expected):
    assert default_config(parameters, encoding, dtype) == expected


@pytest.mark.parametrize(
    ("encoding", "dtype", "message"),
    [
        ("lists", "float32", "unknown encoding 'lists': did you mean 'list'"),
        ("binary", "float64", "unknown dtype 'float64'"),
        ("list", "float16", "lists hold float32"),
    ],
)
def test_what_cannot_be_stored_is_named(encoding, dtype, message):
    with pytest.raises(ZooError, match=message):
        default_config(1, encoding, dtype)


def test_the_published_limits():
    assert (viewer.PAGE_ROWS, viewer.MOST_BYTES_IN_MEMORY) == (100, 300_000_000)
    limits = (rules.PAGE_ROWS, rules.MOST_BYTES_IN_MEMORY, rules.FIRST_ROWS_BYTES, rules.FIRST_ROWS_AT_LEAST)
    assert limits == (100, 300_000_000, 200_000, 10)
    limits = (rules.CUT_CELL_BYTES, rules.MOST_COLUMNS, rules.LONGEST_COLUMN_NAME, rules.MOST_SPLITS)
    assert limits == (100, 1000, 500, 30)
    assert (rules.CATEGORY_SHARE, rules.MOST_CATEGORIES, rules.MOST_CONFIGS) == (0.2, 1000, 4000)


def test_the_tiny_zoo_keeps_every_limit(tiny_zoo):
    assert rules.problems(tiny_zoo) == []
    assert default_of(tiny_zoo) == "weights"
    assert set(rules.statistics(pq.read_table(next((tiny_zoo / "weights").glob("train-*"))))) >= {"weights", "stage"}


def test_the_sample_keeps_every_limit():
    assert rules.problems(SAMPLE) == []
    for file in SAMPLE.rglob("*.parquet"):
        assert (
            len(rules.first_rows(file)) == min(pq.read_metadata(file).num_rows, 100) or file.parent.name == "weights"
        )


def test_a_zoo_of_large_models_opens_with_its_index(tmp_path):
    folder = write_zoo(tmp_path / "zoo", parameters=VIT_S, rows=240, weights=False)
    assert default_of(folder) == "index"
    assert rules.problems(folder) == []
    shown = rules.statistics(pq.read_table(folder / "index" / "train-00000-of-00001.parquet"))
    assert {name: kind for name, kind in shown.items() if name.startswith("factor_")} == {
        "factor_lr": "histogram",
        "factor_optimizer": "categories",
    }
    assert (shown["stage"], shown["model_id"]) == ("classes", "lengths")


def test_a_page_of_whole_rows_stays_below_its_json(tiny_zoo):
    """As the viewer sends it: lists as numbers, bytes as base64."""
    for folder in (SAMPLE, tiny_zoo):
        for file in (folder / "weights").glob("*.parquet"):
            for row in pq.read_table(file, columns=["weights"]).to_pylist():
                sent = len(json.dumps(row["weights"], separators=(",", ":")))
                assert sent <= viewer.LIST_JSON_BYTES * len(row["weights"])
    assert len(base64.b64encode(bytes(3_000))) == 4_000


def test_a_zoo_keeps_its_default_config_when_its_card_is_written_again(zoo_copy):
    card = zoo_copy / "README.md"
    text = card.read_text()
    assert default_of(zoo_copy) == "weights"
    card.write_text(
        text.replace("  default: true\n", "").replace("config_name: index\n", "config_name: index\n  default: true\n")
    )
    assert default_of(zoo_copy) == "index"
    evaluate(Zoo(zoo_copy), progress=False).write(zoo_copy)
    assert default_of(zoo_copy) == "index"


def test_the_default_config_can_be_chosen(tiny_blueprint, tiny_runs, tmp_path):
    folder = pack(tiny_blueprint, tiny_runs, tmp_path / "zoo", default_config="index", progress=False)
    assert default_of(folder) == "index"
    assert rules.problems(folder) == []
    with pytest.raises(ZooError, match="default config 'pairs': expected weights or index"):
        pack(tiny_blueprint, tiny_runs, tmp_path / "other", default_config="pairs", progress=False)


def test_columns_without_statistics_are_named(tmp_path):
    def stated(rows):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        features = schema.row_features(FACTORS, weights=None)
        write_parquet(folder / "index" / "train-00000-of-00001.parquet", features, [rows], {})
        return viewer.columns_without_statistics(folder)

    rows = [row_of(number, 10, "float32") for number in range(3)]
    assert stated(rows) == []
    assert stated(rows[:1]) == ["The viewer has no statistics of `index` (train) and `weights`: it has one row."]
    rows[0]["test_loss"], rows[1]["head_hidden"], rows[2]["epoch"] = float("inf"), 8, 91
    rows[0]["train_loss"], rows[1]["train_loss"] = None, float("nan")
    (sentence,) = stated(rows)
    assert sentence == (
        "The viewer has no statistics of `index` (train) and `weights`: `epoch` is 90 or 91;"
        " `head_hidden` has one value that is not null;"
        " `train_loss` has one value that is not null; `test_loss` has infinite values."
    )


@pytest.mark.parametrize(
    ("texts", "reasons"),
    [
        ([f"run@{epoch}" for epoch in range(20)], ["texts of `model_id` have 5 or 6 letters"]),
        ([f"rün@{epoch}" for epoch in range(20)], ["texts of `model_id` have 5 or 6 letters"]),
        ([f"run@{epoch}" for epoch in range(101)], []),
        ([f"run@{epoch:02}" for epoch in range(20)], []),
        ([f"run@{epoch}" for epoch in range(2, 12)], []),
        ([f"run@{epoch}" for epoch in range(2, 12)] + [None], ["texts of `model_id` have 5 or 6 letters"]),
        ([f"run@{epoch}" for epoch in range(20)] * 5, []),
        ([f"run@{epoch}" for epoch in range(1, 1_002)] * 5, []),
        (
            ["a" * (9 + epoch % 2) + str(epoch) for epoch in range(1_000, 2_001)] * 5,
            ["texts of `model_id` have 13 or 14 letters"],
        ),
        ([None] * 20, []),
    ],
)
def test_texts_of_neighbouring_lengths_have_no_statistics(texts, reasons):
    """As the viewer's own functions answered for each of these columns."""
    assert viewer._reasons(pa.table({"model_id": pa.array(texts, pa.string())})) == reasons


def test_models_of_half_a_million_parameters_open_with_their_index(tmp_path):
    folder = write_zoo(tmp_path / "zoo", parameters=500_000, rows=12)
    assert default_of(folder) == "index"
    assert rules.problems(folder) == []
    assert (
        rules.statistics(pq.read_table(folder / "weights" / "train-00000-of-00001.parquet"))["weights"] == "skipped"
    )


def test_files_of_vit_small_are_scanned_row_by_row(tmp_path):
    """As measured with the viewer's own code: rows in groups of their own pass, four in one group do not."""
    folder = write_zoo(tmp_path / "zoo", parameters=VIT_S, rows=2)
    file = folder / "weights" / "train-00000-of-00001.parquet"
    assert default_of(folder) == "index"
    assert rules.problems(folder) == []
    assert rules.scan_problems(file) == []
    sizes = rules.fetched_bytes(file, 0, 100)
    assert len(sizes) == 2
    assert all(4 * VIT_S < size < 4 * VIT_S + 10_000 for size in sizes)
    assert rules.page_problems(file) != []
    manifest = json.loads((folder / "zoo.json").read_text())
    (folder / "README.md").write_text(card_text(folder, manifest, default="weights"), encoding="utf-8")
    assert any("100 rows of 88" in problem for problem in rules.problems(folder))


@pytest.mark.slow
def test_the_largest_models_that_open_with_their_weights(tmp_path):
    folder = write_zoo(tmp_path / "zoo", parameters=750_000, rows=100)
    assert default_of(folder) == "weights"
    assert rules.problems(folder) == []
    rows = datasets.load_dataset(str(folder), split="train", streaming=True)
    assert len(next(iter(rows))["weights"]) == 3_000_000


def write_plain(file: Path, *, page_index: bool, values: int = 4, group: int = 4) -> Path:
    table = pa.table({"id": list(range(values)), "heavy": [bytes(1_000_000)] * values})
    options = {"row_group_size": group, "data_page_size": 1000, "use_dictionary": False, "compression": "none"}
    pq.write_table(table, file, write_page_index=page_index, write_batch_size=1, **options)
    return file


def test_the_rules_know_pages_where_there_is_an_index(tmp_path):
    """Calibrates the reader of footers against pyarrow's own numbers."""
    without = write_plain(tmp_path / "without.parquet", page_index=False)
    indexed = write_plain(tmp_path / "indexed.parquet", page_index=True)
    assert rules.fetched_bytes(without, 0, 1) == [pq.read_metadata(without).row_group(0).total_byte_size]
    (one,) = rules.fetched_bytes(indexed, 1, 1)
    assert 1_000_000 < one < 1_001_000
    (whole,) = rules.fetched_bytes(indexed, 0, 4)
    assert whole == pq.read_metadata(indexed).row_group(0).total_byte_size
    assert rules.scan_problems(without, limit=3_000_000, page=1) != []
    assert rules.scan_problems(indexed, limit=3_000_000, page=1) == []
    groups = write_plain(tmp_path / "groups.parquet", page_index=False, group=1)
    assert len(rules.fetched_bytes(groups, 1, 2)) == 2


def test_the_rules_cut_first_rows_and_refuse_what_is_too_wide(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["x" * 50_000] * 20}), file)
    texts = rules.first_rows(file)
    assert len(texts) == 10
    assert len(texts[0]) > 50_000 > 200 > len(texts[-1])
    pq.write_table(pa.table({f"c{i}": ["x" * 1000] * 10 for i in range(900)}), file)
    with pytest.raises(ValueError, match="the first rows take"):
        rules.first_rows(file)


@pytest.mark.parametrize("damage", ["a stray table", "a script", "two defaults", "a missing split"])
def test_the_rules_see_what_breaks_loading(zoo_copy, damage):
    card = zoo_copy / "README.md"
    if damage == "a stray table":
        (zoo_copy / "more").mkdir()
        (zoo_copy / "more" / "train-0.parquet").write_bytes(next(zoo_copy.glob("index/*.parquet")).read_bytes())
    elif damage == "a script":
        (zoo_copy / "zoo.py").write_text("")
    elif damage == "two defaults":
        card.write_text(card.read_text().replace("- config_name: index\n", "- config_name: index\n  default: true\n"))
    else:
        next((zoo_copy / "index").glob("train-*")).unlink()
    assert rules.problems(zoo_copy) != []
