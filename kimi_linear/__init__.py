"""Train, run and understand Kimi Linear models."""

__version__ = "0.1.0"
