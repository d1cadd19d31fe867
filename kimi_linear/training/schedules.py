"""Learning rate over a run, as pure functions from the step to a factor of the peak."""

from __future__ import annotations

import math

from kimi_linear.training.config import TrainConfig


def wsd(step: int, *, steps: int, warmup: int, decay: int, floor: float) -> float:
    """Warm-up, stable, decay: a linear rise, the peak, and a straight line down to ``floor`` at the last step.

    Args:
        step: from 0 to ``steps - 1``.
        steps: of the whole run.
        warmup: steps of the rise; step ``warmup - 1`` is the first at the peak.
        decay: steps of the fall; the last of them is at ``floor``.
        floor: factor of the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    falling = step - (steps - decay) + 1
    return 1.0 if falling <= 0 else floor + (1.0 - floor) * (1.0 - falling / decay)


def cosine(step: int, *, steps: int, warmup: int, floor: float) -> float:
    """A linear rise, then half a cosine from the peak down to ``floor`` at the last step. Arguments as ``wsd``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / (steps - warmup)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def lr_factor(step: int, config: TrainConfig) -> float:
    """The configured schedule at ``step``, counted from 0."""
    warmup = round(config.warmup * config.steps)
    if config.schedule == "cosine":
        return cosine(step, steps=config.steps, warmup=warmup, floor=config.min_lr)
    decay = round(config.decay * config.steps)
    return wsd(step, steps=config.steps, warmup=warmup, decay=decay, floor=config.min_lr)
