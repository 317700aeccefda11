"""What models tell of the distribution they were trained on: the published tasks, and ViTs."""
