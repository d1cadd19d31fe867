"""Batches and packed sequences as one list of chunks, in the order in which a scan over time visits them.

Sequences are sorted by length, longest first; chunk step j of every sequence that has one forms a contiguous run of
rows. So a scan's step j reads rows ``start : start + active[j]`` and updates the states of the first ``active[j]``
sequences: no mask, no branch, no padding but inside a sequence's last chunk.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Where each token lies.

    Attributes:
        batch, tokens: B and T of the inputs.
        chunk: C, tokens per chunk.
        lengths: tokens of each sequence, as given.
        starts: first token of each sequence in the flattened [B*T] tokens.
        device: where index tensors are made.
    """

    batch: int
    tokens: int
    chunk: int
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(x: Tensor, chunk: int, cu_seqlens: Tensor | None) -> ChunkLayout:
        """The layout of inputs like ``x`` [B, T, ...]."""
        batch, tokens = x.shape[:2]
        bounds = [i * tokens for i in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
        lengths = tuple(stop - start for start, stop in itertools.pairwise(bounds))
        return ChunkLayout(batch, tokens, chunk, lengths, tuple(bounds[:-1]), x.device)

    @cached_property
    def order(self) -> list[int]:
        """Sequences, longest first."""
        return sorted(range(len(self.lengths)), key=lambda n: -self.lengths[n])

    @cached_property
    def active(self) -> list[int]:
        """How many sequences have a chunk at each step; never rising."""
        counts = [-(-length // self.chunk) for length in self.lengths]
        return [sum(c > step for c in counts) for step in range(max(counts, default=0))]

    @property
    def rows(self) -> int:
        """Chunks in all."""
        return sum(self.active)

    @property
    def is_grid(self) -> bool:
        """Every sequence a whole batch row: chunks are a view, of padded rows where T is not a multiple of C."""
        return self.lengths == (self.tokens,) * self.batch and self.tokens > 0

    @cached_property
    def places(self) -> Tensor:
        """Flat token of every place in the chunks [rows * C], or B*T where a place is padding."""
        padding = self.batch * self.tokens
        offsets = torch.arange(self.chunk)
        places = []
        for step, count in enumerate(self.active):
            for n in self.order[:count]:
                inside = step * self.chunk + offsets
                places.append(torch.where(inside < self.lengths[n], self.starts[n] + inside, padding))
        return torch.cat(places).to(self.device) if places else torch.empty(0, dtype=torch.long, device=self.device)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [rows * H, C, ...], zeros in the padding. Differentiable."""
        if self.is_grid:
            missing = -self.tokens % self.chunk
            if missing:
                x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
            grid = x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, *range(4, x.ndim + 1))
            return grid.reshape(-1, self.chunk, *x.shape[3:])
        flat = torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])])
        return flat[self.places].unflatten(0, (-1, self.chunk)).transpose(1, 2).flatten(0, 1)

    def join(self, chunks: Tensor, heads: int) -> Tensor:
        """[rows * H, C, ...] -> [B, T, H, ...], the inverse of ``split``. Differentiable."""
        chunks = chunks.unflatten(0, (-1, heads))
        if self.is_grid:
            grid = chunks.unflatten(0, (-1, self.batch)).permute(1, 0, 3, 2, *range(4, chunks.ndim + 1))
            return grid.reshape(self.batch, -1, heads, *chunks.shape[3:])[:, : self.tokens]
        tokens = chunks.transpose(1, 2).flatten(0, 1)
        back = torch.empty(self.batch * self.tokens + 1, dtype=torch.long, device=self.device)
        back[self.places] = torch.arange(len(tokens), device=self.device)
        return tokens[back[:-1]].unflatten(0, (self.batch, self.tokens))

    def sort(self, states: Tensor) -> Tensor:
        """[N, H, ...] -> [N * H, ...], longest sequence first. Differentiable."""
        if self.order != list(range(len(self.order))):
            states = states[torch.tensor(self.order, device=self.device)]
        return states.flatten(0, 1)

    def unsort(self, states: Tensor, heads: int) -> Tensor:
        """The inverse of ``sort``. Differentiable."""
        states = states.unflatten(0, (-1, heads))
        if self.order == list(range(len(self.order))):
            return states
        return states[torch.tensor(self.order, device=self.device).argsort()]
