"""Train one run, or a stack of runs of one shape: steps, epochs, losses, checkpoints, resuming."""
