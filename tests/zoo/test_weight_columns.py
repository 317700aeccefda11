import json
import shutil
import threading

import pytest
import torch
from places import GOLDEN

from vitzoo_hf.format import schema
from vitzoo_hf.format.layout import Layout
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish import folder as zoo_folder
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.weight_columns import common_layout

STORAGES = [("list", "float32"), ("binary", "float32"), ("binary", "bfloat16")]


@pytest.fixture(scope="module", params=STORAGES, ids=" ".join)
def stored(request, tiny_blueprint, tiny_runs, tmp_path_factory):
    """The tiny zoo in every encoding, several row groups a shard."""
    kind, dtype = request.param
    patch = pytest.MonkeyPatch()
    patch.setattr(zoo_folder, "ROW_GROUP_BYTES", 40_000)
    if kind == "binary":
        patch.setattr(schema, "LIST_LIMIT", 100)
    folder = pack(tiny_blueprint, tiny_runs, tmp_path_factory.mktemp("stored") / "zoo", dtype=dtype, progress=False)
    patch.undo()
    return folder


def without_places(folder, target):
    """A copy as written before `shards.json`, where only Parquet knows where rows lie."""
    shutil.copytree(folder, target)
    manifest = json.loads((target / "zoo.json").read_text())
    shards = json.loads((target / "shards.json").read_text())
    del manifest["files"]["shards.json"]
    manifest["files"] |= {name: {"bytes": e["bytes"], "sha256": e["sha256"]} for name, e in shards.items()}
    (target / "zoo.json").write_text(json.dumps(manifest))
    return target


def gathered(columns):
    blocks = [(part, block.clone()) for part, block in columns]
    assert [part.start for part, _ in blocks] == [0, *(part.stop for part, _ in blocks[:-1])]
    return torch.cat([block for _, block in blocks], 1)


def trunks(zoo):
    rows = list(zoo.rows())
    return torch.stack([torch.from_numpy(r["weights"])[zoo.layouts[r["layout"]].trunk()] for r in rows])


@pytest.mark.parametrize("block_bytes", [700, 8000, 10**9])
@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_are_the_weights_of_all_trunks(stored, block_bytes, workers):
    zoo = Zoo(stored)
    columns = zoo.weight_columns(block_bytes=block_bytes, num_workers=workers)
    assert columns.model_ids == zoo.model_ids
    assert not any(name.startswith("head.") for name in columns.layout.names)
    expected = trunks(zoo)
    assert torch.equal(gathered(columns), expected)
    assert torch.equal(torch.stack(list(columns.rows())), expected)
    if block_bytes > 700:
        assert torch.equal(gathered(columns), expected)


def test_models_of_one_layout_keep_their_heads(stored):
    zoo = Zoo(stored)
    alike = zoo.filter(layout=zoo.row(zoo.model_ids[0])["layout"])
    expected = torch.stack([torch.from_numpy(row["weights"]) for row in alike.rows()])
    columns = alike.weight_columns(block_bytes=3000)
    assert torch.equal(gathered(columns), expected)
    assert columns.layout.num_parameters == expected.shape[1]
    assert columns.num_bytes == expected.nbytes


def test_rows_of_older_zoos_are_decoded_once(stored, tmp_path):
    zoo = Zoo(without_places(stored, tmp_path / "zoo"))
    assert zoo._reader.places.offset.max() == -1
    columns = zoo.weight_columns(block_bytes=5000)
    assert torch.equal(gathered(columns), trunks(Zoo(stored)))
    shutil.rmtree(tmp_path / "zoo")
    assert torch.equal(gathered(columns), trunks(Zoo(stored)))


def test_only_wanted_blocks_are_read(stored):
    columns = Zoo(stored).weight_columns(block_bytes=8000)
    place = columns.layout.place("blocks.0.mlp.fc1.weight")
    read = [part for part, _ in columns.read([place])]
    assert read == [part for part in columns.blocks() if part.start < place.stop and place.start < part.stop]
    assert 0 < len(read) < len(columns.blocks())


def test_two_blocks_of_memory_are_used_again(stored):
    columns = Zoo(stored).weight_columns(block_bytes=8000)
    assert len({block.data_ptr() for _, block in columns}) == 2


def test_leaving_early_stops_the_readers(stored):
    blocks = iter(Zoo(stored).weight_columns(block_bytes=2000))
    next(blocks)
    blocks.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vitzoo-ahead")]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cut_shard_is_named(stored, tmp_path, workers):
    zoo = Zoo(shutil.copytree(stored, tmp_path / "zoo"))
    name = zoo._reader.places.files[0]
    with (tmp_path / "zoo" / name).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ZooError, match=rf"{name}, row group \d+, cannot be read .*; pack the zoo again"):
        list(zoo.weight_columns(block_bytes=8000, num_workers=workers))


def test_heads_in_the_middle_and_other_trunks():
    shapes = {"cls_token": (1, 4), "head.weight": (2, 4), "norm.weight": (4,)}
    one = Layout(tuple(shapes), tuple(shapes.values()))
    two = Layout(("cls_token", "norm.weight", "head.weight"), ((1, 4), (4,), (3, 4)))
    other = Layout(("cls_token", "norm.weight"), ((1, 4), (5,)))
    assert common_layout({"1": one}) == one
    assert common_layout({"1": one, "2": two}) == Layout(("cls_token", "norm.weight"), ((1, 4), (4,)))
    with pytest.raises(ZooError, match=r"2 layouts .* \(1: 2 tensors of 8 weights, 3: 2 tensors of 9 weights\)"):
        common_layout({"1": one, "3": other})


def test_refusals(stored):
    zoo = Zoo(stored)
    with pytest.raises(ZooError, match="there are no weights to read: the filter matches no row"):
        zoo.filter(epoch=99).weight_columns()
    with pytest.raises(ZooError, match="num_workers is 0 and block_bytes"):
        zoo.weight_columns(num_workers=0)


def test_yesterdays_zoo_opens():
    zoo = Zoo(GOLDEN)
    assert torch.equal(gathered(zoo.weight_columns()), trunks(zoo))


@pytest.mark.gpu
def test_blocks_arrive_whole_on_the_gpu(stored):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    columns = Zoo(stored).weight_columns(device="cuda", block_bytes=8000)
    assert torch.equal(gathered(columns).cpu(), trunks(Zoo(stored)))
