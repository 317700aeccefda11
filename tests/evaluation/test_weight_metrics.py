import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from weight_zoo import LAYOUT, draw, write

from vitzoo_hf.evaluation.weight_metrics import zoo_task_vectors, zoo_weight_metrics
from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.metrics.weight_distances import part_distances, weight_distances
from vitzoo_hf.metrics.weight_statistics import matrices_of, weight_quantiles, weight_statistics
from vitzoo_hf.zoo import Zoo
from vitzoo_hf.zoo import weight_columns as column_module


def stacked(zoo):
    return torch.stack(list(zoo.weight_columns().rows()))


@pytest.fixture(params=[10**9, 12_000], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    original = Zoo.weight_columns
    monkeypatch.setattr(
        Zoo, "weight_columns", lambda self, **options: original(self, block_bytes=request.param, **options)
    )


@pytest.mark.parametrize(("binary", "dtype"), [(False, "float32"), (True, "float32"), (True, "bfloat16")])
@pytest.mark.parametrize("per", ["model", "block", "tensor"])
def test_out_of_core_equals_in_memory(blocks, tmp_path, binary, dtype, per):
    vectors = draw(7)
    vectors[2] = vectors[1] + 1e-2 * vectors[2]
    zoo = write(tmp_path / "zoo", vectors, binary=binary, dtype=dtype)
    weights = vectors.to(getattr(torch, dtype)).float()
    assert torch.equal(stacked(zoo), weights)
    found = zoo_weight_metrics(zoo, per=per, progress=False)
    expected = {metric: part_distances(weights, LAYOUT, metric=metric, per=per) for metric in ("l2", "normalized_l2")}
    for metric, matrices in expected.items():
        own = getattr(found, metric)
        torch.testing.assert_close(own[0], weight_distances(weights, metric), rtol=1e-5, atol=0)
        torch.testing.assert_close(own if per == "model" else own[1:], matrices, rtol=1e-5, atol=0, equal_nan=True)
    cosine = 1 - part_distances(weights, LAYOUT, metric="cosine", per=per)
    torch.testing.assert_close(found.cosine[-len(cosine) :], cosine, rtol=0, atol=1e-5, equal_nan=True)
    np.testing.assert_allclose(found.norms[0], np.linalg.norm(weights.double(), axis=1), rtol=1e-6)
    assert found.parts == ([] if per == "model" else ["model"]) + list(LAYOUT.parts(per))
    statistics = weight_statistics(weights, LAYOUT)
    for name in ("norm", "mean", "std", "sparsity", "excess_kurtosis"):
        own = found.table[name].to_numpy().reshape(7, -1)
        np.testing.assert_allclose(own, getattr(statistics, name), rtol=1e-4, atol=1e-5)
    assert list(found.table["tensor"][: len(LAYOUT.names)]) == list(LAYOUT.names)
    assert list(found.table["model_id"].unique()) == zoo.model_ids


def test_the_tiny_zoo_is_measured_without_heads(tiny_zoo):
    zoo = Zoo(tiny_zoo)
    weights = torch.stack(
        [torch.from_numpy(row["weights"])[zoo.layouts[row["layout"]].trunk()] for row in zoo.rows()]
    )
    found = zoo_weight_metrics(zoo, progress=False)
    torch.testing.assert_close(found.l2[0], weight_distances(weights), rtol=1e-5, atol=0)
    assert "head.weight" not in set(found.table["tensor"])
    table = found.matrix("normalized_l2")
    assert list(table.index) == list(table.columns) == zoo.model_ids
    order = zoo.filter(model_id=zoo.model_ids[::-1][:5])
    again = zoo_weight_metrics(order, progress=False).matrix("normalized_l2")
    np.testing.assert_allclose(again, table.loc[again.index, again.columns], rtol=1e-5)


def test_models_a_ten_thousandth_apart_take_one_pass(blocks, tmp_path):
    weights = draw() + 1e-4 * draw(20)
    found = zoo_weight_metrics(write(tmp_path / "zoo", weights), progress=False)
    exact = torch.cdist(weights.double(), weights.double(), compute_mode="donot_use_mm_for_euclid_dist")
    np.testing.assert_allclose(found.l2[0], exact, rtol=1e-5)
    assert found.passes == 1


@pytest.mark.parametrize("per", ["model", "block"])
def test_epochs_of_runs_take_another_pass(blocks, tmp_path, per):
    weights = (draw(4, 1) + 1e-4 * draw(4, 5, seed=1).cumsum(1)).flatten(0, 1)
    weights[7] = weights[6]
    found = zoo_weight_metrics(write(tmp_path / "zoo", weights), per=per, progress=False)
    exact = torch.cdist(weights.double(), weights.double(), compute_mode="donot_use_mm_for_euclid_dist")
    np.testing.assert_allclose(found.l2[0], exact, rtol=1e-5)
    assert found.l2[0, 6, 7] == 0
    assert found.passes > 1


def test_a_second_pass_reads_what_is_close_only(tmp_path, monkeypatch):
    weights = draw(6)
    place = LAYOUT.place("blocks.1.attn.qkv.weight")
    weights[1, place] = weights[0, place]
    zoo = write(tmp_path / "zoo", weights)
    original, read = column_module.WeightColumns.read, []

    def counted(self, wanted=None):
        for columns, block in original(self, wanted):
            read.append(columns)
            yield columns, block

    monkeypatch.setattr(column_module.WeightColumns, "read", counted)
    original_columns = Zoo.weight_columns
    monkeypatch.setattr(Zoo, "weight_columns", lambda self, **options: original_columns(self, block_bytes=12_000))
    found = zoo_weight_metrics(zoo, per="tensor", progress=False)
    assert found.passes > 1
    again = read[-(-LAYOUT.num_parameters // 500) :]
    assert again
    assert all(columns.start < place.stop and place.start < columns.stop for columns in again)
    number = found.parts.index("blocks.1.attn.qkv.weight")
    assert found.l2[number, 0, 1] == 0
    expected = (weights[0, place].double() - weights[2, place].double()).norm()
    torch.testing.assert_close(found.l2[number, :2, 2], expected.expand(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_named(blocks, tmp_path, value):
    weights = draw(6)
    weights[4, LAYOUT.place("blocks.1.mlp.fc2.bias").start] = value
    zoo = write(tmp_path / "zoo", weights)
    with pytest.raises(
        ZooError, match=r"m4@1 has NaN or infinite weights in blocks\.1\.mlp\.fc2\.bias: leave it out"
    ):
        zoo_weight_metrics(zoo, progress=False)
    weights[2:4] = value
    zoo = write(tmp_path / "more", weights)
    with pytest.raises(ZooError, match=r"m\d@1 has NaN .*, and so have at least [12] other models: leave"):
        zoo_weight_metrics(zoo, statistics=False, progress=False)
    assert len(zoo_weight_metrics(zoo.filter(model_id=["m0@1", "m1@1"]), progress=False).model_ids) == 2


def test_a_cut_shard_is_named(tmp_path):
    zoo = write(tmp_path / "zoo", draw(3))
    (name,) = zoo._reader.places.files
    with (tmp_path / "zoo" / name).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ZooError, match=rf"{name}, row group 0, cannot be read"):
        zoo_weight_metrics(zoo, progress=False)


def test_one_model_zeros_and_identical_models(tmp_path):
    one = zoo_weight_metrics(write(tmp_path / "one", draw(1)), progress=False)
    assert one.l2.tolist() == [[[0]]]
    assert one.cosine.tolist() == [[[1]]]
    vectors = draw(5)
    vectors[0] = 0
    vectors[3] = vectors[2]
    found = zoo_weight_metrics(write(tmp_path / "zeros", vectors), progress=False)
    assert found.l2[0, 2, 3] == 0
    assert found.cosine[0, 0].isnan().all()
    assert found.normalized_l2[0, 1:, 1:].isfinite().all()
    assert found.table[found.table["model_id"] == "m0@1"]["sparsity"].eq(1).all()


def test_spectra_and_quantiles(tmp_path):
    vectors = draw(3)
    zoo = write(tmp_path / "zoo", vectors)
    found = zoo_weight_metrics(zoo, spectra=3, quantiles=[0, 0.5, 0.9], progress=False)
    expected = weight_quantiles(vectors, LAYOUT, [0, 0.5, 0.9])
    for number, name in enumerate(["quantile_0", "quantile_0.5", "quantile_0.9"]):
        np.testing.assert_allclose(found.table[name].to_numpy().reshape(3, -1), expected[..., number])
    matrices = matrices_of(vectors, LAYOUT)
    assert len(found.spectra) == 3 * len(matrices)
    for row in found.spectra.to_dict("records"):
        matrix = matrices[row["matrix"]][zoo.model_ids.index(row["model_id"])].double().numpy()
        values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(row["singular_values"], values[:3], rtol=1e-6)
        np.testing.assert_allclose(row["spectral_norm"], values[0], rtol=1e-6)
        np.testing.assert_allclose(row["stable_rank"], (values**2).sum() / values[0] ** 2, rtol=1e-6)


@pytest.mark.parametrize("per", ["model", "tensor"])
def test_task_vectors_are_children_less_parents(blocks, tmp_path, per):
    weights = draw(8)
    parents = [None, None, "m0@1", "m0@1", "m1@1", "m1@1", "m0@1", "m6@1"]
    for child in (2, 3, 4, 5, 6):
        weights[child] = weights[int(parents[child][1])] + 0.05 * weights[child]
    zoo = write(tmp_path / "zoo", weights, parents=parents)
    chosen = zoo.filter(model_id=zoo.model_ids[2:])
    for children in (zoo, chosen):
        found = zoo_task_vectors(children, per=per, statistics=True, progress=False)
        assert found.model_ids == zoo.model_ids[2:]
        own = torch.stack([weights[n] - weights[int(parents[n][1])] for n in range(2, 8)])
        np.testing.assert_allclose(found.norms[0], np.linalg.norm(own.double(), axis=1), rtol=1e-6)
        torch.testing.assert_close(found.cosine[0], 1 - weight_distances(own, "cosine"), rtol=0, atol=1e-5)
        if per == "tensor":
            head = unflatten(own, LAYOUT)["head.weight"].flatten(1)
            torch.testing.assert_close(found.l2[-2], weight_distances(head), rtol=1e-5, atol=0)
        statistics = weight_statistics(own, LAYOUT)
        np.testing.assert_allclose(found.table["std"].to_numpy().reshape(6, -1), statistics.std, rtol=1e-4)


def test_task_vectors_need_parents(tmp_path):
    zoo = write(tmp_path / "none", draw(2))
    with pytest.raises(ZooError, match=r"no model of .* has a parent, so there are no task vectors"):
        zoo_task_vectors(zoo, progress=False)
    zoo = write(tmp_path / "lost", draw(2), parents=[None, "gone@3"])
    with pytest.raises(ZooError, match=r"does not hold gone@3, the parent of m1@1: leave m1@1 out by a filter"):
        zoo_task_vectors(zoo, progress=False)


def test_refusals(tmp_path):
    zoo = write(tmp_path / "zoo", draw(2))
    with pytest.raises(ValueError, match="spectra=-1; expected how many"):
        zoo_weight_metrics(zoo, spectra=-1, progress=False)
    with pytest.raises(ZooError, match="the filter matches no row"):
        zoo_weight_metrics(zoo.filter(epoch=7), progress=False)
    found = zoo_weight_metrics(zoo, statistics=False, progress=False)
    assert list(found.table) == ["model_id", "tensor", "num_values"]
    with pytest.raises(ZooError, match=r"nothing was measured of 'blocks\.0'"):
        found.matrix("l2", "blocks.0")


def test_progress_is_shown_and_weights_are_not_written(tmp_path, capsys):
    zoo = write(tmp_path / "zoo", draw(2))
    before = {file: file.read_bytes() for file in (tmp_path / "zoo").rglob("*.parquet")}
    zoo_weight_metrics(zoo, per="block")
    assert "reading weights" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in (tmp_path / "zoo").rglob("*.parquet")}
    shutil.rmtree(tmp_path / "zoo")


@pytest.mark.gpu
def test_cpu_and_cuda_agree(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weights = (draw(4, 1) + 1e-4 * draw(4, 5, seed=1)).flatten(0, 1)
    zoo = write(tmp_path / "zoo", weights)
    here = zoo_weight_metrics(zoo, per="block", spectra=2, progress=False)
    there = zoo_weight_metrics(zoo, per="block", spectra=2, device="cuda", progress=False)
    torch.testing.assert_close(there.l2.cpu(), here.l2, rtol=1e-5, atol=0)
    np.testing.assert_allclose(there.spectra["stable_rank"], here.spectra["stable_rank"], rtol=1e-6)
    np.testing.assert_allclose(there.table["std"], here.table["std"], rtol=1e-5)


def test_threads_share_the_columns_and_agree(tiny_zoo):
    zoo = Zoo(tiny_zoo)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(zoo_weight_metrics(zoo, per="tensor", progress=False))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other.l2, found[0].l2, rtol=1e-5, atol=0)
        torch.testing.assert_close(other.norms, found[0].norms, rtol=1e-5, atol=0)
        pd.testing.assert_frame_equal(other.table, found[0].table, rtol=1e-5, atol=1e-5)  # of kurtosis less 3
