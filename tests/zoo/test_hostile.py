"""What a stranger's zoo can say: every field of its JSON, every column of its index, the header of its card."""

import json
import os
import random
import shutil
from pathlib import Path

import hostile_zoo as hostile
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish.push_contents import read_contents
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.verify import verify
from vitzoo_hf.zoo.zoo import SAMPLE

INDEX = "index/train-00000-of-00001.parquet"
WEIGHTS = "weights/train-00000-of-00001.parquet"
FILES = {name: json.loads((SAMPLE / name).read_text()) for name in ("zoo.json", "shards.json", "layouts.json")}
PLACES = {name: sorted(hostile.places(value), key=str) for name, value in FILES.items()}
COLUMNS = [name for name in Zoo.sample().index.column_names if name != "split"]
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]" for n in range(9)
)
HEADERS = [
    *("", "- x", "x", "[" * 50_000, "{" * 50_000, "a: [", "\x00", "a: !!python/object/apply:os.getcwd []", ALIASES),
    *("zoo_json_sha256: 1", "zoo_json_sha256: [x]", "zoo_json_sha256: ../x", "configs: {}", "configs: [1]"),
    *("2026-99-99: 2026-99-99", "a: 1e999", "a: .nan", "? [x]\n: y", "? {a: b}\n: y", "configs: [x]\nx: 0o9"),
]


def fresh_copy(work: Path) -> Path:
    shutil.rmtree(work / "zoo", ignore_errors=True)
    return shutil.copytree(SAMPLE, work / "zoo")


def mutate_json(folder: Path, draw: random.Random) -> str:
    """Change one field of one JSON file; returns what was changed."""
    name = draw.choice(sorted(FILES))
    place = draw.choice(PLACES[name])
    new = draw.choice(hostile.VALUES)
    kind = draw.choice(["value", "value", "value", "missing", "key", "number"])

    def change(parent: object, key: str | int) -> None:
        if kind == "missing":
            del parent[key]
        elif kind == "key" and isinstance(parent, dict):
            parent[new if isinstance(new, str) else "x"] = parent.pop(key)
        elif kind == "number" and type(parent[key]) is int:
            parent[key] += draw.choice([-1, 1, 2**20, -(2**20)])
        else:
            parent[key] = new

    (folder / name).write_text(hostile.json_with(hostile.changed(FILES[name], place, change, new)))
    if name != "zoo.json":
        hostile.agree(folder)
    hostile.agree_root(folder)
    return f"{kind} of {name} at {place}: {str(new)[:60]}"


def mutate_column(folder: Path, draw: random.Random) -> str:
    """Change one column of the index; returns what was changed."""
    column, new = draw.choice(COLUMNS), draw.choice(hostile.VALUES)
    kind = draw.choice(["one", "one", "all", "type", "drop", "null", "same", "nested"])

    def values(old: pa.ChunkedArray) -> pa.Array | None:
        held = old.to_pylist()
        if kind == "drop":
            return None
        if kind == "null":
            return pa.nulls(len(held), old.type)
        if kind == "same":
            return pa.array([held[0]] * len(held), old.type)
        if kind == "nested":
            return pa.array([[value] for value in held], pa.list_(old.type))
        if kind == "type":
            return draw.choice(
                [pc.cast(old, pa.string()), pa.array(range(len(held))), pa.array([b"\xff"] * len(held))]
            )
        row = draw.randrange(len(held))
        text = new if isinstance(new, str) else json.dumps(new)
        for number in range(len(held)) if kind == "all" else [row]:
            held[number] = text if pa.types.is_string(old.type) else new
        try:
            return pa.array(held, old.type)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            return pa.array([str(value) for value in held])

    hostile.change_column(folder / INDEX, column, values)
    hostile.agree(folder)
    return f"{kind} of {column}: {str(new)[:60]}"


def mutate_args(folder: Path, draw: random.Random) -> str:
    """Change one argument of the architecture of all rows; returns what was changed."""
    name = draw.choice(["depth", "embed_dim", "num_classes", "img_size", "patch_size", "in_chans", "num_heads", "x"])
    new = draw.choice([*hostile.VALUES, 10**8, 10**12, 20_000, 1_000_000])

    def values(old: pa.ChunkedArray) -> pa.Array:
        return pa.array([hostile.json_with(json.loads(text) | {name: new}) for text in old.to_pylist()])

    hostile.change_column(folder / INDEX, "architecture_args", values)
    hostile.agree(folder)
    return f"{name} of architecture_args: {str(new)[:60]}"


