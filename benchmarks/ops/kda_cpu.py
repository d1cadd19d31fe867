"""KDA on a CPU: forward and backward of ``impl="torch"`` against transformers' pure-torch fallback, at equal inputs.

Correctness comes first: at every gate, outputs and gradients must be as exact as the fp64 recurrence allows, or no
speed is printed. Run from the repository root: ``python -m benchmarks.ops.kda_cpu``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._report import write_report
from kimi_linear.ops import chunk_kda, recurrent_kda
from kimi_linear.testing.factories import GATE_KINDS, KDAInputs, kda_inputs
from kimi_linear.testing.timers import compare, peak_memory
from kimi_linear.testing.tolerances import assert_close_to_reference, relative_error

BATCH, TOKENS, HEADS, DIM = 4, 1024, 4, 64
TIMED_GATES = ("init", "fast", "stress")


def gradients(output: Tensor, inputs: KDAInputs) -> list[Tensor]:
    """Gradients of q, k, v, beta and the log-decay under a fixed weight, after the output itself."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [x for name, x in inputs.leaves().items() if name != "initial_state"]
    return [output.detach(), *torch.autograd.grad((output * weight.to(output.dtype)).sum(), leaves)]


def ours(inputs: KDAInputs) -> Callable[[], list[Tensor]]:
    inputs = inputs.with_grad()
    return lambda: gradients(chunk_kda(*inputs.positional(), normalize_qk=True, impl="torch").output, inputs)


def recurrence(inputs: KDAInputs) -> Callable[[], list[Tensor]]:
    inputs = inputs.with_grad()
    return lambda: gradients(recurrent_kda(*inputs.positional(), normalize_qk=True, impl="reference").output, inputs)


def fallback(inputs: KDAInputs) -> Callable[[], list[Tensor]]:
    """What transformers' native model runs where no kernel package is installed."""
    from transformers.models.kimi_linear import modeling_kimi_linear as native

    attend = native.chunk_kimi_delta_attention
    attend = getattr(attend, "__wrapped__", attend)
    inputs = inputs.with_grad()
    q, k, v, gate, beta = inputs.positional()
    return lambda: gradients(attend(q, k, v, gate, beta, use_qk_l2norm_in_kernel=True)[0], inputs)


def check() -> list[str]:
    """The worst relative error against fp64 per gate, after asserting that it is within bounds."""
    cells = []
    for gate in GATE_KINDS:
        inputs = kda_inputs(1, 256, HEADS, key_dim=DIM, gate=gate, normalized=False)
        exact, plain, actual = recurrence(inputs.to(torch.float64))(), recurrence(inputs)(), ours(inputs)()
        for name, a, e, p in zip(("output", "dq", "dk", "dv", "dbeta", "dgate"), actual, exact, plain, strict=True):
            assert_close_to_reference(a, e, p, f"{gate}: {name}")
        cells.append(f"{gate} {max(relative_error(a, e) for a, e in zip(actual, exact, strict=True)):.1e}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each variant")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    errors, rows = check(), []
    for gate in TIMED_GATES:
        inputs = kda_inputs(BATCH, TOKENS, HEADS, key_dim=DIM, gate=gate, normalized=False)
        variants = {"transformers fallback": fallback(inputs), "kimi_linear impl=torch": ours(inputs)}
        times = compare(variants, warmup=1, repeats=arguments.repeats)
        base = times["transformers fallback"].median
        for name, call in variants.items():
            seconds, memory = times[name].median, peak_memory(call)
            speed = BATCH * TOKENS / seconds
            rows.append([gate, name, seconds * 1e3, speed, base / seconds, memory / 2**20, times[name].spread])
    write_report(
        "kda_cpu",
        title="KDA on a CPU, forward and backward",
        about=f"B={BATCH}, T={TOKENS}, H={HEADS}, K=V={DIM}, fp32, {arguments.threads} threads, l2norm included; medians of "
        f"{arguments.repeats} interleaved calls. Before timing, outputs and gradients were checked against the fp64 "
        f"recurrence (bound: twice the fp32 recurrence's own error); worst relative error by gate: {', '.join(errors)}.",
        columns=["gate", "implementation", "ms", "tokens/s", "speed-up", "peak extra MiB", "quartile spread"],
        rows=rows,
        packages=("transformers",),
    )


if __name__ == "__main__":
    main()
