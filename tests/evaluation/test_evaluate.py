import itertools
import os
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from ray_processes import workers_at_a_task
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, cohen_kappa_score, log_loss, top_k_accuracy_score

import vitzoo_hf as vz
from vitzoo_hf.convert.convert import convert
from vitzoo_hf.convert.sources.checkpoints import plan_checkpoints
from vitzoo_hf.evaluation import evaluate as evaluate_module
from vitzoo_hf.evaluation.evaluate import evaluate_on, is_classifier, layer_similarity
from vitzoo_hf.evaluation.image_sets import image_sets
from vitzoo_hf.evaluation.outputs_cache import OutputsCache
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models import vit
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo):
    return Zoo(tiny_zoo)


@pytest.fixture(scope="module")
def report(zoo):
    return vz.evaluate(zoo, progress=False)


@pytest.fixture(scope="module")
def probabilities(zoo):
    """Softmax outputs of each classifier on selection and test, one model at a time, in float64."""
    found = {}
    for row in zoo.rows():
        if row["test_accuracy"] is not None:
            for role in ("selection", "test"):
                with torch.inference_mode():
                    logits = zoo.model(row["model_id"])(zoo.probes("digits", role)[0])
                found[row["model_id"], role] = logits.double().softmax(1).numpy()
    return found


def test_model_metrics_agree_with_scikit_learn(zoo, report, probabilities):
    measured = report.evaluations.set_index("model_id")
    for (model_id, role), probability in probabilities.items():
        labels = zoo.probes("digits", role)[1].numpy()
        assert measured.loc[model_id, f"{role}_accuracy"] == accuracy_score(labels, probability.argmax(1))
        expected = log_loss(labels, probability, labels=range(10))
        assert measured.loc[model_id, f"{role}_loss"] == pytest.approx(expected, abs=1e-6)


def test_calibration_agrees_with_an_independent_sum(zoo, report, probabilities):
    labels = zoo.probes("digits")[1].numpy()
    measured = report.evaluations.set_index("model_id")
    for (model_id, role), probability in probabilities.items():
        if role == "test":
            confidence, right = probability.max(1), probability.argmax(1) == labels
            bins = np.ceil(confidence * 15).astype(int)
            error = sum(abs((right[bins == b] * 1.0 - confidence[bins == b]).sum()) for b in range(16)) / len(labels)
            assert measured.loc[model_id, "test_ece"] == pytest.approx(error, abs=1e-5)


def test_recomputed_metrics_are_those_training_recorded(zoo, report):
    index = zoo.to_pandas()
    recorded = index["test_accuracy"].astype(np.float32)
    assert (recorded.isna() == report.evaluations["test_accuracy"].isna()).all()
    both = recorded.notna()
    assert (recorded[both] == report.evaluations["test_accuracy"][both].astype(np.float32)).all()


def test_a_contrastive_model_has_no_accuracy_but_its_children_have(zoo, report):
    contrastive = [row for row in zoo.rows() if not is_classifier(row, zoo.manifest)]
    assert {row["run_id"] for row in contrastive} == {"cl-s1"}
    assert report.evaluations.set_index("model_id").loc["cl-s1@2"]["test_accuracy":"test_ece"].isna().all()


def test_pair_metrics_agree_with_one_pair_at_a_time(zoo, report, probabilities):
    final = zoo.filter(is_final=True)
    pairs = {(row["model_a"], row["model_b"]): row for _, row in report.pairs.iterrows()}
    assert list(pairs) == list(itertools.combinations(final.model_ids, 2))
    images = zoo.probes("digits")[0]
    features = {}
    trunks = {}
    for model_id in final.model_ids:
        model = zoo.model(model_id)
        with torch.inference_mode():
            features[model_id] = model.forward_features(images)[:, 0].double().numpy()
        trunks[model_id] = np.concatenate(
            [value.double().numpy().ravel() for name, value in model.state_dict().items() if "head." not in name]
        )
    for (a, b), row in pairs.items():
        x, y = (features[name] - features[name].mean(0) for name in (a, b))
        biased = (x.T @ y).__pow__(2).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
        assert row["cka_biased"] == pytest.approx(biased, abs=1e-5)
        assert row["cka"] <= row["cka_biased"] + 1e-3
        assert row["weight_l2"] == pytest.approx(np.linalg.norm(trunks[a] - trunks[b]), rel=1e-5)
        cosine = trunks[a] @ trunks[b] / np.linalg.norm(trunks[a]) / np.linalg.norm(trunks[b])
        assert row["weight_cosine"] == pytest.approx(cosine, abs=1e-6)
        if (a, "test") in probabilities and (b, "test") in probabilities:
            same = probabilities[a, "test"].argmax(1) == probabilities[b, "test"].argmax(1)
            assert row["agreement"] == same.mean()
        else:
            assert np.isnan(row["agreement"])


