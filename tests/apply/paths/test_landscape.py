import numpy as np
import pytest
import torch
from PIL import Image

from vitzoo_hf.apply.paths.landscape import landscape_slice, plane_through
from vitzoo_hf.apply.paths.plot import draw_slice
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def rows(tiny_zoo):
    return list(Zoo(tiny_zoo).filter(stage="finetune", is_final=True, head="linear").rows())[:3]


@pytest.fixture(scope="module")
def images(tiny_zoo):
    images, labels = Zoo(tiny_zoo).probes("digits")
    return images[:80], labels[:80]


def test_axes_are_those_of_a_qr_decomposition():
    vectors = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32))
    plane = plane_through(vectors)
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2, dtype=torch.float64))
    basis, upper = np.linalg.qr((vectors[1:].double() - vectors[0].double()).numpy().T)
    signs = np.sign(np.diag(upper))
    np.testing.assert_allclose(plane.axes.numpy(), (basis * signs).T, atol=1e-12)
    np.testing.assert_allclose(plane.corners[1:].numpy(), (upper * signs[:, None]).T, atol=1e-12)
    torch.testing.assert_close(plane.at(plane.corners), vectors)


def test_distances_in_the_plane_are_those_of_weights(rows):
    vectors = torch.stack([torch.from_numpy(row["weights"]) for row in rows])
    corners = plane_through(vectors).corners
    torch.testing.assert_close(torch.cdist(corners, corners), torch.cdist(vectors.double(), vectors.double()))


def test_nearly_parallel_vectors_keep_orthogonal_axes():
    base = torch.from_numpy(np.random.default_rng(1).normal(size=2000).astype(np.float32))
    nudge = torch.from_numpy(np.random.default_rng(2).normal(size=2000).astype(np.float32))
    plane = plane_through(torch.stack([0 * base, base, 0.5 * base + 1e-4 * nudge]))
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2, dtype=torch.float64), atol=1e-12, rtol=0)


def test_grid_holds_what_live_models_compute(rows, images):
    found = landscape_slice(rows, *images, resolution=3, margin=0.5)
    assert found.loss.shape == found.accuracy.shape == (3, 3)
    vectors = torch.stack([torch.from_numpy(row["weights"]) for row in rows])
    plane = plane_through(vectors)
    for i, j in ((0, 0), (1, 2), (2, 1)):
        place = torch.stack([found.x[j], found.y[i]])
        row = dict(rows[0], weights=plane.at(place[None])[0], weights_sha256=None)
        with torch.inference_mode():
            logits = reconstruct(row)(images[0])
        expected = torch.nn.functional.cross_entropy(logits, images[1])
        assert found.loss[i, j].item() == pytest.approx(expected.item(), rel=1e-4)
        right = (logits.argmax(1) == images[1]).double().mean()
        assert found.accuracy[i, j].item() == pytest.approx(right.item())
    assert found.x[0] < found.corners[:, 0].min()
    assert found.y[-1] > found.corners[:, 1].max()
    assert found.model_ids == [row["model_id"] for row in rows]


def test_planes_that_are_none_are_refused(tiny_zoo, rows, images):
    with pytest.raises(ZooError, match="lie on one line"):
        landscape_slice([rows[0], rows[1], rows[0]], *images)
    line = torch.arange(4.0)
    with pytest.raises(ZooError, match="lie on one line"):
        plane_through(torch.stack([line, 2 * line, 5 * line]))
    with pytest.raises(ZooError, match="2 rows and resolution 21; a plane takes 3 rows"):
        landscape_slice(rows[:2], *images)
    mlp = next(Zoo(tiny_zoo).filter(head="mlp").rows())
    with pytest.raises(ZooError, match="a plane takes rows of one head, and these have linear, mlp"):
        landscape_slice([*rows[:2], mlp], *images)


def test_figure_is_a_picture_of_modest_size(rows, images, tmp_path):
    found = landscape_slice(rows, *images, resolution=4)
    path = draw_slice(found, tmp_path / "slice.png", title="A slice", names=["one", "two", "three"])
    with Image.open(path) as picture:
        assert picture.size[0] > 600
    assert path.stat().st_size < 300_000
    with pytest.raises(ZooError, match="cannot write"):
        draw_slice(found, tmp_path / "absent" / "slice.png", title="A slice")
