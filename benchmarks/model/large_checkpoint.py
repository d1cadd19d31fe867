"""The released size on one GPU: random bf16 weights made there, a prompt read, tokens decoded, every byte accounted for.

    python -m benchmarks.model.large_checkpoint      (from the repository root; an H200, about a minute)
    python -m benchmarks.model.large_checkpoint --preset tiny-moe --device cpu --tokens 64 --decode 4 --sequences 4 --span 64

Runs the preset and then its twin with full attention in every layer, and compares memory with what ``kimi-linear info
--preset`` says. Many sequences are read twice, to two lengths: the difference is the cache per token, the rest the state
that does not grow. Both are what tensors ask of the allocator. It may hand out up to 1 MiB more for each, which in one
sequence of 4,096 tokens is several percent and in many is nothing; so the sum over all sequences is also held against
what it gave out. Random weights cost what trained ones do, except that their routing is more even.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks._report import RESULTS, needs_gpu, write_report
from kimi_linear.config import ModelConfig, baseline
from kimi_linear.engine.footprint import Footprint, footprint
from kimi_linear.model import KimiLinear, ModelState
from kimi_linear.model.parameters import allocate, init_weights
from kimi_linear.model.state import MLAState

GIB = 1 << 30
TOLERANCE = 0.02
"""How far memory may be from what was predicted."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Flags."""

    preset: str = "kimi-linear-48b-a3b"
    """The hybrid; its twin has full attention everywhere."""
    device: str = "cuda"
    """Where the model is made and runs."""
    tokens: int = 4096
    """Prompt of one sequence, whose speed is measured."""
    decode: int = 64
    """Tokens decoded after it, one at a time."""
    sequences: int = 128
    """Sequences whose states are measured."""
    span: int = 512
    """Tokens of each; a sixteenth of it is the other length."""
    results: Path = RESULTS
    """Folder for the page."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one decoded token is to a GPU."""

    launches: float
    """Kernels and copies."""
    busy: float
    """Seconds in which one of them runs, if they do not overlap."""
    waits: float
    """Times that the host waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes in use."""

    asked: int
    """What tensors asked for."""
    taken: int
    """What the allocator handed out for that."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one model took."""

    weight_bytes: int
    """As the allocator counts, where there is one."""
    state_bytes: float
    """Per sequence, as asked for."""
    token_bytes: float
    """Per token, as asked for."""
    together: int
    """All sequences, as the allocator counts."""
    making: float
    """Seconds to make and initialise the weights."""
    first: float
    """Seconds of the first prompt and token, kernels compiled where there are any."""
    prefill: float
    """Seconds of the prompt, the second time round."""
    decode: float
    """Seconds of the decoded tokens."""
    peak: int | None
    """Most memory that the device gave out, where it is counted."""
    step: Step | None
    """What a decoded token is made of, where it is counted."""


def random_model(config: ModelConfig, device: str) -> KimiLinear:
    """A model with random bf16 weights, born on ``device``: nothing on the host, nothing in fp32 but what stays so."""
    with torch.device("meta"):
        model = KimiLinear(config).to(torch.bfloat16)
    allocate(model, device)
    init_weights(model, config.initializer_range, seed=0)
    return model.eval()


