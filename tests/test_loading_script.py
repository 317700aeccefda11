import hashlib
import importlib.util
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from places import REPOSITORY
from safetensors.torch import save_file

from vitzoo_hf.format import schema
from vitzoo_hf.format.encoding import rounded
from vitzoo_hf.format.shards import write_parquet

SCRIPTS = REPOSITORY / "loading_script"


@pytest.fixture(scope="module")
def script() -> Iterator:
    """`load_zoo.py` or `vit_zoo_builder.py` by path; `datasets` looks builders up among the imported modules."""
    loaded: dict[str, ModuleType] = {}

    def load(name: str) -> ModuleType:
        if name not in loaded:
            from vitzoo_hf.timm_import import import_timm

            import_timm()
            spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
            loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    yield load
    for name in loaded:
        del sys.modules[name]


def test_no_script_is_named_like_its_folder():
    assert not (SCRIPTS / "loading_script.py").exists()
    assert {file.name for file in SCRIPTS.glob("*.py")} == {"load_zoo.py", "vit_zoo_builder.py"}
    for file in SCRIPTS.glob("*.py"):
        assert f"`{file.name}`" in (SCRIPTS / "README.md").read_text()
        assert not re.search(
            r"import vitzoo_hf|from vitzoo_hf", file.read_text().replace("`import vitzoo_hf.models.vit`", "")
        )


@pytest.fixture(scope="module")
def stored(tiny_zoo, tmp_path_factory) -> dict[str, Path]:
    """The tiny zoo's rows in every way a zoo stores weights; each vector ends in zeros."""
    rows = [row for file in sorted(tiny_zoo.glob("weights/*")) for row in pq.read_table(file).to_pylist()]
    factors = json.loads((tiny_zoo / "zoo.json").read_text())["factors"]
    folders = {}
    for encoding, dtype in [("list", "float32"), *itertools.product(["binary"], ["float32", "float16", "bfloat16"])]:
        folder = tmp_path_factory.mktemp(f"{encoding}-{dtype}")
        changed = []
        for row in rows:
            vector = rounded(np.array(row["weights"], np.float32), dtype).copy()
            vector[-3:] = 0
            changed.append(row | {"weights": vector, "dtype": dtype, "weights_sha256": schema.weights_sha256(vector)})
        features = schema.row_features(factors, weights=encoding)
        groups = [changed] if encoding == "list" else [[row] for row in changed]
        write_parquet(folder / "weights" / "train-00000-of-00001.parquet", features, groups, {})
        files = [{"split": "train", "path": "weights/train-*.parquet"}]
        config = {"config_name": "weights", "description": f"{encoding} {dtype}", "data_files": files}
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
        folders[f"{encoding} {dtype}"] = folder
    return folders


