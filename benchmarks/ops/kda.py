"""chunk_kda from raw inputs, gate and l2 norm inside the timed region: ours, fla and softmax attention in one run.

    python -m benchmarks.ops.kda                                       every standard shape, forward and backward
    python -m benchmarks.ops.kda --mode forward --shapes 64k-h32 --gates init
    python -m benchmarks.ops.kda --device cpu --shapes toy             runs anywhere

For each shape and gate the answer is checked against fp64 first, and a wrong one gets no speed. Then all variants run in
turns, the L2 flushed before each call; the table has medians. fla is timed where it is installed (``pip install
fla-core``); its autotuning, tens of seconds for a new shape, is outside the timing. The page is written after every row.
It ends with status 1 where an answer was wrong, or where ``impl="auto"`` did not take the fastest implementation.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from benchmarks._report import RESULTS
from benchmarks.ops import _check, _pages, first_call
from benchmarks.ops._variants import (
    Variant,
    choice,
    fla,
    forward,
    has_fla,
    our_variants,
    ours,
    softmax_attention,
    softmax_inputs,
    training,
)
from benchmarks.ops.shapes import TIMED_GATES, Shape, gates_of, shapes_of
from kimi_linear.testing.factories import GateKind, KDAInputs
from kimi_linear.testing.timers import Timing, compare, peak_memory

Mode = Literal["forward", "backward"]
TORCH_ELEMENTS = 1 << 19
"""T * HV up to which plain torch is timed too: seconds a call above, and never the fastest on a GPU."""
ATTENTION_FLOPS = 2e14
"""Up to which softmax attention is timed: about half a second of a Hopper GPU."""
ROW_SECONDS = 3.0
"""How long the repeats of one row take together, about."""
REPEATS = (5, 30)
"""Least and most repeats of a variant that is not slow."""
SLOW = 10.0
"""Times the fastest variant: a slower one is repeated three times only."""
BASELINES = ("fla", "sdpa")
AUTOTUNE_SECONDS = 40.0
"""What fla may take at a new shape: it is left out, and said so, where less is left of the budget."""


@dataclass
class Run:
    """What one run has found so far, and how long it may go on."""

    device: str
    out: Path
    ends: float
    bandwidth: float = 0.0
    """Bytes per second that a copy moves here, read and written."""
    records: list[dict] = field(default_factory=list)
    name: str = "kda_ops"
    with_fla: bool = True

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.ends - time.monotonic()

    def add(self, record: dict) -> None:
        """Keep a record, print it, write the page."""
        self.records.append(record)
        print(_pages.line(record), flush=True)
        self.write()

    def write(self) -> Path:
        """Write the page of what is known."""
        return _pages.write(self.name, self.records, bandwidth=self.bandwidth, device=self.device, folder=self.out)


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written."""
    size = 1 << (31 if torch.device(device).type == "cuda" else 24)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = compare({"copy": lambda: target.copy_(source)}, repeats=10, device=device)["copy"]
    return 2 * size / timing.median


def free() -> None:
    """Let go of the last row's tensors: closures hold them in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def interleaved(calls: dict[str, Callable[[], object]], device: str) -> dict[str, Timing]:
    """Timings in turns: three rounds of all, then more of those that are not slow, until a row's seconds are used."""
    taken = compare(calls, warmup=1, repeats=3, device=device)
    fastest = min(timing.median for timing in taken.values())
    quick = {name: call for name, call in calls.items() if taken[name].median <= SLOW * fastest}
    once = sum(taken[name].median for name in quick)
    more = min(REPEATS[1], max(REPEATS[0], int(ROW_SECONDS / once))) - 3
    longer = compare(quick, warmup=0, repeats=more, device=device)
    return {
        name: Timing(samples=timing.samples + (longer[name].samples if name in longer else ()))
        for name, timing in taken.items()
    }


def started(calls: dict[str, Callable[[], object]], notes: dict[str, str], device: str) -> dict[str, float]:
    """Seconds of each variant's first call, compilation and autotuning included.

    One that runs out of memory is dropped from ``calls`` with a note, as is a baseline that fails in any other way: that
    says nothing of ours. Ours may not fail.
    """
    seconds = {}
    for name in list(calls):
        begin = time.perf_counter()
        try:
            calls[name]()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            if name not in BASELINES and not isinstance(error, torch.OutOfMemoryError):
                raise
            notes[name] = reason(error)
            del calls[name]
            free()
        else:
            seconds[name] = time.perf_counter() - begin
    return seconds


