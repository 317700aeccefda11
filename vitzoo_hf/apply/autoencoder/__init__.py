"""An autoencoder of the weights of vision transformers, trained on structure, contrast and behaviour of the networks.

Train one on a zoo; encode rows to latents and embeddings; decode, sample and fine-tune new models as a zoo.
"""

from vitzoo_hf.apply.autoencoder.recipe import AutoencoderRecipe as AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.rows import encode_rows as encode_rows
from vitzoo_hf.apply.autoencoder.sampled_rows import write_samples as write_samples
from vitzoo_hf.apply.autoencoder.trained import load_autoencoder as load_autoencoder
from vitzoo_hf.apply.autoencoder.training import train_autoencoder as train_autoencoder
