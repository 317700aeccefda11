"""Recover which checkpoint initialised which from weights alone."""
