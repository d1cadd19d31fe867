"""How text is drawn from a model. Importing this needs no torch, so that a command line can show it at once."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How text is drawn from a model, and when it ends."""

    max_tokens: int = 64
    """Most tokens to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token always (greedy)."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only; from all where None."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum."""
    seed: int | None = None
    """Makes the draw repeatable; a fresh one each time where None."""
    stop: tuple[str, ...] = ()
    """Text that ends the generation; it is not part of the output."""

    def __post_init__(self) -> None:
        if not (isinstance(self.max_tokens, int) and self.max_tokens >= 0):
            raise ValueError(f"max_tokens: expected a whole number >= 0, got {self.max_tokens!r}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected a number >= 0 (0 is greedy), got {self.temperature!r}")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"top_k: expected a whole number >= 1, or None for every token, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}; 1 keeps every token")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected a whole number in [0, 2**63), got {self.seed!r}")
        if isinstance(self.stop, str):
            raise TypeError(f"stop: expected a tuple of strings, got the string {self.stop!r}; write ({self.stop!r},)")
        if any(not text for text in self.stop):
            raise ValueError("stop: expected strings with at least one character, got an empty one")
