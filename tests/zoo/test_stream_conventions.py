"""What people expect of a stream who know `datasets.IterableDataset` and the loaders of torch."""

import itertools
import pickle

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vitzoo_hf.format.layout import is_head
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo):
    return Zoo(tiny_zoo)


def ids(batches):
    return [batch["model_id"] for batch in batches]


@pytest.fixture(scope="module")
def stream(zoo):
    return zoo.stream(batch_size=2, shuffle=True, seed=1, num_workers=0)


def at_start(stream):
    stream.set_epoch(1)
    stream.set_epoch(0)
    return stream


def test_take_skip_and_shard_are_those_of_datasets(stream):
    whole = ids(at_start(stream))
    same = datasets.IterableDataset.from_generator(lambda: ({"number": number} for number in range(len(whole))))
    for ours, theirs in (
        (stream.take(3), same.take(3)),
        (stream.skip(4), same.skip(4)),
        (stream.skip(1).take(5), same.skip(1).take(5)),
        (stream.take(99), same.take(99)),
    ):
        assert ids(at_start(ours)) == [whole[item["number"]] for item in theirs]
        assert len(ours) == len(ids(at_start(ours)))
    shards = [ids(at_start(stream.shard(num_shards=3, index=index))) for index in range(3)]
    assert sorted(itertools.chain(*shards)) == sorted(whole)
    assert all(shard == whole[index::3] for index, shard in enumerate(shards))
    assert stream.num_shards == len(whole)
    with pytest.raises(ZooError, match="shard 3 of 3: shards count from 0"):
        stream.shard(num_shards=3, index=3)
    with pytest.raises(ZooError, match="batches are to be shared"):
        stream.shard(num_shards=len(whole) + 1, index=0)


def test_taken_streams_have_states_of_their_own(stream):
    part = at_start(stream.take(4))
    for _ in zip(range(2), part, strict=False):
        pass
    again = at_start(stream.take(4))
    again.load_state_dict(part.state_dict())
    assert ids(again) == ids(at_start(stream.take(4)))[2:]
    with pytest.raises(ZooError, match="this state is of another stream"):
        stream.load_state_dict(part.state_dict())


def test_map_filter_and_select_columns(zoo, stream):
    doubled = stream.map(lambda batch: {"twice": 2 * batch["epoch"]})
    assert all(torch.equal(batch["twice"], 2 * batch["epoch"]) for batch in at_start(doubled))
    final = stream.filter(lambda batch: bool(batch["is_final"].all()))
    kept = list(at_start(final))
    assert ids(kept) == [batch["model_id"] for batch in at_start(stream) if batch["is_final"].all()]
    with pytest.raises(TypeError, match="no length"):
        len(final)
    with pytest.raises(ZooError, match=r"unequal numbers of batches: use Zoo\.filter"):
        zoo.stream(world_size=2).filter(bool)
    with pytest.raises(ZooError, match="map: the function gave int"):
        next(iter(stream.map(lambda batch: 3)))
    (first, *_) = at_start(stream.select_columns(["model_id", "weights"]))
    assert list(first) == ["weights", "model_id", "repeated", "place"]
    (first, *_) = at_start(stream.select_columns("test_accuracy"))
    assert list(first) == ["test_accuracy", "repeated", "place"]
    with pytest.raises(ZooError, match="unknown column 'model': did you mean 'model_id'"):
        stream.select_columns(["model"])
    with pytest.raises(ZooError, match="unknown column 'tensors'"):
        stream.select_columns(["tensors"])
    (first, *_) = zoo.stream(tensors=["norm.*"]).select_columns(["tensors"])
    assert list(first) == ["repeated", "tensors", "place"]
    (first, *_) = zoo.stream(pad=True).select_columns(["lengths", "weights"])
    assert list(first) == ["weights", "lengths", "repeated", "place"]


def test_features_name_what_a_batch_has(zoo, stream):
    assert stream.column_names == list(stream.features) == ["weights", *zoo.index.column_names]
    assert stream.features["weights"] == datasets.List(datasets.Value("float32"))
    assert stream.features["split"] == datasets.Value("string")
    assert stream.select_columns(["epoch"]).column_names == ["epoch"]
    batch = next(iter(stream))
    assert set(stream.column_names) <= set(batch)


def test_split_is_a_column(zoo):
    counted = [split for batch in zoo.stream() for split in batch["split"]]
    assert sorted(counted) == sorted(zoo.splits_of(zoo.model_ids)) == sorted(zoo.index["split"])
    assert {row["split"] for row in zoo.rows()} == set(zoo.splits)


