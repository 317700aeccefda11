"""Checkpoints to the folder of a zoo, its card, and the push to the Hub. The only package that writes zoos."""
