"""A weight autoencoder on populations of small ViTs: its grid, learning curves, use and report."""
