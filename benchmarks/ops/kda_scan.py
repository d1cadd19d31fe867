"""The scans over chunks by themselves, forward and backward: blocks, warps, stages and segments, on a GPU.

    python -m benchmarks.ops.kda_scan                  every variant, about a minute with empty caches
    python -m benchmarks.ops.kda_scan --only segments  one part of it: forward, backward or segments

Every variant is held to the fp64 scan at three gates on packed sequences before it is timed, and one that is wrong or does not
launch is named as such and not timed. Inputs are made once; what comes before the scan is not in the time. Time is that of
a replayed CUDA graph with the L2 flushed. GB/s counts each input and output once: slices of V read some of them again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks._report import Section, needs_gpu, write_page
from kimi_linear.testing.chunk_scan import ScanInputs, exact_scan, forgotten, scan_inputs
from kimi_linear.testing.factories import GateKind
from kimi_linear.testing.timers import compare
from kimi_linear.testing.tolerances import relative_error

if TYPE_CHECKING:
    from kimi_linear.kernels.triton.configs import Config
    from kimi_linear.kernels.triton.cuts import Cut

DIM = 128
BOUND = 5e-3
GRADIENT_BOUND = 1e-2
GATES: tuple[GateKind, ...] = ("init", "fast", "stress")
CONFIGS = ((32, 4, 3), (32, 4, 2), (64, 4, 3), (64, 8, 3), (64, 4, 2), (128, 8, 2), (16, 4, 3))
"""BV, warps, stages."""
BUILDS = ((64, 4, 4), (64, 4, 3), (32, 4, 3), (128, 8, 3))
CUTS = (4, 8, 16, 32)
"""Most segments of a sequence."""
COLUMNS = ("shape", "variant", "µs", "µs per chunk", "GB/s", "times the first")
MIXED = (1300, 547, 2048, 963, 271, 3063)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Packed sequences of some lengths; a single one is made of repeated stretches of 1024 tokens."""

    name: str
    heads: int
    lengths: tuple[int, ...]

    def inputs(self) -> ScanInputs:
        """In bf16 on the GPU, at the init gate; heads repeat four drawn ones."""
        drawn, times = list(self.lengths), 1
        if len(drawn) == 1:
            drawn, times = [1024], drawn[0] // 1024
        few = scan_inputs(drawn, 4, DIM, DIM, dtype=torch.bfloat16, device="cuda")
        return few.repeated(heads=self.heads // 4, times=times)


SHAPES = (
    Shape(name="T=8192 H=32", heads=32, lengths=(8192,)),
    Shape(name="T=65536 H=32", heads=32, lengths=(65536,)),
    Shape(name="packed H=96", heads=96, lengths=MIXED),
)
FEW_HEADS = (
    Shape(name="T=65536 H=4", heads=4, lengths=(65536,)),
    Shape(name="T=8192 H=4", heads=4, lengths=(8192,)),
    Shape(name="packed 4 x 4096 H=4", heads=4, lengths=(4160, 4096, 4096, 4032)),
)


def config(numbers: tuple[int, int, int]) -> Config:
    from kimi_linear.kernels.triton.configs import Config

    block, warps, stages = numbers
    return Config(constants={"BK": DIM, "BV": block}, num_warps=warps, num_stages=stages)


def whole() -> Cut:
    from kimi_linear.kernels.triton.cuts import Cut

    return Cut(most=1)


def forward(inputs: ScanInputs, *, save: bool = False, **options: Any) -> dict[str, Tensor | None]:
    from kimi_linear.kernels.triton.scan import scan

    x, output = inputs, torch.empty_like(inputs.d_output)
    result = scan(
        x.erase, x.u, x.read, x.write, x.pairs_q, x.decay, x.initial_state, output, x.cu_seqlens, x.cu_chunks,
        save=save, **options,
    )  # fmt: skip
    return {"output": output, **result._asdict()}


def backward(
    inputs: ScanInputs, operators: Tensor | None = None, lost: Tensor | None = None, **options: Any
) -> dict[str, Tensor | None]:
    from kimi_linear.kernels.triton.scan_backward import scan_backward

    x = inputs
    return scan_backward(
        x.erase, x.read, x.write, x.pairs_q, x.decay, x.d_output, x.d_final_state, operators, x.cu_seqlens, x.cu_chunks,
        lost=lost, **options,
    )._asdict()  # fmt: skip


Run = Callable[[ScanInputs], dict[str, Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Small packed inputs at each gate with their exact results."""

    cases: tuple[tuple[GateKind, ScanInputs, Mapping[str, Tensor]], ...]

    @classmethod
    def make(cls) -> Judge:
        """Sequences of no token, one, one chunk, and enough chunks to be cut."""
        made = []
        for gate in GATES:
            inputs = scan_inputs(
                [100, 0, 1, 64, 2900], 2, DIM, DIM, gate=gate, dtype=torch.bfloat16, device="cuda", spare=2
            )
            made.append((gate, inputs, exact_scan(inputs)))
        return cls(cases=tuple(made))

    def complaint(self, run: Run) -> str | None:
        """What is wrong with ``run``, or None."""
        for gate, inputs, exact in self.cases:
            try:
                results = run(inputs)
                torch.cuda.synchronize()
            except Exception as error:  # a variant that does not fit the chip is a result, and the others go on
                return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
            for name, got in results.items():
                if name in exact and got is not None:
                    error = relative_error(got[: len(exact[name])], exact[name])
                    if not error <= (GRADIENT_BOUND if name.startswith("d_") else BOUND):
                        return f"{gate}: {name} off by {error:.2g}"
        return None


def moved(inputs: ScanInputs, results: Mapping[str, Tensor | None]) -> int:
    """Bytes of inputs and outputs, each once."""
    given = [x for name, x in inputs.tensors().items() if not name.startswith("d_")]
    return sum(x.nbytes for x in (*given, *results.values()) if x is not None)


def measure(shape: Shape, runs: Mapping[str, Run], wrong: Mapping[str, str]) -> list[list[object]]:
    """A row for every variant: its time, or what is wrong with it."""
    inputs = shape.inputs()
    rows: list[list[object]] = [[shape.name, name, complaint, "–", "–", "–"] for name, complaint in wrong.items()]
    calls = {name: lambda run=run: run(inputs) for name, run in runs.items() if name not in wrong}
    if calls:
        times = compare(calls, warmup=1, repeats=11, device="cuda", graph=True)
        first = next(iter(times.values())).median
        longest = max(-(-length // 64) for length in inputs.lengths)
        for name, call in calls.items():
            taken = times[name].median * 1e6
            speed = moved(inputs, call()) / taken * 1e-3
            rows.append([shape.name, name, taken, taken / longest, f"{speed:.0f}", f"{taken / first * 1e-6:.2f}"])
    for row in rows:
        print(" | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row), flush=True)
    return rows


def plain_variants(part: str) -> dict[str, Run]:
    """Whole sequences: the table's own configuration, then every other."""
    runs: dict[str, Run] = {}
    for save in (False, True) if part == "forward" else (True,):
        for numbers in (None, *CONFIGS):
            block = "table" if numbers is None else "BV={} warps={} stages={}".format(*numbers)
            options: dict[str, Any] = {"cut": whole()} | ({} if numbers is None else {"config": config(numbers)})
            if part == "backward":
                runs[f"backward {block}"] = lambda x, options=options: backward(x, **options)
            else:
                name = f"forward {'saving ' if save else ''}{block}"
                runs[name] = lambda x, save=save, options=options: forward(x, save=save, **options)
    return runs


def cut_variants() -> dict[str, Run]:
    """Long sequences of few heads: whole, as the rule cuts them, and cut otherwise; forward alone and with backward.

    "forgetting": with exact bounds on what each chunk forgets, which are not in the time.
    """
    from kimi_linear.kernels.triton.cuts import Cut

    def both(x: ScanInputs, **options: Any) -> dict[str, Tensor | None]:
        results = forward(x, save=True, **options)
        return results | backward(x, results["operators"], results["lost"], **options)

    @lru_cache(maxsize=8)
    def bounds(x: ScanInputs) -> Tensor:
        return forgotten(x)

    runs: dict[str, Run] = {
        "forward whole": lambda x: forward(x, cut=whole()),
        "forward as the rule cuts": lambda x: forward(x),
        "forward as the rule cuts, forgetting": lambda x: forward(x, forgets=bounds(x)),
        "both whole": lambda x: both(x, cut=whole()),
        "both as the rule cuts": lambda x: both(x),
        "both as the rule cuts, forgetting": lambda x: both(x, forgets=bounds(x)),
    }
    for most in CUTS:
        for numbers in ((64, 4, 3), (32, 4, 3), (64, 4, 2)):
            for builds in BUILDS if numbers == (64, 4, 3) else BUILDS[:1]:
                options: dict[str, Any] = {
                    "cut": Cut(most=most),
                    "config": config(numbers),
                    "build_config": config(builds),
                }
                name = f"forward most={most} expand {numbers} build {builds}"
                runs[name] = lambda x, options=options: forward(x, **options)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("forward", "backward", "segments"), help="one part")
    parser.add_argument("--seconds", type=float, default=300, help="begin no further shape after so long")
    arguments = parser.parse_args()
    needs_gpu()
    started, judge, sections = time.perf_counter(), Judge.make(), []
    parts = {part: (SHAPES, plain_variants(part)) for part in ("forward", "backward")}
    parts["segments"] = (FEW_HEADS, cut_variants())
    for part, (shapes, runs) in parts.items():
        if arguments.only not in (None, part):
            continue
        complaints = {name: judge.complaint(run) for name, run in runs.items()}
        wrong = {name: complaint for name, complaint in complaints.items() if complaint is not None}
        rows: list[list[object]] = []
        for shape in shapes:
            if time.perf_counter() - started > arguments.seconds:
                rows.append([shape.name, "not run", f"--seconds {arguments.seconds:g} were over", "–", "–", "–"])
                continue
            rows += measure(shape, runs, wrong)
            torch.cuda.empty_cache()
        sections.append(Section(title=part.capitalize(), columns=COLUMNS, rows=rows))
        write_page(
            "kda_scan",
            title="The scans over chunks of KDA on a GPU",
            about=f"bf16, K = V = {DIM}, init gate; medians of 11 interleaved graph replays, L2 flushed. µs per chunk: over the chunks "
            f"of the longest sequence. Each variant was first held to fp64 at the gates {', '.join(GATES)} (output {BOUND}, "
            f"gradients {GRADIENT_BOUND}).",
            sections=sections,
            device="cuda",
            packages=("triton",),
        )  # fmt: skip
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
