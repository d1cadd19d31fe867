"""Right before fast: the outputs and gradients of a variant on the timed inputs themselves, against fp64 on a few heads.

Heads do not see each other, so the exact result of two of them judges a call over all: at full length and packing, and at
the cost of two heads. Nothing is timed whose error is above the bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops._variants import Variant, ours, training_leaves
from kimi_linear.testing.factories import KDAInputs
from kimi_linear.testing.tolerances import relative_error

OUTPUT_BOUND = 5e-3
GRADIENT_BOUND = 1e-2
PARAMETER_BOUND = 5e-2
"""Of A_log and dt_bias: each is a sum of T terms of either sign, which may be smaller than its terms are wrong."""
PARAMETERS = ("d gate.A_log", "d gate.dt_bias")
LONG = 1 << 18
"""From so many tokens on one head is checked: fp64 with gradients holds 30 KB a token and head."""
SPECIFIED = 1024
"""Up to so many tokens the reference judges; above, where it would take minutes, the plain torch kernel in fp64."""


class WrongAnswer(RuntimeError):
    """A variant of ours is further from fp64 than its bound: there is nothing to time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Exact:
    """fp64 results of some key heads: "output", and "d <leaf>" where gradients were asked for."""

    keys: tuple[int, ...]
    results: Mapping[str, Tensor]


def bound_of(name: str) -> float:
    """The largest relative error that a result may have."""
    return OUTPUT_BOUND if name == "output" else PARAMETER_BOUND if name in PARAMETERS else GRADIENT_BOUND


def exact(inputs: KDAInputs, weight: Tensor | None) -> Exact:
    """The judge for ``inputs``; with ``weight`` [B, T, HV, V], the gradient of the output, of the gradients too."""
    heads, tokens = inputs.q.shape[2], inputs.q.shape[1]
    keys = (heads - 1,) if tokens >= LONG else tuple(sorted({0, heads - 1}))
    part = inputs.heads(keys).to(torch.float64)
    variant = ours("reference" if tokens <= SPECIFIED else "torch")
    return Exact(keys=keys, results=_results(variant, part, None if weight is None else _heads(weight, inputs, keys)))


def errors(variant: Variant, inputs: KDAInputs, weight: Tensor | None, judge: Exact) -> dict[str, float]:
    """Relative error of each result of ``variant`` on the heads that ``judge`` knows."""
    mine = _results(variant, inputs, weight)
    repeat = inputs.v.shape[2] // inputs.q.shape[2]
    found = {}
    for name, expected in judge.results.items():
        got = mine[name]
        if name in PARAMETERS:
            got = got[[repeat * key + i for key in judge.keys for i in range(repeat)]]
        elif name in ("d q", "d k"):
            got = got[:, :, list(judge.keys)]
        else:
            got = _heads(got, inputs, judge.keys)
        found[name] = relative_error(got, expected)
    return found


def demand(found: Mapping[str, float], what: str) -> None:
    """Raises ``WrongAnswer`` where an error is above its bound, or NaN."""
    bad = [
        f"{name} {error:.2g} (at most {bound_of(name):g})"
        for name, error in found.items()
        if not error <= bound_of(name)
    ]
    if bad:
        raise WrongAnswer(f"{what}: relative error against fp64: {', '.join(bad)}; a wrong answer gets no speed")


def worst(found: Mapping[str, float]) -> tuple[float, float | None, float | None]:
    """The error of the output, the worst of the tensors' gradients, the worst of the gate's parameters' gradients."""
    tensors = [error for name, error in found.items() if name != "output" and name not in PARAMETERS]
    parameters = [found[name] for name in PARAMETERS if name in found]
    return found["output"], max(tensors, default=None), max(parameters, default=None)


def _heads(x: Tensor, inputs: KDAInputs, keys: tuple[int, ...]) -> Tensor:
    """The value heads of ``x`` [B, T, HV, ...] that read some key heads."""
    repeat = inputs.v.shape[2] // inputs.q.shape[2]
    return x[:, :, [repeat * key + i for key in keys for i in range(repeat)]]


def _results(variant: Variant, inputs: KDAInputs, weight: Tensor | None) -> dict[str, Tensor]:
    if weight is None:
        with torch.no_grad():
            return {"output": variant(inputs)}
    inputs = inputs.with_grad(clone=False)
    output, leaves = variant(inputs), training_leaves(inputs)
    gradients = torch.autograd.grad(output, list(leaves.values()), weight.to(output.dtype))
    return {"output": output.detach()} | {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}
