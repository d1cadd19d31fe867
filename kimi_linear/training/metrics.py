"""The record of a run: one JSON line per logged step, and TensorBoard events where asked for."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean cross entropy of the batch before the update, nats per scored token."""
    lr: float
    """Learning rate of the update."""
    grad_norm: float
    """Norm of all gradients together, before clipping."""
    tokens_per_second: float
    """Over the last steps; validation and saving not counted."""
    tokens: int
    """Tokens read since the run began, earlier processes included."""
    seconds_left: float
    """Until the last step, at this speed."""
    val_loss: float | None = None
    """Mean cross entropy on the validation data, where this step measured it."""

    @property
    def val_perplexity(self) -> float | None:
        """``exp(val_loss)``."""
        return None if self.val_loss is None else math.exp(min(self.val_loss, 700.0))


class MetricsLog:
    """Appends to ``metrics.jsonl`` in a run's folder. A resumed run first drops the lines after its checkpoint."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        """``step``: where the run stands; later lines are of steps that will be done again.

        Raises:
            ImportError: TensorBoard is asked for and not installed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if path.exists():
            _cut(path, step)
        self._writer: Any = _tensorboard(folder, step) if tensorboard else None
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Add one line, and have it on its way to the disk."""
        values = asdict(metrics)
        if metrics.val_loss is None:
            del values["val_loss"]
        else:
            values["val_perplexity"] = metrics.val_perplexity
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if name != "step":
                    self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; an unfinished last line, of a killed run, is left out."""
    text = (Path(folder) / FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _cut(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(unfinished, path)


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard: asked for, but not installed; install the extra with: pip install 'kimi-linear[train]', or "
            f"leave it off, since {FILE} holds the same numbers"
        ) from error
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)
