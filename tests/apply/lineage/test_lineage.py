import json

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import call
from made_rows import make_row
from peak_memory import peak_mb
from weight_zoo import ARGUMENTS, LAYOUT, damage, draw, epochs_zoo, write

from vitzoo_hf.apply.lineage.epochs import order_along_path, order_epochs, random_taus
from vitzoo_hf.apply.lineage.lineage import Forest, recover_lineage
from vitzoo_hf.apply.lineage.metrics import Truth, forest_scores, tree_accuracy, truth_of
from vitzoo_hf.apply.lineage.plot import forest_figure, lineage_table, radial_places
from vitzoo_hf.format import schema
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.publish import folder as zoo_folder
from vitzoo_hf.zoo import Zoo

METHODS = ("hubs", "spanning", "mother", "mother-reversed")


def family(sizes, *, step=0.1):
    """Vectors and parents' ids of stars."""
    vectors, parents = [], []
    steps = step * draw(sum(sizes), seed=5)
    for tree, size in enumerate(sizes):
        root = len(vectors)
        vectors += [draw(1, seed=tree)[0]]
        vectors += [vectors[root] + steps[root + child] * (1 + 0.05 * child) for child in range(1, size)]
        parents += [None] + [f"m{root}@1"] * (size - 1)
    return torch.stack(vectors), parents


@pytest.fixture(scope="module")
def two_trees(tmp_path_factory):
    vectors, parents = family([7, 5])
    return write(tmp_path_factory.mktemp("family") / "zoo", vectors, parents=parents)


def test_real_models_find_their_trees(tiny_zoo):
    zoo = Zoo(tiny_zoo).filter(is_final=True)
    index = zoo.to_pandas()
    truth = truth_of(index)
    for method in METHODS:
        forest = recover_lineage(zoo, method=method, trees=2, progress=False)
        assert forest.scores(truth)["tree_accuracy"] == 1
        assert (forest.parent < 0).sum() == 2
    roots = list(index.loc[index["stage"] == "pretrain", "model_id"])
    forest = recover_lineage(zoo, method="candidates", candidates=roots, progress=False)
    assert forest.scores(truth)["edge_recall"] == 1
    np.testing.assert_array_equal(forest.parent, truth.parent)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_forest_is_found_without_any_knowledge(two_trees, precision):
    forest = recover_lineage(two_trees, precision=precision, progress=False)
    scores = forest.scores(truth_of(two_trees.to_pandas()))
    assert set(scores.values()) == {1.0}
    assert list(forest.edges()["role"]).count("root") == forest.num_trees == 2


def test_the_truth_is_not_used(tmp_path, two_trees):
    vectors, _ = family([7, 5])
    blind = write(tmp_path / "zoo", vectors)
    assert truth_of(blind.to_pandas()) is None
    for method in METHODS:
        here, there = (recover_lineage(zoo, method=method, progress=False) for zoo in (blind, two_trees))
        np.testing.assert_array_equal(here.parent, there.parent)


def test_a_parent_left_out_is_said_to_be_missing(two_trees):
    index = two_trees.to_pandas()
    children = two_trees.filter(model_id=list(index.loc[index["parent_id"].notna(), "model_id"]))
    forest = recover_lineage(children, progress=False)
    assert forest.orphan_trees == [0, 1]
    assert list(forest.edges()["role"]).count("root or sibling") == 2
    assert forest.scores(truth_of(children.to_pandas()))["tree_accuracy"] == 1
    table = lineage_table(forest, truth_of(children.to_pandas()))
    assert set(table["edge"].dropna()) == {"wrong"}
    assert forest_figure(table).axes


def test_one_model_and_equal_models_have_an_answer(two_trees, tmp_path):
    for method in METHODS:
        one = recover_lineage(two_trees.filter(model_id="m3@1"), method=method, progress=False)
        assert (one.num_trees, one.parent.tolist()) == (1, [-1])
        assert truth_of(two_trees.filter(model_id="m0@1").to_pandas()) is None
    vectors, _ = family([7, 5])
    vectors[6] = vectors[0]
    forest = recover_lineage(write(tmp_path / "zoo", vectors), progress=False)
    assert forest.num_trees == 2
    assert forest.notes == ["1 trunks equal an earlier one: which came first is not in the weights"]


