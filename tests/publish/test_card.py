"""Cards: every number is counted again from the Parquet files, every block of Python is run."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import card_rules as rules
import datasets
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from places import GOLDEN, REPOSITORY, SAMPLE

from vitzoo_hf.format import schema
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.format.shards import write_parquet
from vitzoo_hf.publish import card_sections
from vitzoo_hf.publish.card import card_text, template


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "zoo.json").read_text(encoding="utf-8"))


def card_of(folder: Path, **options) -> str:
    return card_text(folder, manifest_of(folder), **options)


@pytest.fixture(params=["tiny", "sample", "golden"])
def any_zoo(request, tiny_zoo):
    return {"tiny": tiny_zoo, "sample": SAMPLE, "golden": GOLDEN}[request.param]


def test_cards_are_complete_and_their_numbers_are_those_of_the_files(any_zoo):
    text = card_of(any_zoo)
    rules.check_complete(text)
    rules.check_numbers(text, any_zoo)


def test_a_packed_zoo_carries_this_card(tiny_zoo):
    assert (tiny_zoo / "README.md").read_text(encoding="utf-8") == card_of(tiny_zoo)


def test_the_example_is_the_card_of_the_sample():
    example = (REPOSITORY / "cards" / "example.md").read_text(encoding="utf-8")
    assert example == card_of(SAMPLE, repository="ModelZoos/vit-zoo-mini"), (
        "write it again: python examples/make_card.py cards/example.md"
    )


def test_every_field_of_the_template_is_filled(any_zoo, monkeypatch):
    expected = card_of(any_zoo)
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))
    assert card_of(any_zoo) == expected


def test_evaluations_and_pairs_are_summarised(tiny_zoo):
    results = rules.section(card_of(tiny_zoo), "Results")
    _, measured, pairs = rules.tables(results)
    held = [
        row
        for file in (tiny_zoo / "evaluations").glob("*.parquet")
        for row in pq.read_table(file).to_pylist()
        if row["test_ece"] is not None
    ]
    (ece,) = [row for row in measured if row["metric"] == "`test_ece`"]
    assert rules.count(ece["models"]) == len(held)
    assert float(ece["mean"]) == pytest.approx(np.mean([row["test_ece"] for row in held]), abs=6e-5)
    table = pq.read_table(next((tiny_zoo / "pairs").glob("*.parquet"))).to_pylist()
    siblings = [row["cka"] for row in table if row["same_parent"]]
    (cka,) = [row for row in pairs if row["metric"] == "`cka`" and row["pairs"].startswith("siblings")]
    assert rules.count(cka["pairs measured"]) == len(siblings)
    assert float(cka["lowest"]) == pytest.approx(min(siblings), abs=6e-5)
    assert f"{len(table)} pairs" in results


def test_python_of_a_card_runs(tiny_zoo, monkeypatch):
    run_python(card_of(tiny_zoo, repository="ORG/tiny"), tiny_zoo, monkeypatch)


def run_python(text: str, folder: Path, monkeypatch) -> dict:
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        here = block.replace("hf://datasets/ORG/tiny", str(folder)).replace("ORG/tiny", str(folder))
        exec(compile(here, "card", "exec"), names)
    return names


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_python_of_a_card_decodes_bytes(tiny_zoo, tmp_path, monkeypatch, dtype):
    """The index is the default here, so the other branches of the examples run."""
    from vitzoo_hf.format.encoding import rounded

    folder = tmp_path / "zoo"
    shutil.copytree(tiny_zoo, folder, ignore=shutil.ignore_patterns("weights", "index", "evaluations", "pairs"))
    manifest = manifest_of(tiny_zoo) | {"default_config": "index"}
    rows = [row for file in sorted(tiny_zoo.glob("weights/*")) for row in pq.read_table(file).to_pylist()]
    for row in rows:
        vector = rounded(np.array(row["weights"], np.float32), dtype)
        row |= {"weights": vector, "dtype": dtype, "weights_sha256": schema.weights_sha256(vector)}
    features = {kind: schema.row_features(manifest["factors"], weights=kind) for kind in ("binary", None)}
    write_parquet(
        folder / "weights" / "train-00000-of-00001.parquet", features["binary"], [[row] for row in rows], {}
    )
    write_parquet(folder / "index" / "train-00000-of-00001.parquet", features[None], [rows], {})
    (folder / "shards.json").unlink()
    text = card_text(folder, manifest, repository="ORG/tiny")
    (folder / "README.md").write_text(text, encoding="utf-8")
    rules.check_complete(text)
    assert '`load_dataset("ORG/tiny", "weights")` gives whole rows' in text
    assert "cut trailing zero bytes" in text
    assert ("were rounded to" in text) == (dtype != "float32")
    files = {f"{kind}/train-00000-of-00001.parquet" for kind in ("weights", "index")}
    manifest["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
        for name in sorted({file.relative_to(folder).as_posix() for file in folder.glob("*/*.parquet")} | files)
    }
    (folder / "zoo.json").write_text(json.dumps(manifest))
    names = run_python(text, folder, monkeypatch)
    assert "weights" not in names["first"].column_names
    assert next(iter(names["rows"]))["dtype"] == dtype


def digest(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("default", [None, "weights", "index", "evaluations"])
def test_load_dataset_opens_the_declared_config(zoo_copy, default):
    text = card_of(zoo_copy, default=default)
    (zoo_copy / "README.md").write_text(text, encoding="utf-8")
    declared = [entry["config_name"] for entry in rules.header_of(text)["configs"] if entry.get("default")]
    assert declared == [default or "weights"]
    opened = datasets.load_dataset(str(zoo_copy), split="train")
    assert opened.config_name == declared[0]
    assert ("weights" in opened.column_names) == (declared[0] == "weights")
    assert f"`{declared[0]}` (default)" in text
    for entry in rules.header_of(text)["configs"]:
        for part in entry["data_files"]:
            assert part["path"] == f"{entry['config_name']}/{part['split']}-*.parquet"


def rewrite(folder: Path, change) -> None:
    """Replace index and weights by what `change` makes of each: split -> table."""
    for config in ("index", "weights"):
        files = sorted((folder / config).glob("*.parquet"))
        table = pa.concat_tables([pq.read_table(file) for file in files])
        for file in files:
            file.unlink()
        for split, part in change(table).items():
            pq.write_table(part, folder / config / f"{split}-00000-of-00001.parquet")
    (folder / "shards.json").unlink()


def with_epoch(table: pa.Table, epoch: int) -> pa.Table:
    place = table.schema.get_field_index("epoch")
    return table.set_column(place, table.schema.field(place), pa.array([epoch] * len(table), pa.int32()))


def test_two_folders_of_one_name_are_not_confused_by_the_cache(tiny_zoo, tmp_path):
    """`datasets` knows a local folder by its name and header alone."""
    held, sizes = [], []
    for number, place in enumerate(("a", "b")):
        folder = Path(shutil.copytree(tiny_zoo, tmp_path / place / "zoo"))
        rewrite(folder, lambda table, kept=number: {"train": with_epoch(table, 7 + kept)})
        (folder / "README.md").write_text(card_of(folder), encoding="utf-8")
        held.append(datasets.load_dataset(str(folder), "index", split="train")["epoch"][0])
        sizes.append((folder / "index" / "train-00000-of-00001.parquet").stat().st_size)
    assert (held, sizes[0]) == ([7, 8], sizes[1])


HOSTILE = (
    "x: y\n---\nconfigs: []\n# \"'{{ 7 * 7 }}{% raw %}`|````</details><script>alert(1)</script>"
    "\r\n- a: [b]: &c *d !e\u2028\x85\x00"
)


def test_names_of_people_cannot_break_out(zoo_copy):
    manifest = manifest_of(zoo_copy)
    record = next(iter(manifest["images"].values()))
    manifest |= {
        "name": HOSTILE,
        "licence": HOSTILE,
        "images": {HOSTILE: record | {"licence": HOSTILE, "source": HOSTILE}},
        "missing_runs": {HOSTILE: HOSTILE},
        "refused": {HOSTILE: HOSTILE},
        "notes": [HOSTILE],
    }
    (zoo_copy / "blueprint.yaml").write_text("name: |\n```\n<script>\n````\n")
    text = card_text(zoo_copy, manifest)
    header, expected = rules.header_of(text), rules.header_of(card_of(zoo_copy))
    assert header["configs"] == expected["configs"]
    assert set(header) == set(expected) | {"license_name"}
    assert header["license"] == "other"
    assert re.fullmatch(r"[a-z0-9.-]+", header["license_name"])
    assert "\n" not in header["pretty_name"]
    assert header["pretty_name"].startswith("x: y --- configs: [] #")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == rules.SECTIONS
    assert text.count("\n---\n") == 1
    assert "49" not in rules.section(text, "Licence")
    body = text.split("\n---\n")[1]
    assert rules.markup(body) == rules.markup(card_of(zoo_copy).split("\n---\n")[1])
    assert re.search(r'load_dataset\("ORG/[\w-]+"', text)
    (zoo_copy / "README.md").write_text(text, encoding="utf-8")
    assert datasets.load_dataset(str(zoo_copy), split="train").config_name == "weights"


def test_traps_are_told(zoo_copy):
    manifest = manifest_of(zoo_copy) | {
        "missing_runs": {f"run-{i}": "diverged in epoch 3" for i in range(25)},
        "refused": {"a/b.pt": "not a state dict"},
        "notes": ["The source calls epochs checkpoints.", "Labels were smoothed."],
    }
    told = rules.section(card_text(zoo_copy, manifest), "Limits and known traps")
    assert "25 runs of the blueprint are missing: `run-0` (diverged in epoch 3); " in told
    assert "and 5 more, in `zoo.json`" in told
    assert "`run-20`" not in told
    assert "1 checkpoints of the source were refused: `a/b.pt` (not a state dict)." in told
    assert "- The source calls epochs checkpoints.\n- Labels were smoothed.\n" in told
    index = [row for file in zoo_copy.glob("index/*") for row in pq.read_table(file).to_pylist()]
    nulls = sum(row["test_accuracy"] is None for row in index)
    assert f"`test_accuracy` is null in {nulls} of {len(index)} rows" in told


def test_splits_say_what_they_keep_together(zoo_copy):
    def splits_text() -> str:
        return rules.section(card_of(zoo_copy), "Splits")

    assert "Each of the 10 runs is in one of them." in splits_text()
    runs = sorted(set(pq.read_table(next(zoo_copy.glob("index/*")))["run_id"].to_pylist()))
    rewrite(
        zoo_copy,
        lambda table: {
            "train": table.filter(pc.is_in(table["run_id"], pa.array(runs[::2]))),
            "test": table.filter(pc.is_in(table["run_id"], pa.array(runs[1::2]))),
        },
    )
    assert "The children of 2 parents are in more than one split" in splits_text()
    rewritten = card_of(zoo_copy)
    rules.check_complete(rewritten)
    rules.check_numbers(rewritten, zoo_copy)
    (zoo_copy / "shards.json").write_text("{}")
    rewrite(zoo_copy, lambda table: {"train": table.slice(0, 2), "test": table.slice(2)})
    assert re.search(r"\b[12] runs have rows in two splits\.", splits_text())


def test_a_converted_zoo_without_recipes_has_a_card(zoo_copy):
    manifest = manifest_of(zoo_copy) | {"images": {"cifar100": {}}, "factors": {}, "splits": {}}
    for file in [*zoo_copy.glob("index/*")]:
        table = pq.read_table(file)
        for name in ("provenance", "test_accuracy"):
            place = table.schema.get_field_index(name)
            values = [None if name == "test_accuracy" else '{"source":"a.pt","flags":[]}'] * len(table)
            kind = table.schema.field(name)
            table = table.set_column(place, kind, pa.array(values, kind.type))
        pq.write_table(table, file)
    for config in ("evaluations", "pairs", "probes"):
        shutil.rmtree(zoo_copy / config)
    (zoo_copy / "blueprint.yaml").write_text("")
    text = card_text(zoo_copy, manifest)
    rules.check_complete(text)
    for sentence in (
        "No run has a recorded test accuracy.",
        "converted from another source",
        "are not recorded",
        "No generating factor is recorded.",
        "How splits were drawn is not recorded.",
        "Images of `cifar100`: not recorded, see their source.",
    ):
        assert sentence in text


def test_a_card_needs_neither_manifest_nor_old_card_nor_shards(zoo_copy):
    manifest, expected = manifest_of(zoo_copy), card_of(zoo_copy)
    for name in ("zoo.json", "README.md"):
        (zoo_copy / name).unlink()
    assert card_text(zoo_copy, manifest) == expected
    for file in (zoo_copy / "weights").glob("*.parquet"):
        file.unlink()
    assert card_text(zoo_copy, manifest) == expected


def test_weights_are_never_read(zoo_copy):
    expected = card_of(zoo_copy)
    for file in (zoo_copy / "weights").glob("*.parquet"):
        whole = bytearray(file.read_bytes())
        column = pq.read_metadata(file).row_group(0).column(pq.read_metadata(file).num_columns - 1)
        start = column.data_page_offset
        whole[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
        file.write_bytes(whole)
    assert card_of(zoo_copy) == expected


def test_what_cannot_be_counted_is_refused(zoo_copy, tmp_path):
    with pytest.raises(ZooError, match="is no dataset id: expected ORG/NAME"):
        card_of(zoo_copy, repository='x"/y')
    with pytest.raises(ZooError, match="the default config 'wieghts' is not in the zoo: did you mean 'weights'"):
        card_of(zoo_copy, default="wieghts")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match=r"no card can be written for .*empty: `weights` has rows"):
        card_text(tmp_path / "empty", manifest_of(zoo_copy))
    file = next((zoo_copy / "index").glob("train-*"))
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(ZooError, match=r"`weights` has rows .*, `index` .*; pack the zoo again"):
        card_of(zoo_copy)
    file.write_bytes(b"PAR1")
    with pytest.raises(ZooError, match=r"no card can be written for .*; pack the zoo again"):
        card_of(zoo_copy)


def test_every_column_is_explained():
    for name in schema.row_features({}, weights="list"):
        assert name in card_sections.MEANINGS
    assert set(schema.CONFIGS) == set(card_sections.CONFIG_MEANINGS)


def test_the_citation_is_that_of_the_software():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    cite = rules.section(card_of(SAMPLE), "Cite")
    assert cited["title"] in cite
    assert f'version = "{cited["version"]}"' in cite
    (paper,) = cited["references"]
    assert paper["title"] in cite
    assert paper["url"] in cite
    plain = cite.replace('{\\"u}', "ü")
    assert all(author["family-names"] in plain for author in paper["authors"])


def test_every_package_and_the_template_are_installed(tmp_path):
    """Builds the wheel and writes a card from it, away from the checkout."""
    source = tmp_path / "source"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, source)
    for name in ("vitzoo_hf", "cards"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    modules = {file.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / "vitzoo_hf").rglob("*.py")}
    assert modules <= held
    assert "vitzoo_hf/cards/zoo_card.md.jinja" in held
    assert not [name for name in held if name.startswith(("cards/", "vitzoo_hf/cards/example"))]
    script = "import vitzoo_hf.publish.card as card; print(card.__file__); print(card.template())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert output.startswith(str(tmp_path / "installed"))
    assert output.strip().endswith(template().strip())


def test_tables_measured_by_an_earlier_version_have_a_card_too(zoo_copy):
    for config, columns in (("pairs", ["cohen_kappa", "jensen_shannon"]), ("evaluations", ["test_brier"])):
        for file in (zoo_copy / config).glob("*.parquet"):
            pq.write_table(pq.read_table(file).drop_columns(columns), file)
    card = card_text(zoo_copy, json.loads((zoo_copy / "zoo.json").read_text()))
    assert "`agreement`" in card
    assert "`jensen_shannon`" not in card
