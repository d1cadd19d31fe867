"""The training loop, its loss, optimizers, schedules, checkpoints and metrics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimi_linear.training.checkpoint import latest, load_checkpoint, save_checkpoint, step_folders
    from kimi_linear.training.config import TrainConfig
    from kimi_linear.training.loss import linear_cross_entropy
    from kimi_linear.training.metrics import StepMetrics, read_metrics
    from kimi_linear.training.optimizers import Optimizers, balance_experts, build_optimizers
    from kimi_linear.training.schedules import cosine, lr_factor, wsd
    from kimi_linear.training.trainer import NonFiniteError, Trainer

_HOMES = {
    "NonFiniteError": "trainer",
    "Optimizers": "optimizers",
    "StepMetrics": "metrics",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "balance_experts": "optimizers",
    "build_optimizers": "optimizers",
    "cosine": "schedules",
    "latest": "checkpoint",
    "linear_cross_entropy": "loss",
    "load_checkpoint": "checkpoint",
    "lr_factor": "schedules",
    "read_metrics": "metrics",
    "save_checkpoint": "checkpoint",
    "step_folders": "checkpoint",
    "wsd": "schedules",
}

__all__ = [
    "NonFiniteError",
    "Optimizers",
    "StepMetrics",
    "TrainConfig",
    "Trainer",
    "balance_experts",
    "build_optimizers",
    "cosine",
    "latest",
    "linear_cross_entropy",
    "load_checkpoint",
    "lr_factor",
    "read_metrics",
    "save_checkpoint",
    "step_folders",
    "wsd",
]


def __getattr__(name: str) -> object:
    # Lazily, so that a command line that only wants TrainConfig does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