def test_models_of_different_trunks_are_of_different_trees(tmp_path):
    wide = ARGUMENTS | {"embed_dim": 24}
    layouts = {"narrow": (ARGUMENTS, LAYOUT), "wide": (wide, Architecture("vit_tiny_patch16_224", wide).layout)}
    vectors, _ = family([3])
    rows = []
    for number, name in enumerate(["narrow", "wide", "narrow", "wide", "narrow"]):
        args, layout = layouts[name]
        row = make_row(number, layout.num_parameters)
        held = vectors[number // 2].numpy() if name == "narrow" else row["weights"]
        row |= {"architecture_args": schema.canonical_json(args), "layout": layout.fingerprint, "weights": held}
        rows.append(row | {"weights_sha256": schema.weights_sha256(held)})
    manifest = {"format": schema.FORMAT_VERSION, "name": "two", "blueprint_fingerprint": None, "images": {}}
    manifest |= {"factors": {"seed": "int", "lr": "float"}, "missing_runs": {}}
    manifest |= {"splits": {"by": "run", "seed": 0, "train": 1.0, "validation": 0.0, "test": 0.0}}
    largest = layouts["wide"][1].num_parameters
    zoo_folder.write_zoo(tmp_path / "zoo", manifest, {"train": zoo_folder.Rows(5, largest, iter(rows))}, {}, "")
    zoo = Zoo(tmp_path / "zoo")
    forest = recover_lineage(zoo, progress=False)
    kinds = {model_id: number % 2 for number, model_id in enumerate(f"m{k}@1" for k in range(5))}
    for row in forest.edges().itertuples():
        assert row.parent_id is None or pd.isna(row.parent_id) or kinds[row.parent_id] == kinds[row.model_id]
    assert forest.model_ids == zoo.model_ids
    assert forest.num_trees == 2
    with pytest.raises(ZooError, match="trees=2, but there are 2 kinds of trunks: filter by `architecture`"):
        recover_lineage(zoo, trees=2, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hub"}, "unknown method 'hub': did you mean 'hubs'"),
        ({"trees": 13}, "trees=13; expected 1 to 12, the number of models"),
        ({"candidates": ["m0@1"]}, "method 'hubs' makes no use of candidates: drop them"),
        ({"method": "candidates"}, 'method "candidates" needs candidates, .*--candidates COLUMN=VALUE'),
        ({"method": "candidates", "candidates": ["m99@1"]}, "candidate 'm99@1' is not among the models"),
        ({"method": "candidates", "candidates": ["m0@1"], "trees": 2}, "as many trees as candidates: drop trees"),
    ],
)
def test_what_makes_no_sense_is_refused(two_trees, options, message):
    with pytest.raises(ZooError, match=message):
        recover_lineage(two_trees, progress=False, **options)


def test_roots_without_children_are_noted(tmp_path):
    vectors, parents = family([6, 6, 1])
    found = recover_lineage(write(tmp_path / "zoo", vectors, parents=parents), trees=2, progress=False)
    assert found.parent[12] >= 0
    (note,) = found.notes
    assert note.startswith("1 child as far from the root as roots are from each other (at least 0.9 times the median")
    found = recover_lineage(write(tmp_path / "other", *family([7, 5])[:1]), progress=False)
    assert found.notes == []


@pytest.mark.parametrize("measure", [recover_lineage, order_epochs])
def test_a_damaged_row_is_named_where_it_is_read(tmp_path, measure):
    zoo = epochs_zoo(tmp_path / "zoo")
    damage(zoo, "c@2", tmp_path / "zoo")
    with pytest.raises(ZooError, match="the weights of c@2 do not match their hash"):
        measure(Zoo(tmp_path / "zoo"), progress=False)
    measure(Zoo(tmp_path / "zoo"), verify=False, progress=False)


def test_an_empty_zoo_is_refused(two_trees):
    with pytest.raises(ZooError, match="no model to recover the lineage of"):
        recover_lineage(two_trees.filter(model_id=[]), progress=False)


