"""Many small models trained at once on one GPU: each is a lane, a stream that replays one captured training step.

A step of such a model is hundreds of kernels that fill a fraction of the chip for microseconds. One graph per step takes
the host out of the way, and streams let the kernels of different models run beside each other. Nothing waits: batches are
drawn on the device, counts of right answers stay there, and the host reads them once per point of the curve. On a CPU a lane runs the
same step eagerly.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_linear.config import ModelConfig
from kimi_linear.data import IGNORE, MQAR, Palindrome, Stack
from kimi_linear.model import KimiLinear
from kimi_linear.model.parameters import RMSNorm
from kimi_linear.training import TrainConfig, build_optimizers

BURST = 10
"""Steps that are enqueued together; a lane has at most two bursts ahead of it, so that no lane waits for the host long."""
POOL_NUMBERS = 1 << 23
"""Tokens that are drawn at a time, 64 MiB of them: the stacks' generator takes thousands of launches."""
PROGRESS = 0.01
"""Part of the loss that has to go for a training to be getting on."""
DECAYS = ("A_log", "dt_bias")
GATES = ("f_a_proj.weight", "f_b_proj.weight", ".a_proj.weight")
"""What makes the forgetting gate of a token: KDA's projections, and that of GDN and Mamba-2."""
WARM_STEPS = 3
"""Eager steps before a capture: kernels compile, libraries allocate, the optimizer makes its state."""


