import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.weight_reader import WeightReader
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_blueprint, tiny_runs, tmp_path_factory):
    """Two rows a row group, so that there is something to shuffle and to share."""
    from vitzoo_hf.publish import folder as zoo_folder
    from vitzoo_hf.publish import pack

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
    monkeypatch.setattr("vitzoo_hf.zoo.plan.WINDOW_BYTES", window)
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
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_have_equally_many_batches_and_share_the_rows(zoo, shuffle, drop_last, world_size):
    streams = [
        zoo.stream(batch_size=2, shuffle=shuffle, drop_last=drop_last, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    parts = [list(stream) for stream in streams]
    assert {len(part) for part in parts} == {len(streams[0])}
    alone = list(zoo.stream(batch_size=2, shuffle=shuffle, drop_last=drop_last))
    rounds = [parts[rank][number] for number in range(len(parts[0])) for rank in range(world_size)]
    first = [batch["model_id"] for batch in rounds if not batch["repeated"].any()]
    assert first == [batch["model_id"] for batch in alone][: len(first)]
    if drop_last:
        assert len(alone) - len(first) < world_size
        assert all(len(ids) == 2 for ids in first)
    else:
        assert len(first) == len(alone)
        again = [batch["model_id"] for batch in rounds if batch["repeated"].all()]
        assert len(again) == -len(alone) % world_size
        assert again == (first * world_size)[: len(again)]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"epoch": 0},
        {"version": 2, "epoch": -1, "batches": 0},
        {"version": 2, "epoch": 0, "batches": "1"},
    ],
)
def test_what_is_no_state_is_refused(zoo, state):
    with pytest.raises(ZooError, match="this is no state of a stream"):
        zoo.stream().load_state_dict(state)