@pytest.mark.parametrize("part", ["trunk", "head"])
def test_trunks_share_batches_whatever_the_head(zoo, part):
    batches = list(zoo.stream(batch_size=100, tensors=part))
    assert len(batches) == (1 if part == "trunk" else len(zoo.layouts))
    for batch in batches:
        for place, model_id in enumerate(batch["model_id"]):
            row = zoo.row(model_id)
            whole = torch.from_numpy(row.weights)
            parts = [
                whole[held] for name, held in zoo.layouts[row.layout].items() if is_head(name) == (part == "head")
            ]
            assert torch.equal(batch["weights"][place], torch.cat(parts))
    with pytest.raises(ZooError, match="tensors='trunks': expected 'trunk', 'head', or a list"):
        zoo.stream(tensors="trunks")


def test_padding_gives_one_shape(zoo):
    batches = list(zoo.stream(batch_size=5, pad=True, shuffle=True))
    assert len(batches) == -(-len(zoo) // 5)
    assert sum(len(set(batch["layout"])) > 1 for batch in batches)
    for batch in batches:
        for place, model_id in enumerate(batch["model_id"]):
            size, vector = int(batch["lengths"][place]), batch["weights"][place].numpy()
            assert vector[:size].tobytes() == zoo.row(model_id).weights.tobytes()
            assert not vector[size:].any()


def test_every_padded_batch_is_as_wide_as_the_largest_row(zoo):
    widths = {batch["weights"].shape[1] for batch in zoo.stream(batch_size=1, pad=True)}
    assert widths == {max(layout.num_parameters for layout in zoo.layouts.values())}


def test_targets_in_float32(zoo):
    batch = next(iter(zoo.stream(dtype=torch.float32)))
    assert batch["test_accuracy"].dtype == torch.float32
    assert batch["epoch"].dtype == torch.int64
    with pytest.raises(ZooError, match=r"dtype is torch.float16; columns of numbers are"):
        zoo.stream(dtype=torch.float16)


def test_looking_at_a_batch_takes_nothing_away(stream):
    whole = ids(at_start(stream))
    stream.set_epoch(0)
    assert next(iter(stream))["model_id"] == whole[0]
    first, second = iter(stream), iter(stream)
    assert [next(first)["model_id"], next(second)["model_id"], next(first)["model_id"]] == [
        whole[0],
        whole[0],
        whole[1],
    ]
    assert (first.state_dict()["batches"], second.state_dict()["batches"]) == (2, 1)
    assert ids(stream) == whole


def test_an_epoch_that_was_left_is_begun_anew(stream):
    whole = ids(at_start(stream))
    stream.set_epoch(0)
    for _ in zip(range(3), stream, strict=False):
        pass
    state = stream.state_dict()
    assert ids(stream) == whole
    stream.load_state_dict(state)
    stream.set_epoch(state["epoch"])  # as loops do
    assert ids(stream) == whole[3:]
    assert stream.epoch == 1
    stream.set_epoch(0)
    assert ids(stream) == whole


def test_workers_are_ahead_so_the_state_needs_a_batch(zoo):
    def fresh():
        return zoo.stream(batch_size=2, num_workers=0)

    whole = ids(fresh())
    stream = fresh()
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    *_, batch = itertools.islice(loader, 3)
    with pytest.raises(ZooError, match=r"give the last batch that was used, stream.state_dict\(after=batch\)"):
        stream.state_dict()
    with pytest.raises(ZooError, match="after is a dict without a place; expected a batch as it came"):
        stream.state_dict(after={"weights": batch["weights"]})
    with pytest.raises(ZooError, match="without a place"):
        stream.state_dict(after={"place": {"epoch": "x", "batches": 1}})
    state = stream.state_dict(after=batch)
    stream.load_state_dict(state)
    assert ids(loader) == whole[3:]
    stream.load_state_dict(state)
    assert ids(stream) == whole[3:]


@pytest.mark.parametrize("persistent", [False, True])
def test_the_rest_of_an_epoch_is_not_read_twice(zoo, persistent):
    stream = zoo.stream(batch_size=2, num_workers=0)
    state = {**stream.state_dict(), "batches": 3}
    stream.load_state_dict(state)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=persistent)
    rest = ids(loader)
    with pytest.raises(ZooError, match=r"rest of epoch 0 was read by this DataLoader: call stream.set_epoch\(1\)"):
        list(loader)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=persistent)
    stream.set_epoch(1)
    assert len(ids(loader)) == len(rest) + 3
    stream.load_state_dict(state)
    assert ids(loader) == rest


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_persistent_workers_see_the_epoch(zoo, start):
    stream = zoo.stream(batch_size=2, shuffle=True, num_workers=0)
    expected = []
    for epoch in (2, 0):
        stream.set_epoch(epoch)
        expected.append(ids(stream))
    loader = DataLoader(
        stream, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context=start
    )
    for epoch, order in zip((2, 0), expected, strict=True):
        stream.set_epoch(epoch)
        assert ids(loader) == order


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("change", [{"world_size": 3}, {"workers": 1}, {"workers": 0}])
def test_what_cannot_be_continued_exactly_is_refused(zoo, change):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader(workers=2, world_size=2):
        stream = zoo.stream(batch_size=2, world_size=world_size, num_workers=0)
        return StatefulDataLoader(stream, batch_size=None, num_workers=workers)

    first = loader()
    next(iter(first))
    state = first.state_dict()
    again = loader(**change)
    again.load_state_dict(state)
    # torchdata itself asserts equal workers
    with pytest.raises((ZooError, AssertionError)) as raised:
        list(again)
    if "world_size" in change:
        assert "here are 2 in 3: to change that, save stream.state_dict(after=batch)" in str(raised.value)


