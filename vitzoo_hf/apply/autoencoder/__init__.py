"""An autoencoder of the weights of vision transformers, trained on structure, contrast and behaviour."""
