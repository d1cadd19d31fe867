"""From logits to the next token: temperature, then top-k, then top-p, then one draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A source of random numbers on ``device``, seeded with ``seed`` or afresh."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def probabilities(logits: Float[Tensor, "B vocab"], config: SamplingConfig) -> Float[Tensor, "B vocab"]:
    """The distribution that ``sample`` draws from, fp32: zero for every token that top-k or top-p leaves out.

    Of equal logits top-k and top-p keep the lower ids, so that exactly k stay. Greedy puts all on one token.

    Raises:
        ValueError: a row holds NaN, or nothing but -inf.
    """
    logits = logits.float()
    top = logits.amax(-1, keepdim=True)
    if not bool(torch.isfinite(top).all()):
        raise ValueError(
            "logits: expected a finite maximum in every row, got NaN or infinity; "
            "the weights or the state that made them are broken"
        )
    if config.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # The maximum is taken off first: a tiny temperature must not overflow.
    scaled = (logits - top) / config.temperature
    if config.top_k is None and config.top_p == 1:
        return scaled.softmax(-1)
    ordered, ids = scaled.sort(stable=True, dim=-1, descending=True)
    if config.top_k is not None:
        ordered[:, config.top_k :] = -torch.inf
    p = ordered.softmax(-1)
    # A token stays while the ones before it fall short of top_p, so the likeliest one always does.
    p = p.masked_fill(p.cumsum(-1) - p >= config.top_p, 0.0)
    return torch.zeros_like(p).scatter_(-1, ids, p / p.sum(-1, keepdim=True))


def sample(
    logits: Float[Tensor, "B vocab"], config: SamplingConfig, generator: torch.Generator | None = None
) -> Int[Tensor, "B"]:
    """One token per row, int64 [B], drawn from ``probabilities(logits, config)``.

    Args:
        logits: [B, vocab], any floating dtype.
        config: temperature, top_k and top_p; the rest is not read.
        generator: where the random numbers come from, on the device of ``logits``; torch's own where None.
    """
    p = probabilities(logits, config)
    if config.temperature == 0:
        return p.argmax(-1)
    return torch.multinomial(p, 1, generator=generator).squeeze(-1)
