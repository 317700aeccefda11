import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from vitzoo_hf.schema import ZooError
from vitzoo_hf.weight_reader import WeightReader
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_blueprint, tiny_runs, tmp_path_factory):
    """Two rows a row group, so that there is something to shuffle and to share."""
    from vitzoo_hf import pack, zoo_folder

    patch = pytest.MonkeyPatch()
    patch.setattr(zoo_folder, "ROW_GROUP_BYTES", 40_000)
    folder = pack.pack(tiny_blueprint, tiny_runs, tmp_path_factory.mktemp("stream") / "zoo", progress=False)
    patch.undo()
    zoo = Zoo(folder)
    assert zoo._reader.places.groups().max() >= 6
    return zoo


def ids(batches):
    return [model_id for batch in batches for model_id in batch["model_id"]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_an_epoch_has_every_row_once_with_its_weights(zoo, shuffle, batch_size):
    seen = []
    for batch in zoo.stream(batch_size=batch_size, shuffle=shuffle):
        assert len(set(batch["layout"])) == 1
        assert len(batch["model_id"]) == len(batch["weights"]) <= batch_size
        assert batch["epoch"].dtype == torch.int64
        assert batch["factor_lr"].dtype == batch["test_accuracy"].dtype == torch.float64
        for model_id, vector in zip(batch["model_id"], batch["weights"], strict=True):
            assert zoo.row(model_id)["weights"].tobytes() == vector.numpy().tobytes()
        seen += batch["model_id"]
    assert sorted(seen) == sorted(zoo.model_ids)


def test_shuffling_follows_the_seed_and_the_epoch(zoo):
    first, second = (zoo.stream(batch_size=1, shuffle=True, seed=1) for _ in range(2))
    one, two = ids(first), ids(first)
    assert one == ids(second)
    assert one != two
    assert sorted(one) == sorted(two)
    assert one != ids(zoo.stream(batch_size=1, shuffle=True, seed=2))
    assert ids(zoo.stream(batch_size=100)) != one


def test_small_zoos_are_permuted_across_row_groups(zoo, monkeypatch):
    order = [zoo.model_ids.index(model_id) for model_id in ids(zoo.stream(batch_size=1, shuffle=True))]
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(order))
    assert neighbours < len(order) / 2


@pytest.mark.parametrize("window", [1, 60_000, 256_000_000])
def test_resuming_after_any_batch_loses_and_repeats_nothing(zoo, window, monkeypatch):
    monkeypatch.setattr("vitzoo_hf.stream.WINDOW_BYTES", window)
    whole = zoo.stream(batch_size=2, shuffle=True, seed=3)
    expected = [batch["model_id"] for batch in whole] + [batch["model_id"] for batch in whole]
    for cut in range(len(expected)):
        stream = zoo.stream(batch_size=2, shuffle=True, seed=3)
        seen = []
        while len(seen) < cut:
            for batch in stream:
                seen.append(batch["model_id"])
                if len(seen) == cut:
                    break
        state = stream.state_dict()
        again = zoo.stream(batch_size=2, shuffle=True, seed=3)
        again.load_state_dict(state)
        rest = []
        while len(seen) + len(rest) < len(expected):
            rest += [batch["model_id"] for batch in again]
        assert seen + rest[: len(expected) - len(seen)] == expected


def test_a_state_of_another_stream_is_refused(zoo):
    state = zoo.stream(batch_size=2).state_dict()
    for other in (
        zoo.stream(batch_size=3),
        zoo.stream(batch_size=2, seed=1),
        zoo.filter(head="mlp").stream(batch_size=2),
    ):
        with pytest.raises(ZooError, match="this state is of another stream"):
            other.load_state_dict(state)


def test_resuming_reads_only_what_is_left(zoo, monkeypatch):
    stream = zoo.stream(batch_size=2)
    for _ in zip(range(6), stream, strict=False):
        pass
    reads = []
    original = WeightReader.read_into

    def counted(self, position, out, **options):
        reads.append(position)
        return original(self, position, out, **options)

    monkeypatch.setattr(WeightReader, "read_into", counted)
    again = zoo.stream(batch_size=2)
    again.load_state_dict(stream.state_dict())
    left = ids(again)
    assert 0 < len(left) < len(zoo)
    assert sorted(zoo.model_ids[position] for position in reads) == sorted(left)


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_row_groups(zoo, shuffle):
    parts = [ids(zoo.stream(batch_size=2, shuffle=shuffle, rank=rank, world_size=3)) for rank in range(3)]
    assert all(parts)
    assert sorted(itertools.chain(*parts)) == sorted(zoo.model_ids)


def test_loader_workers_share_the_row_groups(zoo):
    loader = DataLoader(zoo.stream(batch_size=2, shuffle=True), batch_size=None, num_workers=2)
    assert sorted(ids(loader)) == sorted(zoo.model_ids)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ({"rank": 2, "world_size": 2}, "rank 2 of 2: ranks count from 0"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(zoo, arguments, message):
    with pytest.raises(ZooError, match=message):
        zoo.stream(**arguments)
