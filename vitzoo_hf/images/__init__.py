"""Image sources to uint8 batches to what a model is fed: augmentation, crops, corruptions, the pool of a world."""
