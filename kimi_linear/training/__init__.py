"""The training loop, its loss, optimizers, schedules, checkpoints and metrics."""

from kimi_linear.training.checkpoint import latest, load_checkpoint, save_checkpoint, step_folders
from kimi_linear.training.config import TrainConfig
from kimi_linear.training.loss import linear_cross_entropy
from kimi_linear.training.metrics import StepMetrics, read_metrics
from kimi_linear.training.optimizers import Optimizers, balance_experts, build_optimizers
from kimi_linear.training.schedules import cosine, lr_factor, wsd
from kimi_linear.training.trainer import NonFiniteError, Trainer

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
