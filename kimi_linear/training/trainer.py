"""The training loop: a generator of steps that can be left at any time and taken up again exactly."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kimi_linear.data import IGNORE, Batch, BatchStream, Corpus, CorpusStream, Task, TaskStream, Tokenizer, in_order
from kimi_linear.model import KimiLinear
from kimi_linear.training.checkpoint import latest, load_checkpoint, remove_unfinished, save_checkpoint
from kimi_linear.training.config import TrainConfig, check_same
from kimi_linear.training.loss import linear_cross_entropy
from kimi_linear.training.metrics import MetricsLog, StepMetrics
from kimi_linear.training.optimizers import balance_experts, build_optimizers
from kimi_linear.training.schedules import lr_factor

TrainData: TypeAlias = Corpus | Task | BatchStream
ValidationData: TypeAlias = Corpus | Task | Iterable[Batch]

_SPEED_WINDOW = 50
"""Steps over which the speed is averaged."""


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is NaN or infinite. The weights are those of the step before."""


class Trainer:
    """Trains a model, step by step.

    ``for metrics in Trainer(...).run(): ...`` trains; leaving the loop, by Ctrl-C or otherwise, saves a checkpoint. A
    ``Trainer`` over a folder that holds checkpoints takes up the newest: on a CPU the losses are then the same, bit for
    bit, as of a run that was never interrupted.

    Attributes:
        step: steps done.
        tokens: tokens read.
    """

    def __init__(
        self,
        model: KimiLinear,
        tokenizer: Tokenizer | None,
        train_data: TrainData,
        val_data: ValidationData | None,
        config: TrainConfig,
        folder: str | Path,
        *,
        resume: bool = True,
    ) -> None:
        """Args:
            model: fp32, trained in place, and moved to the configured device.
            tokenizer: saved with every checkpoint; None for synthetic tasks.
            train_data: a corpus or task, from which batches are made as ``config`` says, or a stream of batches.
            val_data: a corpus, a task, or batches that can be iterated again and again; None for no validation.
            config: of the training.
            folder: of the run: checkpoints and metrics.
            resume: take up the newest checkpoint in ``folder``; else a folder with checkpoints is an error.

        Raises:
            ValueError: a model that is not fp32, or settings or data other than those of the run that is resumed.
            CheckpointError: the newest checkpoint is damaged. FileExistsError: checkpoints, and ``resume`` is False.
        """  # fmt: skip
        if model.dtype != torch.float32:
            raise ValueError(
                f"model: expected fp32 weights, got {model.dtype}, in which small updates vanish; load it with "
                "dtype=torch.float32, and use precision='bf16' for the speed"
            )
        _check_vocabulary("train_data", train_data, model)
        _check_vocabulary("val_data", val_data, model)
        self.config, self.folder, self.tokenizer = config, Path(folder), tokenizer
        self.device = _device(config.device, model)
        self.model = model.to(self.device)
        self.step = self.tokens = 0
        self._stream = _stream(train_data, config)
        self._validation = _validation(val_data, config)
        self._optimizers = build_optimizers(model, config)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._times: deque[tuple[int, float]] = deque(maxlen=_SPEED_WINDOW)
        self._saved_step = 0
        self._worth_saving = True
        checkpoint = latest(self.folder)
        if checkpoint is not None:
            if not resume:
                raise FileExistsError(
                    f"folder: expected one without checkpoints, got {self.folder}, which holds {checkpoint.name}; resume "
                    "it, choose another folder, or delete that one"
                )
            self._restore(checkpoint)
        # The place in the data after the last whole step: a step that is broken off has read a batch too many.
        self._data_state = self._stream.state_dict()

    def run(self) -> Generator[StepMetrics, None, None]:
        """Train to the last step, yielding after each.

        However it ends, by the last step, by leaving the loop, by Ctrl-C or an error, a checkpoint of the last whole step
        is left. Only a non-finite loss, and a failure in the middle of an update, leave the checkpoint before.

        Raises:
            NonFiniteError: the loss or gradient is not finite. OSError: a checkpoint cannot be written.
        """
        if self.step >= self.config.steps:
            return
        remove_unfinished(self.folder)
        log = MetricsLog(self.folder, step=self.step, tensorboard=self.config.tensorboard)
        try:
            while self.step < self.config.steps:
                metrics = self._one_step()
                if self._due(self.config.log_every) or metrics.val_loss is not None or self._at_end:
                    log.write(metrics)
                if self._due(self.config.save_every):
                    self.save()
                yield metrics
        finally:
            log.close()
            if self._worth_saving and self.step != self._saved_step:
                self.save()

    def save(self) -> Path:
        """Write a checkpoint of the last whole step. Returns its folder, which ``kimi_linear.load`` reads."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "config": dataclasses.asdict(self.config),
            "optimizer": self._optimizers.state_dict(),
            "data": self._data_state,
            "random": _random_state(self.device),
        }
        try:
            saved = save_checkpoint(self.folder, self.step, self.model, self.tokenizer, state, keep=self.config.keep)
        except OSError:
            self._worth_saving = False  # leaving the loop would only fail again
            raise
        self._saved_step, self._worth_saving = self.step, True
        return saved

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean cross entropy over the scored tokens of the validation data, nats; None where there is none."""
        if self._validation is None:
            return None
        nats, count = 0.0, 0
        self.model.eval()
        for batch in self._validation:
            scored = int((batch.targets != IGNORE).sum())
            nats += float(self._loss(batch)) * scored
            count += scored
        self.model.train()
        if count == 0:
            raise ValueError("val_data: expected at least one scored target, got none; is the held-out text empty?")
        return nats / count

    @property
    def _at_end(self) -> bool:
        return self.step == self.config.steps

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _one_step(self) -> StepMetrics:
        began = time.perf_counter()
        lr = self.config.lr * lr_factor(self.step, self.config)
        batch = next(self._stream)
        self.model.train()
        loss = self._loss(batch)
        loss.backward()
        limit = self.config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit)
        # One wait for the device, before anything is changed.
        loss_value, norm_value = torch.stack([loss.detach().double(), norm.double()]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise self._non_finite(loss_value, norm_value)
        self._worth_saving = False
        with _interrupt_later():
            self._optimizers.step(lr)
            if self.config.balance_rate:
                balance_experts(self.model, self.config.balance_rate)
            self._data_state = self._stream.state_dict()
            self.step += 1
            self.tokens += batch.num_tokens
            self._worth_saving = True
        self._optimizers.zero_grad()
        self._times.append((batch.num_tokens, time.perf_counter() - began))
        tokens, seconds = (sum(column) for column in zip(*self._times, strict=True))
        validating = self._at_end or self._due(self.config.eval_every)
        return StepMetrics(
            step=self.step,
            loss=loss_value,
            lr=lr,
            grad_norm=norm_value,
            tokens_per_second=tokens / seconds,
            tokens=self.tokens,
            seconds_left=(self.config.steps - self.step) * seconds / len(self._times),
            val_loss=self.validate() if self.config.eval_every and validating else None,
        )

    def _loss(self, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        head = self.model.lm_head if self.model.lm_head is not None else self.model.model.embed_tokens
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            hidden = self.model.hidden_states(batch.tokens, cu_seqlens=batch.cu_seqlens)
            return linear_cross_entropy(hidden.flatten(0, 1), head.weight, batch.targets.flatten())

    def _non_finite(self, loss: float, norm: float) -> NonFiniteError:
        self._optimizers.zero_grad()
        self._worth_saving = False
        saved = latest(self.folder)
        kept = "no checkpoint was saved yet" if saved is None else f"the last good checkpoint is {saved}"
        return NonFiniteError(
            f"step {self.step + 1}: expected a finite loss and gradient, got loss {loss} and gradient norm {norm}; the "
            f"weights were not changed, and {kept}. Lower lr, raise warmup, or look at the data of this step"
        )

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.model)
        check_same(state["config"], self.config)
        self._stream.load_state_dict(state["data"])
        self._optimizers.load_state_dict(state["optimizer"])
        _set_random_state(state["random"], self.device)
        self.step, self.tokens = state["step"], state["tokens"]
        self._saved_step = self.step


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Ctrl-C waits for the end of the context: half an update is no model to save."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        handler(*received[-1])


def _device(name: str, model: KimiLinear) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if model.device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return model.device


def _check_vocabulary(name: str, data: object, model: KimiLinear) -> None:
    """Before a GPU would stop at an assertion that names nothing."""
    vocab = model.config.vocab_size
    if isinstance(data, Corpus):
        largest = int(data.tokens.numpy().max(initial=0))
    else:
        largest = getattr(data, "vocab_size", 0) - 1
    if largest >= vocab:
        raise ValueError(
            f"{name}: expected tokens below the model's vocab_size == {vocab}, got {largest}; tokenise with the model's own "
            "tokenizer, or make the model with a larger vocab_size"
        )


def _stream(data: TrainData, config: TrainConfig) -> BatchStream:
    if isinstance(data, Corpus):
        return CorpusStream(
            data,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            packing=config.packing,
            seed=config.seed,
        )
    if hasattr(data, "batch"):
        return TaskStream(data, batch_size=config.batch_size, seed=config.seed)  # type: ignore[arg-type]
    missing = [name for name in ("__next__", "state_dict", "load_state_dict") if not hasattr(data, name)]
    if missing:
        raise TypeError(
            f"train_data: expected a Corpus, a task, or an iterator of batches with state_dict and load_state_dict, got "
            f"{type(data).__name__} without {missing[0]}"
        )
    return data  # type: ignore[return-value]


def _validation(data: ValidationData | None, config: TrainConfig) -> Iterable[Batch] | None:
    if data is None or config.eval_every == 0:
        return None
    if isinstance(data, Corpus):
        return in_order(
            data,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            packing=config.packing,
            max_batches=config.eval_batches,
        )
    if hasattr(data, "batch"):
        # Another seed than training's; the same sequences at every validation.
        generator = torch.Generator().manual_seed(config.seed + (1 << 40))
        return [data.batch(generator, config.batch_size) for _ in range(config.eval_batches)]  # type: ignore[union-attr]
    if iter(data) is data:  # type: ignore[arg-type]
        raise TypeError(
            "val_data: expected batches that can be read again at every validation, got an iterator; use a list"
        )
    return data  # type: ignore[return-value]


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