def test_written_configs_load_with_plain_datasets(tiny_zoo, report):
    evaluations = datasets.concatenate_datasets(list(datasets.load_dataset(str(tiny_zoo), "evaluations").values()))
    assert sorted(evaluations["model_id"]) == sorted(report.evaluations["model_id"])
    pairs = datasets.load_dataset(str(tiny_zoo), "pairs", split="full")
    assert len(pairs) == 45
    assert pairs[0]["agreement"] is None
    assert datasets.load_dataset(str(tiny_zoo), split="train").features["weights"]


def test_writing_again_changes_nothing(zoo_copy, zoo):
    before = {file: file.read_bytes() for file in zoo_copy.rglob("*") if file.is_file()}
    vz.evaluate(Zoo(zoo_copy), progress=False).write(zoo_copy)
    assert {file: file.read_bytes() for file in zoo_copy.rglob("*") if file.is_file()} == before


def test_a_partial_report_is_not_written(zoo_copy):
    partial = vz.evaluate(Zoo(zoo_copy).filter(head="mlp"), progress=False)
    with pytest.raises(ZooError, match="does not hold the models of this report"):
        partial.write(zoo_copy)


def test_matrix_is_symmetric_with_its_diagonal(report):
    matrix = report.matrix("cka")
    assert (matrix.to_numpy() == matrix.to_numpy().T).all()
    assert (matrix.to_numpy().diagonal() == 1).all()
    assert (report.matrix("weight_l2").to_numpy().diagonal() == 0).all()
    with pytest.raises(ZooError, match=r"unknown pair metric 'ckaa': did you mean 'cka'\?"):
        report.matrix("ckaa")


def test_images_of_ones_own(zoo):
    images, labels = zoo.probes("digits", "selection")
    chosen = zoo.filter(stage="finetune")
    own = vz.evaluate(chosen, images, labels, progress=False)
    default = vz.evaluate(chosen, progress=False)
    assert list(own.evaluations["test_accuracy"]) == list(default.evaluations["selection_accuracy"])
    with pytest.raises(ZooError, match="give images and labels, or neither"):
        vz.evaluate(zoo, images)


def test_an_empty_selection_is_refused(zoo):
    with pytest.raises(ZooError, match="there is no model to evaluate"):
        vz.evaluate(zoo.filter(factor_lr=7.0))


@pytest.mark.parametrize("step", ["swap", "_finish"])
def test_a_zoo_opens_wherever_writing_its_evaluation_was_cut(zoo_copy, monkeypatch, step):
    from vitzoo_hf.publish import folder as zoo_folder

    def killed(*arguments):
        raise KeyboardInterrupt

    report = vz.evaluate(Zoo(zoo_copy), progress=False)
    monkeypatch.setattr(zoo_folder, step, killed)
    with pytest.raises(KeyboardInterrupt):
        report.write(zoo_copy)
    monkeypatch.undo()
    assert len([row.weights for row in Zoo(zoo_copy).rows()]) == 18
    report.write(zoo_copy)
    assert len(Zoo(zoo_copy).to_pandas("evaluations")) == len(report.evaluations)


def test_more_metrics_agree_with_scikit_learn(zoo, report, probabilities):
    measured = report.evaluations.set_index("model_id")
    labels = zoo.probes("digits")[1].numpy()
    for (model_id, role), probability in probabilities.items():
        if role == "test":
            row = measured.loc[model_id]
            expected = top_k_accuracy_score(labels, probability, k=5, labels=range(10))
            assert row["test_top5_accuracy"] == pytest.approx(expected)
            assert row["test_brier"] == pytest.approx(
                ((probability - np.eye(10)[labels]) ** 2).sum(1).mean(), abs=1e-6
            )
            assert row["test_entropy"] == pytest.approx(entropy(probability, axis=1).mean(), abs=1e-6)


