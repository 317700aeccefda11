"""Re-basin of rows and zoos, tables of barriers, and the verb."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from peak_memory import peak_mb
from vit_weights import logits_of, vit_row

from vitzoo_hf.apply.candidates import check_images
from vitzoo_hf.apply.interpolation import path_scores
from vitzoo_hf.apply.paths.paths import train_bezier
from vitzoo_hf.apply.rebasin.barriers import LADDER, Variant, pair_barriers, sample_pairs, summary
from vitzoo_hf.apply.rebasin.canonical import canonical
from vitzoo_hf.apply.rebasin.rebasin import finite_weights, matching_images, rebasin
from vitzoo_hf.apply.rebasin.rows import rebasin_zoo
from vitzoo_hf.apply.rebasin.symmetries import FAMILIES, Symmetry, apply, sizes_of
from vitzoo_hf.cli.app import run
from vitzoo_hf.format.row import Row
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo.verify import verify

CHOSEN = {"stage": "finetune", "is_final": True, "head": "mlp"}
LIMIT_MB = 4000


@pytest.fixture(scope="module")
def tuned(tiny_zoo):
    return Zoo(tiny_zoo).filter(**CHOSEN)


@pytest.mark.parametrize("by", ["weights", "activations", "both"])
@pytest.mark.parametrize("families", [FAMILIES[:3], FAMILIES], ids=["maps", "rotation"])
def test_functions_stay_to_one_part_in_100000(tuned, families, by):
    one, other = list(tuned.rows())[:2]
    images = tuned.probes(one["dataset"])[0]
    found = rebasin(one, other, families=families, by=by, images=matching_images(tuned, one["dataset"]))
    for row, vector in ((one, found.target), (other, found.aligned)):
        fresh = {**row, "weights": vector, "weights_sha256": None}
        with torch.inference_mode():
            torch.testing.assert_close(reconstruct(fresh)(images), reconstruct(row)(images), rtol=0, atol=1e-5)
    apart = (found.target.double() - found.aligned.double()).norm()
    assert found.distance == pytest.approx(float(apart), rel=1e-5)
    if "invertible" not in families:
        assert torch.equal(found.target, torch.from_numpy(one["weights"]))


@pytest.mark.parametrize("by", ["activations", "both"])
def test_a_moved_copy_is_brought_back(by):
    row = vit_row(1)
    sizes, layout = sizes_of(row)
    moved = {**row, "weights": apply(row["weights"], layout, Symmetry.random(sizes, seed=1, families=FAMILIES[:5]))}
    images = torch.randn(80, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    found = rebasin(row, moved, by=by, images=images)
    assert found.distance < 1e-3 * found.distance_before
    torch.testing.assert_close(logits_of(row, found.aligned), logits_of(row, row["weights"]), rtol=0, atol=1e-4)


def test_mistakes_of_pairs_are_told(tiny_zoo, tuned):
    one, other = list(tuned.rows())[:2]
    linear = next(Zoo(tiny_zoo).filter(stage="finetune", head="linear").rows())
    with pytest.raises(ZooError, match=r"has head linear, .* has mlp: re-basin aligns models of one architecture"):
        rebasin(one, linear)
    with pytest.raises(ZooError, match="unknown way of alignment 'weight': did you mean 'weights'"):
        rebasin(one, other, by="weight")
    with pytest.raises(ZooError, match="no images were given for alignment by both"):
        rebasin(one, other, by="both")
    with pytest.raises(ZooError, match="unknown kind of pairs 'near'"):
        sample_pairs(tuned.to_pandas(), 2, kind="near")
    with pytest.raises(ZooError, match=r"no pairs \(across\)"):
        sample_pairs(tuned.to_pandas().head(1), 2, kind="across")


def test_pairs_are_of_one_layout_and_of_the_kind_that_is_asked_for(tiny_zoo):
    table = Zoo(tiny_zoo).filter(stage="finetune", is_final=True).to_pandas()
    about = table.set_index("model_id")
    pairs = {kind: sample_pairs(table, None, kind=kind) for kind in ("any", "across", "within")}
    assert sorted(pairs["any"]) == sorted(pairs["across"] + pairs["within"])
    for kind, chosen in pairs.items():
        for first, second in chosen:
            assert about.loc[first, "layout"] == about.loc[second, "layout"]
            if kind != "any":
                assert (about.loc[first, "parent_id"] == about.loc[second, "parent_id"]) == (kind == "within")
    drawn = sample_pairs(table, 3, seed=1)
    assert drawn == sample_pairs(table, 3, seed=1)
    assert len(set(drawn)) == 3


def test_barriers_of_pairs_and_their_medians(tuned):
    pairs = sample_pairs(tuned.to_pandas(), 2)
    table = pair_barriers(tuned, pairs, LADDER[-2:], points=5, progress=False)
    assert len(table) == 2 * 3
    assert (table["barrier"] >= 0).all()
    assert table["logit_change"].max() < 1e-5
    stored = table[table["families"] == "none"]
    one, other = (tuned.row(model_id)["weights"].astype(float) for model_id in pairs[0])
    assert stored["distance"].iloc[0] == pytest.approx(np.linalg.norm(one - other))
    medians = summary(table).set_index(["families", "by"])
    assert medians.loc[("none", "none"), "change"] == 0
    last = table[(table["by"] == "both")].reset_index(drop=True)
    assert medians.loc[("+".join(FAMILIES), "both"), "barrier"] == pytest.approx(last["barrier"].median())
    change = last["barrier"] - stored["barrier"].reset_index(drop=True)
    assert medians.loc[("+".join(FAMILIES), "both"), "change"] == pytest.approx(change.median())
    assert (medians["barrier_low"] <= medians["barrier"]).all()


def test_the_interval_of_a_median_is_that_of_a_known_sample():
    names = {"accuracy_barrier": 0, "midpoint_loss": 0, "midpoint_accuracy": 0, "mode_connectivity": 0, "distance": 0}
    about = [{"model_a": str(i), "model_b": "x", "barrier": i / 100, **names} for i in range(101)]
    table = pd.concat([pd.DataFrame(about).assign(families="none", by="none")])
    (row,) = summary(table).to_dict("records")
    assert row["barrier"] == 0.5
    assert 0.38 < row["barrier_low"] < 0.44  # binomial: order statistics 41 and 61 of 101
    assert 0.56 < row["barrier_high"] < 0.62


def test_a_zoo_is_aligned_and_whole(tiny_zoo, tmp_path):
    zoo = Zoo(tiny_zoo).filter(**CHOSEN)
    reference = zoo.model_ids[0]
    folder = rebasin_zoo(zoo, reference, tmp_path / "zoo", families=FAMILIES[:4], by="both", progress=False)
    assert verify(folder, progress=False).intact
    aligned = Zoo(folder)
    assert set(aligned.model_ids) == set(zoo.model_ids)
    assert (aligned.row(reference)["weights"] == zoo.row(reference)["weights"]).all()
    images = zoo.probes("digits")[0]
    for model_id in zoo.model_ids[1:]:
        assert json.loads(aligned.row(model_id)["provenance"])["rebasin"]["reference"] == reference
        with torch.inference_mode():
            new, old = (source.model(model_id)(images) for source in (aligned, zoo))
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
    with pytest.raises(ZooError, match="the rows have 2 layouts"):
        rebasin_zoo(Zoo(tiny_zoo).filter(stage="finetune"), reference, tmp_path / "other", progress=False)


def test_the_verb(tiny_zoo, tuned, tmp_path, capsys):
    one, other = tuned.model_ids[:2]
    zoo = str(tiny_zoo)
    assert run(["rebasin", zoo, one, other, "--families", "mlp,heads", "--by", "weights", "--points", "5"]) == 0
    told = capsys.readouterr().out
    assert "mlp+heads" in told
    assert "Next:" in told
    assert run(["rebasin", zoo, one, other, "--out", str(tmp_path / "b.safetensors"), "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["table"]
    assert [record["by"] for record in records] == ["none", "both"]
    assert (tmp_path / "b.safetensors").is_file()
    assert run(["rebasin", zoo, one, other, "--out", str(tmp_path / "two"), "--quiet"]) == 0
    assert set(Zoo(tmp_path / "two").model_ids) == {one, other}
    where = ["--where", "head=mlp", "--where", "stage=finetune"]
    table = tmp_path / "pairs.csv"
    assert run(["rebasin", zoo, *where, "--pairs", "2", "--out", str(table), "--by", "weights", "--json"]) == 0
    assert len(pd.read_csv(table)) == 4
    assert (
        run(["rebasin", zoo, one, *where, "--where", "is_final=true", "--out", str(tmp_path / "all"), "--json"]) == 0
    )
    assert len(Zoo(tmp_path / "all")) == len(tuned)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "which models?"),
        (["nothing@1", "nothing@2"], "has no model 'nothing@"),
        (["--pairs", "2"], "give no model, and --out FILE.csv"),
        (["A@1"], "give --out FOLDER for the new zoo"),
        (["A@1", "B@1", "--ladder", "--out", "x"], "--ladder measures many alignments"),
        (["A@1", "B@1", "--by", "hand"], "unknown way of alignment 'hand'"),
        (
            ["A@1", "B@1", "--out", "r.csv"],
            "FOLDER without a suffix for a zoo of both models; a table is",
        ),
        (["--pairs", "-1", "--out", "x.csv"], "--pairs -1: expected a whole number of at least 1"),
        (["--pairs", "0", "--out", "x.csv"], "--pairs 0: expected"),
        (["A@1", "B@1", "--images", "-3"], "--images -3: expected"),
        (["A@1", "B@1", "--restarts", "-1"], "--restarts -1: expected"),
        (["A@1", "B@1", "--points", "2"], "--points 2: expected"),
        (["A@1", "B@1", "--seed", "-1"], "--seed -1: expected"),
        (["A@1", "B@1", "--device", "gpu"], "unknown device 'gpu'"),
        (["--pairs", "1", "--out", "/dev/null/x.csv"], "cannot write /dev/null/x.csv"),
        (["A@1", "B@1", "--out", "/dev/null/b.safetensors"], "cannot write /dev/null/b.safetensors"),
        (["A@1", "--out", "/dev/null/zoo"], "cannot write /dev/null/zoo"),
        (["A@1", "B@1", "--families", "mpl"], "unknown family of symmetries 'mpl': did you mean 'mlp'"),
    ],
)
def test_the_verb_tells_mistakes_in_one_line(tiny_zoo, capsys, arguments, told):
    assert run(["rebasin", str(tiny_zoo), *arguments]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_rows_that_do_not_fit_are_told_in_one_line(tiny_zoo, tuned, capsys):
    linear = next(Zoo(tiny_zoo).filter(stage="finetune", is_final=True, head="linear").rows())
    first = tuned.row(tuned.model_ids[0])
    assert run(["rebasin", str(tiny_zoo), linear["model_id"], first["model_id"]]) == 1
    error = capsys.readouterr().err
    assert "re-basin aligns models of one architecture and head" in error
    assert error.count("\n") == 1
    images, labels = tuned.probes(first["dataset"])
    own, foreign = (torch.from_numpy(row["weights"]) for row in (linear, first))
    with pytest.raises(ZooError, match=r"do not fit .*, whose architecture and head have"):
        path_scores(foreign, foreign, linear, images, labels)
    with pytest.raises(ZooError, match=r"do not fit .*, whose architecture and head have"):
        train_bezier(foreign, foreign, linear, images, labels, steps=1)
    with pytest.raises(ZooError, match=r"take \[N, 1, H, W\]: take the images of its dataset"):
        path_scores(own, own, linear, images.expand(-1, 3, -1, -1), labels)
    with pytest.raises(ZooError, match=f"{len(labels)} images have 2 labels: give one label an image"):
        check_images(linear, images, labels[:2])
    with pytest.raises(ZooError, match="there is no pair to measure"):
        pair_barriers(tuned, [], progress=False)
    with pytest.raises(ZooError, match="-1 pairs: expected at least 1"):
        sample_pairs(tuned.to_pandas(), -1)


def test_weights_that_are_not_finite_name_the_model(tuned):
    one, other = (dict(row) for row in list(tuned.rows())[:2])
    broken = Row(
        {**other, "weights": np.where(np.arange(len(other["weights"])) == 3, np.nan, other["weights"])}, verified=True
    )
    with pytest.raises(ZooError, match=f"{other['model_id']} has 1 weights that are not finite: name another model"):
        rebasin(one, broken, families=("mlp",))


def test_the_hint_about_layouts_makes_them_one(tmp_path):
    zoo = Zoo.sample()
    reference = "sl-s42--adamw-lr0.001-linear-s6312@20"
    some = zoo.filter(head="linear")
    with pytest.raises(ZooError, match="narrow them down by --where ") as told:
        rebasin_zoo(some, reference, tmp_path / "zoo", progress=False)
    conditions = dict(text.split("=") for text in re.findall(r"--where (\S+)", str(told.value)))
    assert "head" not in conditions
    assert len(set(some.filter(**conditions).index["layout"])) == 1
    assert reference in some.filter(**conditions).model_ids


def test_by_weights_needs_no_selection_images(tuned, monkeypatch):
    monkeypatch.setattr(
        "vitzoo_hf.apply.rebasin.barriers.matching_images", lambda *_: pytest.fail("images were read")
    )
    pairs = sample_pairs(tuned.to_pandas(), 1)
    assert len(pair_barriers(tuned, pairs, [Variant(("mlp",), "weights")], points=3, progress=False)) == 2


def test_distances_before_and_after_are_of_one_form(tuned):
    one, other = list(tuned.rows())[:2]
    plain = rebasin(one, other, families=("mlp",))
    assert plain.distance_unaligned == plain.distance_before
    found = rebasin(one, other, families=FAMILIES)
    sizes, layout = sizes_of(one)
    forms = [canonical(finite_weights(row).double(), layout, sizes, FAMILIES) for row in (one, other)]
    assert found.distance_unaligned == pytest.approx(float((forms[0] - forms[1]).norm()), rel=1e-6)
    assert found.distance <= found.distance_unaligned
    table = pair_barriers(
        tuned, [(one["model_id"], other["model_id"])], [Variant(FAMILIES, "weights")], points=3, progress=False
    )
    assert list(table["distance_unaligned"]) == pytest.approx([found.distance_before, found.distance_unaligned])


def test_aligned_models_never_replace_the_zoo_they_are_read_from(tiny_zoo, tmp_path, capsys):
    zoo = shutil.copytree(tiny_zoo, tmp_path / "zoo")
    before = (zoo / "zoo.json").read_bytes()
    one, other = Zoo(zoo).filter(**CHOSEN).model_ids[:2]
    where = [text for name, value in CHOSEN.items() for text in ("--where", f"{name}={value}".lower())]
    for arguments in ([one, other], [one, *where]):
        for source, told in ((zoo, "is the zoo that is read"), (tiny_zoo, "not of models aligned by re-basin")):
            assert run(["rebasin", str(source), *arguments, "--out", str(zoo), "--by", "weights"]) == 1
            error = capsys.readouterr().err
            assert told in error
            assert error.count("\n") == 1
    assert (zoo / "zoo.json").read_bytes() == before
    for _ in range(2):
        arguments = [one, other, "--by", "weights", "--families", "mlp", "--points", "3", "--json"]
        assert run(["rebasin", str(zoo), *arguments, "--out", str(tmp_path / "two")]) == 0
    capsys.readouterr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_aligns_as_the_cpu_does(tuned):
    one, other = list(tuned.rows())[:2]
    images = matching_images(tuned, one["dataset"])
    here, there = (rebasin(one, other, by="both", images=images, device=device) for device in ("cpu", "cuda"))
    assert there.distance == pytest.approx(here.distance, rel=1e-3)
    variants = [Variant(FAMILIES[:3], "activations")]
    pairs = [(one["model_id"], other["model_id"])]
    tables = [pair_barriers(tuned, pairs, variants, device=device, progress=False) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(tables[0]["barrier"], tables[1]["barrier"], rtol=1e-2, atol=1e-3)


PROGRAM = """
import sys
from pathlib import Path
import side_by_side
from vitzoo_hf.apply.rebasin.rows import rebasin_zoo
from vitzoo_hf.zoo import Zoo

folder = Path(sys.argv[1])
side_by_side.random_zoo(folder / "zoo", side_by_side.VIT_S, 20)
zoo = Zoo(folder / "zoo")
families = ("mlp", "heads", "maps", "residual")
rebasin_zoo(zoo, zoo.model_ids[0], folder / "out", families=families, sweeps=1, progress=False)
"""


@pytest.mark.slow
def test_twenty_large_models_are_aligned_within_4_gb(tmp_path):
    assert peak_mb(PROGRAM, tmp_path, tmp_path) < LIMIT_MB
