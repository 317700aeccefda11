import json
import shutil

import numpy as np
import pytest
from datasets import load_dataset
from soup_zoo import noisy_zoo

from vitzoo_hf.apply.rebasin.rows import rebasin_zoo
from vitzoo_hf.apply.soup.averaging import Soup, greedy_soup, uniform_soup
from vitzoo_hf.apply.soup.rows import soup_row, write_soups
from vitzoo_hf.cli.app import run
from vitzoo_hf.evaluation.evaluate import evaluate
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import weights_of
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.verify import verify


@pytest.fixture(scope="module")
def finals(tiny_zoo):
    return Zoo(tiny_zoo).filter(stage="finetune", is_final=True)


@pytest.fixture(scope="module")
def children(finals):
    return finals.filter(parent_id=finals.index["parent_id"][0], head="linear")


def test_a_soup_is_a_row_that_everything_opens(children, tmp_path):
    soup = greedy_soup(children, *children.probes("digits", "selection"))
    mean = uniform_soup(children)
    rows = [soup_row(children, soup, name="first"), soup_row(children, mean, name="second", test_accuracy=0.5)]
    folder = write_soups(children, rows, tmp_path / "soups")
    zoo = Zoo(folder)
    assert zoo.model_ids == [row["model_id"] for row in rows] == ["soup-greedy--first@2", "soup-uniform--second@2"]
    assert verify(folder, progress=False).intact
    assert np.array_equal(zoo.row("soup-uniform--second@2")["weights"], mean.weights.numpy())
    (split,) = zoo.splits
    loaded = load_dataset(str(folder), "weights", split=split)
    assert np.array_equal(weights_of(loaded[1]), mean.weights.numpy())
    table = evaluate(zoo, progress=False).evaluations.set_index("model_id")
    assert table.loc["soup-greedy--first@2", "selection_accuracy"] == pytest.approx(soup.selection_accuracy)
    record = json.loads(zoo.row("soup-uniform--second@2")["provenance"])
    assert [entry["model_id"] for entry in record["ingredients"]] == children.model_ids
    assert [entry["weights_sha256"] for entry in record["ingredients"]] == children.index["weights_sha256"]
    assert [entry["coefficient"] for entry in record["ingredients"]] == [0.5, 0.5]
    assert record["chosen_on"] is None
    chosen = json.loads(zoo.row("soup-greedy--first@2")["provenance"])
    images = len(children.probes("digits", "selection")[1])
    assert chosen["chosen_on"] == {"dataset": "digits", "role": "selection", "images": images}
    assert str(tmp_path) not in json.dumps(record)


def test_only_what_all_ingredients_share_is_kept(finals, children):
    row = soup_row(children, uniform_soup(children))
    assert row["parent_id"] == children.index["parent_id"][0]
    assert (row["factor_lr"], row["factor_head"], row["factor_optimizer"]) == (0.001, "linear", None)
    assert row["train_accuracy"] is row["generalization_gap"] is row["test_accuracy"] is None
    assert (row["stage"], row["epoch"], row["is_final"]) == ("finetune", 2, True)
    across = finals.filter(head="linear")
    row = soup_row(across, uniform_soup(across))
    assert (row["parent_id"], row["factor_regime"]) == (None, None)


def test_a_soup_of_several_splits_is_in_the_most_guarded_one(tmp_path, tiny_zoo):
    zoo = noisy_zoo(tmp_path / "zoo", tiny_zoo, runs=3, epochs=1, splits=("train", "validation", "test"))
    finals = zoo.filter(is_final=True)
    for runs, split in (([0, 1], "validation"), ([0, 2], "test"), ([1, 2], "test")):
        some = finals.filter(run_id=[f"run{run}" for run in runs])
        row = soup_row(some, uniform_soup(some))
        assert row["split"] == split
        assert Zoo(write_soups(some, [row], tmp_path / "soups")).splits == [split]


def test_soups_that_cannot_be_written_are_refused(children, finals, tmp_path):
    row = soup_row(children, uniform_soup(children), name="a b/c")
    assert row["model_id"] == "soup-uniform--a.b.c@2"
    with pytest.raises(ZooError, match=r"1 ids belong to several soups, soup-uniform--a.b.c@2 the first"):
        write_soups(children, [row, row], tmp_path / "twice")
    with pytest.raises(ZooError, match="there is no soup to write"):
        write_soups(children, [], tmp_path / "none")
    soup = uniform_soup(finals.filter(head="mlp"))
    with pytest.raises(ZooError, match="holds 0 of the 4 ingredients"):
        soup_row(children, Soup(soup.weights, soup.coefficients, "uniform"))


def call(capsys, *arguments):
    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("method", ["uniform", "greedy", "learned"])
