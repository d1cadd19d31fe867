"""From logits to the next token: temperature, then top-k, then top-p, then one draw."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.engine.config import SamplingConfig


def make_generator(config: SamplingConfig, device: torch.device | str = "cpu") -> torch.Generator:
    """A source of random numbers on ``device``, seeded with ``config.seed``, or afresh where that is None."""
    generator = torch.Generator(device)
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
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