KINDS = ["list float32", "binary float32", "binary float16", "binary bfloat16"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", [None, "torch", "numpy", "arrow", "pandas"])
def test_load_zoo_opens_every_encoding_in_every_format(script, stored, kind, style):
    module = script("load_zoo")
    rows = module.open_rows(str(stored[kind])).with_format(style)
    for position in (0, len(rows) - 1):
        row = rows[position]
        if style == "arrow":
            row = row.to_pylist()[0]
        elif style == "pandas":
            row = row.to_dict("records")[0]
        vector = module.vector_of(row)
        assert vector.dtype == torch.float32
        assert len(vector) == int(row["num_parameters"])
        assert hashlib.sha256(vector.numpy().tobytes()).hexdigest() == row["weights_sha256"]
        assert (vector[-3:] == 0).all()
        model = module.rebuild(row)
        again = torch.cat([tensor.reshape(-1) for tensor in model.state_dict().values()])
        assert torch.equal(again, vector)


def test_the_formats_of_datasets_do_cut_zeros(script, stored):
    """The trap that `vector_of` is immune to; should it go away, its advice can go too."""
    rows = script("load_zoo").open_rows(str(stored["binary float32"]))
    whole, cut = (rows.with_format(style)[0]["weights"] for style in (None, "numpy"))
    assert len(bytes(cut)) < len(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_load_zoo_refuses_what_is_damaged(script, stored, kind):
    module = script("load_zoo")
    row = dict(module.open_rows(str(stored[kind]))[0])
    weights = row["weights"]
    longer = weights + (b"\0" * 4 if isinstance(weights, bytes) else [0.0])
    with pytest.raises(ValueError, match="it is damaged"):
        module.vector_of(row | {"weights": longer})
    with pytest.raises(ValueError, match=r"damaged"):
        module.vector_of(row | {"weights": weights[: len(weights) // 2]})
    changed = bytes(8) + weights[8:] if isinstance(weights, bytes) else [9.0, *weights[1:]]
    with pytest.raises(ValueError, match="do not match their hash"):
        module.vector_of(row | {"weights": changed})
    with pytest.raises(ValueError, match="stored as 'int8'"):
        module.vector_of(row | {"dtype": "int8"})


def test_load_zoo_rebuilds_without_held_out_images(script, stored, capsys):
    assert script("load_zoo").main(str(stored["binary bfloat16"])) == 0
    assert capsys.readouterr().out == "0 accuracies recomputed\n10 models rebuilt, 0 accuracies differ\n"


def test_load_zoo_sees_a_changed_accuracy(script, zoo_copy, capsys):
    module = script("load_zoo")
    assert module.main(str(zoo_copy)) == 0
    assert "9 accuracies recomputed\n10 models rebuilt, 0 accuracies differ\n" in capsys.readouterr().out


CHECKPOINTS = {
    "a.safetensors": {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(3)},
    "deep/b.safetensors": {"w": torch.ones(2, 3, dtype=torch.bfloat16), "x.y": torch.zeros(2, dtype=torch.bfloat16)},
    "c.safetensors": {"w": torch.full((4,), 0.5, dtype=torch.float16)},
    "d.safetensors": {"scalar": torch.tensor(2.0), "none": torch.zeros(0, 3)},
}
FACTORS = "file,split,lr,seed,good,when,note\n" + "".join(
    f'{name},{split},{lr},{seed},{good},2026-11-2{seed},"{note}"\n'
    for name, split, lr, seed, good, note in [
        ("a.safetensors", "train", "1e-3", 1, "true", "with, comma"),
        ("deep/b.safetensors", "train", "0.1", 2, "false", ""),
        ("c.safetensors", "test", "", 3, "true", "x"),
        ("d.safetensors", "train", "2", 4, "true", "y"),
    ]
)


@pytest.fixture
def unpacked(tmp_path) -> Path:
    folder = tmp_path / "unpacked"
    for name, tensors in CHECKPOINTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name, metadata={"note": "ignored"})
    (folder / "factors.csv").write_text(FACTORS)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_unpacked_checkpoints_come_back_to_the_bit(script, unpacked, streaming):
    builder = script("vit_zoo_builder")
    held = builder.load(unpacked, streaming=streaming)
    assert set(held) == {"train", "test"}
    rows = [row for split in held.values() for row in split]
    assert {row["file"] for row in rows} == set(CHECKPOINTS)
    for row in rows:
        tensors = builder.state_dict(row)
        expected = CHECKPOINTS[row["file"]]
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name])
        assert row["num_parameters"] == sum(tensor.numel() for tensor in expected.values())
    assert [row["lr"] for row in rows] == [0.001, 0.1, 2.0, None]
    assert [row["seed"] for row in rows] == [1, 2, 4, 3]
    assert [row["good"] for row in rows] == [True, False, True, True]
    assert rows[0]["note"] == "with, comma"
    assert rows[0]["when"] == "2026-11-21"
    assert "split" not in rows[0]
    assert held["train"].features["weights"] == datasets.Value("binary")


def test_streams_have_a_shard_a_file_and_read_it_when_it_is_needed(script, unpacked, monkeypatch):
    builder = script("vit_zoo_builder")
    stream = builder.load(unpacked, split="train", streaming=True)
    assert stream.num_shards == 3
    read = []
    original = builder.read_checkpoint
    monkeypatch.setattr(builder, "read_checkpoint", lambda path: read.append(path.name) or original(path))
    rows = iter(stream)
    assert read == []
    assert next(rows)["file"] == "a.safetensors"
    assert read == ["a.safetensors"]
    halves = [[row["file"] for row in stream.shard(num_shards=3, index=index)] for index in range(3)]
    assert halves == [["a.safetensors"], ["deep/b.safetensors"], ["d.safetensors"]]
    shuffled = sorted(row["file"] for row in stream.shuffle(seed=0, buffer_size=1))
    assert shuffled == sorted(itertools.chain(*halves))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(row["file"] for row in loader) == shuffled


def test_changed_files_are_not_taken_from_the_cache(script, unpacked):
    builder = script("vit_zoo_builder")
    before = builder.load(unpacked, split="test")[0]
    save_file({"w": torch.ones(4)}, unpacked / "c.safetensors")
    after = builder.load(unpacked, split="test")[0]
    assert (before["dtype"], after["dtype"]) == ("float16", "float32")
    (unpacked / "factors.csv").write_text("file\nc.safetensors\n")
    assert builder.load(unpacked)["train"].num_rows == 1


def test_two_processes_fill_the_cache(script, unpacked, tmp_path):
    held = script("vit_zoo_builder").load(unpacked, cache_dir=str(tmp_path / "cache"), num_proc=2)
    assert held["train"]["file"][:] == ["a.safetensors", "deep/b.safetensors", "d.safetensors"]
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_tensors_lie_in_a_file_in_any_order(script, unpacked):
    entries = {"a": (2, [4, 12]), "z": (1, [0, 4])}
    told = {name: {"dtype": "F32", "shape": [size], "data_offsets": at} for name, (size, at) in entries.items()}
    header = json.dumps(told).encode()
    data = np.array([9, 1, 2], "<f4").tobytes()
    (unpacked / "c.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    builder = script("vit_zoo_builder")
    tensors = builder.state_dict(builder.load(unpacked, split="test")[0])
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [1, 2], "z": [9]}


def test_cut_bytes_are_refused(script, unpacked):
    builder = script("vit_zoo_builder")
    row = builder.load(unpacked, split="train").with_format("numpy")[0]
    with pytest.raises(ValueError, match=r"a.safetensors has 20 bytes of weights instead of 36: the formats torch"):
        builder.state_dict(row | {"weights": bytes(row["weights"])[:20]})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "factors.csv").unlink(), r"has no factors.csv: it needs a column `file`"),
        (lambda folder: (folder / "factors.csv").write_text("path\na\n"), "has the columns path; it needs `file`"),
        (lambda folder: (folder / "factors.csv").write_text("file,lr,lr\na,1,2\n"), "and none twice"),
        (lambda folder: (folder / "factors.csv").write_text("file\n"), "lists no file"),
        (lambda folder: (folder / "factors.csv").write_text(""), r"factors.csv cannot be read"),
        (lambda folder: (folder / "factors.csv").write_text("file,lr\na,1,2\n"), r"factors.csv cannot be read"),
        (
            lambda folder: (folder / "factors.csv").write_text("file,weights\na,1\n"),
            "a column 'weights', which is fil",
        ),
        (
            lambda folder: (folder / "factors.csv").write_text("file\nz.safetensors\n"),
            "'z.safetensors' in row 1, which",
        ),
        (
            lambda folder: (folder / "factors.csv").write_text("file\n../unpacked/a.safetensors\n"),
            "which is no file in",
        ),
        (
            lambda folder: (folder / "factors.csv").write_text(FACTORS + FACTORS.splitlines()[1]),
            "twice, in rows 1 and 5",
        ),
        (
            lambda folder: (folder / "factors.csv").write_text("file,split\na.safetensors,a b\n"),
            "the split 'a b' in row 1",
        ),
        (
            lambda folder: (folder / "a.safetensors").write_bytes(b"x"),
            r"a.safetensors is no safetensors file: its first",
        ),
        (
            lambda folder: (folder / "a.safetensors").write_bytes(b"PK" + bytes(98)),
            r"a.safetensors is no safetensors",
        ),
        (
            lambda folder: (folder / "a.safetensors").write_bytes(b"\x08" + bytes(99)),
            r"its header is no JSON of tensors",
        ),
        (
            lambda folder: cut(folder / "a.safetensors", -1),
            r"a.safetensors is damaged: 35 bytes follow its header, 36",
        ),
        (lambda folder: cut(folder / "a.safetensors", 40), r"a.safetensors is no safetensors file, or damaged"),
        (
            lambda folder: save_file({"w": torch.ones(2), "i": torch.ones(2).int()}, folder / "a.safetensors"),
            "F32, I32",
        ),
        (lambda folder: save_file({}, folder / "a.safetensors"), r"a.safetensors has tensors of no type"),
        (lambda folder: overlap(folder / "a.safetensors"), "tensor 'w' does not lie where its shape says"),
    ],
)
def test_wrong_input_is_named(script, unpacked, damage, message, streaming):
    damage(unpacked)
    with pytest.raises(ValueError, match=message):
        list(script("vit_zoo_builder").load(unpacked, split="train", streaming=streaming))


def cut(file: Path, end: int) -> None:
    file.write_bytes(file.read_bytes()[:end])


def overlap(file: Path) -> None:
    data = file.read_bytes()
    assert data.count(b'"shape":[2,3]') == 1
    file.write_bytes(data.replace(b'"shape":[2,3]', b'"shape":[2,2]'))


def test_scripts_are_not_run_by_load_dataset(tmp_path):
    """What the README says."""
    shutil.copy(SCRIPTS / "vit_zoo_builder.py", tmp_path)
    with pytest.raises(RuntimeError, match="Dataset scripts are no longer supported"):
        datasets.load_dataset(str(tmp_path / "vit_zoo_builder.py"))
