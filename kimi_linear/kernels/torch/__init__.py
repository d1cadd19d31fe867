"""Implementations in plain PyTorch, for every device."""
