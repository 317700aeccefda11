"""A recipe that trains a weight autoencoder in moments."""

from vitzoo_hf.apply.autoencoder.model import Sizes
from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe

SMALL = AutoencoderRecipe(
    views=("mlp", "heads"),
    queries=8,
    pool=40,
    steps=6,
    batch_size=2,
    sizes=Sizes(width=16, latent=4, heads=2, blocks=1, projection=5),
)
