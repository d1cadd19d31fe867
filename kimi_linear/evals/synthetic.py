"""Accuracy on tasks with one right answer per scored place: by token, and by sequence (every answer right).

The tasks are those of arXiv 2510.26692 section 5.1. Chance shows by token; by sequence it is nought, which is how
the paper's exact zeros read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.data import IGNORE, Batch, Task
from kimi_linear.evals.protocol import Result, Sampler


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Counts of right answers; counts of several batches add up."""

    right: int = 0
    """Scored tokens answered rightly."""
    scored: int = 0
    """Scored tokens."""
    exact: int = 0
    """Sequences with every answer right."""
    sequences: int = 0
    """Sequences with at least one scored token."""

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(
            right=self.right + other.right,
            scored=self.scored + other.scored,
            exact=self.exact + other.exact,
            sequences=self.sequences + other.sequences,
        )

    @property
    def by_token(self) -> float:
        """Share of scored tokens answered rightly."""
        return self.right / self.scored

    @property
    def by_sequence(self) -> float:
        """Share of sequences with every answer right."""
        return self.exact / self.sequences


def accuracy(logits: Float[Tensor, "B T vocab"], targets: Int[Tensor, "B T"]) -> Accuracy:
    """Count the places where the likeliest token is the target.

    Args:
        logits: [B, T, vocab].
        targets: [B, T]; -100 where nothing is scored. A row without any scored place is no sequence.
    """
    scored = targets != IGNORE
    right = (logits.argmax(-1) == targets) & scored
    some = scored.any(-1)
    exact = (right == scored).all(-1) & some
    right_, scored_, exact_, some_ = torch.stack([right.sum(), scored.sum(), exact.sum(), some.sum()]).tolist()
    return Accuracy(right=right_, scored=scored_, exact=exact_, sequences=some_)


@dataclass(frozen=True, kw_only=True)
class TaskAccuracy:
    """Accuracy on sequences of a task, drawn afresh from ``seed`` and so the same for every model."""

    task: Task
    """What to draw from."""
    samples: int = 512
    """Sequences."""
    batch_size: int = 64
    """Sequences per forward pass."""
    seed: int = 2**32 - 1
    """Seed of the sequences; keep it away from the seeds of training."""
    device: torch.device | str = "cpu"
    """Where the sampler wants its tokens."""

    def __post_init__(self) -> None:
        for field in ("samples", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")

    def batches(self) -> Iterator[Batch]:
        """The sequences."""
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.samples, self.batch_size):
            yield self.task.batch(generator, min(self.batch_size, self.samples - start))

    def __call__(self, sampler: Sampler) -> Result:
        total = measure(sampler, self.batches(), self.device)
        metrics = {
            "token_accuracy": total.by_token,
            "sequence_accuracy": total.by_sequence,
            "sequences": float(total.sequences),
        }
        return Result(name=self.task.name, metrics=metrics)


@torch.inference_mode()
def measure(sampler: Sampler, batches: Iterable[Batch], device: torch.device | str = "cpu") -> Accuracy:
    """Accuracy over ``batches``, one sequence per row.

    Raises:
        ValueError: a batch is packed (rows are what is counted), or nothing at all is scored.
    """
    total = Accuracy()
    for batch in batches:
        if batch.cu_seqlens is not None:
            raise ValueError("batches: expected one sequence per row, got packed sequences (cu_seqlens)")
        total += accuracy(sampler(batch.tokens.to(device)), batch.targets.to(device))
    if total.scored == 0:
        raise ValueError("batches: expected at least one scored target, got none")
    return total
