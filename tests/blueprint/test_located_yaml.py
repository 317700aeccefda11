from pathlib import Path

import pytest

from vitzoo_hf.blueprint.located_yaml import load_located
from vitzoo_hf.format.schema import ZooError


@pytest.fixture
def read(tmp_path: Path):
    def read(text: str | bytes):
        file = tmp_path / "zoo.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_located(file)

    return read


TEXT = """\
# a comment
name: x

stages:
  # another
  pretrain: {lr: 3e-3, seed: 42}
  finetune:
    heads: [linear,
            mlp]
"""


def test_every_value_knows_its_line(read):
    root = read(TEXT)
    assert root.get("name").line == 2
    pretrain = root.get("stages").get("pretrain")
    assert pretrain.get("lr").line == 6
    heads = root.get("stages").get("finetune").get("heads")
    assert heads.line == 8
    assert [entry.line for entry in heads.sequence()] == [8, 9]


def test_a_block_is_reported_where_its_name_stands(read):
    root = read(TEXT)
    with pytest.raises(ZooError, match=r"^zoo\.yaml, line 4: unknown key 'stages' in the blueprint: did you mean"):
        root.only("name", "stage")
    with pytest.raises(ZooError, match=r"^zoo\.yaml, line 7: finetune lacks 'epochs'$"):
        root.get("stages").get("finetune").get("epochs")


@pytest.mark.parametrize(
    ("written", "value"), [("3e-3", 0.003), ("1E5", 1e5), ("0.1", 0.1), ("2", 2.0), ("'4'", 4.0), ("-1.5e+2", -150)]
)
def test_numbers(read, written, value):
    assert read(f"a: {written}").get("a").typed(float) == value


@pytest.mark.parametrize("written", ["true", "x", "[1]", "{b: 1}", "null", ".nan", ".inf", "inf", "2001-01-01"])
def test_not_numbers(read, written):
    with pytest.raises(ZooError, match=r"zoo\.yaml, line 1: a is .*; expected a number"):
        read(f"a: {written}").get("a").typed(float)


def test_a_number_beyond_float_is_not_a_number(read):
    with pytest.raises(ZooError, match="expected a number"):
        read("a: 1" + 400 * "0").get("a").typed(float)


@pytest.mark.parametrize(
    ("kind", "written", "name"),
    [
        (int, "true", "a whole number"),
        (int, "1.0", "a whole number"),
        (int, "'1'", "a whole number"),
        (int | None, "x", "a whole number"),
        (bool, "1", "true or false"),
        (bool, "'yes'", "true or false"),
        (str, "1", "text"),
        (str, "true", "text"),
        (str, "null", "text"),
    ],
)
def test_kinds_are_not_mixed_up(read, kind, written, name):
    with pytest.raises(ZooError, match=rf"a is .*; expected {name}"):
        read(f"a: {written}").get("a").typed(kind)


def test_kinds(read):
    root = read("{i: 3, b: true, s: text, n: null}")
    assert root.get("i").typed(int) == 3
    assert root.get("i").typed(int | None) == 3
    assert root.get("b").typed(bool) is True
    assert root.get("s").typed(str | None) == "text"
    assert root.get("n").typed(int | None) is None


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x: {a: 1,\n\n a: 2}"])
def test_a_repeated_key_is_refused_where_it_is_repeated(read, text):
    with pytest.raises(ZooError, match=r"zoo\.yaml, line 3: 'a' is given twice"):
        read(text)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tx: 1", "---\na: 1\n---\nb: 2\n", "a: *unknown"])
def test_invalid_yaml_is_refused(read, text):
    with pytest.raises(ZooError, match=r"^zoo\.yaml is not valid YAML: .*line"):
        read(text)


@pytest.mark.parametrize("value", ["!foo bar", "!!python/object:os.system x", "2001-13-45", "0x_", "&a [*a]"])
def test_values_yaml_cannot_make_are_refused_with_their_line(read, value):
    with pytest.raises(ZooError, match=r"^zoo\.yaml(, line 2:| is not valid YAML)"):
        read(f"a: 1\nb: {value}\n")


@pytest.mark.parametrize("text", ["a: 1\n? [x, y]\n: 1\n", "a: 1\n? {x: y}\n: 1\n"])
def test_keys_are_plain_names(read, text):
    with pytest.raises(ZooError, match=r"zoo\.yaml, line 2: a key must be a plain name"):
        read(text)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_empty_files_are_refused(read, text):
    with pytest.raises(ZooError, match=r"^zoo\.yaml is empty; expected a blueprint"):
        read(text)


def test_unreadable_files_are_refused(tmp_path, read):
    with pytest.raises(ZooError, match=r"cannot read .*none\.yaml: No such file or directory"):
        load_located(tmp_path / "none.yaml")
    with pytest.raises(ZooError, match=r"cannot read .*: Is a directory"):
        load_located(tmp_path)
    with pytest.raises(ZooError, match=r"cannot read .*zoo\.yaml: .*utf-8"):
        read("name: ä".encode("latin-1"))


def test_shapes_are_checked(read):
    root = read("a: 1\nb: {c: 2}\n")
    with pytest.raises(ZooError, match="line 1: a must be a mapping of names to values"):
        root.get("a").get("x")
    with pytest.raises(ZooError, match="line 2: b must be a list"):
        root.get("b").sequence()
    assert "c" in root.get("b")
    assert "d" not in root.get("b")


def test_anchors_are_followed(read):
    root = read("a: &x {lr: 1}\nb: *x\n")
    assert root.get("b").get("lr").typed(int) == 1
