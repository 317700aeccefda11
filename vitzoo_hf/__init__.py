"""Populations of vision transformers as a Hugging Face dataset."""

__version__ = "0.1.0"
