"""Train every run of a blueprint, on this machine or on Ray, and store the runs."""
