import json
import random
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from places import REPOSITORY, TINY

from vitzoo_hf.cli.quickstart import quickstart, summary_table
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.report.html import models_to_compare, write_zoo_report
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def finished(tiny_blueprint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    outcome = quickstart(folder, blueprint=tiny_blueprint, progress=False, say=lambda line: None)
    return folder, outcome


def test_it_leaves_a_measured_zoo_and_a_report(finished):
    folder, outcome = finished
    assert not outcome.already_done
    zoo = Zoo(folder / "zoo")
    assert len(zoo.to_pandas("evaluations")) == len(zoo) == 18
    html = (folder / "report" / "report.html").read_text()
    assert 'src="data:image/png;base64,' in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_a_second_time_finds_its_work_done(finished, tiny_blueprint):
    folder, _ = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    again = quickstart(folder, blueprint=tiny_blueprint, progress=False, say=lambda line: None)
    assert again.already_done
    after = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    assert after == before


def test_a_damaged_zoo_is_packed_again_from_its_checkpoints(finished, tiny_blueprint):
    folder, _ = finished
    hashes = list(Zoo(folder / "zoo").index["weights_sha256"])
    file = next((folder / "zoo" / "weights").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-1])
    quickstart(folder, blueprint=tiny_blueprint, progress=False, say=lambda line: None)
    assert list(Zoo(folder / "zoo").index["weights_sha256"]) == hashes


def test_a_folder_of_another_blueprint_is_refused(finished, tmp_path):
    from vitzoo_hf.blueprint.blueprint import Blueprint

    folder, _ = finished
    text = TINY.read_text().replace("lr: 0.003", "lr: 0.004")
    (tmp_path / "other.yaml").write_text(text)
    other = Blueprint.load(tmp_path / "other.yaml")
    with pytest.raises(ZooError, match="holds a run trained by another blueprint"):
        quickstart(folder, blueprint=other, progress=False, say=lambda line: None)


def test_the_table_averages_over_seeds(finished):
    folder, _ = finished
    table = summary_table(Zoo(folder / "zoo"))
    assert table["models"].sum() == 10
    assert list(table.columns[:2]) == ["stage", "dataset"]
    assert "seed" not in table.columns


def test_the_loading_script_recomputes_every_accuracy(finished):
    """With datasets, timm and torch alone; the way around a CUDA torchvision is put in front of it."""
    folder, _ = finished
    script = REPOSITORY / "loading_script" / "load_zoo.py"
    code = f"""
import sys
from vitzoo_hf.timm_import import import_timm
import_timm()
for name in [name for name in sys.modules if name.startswith("vitzoo_hf")]:
    del sys.modules[name]
sys.modules["vitzoo_hf"] = None
sys.path.insert(0, {str(script.parent)!r})
import load_zoo
sys.exit(load_zoo.main({str(folder / "zoo")!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("10 models rebuilt, 0 accuracies differ\n")


def test_the_command_prints_json(finished, capsys):
    from vitzoo_hf.cli.app import run

    folder, _ = finished
    assert run(["quickstart", "--out", str(folder), "--blueprint", str(TINY), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["already_done"] is True
    assert printed["rows"] == 18


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_in_the_same_zoo(finished, tmp_path):
    folder, _ = finished
    expected = Zoo(folder / "zoo")
    command = [sys.executable, "-m", "vitzoo_hf", "quickstart", "--out", tmp_path, "--blueprint", TINY, "--quiet"]
    moments = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(1, 15))
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    zoo = Zoo(tmp_path / "zoo")
    assert zoo.model_ids == expected.model_ids
    assert list(zoo.index["weights_sha256"]) == list(expected.index["weights_sha256"])
    assert not [file for file in tmp_path.rglob("*") if ".tmp" in file.name]


def test_blocks_are_compared_between_the_best_models_of_up_to_four_parents():
    parents = ["a@1", "a@1", "b@1", "c@1", "d@1", "e@1", None]
    accuracy = [0.5, 0.9, 0.6, 0.7, np.nan, 0.8, 0.99]
    table = pd.DataFrame({"model_id": [f"r{i}@1" for i in range(7)], "parent_id": parents, "stage": "finetune"})
    table = table.assign(is_final=True, dataset="digits", selection_accuracy=accuracy, test_accuracy=0.5)
    assert list(models_to_compare(table)["model_id"]) == ["r1@1", "r3@1", "r5@1", "r6@1"]
    unknown = table.assign(selection_accuracy=np.nan)
    assert list(models_to_compare(unknown)["model_id"]) == ["r0@1", "r2@1", "r3@1", "r4@1"]
    pretrained = table.assign(stage=["pretrain"] * 6 + ["finetune"])
    assert list(models_to_compare(pretrained)["model_id"]) == ["r6@1"]
    diverged = table.assign(test_accuracy=[0.5, np.nan, np.nan, 0.5, 0.5, 0.5, 0.5])
    assert list(models_to_compare(diverged)["model_id"]) == ["r0@1", "r3@1", "r5@1", "r6@1"]
    assert models_to_compare(table.assign(test_accuracy=np.nan)).empty
    other = table.assign(dataset=["mnist5k"] * 4 + ["digits"] * 3)
    assert list(models_to_compare(other)["model_id"]) == ["r1@1", "r2@1", "r3@1"]


def test_a_zoo_without_images_is_reported_without_layers(tmp_path, monkeypatch):
    written, said, zoo = [], [], Zoo.sample()

    def write(*tables, layers, **others):
        written.append(layers)
        return tmp_path

    monkeypatch.setattr("vitzoo_hf.report.html.write_report", write)
    write_zoo_report(zoo, tmp_path, say=said.append)
    assert said == []
    assert written[0]["model_a"].nunique() == 2
    write_zoo_report(zoo.filter(model_id=zoo.model_ids[-1]), tmp_path, say=said.append)
    assert list(written[1]["model_a"].unique()) == [zoo.model_ids[-1]]

    def carries_none(*arguments):
        raise ZooError("sample carries no test images of 'digits'")

    monkeypatch.setattr(Zoo, "probes", carries_none)
    write_zoo_report(zoo, tmp_path, say=said.append)
    assert said == ["blocks are not compared layer by layer: sample carries no test images of 'digits'"]
    assert written[2] is None
