"""Distribution inference: what a model tells about the distribution that it was trained on."""
