"""Paths between models: loss along them, task arithmetic, slices of the loss landscape."""