def test_the_verb_writes_a_zoo_and_a_table(capsys, tiny_zoo, tmp_path, method):
    out = tmp_path / "soups"
    status, printed, _ = call(capsys, "soup", tiny_zoo, "--method", method, "--by", "head", "--out", out, "--json")
    assert status == 0
    told = json.loads(printed)
    assert [line["method"] for line in told["table"]] == [method] * 2
    assert [line["head"] for line in told["table"]] == ["linear", "mlp"]
    zoo = Zoo(out)
    assert sorted(zoo.index["test_accuracy"]) == pytest.approx(
        sorted(line["test_accuracy"] for line in told["table"])
    )
    measured = evaluate(zoo, progress=False).evaluations["test_accuracy"]
    assert sorted(measured) == pytest.approx(sorted(zoo.index["test_accuracy"]))
    assert (out / "soups.csv").is_file()
    assert verify(out, progress=False).intact


def test_the_verb_tells_the_next_step_and_refuses_in_one_line(capsys, tiny_zoo, tmp_path):
    status, printed, _ = call(capsys, "soup", tiny_zoo, "--out", tmp_path / "soups", "--where", "head=mlp")
    assert status == 0
    assert "2 soups in" in printed
    assert "Next: vitzoo evaluate" in printed
    status, _, err = call(capsys, "soup", tiny_zoo, "--by", "parent_id", "--out", tmp_path / "other", "--quiet")
    assert (status, err.count("\n")) == (1, 1)
    assert "a soup needs models of one head" in err
    status, _, err = call(capsys, "soup", tiny_zoo, "--method", "epochs", "--out", tmp_path / "other", "--quiet")
    assert status == 1
    assert "no run can be averaged over epochs" in err
    status, _, err = call(capsys, "soup", tiny_zoo, "--method", "epochs", "--by", "head", "--out", tmp_path / "other")
    assert status == 1
    assert "leave --by out" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    status, _, err = call(capsys, "soup", tiny_zoo, "--out", tmp_path / "mine", "--quiet")
    assert status == 1
    assert "exists and is not a zoo" in err


def test_soups_never_replace_the_zoo_they_are_read_from_nor_another(capsys, tiny_zoo, tmp_path):
    zoo = shutil.copytree(tiny_zoo, tmp_path / "zoo")
    before = (zoo / "zoo.json").read_bytes()
    (tmp_path / "link").symlink_to(zoo)
    wanted = ("--method", "uniform", "--by", "head", "--json")
    for name, out in ((zoo, zoo), (zoo, tmp_path / "link"), (tmp_path / "link", zoo)):
        status, _, err = call(capsys, "soup", name, "--out", out, *wanted)
        assert (status, err.count("\n")) == (1, 1)
        assert "is the zoo that is read, and would be replaced: give another folder" in err
    status, _, err = call(capsys, "soup", tiny_zoo, "--out", zoo, *wanted)
    assert (status, err.count("\n")) == (1, 1)
    assert "holds a zoo that is not of soups, and would be replaced" in err
    finals = Zoo(zoo).filter(stage="finetune", is_final=True, head="mlp")
    with pytest.raises(ZooError, match="is the zoo that is read"):
        write_soups(finals, [soup_row(finals, uniform_soup(finals))], zoo)
    assert (zoo / "zoo.json").read_bytes() == before
    for _ in range(2):
        assert call(capsys, "soup", tiny_zoo, "--out", tmp_path / "soups", *wanted)[0] == 0
    with pytest.raises(ZooError, match="not of models aligned by re-basin"):
        rebasin_zoo(finals, finals.model_ids[0], tmp_path / "soups", progress=False)


def test_a_place_that_cannot_be_written_is_told_before_anything_is_computed(capsys, tiny_zoo, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("computed first")

    monkeypatch.setattr("vitzoo_hf.apply.soup.comparison.compare_soups", never)
    (tmp_path / "file").write_text("")
    status, _, err = call(capsys, "soup", tiny_zoo, "--out", tmp_path / "file" / "soups")
    assert (status, err.count("\n")) == (1, 1)
    assert "cannot write" in err
    for wrong, told in ((["--device", "gpu"], "unknown device 'gpu'"), (["--seed", "-1"], "--seed -1")):
        status, _, err = call(capsys, "soup", tiny_zoo, "--out", tmp_path / "soups", *wrong)
        assert (status, err.count("\n")) == (1, 1)
        assert told in err
    for by in ("", "head,", " "):
        status, _, err = call(capsys, "soup", tiny_zoo, "--out", tmp_path / "soups", "--by", by)
        assert (status, err.count("\n")) == (1, 1)
        assert "has an empty name: expected NAME,NAME" in err
