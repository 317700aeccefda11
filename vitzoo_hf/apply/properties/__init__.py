"""Predict the properties of models from their weights."""
