"""Paths against the sum of their definitions."""

import pytest
import torch

from vitzoo_hf.apply.interpolation import (
    barrier,
    bezier_points,
    mode_connectivity,
    path_scores,
    positions,
    straight_points,
)
from vitzoo_hf.apply.paths.paths import train_bezier
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo import Zoo


@pytest.fixture
def ends(tiny_zoo):
    zoo = Zoo(tiny_zoo).filter(stage="finetune", is_final=True, head="mlp")
    rows = list(zoo.rows())[:2]
    vectors = [torch.from_numpy(row["weights"]) for row in rows]
    return zoo, rows[0], vectors


def test_the_straight_path_is_what_rebuilt_models_say(ends):
    zoo, row, (first, last) = ends
    images, labels = zoo.probes(row["dataset"])
    scores = path_scores(first, last, row, images, labels, points=5)
    losses = []
    for step, t in enumerate(scores.positions.tolist()):
        model = reconstruct({**row, "weights": (1 - t) * first + t * last, "weights_sha256": None})
        with torch.inference_mode():
            logits = model(images)
        losses.append(float(torch.nn.functional.cross_entropy(logits.double(), labels)))
        assert float(scores.accuracy[step]) == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    torch.testing.assert_close(scores.loss, torch.tensor(losses).double(), rtol=1e-5, atol=1e-6)
    rises = [
        loss - (losses[0] + t * (losses[-1] - losses[0])) for loss, t in zip(losses, scores.positions, strict=True)
    ]
    assert scores.barrier == pytest.approx(float(max(rises)), abs=1e-5)
    assert scores.midpoint == 2


def test_barriers_and_connectivity_by_hand():
    t = positions(5)
    assert t.tolist() == [0, 0.25, 0.5, 0.75, 1]
    line = torch.tensor([1.0, 1.25, 1.5, 1.75, 2.0]).double()
    assert barrier(line, t) == 0
    assert barrier(line + torch.tensor([0, 0.5, 0.2, 0, 0]), t) == pytest.approx(0.5)
    assert barrier(line - torch.tensor([0, 0.5, 0.2, 0, 0]), t) == 0
    assert barrier(line.flip(0) + 3, t) == pytest.approx(0)
    better = torch.tensor([0.3, 0.1, 0.2, 0.25, 0.3]).double()
    assert mode_connectivity(better) == pytest.approx(0.2)
    assert mode_connectivity(1 - better) == pytest.approx(-0.2)
    with pytest.raises(ZooError, match="a path of 2 points has no middle"):
        positions(2)


def test_curves_begin_and_end_at_the_ends_and_bend_by_their_control():
    first, last, control = torch.randn(3, 7).double()
    t = positions(5)
    straight, bent = straight_points(first, last, t), bezier_points(first, control, last, t)
    torch.testing.assert_close(bezier_points(first, (first + last) / 2, last, t), straight)
    for points in (straight, bent):
        torch.testing.assert_close(points[0], first)
        torch.testing.assert_close(points[-1], last)
    torch.testing.assert_close(bent[2], (first + 2 * control + last) / 4)


def test_a_trained_curve_is_lower_than_the_line_and_follows_its_seed(ends):
    zoo, row, (first, _) = ends
    images, labels = zoo.probes(row["dataset"], "selection")
    last = first.roll(1)  # a ruined network: far away, with a barrier
    control, same = (train_bezier(first, last, row, images, labels, steps=40, seed=2) for _ in range(2))
    assert torch.equal(control, same)
    line, curve = (path_scores(first, last, row, images, labels, control=middle) for middle in (None, control))
    torch.testing.assert_close(line.loss[[0, -1]], curve.loss[[0, -1]])
    assert curve.loss.mean() < line.loss.mean()
    unmoved = train_bezier(first, last, row, images, labels, steps=0)
    torch.testing.assert_close(unmoved, (first + last) / 2)
    with pytest.raises(ZooError, match="trained on images; none were given"):
        train_bezier(first, last, row, images[:0], labels[:0])


def test_connectivity_does_not_change_when_the_ends_change_places():
    rising = torch.tensor([0.1, 0.2, 0.4, 0.45, 0.5]).double()
    assert mode_connectivity(rising) == mode_connectivity(rising.flip(0)) == pytest.approx(-0.15)
    even = torch.tensor([0.25, 0.75, 0.5, 0.25, 0.75]).double()  # equally far above and below the mean of the ends
    assert mode_connectivity(even) == mode_connectivity(even.flip(0)) == -0.25
    drawn = torch.rand(200, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for errors in drawn:
        assert mode_connectivity(errors) == mode_connectivity(errors.flip(0))
    with pytest.raises(ZooError, match="2 errors have none between the ends"):
        mode_connectivity(rising[:2])
