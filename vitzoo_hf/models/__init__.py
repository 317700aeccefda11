"""Architectures and flat weight vectors to networks: one timm model, or a whole population."""
