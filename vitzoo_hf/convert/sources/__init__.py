"""The kinds of sources that hold checkpoints: folders, Hub repositories, the original release."""
