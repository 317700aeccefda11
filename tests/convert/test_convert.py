import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitzoo_hf.convert.convert import NothingTakenError, convert
from vitzoo_hf.convert.rows import LoadedModel, PlannedRow, SourceError, SourcePlan
from vitzoo_hf.convert.sources.checkpoints import plan_checkpoints
from vitzoo_hf.convert.sources.plan import plan_source
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.vit import create
from vitzoo_hf.publish import folder as zoo_folder
from vitzoo_hf.zoo import Zoo

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 10}


@functools.cache
def model_of(number):
    return dict(create(NAME, ARGS, seed=number).state_dict())


def loader(number, loads):
    model_of(number)

    def load():
        loads.append(number)
        return LoadedModel(model_of(number), NAME, ARGS, "linear", None, ["flag"])

    return load


def plan_of(count=12, loads=None, **changes):
    loads = [] if loads is None else loads
    rows = [
        PlannedRow(
            source=f"run{number // 3}/checkpoint_{number % 3}",
            columns={
                "model_id": f"run{number // 3}@{number % 3}",
                "run_id": f"run{number // 3}",
                "parent_id": None if number < 3 else "run0@2",
                "stage": "pretrain" if number < 3 else "finetune",
                "epoch": number % 3,
                "is_final": number % 3 == 2,
                "dataset": "digits",
                "factor_seed": number // 3,
                "test_accuracy": 0.5,
                "provenance": {"config": {"lr": 1}},
            },
            split_group="run0",
            load=loader(number, loads),
            size=15_400,
        )
        for number in range(count)
    ]
    return SourcePlan(**{"name": "foreign", "rows": rows, "factor_types": {"seed": "int"}} | changes)


def without(plan, source, error):
    def fail():
        raise error

    rows = [replace(row, load=fail) if row.source == source else row for row in plan.rows]
    return replace(plan, rows=rows)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(zoo_folder, "SHARD_BYTES", 62_000)
    monkeypatch.setattr(zoo_folder, "ROW_GROUP_BYTES", 31_000)


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_plan_becomes_a_zoo_with_exact_models(tmp_path):
    done = convert(plan_of(), tmp_path / "zoo", progress=False)
    assert (done.rows, done.refused) == (12, {})
    zoo = Zoo(tmp_path / "zoo")
    assert len(list((tmp_path / "zoo" / "weights").iterdir())) == 3
    for number, model_id in enumerate(zoo.model_ids):
        expected = model_of(number)
        model = zoo.model(model_id)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    row = zoo.row("run2@1")
    assert (row["factor_seed"], row["parent_id"], row["test_accuracy"]) == (2, "run0@2", 0.5)
    assert json.loads(row["provenance"])["flags"] == ["flag"]
    assert not list(tmp_path.glob(".zoo.converting"))


def test_what_cannot_be_taken_is_named_and_the_rest_goes_on(tmp_path):
    def nan():
        tensors = dict(model_of(0))
        tensors["cls_token"] = tensors["cls_token"] * np.nan
        return LoadedModel(tensors, NAME, ARGS, "linear", None)

    plan = without(plan_of(refused={"x": "no checkpoint"}), "run1/checkpoint_1", ZooError("it is a bomb"))
    plan.rows[5] = replace(plan.rows[5], load=nan)
    done = convert(plan, tmp_path / "zoo", progress=False)
    assert done.refused == {
        "x": "no checkpoint",
        "run1/checkpoint_1": "it is a bomb",
        "run1/checkpoint_2": "has 16 weights that are not finite: leave it out, or train it again",
    }
    zoo = Zoo(tmp_path / "zoo")
    assert zoo.manifest["refused"] == done.refused
    assert len(zoo) == done.rows == 10


def test_a_shard_of_which_nothing_is_left_is_left_out(tmp_path):
    plan = plan_of()
    for row in plan.rows[4:8]:
        plan = without(plan, row.source, ZooError("no"))
    convert(plan, tmp_path / "zoo", progress=False)
    zoo = Zoo(tmp_path / "zoo")
    assert len(zoo) == 8
    assert len(list((tmp_path / "zoo" / "weights").iterdir())) == 2
    assert len([row.weights for row in zoo.rows()]) == 8


