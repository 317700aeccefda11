"""Soups of twenty models of ViT-S size in bounded memory."""

import pytest
from peak_memory import peak_mb

LIMIT_MB = 4000

PROGRAM = """
import sys
from pathlib import Path
import torch
import side_by_side
from vitzoo_hf.apply.paths.arithmetic import edited_weights, task_vector
from vitzoo_hf.apply.paths.landscape import landscape_slice
from vitzoo_hf.apply.soup.learned import learned_soup
from vitzoo_hf.apply.soup.averaging import greedy_soup, uniform_soup
from vitzoo_hf.apply.soup.rows import soup_row, write_soups
from vitzoo_hf.zoo import Zoo

folder = Path(sys.argv[1])
zoo = Zoo(side_by_side.random_zoo(folder / "zoo", side_by_side.VIT_S, 20))
generator = torch.Generator().manual_seed(0)
images = torch.randn(8, 3, 224, 224, generator=generator)
labels = torch.randint(1000, (8,), generator=generator)
uniform = uniform_soup(zoo)
greedy = greedy_soup(zoo, images, labels)
learned = learned_soup(zoo, images, labels, epochs=1, batch_size=4)
soups = [soup_row(zoo, soup) for soup in (uniform, greedy, learned)]
write_soups(zoo, soups, folder / "soups")
assert len([row.weights for row in Zoo(folder / "soups").rows()]) == 3
rows = [zoo.row(model_id) for model_id in zoo.model_ids[:3]]
assert edited_weights(rows[0], 0.5 * task_vector(rows[1], rows[2])).isfinite().all()
assert landscape_slice(rows, images[:2], labels[:2], resolution=2).loss.isfinite().all()
"""


@pytest.mark.slow
def test_soups_of_twenty_large_models_fit_into_four_gigabytes(tmp_path):
    assert peak_mb(PROGRAM, tmp_path, tmp_path) < LIMIT_MB