def test_more_pair_metrics_agree_with_one_pair_at_a_time(zoo, report, probabilities):
    labels = zoo.probes("digits")[1].numpy()
    for _, row in report.pairs.iterrows():
        a, b = ((row[name], "test") for name in ("model_a", "model_b"))
        names = ["cohen_kappa", "error_consistency", "error_overlap", "jensen_shannon"]
        if a not in probabilities or b not in probabilities:
            assert row[names].isna().all()
            continue
        x, y = probabilities[a].argmax(1), probabilities[b].argmax(1)
        assert row["cohen_kappa"] == pytest.approx(cohen_kappa_score(x, y))
        wrong = np.stack([x != labels, y != labels])
        assert row["error_overlap"] == pytest.approx(wrong.all(0).sum() / wrong.any(0).sum())
        divergence = jensenshannon(probabilities[a], probabilities[b], axis=1) ** 2
        assert row["jensen_shannon"] == pytest.approx(divergence.mean(), abs=1e-6)


def test_models_that_were_measured_are_not_run_again(zoo, report, tmp_path, monkeypatch):
    first = vz.evaluate(zoo, cache=tmp_path, progress=False)
    monkeypatch.setattr("vitzoo_hf.evaluation.forward.Population", None)
    second = vz.evaluate(zoo, cache=tmp_path, progress=False)
    for one in (first, second):
        pd.testing.assert_frame_equal(one.evaluations, report.evaluations)
        pd.testing.assert_frame_equal(one.pairs, report.pairs)