@dataclass(frozen=True, kw_only=True)
class LaneConfig:
    """One training."""

    task: Palindrome | MQAR | Stack
    """What is learned; every batch is fresh."""
    model: ModelConfig
    """What learns it."""
    lr: float
    """Learning rate after the warm-up."""
    seed: int
    """Of the first weights and of the sequences; these are the same for every model and learning rate."""
    steps: int
    """Most steps."""
    batch_size: int
    """Sequences per step."""
    warmup: int
    """Steps in which the learning rate rises."""
    schedule: str
    """Afterwards: "constant", or half a "cosine" down to a tenth."""
    weight_decay: float
    """Of matrices."""
    grad_clip: float
    """Largest norm of the gradient."""
    dt_shift: float
    """Added to every dt_bias at the start; -1 makes memories live about 2.7 times as long."""
    decay_rate: float
    """Learning rate of A_log and dt_bias, in learning rates of the rest."""
    gate_rate: float
    """Learning rate of the projections to the forgetting gate, in learning rates of the rest."""
    point_every: int
    """Steps per point of the curve."""
    until: float
    """A point with this share of sequences all right counts as solved."""
    patience: int
    """Solved points in a row that end the training."""
    flat: int
    """Steps without progress that end it, while no sequence is right."""
    bf16: bool
    """Autocast to bf16; weights and optimizer are fp32 either way."""

    @property
    def pool_steps(self) -> int:
        """Batches drawn at a time."""
        return max(1, min(256, POOL_NUMBERS // (self.batch_size * self.task.sequence_length)))


@dataclass(frozen=True, kw_only=True)
class Point:
    """Means over the batches since the point before, each measured before its own update, so on unseen sequences."""

    step: int
    loss: float
    token_accuracy: float
    sequence_accuracy: float


@dataclass
class Curve:
    """What is known of one training."""

    points: list[Point] = field(default_factory=list)
    seconds: float = 0.0
    hardware: list[str] = field(default_factory=list)
    """What it was trained on, in this order; a checkpoint may have gone on elsewhere."""

    def ended(self, config: LaneConfig) -> str | None:
        """Why the training is over: "solved", "steps", "flat", "diverged"; None while it is not."""
        last = self.points[-config.patience :]
        if self.points and not math.isfinite(self.points[-1].loss):
            return "diverged"
        if len(last) == config.patience and all(p.sequence_accuracy >= config.until for p in last):
            return "solved"
        if self.points and self.points[-1].step >= config.steps:
            return "steps"
        return "flat" if self._flat(config.flat) else None

    def _flat(self, steps: int) -> bool:
        """Whether nothing came of the last ``steps`` steps, nor of those before."""
        before = [p.loss for p in self.points if p.step <= self.points[-1].step - steps]
        recent = [p.loss for p in self.points[len(before) :]]
        wrong = all(p.sequence_accuracy == 0 for p in self.points)
        return bool(before) and wrong and min(recent) > (1 - PROGRESS) * min(before)


class Lane:
    """One training in progress on its own stream.

    ``advance`` enqueues steps without waiting; ``poll`` takes in what has been measured meanwhile. Steps that were enqueued
    beyond the end of a training belong to no point.

    Attributes:
        step: steps enqueued.
        stream: as given.
        curve: measured so far.
    """

    def __init__(
        self,
        config: LaneConfig,
        device: torch.device,
        saved: Mapping[str, Any] | None = None,
        *,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """``saved`` is from ``state`` of a lane with the same configuration, which this one continues.

        ``stream`` of a CUDA device, which no other lane has; without one the lane trains eagerly.
        """
        self.config, self.device = config, device
        self.model = KimiLinear(config.model, seed=config.seed)
        _shift_dt_bias(self.model, config.dt_shift)
        if config.bf16:
            _round_once(self.model)
        self.model.to(device).train()
        self._rounded = _rounded_weights(self.model) if config.bf16 else []
        self.curve = Curve()
        self.step = 0
        self._generator = torch.Generator(device)
        size = (config.pool_steps, config.batch_size, config.task.sequence_length)
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._targets = torch.full_like(self._tokens, IGNORE)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._count = torch.zeros((), dtype=torch.float32, device=device)
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._lr = torch.zeros((), dtype=torch.float32, device=device)
        self._decay_lr, self._gate_lr = torch.zeros_like(self._lr), torch.zeros_like(self._lr)
        self._optimizer = _adamw(self.model, config, self._lr, self._decay_lr, self._gate_lr)
        self.stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ahead: deque[Any] = deque()  # events of CUDA
        self._measured: deque[tuple[int, Tensor, Any]] = deque()  # with an event, or None on a CPU
        if self.stream is not None:
            self._capture(self.stream)
        if saved is not None:
            self._restore(saved)

    def advance(self) -> bool:
        """Enqueue the next few steps; False where enough are ahead or there is nothing left to do."""
        if self.step >= self.config.steps or self.curve.ended(self.config):
            return False
        while self._ahead and self._ahead[0].query():
            self._ahead.popleft()
        if len(self._ahead) >= 2:
            return False
        with _on(self.stream):
            for _ in range(min(BURST, self.config.steps - self.step)):
                self._one_step()
            if self.stream is not None:
                self._ahead.append(self.stream.record_event())
        return True

    def poll(self, *, wait: bool = False) -> list[Point]:
        """The points that were measured since the last call; ``wait`` for all that is enqueued."""
        if wait and self.stream is not None:
            self.stream.synchronize()
        found = []
        while self._measured and (self._measured[0][2] is None or self._measured[0][2].query()):
            step, sums, _ = self._measured.popleft()
            if self.curve.ended(self.config) is None:
                loss, right, scored, exact, sequences = sums.tolist()
                found.append(
                    Point(
                        step=step,
                        loss=loss / (step - (self.curve.points[-1].step if self.curve.points else 0)),
                        token_accuracy=right / scored if scored else 0.0,
                        sequence_accuracy=exact / sequences if sequences else 0.0,
                    )
                )
                self.curve.points.append(found[-1])
        return found

    def state(self) -> dict[str, Any]:
        """All that a lane with the same configuration needs to continue, on the CPU; call ``poll(wait=True)`` before."""
        assert not self._measured, "points not taken in would be lost"
        if not self._optimizer.state:  # before the first step
            _make_state(self._optimizer)
        return {
            "step": self.step,
            "seconds": self.curve.seconds,
            "hardware": list(self.curve.hardware),
            "points": [[p.step, p.loss, p.token_accuracy, p.sequence_accuracy] for p in self.curve.points],
            "tensors": [x.detach().cpu().clone() for x in self._lasting()],
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self.step = saved["step"]
        names = ("step", "loss", "token_accuracy", "sequence_accuracy")
        points = [Point(**dict(zip(names, point, strict=True))) for point in saved["points"]]
        hardware = saved.get("hardware", ["not recorded"])  # as in checkpoints from before it was
        self.curve = Curve(points=points, seconds=saved["seconds"], hardware=list(hardware))
        with _on(self.stream), torch.no_grad():
            if not self._optimizer.state:
                _make_state(self._optimizer)
            for mine, theirs in zip(self._lasting(), saved["tensors"], strict=True):
                mine.copy_(theirs)
            if self.step % self.config.pool_steps:
                self._draw(self.step // self.config.pool_steps)
                self._place.fill_(self.step % self.config.pool_steps)
        if self.stream is not None:
            self.stream.synchronize()

    def _lasting(self) -> list[Tensor]:
        """What a step leaves to the next: weights, AdamW's means and steps, counters, sums."""
        parameters = list(self.model.parameters())
        kept: list[Tensor] = [p.data for p in parameters]
        for p in parameters:
            if self._optimizer.state:
                kept += [self._optimizer.state[p][name] for name in ("step", "exp_avg", "exp_avg_sq")]
        return [*kept, self._count, self._sums]

    def _one_step(self) -> None:
        if self.step % self.config.pool_steps == 0:
            self._draw(self.step // self.config.pool_steps)
        if self._graph is None:
            self._train()
        else:
            self._graph.replay()
        self.step += 1
        if self.step % self.config.point_every == 0 or self.step == self.config.steps:
            self._measure()

    def _draw(self, number: int) -> None:
        """Fill the pool. Its content depends on task, seed and number alone: a resumed lane and its rivals see the same."""
        task, size = self.config.task, self._tokens.shape
        self._generator.manual_seed(zlib.crc32(f"{task!r} seed {self.config.seed} pool {number}".encode()))
        batch = task.batch(self._generator, size[0] * size[1])
        self._tokens.copy_(batch.tokens.view(size))
        self._targets.copy_(batch.targets.view(size))
        self._place.zero_()

    def _train(self) -> None:
        """One step, without a word to the host."""
        config = self.config
        self._optimizer.zero_grad(set_to_none=True)
        tokens = self._tokens.index_select(0, self._place)[0]
        targets = self._targets.index_select(0, self._place)[0, :, config.task.scored]
        scored = targets != IGNORE
        with self._with_rounded_weights():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
                logits = self.model.logits_of(self._scored(tokens)).float()
            total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
            loss = total / scored.sum().clamp(min=1)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip, foreach=True)
        self._set_rate()
        self._optimizer.step()
        right = (logits.detach().argmax(-1) == targets) & scored
        some = scored.any(-1)
        exact = (right == scored).all(-1) & some
        counts = torch.stack([right.sum(), scored.sum(), exact.sum(), some.sum()])
        self._sums += torch.cat([loss.detach().double()[None], counts.double()])
        self._place += 1

    @contextmanager
    def _with_rounded_weights(self) -> Iterator[None]:
        """Projections in bf16 meanwhile, rounded in one kernel, and their gradients in fp32 after it; autocast takes two for each."""
        if not self._rounded:
            yield
            return
        projections, weights, rounded = zip(*self._rounded, strict=True)
        with torch.no_grad():
            torch._foreach_copy_(rounded, weights)
        try:
            for projection, copy in zip(projections, rounded, strict=True):
                copy.grad, projection.weight = None, copy
            yield
        finally:
            for projection, weight in zip(projections, weights, strict=True):
                projection.weight = weight
        gradients = [torch.empty_like(weight) for weight in weights]
        with torch.no_grad():
            torch._foreach_copy_(gradients, [copy.grad for copy in rounded])
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient

    def _scored(self, tokens: Tensor) -> Tensor:
        """The model's hidden states where a target may be; what follows its last mixer looks at one token alone, so only there."""
        x = self.model.model.embed_tokens(tokens)
        for block in self.model.blocks[:-1]:
            x = block(x)
        last = self.model.blocks[-1]
        x = (x + last.self_attn(last.input_layernorm(x)))[:, self.config.task.scored].contiguous()
        return self.model.model.norm(x + last.feed_forward(last.post_attention_layernorm(x)))

    def _set_rate(self) -> None:
        """The learning rates of this step, on the device: a number from the host would be captured for ever."""
        config = self.config
        self._count += 1
        rate = (self._count / max(1, config.warmup)).clamp(max=1.0)
        if config.schedule == "cosine":
            done = ((self._count - config.warmup) / max(1, config.steps - config.warmup)).clamp(0.0, 1.0)
            rate = rate * (0.55 + 0.45 * torch.cos(math.pi * done))
        self._lr.copy_(config.lr * rate)
        self._decay_lr.copy_(config.lr * config.decay_rate * rate)
        self._gate_lr.copy_(config.lr * config.gate_rate * rate)

    def _measure(self) -> None:
        if self.stream is None:
            self._measured.append((self.step, self._sums.clone(), None))
        else:
            sums = torch.empty(self._sums.shape, dtype=self._sums.dtype, pin_memory=True)
            sums.copy_(self._sums, non_blocking=True)
            self._measured.append((self.step, sums, self.stream.record_event()))
        self._sums.zero_()

    def _capture(self, stream: torch.cuda.Stream) -> None:
        """Record ``_train``. The warm-up before it really trains, so what it changed is put back."""
        before = [x.clone() for x in self._lasting()]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._draw(0)
            with _tf32(self.config.bf16):
                for _ in range(WARM_STEPS):
                    self._train()
                    self._place.zero_()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _tf32(self.config.bf16), torch.cuda.graph(graph, stream=stream):
            self._train()
        with torch.cuda.stream(stream), torch.no_grad():
            for state in self._optimizer.state.values():
                for x in state.values():
                    x.zero_()
            parameters = len(list(self.model.parameters()))
            now = self._lasting()
            for mine, then in zip([*now[:parameters], *now[-2:]], before, strict=True):
                mine.copy_(then)
        stream.synchronize()
        self._graph = graph


def run_lanes(lanes: list[Lane]) -> bool:
    """Let every lane go on a little, and sleep for a moment where none can; whether any could."""
    moved = [lane.advance() for lane in lanes]
    if not any(moved):
        time.sleep(2e-4)
    return any(moved)


def _adamw(model: KimiLinear, config: LaneConfig, lr: Tensor, decay_lr: Tensor, gate_lr: Tensor) -> torch.optim.AdamW:
    """AdamW over the groups that all our trainings have, the forgetting gate's apart, with rates and steps on the device."""
    rules = TrainConfig(weight_decay=config.weight_decay, lr=config.lr)
    groups = build_optimizers(model, rules).parts["adamw"].param_groups
    own = {id(p): rate for names, rate in ((DECAYS, decay_lr), (GATES, gate_lr)) for p in _named(model, names)}
    groups = [
        {"params": part, "weight_decay": group["weight_decay"], "lr": rate}
        for group in groups
        for rate in (lr, decay_lr, gate_lr)
        if (part := [p for p in group["params"] if own.get(id(p), lr) is rate])
    ]
    on_gpu = lr.is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=rules.betas, fused=True, capturable=on_gpu)


def _named(model: KimiLinear, names: tuple[str, ...]) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith(names)]


def _make_state(optimizer: torch.optim.AdamW) -> None:
    """AdamW's state before its first step, in which it would make it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            means = {name: torch.zeros_like(p.data) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **means}


def _round_once(model: KimiLinear) -> None:
    """Let the norms between stream and projections hand out bf16: autocast would round their result in each projection anew."""
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and not name.endswith("o_norm"):
            module.output_dtype = torch.bfloat16


def _rounded_weights(model: KimiLinear) -> list[tuple[nn.Linear, Tensor, nn.Parameter]]:
    """Every projection, its weight, and a place for that in bf16."""
    projections = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [(p, p.weight, nn.Parameter(p.weight.detach().bfloat16())) for p in projections]


@contextmanager
def _tf32(enabled: bool) -> Iterator[None]:
    """Products of fp32 numbers on the matrix units meanwhile: Mamba-2's in plain torch, which autocast leaves alone."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = enabled or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.no_grad()
def _shift_dt_bias(model: KimiLinear, shift: float) -> None:
    for name, parameter in model.named_parameters():
        if shift and name.endswith("dt_bias"):
            parameter += shift


def _on(stream: torch.cuda.Stream | None) -> Any:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def save_lane(lane: Lane, settings: Mapping[str, Any], path: Path) -> None:
    """Write the lane's state so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    torch.save({"settings": dict(settings), **lane.state()}, unfinished)
    unfinished.replace(path)


def load_lane(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``save_lane`` left, or None where there is nothing.

    Raises:
        ValueError: the file is damaged, or belongs to other settings.
    """
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["settings"]
    except Exception as error:
        raise ValueError(
            f"{path}: expected a checkpoint of this study, got {error!r}; delete it to begin anew"
        ) from error
    if theirs != dict(settings):
        names = sorted(n for n in {*settings, *theirs} if settings.get(n) != theirs.get(n))
        raise ValueError(
            f"{path}: expected the settings of now, got others for {', '.join(names)}; give another --checkpoints, or delete it"
        )
    return saved
