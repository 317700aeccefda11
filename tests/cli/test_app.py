import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import call
from places import TINY
from safetensors.torch import load_file

from vitzoo_hf.cli.app import run
from vitzoo_hf.zoo import Zoo


def test_train_pack_evaluate_plot_by_hand(capsys, tmp_path, runs_copy):
    """`runs_copy` is finished, so training has nothing left to do here."""
    status, out, _ = call(capsys, "train", TINY, "--out", runs_copy)
    assert status == 0
    assert "10 runs finished" in out
    assert "Next: vitzoo pack" in out
    status, out, _ = call(capsys, "pack", TINY, runs_copy, "--out", tmp_path / "zoo", "--quiet")
    assert (status, out) == (0, f"18 rows in {tmp_path / 'zoo'}\n")
    status, out, err = call(capsys, "plot", tmp_path / "zoo", "--out", tmp_path / "report")
    assert status == 1
    assert "has no config 'evaluations'; `vitzoo evaluate` writes it" in err
    status, out, _ = call(capsys, "evaluate", tmp_path / "zoo", "--json")
    told = {"evaluations": 18, "pairs": 45, "dataset": "digits", "failed": {}, "precision_effect": {}}
    assert json.loads(out) == told
    status, out, _ = call(capsys, "plot", tmp_path / "zoo", "--out", tmp_path / "report", "--json")
    assert Path(json.loads(out)["report"]).is_file()


def test_plan_counts_and_estimates(capsys):
    status, out, _ = call(capsys, "plan", TINY, "--json")
    plan = json.loads(out)
    assert status == 0
    assert (plan["models"], plan["rows"]) == (10, 18)
    assert plan["stages"] == {"pretrain": 2, "finetune": 8}
    assert plan["seconds"] > 0
    status, out, _ = call(capsys, "plan", "mini")
    assert "50 (2 pretrain, 48 finetune)" in out


def test_plan_without_the_images_says_why_it_cannot_estimate(capsys, tmp_path):
    text = TINY.read_text().replace("{size: 8}", "{size: 8, source: folder, path: nowhere, classes: 10}")
    (tmp_path / "absent.yaml").write_text(text)
    status, out, _ = call(capsys, "plan", tmp_path / "absent.yaml")
    assert status == 0
    assert "time        unknown: images 'folder' need `path`" in out


def test_ls_filters_and_limits(capsys, tiny_zoo):
    status, out, _ = call(capsys, "ls", tiny_zoo, "--where", "head=mlp", "--where", "epoch=1..", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [row["factor_head"] for row in rows] == ["mlp"] * 4
    _, out, _ = call(capsys, "ls", tiny_zoo, "--limit", "3")
    assert "3 of 18 rows" in out
    _, out, _ = call(capsys, "ls", tiny_zoo, "--where", "factor_lr=5", "--quiet")
    assert out == "no rows\n"


def test_info_says_what_there_is(capsys, tiny_zoo):
    _, out, _ = call(capsys, "info", tiny_zoo, "--json")
    facts = json.loads(out)
    assert facts["rows"] == 18
    assert facts["factors"]["factor_regime"] == ["contrastive", "supervised"]
    assert facts["configs"] == ["weights", "index", "evaluations", "pairs", "probes"]
    _, out, _ = call(capsys, "info", tiny_zoo)
    assert "factor_optimizer: adamw, sgd" in out


def test_get_and_export_are_exact(capsys, tiny_zoo, tmp_path):
    zoo = Zoo(tiny_zoo)
    model_id = zoo.model_ids[0]
    status, _, _ = call(capsys, "get", tiny_zoo, model_id, "--out", tmp_path / "one.safetensors")
    assert status == 0
    expected = zoo.model(model_id).state_dict()
    loaded = load_file(tmp_path / "one.safetensors")
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    status, out, _ = call(
        capsys, "export", tiny_zoo, "--out", tmp_path / "many", "--where", "is_final=true", "--json"
    )
    files = [Path(file) for file in json.loads(out)]
    assert len(files) == 10
    times = [file.stat().st_mtime_ns for file in files]
    call(capsys, "export", tiny_zoo, "--out", tmp_path / "many", "--where", "is_final=true", "--quiet")
    assert [file.stat().st_mtime_ns for file in files] == times


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["lss"], 2, 'vitzoo: Unknown command "lss". Did you mean "ls"?'),
        (["ls"], 2, "requires an argument"),
        (["ls", "ZOO", "--limit", "many"], 2, "--limit"),
        (["ls", "ZOO", "--where", "factor_lr"], 1, "expected COLUMN=VALUE"),
        (["ls", "ZOO", "--where", "lr=1"], 1, "unknown column 'lr': did you mean"),
        (["ls", "ZOO", "--where", "factor_lr=fast"], 1, "'fast' is not a value of factor_lr, which is float"),
        (["ls", "ZOO", "--where", "is_final=yes"], 1, "'yes' is not a value of is_final, which is bool"),
        (["ls", "nowhere"], 1, "no zoo at 'nowhere'"),
        (["get", "ZOO", "nobody@1", "--out", "x.safetensors"], 1, "has no model 'nobody@1'"),
        (["get", "ZOO", "sl-s1@2", "--out", "x.bin"], 1, "does not end in .safetensors"),
        (["export", "ZOO", "--out", "x", "--where", "factor_lr=9"], 1, "the filter matches none"),
        (["plan", "mnii"], 1, "unknown blueprint 'mnii': did you mean 'mini'?"),
        (["plan", "nowhere.yaml"], 1, "cannot read nowhere.yaml: No such file or directory"),
        (["train", TINY, "--out", "/dev/null/runs"], 1, "cannot write into /dev/null/runs"),
        (
            ["train", TINY, "--out", "runs", "--storage", "s3://b/r"],
            1,
            "need --ray: give --ray too, or leave them out",
        ),
        (
            ["train", TINY, "--out", "runs", "--ray", "--workers", "2"],
            1,
            "--workers does not apply with --ray",
        ),
        (["train", TINY, "--out", "runs", "--ray", "auto", "--cpus-per-run", "0"], 1, "CPUs of a run are 0"),
        (["train", TINY, "--out", "runs", "--ray", "--gpus-per-run", "1.5"], 1, "GPUs of a run are 1.5"),
        (["pack", TINY, "nowhere", "--out", "zoo"], 1, "are unfinished"),
    ],
)
def test_a_mistake_is_one_line(capsys, tiny_zoo, arguments, status, message):
    arguments = [str(tiny_zoo) if argument == "ZOO" else argument for argument in arguments]
    code, out, err = call(capsys, *arguments)
    assert code == status
    assert message in err
    assert err.startswith("vitzoo: ")
    assert err.count("\n") == 1
    assert out == ""


