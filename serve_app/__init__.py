"""Hugging Face Transformers in production, on Ray Serve."""

__version__ = "0.1.0"