def reason(error: Exception) -> str:
    """An error in one line of a table."""
    text = " ".join(str(error).split())[:150].replace("|", "/")
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {text}"


def check(run: Run, shape: Shape, record: dict, inputs: KDAInputs, weight: torch.Tensor | None) -> None:
    """Fills in the errors of each implementation of ours that will be timed, and of fla, with the seconds that its first
    call took.

    Raises:
        WrongAnswer: one of ours is off.
    """
    judge, found = _check.exact(inputs, weight), record["errors"]
    for impl, variant in timed_variants(shape, inputs, record["mode"])[0].items():
        found[impl] = _check.errors(variant, inputs, weight, judge)
        free()
    for impl, errors in found.items():
        _check.demand(errors, f"{shape.name}, {record['gate']} gate, {record['mode']}, impl={impl!r}")
    if not (run.with_fla and has_fla(inputs)):
        return
    if run.left < AUTOTUNE_SECONDS:
        record["notes"]["fla"] = "no time left for its autotuning"
        return
    calls = {"fla": lambda: found.update(fla=_check.errors(fla, inputs, weight, judge))}
    record["first"] |= started(calls, record["notes"], run.device)
    free()


def timed_variants(shape: Shape, inputs: KDAInputs, mode: Mode) -> tuple[dict[str, Variant], dict[str, str]]:
    """Our implementations to time at a shape, and why the others are not."""
    able, unable = our_variants(inputs, needs_grad=mode == "backward")
    auto = choice(inputs, "auto", needs_grad=mode == "backward").impl
    if shape.elements > TORCH_ELEMENTS and auto != "torch":
        able.pop("torch", None)
        unable["torch"] = f"not timed above T * HV = {TORCH_ELEMENTS}"
    return able, unable


def measure(run: Run, shape: Shape, gate: GateKind, mode: Mode) -> dict:
    """One record: the check, then the times where the gate is a timed one, then memory for "backward"."""
    torch.manual_seed(0)
    inputs = shape.draw(gate, device=run.device)
    weight = torch.randn_like(inputs.v) if mode == "backward" else None
    record: dict = {"shape": shape.name, "gate": gate, "mode": mode, "errors": {}, "first": {}}
    record |= {"tokens": shape.tokens, "sequences": len(shape.lengths), "heads": shape.heads, "v_heads": shape.values}
    record |= {"dim": shape.dim, "bytes": shape.bytes_of(mode), "flops": shape.flops_of(mode)}
    variants, record["notes"] = timed_variants(shape, inputs, mode)
    check(run, shape, record, inputs, weight)
    chosen = choice(inputs, "auto", needs_grad=mode == "backward")
    record["auto"], record["reason"] = chosen.impl, chosen.reason
    if gate in TIMED_GATES:
        times(run, shape, record, variants, inputs, weight)
    return record


def times(
    run: Run, shape: Shape, record: dict, variants: dict[str, Variant], inputs: KDAInputs, weight: torch.Tensor | None
) -> None:
    """Fills in the medians of ours and of the baselines, and the memory that training takes."""
    if weight is not None:
        inputs = inputs.with_grad(clone=False)
    calls = {name: bind(variant, inputs, weight) for name, variant in variants.items()}
    if "fla" in record["errors"]:
        calls["fla"] = bind(fla, inputs, weight)
    if shape.attention_flops(record["mode"]) <= ATTENTION_FLOPS:
        calls["sdpa"] = bind(softmax_attention(shape.lengths), softmax_inputs(inputs), weight, ("q", "k", "v"))
    else:
        record["notes"]["sdpa"] = f"not timed over {ATTENTION_FLOPS:.0e} operations"
    record["first"] = started(calls, record["notes"], run.device) | record["first"]
    timings = interleaved(calls, run.device)
    record["seconds"] = {name: timing.median for name, timing in timings.items()}
    record["spread"] = {name: timing.spread for name, timing in timings.items()}
    mine = {name: record["seconds"][name] for name in variants if name in record["seconds"]}
    record["fastest"] = min(mine, key=mine.__getitem__) if mine else None
    if weight is not None and record["auto"] in mine:
        record["memory"] = memory(run, inputs, weight, "fla" in calls)