def test_an_interrupted_evaluation_goes_on_with_the_next_model(zoo, report, tmp_path, monkeypatch):
    real, written = OutputsCache.write, []

    def interrupted(self, row, digest, parts):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append((row["model_id"], digest))
        real(self, row, digest, parts)

    monkeypatch.setattr(OutputsCache, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vz.evaluate(zoo, cache=tmp_path, progress=False)
    before = set(written)
    written.clear()
    monkeypatch.setattr(
        OutputsCache, "write", lambda *given: (written.append((given[1]["model_id"], given[2])), real(*given))
    )
    again = vz.evaluate(zoo, cache=tmp_path, progress=False)
    assert not before & set(written)
    pd.testing.assert_frame_equal(again.pairs, report.pairs)


def test_a_model_with_nan_among_its_outputs_is_named_and_the_rest_goes_on(zoo, report, tmp_path, monkeypatch):
    real = OutputsCache.write
    bad = next(row["model_id"] for row in zoo.rows() if row["is_final"] and row["stage"] == "finetune")

    def diverged(self, row, digest, parts):
        if row["model_id"] == bad:
            parts = parts | {
                "logits": np.where(np.arange(len(parts["logits"]))[:, None] == 1, np.nan, parts["logits"])
            }
        real(self, row, digest, parts)

    monkeypatch.setattr(OutputsCache, "write", diverged)
    found = vz.evaluate(zoo, progress=False)
    assert list(found.failed) == [bad]
    assert "NaN" in found.failed[bad]
    table = found.evaluations.set_index("model_id")
    assert pd.isna(table.loc[bad, "test_accuracy"])
    assert (
        table.drop(bad)["test_accuracy"].dropna()
        == report.evaluations.set_index("model_id").drop(bad)["test_accuracy"].dropna()
    ).all()
    hit = (found.pairs["model_a"] == bad) | (found.pairs["model_b"] == bad)
    assert found.pairs.loc[hit, "agreement"].isna().all()
    assert found.pairs.loc[hit, "weight_l2"].notna().all()


def test_a_lower_precision_tells_its_effect(zoo, report):
    found = vz.evaluate(zoo.filter(stage="finetune"), precision="bfloat16", progress=False)
    assert 0.9 < found.precision_effect["agreement"] <= 1
    assert report.precision_effect == {}


def test_models_of_different_trunks_have_no_distance_and_the_rest_is_measured(tmp_path):
    args = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    (tmp_path / "in").mkdir()
    for depth in (1, 2):
        for seed in (0, 1):
            state = vit.create("vit_tiny_patch16_224", args | {"depth": depth}, seed=seed).state_dict()
            torch.save(state, tmp_path / "in" / f"d{depth}s{seed}.pt")
    given = {"architecture": "vit_tiny_patch16_224", "architecture_args": {"num_heads": 2}}
    convert(plan_checkpoints(tmp_path / "in", **given), tmp_path / "zoo", progress=False)
    found = vz.evaluate(Zoo(tmp_path / "zoo"), torch.randn(9, 1, 8, 8), torch.arange(9) % 3, progress=False)
    same = found.pairs["model_a"].str[:2] == found.pairs["model_b"].str[:2]
    assert (found.pairs["weight_l2"].notna() == same).all()
    assert found.pairs["cka"].notna().all()


def test_layers_are_compared_with_every_other(zoo):
    chosen = zoo.filter(stage="pretrain")
    images = zoo.probes("digits")[0]
    table = layer_similarity(chosen, images)
    pivot = table.pivot(index=["model_a", "block_a"], columns=["model_b", "block_b"], values="cka")
    matrix = pivot.sort_index().sort_index(axis=1).to_numpy()
    assert np.allclose(matrix, matrix.T)
    assert np.allclose(matrix.diagonal(), 1)


def test_clean_images_give_the_same_as_the_evaluation(zoo, report):
    table = evaluate_on(zoo, image_sets(zoo, "digits", corruptions=["gaussian_noise:5"]), progress=False)
    clean = table[table["images"] == "digits"].set_index("model_id")
    both = report.evaluations.set_index("model_id").loc[clean.index]
    assert np.allclose(clean["accuracy"], both["test_accuracy"], atol=0.003)
    assert np.allclose(clean["loss"], both["test_loss"], atol=1e-4)
    assert set(table["images"]) == {"digits", "digits, gaussian_noise 5"}


@pytest.mark.slow
def test_ray_gives_the_same_also_where_a_worker_is_killed(zoo, report, tmp_path):
    pytest.importorskip("ray")
    code = f"""
import pandas as pd
import vitzoo_hf as vz
from vitzoo_hf.evaluation.evaluate import evaluate

if __name__ == "__main__":
    found = evaluate(vz.Zoo({str(zoo.name)!r}), ray="local", progress=False, cache={str(tmp_path / "cache")!r})
    found.pairs.to_pickle({str(tmp_path / "pairs")!r})
    found.evaluations.to_pickle({str(tmp_path / "evaluations")!r})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    killed = False
    while process.poll() is None:
        busy = [] if killed else workers_at_a_task(process.pid, "_task")
        if busy:
            os.kill(busy[0], signal.SIGKILL)
            killed = True
        time.sleep(0.01)
    assert process.returncode == 0, process.stderr.read()
    process.stderr.close()
    assert killed
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / "pairs"), report.pairs, rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / "evaluations"), report.evaluations, rtol=1e-4, atol=1e-5)


def test_an_address_without_a_cluster_is_one_line(zoo):
    pytest.importorskip("ray")
    code = f"import vitzoo_hf as vz; vz.evaluate(vz.Zoo({str(zoo.name)!r}), ray='127.0.0.1:1', progress=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ZooError: no Ray cluster at '127.0.0.1:1'" in done.stderr


def test_a_diverged_model_is_named_and_the_rest_is_compared(tmp_path):
    args = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 3,
    }
    (tmp_path / "in").mkdir()
    for seed in range(4):
        model = vit.create("vit_tiny_patch16_224", args, seed=seed)
        model.blocks[0].mlp.fc2.weight.data *= 1e38 if seed == 2 else 1
        torch.save(model.state_dict(), tmp_path / "in" / f"m{seed}.pt")
    given = {"architecture": "vit_tiny_patch16_224", "architecture_args": {"num_heads": 2}}
    convert(plan_checkpoints(tmp_path / "in", **given), tmp_path / "zoo", progress=False)
    found = vz.evaluate(Zoo(tmp_path / "zoo"), torch.randn(9, 1, 8, 8), torch.arange(9) % 3, progress=False)
    assert list(found.failed) == ["m2@1"]
    hit = (found.pairs["model_a"] == "m2@1") | (found.pairs["model_b"] == "m2@1")
    for name in ("cka", "agreement"):
        assert (found.pairs[name].isna() == hit).all()
    assert found.pairs["weight_l2"].notna().all()
    assert (found.evaluations.set_index("model_id")["test_accuracy"].isna() == [False, False, True, False]).all()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.randn(4, 1, 8, 8), torch.arange(5), r"labels are int64 \[5\]; expected a tensor of 4 integers"),
        (torch.randn(4, 1, 8, 8), torch.rand(4), "expected a tensor of 4 integers"),
        (torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 10]), "labels go up to 10, but .* knows 10 classes"),
        (torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, -1]), "integers from 0"),
        (torch.full((4, 1, 8, 8), float("nan")), torch.arange(4), "NaN or infinite values among the images"),
        (torch.randn(4, 8, 8), torch.arange(4), r"expected a float32 tensor \[N, C, H, W\]"),
    ],
)
def test_wrong_images_and_labels_are_refused_before_anything_runs(zoo, monkeypatch, images, labels, message):
    from vitzoo_hf.evaluation.outputs_cache import ImageBatch

    monkeypatch.setattr("vitzoo_hf.evaluation.forward.Population", None)
    with pytest.raises(Exception, match=rf"{message}|Type-check"):
        vz.evaluate(zoo.filter(stage="finetune"), images, labels, progress=False)
    if "knows" not in message and images.ndim == 4 and labels.dtype == torch.int64 and len(labels) == 4:
        with pytest.raises(ZooError, match=message):
            ImageBatch.of(images, labels)


def test_a_shard_damaged_after_its_models_were_measured_is_still_refused(zoo_copy, tmp_path):
    vz.evaluate(Zoo(zoo_copy), cache=tmp_path / "cache", progress=False)
    shard = next((zoo_copy / "weights").glob("*.parquet"))
    held = bytearray(shard.read_bytes())
    held[len(held) // 2] ^= 1
    shard.write_bytes(held)
    with pytest.raises(ZooError, match=r"damaged|do not match"):
        vz.evaluate(Zoo(zoo_copy), cache=tmp_path / "cache", progress=False)


def test_a_model_without_any_value_has_none_on_the_diagonal_either(report):
    matrix = report.matrix("agreement")
    undefined = matrix.columns[matrix.isna().all()]
    assert len(undefined)
    assert matrix.drop(index=undefined, columns=undefined).to_numpy().diagonal().tolist() == [1.0] * (
        10 - len(undefined)
    )


@pytest.mark.parametrize(("classes", "known"), [(5, False), (6, True)])
def test_top_5_accuracy_is_of_more_than_five_classes(tmp_path, classes, known):
    """The label among five of five classes says nothing."""
    args = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    (tmp_path / "in").mkdir()
    state = vit.create("vit_tiny_patch16_224", args | {"num_classes": classes}, seed=0).state_dict()
    torch.save(state, tmp_path / "in" / "m.pt")
    given = {"architecture": "vit_tiny_patch16_224", "architecture_args": {"num_heads": 2}}
    convert(plan_checkpoints(tmp_path / "in", **given), tmp_path / "zoo", progress=False)
    zoo, images, labels = Zoo(tmp_path / "zoo"), torch.randn(60, 1, 8, 8), torch.arange(60) % classes
    with torch.inference_mode():
        logits = zoo.model("m@1")(images)
    expected = top_k_accuracy_score(labels, logits, k=5, labels=range(classes)) if known else np.nan
    evaluations = vz.evaluate(zoo, images, labels, progress=False).evaluations
    measured = evaluate_on(zoo, {"given": (images, labels)}, progress=False)
    for value in (evaluations["test_top5_accuracy"][0], measured["top5_accuracy"][0]):
        assert float("nan" if value is None else value) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_the_zoo_says_in_which_precision_it_was_measured(zoo_copy, precision):
    zoo = Zoo(zoo_copy)
    report = vz.evaluate(zoo, precision=precision, progress=False)
    report.write(zoo_copy)
    about = {"precision": precision, "effect": report.precision_effect}
    assert Zoo(zoo_copy).manifest["measured"] == {"evaluations": about, "pairs": about}
    vz.evaluate(zoo, progress=False).write(zoo_copy)
    assert "measured" not in Zoo(zoo_copy).manifest


def test_a_driver_without_a_gpu_compares_what_workers_with_one_have_run(zoo):
    assert evaluate_module._place("cuda", "auto") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ZooError, match="device 'cuda' is not here"):
            vz.evaluate(zoo, device="cuda", progress=False)
