"""Inputs, and exact fp64 answers, for the tests of the pointwise kernels: interpreted, compiled, and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
LENGTHS = (0, 20, 1, 0, 1, 2, 57, 0)
"""Empty, one-token and longer sequences, in 81 tokens."""


@dataclass(frozen=True)
class Case:
    """One call: named leaves, what to run on them, and the formula that judges it (both give a tuple of tensors)."""

    name: str
    leaves: Mapping[str, Tensor]
    run: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
    formula: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]


def results(case: Case, run: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs of ``run`` and gradients of every leaf, all leaves in ``dtype`` first where given."""
    leaves = {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in case.leaves.items()}
    outputs = run(leaves)
    random = torch.Generator().manual_seed(1)
    # Rounded to the narrow dtype for every precision: all are sent the same numbers.
    narrow = next(iter(case.leaves.values())).dtype
    sent = [torch.randn(y.shape, generator=random).to(narrow).to(y.device, y.dtype) for y in outputs]
    used = [(y, dy) for y, dy in zip(outputs, sent, strict=True) if y.requires_grad and y.numel()]
    gradients = torch.autograd.grad(
        [y for y, _ in used], list(leaves.values()), [dy for _, dy in used], allow_unused=True, materialize_grads=True
    )
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, bounds: list[int] | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """torch's own depthwise convolution of each sequence behind its history: (output, final state)."""
    rows = [x[i : i + 1] for i in range(len(x))]
    sequences = rows if bounds is None else [x[:, a:b] for a, b in itertools.pairwise(bounds)]
    outputs, states = [], []
    for n, part in enumerate(sequences):
        before = weight.shape[1] - 1
        history = x.new_zeros(1, x.shape[2], before) if state is None else state[n : n + 1].to(x.dtype)
        seen = torch.cat([history, part.mT], dim=-1)
        y = F.conv1d(seen, weight.to(x.dtype)[:, None], groups=x.shape[2]).mT if part.shape[1] else part
        y = y if bias is None else y + bias.to(x.dtype)
        outputs.append(F.silu(y) if silu else y)
        states.append(seen[..., seen.shape[-1] - before :])
    return torch.cat(outputs, dim=0 if bounds is None else 1), torch.cat(states)


def conv_case(
    ops: Any, *, width: int, taps: int, packed: bool, state: bool = True, bias: bool = False, silu: bool = True,
    batch: int = 2, tokens: int = 37, dtype: torch.dtype = torch.float32, device: str = "cpu",
    index: torch.dtype = torch.int32,
) -> Case:  # fmt: skip
    """``ops.short_conv`` on a slice of a wider tensor."""
    bounds = [0, *itertools.accumulate(LENGTHS)] if packed else None
    batch, tokens = (1, bounds[-1]) if bounds else (batch, tokens)
    sequences = len(LENGTHS) if bounds else batch
    made = maker(dtype, device)
    leaves = {"x": made(batch, tokens, width + 8), "weight": made(width, taps)}
    leaves |= {"bias": made(width)} if bias else {}
    leaves |= {"state": made(sequences, width, taps - 1)} if state else {}
    cu = None if bounds is None else torch.tensor(bounds, dtype=index, device=device)

    def run(leaf: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return ops.short_conv(leaf["x"][..., :width], leaf["weight"], leaf.get("bias"), leaf.get("state"), cu, silu)

    def formula(leaf: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        x = leaf["x"][..., :width]
        return convolved(x, leaf["weight"], leaf.get("bias"), leaf.get("state"), bounds, silu)

    name = f"conv {width} W={taps}{' packed' if packed else ''}{' state' if state else ''}{' bias' if bias else ''}"
    return Case(name + (" silu" if silu else ""), leaves, run, formula)


def qkv_case(
    ops: Any, *, widths: tuple[int, int, int], packed: bool, fused: bool, dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:  # fmt: skip
    """``ops.short_conv_qkv``, on slices of one tensor or on three tensors."""
    bounds = [0, *itertools.accumulate(LENGTHS)] if packed else None
    batch, tokens, sequences = (1, bounds[-1], len(LENGTHS)) if bounds else (2, 21, 2)
    made, width = maker(dtype, device), sum(widths)
    leaves = {"x": made(batch, tokens, width + 8), "weight": made(width, 4), "state": made(sequences, width, 3)}
    cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int64, device=device)

    def run(leaf: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        parts = leaf["x"][..., :width].split(widths, dim=-1)
        parts = parts if fused else [part.contiguous() for part in parts]
        *ys, final = ops.short_conv_qkv(*parts, *leaf["weight"].split(widths), leaf["state"], cu, True)
        return *ys, final

    def formula(leaf: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        y, final = convolved(leaf["x"][..., :width], leaf["weight"], None, leaf["state"], bounds, True)
        return *y.split(widths, dim=-1), final

    return Case(f"qkv {widths}{' packed' if packed else ''}{' fused' if fused else ''}", leaves, run, formula)


def norm_case(
    ops: Any, kind: str, width: int, *, rows: tuple[int, ...] = (3, 7, 2), layout: str = "slice",
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> Case:  # fmt: skip
    """``kind``: l2, rms, sigmoid or swish; ``layout``: dense, slice (of a wider last dim), or heads (of a wider token)."""
    made = maker(dtype, device)
    wide = {"dense": (*rows, width), "slice": (*rows, width + 8), "heads": (*rows[:-1], rows[-1] + 1, width)}[layout]
    leaves = {"x": made(*wide)}
    leaves |= {} if kind == "l2" else {"weight": made(width)}
    leaves |= {"gate": made(*wide)} if kind in ("sigmoid", "swish") else {}

    def view(x: Tensor) -> Tensor:
        return x[..., :width] if layout == "slice" else x[..., : rows[-1], :]

    def run(leaf: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        x = view(leaf["x"])
        if kind == "l2":
            return (ops.l2_normalize(x, EPS),)
        if kind == "rms":
            return (ops.rms_norm(x, leaf["weight"], EPS),)
        return (ops.gated_rms_norm(x, view(leaf["gate"]), leaf["weight"], EPS, kind),)

    def formula(leaf: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        x = view(leaf["x"])
        if kind == "l2":
            return (x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt(),)
        y = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * leaf["weight"]
        if kind == "rms":
            return (y,)
        gate = view(leaf["gate"])
        return (y * (gate.sigmoid() if kind == "sigmoid" else F.silu(gate)),)

    return Case(f"{kind} {width} {layout}", leaves, run, formula)


def swiglu_case(
    ops: Any, width: int, *, rows: tuple[int, ...] = (3, 7), halves: bool = True,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> Case:  # fmt: skip
    """``ops.swiglu`` of two tensors, or of the halves of one."""
    made = maker(dtype, device)
    leaves = {"x": made(*rows, 2 * width)} if halves else {"gate": made(*rows, width), "up": made(*rows, width)}

    def parts(leaf: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return leaf["x"].chunk(2, dim=-1) if halves else (leaf["gate"], leaf["up"])

    def run(leaf: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (ops.swiglu(*parts(leaf)),)

    def formula(leaf: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        gate, up = parts(leaf)
        return (F.silu(gate) * up,)

    return Case(f"swiglu {width}{' halves' if halves else ''}", leaves, run, formula)


def maker(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """Random tensors, the same on every device."""
    random = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=random).to(dtype).to(device)
