"""The fused step of decoding on a GPU: microseconds in a CUDA graph, percent of copy bandwidth, and the cost of a launch.

    python -m benchmarks.ops.kda_decode                       everything, about a minute
    python -m benchmarks.ops.kda_decode --configs --batches 1 32      candidates of the configuration, too

The answer is checked first, at every gate, against fp64; a wrong one gets no speed. A graph holds enough calls on
different slots that no state is found in the L2, which is how a model of many layers meets them. Slots are drawn from the
whole pool, and once more taken in order, as where no sequence has left a batch. Replays take turns with those of fla's
``fused_recurrent_kda`` where that is installed. fla's call is the recurrence alone: no convolution, no output norm. The
page is written after every row.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor

from benchmarks._report import Section, needs_gpu, write_page
from kimi_linear.kernels.triton.compile_ahead import wait_for_later
from kimi_linear.kernels.triton.configs import Config
from kimi_linear.kernels.triton.decode import prepare
from kimi_linear.ops import DecodePool, SoftplusGate
from kimi_linear.testing.decode import DecodeInputs, decode_inputs
from kimi_linear.testing.factories import GATE_KINDS
from kimi_linear.testing.timers import compare
from kimi_linear.testing.tolerances import relative_error

HEADS, DIM = 32, 128
BOUND = 5e-3
CYCLE_BYTES = 512 * 2**20
"""States that a graph goes through before it meets one again: ten times the L2."""
LAUNCHES, LAUNCH_ROUNDS = 300, 15
"""Eager calls that the CPU's time is taken over; the queue of a GPU takes about a thousand."""
CONFIGS = tuple(
    Config(constants={"BV": block, "PDL": 1, "AHEAD": ahead}, num_warps=4)
    for block in (16, 32, 64, 128)
    for ahead in (0, 1, 2)
)