def used(device: str, tensors: Iterable[Tensor]) -> Memory:
    """Memory in use on a GPU; elsewhere that of the storages behind ``tensors``."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        stats = torch.cuda.memory_stats(device)
        return Memory(asked=stats["requested_bytes.all.current"], taken=stats["allocated_bytes.all.current"])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    held = sum(storages.values())
    return Memory(asked=held, taken=held)


def tensors_of(state: ModelState | None) -> list[Tensor]:
    if state is None:
        return []
    pairs = [(s.buffer,) if isinstance(s, MLAState) else (s.recurrent, s.conv) for s in state.layers]
    return [tensor for pair in pairs for tensor in pair]


def reserve(state: ModelState, tokens: int) -> None:
    """Room for exactly ``tokens`` latents, so that no spare capacity is measured."""
    for layer in state.layers:
        if isinstance(layer, MLAState):
            grown = layer.buffer.new_empty(layer.batch_size, tokens, layer.buffer.shape[2])
            grown[:, : layer.length] = layer.latent
            layer.buffer = grown


def read(model: KimiLinear, prompt: Tensor, state: ModelState) -> Tensor:
    """The prompt into the state; logits [1, vocab] of its last position."""
    return model.logits_of(model.hidden_states(prompt, state=state)[:, -1])


def refuse_unless_finite(logits: Tensor, when: str) -> None:
    if not bool(logits.isfinite().all()):
        raise RuntimeError(f"logits: expected finite numbers {when}, got NaN or infinity")


def wait(device: str) -> float:
    """Now, with the device's work done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def measure(config: ModelConfig, args: Args) -> Measured:
    """Make, read, decode; check the logits at every step."""
    device = args.device
    if device.startswith("cuda"):
        _release()
        torch.cuda.reset_peak_memory_stats(device)
    nothing, since = used(device, ()), wait(device)
    model = random_model(config, device)
    making = wait(device) - since
    weights = used(device, model.parameters()).taken - nothing.taken
    prompt = torch.randint(config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    since = wait(device)
    state = model.make_state(1)
    last = read(model, prompt, state).argmax(-1, keepdim=True)
    read(model, last, state)  # kernels of both kinds are compiled now, and libraries have their workspaces
    first, since = wait(device) - since, wait(device)
    state = model.make_state(1)
    refuse_unless_finite(read(model, prompt, state), f"after {args.tokens} tokens")
    prefill = wait(device) - since
    decode = decoded(model, prompt[:, -1:], state, args)
    step = profiled(model, prompt[:, -1:], state) if device.startswith("cuda") else None
    del state
    lengths = max(1, args.span // 16), args.span
    short, long = (held_by(model, length, args) for length in lengths)
    per_token = (long.asked - short.asked) / (args.sequences * (lengths[1] - lengths[0]))
    return Measured(
        weight_bytes=weights, state_bytes=short.asked / args.sequences - per_token * lengths[0], token_bytes=per_token,
        together=long.taken, making=making, first=first, prefill=prefill, decode=decode, step=step,
        peak=torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None,
    )  # fmt: skip


def held_by(model: KimiLinear, tokens: int, args: Args) -> Memory:
    """What the states of ``args.sequences`` sequences hold once each has read ``tokens``."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (args.sequences, tokens)
    prompt = torch.randint(model.config.vocab_size, shape, generator=generator).to(args.device)
    if args.device.startswith("cuda"):
        _release()
    before = used(args.device, ())
    state = model.make_state(args.sequences)
    reserve(state, tokens)
    refuse_unless_finite(read(model, prompt, state), f"in {args.sequences} sequences of {tokens} tokens")
    after = used(args.device, tensors_of(state))
    return Memory(asked=after.asked - before.asked, taken=after.taken - before.taken)


def _release() -> None:
    """Give back what nobody uses: an allocation that lands in a cached block may be counted as large as the block."""
    gc.collect()
    torch.cuda.empty_cache()


def profiled(model: KimiLinear, last: Tensor, state: ModelState, tokens: int = 4) -> Step:
    """A few tokens under torch's profiler; what took longest goes to stderr."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as watched:
        for _ in range(tokens):
            last = read(model, last, state).argmax(-1, keepdim=True)
    for by in ("self_device_time_total", "self_cpu_time_total"):
        print(watched.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60), file=sys.stderr)
    return counted(watched.events() or [], tokens)


def counted(events: Iterable[Any], tokens: int) -> Step:
    """A token's share of a profile of ``tokens``."""
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    # The host waits by one of these; the profiler itself ends with a wait for the whole device, which is not counted.
    waits = sum(event.name in ("cudaStreamSynchronize", "cudaEventSynchronize") for event in events)
    busy = sum(event.time_range.elapsed_us() for event in on_device) / 1e6
    return Step(launches=len(on_device) / tokens, busy=busy / tokens, waits=waits / tokens)


def decoded(model: KimiLinear, last: Tensor, state: ModelState, args: Args) -> float:
    """Seconds of ``args.decode`` greedy tokens after the state."""
    reserve(state, args.tokens + args.decode)
    finite = torch.ones((), dtype=torch.bool, device=last.device)
    since = wait(args.device)
    for _ in range(args.decode):
        logits = read(model, last, state)
        finite &= logits.isfinite().all()
        last = logits.argmax(-1, keepdim=True)
    seconds = wait(args.device) - since
    if not bool(finite):
        raise RuntimeError(f"logits: expected finite numbers in {args.decode} decoded tokens, got NaN or infinity")
    if state.position != args.tokens + args.decode:
        raise RuntimeError(f"state: expected {args.tokens + args.decode} tokens, got {state.position}")
    return seconds


def compared(name: str, said: Footprint, got: Measured, args: Args) -> list[tuple[str, str, str, str, float]]:
    """Rows of predicted against measured memory, with the difference."""
    rows = []
    together = args.sequences * said.context_bytes(args.span)
    for what, expected, found, unit, size, digits in (
        ("weights", said.weight_bytes, got.weight_bytes, "GiB", GIB, 3),
        ("state per sequence", said.state_bytes, got.state_bytes, "MiB", 2**20, 3),
        ("cache per token", said.token_bytes, got.token_bytes, "bytes", 1, 1),
        (f"{args.sequences} sequences of {args.span:,} tokens", together, got.together, "MiB", 2**20, 1),
    ):
        # Full attention has no fixed state; what is found is held against the cache of the sequence.
        difference = (found - expected) / expected if expected else found / (said.token_bytes * args.span)
        shown = [f"{value / size:,.{digits}f} {unit}" for value in (expected, found)]
        rows.append((name, what, *shown, difference))
    return rows


def speeds(got: Measured, args: Args) -> dict[str, str]:
    """What is measured and not predicted."""
    found = {
        "making the weights": f"{got.making:.1f} s",
        "the same prompt, first time": f"{got.first:.1f} s",
        f"prompt of {args.tokens:,}": f"{args.tokens / got.prefill:,.0f} tokens/s, {got.prefill:.2f} s",
        f"{args.decode} tokens after it": f"{args.decode / got.decode:,.1f} tokens/s",
        "peak memory": "not counted here" if got.peak is None else f"{got.peak / GIB:.2f} GiB",
    }
    if got.step is not None:
        share = got.step.busy * args.decode / got.decode
        found["a decoded token"] = (
            f"{got.step.launches:,.0f} launches, {got.step.waits:.1f} waits of the host, "
            f"device busy {got.step.busy * 1e3:.1f} ms ({share:.0%})"
        )
    return found


def run(args: Args) -> tuple[Path, float]:
    """Both models; the page, and the largest difference from a prediction."""
    config = ModelConfig.preset(args.preset)
    rows: list[list[str]] = []
    worst = 0.0
    for name, shape in ((args.preset, config), ("all full attention", baseline(config, "mla"))):
        said, got = footprint(shape), measure(shape, args)
        for *cells, difference in compared(name, said, got, args):
            worst = max(worst, abs(difference))
            rows.append([*cells, f"{difference:+.2%}"])
        rows += [[name, what, "", value, ""] for what, value in speeds(got, args).items()]
        print(f"{name}: done", file=sys.stderr, flush=True)
    page = write_report(
        "large_checkpoint",
        title=f"{args.preset} with random bf16 weights on one device",
        about=(
            f"Weights made on the device, a prompt of {args.tokens:,} random tokens in one forward, after the "
            f"same once before, {args.decode} greedy tokens one by one without CUDA graphs, all "
            f"logits finite. Memory against `kimi-linear info --preset {args.preset}`: the largest difference is "
            f"{worst:.2%}. "
            + (
                "Weights and the sum over all sequences are what torch's allocator handed out; state and cache are what "
                "tensors asked of it."
                if args.device.startswith("cuda")
                else "It is that of the storages held."
            )
        ),
        columns=["model", "what", "predicted", "measured", "difference"],
        rows=rows,
        device=args.device,
        packages=["triton"],
        folder=args.results,
    )
    return page, worst


def main() -> None:
    """Measure, write, and fail where memory is not what was said."""
    args = tyro.cli(Args)
    if args.device.startswith("cuda"):
        needs_gpu()
    _, worst = run(args)
    if worst > TOLERANCE:
        sys.exit(f"memory: expected within {TOLERANCE:.0%} of the prediction, got {worst:.2%}")


if __name__ == "__main__":
    main()
