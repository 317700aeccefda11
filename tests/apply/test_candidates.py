import pytest
import torch

from vitzoo_hf.apply.candidates import candidate_logits, candidate_scores
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.zoo import Zoo


def test_candidates_compute_what_the_rebuilt_model_computes(tiny_zoo):
    zoo = Zoo(tiny_zoo).filter(stage="finetune", is_final=True, head="mlp")
    row, other = list(zoo.rows())[:2]
    images, labels = zoo.probes(row["dataset"])
    vectors = torch.stack([torch.from_numpy(values["weights"]) for values in (row, other)])
    middle = vectors.mean(0)
    logits = candidate_logits(torch.stack([vectors[0], middle]), row, images)
    with torch.inference_mode():
        torch.testing.assert_close(logits[0], reconstruct(row)(images), rtol=1e-4, atol=1e-5)
        halfway = dict(row, weights=middle, weights_sha256=None)
        torch.testing.assert_close(logits[1], reconstruct(halfway)(images), rtol=1e-4, atol=1e-5)
    scores = candidate_scores(vectors[:1], row, images, labels)
    assert scores.accuracy.item() == pytest.approx((logits[0].argmax(1) == labels).double().mean().item())
    expected = torch.nn.functional.cross_entropy(logits[0].double(), labels)
    assert scores.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_candidates_of_another_layout_or_not_finite_are_refused(tiny_zoo):
    row = next(Zoo(tiny_zoo).filter(stage="finetune").rows())
    vector = torch.from_numpy(row["weights"])
    images = torch.zeros(2, *Zoo(tiny_zoo).probes(row["dataset"])[0].shape[1:])
    with pytest.raises(ZooError, match=r"shape \(\d+,\); its layout wants"):
        candidate_logits(vector[None, :-1], row, images)
    broken = vector.clone()
    broken[3] = torch.nan
    with pytest.raises(ZooError, match="candidate 1 of 2 has weights that are not finite"):
        candidate_logits(torch.stack([vector, broken]), row, images)