@dataclass
class Page:
    """The rows so far; every one is printed and the page written."""

    bandwidth: float
    checked: str
    repeats: int
    steps: list[list[object]] = field(default_factory=list)
    configs: list[list[object]] = field(default_factory=list)
    launches: list[list[object]] = field(default_factory=list)

    def add(self, table: list[list[object]], row: list[object]) -> None:
        print(" | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row), flush=True)
        table.append(row)
        write_page(
            "kda_decode",
            title="A decoded token on a GPU",
            about=f"The whole mixer core in one kernel, bf16 with an fp32 state, H = {HEADS}, K = V = {DIM}, softplus gate, "
            f"short convolution of 4 and sigmoid output gate. Medians of {self.repeats} replays of a CUDA graph, per call. "
            f"A copy moves {self.bandwidth / 1e12:.2f} TB/s here, read and written; the share of it counts the state alone. "
            f"Relative errors against fp64 by gate, before timing (bound {BOUND}): {self.checked}.",
            sections=[
                Section(
                    title="Steps",
                    about="S tokens of each of B sequences; with S > 1 the state after every token is kept. Calls follow each "
                    "other, so that a call's launch, and what it asks for ahead, hide behind the call before it. Slots are "
                    "drawn from the whole pool; in order, they follow each other in memory, as fla's states do. fla: "
                    "`fused_recurrent_kda`, the recurrence alone.",
                    columns=[
                        "B",
                        "S",
                        "ours, µs",
                        "GB/s",
                        "of a copy",
                        "in order, µs",
                        "GB/s",
                        "fla, µs",
                        "fla / in order",
                    ],
                    rows=self.steps,
                ),
                Section(
                    title="The cost of a launch",
                    about=f"CPU time of an eager call, over {LAUNCHES} of them, B = 1; medians of {LAUNCH_ROUNDS} in turns.",
                    columns=["call", "µs"],
                    rows=self.launches,
                ),
                Section(title="Candidates", columns=["B", "configuration", "µs", "of a copy"], rows=self.configs),
            ],
            device="cuda",
            packages=("triton", "fla-core"),
        )


def step_of(inputs: DecodeInputs, slots: Tensor, keep: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors of a step in the kernel's order."""
    gate, taps, norm, pool = inputs.gate, inputs.taps, inputs.norm, inputs.pool
    assert taps is not None
    return (
        inputs.q, inputs.k, inputs.v, gate.x, inputs.beta, norm.gate, gate.A_log, gate.dt_bias, taps.q, taps.k, taps.v,
        norm.weight, pool.memory, pool.window, slots, keep,
    )  # fmt: skip


def drawn(batch: int, tokens: int) -> tuple[DecodeInputs, int]:
    """Inputs on the GPU with a pool for a whole cycle, and the number of calls in that cycle."""
    inputs = decode_inputs(batch, tokens, HEADS, key_dim=DIM, slots=1, dtype=torch.bfloat16, device="cuda")
    calls = max(4, CYCLE_BYTES // (batch * HEADS * DIM * DIM * 4))
    slots = calls * batch * (1 if tokens == 1 else 1 + tokens)
    window = inputs.pool.window.expand(slots, -1, -1).contiguous()
    memory = torch.randn(slots, HEADS, DIM, DIM, device="cuda")
    return replace(inputs, pool=DecodePool(memory=memory, window=window)), calls


def rows_of(batch: int, tokens: int, calls: int, shuffled: bool = True) -> list[tuple[Tensor, Tensor | None]]:
    """(slots, keep) of every call of a cycle, no slot twice."""
    width = 1 if tokens == 1 else 1 + tokens
    count = calls * batch * width
    order = torch.randperm(count, device="cuda") if shuffled else torch.arange(count, device="cuda")
    order = order.to(torch.int32).view(calls, batch, width)
    return [(s[:, 0].contiguous(), s[:, 1:].contiguous() if tokens > 1 else None) for s in order]


def graph_of(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """Replays ``calls``, and keeps them: a graph knows their tensors by address alone."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay(_: object = calls) -> None:
        graph.replay()

    return replay


def ours(
    inputs: DecodeInputs, cycle: list[tuple[Tensor, Tensor | None]], config: Config | None
) -> Callable[[], object]:
    step, out = step_of(inputs, *cycle[0]), torch.empty_like(inputs.v)
    run = prepare(step, lower_bound=None, eps=1e-5, activation="sigmoid", config=config)
    steps = [step_of(inputs, *places) for places in cycle]
    return graph_of([lambda now=now: run(now, out) for now in steps])


def fla_call(inputs: DecodeInputs, states: Tensor) -> Callable[[], object]:
    from fla.ops.kda import fused_recurrent_kda  # type: ignore[import-not-found]

    assert isinstance(inputs.gate, SoftplusGate)
    return lambda: fused_recurrent_kda(
        inputs.q, inputs.k, inputs.v, inputs.gate.x, inputs.beta, A_log=inputs.gate.A_log,
        dt_bias=inputs.gate.dt_bias.flatten(), initial_state=states, output_final_state=True,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, state_v_first=True,
    )  # fmt: skip


def check() -> str:
    """The worst relative error by gate, after holding it to the bound; for one token, and for four that are kept."""
    cells = []
    for gate in GATE_KINDS:
        worst = 0.0
        for tokens in (1, 4):
            inputs = decode_inputs(3, tokens, 2, key_dim=DIM, gate=gate, dtype=torch.bfloat16, device="cuda")
            exact, count = inputs.exact(), 3 * tokens
            slots = torch.arange(3, device="cuda", dtype=torch.int32)
            keep = (3 + torch.arange(count, device="cuda", dtype=torch.int32)).view(3, tokens) if tokens > 1 else None
            got, want = inputs.step(slots=slots, keep=keep, impl="triton"), exact.step(slots=slots, keep=keep)
            pairs = [(got, want), (inputs.pool.memory, exact.pool.memory), (inputs.pool.window, exact.pool.window)]
            worst = max(worst, *(relative_error(a, e) for a, e in pairs))
        assert worst < BOUND, f"{gate}: relative error {worst:.2g}, allowed {BOUND}"
        cells.append(f"{gate} {worst:.1e}")
    return ", ".join(cells)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(1 << 31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    timing = compare({"copy": lambda: target.copy_(source)}, repeats=10, device="cuda")["copy"]
    return 2 * source.numel() / timing.median


def time_steps(page: Page, batch: int, tokens: int, has_fla: bool, configs: bool) -> None:
    """One row of the first table, and the candidates at this shape."""
    inputs, calls = drawn(batch, tokens)
    cycle = rows_of(batch, tokens, calls)
    replays = {"ours": ours(inputs, cycle, None)}
    if tokens == 1:
        replays["in order"] = ours(inputs, rows_of(batch, tokens, calls, shuffled=False), None)
    if has_fla and tokens == 1:
        parts = inputs.pool.memory.view(calls, batch, HEADS, DIM, DIM)
        replays["fla"] = graph_of([fla_call(inputs, part) for part in parts[: max(4, calls // 8)]])
    shares = {"ours": calls, "in order": calls, "fla": max(4, calls // 8)}
    tried = CONFIGS if configs and tokens == 1 else ()
    for config in tried:
        replays[str(config)], shares[str(config)] = ours(inputs, cycle, config), calls
    times = compare(replays, warmup=2, repeats=page.repeats, device="cuda")
    micro = {name: timing.median / shares[name] * 1e6 for name, timing in times.items()}
    moved = batch * HEADS * DIM * DIM * 4 * (1 + tokens)
    mine, lined = micro["ours"], micro.get("in order")
    order: list[object] = ["–", "–"] if lined is None else [lined, moved / lined / 1e3]
    beside = [micro["fla"], micro["fla"] / lined] if "fla" in micro and lined is not None else ["–", "–"]
    rate = moved / mine * 1e6
    page.add(page.steps, [batch, tokens, mine, rate / 1e9, f"{rate / page.bandwidth:.1%}", *order, *beside])
    for config in tried:
        taken = micro[str(config)]
        page.add(page.configs, [batch, str(config), taken, f"{moved / taken * 1e6 / page.bandwidth:.1%}"])


def time_launches(page: Page, has_fla: bool) -> None:
    """CPU time of a call that finds the GPU busy, so that nothing waits for it."""
    inputs = decode_inputs(1, 1, HEADS, key_dim=DIM, slots=1, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(inputs.v)
    step = step_of(inputs, torch.zeros(1, dtype=torch.int32, device="cuda"), None)
    run = prepare(step, lower_bound=None, eps=1e-5, activation="sigmoid")
    calls: dict[str, Callable[[], object]] = {
        "kda_decode(..., out=out)": lambda: inputs.step(out=out),
        "kda_decode(...)": lambda: inputs.step(),
        "the prepared kernel alone": lambda: run(step, out),
        "an empty torch operation, x.add_(0)": lambda: out.add_(0),
    }
    if has_fla:
        calls["fla fused_recurrent_kda"] = fla_call(inputs, inputs.pool.memory)
    for call in calls.values():
        call()
    wait_for_later()  # threads that compile would take turns with this one
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(LAUNCH_ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            since = time.perf_counter()
            for _ in range(LAUNCHES):
                call()
            taken[name].append((time.perf_counter() - since) / LAUNCHES)
    for name, seconds in taken.items():
        page.add(page.launches, [name, median(seconds) * 1e6])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="replays of each graph")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 32, 128, 256], help="B of the rows with one token"
    )
    parser.add_argument("--configs", action="store_true", help="time the candidates of the configuration as well")
    arguments = parser.parse_args()
    needs_gpu()
    has_fla = importlib.util.find_spec("fla") is not None
    page = Page(bandwidth=copy_bandwidth(), checked=check(), repeats=arguments.repeats)
    time_launches(page, has_fla)
    for batch in arguments.batches:
        time_steps(page, batch, 1, has_fla, arguments.configs)
        torch.cuda.empty_cache()
    for tokens in (2, 4, 8):
        time_steps(page, 32, tokens, has_fla, False)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
