"""A zoo to the metrics of every model and pair, from a cache of model outputs."""
