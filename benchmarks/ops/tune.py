"""Chooses launch configurations on this GPU and writes them into the committed table, kernels/triton/configs.json.

    python -m benchmarks.ops.tune                                   time every candidate, print, change nothing
    python -m benchmarks.ops.tune --kernels short_conv --write      put the fastest into the table for this architecture

A candidate counts only where its results agree with those of the table's present entry, which the tests judge: some
choices of warps and tiles are miscompiled. Candidates of one problem run in turns, the L2 flushed before each call. After
``--write``, run the tests in tests/kernels: they compile every entry for every architecture and fail on spills.

A family of kernels brings a list of ``Problem``s, as ``benchmarks/ops/tune_pointwise.py`` does, and adds it to ``FAMILIES``.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
from collections.abc import Mapping, Sequence

import torch

from benchmarks.ops._problem import Problem
from kimi_linear.kernels.triton.configs import TABLE, Config, device_arch, lookup
from kimi_linear.testing.timers import compare
from kimi_linear.testing.tolerances import relative_error, rounding_band

FAMILIES = ("benchmarks.ops.tune_pointwise", "benchmarks.ops.tune_kda")
WORTH = 0.02
"""The present entry stays unless another is faster by this share: clocks drift."""


def problems() -> list[Problem]:
    """Those of every family."""
    return [problem for family in FAMILIES for problem in importlib.import_module(family).problems()]


def usable(problem: Problem, present: Config, device: str) -> tuple[dict[str, tuple[Config, object]], list[str]]:
    """Candidates whose results agree with the present entry's, with the call to time, by name; and why others do not."""
    run = problem.build(device)
    expected = run(present)
    good: dict[str, tuple[Config, object]] = {}
    bad: list[str] = []
    for config in {str(c): c for c in (present, *problem.candidates)}.values():
        try:
            got = run(config)
        except Exception as error:  # a candidate that does not compile, or takes more than the chip has, is an answer
            bad.append(f"{config}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            continue
        errors = [relative_error(g, e) for g, e in zip(got, expected, strict=True)]
        allowed = [max(rounding_band(g.dtype), 1e-4) for g in got]
        if all(error <= most for error, most in zip(errors, allowed, strict=True)):
            good[str(config)] = (config, lambda config=config: run(config))
        else:
            bad.append(f"{config}: results differ by {max(errors):.2g}")
    return good, bad


def tune(problem: Problem, arch: tuple[int, int], repeats: int, device: str) -> Config:
    """Print the times of every candidate, fastest first, and give the one to keep."""
    present = lookup(problem.kernel, arch, problem.shape_class)
    good, bad = usable(problem, present, device)
    calls = {name: call for name, (_, call) in good.items()}
    times = {n: t.median for n, t in compare(calls, repeats=repeats, device=device).items()}  # type: ignore[arg-type]
    print(f"\n{problem.kernel}, {problem.shape_class}: {problem.about}", flush=True)
    for name in sorted(times, key=times.__getitem__):
        mark = "  <- in the table" if name == str(present) else ""
        print(
            f"  {times[name] * 1e6:9.1f} µs  {problem.moved / times[name] / 1e9:6,.0f} GB/s  {name}{mark}", flush=True
        )
    for line in bad:
        print(f"  out: {line}", flush=True)
    fastest = min(times, key=times.__getitem__)
    return good[fastest][0] if times[fastest] < (1 - WORTH) * times[str(present)] else present


def write(chosen: Mapping[tuple[str, str], Config], arch: tuple[int, int]) -> None:
    """Put entries into the table for ``arch``; an architecture that is new there first takes what it ran with."""
    number = arch[0] * 10 + arch[1]
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for (kernel, shape_class), config in chosen.items():
        by_arch = table[kernel]
        nearest = max(int(known) for known in by_arch if int(known) <= number)
        by_arch.setdefault(str(number), dict(by_arch[str(nearest)]))[shape_class] = config.to_json()
    TABLE.write_text(text_of(table), encoding="utf-8")


def text_of(table: Mapping[str, Mapping[str, Mapping[str, object]]]) -> str:
    """The table as JSON with one entry a line, architectures in order."""
    kernels = []
    for kernel, by_arch in table.items():
        archs = []
        for arch in sorted(by_arch, key=int):
            entries = ",\n".join(f"   {json.dumps(name)}: {json.dumps(e)}" for name, e in by_arch[arch].items())
            archs.append(f"  {json.dumps(arch)}: {{\n{entries}\n  }}")
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(archs) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="", help="only kernels whose name begins with this")
    parser.add_argument("--classes", default="", help="only shape classes that have this in their name")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each candidate")
    parser.add_argument("--write", action="store_true", help="change the table")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device: configurations are chosen by timing them; torch sees none")
    arch = device_arch(torch.cuda.current_device())
    wanted = [p for p in problems() if p.kernel.startswith(arguments.kernels) and arguments.classes in p.shape_class]
    if not wanted:
        parser.error(f"no problem of a kernel {arguments.kernels!r} and class {arguments.classes!r}")
    for problem in wanted:
        chosen = {(problem.kernel, problem.shape_class): tune(problem, arch, arguments.repeats, "cuda")}
        if arguments.write:
            write(chosen, arch)  # after each: a run that is cut short keeps what it found
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