def test_scores_of_a_forest_counted_by_hand():
    truth = Truth(np.array([0, 0, 0, 1, 1, 1]), np.array([-1, 0, 0, -1, 3, 3]))
    found = np.array([-1, 0, 1, 4, -1, 4])  # 0→1 right, 1→2 wrong, 4→3 reversed, 4→5 wrong
    scores = forest_scores(np.array([1, 1, 1, 0, 0, 1]), found, truth)
    expected = {"tree_accuracy": 5 / 6, "edge_precision": 1 / 4, "edge_recall": 1 / 4, "direction_accuracy": 1 / 2}
    assert {name: scores[name] for name in expected} == expected
    assert scores["root_accuracy"] == 1 / 2
    forest = Forest([f"m{k}" for k in range(6)], np.array([0, 0, 0, 1, 1, 1]), found, "hubs")
    kinds = lineage_table(forest, truth)["edge"].fillna("none")
    assert list(kinds) == ["none", "right", "wrong", "reversed", "none", "wrong"]
    assert tree_accuracy(np.array([0, 1, 2, 3]), np.zeros(4, np.int64)) == 1 / 4


def test_chance_is_where_probability_puts_it():
    truth = Truth(np.repeat([0, 1], 20), np.repeat([-1, 0, -1, 20], [1, 19, 1, 19]))
    forest = Forest([str(k) for k in range(40)], truth.tree, truth.parent, "hubs")
    chance = forest.baselines(truth).set_index(["baseline", "score"])
    assert chance.loc[("random_direction", "direction_accuracy"), "mean"] == pytest.approx(0.5, abs=0.01)
    assert chance.loc[("random_root", "root_accuracy"), "mean"] == pytest.approx(1 / 20, abs=0.02)
    assert chance.loc[("random_forest", "adjusted_rand"), "mean"] == pytest.approx(0, abs=0.01)
    again = forest.baselines(truth).set_index(["baseline", "score"])
    pd.testing.assert_frame_equal(chance, again)


def test_truth_joins_epochs_of_a_run_and_children_of_a_missing_parent():
    index = pd.DataFrame(
        {
            "model_id": ["p@0", "p@9", "a@1", "b@1", "c@1", "q@1"],
            "run_id": ["p", "p", "a", "b", "c", "q"],
            "parent_id": [None, None, "p@9", "gone@9", "gone@9", None],
        }
    )
    truth = truth_of(index)
    assert truth.tree.tolist() == [0, 0, 0, 1, 1, 2]
    assert truth.parent.tolist() == [-1, -1, 1, -1, -1, -1]
    assert truth.roots.tolist() == [1]


def test_truth_joins_the_run_of_a_parent_that_is_missing():
    index = pd.DataFrame(
        {"model_id": ["p@3", "a@1", "b@1"], "run_id": ["p", "a", "b"], "parent_id": [None, "p@9", "p@9"]}
    )
    assert truth_of(index).tree.tolist() == [0, 0, 0]


def test_epochs_are_ordered(tiny_zoo):
    path = np.cumsum(np.random.default_rng(0).random((8, 50)), 0)
    squared = ((path[:, None] - path[None]) ** 2).sum(2)
    shuffled = np.random.default_rng(1).permutation(8)
    scores = order_along_path(squared[np.ix_(shuffled, shuffled)], np.linalg.norm(path, axis=1)[shuffled])
    assert shuffled[scores.argsort()].tolist() == list(range(8))
    with pytest.raises(ZooError, match="no run has three checkpoints"):
        order_epochs(Zoo(tiny_zoo), progress=False)
    taus = random_taus(6, 40)
    assert abs(taus.mean()) < 0.02
    assert taus.std() == pytest.approx(np.sqrt(2 * 17 / (9 * 6 * 5) / 40), rel=0.1)  # Kendall 1938


def test_epochs_of_a_straight_run_are_in_order_from_any_knowledge(tmp_path):
    found = order_epochs(epochs_zoo(tmp_path / "zoo"), progress=False)
    assert list(found["knowledge"]) == ["nothing known", "start known", "nothing known"]
    assert list(found["weights"]) == ["trunk", "trunk", "all"]
    assert found["kendall_tau"].tolist() == [1, 1, 1]
    assert set(found["checkpoints"]) == {4}


def test_places_of_a_deep_tree_are_in_the_circle():
    places = radial_places({"b": "a", "c": "a", "d": "c", "e": "c"})
    assert places["a"] == (0, 0)
    assert np.hypot(*places["d"]) == pytest.approx(1)
    assert np.hypot(*places["c"]) == pytest.approx(0.5)
    assert len(set(places.values())) == 5


