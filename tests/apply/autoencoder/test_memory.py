"""Twenty models of ViT-S size through an autoencoder in bounded memory."""

import pytest
from peak_memory import peak_mb

LIMIT_MB = 4000

PROGRAM = """
import sys
from pathlib import Path
import side_by_side
from vitzoo_hf.apply.autoencoder.model import Sizes
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.rows import encode_rows, write_reconstructions
from vitzoo_hf.apply.autoencoder.trained import load_autoencoder
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.zoo import Zoo

folder = Path(sys.argv[1])
zoo = Zoo(side_by_side.random_zoo(folder / "zoo", side_by_side.VIT_S, 20))
sizes = Sizes(width=16, latent=4, heads=2, blocks=1, hidden=2, window=512, halo=32)
recipe = AutoencoderRecipe(structure=1.0, steps=2, batch_size=1, token_width=385, scaling="entry", sizes=sizes)
train_autoencoder(zoo, recipe, folder / "ae")
trained = load_autoencoder(folder / "ae")
assert len(encode_rows(zoo, trained).embeddings) == 20
assert len(write_reconstructions(zoo, trained, folder / "reconstructions")) == 20
"""


@pytest.mark.slow
def test_twenty_large_models_fit_into_four_gigabytes(tmp_path):
    assert peak_mb(PROGRAM, tmp_path, tmp_path) < LIMIT_MB
