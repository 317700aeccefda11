"""Answers of twenty models of ViT-S size on candidates, in bounded memory."""

import pytest
from peak_memory import peak_mb

LIMIT_MB = 4000

PROGRAM = """
import sys
from pathlib import Path
import side_by_side
from vitzoo_hf.apply.distribution_inference.membership import Candidates, log_odds
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.zoo import Zoo

folder = Path(sys.argv[1]) / "zoo"
side_by_side.random_zoo(folder, ("vit_small_patch16_224", {"num_classes": 2}, "linear", None), 20)
images = load_images("digits", ImagesSpec("digits", 224, selection=0.4, world="two-colour"))
candidates = Candidates.of(images.pool, "victim", 4, seed=0)
answers = log_odds(Zoo(folder), images, candidates)
assert answers.shape == (20, 4)
assert answers.std() > 0
"""


@pytest.mark.slow
def test_answers_of_twenty_large_models_fit_into_four_gigabytes(tmp_path):
    assert peak_mb(PROGRAM, tmp_path, tmp_path) < LIMIT_MB