def test_loader_workers_share_the_row_groups(zoo):
    loader = DataLoader(zoo.stream(batch_size=2, shuffle=True), batch_size=None, num_workers=2)
    assert sorted(ids(loader)) == sorted(zoo.model_ids)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
    ({"batch_size": True}, "batch_size is True; it must be a whole number"),
    ({"seed": -1}, "seed is -1; it must be a whole number of at least 0"),
    ({"num_workers": -1}, "num_workers is -1"),
    ({"world_size": 0}, "world_size is 0"),
    ({"tensors": []}, r"tensors=\[\]: expected a list of names"),
    ({"device": "meta"}, "device 'meta' holds no numbers"),
    ({"rank": 2, "world_size": 2}, "rank 2 of 2: ranks count from 0"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(zoo, arguments, message):
    with pytest.raises(ZooError, match=message):
        zoo.stream(**arguments)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("reuse", [False, True])
def test_reading_ahead_changes_nothing(zoo, workers, reuse):
    truth = {row["model_id"]: row["weights"].tobytes() for row in zoo.rows()}
    stream = zoo.stream(batch_size=3, shuffle=True, seed=5, num_workers=workers, reuse=reuse)
    order = []
    for batch in stream:
        order += batch["model_id"]
        for model_id, vector in zip(batch["model_id"], batch["weights"], strict=True):
            assert truth[model_id] == vector.numpy().tobytes()
    assert order == ids(zoo.stream(batch_size=3, shuffle=True, seed=5, num_workers=0))


def test_fresh_batches_stay_as_they_are_and_reused_memory_is_reused(zoo):
    kept = [batch["weights"] for batch in zoo.stream(batch_size=2)]
    assert torch.equal(torch.cat([batch.flatten() for batch in kept]), torch.cat(
        [batch["weights"].flatten().clone() for batch in zoo.stream(batch_size=2, reuse=True)]
    ))  # fmt: skip
    alike = zoo.filter(layout=zoo.row(zoo.model_ids[0])["layout"])
    addresses = {batch["weights"].data_ptr() for batch in alike.stream(batch_size=1, reuse=True, num_workers=1)}
    assert len(addresses) <= 2


def test_only_the_chosen_columns_are_handed_out(zoo):
    batch = next(iter(zoo.stream(batch_size=2, columns=["factor_lr", "model_id"])))
    assert list(batch) == ["weights", "factor_lr", "model_id", "repeated", "place"]
    with pytest.raises(ZooError, match=r"unknown column 'factor_lrr': did you mean 'factor_lr'\?"):
        zoo.stream(columns=["factor_lrr"])


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "patterns", [["blocks.*.attn.qkv.weight"], ["cls_token", "blocks.0.*"], ["*"], ["norm.bias"]]
)
def test_tensors_by_name(zoo, patterns, verify):
    import fnmatch

    from vitzoo_hf.format.layout import unflatten

    seen = 0
    for batch in zoo.stream(batch_size=4, tensors=patterns, verify=verify):
        layouts = [zoo.layouts[layout_id] for layout_id in batch["layout"]]
        layout = layouts[0]
        names = [name for name in layout.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        assert list(batch["tensors"]) == names
        assert batch["weights"].shape[1] == sum(tensor[0].numel() for tensor in batch["tensors"].values())
        for number, model_id in enumerate(batch["model_id"]):
            whole = unflatten(torch.from_numpy(zoo.row(model_id)["weights"]), layouts[number])
            for name in names:
                assert torch.equal(batch["tensors"][name][number], whole[name])
            seen += 1
    assert seen == len(zoo)


def test_tensors_read_no_more_than_they_are(zoo, monkeypatch):
    read = []
    original = WeightReader._read_bytes

    def counted(self, position, start, out):
        read.append(out.size)
        original(self, position, start, out)

    monkeypatch.setattr(WeightReader, "_read_bytes", counted)
    fresh = Zoo(zoo.name)
    sizes = [batch["weights"].numel() for batch in fresh.stream(tensors=["blocks.0.attn.*"], verify=False)]
    assert sum(read) == 4 * sum(sizes)


def test_a_pattern_that_names_no_tensor_is_refused(zoo):
    with pytest.raises(ZooError, match=r"tensors='block\.0\.\*' matches no tensor of layout \w+"):
        zoo.stream(tensors=["block.0.*"])


def test_a_damaged_row_ends_the_stream_by_name(zoo_copy):
    file = next((zoo_copy / "weights").glob("*.parquet"))
    zoo = Zoo(zoo_copy)
    position = 11
    data = bytearray(file.read_bytes())
    data[int(zoo._reader.places.offset[position]) + 5] ^= 1
    file.write_bytes(data)
    seen = []
    with pytest.raises(ZooError, match=f"the weights of {zoo.model_ids[position]} do not match their hash"):
        seen.extend(batch["model_id"][0] for batch in zoo.stream(batch_size=1, num_workers=2))
    assert zoo.model_ids[position] not in seen


def test_leaving_early_stops_the_readers(zoo):
    import threading

    for batch in zoo.stream(batch_size=1, num_workers=2):
        assert batch["weights"].ndim == 2
        break
    import gc

    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vitzoo-stream")]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_to_the_row(zoo, workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader():
        return StatefulDataLoader(
            zoo.stream(batch_size=2, shuffle=True, seed=4, num_workers=0), batch_size=None, num_workers=workers
        )

    expected = [batch["model_id"] for batch in loader()]
    for cut in (1, 4, len(expected) - 1):
        first = loader()
        seen = []
        for batch in first:
            seen.append(batch["model_id"])
            if len(seen) == cut:
                break
        state = first.state_dict()
        again = loader()
        again.load_state_dict(state)
        assert seen + [batch["model_id"] for batch in again] == expected


KILLED = """
import json, os, signal, sys
from pathlib import Path
from vitzoo_hf.zoo import Zoo

if __name__ == "__main__":
    zoo, state_file, log, dies_after = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    stream = Zoo(zoo).stream(batch_size=2, shuffle=True, seed=6, num_workers=2)
    if state_file.exists():
        stream.load_state_dict(json.loads(state_file.read_text()))
    for done, batch in enumerate(stream):
        if done == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        with log.open("a") as file:
            file.write("".join(f"{model_id}\\n" for model_id in batch["model_id"]))
        state_file.write_text(json.dumps(stream.state_dict()))
"""


def test_a_killed_loop_goes_on_with_the_next_row(zoo, tmp_path):
    import subprocess
    import sys

    script, state, log = tmp_path / "loop.py", tmp_path / "state.json", tmp_path / "seen"
    script.write_text(KILLED)
    codes = [
        subprocess.run([sys.executable, script, zoo.name, state, log, str(dies)], check=False).returncode
        for dies in (3, 2, 99)
    ]
    assert codes == [-9, -9, 0]
    assert log.read_text().split() == ids(zoo.stream(batch_size=2, shuffle=True, seed=6))


def test_set_epoch_gives_that_epochs_order(zoo):
    stream = zoo.stream(batch_size=1, shuffle=True, seed=1)
    orders = [ids(stream) for _ in range(3)]
    stream.set_epoch(1)
    assert ids(stream) == orders[1]


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_arrive_whole_on_the_gpu(zoo, workers):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    truth = {row["model_id"]: torch.from_numpy(row["weights"]) for row in zoo.rows()}
    kept = []
    for batch in zoo.stream(batch_size=3, shuffle=True, device="cuda", num_workers=workers):
        assert batch["weights"].is_cuda
        kept.append((batch["model_id"], batch["weights"]))
        torch.cuda._sleep(1_000_000)
    for model_ids, weights in kept:
        for model_id, vector in zip(model_ids, weights.cpu(), strict=True):
            assert torch.equal(vector, truth[model_id])