def test_the_verb_prints_scores_and_writes_the_forest(capsys, tiny_zoo, tmp_path):
    status, out, _ = call(capsys, "lineage", tiny_zoo, "--candidates", "stage=pretrain", "--out", tmp_path / "out")
    assert status == 0
    assert "10 models in 2 trees by method candidates\n8 × child, 2 × root" in out
    assert f"Next: look at {tmp_path / 'out' / 'forest.png'}" in out
    table = pd.read_csv(tmp_path / "out" / "edges.csv")
    assert list(table["edge"].dropna().unique()) == ["right"]
    assert (tmp_path / "out" / "forest.png").stat().st_size > 5_000
    status, out, _ = call(capsys, "lineage", "sample", "--method", "mother", "--trees", "2", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["trees"] == 2
    assert {score["score"]: score["value"] for score in told["scores"]}["tree_accuracy"] == 1
    assert len(told["edges"]) == 8
    status, _, err = call(capsys, "lineage", tiny_zoo, "--candidates", "epoch=77")
    assert status == 1
    assert "--candidates epoch=77 matches none of the 10 models" in err


def test_the_verb_orders_epochs(capsys, tmp_path):
    epochs_zoo(tmp_path / "zoo")
    status, out, _ = call(capsys, "lineage", tmp_path / "zoo", "--all-epochs", "--quiet", "--out", tmp_path / "out")
    assert status == 0
    assert "order of the checkpoints of each run: Kendall's tau" in out
    assert "trunks equal an earlier one" in out
    assert len(pd.read_csv(tmp_path / "out" / "epochs.csv")) == 3


def test_the_verb_without_three_checkpoints_gives_the_forest_all_the_same(capsys, two_trees):
    status, out, _ = call(capsys, "lineage", two_trees.name, "--all-epochs", "--quiet")
    assert status == 0
    assert "12 models in 2 trees" in out
    assert "no run has three checkpoints, so the order" in out


def test_candidates_are_final_unless_named(capsys, tmp_path):
    epochs_zoo(tmp_path / "zoo")
    known = ["lineage", tmp_path / "zoo", "--all-epochs", "--quiet", "--candidates"]
    status, out, _ = call(capsys, *known, "run_id=c")
    assert status == 0
    assert "5 models in 1 tree by method candidates" in out
    status, _, err = call(capsys, *known, "epoch=1")
    assert (status, err.count("\n")) == (1, 1)
    assert "--candidates epoch=1 matches no final checkpoint" in err
    assert call(capsys, *known, "model_id=c@1")[0] == 0
    status, _, err = call(capsys, *known, "colour=red")
    assert status == 1
    assert "--candidates: unknown column 'colour'" in err


@pytest.mark.parametrize("verb", ["lineage", "properties"])
def test_the_folder_is_tried_before_anything_is_read(capsys, verb):
    status, _, err = call(capsys, verb, "no-such-zoo", "--out", "/dev/null/out")
    assert (status, err.count("\n")) == (1, 1)
    assert "--out: cannot write into /dev/null/out: Not a directory; give another folder" in err


@pytest.mark.gpu
def test_cpu_and_cuda_agree(two_trees):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for method in METHODS:
        here, there = (
            recover_lineage(two_trees, method=method, device=device, progress=False) for device in ("cpu", "cuda")
        )
        np.testing.assert_array_equal(here.parent, there.parent)


PROGRAM = """
import sys
from pathlib import Path
import side_by_side
from vitzoo_hf.apply.lineage.lineage import recover_lineage
from vitzoo_hf.zoo import Zoo

folder = Path(sys.argv[1])
if sys.argv[2] == "write":
    side_by_side.random_zoo(folder, side_by_side.VIT_S, 20)
else:
    forest = recover_lineage(Zoo(folder), method=sys.argv[2], progress=False)
    assert len(forest.model_ids) == 20
"""


@pytest.mark.slow
def test_twenty_large_models_fit_into_four_gigabytes(tmp_path):
    for step in ("write", "hubs", "mother"):
        assert peak_mb(PROGRAM, tmp_path, tmp_path / "zoo", step) < 4000
