"""Attacks on the weights of twenty models of ViT-S size in bounded memory."""

import pytest
from peak_memory import peak_mb

LIMIT_MB = 4000

PROGRAM = """
import sys
from pathlib import Path
import torch
import side_by_side
from vitzoo_hf.apply.distribution_inference.game import Shadows, play
from vitzoo_hf.apply.distribution_inference.secrets import ClassSecret
from vitzoo_hf.apply.distribution_inference.attacks.set_encoder import set_encoder
from vitzoo_hf.apply.distribution_inference.attacks.white_box import WHITE_BOX
from vitzoo_hf.apply.distribution_inference.zoo_views import zoo_features
from vitzoo_hf.zoo import Zoo

zoo = Zoo(side_by_side.random_zoo(Path(sys.argv[1]) / "zoo", side_by_side.VIT_S, 20))
shadows = torch.arange(20) < 12
views = zoo_features(zoo, shadows, ["head", "statistics", "components", "sets"])
secret = ClassSecret((0, 1))
secrets = secret.even(20)
known = Shadows(views.at(torch.arange(12)), secrets[:12], secret)
for attack in (WHITE_BOX["head"], WHITE_BOX["statistics"], WHITE_BOX["components"], set_encoder):
    outcome = play(known, views.at(torch.arange(12, 20)), secrets[12:], attack)
    assert 0 <= outcome.accuracy.mean <= 1
"""


@pytest.mark.slow
def test_attacks_on_twenty_large_models_fit_into_four_gigabytes(tmp_path):
    assert peak_mb(PROGRAM, tmp_path, tmp_path) < LIMIT_MB
