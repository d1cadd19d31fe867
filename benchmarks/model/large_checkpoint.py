"""The released size on one GPU: random bf16 weights made there, a prompt read, tokens decoded, every byte accounted for.

    python -m benchmarks.model.large_checkpoint      (from the repository root; an H200, about a minute)
    python -m benchmarks.model.large_checkpoint --preset tiny-moe --device cpu --tokens 64 --decode 4

Runs the preset and then its twin with full attention in every layer. Weights and states are measured at the allocator on
CUDA, by the storages that they hold elsewhere, and compared with what ``kimi-linear info --preset`` says. A state that
holds T tokens is measured at two lengths: the difference is the cache per token, the rest what does not grow. Random
weights cost what trained ones do, except that their routing is more even.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks._report import RESULTS, write_report
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
    """Prompt; half of it is the other length at which the state is measured."""
    decode: int = 64
    """Tokens decoded after it, one at a time."""
    results: Path = RESULTS
    """Folder for the page."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one model took."""

    weight_bytes: int
    state_bytes: float
    token_bytes: float
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


def random_model(config: ModelConfig, device: str) -> KimiLinear:
    """A model with random bf16 weights, born on ``device``: nothing on the host, nothing in fp32 but what stays so."""
    with torch.device("meta"):
        model = KimiLinear(config).to(torch.bfloat16)
    allocate(model, device)
    init_weights(model, config.initializer_range, seed=0)
    return model.eval()


def used(device: str, tensors: Iterable[Tensor]) -> int:
    """Memory in use on a GPU; elsewhere that of the storages behind ``tensors``."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


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
    device, lengths = args.device, (args.tokens // 2, args.tokens)
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    nothing, since = used(device, ()), wait(device)
    model = random_model(config, device)
    making = wait(device) - since
    weights = used(device, model.parameters()) - nothing
    prompt = torch.randint(config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    since = wait(device)
    warm = model.make_state(1)
    logits = read(model, prompt, warm)  # the whole: libraries take their workspaces before the states are measured
    read(model, logits.argmax(-1, keepdim=True), warm)
    first = wait(device) - since
    del warm, logits
    held, prefill, state = [], 0.0, None
    for tokens in lengths:
        del state
        before, since = used(device, ()), wait(device)
        state = model.make_state(1)
        reserve(state, tokens)
        refuse_unless_finite(read(model, prompt[:, :tokens], state), f"after {tokens} tokens")
        prefill = wait(device) - since
        held.append(used(device, tensors_of(state)) - before)
    assert state is not None
    decode = decoded(model, prompt[:, -1:], state, args)
    per_token = (held[1] - held[0]) / (lengths[1] - lengths[0])
    return Measured(
        weight_bytes=weights, state_bytes=held[0] - per_token * lengths[0], token_bytes=per_token, making=making,
        first=first, prefill=prefill, decode=decode,
        peak=torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None,
    )  # fmt: skip


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


def compared(name: str, said: Footprint, got: Measured, tokens: int) -> list[tuple[str, str, str, str, float]]:
    """Rows of predicted against measured memory, with the difference, after a prompt of ``tokens``."""
    rows = []
    for what, expected, found, unit, digits in (
        ("weights", said.weight_bytes / GIB, got.weight_bytes / GIB, "GiB", 3),
        ("state per sequence", said.state_bytes / 2**20, got.state_bytes / 2**20, "MiB", 3),
        ("cache per token", said.token_bytes, got.token_bytes, "bytes", 1),
    ):
        # Full attention has no fixed state; what is found is held against the prompt's cache.
        difference = (found - expected) / expected if expected else found * 2**20 / (said.token_bytes * tokens)
        rows.append((name, what, f"{expected:,.{digits}f} {unit}", f"{found:,.{digits}f} {unit}", difference))
    return rows


def run(args: Args) -> tuple[Path, float]:
    """Both models; the page, and the largest difference from a prediction."""
    config = ModelConfig.preset(args.preset)
    rows: list[list[str]] = []
    worst = 0.0
    for name, shape in ((args.preset, config), ("all full attention", baseline(config, "mla"))):
        said, got = footprint(shape), measure(shape, args)
        for *cells, difference in compared(name, said, got, args.tokens):
            worst = max(worst, abs(difference))
            rows.append([*cells, f"{difference:+.2%}"])
        speeds = {
            "making the weights": f"{got.making:.1f} s",
            "the same prompt, first time": f"{got.first:.1f} s",
            f"prompt of {args.tokens:,}": f"{args.tokens / got.prefill:,.0f} tokens/s, {got.prefill:.2f} s",
            f"{args.decode} tokens after it": f"{args.decode / got.decode:,.1f} tokens/s",
            "peak memory": "not counted here" if got.peak is None else f"{got.peak / GIB:.2f} GiB",
        }
        rows += [[name, what, "", value, ""] for what, value in speeds.items()]
        print(f"{name}: done", file=sys.stderr, flush=True)
    page = write_report(
        "large_checkpoint",
        title=f"{args.preset} with random bf16 weights on one device",
        about=(
            f"Weights made on the device, a prompt of {args.tokens:,} random tokens in one forward, after the "
            f"same once before, {args.decode} greedy tokens one by one without CUDA graphs, all "
            f"logits finite. Memory "
            + ("at torch's allocator" if args.device.startswith("cuda") else "of the storages held")
            + f" against `kimi-linear info --preset {args.preset}`: the largest difference is {worst:.2%}."
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
    _, worst = run(tyro.cli(Args))
    if worst > TOLERANCE:
        sys.exit(f"memory: expected within {TOLERANCE:.0%} of the prediction, got {worst:.2%}")


if __name__ == "__main__":
    main()