def test_a_missing_parent_is_noted(tmp_path):
    done = convert(without(plan_of(), "run0/checkpoint_2", ZooError("no")), tmp_path / "zoo", progress=False)
    assert done.notes == ["1 parents are not in the zoo, run0@2 the first."]


@pytest.mark.parametrize("fails_at", range(0, 12, 2))
def test_a_source_that_goes_away_is_taken_up_where_it_was(tmp_path, fails_at):
    convert(plan_of(), tmp_path / "whole", progress=False)
    plan = plan_of()
    broken = without(plan, plan.rows[fails_at].source, SourceError("the server is gone"))
    with pytest.raises(SourceError, match="the server is gone"):
        convert(broken, tmp_path / "zoo", progress=False)
    assert not (tmp_path / "zoo").exists()
    loads = []
    convert(plan_of(loads=loads), tmp_path / "zoo", progress=False)
    assert min(loads) == fails_at // 4 * 4
    assert contents(tmp_path / "zoo") == contents(tmp_path / "whole")


def test_converting_again_does_nothing(tmp_path):
    first = convert(plan_of(), tmp_path / "zoo", progress=False)
    loads = []
    assert convert(plan_of(loads=loads), tmp_path / "zoo", progress=False) == first
    assert loads == []


def test_another_unfinished_conversion_is_not_thrown_away(tmp_path):
    plan = plan_of()
    with pytest.raises(SourceError):
        convert(without(plan, plan.rows[9].source, SourceError("gone")), tmp_path / "zoo", progress=False)
    with pytest.raises(ZooError, match=r"\.zoo\.converting holds an unfinished conversion of another source"):
        convert(plan_of(11), tmp_path / "zoo", progress=False)


def test_a_shard_cut_after_it_was_finished_is_made_again(tmp_path):
    convert(plan_of(), tmp_path / "whole", progress=False)
    plan = plan_of()
    with pytest.raises(SourceError):
        convert(without(plan, plan.rows[9].source, SourceError("gone")), tmp_path / "zoo", progress=False)
    shard = sorted((tmp_path / ".zoo.converting" / "zoo" / "weights").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    convert(plan_of(), tmp_path / "zoo", progress=False)
    assert contents(tmp_path / "zoo") == contents(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_stored_on_request(tmp_path, dtype):
    convert(plan_of(), tmp_path / "zoo", dtype=dtype, progress=False)
    zoo = Zoo(tmp_path / "zoo")
    expected = torch.cat([t.flatten() for t in model_of(4).values()])
    row = zoo.row("run1@1")
    assert row["dtype"] == dtype
    assert torch.equal(torch.from_numpy(row["weights"]), expected.to(getattr(torch, dtype)).float())


def test_splits_are_by_lineage_or_run(tmp_path):
    shares = {"seed": 1, "train": 0.5, "validation": 0.2, "test": 0.3}
    convert(plan_of(30), tmp_path / "runs", splits={"by": "run"} | shares, progress=False)
    convert(plan_of(30), tmp_path / "roots", splits={"by": "lineage"} | shares, progress=False)
    assert len(Zoo(tmp_path / "runs").splits) > 1
    assert len(Zoo(tmp_path / "roots").splits) == 1


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(0), "foreign: no checkpoint can be taken: there is none"),
        (plan_of(0, refused={"a": "it is empty"}), r"no checkpoint can be taken \(1 refused; a: it is empty\)"),
    ],
)
def test_nothing_to_convert_is_one_line(tmp_path, plan, message):
    with pytest.raises(ZooError, match=message):
        convert(plan, tmp_path / "zoo", progress=False)