def mutate_card(folder: Path, draw: random.Random) -> str:
    """Change the header of the card; returns what was changed."""
    header = draw.choice(HEADERS)
    text = (folder / "README.md").read_text().split("\n---\n", 1)[1]
    (folder / "README.md").write_text(f"---\n{header}\n---\n{text}")
    return f"header {header[:60]!r}"


def check_examples(work: Path, examples: int, *, derandomize: bool) -> None:
    fresh_copy(work)
    # libraries that are imported late, and threads, take address space that is no fault of an example
    assert hostile.refusal_of(work) is None
    mutations = st.sampled_from([mutate_json, mutate_json, mutate_json, mutate_column, mutate_args, mutate_card])

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=derandomize,
        database=None,
        # every example names what it changed: shrinking would use the zoo a thousand times more
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutation=mutations, draw=st.randoms(use_true_random=False))
    def run(mutation: object, draw: random.Random) -> None:
        folder = fresh_copy(work)
        what = mutation(folder, draw)
        message = hostile.refusal_of(work)
        if message is not None:
            assert message.isprintable(), (what, message)
            assert len(message) < 700, (what, message)
            names = (
                "zoo.json",
                "shards.json",
                "layouts.json",
                "README.md",
                "index",
                "parquet",
                "architecture",
                "provenance",
            )
            names += ("timm cannot build", "linear `head`")
            assert any(name in message for name in (*names, str(folder))), (what, message)

    run()


def test_no_field_of_a_strangers_zoo_does_more_than_one_line(tmp_path):
    check_examples(tmp_path, 200, derandomize=True)


@pytest.mark.slow
def test_two_thousand_fields_of_a_strangers_zoo(tmp_path):
    check_examples(tmp_path, 2_000, derandomize=False)


def test_an_id_that_leads_out_of_the_folder_is_refused(tmp_path):
    folder = fresh_copy(tmp_path)
    ids = Zoo(folder).model_ids
    hostile.change_column(folder / INDEX, "model_id", lambda old: pa.array(["../victim/model", *ids[1:]]))
    hostile.agree(folder)
    with pytest.raises(ZooError, match=r"`model_id` of row 0 is '\.\./victim/model'; expected RUN@EPOCH"):
        Zoo(folder)
    hostile.change_column(folder / INDEX, "model_id", lambda old: pa.array([ids[1], *ids[1:]]))
    hostile.agree(folder)
    with pytest.raises(ZooError, match=f"2 rows have the model_id '{ids[1]}'; expected one"):
        Zoo(folder)


def test_a_changed_mean_is_noticed_by_the_root_hash(tmp_path):
    folder = fresh_copy(tmp_path)
    assert verify(folder, progress=False).notes == []
    text = (folder / "zoo.json").read_text()
    (folder / "zoo.json").write_text(text.replace('"mean": 0.5', '"mean": 0.9', 1))
    damage = verify(folder, progress=False).damaged
    assert damage == {"zoo.json": "its content does not match zoo_json_sha256 in the card's header"}
    with pytest.raises(ZooError, match=r"zoo\.json does not match zoo_json_sha256 in the card's header"):
        read_contents(folder, "ORG/NAME")
    card = (folder / "README.md").read_text().split("\n")
    (folder / "README.md").write_text("\n".join(line for line in card if not line.startswith("zoo_json")))
    result = verify(folder, progress=False)
    assert result.intact
    assert result.notes[0].startswith("zoo.json is covered by no hash")


@pytest.mark.parametrize(
    "path", ["../outside.parquet", "/etc/passwd", "a\\b", "C:/x", ".git/config", "weights/../../x"]
)
@pytest.mark.parametrize("name", ["zoo.json", "shards.json"])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path, name, path):
    folder = fresh_copy(tmp_path)
    value = json.loads((folder / name).read_text())
    (value["files"] if name == "zoo.json" else value)[path] = {"bytes": 1, "sha256": "0" * 64}
    (folder / name).write_text(json.dumps(value))
    if name == "shards.json":
        hostile.agree(folder)
    for use in (Zoo, lambda folder: verify(folder, progress=False)):
        with pytest.raises(ZooError, match=rf"{name} is damaged: it lists .*, which is no file of a zoo"):
            use(folder)