def test_states_of_earlier_versions_are_refused(zoo):
    with pytest.raises(ZooError, match="is of an earlier vitzoo-hf, whose ranks and workers shared"):
        zoo.stream().load_state_dict({"epoch": 0, "batches_done": 10, "order": "0123456789abcdef"})
    with pytest.raises(ZooError, match="this state is of version 3, this version continues 2"):
        zoo.stream().load_state_dict({**zoo.stream().state_dict(), "version": 3})
    beyond = {**zoo.stream().state_dict(), "batches": 10_000}
    with pytest.raises(ZooError, match="this state is of another stream"):
        zoo.stream().load_state_dict(beyond)


def test_a_pickle_carries_only_its_rows(zoo):
    few = zoo.filter(split="test")
    stream, all_rows = few.stream(batch_size=2), zoo.stream(batch_size=2)
    again = pickle.loads(pickle.dumps(stream))
    assert again.source.table.num_rows == len(again.source.reader.rows) == len(few)
    assert len(pickle.dumps(stream)) < len(pickle.dumps(all_rows))
    assert again.state_dict() == stream.state_dict()
    for ours, theirs in zip(again, stream, strict=True):
        assert ours["model_id"] == theirs["model_id"]
        assert torch.equal(ours["weights"], theirs["weights"])
    assert np.array_equal(again.source.layout_codes, stream.source.layout_codes)


GLOO = """
import sys
import torch
import torch.distributed as dist
from vitzoo_hf.zoo import Zoo

if __name__ == "__main__":
    zoo, rank, place = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    stream = Zoo(zoo).stream(batch_size=4, shuffle=True, rank=rank, world_size=2)
    seen = 0
    for epoch in range(3):
        stream.set_epoch(epoch)
        for batch in stream:
            total = torch.tensor([len(batch["model_id"]) - int(batch["repeated"].sum())])
            dist.all_reduce(total)
            seen += int(total)
    print(seen)
"""


def test_ranks_that_wait_for_each_other_finish(zoo, tmp_path):
    import subprocess
    import sys

    assert len(zoo.layouts) == 3
    script = tmp_path / "ranks.py"
    script.write_text(GLOO)
    command = [sys.executable, str(script), zoo.name]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == [str(3 * len(zoo))] * 2


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_stateful_loader_goes_on_with_the_next_epoch_after_one_that_ended(zoo, workers, persistent):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def fresh():
        stream = zoo.stream(batch_size=2, shuffle=True, num_workers=0)
        kept = {"persistent_workers": persistent} if workers else {}
        return stream, StatefulDataLoader(stream, batch_size=None, num_workers=workers, **kept)

    stream, loader = fresh()
    orders = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        orders.append(ids(loader))
        if epoch == 0:
            state = loader.state_dict()
    assert orders[0] != orders[1] != orders[2]
    stream, loader = fresh()
    loader.load_state_dict(state)
    for epoch in (1, 2):
        stream.set_epoch(epoch)
        assert ids(loader) == orders[epoch]


def test_an_iterator_that_loads_a_state_leaves_the_stream_alone(stream):
    whole = ids(at_start(stream))
    stream.set_epoch(0)
    one = iter(stream)
    next(one)
    state = one.state_dict()
    other = iter(stream)
    other.load_state_dict(state)
    assert next(other)["model_id"] == whole[1]
    assert ids(stream) == whole
