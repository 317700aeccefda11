"""Align models by the symmetries of a vision transformer."""