def test_a_link_that_leaves_the_folder_is_refused_and_one_of_the_hubs_cache_is_followed(tmp_path):
    folder = fresh_copy(tmp_path)
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "commit"
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        place, blob = (
            snapshot / file.relative_to(folder),
            blobs / file.relative_to(folder).as_posix().replace("/", "-"),
        )
        for parent in (place.parent, blob.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        place.symlink_to(os.path.relpath(blob, place.parent))
    assert Zoo(snapshot).row(Zoo(snapshot).model_ids[0]).weights.size
    (tmp_path / "link").symlink_to(folder)
    assert len(Zoo(tmp_path / "link")) == 8
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(blobs / "weights-train-00000-of-00001.parquet")
    with pytest.raises(ZooError, match=f"{WEIGHTS} of .* is a link that leaves the folder"):
        Zoo(folder)


def test_a_copy_that_lost_its_json_opens_with_what_is_left(tmp_path):
    folder, whole = fresh_copy(tmp_path), Zoo.sample()
    for name in ("zoo.json", "shards.json", "layouts.json"):
        (folder / name).unlink()
    for gone in (None, "index"):
        if gone is not None:
            shutil.rmtree(folder / gone)
        with pytest.warns(UserWarning, match=r"has no zoo\.json and opens without hashes of files; how images"):
            zoo = Zoo(folder)
        assert zoo.factors == whole.factors
        assert zoo.layouts == whole.layouts
        for row, expected in zip(zoo.rows(), whole.rows(), strict=True):
            assert row.weights.tobytes() == expected.weights.tobytes()


def test_a_revision_is_given_once(tmp_path, monkeypatch):
    from vitzoo_hf.format.manifest import open_files

    assert open_files("ORG/NAME@v1.0", None).revision == "v1.0"
    assert open_files("hf://datasets/ORG/NAME@refs/pr/1", None).revision == "refs/pr/1"
    with pytest.raises(ZooError, match=r"'ORG/NAME@v1' and revision 'v2': give the revision once"):
        open_files("ORG/NAME@v1", "v2")
    monkeypatch.setenv("HOME", str(tmp_path))
    fresh_copy(tmp_path)
    assert len(Zoo("~/zoo")) == 8


def with_args(folder: Path, change: dict[str, object] | str) -> None:
    """Give every row of the index other architecture arguments."""

    def values(old: pa.ChunkedArray) -> pa.Array:
        texts = old.to_pylist()
        return pa.array(
            [change if isinstance(change, str) else json.dumps(json.loads(text) | change) for text in texts]
        )

    hostile.change_column(folder / INDEX, "architecture_args", values)
    hostile.agree(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 10**8}, "`depth` is 100000000; a network of"),
        ({"depth": 20_000}, "`depth` is 20000; a network of"),
        ({"num_classes": 10**12}, "`num_classes` is 1000000000000; a network of"),
        ({"embed_dim": -1}, "`embed_dim` is -1; a network of"),
        ({"embed_dim": "48"}, "`embed_dim` is '48'; expected an integer"),
        ({"img_size": {"a": 1}}, "`img_size` is .*; expected an integer, or two"),
        ("[1]", r"architecture_args` of .* is '\[1\]'; expected a JSON object"),
        ("[" * 5_000, "architecture_args` of .*; expected a JSON object"),
    ],
)
def test_architectures_are_refused_before_anything_is_built(tmp_path, change, message):
    folder = fresh_copy(tmp_path)
    with_args(folder, change)
    with hostile.at_most(500_000_000), pytest.raises(ZooError, match=message) as refused:
        Zoo(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [[2**40, 100]]}, "`.*groups` is .*; expected pairs of at most"),
        ({"groups": [[-1, 100]]}, "`.*groups` is .*; expected pairs of at most"),
        ({"groups": [["8", 100]]}, "`.*groups` is .*; expected a list of pairs"),
        ({"groups": [[8, 10**30]]}, "shards.json is damaged"),
        ({"rows": 1.5}, "`.*rows` is 1.5; expected an integer"),
        ({"bytes": -1}, "`.*bytes` is -1; expected an integer"),
        ({"gap": 2**62}, "shards.json is damaged"),
    ],
)
def test_numbers_of_shards_are_bounded_by_their_files(tmp_path, change, message):
    folder = fresh_copy(tmp_path)
    shards = json.loads((folder / "shards.json").read_text())
    (folder / "shards.json").write_text(json.dumps({WEIGHTS: shards[WEIGHTS] | change}))
    hostile.agree(folder)
    with hostile.at_most(500_000_000), pytest.raises(ZooError, match=message) as refused:
        next(Zoo(folder).rows()).weights  # noqa: B018
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shape", [[1.5], "ab", [-3], [2**40, 2**40], None, [[1]]])
def test_shapes_of_layouts_are_whole_numbers(tmp_path, shape):
    folder = fresh_copy(tmp_path)
    layouts = json.loads((folder / "layouts.json").read_text())
    next(iter(layouts.values()))[0]["shape"] = shape
    (folder / "layouts.json").write_text(json.dumps(layouts))
    hostile.agree(folder)
    with hostile.at_most(500_000_000), pytest.raises(ZooError, match=r"layouts\.json is damaged") as refused:
        Zoo(folder)
    assert "\n" not in str(refused.value)
