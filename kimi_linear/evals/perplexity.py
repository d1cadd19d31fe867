"""Perplexity, and how it falls as the context grows: what a longer memory is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from kimi_linear.data import IGNORE, Batch
from kimi_linear.evals.protocol import Result, Sampler


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity on held-out batches, in all and by position: how many tokens of its sequence the model had seen.

    Metrics: ``loss`` (nats per token), ``perplexity`` (its exponential), ``tokens``, and ``bits_per_byte`` where
    ``bytes_per_token`` is known. Rows: one per doubling of the position (1, 2, 3-4, 5-8, ...).
    """

    batches: Callable[[], Iterable[Batch]]
    """Gives the held-out batches, the same at every call; rows or packed."""
    bytes_per_token: float | None = None
    """Bytes of text per token over the same text: 1 for a byte tokenizer."""
    name: str = "perplexity"
    """What to call the result."""
    device: torch.device | str = "cpu"
    """Where the sampler wants its tokens."""

    @torch.inference_mode()
    def __call__(self, sampler: Sampler) -> Result:
        nats = torch.zeros(64, dtype=torch.float64)
        count = torch.zeros(64, dtype=torch.int64)
        for batch in self.batches():
            tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
            cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(self.device)
            logits = sampler(tokens, cu_seqlens=cu_seqlens)
            scored = (targets != IGNORE).flatten()
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
            )
            bucket = bucket_of(positions(tokens, cu_seqlens)).flatten()[scored].cpu()
            nats.index_add_(0, bucket, loss[scored].double().cpu())
            count.index_add_(0, bucket, torch.ones_like(bucket))
        total = int(count.sum())
        if total == 0:
            raise ValueError("batches: expected at least one scored target, got none; is the held-out text empty?")
        loss = float(nats.sum()) / total
        metrics = {"loss": loss, "perplexity": _exp(loss), "tokens": float(total)}
        if self.bytes_per_token is not None:
            metrics["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        rows = tuple(
            {
                "position": bucket_name(i),
                "tokens": int(count[i]),
                "loss": float(nats[i] / count[i]),
                "perplexity": _exp(float(nats[i] / count[i])),
            }
            for i in range(64)
            if count[i]
        )
        return Result(name=self.name, metrics=metrics, rows=rows)


def positions(tokens: Int[Tensor, "B T"], cu_seqlens: Int[Tensor, "N1"] | None = None) -> Int[Tensor, "B T"]:
    """Tokens of its own sequence that the model has seen at each place, itself included: 1, 2, 3, ..."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].long()
        place = place - starts[torch.searchsorted(cu_seqlens[1:].long(), place, right=True)]
    return (place + 1).expand(tokens.shape)


def bucket_of(position: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """0 for 1, 1 for 2, 2 for 3-4, 3 for 5-8, ...: the power of two that reaches the position."""
    # frexp is exact, where a rounded logarithm would misplace the powers of two themselves.
    return torch.frexp((position - 1).double()).exponent.long().clamp_min(0)


def bucket_name(bucket: int) -> str:
    """The positions of a bucket: "1", "2", "3-4", "5-8", ..."""
    high = 2**bucket
    low = high // 2 + 1
    return f"{low}-{high}" if low < high else str(high)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
