"""Every knob of a training run, in one dataclass that is also the command line's flags."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. The same configuration, data and seed give the same weights, bit for bit on a CPU."""

    steps: int = 1000
    """Updates of the weights in all; a resumed run goes on to this number."""
    batch_size: int = 16
    """Sequences per step."""
    sequence_length: int = 256
    """Tokens per sequence; a packed batch has batch_size times as many, in sequences of at most this length."""
    packing: Literal["rows", "packed"] = "rows"
    """How text is cut: "rows" of equal length (fastest for small models), or "packed" documents that never see each other."""
    lr: float = 2e-3
    """Peak learning rate, of AdamW and of Muon alike."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's running mean and running square."""
    momentum: float = 0.95
    """Momentum of Muon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, of matrices only: not of norms, gate rates and other small parameters."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """Learning rate over the run: warm-up, stable, decay; or warm-up and half a cosine."""
    warmup: float = 0.02
    """Share of the steps in which the learning rate rises."""
    decay: float = 0.3
    """Share of the steps, at the end, in which "wsd" falls."""
    min_lr: float = 0.1
    """Learning rate of the last step, as a share of the peak."""
    grad_clip: float = 1.0
    """Largest norm of all gradients together; 0 does not clip."""
    balance_rate: float = 1e-3
    """Step of the bias that balances the load of experts, where the model has experts; 0 leaves it alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights and optimizer are fp32 either way."""
    seed: int = 0
    """Of the order of the data."""
    device: str = "auto"
    """Where to train: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one."""
    eval_every: int = 100
    """Steps between validations; there is one after the last step too. 0 for none."""
    eval_batches: int = 16
    """Batches of one validation, at most."""
    save_every: int = 500
    """Steps between checkpoints; the end, and Ctrl-C, make one too. 0 for only those."""
    keep: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard events too (needs the "train" extra)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "eval_batches", "log_every"):
            _expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("eval_every", "save_every", "keep", "grad_clip", "weight_decay", "balance_rate", "seed"):
            _expect(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("warmup", "decay", "min_lr"):
            _expect(0 <= getattr(self, name) <= 1, name, "a share in [0, 1]", getattr(self, name))
        _expect(self.lr > 0, "lr", "a positive number", self.lr)
        _expect(self.warmup + self.decay <= 1, "warmup + decay", "at most 1", self.warmup + self.decay)
        for name, value in (("betas", self.betas), ("momentum", (self.momentum,))):
            _expect(all(0 <= b < 1 for b in value), name, "numbers in [0, 1)", value)
        hints = get_type_hints(TrainConfig)
        for name in ("packing", "optimizer", "schedule", "precision"):
            options = sorted(get_args(hints[name]))
            _expect(getattr(self, name) in options, name, f"one of {', '.join(options)}", getattr(self, name))


MAY_CHANGE = frozenset(
    ("steps", "device", "eval_every", "eval_batches", "save_every", "keep", "log_every", "tensorboard")
)
"""Fields that a resumed run may set anew. A new ``steps`` moves the end of the schedule."""


def check_same(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raise ``ValueError`` where a resumed run would silently be another run than the saved one."""
    for field in fields(config):
        ours, theirs = getattr(config, field.name), saved.get(field.name)
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        if field.name not in MAY_CHANGE and ours != theirs:
            raise ValueError(
                f"{field.name}: expected {theirs!r} as in the run that is resumed, got {ours!r}; use that value, or train "
                "in a new folder"
            )


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