def bind(
    variant: Variant, inputs: KDAInputs, weight: torch.Tensor | None, names: Sequence[str] | None = None
) -> Callable[[], object]:
    """The call that is timed: a forward, or with ``weight`` a forward and a backward."""
    return forward(variant, inputs) if weight is None else training(variant, inputs, weight, names)


def memory(run: Run, inputs: KDAInputs, weight: torch.Tensor, with_fla: bool) -> dict[str, dict[str, int]]:
    """Bytes on top of the inputs, for ours and fla: most at a time in forward and backward, and held between the two."""
    found = {}
    for name, variant in ({"auto": ours("auto")} | ({"fla": fla} if with_fla else {})).items():
        free()
        found[name] = {"peak": peak_memory(training(variant, inputs, weight), device=run.device)}
        if torch.device(run.device).type == "cuda":
            before = torch.cuda.memory_allocated()
            output = variant(inputs)
            found[name]["saved"] = torch.cuda.memory_allocated() - before - output.nbytes
            del output
    return found


def step(run: Run, shape: Shape, gate: GateKind, mode: Mode) -> bool:
    """Measure one row and keep it, or why there is none; False for a wrong answer or a failure."""
    here = {"shape": shape.name, "gate": gate, "mode": mode}
    if run.left <= 0:
        run.add({**here, "skipped": "the budget was used up"})
        return True
    try:
        run.add(measure(run, shape, gate, mode))
    except _check.WrongAnswer as error:
        run.add({**here, "wrong": str(error)})
        return False
    except torch.OutOfMemoryError as error:
        run.add({**here, "skipped": reason(error)})
    except Exception as error:  # one broken row must not take the others' time on a lent machine; it fails the run
        traceback.print_exc()
        run.add({**here, "wrong": reason(error)})
        return False
    finally:
        free()
    return True


def waits(run: Run, name: str) -> bool:
    """Measure a first call with cold caches; False where it takes too long."""
    try:
        run.add({"first_call": name, **first_call.measure(name, run.device)})
    except RuntimeError as error:
        print(error, file=sys.stderr)
        run.add({"shape": name, "gate": "–", "mode": "first call", "wrong": reason(error)})
        return False
    return first_call.row_of(name, run.records[-1])[-1] == "ok"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--mode", choices=["forward", "backward", "all"], default="all", help="backward: forward too")
    parser.add_argument(
        "--shapes", nargs="+", default=["standard" if on_gpu else "toy"], help="names or groups of them"
    )
    parser.add_argument(
        "--gates", nargs="+", default=["init", "fast", "stress"], help="others than init, fast: checked"
    )
    parser.add_argument("--seconds-budget", type=float, default=480.0, help="no new row is begun after so long")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--fla", action=argparse.BooleanOptionalAction, default=True, help="where it is installed")
    parser.add_argument("--first-call", action=argparse.BooleanOptionalAction, default=on_gpu, help="with cold caches")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page and the numbers")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write the page as it grows."""
    arguments = parse(words)
    shapes, gates = shapes_of(arguments.shapes), gates_of(arguments.gates)
    modes: tuple[Mode, ...] = ("forward", "backward") if arguments.mode == "all" else (arguments.mode,)
    run = Run(
        device=arguments.device,
        out=arguments.out,
        ends=time.monotonic() + arguments.seconds_budget,
        name="kda_ops" if arguments.mode == "all" else f"kda_ops_{arguments.mode}",
        with_fla=arguments.fla,
    )
    run.bandwidth = copy_bandwidth(run.device)
    free()
    right = [
        waits(run, name) for name in first_call.OPERATIONS if arguments.first_call and name.startswith("chunk_kda")
    ]
    right += [step(run, shape, gate, mode) for shape in shapes for mode in modes for gate in gates]
    path = run.write()
    print(path.read_text(encoding="utf-8"), f"\nwritten to {path}")
    return int(not all(right) or bool(_pages.wrong_choices(run.records)))


if __name__ == "__main__":
    sys.exit(main())
