"""What an evaluation is: a function from a sampler to a result. It knows no trainer and no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor


class Sampler(Protocol):
    """Anything that gives logits for tokens: a model, or an engine's wrapper of one."""

    def __call__(
        self, tokens: Int[Tensor, "B T"], *, cu_seqlens: Int[Tensor, "N1"] | None = None
    ) -> Float[Tensor, "B T vocab"]:
        """Logits [B, T, vocab] of the token after each of ``tokens`` [B, T]; packed sequences with ``cu_seqlens``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an evaluation measured."""

    name: str
    """Which evaluation."""
    metrics: Mapping[str, float]
    """The headline numbers."""
    rows: tuple[Mapping[str, Any], ...] = field(default=())
    """A table, one mapping of column to value per row; all rows have the same columns."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"metrics": dict(self.metrics), "rows": [dict(row) for row in self.rows]}


class Eval(Protocol):
    """An evaluation, configured: give it a sampler, get a result."""

    def __call__(self, sampler: Sampler) -> Result:
        """Run it. The same sampler gives the same result every time."""
        ...
