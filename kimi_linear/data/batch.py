"""What one step reads: tokens, the targets that are scored, and where sequences begin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""The target of a position that is not scored."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Tokens and targets of one step.

    Attributes:
        tokens: [B, T] int64 inputs.
        targets: [B, T] int64, what to predict at each position; -100 where nothing is scored.
        cu_seqlens: [N+1] int32 offsets of packed sequences, with B == 1; None where each row is one sequence.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """B * T."""
        return self.tokens.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; the copy does not wait where the tensors are pinned."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True)
        tokens, targets = (x.to(device, non_blocking=True) for x in (self.tokens, self.targets))
        return Batch(tokens=tokens, targets=targets, cu_seqlens=cu_seqlens)