def test_ctrl_c_is_one_line_with_the_way_on(capsys, monkeypatch, tmp_path):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["vitzoo_hf.cli.zoo"], "open_zoo", interrupted)
    monkeypatch.setattr(sys.modules["vitzoo_hf.cli.lineage"], "open_zoo", interrupted)
    monkeypatch.setattr(sys.modules["vitzoo_hf.cli.evaluate"], "open_zoo", interrupted)
    again, further = "starts again from the beginning", "continues where it was"
    for verb, told in (("ls", again), ("lineage", again), ("evaluate", further)):
        options = ["--out", tmp_path] if verb == "evaluate" else []
        assert call(capsys, verb, "sample", *options)[::2] == (
            130,
            f"\nvitzoo: interrupted; the same command {told}\n",
        )


def test_env_names_no_machine(capsys):
    import platform

    _, out, _ = call(capsys, "env", "--json")
    facts = json.loads(out)
    assert facts["torch"] == torch.__version__
    assert platform.node() not in out.split()


@pytest.mark.parametrize("arguments", [["--help"], ["quickstart", "--help"], ["ls", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"import sys; from vitzoo_hf.cli.app import run; run({arguments!r});"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'datasets', 'pandas', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_a_verb_that_fails_late_ends_with_status_1():
    command = [sys.executable, "-m", "vitzoo_hf", "get", "sample", "nope", "--out", "x.safetensors"]
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr


def test_verbs_that_read_files_know_the_sample(capsys):
    assert run(["verify", "sample", "--quiet"]) == 0
    assert "are as they were written" in capsys.readouterr().out


def test_evaluate_measures_other_images_into_tables(tiny_zoo, tmp_path, capsys):
    command = ["evaluate", str(tiny_zoo), "--corrupt", "contrast:5", "--out", str(tmp_path / "out"), "--json"]
    assert run(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["images"] for row in rows} == {"digits", "digits, contrast 5"}
    assert (tmp_path / "out" / "images.csv").read_text().count("\n") == len(rows) + 1
    assert run(command) == 0, "it continues from what it kept"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corrupt", "contrast"], "give --out FOLDER"),
        (["--where", "stage=finetune"], "give --out FOLDER"),
        (["--corrupt", "contrats", "--out", "x"], "unknown corruption 'contrats': did you mean 'contrast'?"),
        (["--data", "digist", "--out", "x"], "unknown image source 'digist'"),
        (["--precision", "float8"], "unknown precision 'float8'"),
    ],
)
def test_mistakes_of_evaluate_are_one_line(tiny_zoo, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", str(tiny_zoo), *options]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("vitzoo: ") == 1


def test_evaluate_says_how_models_run(tiny_zoo, tmp_path, capsys):
    assert run(["evaluate", str(tiny_zoo), "--out", str(tmp_path), "--verbose", "--quiet"]) == 0
    assert "tiles of" in capsys.readouterr().out