def test_a_folder_that_is_no_zoo_is_not_replaced(tmp_path):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "thesis.tex").write_text("mine")
    with pytest.raises(ZooError, match="exists and is not a zoo"):
        convert(plan_of(), tmp_path / "zoo", progress=False)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, monkeypatch):
    import errno

    convert(plan_of(), tmp_path / "whole", progress=False)
    real = zoo_folder.write_parquet
    calls = []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(zoo_folder, "write_parquet", full)
    with pytest.raises(ZooError, match=r"No space left on device.*the same command continues later"):
        convert(plan_of(), tmp_path / "zoo", progress=False)
    monkeypatch.setattr(zoo_folder, "write_parquet", real)
    convert(plan_of(), tmp_path / "zoo", progress=False)
    assert contents(tmp_path / "zoo") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "row"}, "splits by 'row': expected lineage or run"),
        ({"train": -0.5, "test": 1.5}, "splits of -0.5, 0, 1.5: shares are 0 or more and sum to 1"),
        ({"train": 0.5}, "splits of 0.5, 0, 0: shares"),
    ],
)
def test_wrong_splits_are_one_line(tmp_path, changes, message):
    splits = {"by": "run", "seed": 0, "train": 1.0, "validation": 0.0, "test": 0.0} | changes
    with pytest.raises(ZooError, match=message):
        convert(plan_of(), tmp_path / "zoo", splits=splits, progress=False)


def test_the_licence_is_unknown_unless_it_is_told(tmp_path):
    convert(plan_of(), tmp_path / "zoo", progress=False)
    assert "license_name: unknown" in (tmp_path / "zoo" / "README.md").read_text()
    convert(plan_of(), tmp_path / "told", licence="mit", progress=False)
    assert "license: mit" in (tmp_path / "told" / "README.md").read_text()


GIVEN = {"architecture": NAME, "architecture_args": {"num_heads": 2}}


def test_another_zoo_is_never_replaced_unasked(tmp_path):
    first = write_model(tmp_path / "first", seed=0)
    second = write_model(tmp_path / "second", seed=1)
    convert(plan_checkpoints(first, **GIVEN), tmp_path / "zoo", progress=False)
    held = Zoo(tmp_path / "zoo").index["weights_sha256"][:]
    with pytest.raises(ZooError, match=r"holds a zoo that is not of this source.*--replace"):
        convert(plan_checkpoints(second, **GIVEN), tmp_path / "zoo", progress=False)
    assert Zoo(tmp_path / "zoo").index["weights_sha256"][:] == held
    convert(plan_checkpoints(second, **GIVEN), tmp_path / "zoo", replace=True, progress=False)
    assert Zoo(tmp_path / "zoo").index["weights_sha256"][:] != held


@pytest.mark.parametrize(
    ("options", "message"),
    [({"workers": 0}, "workers is 0"), ({"licence": "bogus: x"}, "'bogus: x' is no name of a licence")],
)
def test_bad_options_leave_nothing_behind(tmp_path, options, message):
    source = write_model(tmp_path / "in", seed=0)
    with pytest.raises(ZooError, match=message):
        convert(plan_checkpoints(source, **GIVEN), tmp_path / "zoo", progress=False, **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_where_nothing_was_taken_nothing_stands_in_the_way(tmp_path):
    source = write_model(tmp_path / "in", seed=0)
    with pytest.raises(NothingTakenError, match="no checkpoint can be taken"):
        convert(plan_checkpoints(source), tmp_path / "zoo", progress=False)
    assert convert(plan_checkpoints(source, **GIVEN), tmp_path / "zoo", progress=False).rows == 1


def test_an_epoch_that_is_not_told_is_flagged(tmp_path):
    done = convert(plan_checkpoints(write_model(tmp_path / "in", seed=0), **GIVEN), tmp_path / "zoo", progress=False)
    assert "The epoch of 1 checkpoints is not told" in done.notes[0]
    assert json.loads(Zoo(tmp_path / "zoo").index["provenance"][0])["assumed"] == {"epoch": 1}


def test_first_epoch_is_for_releases_alone(tmp_path):
    with pytest.raises(ZooError, match="first_epoch is only for releases"):
        plan_source(str(write_model(tmp_path / "in", seed=0)), first_epoch=1)


def write_model(folder, seed):
    folder.mkdir()
    torch.save(create(NAME, ARGS, seed=seed).state_dict(), folder / "a.pt")
    return folder
