"""Implementations of the operations, without validation or policy; each family stands alone."""
