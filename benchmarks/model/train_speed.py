"""Training speed of the small hybrid and of its full-attention twin: whole steps, in tokens per second.

    python -m benchmarks.model.train_speed            (from the repository root)

A step is forward, loss, backward, gradient clipping and optimizer, on rows of B x T bytes of the standard library. The
two models take turns step by step, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
import tyro

from benchmarks._report import write_report
from kimi_linear.config import ModelConfig
from kimi_linear.data import IGNORE, Batch, ByteTokenizer, CorpusStream, stdlib_source, tokenize
from kimi_linear.model import KimiLinear
from kimi_linear.studies.report.machine import physical_cores


@dataclass(frozen=True, kw_only=True)
class Args:
    """Flags."""

    preset: str = "tiny"
    """The hybrid; its twin is preset/mla."""
    batch_size: int = 16
    """B, rows per step."""
    sequence_length: int = 256
    """T, bytes per row."""
    warm_up: int = 3
    """Steps of each model before the clock starts."""
    steps: int = 20
    """Steps of each model that are timed."""
    device: str = "cpu"
    """Device."""
    threads: int | None = None
    """CPU threads; the physical cores where None."""


class Training:
    """One model and its optimizer; ``step`` is what is timed."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        self.model = KimiLinear(config, seed=0).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95))

    def step(self, batch: Batch) -> float:
        """One training step; returns its seconds."""
        since = time.perf_counter()
        loss = F.cross_entropy(self.model(batch.tokens).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if not loss.isfinite():  # also waits for an accelerator
            raise RuntimeError(f"loss: expected a finite number, got {loss.item()}; a wrong step's speed says nothing")
        return time.perf_counter() - since


def check(model: KimiLinear, batch: Batch) -> float:
    """Relative error of the fast path's logits against the reference's; refuses to go on above fp32 rounding."""
    tokens = batch.tokens[:2]
    with torch.no_grad():
        fast = model(tokens).double()
        model.set_impl("reference")
        exact = model(tokens).double()
        model.set_impl("auto")
    error = float((fast - exact).norm() / exact.norm())
    if not error < 1e-4:
        raise RuntimeError(f"logits: expected those of the reference within 1e-4, got a relative error of {error:.1e}")
    return error


def main() -> None:
    """Check, measure, write the page."""
    args = tyro.cli(Args)
    torch.set_num_threads(args.threads or physical_cores())
    corpus = tokenize(stdlib_source(max_bytes=4_000_000), ByteTokenizer())
    stream = CorpusStream(
        corpus, batch_size=args.batch_size, sequence_length=args.sequence_length, packing="rows", seed=0
    )
    names = {"hybrid": args.preset, "full attention with RoPE": f"{args.preset}/mla"}
    runs = {name: Training(ModelConfig.preset(preset), args.device) for name, preset in names.items()}
    error = check(runs["hybrid"].model, next(stream).to(args.device))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.warm_up + args.steps):
        batch = next(stream).to(args.device)
        for name, run in runs.items():
            seconds = run.step(batch)
            if i >= args.warm_up:
                times[name].append(seconds)
    tokens = args.batch_size * args.sequence_length
    rows = []
    for name, run in runs.items():
        middle = median(times[name])
        spread = f"{tokens / max(times[name]):,.0f} to {tokens / min(times[name]):,.0f}"
        parameters = sum(p.numel() for p in run.model.parameters())
        layers = " ".join(run.model.config.layer_mixers)
        rows.append([name, layers, f"{parameters:,}", f"{tokens / middle:,.0f}", spread, f"{middle * 1e3:.1f}"])
    write_report(
        "train_speed",
        title=f"Training speed, {args.preset}, B={args.batch_size}, T={args.sequence_length}, fp32",
        about=(
            "Whole steps: forward, loss, backward, clipping, AdamW. Median of "
            f"{args.steps} steps after {args.warm_up}, the models in turns. Before the clock started, the hybrid's logits "
            f"were within {error:.1e} (relative) of the reference recurrence's."
        ),
        columns=["model", "layers", "parameters", "tokens/s", "slowest to fastest step", "ms per step"],
        rows=rows,
        device=args.device,
    )


if __name__ == "__main__":
    main()
