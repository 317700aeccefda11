import itertools

import networkx
import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.stats import kurtosis
from weight_zoo import LAYOUT, draw, write

from vitzoo_hf.apply.lineage.costs import (
    measure_trunks,
    mother_costs,
    mother_distances,
    square_matrices,
    trunk_places,
)
from vitzoo_hf.apply.lineage.trees import minimum_arborescence
from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct

KINDS = 4  # queries, keys, values, output


def attention_matrices(zoo):
    """Block and kind -> [P, width, width], sliced from live models."""
    found = {}
    for row in zoo.rows():
        model = reconstruct(row)
        for number, block in enumerate(model.blocks):
            queries, keys, values = block.attn.qkv.weight.detach().numpy().astype(np.float64).reshape(3, 16, 16)
            output = block.attn.proj.weight.detach().numpy().astype(np.float64)
            for kind, matrix in zip("qkvo", (queries, keys, values, output), strict=True):
                found.setdefault((number, kind), []).append(matrix)
    return {key: np.array(matrices) for key, matrices in found.items()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Seven models, two of them close to each other."""
    vectors = draw(7)
    vectors[2] = vectors[1] + 1e-2 * vectors[2]
    return write(tmp_path_factory.mktemp("lineage") / "zoo", vectors)


@pytest.fixture(params=[10**9, 9_000], ids=["one block", "many blocks"])
def columns(request, drawn):
    return drawn.weight_columns(block_bytes=request.param)


def test_square_matrices_split_qkv():
    matrices = square_matrices(LAYOUT)
    assert [matrix.kind for matrix in matrices] == ["q", "k", "v", "proj"] * 2
    vector = torch.arange(float(LAYOUT.num_parameters))
    tensors = unflatten(vector, LAYOUT)
    keys = tensors["blocks.1.attn.qkv.weight"][16:32]
    torch.testing.assert_close(vector[matrices[5].place], keys.flatten())
    other = Layout(("head.weight", "x.weight", "y.weight"), ((4, 4), (3, 3), (3, 2)))
    assert [(matrix.name, matrix.kind) for matrix in square_matrices(other)] == [("x.weight", "other")]
    assert trunk_places(other) == [slice(16, 31)]


def test_measures_are_those_of_live_models(columns, drawn):
    found = measure_trunks(columns)
    matrices = attention_matrices(drawn)
    expected = sum(squareform(pdist(held.reshape(7, -1), "cityblock")) / 256 for held in matrices.values())
    np.testing.assert_allclose(found.mean_absolute, expected, rtol=1e-5)
    expected = sum(kurtosis(held.reshape(7, -1), axis=1) for (_, kind), held in matrices.items() if kind == "o")
    np.testing.assert_allclose(found.kurtosis, expected, rtol=1e-4, atol=1e-5)
    trunks = np.stack([row["weights"][LAYOUT.trunk()] for row in drawn.rows()]).astype(np.float64)
    np.testing.assert_allclose(found.distance, squareform(pdist(trunks)), rtol=1e-5)
    assert found.model_ids == drawn.model_ids


def published_distances(matrices, members):
    """MoTHer's distance, a pair and a matrix at a time."""
    result = np.zeros((len(members), len(members)))
    pairs = list(itertools.combinations(range(len(members)), 2))
    for held in matrices.values():
        differences = {(i, j): held[members[i]] - held[members[j]] for i, j in pairs}
        if not pairs:
            continue
        low = min(difference.min() for difference in differences.values())
        high = max(difference.max() for difference in differences.values())
        for (i, j), difference in differences.items():
            scaled = ((difference - low) / (high - low)).max()
            result[i, j] = result[j, i] = max(result[i, j], scaled)
    return result


def test_mother_distances_are_the_published_ones(columns, drawn):
    matrices = attention_matrices(drawn)
    trees = [np.array([0, 3, 5, 6]), np.array([1, 2]), np.array([4])]
    found = mother_distances(columns, trees)
    for distance, members in zip(found, trees, strict=True):
        np.testing.assert_allclose(distance, published_distances(matrices, members), atol=1e-6)
    (turned,) = mother_distances(columns, [np.array([6, 0, 5, 3])])
    np.testing.assert_allclose(turned, found[0][np.ix_([3, 0, 2, 1], [3, 0, 2, 1])])


def test_mother_is_that_of_networkx_on_a_hand_made_tree(tmp_path):
    """Parent 0, children 1 to 6, and 7 to 11 children of 6. Some distances are 1 exactly, so costs are compared."""
    generator = torch.Generator().manual_seed(0)
    parents = [-1, *[0] * 6, *[6] * 5]
    vectors = [draw(1)[0]]
    for number, parent in enumerate(parents[1:], start=1):
        step = torch.randn(LAYOUT.num_parameters, generator=generator) * (0.05 if number < 7 else 0.02)
        vectors.append(vectors[parent] + step)
    zoo = write(tmp_path / "zoo", torch.stack(vectors))
    matrices, members = attention_matrices(zoo), np.array(sorted(range(12), key=lambda number: f"m{number}@1"))
    distance = published_distances(matrices, members)
    (found,) = mother_distances(zoo.weight_columns(), [members])
    np.testing.assert_allclose(found, distance, atol=1e-5)
    tails = sum(
        kurtosis(held[members].reshape(12, -1), axis=1) for (_, kind), held in matrices.items() if kind == "o"
    )
    tree_costs = []
    for reverse in (False, True):
        graph = networkx.DiGraph()
        for i, j in itertools.permutations(range(12), 2):
            up = tails[j] < tails[i] if reverse else tails[j] > tails[i]
            graph.add_edge(i, j, weight=distance[i, j] + 0.3 * distance.mean() * up)
        cost = mother_costs(found, tails, reverse=reverse)
        parent = minimum_arborescence(cost)
        total = sum(cost[source, child] for child, source in enumerate(parent.tolist()) if source >= 0)
        assert total == pytest.approx(networkx.minimum_spanning_arborescence(graph).size("weight"), abs=1e-4)
        tree_costs.append(total)
    assert tree_costs[0] != tree_costs[1]


def test_rounding_is_that_of_torch(tmp_path):
    vectors = draw(4)
    rounded = write(tmp_path / "rounded", vectors.bfloat16().float())
    zoo = write(tmp_path / "zoo", vectors)
    here = measure_trunks(zoo.weight_columns(), precision="bfloat16")
    there = measure_trunks(rounded.weight_columns())
    np.testing.assert_array_equal(here.distance, there.distance)
    np.testing.assert_array_equal(here.mean_absolute, there.mean_absolute)
    (distance,) = mother_distances(zoo.weight_columns(), [np.arange(4)], precision="bfloat16")
    (expected,) = mother_distances(rounded.weight_columns(), [np.arange(4)])
    np.testing.assert_array_equal(distance, expected)


def test_equal_models_are_exactly_zero_apart(tmp_path):
    vectors = draw(3)
    vectors[1] = vectors[0]
    columns = write(tmp_path / "zoo", vectors).weight_columns()
    found = measure_trunks(columns)
    assert found.distance[0, 1] == found.mean_absolute[0, 1] == 0
    (distance,) = mother_distances(columns, [np.array([0, 1])])
    assert (distance == 0).all()


def test_weights_that_cannot_be_compared_are_refused(tmp_path):
    vectors = draw(3)
    vectors[1, 5] = torch.nan
    columns = write(tmp_path / "zoo", vectors).weight_columns()
    with pytest.raises(ZooError, match=r"m1@1 has NaN or infinite weights: leave it out"):
        measure_trunks(columns)
    with pytest.raises(ZooError, match="precision is 'int8'; expected one of float32, bfloat16, float16"):
        measure_trunks(columns, precision="int8")
