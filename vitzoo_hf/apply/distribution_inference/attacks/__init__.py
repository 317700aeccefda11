"""Attacks that infer the training distribution of a model."""
