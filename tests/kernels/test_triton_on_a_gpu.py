"""The Triton kernels on a GPU, through the public operation: exact at every gate, bitwise repeatable, far offsets."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from kimi_linear.ops import KDAOutput, chunk_kda
from kimi_linear.testing.factories import GATE_KINDS, GateKind, KDAInputs, kda_inputs
from kimi_linear.testing.gradients import sizes_of_sums
from kimi_linear.testing.tolerances import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]

LIMIT = 5e-3
"""Relative error of bf16 against fp64: the bound that the field's kernels are held to."""
GRADIENT_LIMIT = 1e-2
CLASSES = {  # dtype, K, V as at each gate and layout; limits of results and of gradients
    "bf16": (torch.bfloat16, 128, 128, LIMIT, GRADIENT_LIMIT),
    "bf16, K=256": (torch.bfloat16, 256, 256, LIMIT, GRADIENT_LIMIT),
    "fp32": (torch.float32, 128, 128, 1e-5, 1e-4),
}
CANCELLED = {torch.bfloat16: 3e-3, torch.float32: 5e-4}
"""Limit for the gradients of A_log and dt_bias where their terms cancel, measured by the sizes of these; the usual one holds elsewhere. In fp32 a running log2-decay of
hundreds is known to 2^-16, and the gate's derivative favours the strong steps."""
WIDTHS = [(name, K, V) for name in ("bf16", "fp32") for K in (32, 64, 128, 256) for V in (32, 64, 128, 256)
          if name == "bf16" or K < 256]  # fmt: skip
LAYOUTS = {
    "batch": {"batch": 2, "tokens": 256, "heads": 2, "v_heads": 4},
    "odd": {"batch": 3, "tokens": 131, "heads": 1},
    "packed": {"tokens": 300, "heads": 2, "lengths": [0, 70, 1, 64, 0, 165]},
}


def call(inputs: KDAInputs, **changes: object) -> KDAOutput:
    arguments = {"initial_state": inputs.initial_state, "cu_seqlens": inputs.cu_seqlens, "impl": "triton"} | changes
    return chunk_kda(*inputs.positional(), normalize_qk=True, **arguments)  # type: ignore[arg-type]


def test_two_runs_and_any_slot_are_bitwise_equal() -> None:
    lengths = [100, 64, 131]
    packed = kda_inputs(tokens=295, heads=2, key_dim=128, lengths=lengths, dtype=torch.bfloat16, device="cuda")
    first, second = call(packed), call(packed)
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.final_state, second.final_state)
    start = 0
    for n, length in enumerate(lengths):
        own = slice(start, start + length)
        start += length
        parts = (x[:, own] for x in (packed.q, packed.k, packed.v, packed.log_decay, packed.beta))
        alone = chunk_kda(*parts, normalize_qk=True, initial_state=packed.initial_state[n : n + 1], impl="triton")
        assert torch.equal(alone.output, first.output[:, own])
        assert torch.equal(alone.final_state[0], first.final_state[n])


def test_the_past_does_not_depend_on_later_gates() -> None:
    inputs = kda_inputs(1, 192, 2, key_dim=128, gate="mixed", dtype=torch.bfloat16, device="cuda")
    outputs = []
    for later in (-1e-3, -99.0):
        gate = torch.cat([inputs.log_decay[:, :128], torch.full_like(inputs.log_decay[:, 128:], later)], dim=1)
        outputs.append(chunk_kda(inputs.q, inputs.k, inputs.v, gate, inputs.beta, impl="triton").output[:, :128])
    assert torch.equal(*outputs)


def test_offsets_past_two_to_the_31() -> None:
    """600K tokens of 32 heads of 128 are 2.5e9 numbers; the last tokens equal those of their segment alone."""
    tokens, tail = 600 * 1024, 512
    q, k, v, x = (torch.randn(1, tokens, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    gate, beta = x.float().sigmoid_().neg_().mul_(3).to(torch.bfloat16), torch.rand(1, tokens, 32, device="cuda")
    del x
    head = (y[:, :-tail] for y in (q, k, v, gate, beta))
    state = chunk_kda(*head, normalize_qk=True, impl="triton").final_state
    last = chunk_kda(
        *(y[:, -tail:] for y in (q, k, v, gate, beta)), normalize_qk=True, initial_state=state, impl="triton"
    )
    whole = chunk_kda(q, k, v, gate, beta, normalize_qk=True, impl="triton")
    assert torch.equal(whole.output[:, -tail:], last.output)
    assert torch.equal(whole.final_state, last.final_state)


def gradients(inputs: KDAInputs, d_output: torch.Tensor, d_state: torch.Tensor | None, impl: str) -> list[torch.Tensor]:
    wanted = inputs.with_grad()
    gate = wanted.gate
    of_gate = [gate] if isinstance(gate, torch.Tensor) else [gate.x, gate.A_log, gate.dt_bias]
    leaves = [wanted.q, wanted.k, wanted.v, wanted.beta, *of_gate]
    if wanted.initial_state is not None:
        leaves.append(wanted.initial_state)
    result = call(wanted, impl=impl)
    outputs = [result.output] if d_state is None else [result.output, result.final_state]
    weights = [d_output] if d_state is None else [d_output, d_state]
    return list(torch.autograd.grad(outputs, leaves, [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)]))


def assert_gradients(found: list[torch.Tensor], true: list[torch.Tensor], wide: KDAInputs, limit: float) -> None:
    """Those of ``gradients``, of every input, against fp64's."""
    names, sizes = list(wide.leaves()), list(true)
    names = ["q", "k", "v", "beta", *[name for name in names if name.startswith("gate")], "initial_state"]
    if "gate.x" in names:
        sizes[5:7] = sizes_of_sums(wide, true[4])
    for name, a, b, size in zip(names, found, true, sizes, strict=True):
        error, cancelled = relative_error(a, b), ((a.double() - b).norm() / size.norm()).item()
        if name in ("gate.A_log", "gate.dt_bias"):
            assert error < limit or cancelled < CANCELLED[found[0].dtype], (name, error, cancelled)
        else:
            assert error < limit, (name, error)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("kind", CLASSES)
def test_exact_at_every_gate(kind: str, gate: GateKind, layout: str, raw: bool) -> None:
    """Results and gradients, of the initial state and the final one too."""
    dtype, key_dim, value_dim, limit, of_gradients = CLASSES[kind]
    inputs = kda_inputs(
        **LAYOUTS[layout], key_dim=key_dim, value_dim=value_dim, gate=gate, raw=raw, normalized=False, dtype=dtype,
        device="cuda",
    )  # fmt: skip
    wide = inputs.to(torch.float64)
    result, exact = call(inputs), call(wide, impl="torch")
    assert relative_error(result.output, exact.output) < limit
    assert relative_error(result.final_state, exact.final_state) < limit
    random = torch.Generator("cuda").manual_seed(1)
    d_output = torch.randn(inputs.v.shape, generator=random, device="cuda").to(dtype)
    assert inputs.initial_state is not None
    d_state = torch.randn(inputs.initial_state.shape, generator=random, device="cuda")
    true = gradients(wide, d_output.double(), d_state.double(), "torch")
    assert_gradients(gradients(inputs, d_output, d_state, "triton"), true, wide, of_gradients)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_long_sequence_of_one_head(kind: str) -> None:
    """Cut into segments, in both directions; the gate's gradients sum over many tokens."""
    dtype, key_dim, value_dim, limit, of_gradients = CLASSES[kind]
    inputs = kda_inputs(
        1, 4096, 1, key_dim=key_dim, value_dim=value_dim, raw=True, normalized=False, dtype=dtype, device="cuda"
    )
    wide = inputs.to(torch.float64)
    assert relative_error(call(inputs).output, call(wide, impl="torch").output) < limit
    d_output = torch.randn(inputs.v.shape, device="cuda").to(dtype)
    true = gradients(wide, d_output.double(), None, "torch")
    assert_gradients(gradients(inputs, d_output, None, "triton"), true, wide, of_gradients)


@pytest.mark.parametrize(("kind", "key_dim", "value_dim"), WIDTHS)
def test_every_width(kind: str, key_dim: int, value_dim: int) -> None:
    dtype, _, _, limit, of_gradients = CLASSES[kind]
    inputs = kda_inputs(
        1, 150, 8, key_dim=key_dim, value_dim=value_dim, raw=True, normalized=False, dtype=dtype, device="cuda"
    )
    wide = inputs.to(torch.float64)
    result, exact = call(inputs), call(wide, impl="torch")
    assert relative_error(result.output, exact.output) < limit
    assert relative_error(result.final_state, exact.final_state) < limit
    d_output = torch.randn(inputs.v.shape, device="cuda").to(dtype)
    true = gradients(wide, d_output.double(), None, "torch")
    assert_gradients(gradients(inputs, d_output, None, "triton"), true, wide, of_gradients)


def test_gradients_are_bitwise_repeatable_and_the_same_in_any_slot() -> None:
    lengths = [100, 64, 131]
    packed = kda_inputs(tokens=295, heads=2, key_dim=128, lengths=lengths, dtype=torch.bfloat16, device="cuda")
    d_output = torch.randn(packed.v.shape, device="cuda").to(torch.bfloat16)
    first, second = gradients(packed, d_output, None, "triton"), gradients(packed, d_output, None, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        start += length
        parts = [
            x[:, own].detach().requires_grad_() for x in (packed.q, packed.k, packed.v, packed.beta, packed.log_decay)
        ]
        q, k, v, beta, gate = parts
        state = None if packed.initial_state is None else packed.initial_state[lengths.index(length)][None]
        output = chunk_kda(q, k, v, gate, beta, normalize_qk=True, initial_state=state, impl="triton").output
        for found, in_pack in zip(torch.autograd.grad(output, parts, d_output[:, own]), first, strict=False):
            assert torch.equal(found, in_pack[:, own])


def test_gradients_of_the_past_do_not_depend_on_later_gates() -> None:
    inputs = kda_inputs(1, 192, 2, key_dim=128, gate="mixed", dtype=torch.bfloat16, device="cuda")
    d_output = torch.randn(inputs.v.shape, device="cuda").to(torch.bfloat16)
    d_output[:, 128:] = 0
    found = []
    for later in (-1e-3, -99.0):
        gate = torch.cat([inputs.log_decay[:, :128], torch.full_like(inputs.log_decay[:, 128:], later)], dim=1)
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, gate, inputs.beta)]
        output = chunk_kda(*leaves, impl="triton").output
        found.append([x[:, :128] for x in torch.autograd.grad(output, leaves, d_output)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_of_a_first_gate_cancel_to_nothing() -> None:
    """Without a state, the first token's decay acts on nothing: what is left of its gradient are pairs that must cancel.

    They do where both sides of a pair multiply the same rounded numbers: rounding every factor on its own leaves a hundredth.
    """
    inputs = kda_inputs(2, 256, 2, key_dim=128, normalized=False, dtype=torch.bfloat16, device="cuda")
    gate = inputs.log_decay.detach().requires_grad_()
    output = chunk_kda(inputs.q, inputs.k, inputs.v, gate, inputs.beta, normalize_qk=True, impl="triton").output
    (found,) = torch.autograd.grad(output, gate, torch.randn_like(output))
    size = found.square().mean().sqrt()
    assert size > 0
    assert found[:, 0].square().mean().sqrt() < 1e-3 * size


def test_gradients_of_the_gate_over_many_tokens() -> None:
    """At the fast gate, where terms cancel most; A_log's gradient sums them over tokens and channels."""
    inputs = kda_inputs(
        1, 4096, 4, key_dim=128, gate="fast", raw=True, normalized=False, dtype=torch.bfloat16, device="cuda"
    )
    d_output = torch.randn(inputs.v.shape, device="cuda").to(torch.bfloat16)
    exact = gradients(inputs.to(torch.float64), d_output.double(), None, "torch")
    found = gradients(inputs, d_output, None, "triton")
    names = ("q", "k", "v", "beta", "gate", "A_log", "dt_bias")
    for name, a, b in zip(names, found, exact, strict=False):
        assert relative_error(a, b) < GRADIENT_LIMIT, name


STEEP = {  # tokens; those that forget, between quiet ones; their log2-decay in the first channels
    "one tile": (192, range(99, 112, 4), (-80.0, -140.0)),
    "partial last tile": (101, range(97, 101, 2), (-130.0, -240.0)),
    "first token of a tile": (64, range(16, 17), (-130.0, -400.0)),
    "about the range": (64, range(16, 32), (-7.499, -7.501, -14.374, -14.376)),
}


@pytest.mark.parametrize("where", STEEP)
def test_channels_that_one_anchor_does_not_serve(where: str) -> None:
    tokens, strong, steps = STEEP[where]
    inputs = kda_inputs(1, tokens, 2, key_dim=128, normalized=False, dtype=torch.bfloat16, device="cuda")
    for channel, step in enumerate(steps):
        inputs.log_decay[:, strong, :, channel::8] = step * math.log(2)
    wide = inputs.to(torch.float64)
    result, exact = call(inputs), call(wide, impl="torch")
    assert relative_error(result.output, exact.output) < LIMIT
    assert relative_error(result.final_state, exact.final_state) < LIMIT
    d_output = torch.randn(inputs.v.shape, device="cuda").to(torch.bfloat16)
    d_state = torch.randn(inputs.initial_state.shape, device="cuda")
    found = gradients(inputs, d_output, d_state, "triton")
    for a, b in zip(found, gradients(wide, d_output.double(), d_state.double(), "torch"), strict=True):
        assert relative_error(a, b) < GRADIENT_LIMIT


@pytest.mark.parametrize("cut", [5, 37])
def test_a_prefix_inside_a_tile_feels_later_gates_only_in_its_rounding(cut: int) -> None:
    """Later gates move the anchors of their own tile, and what is anchored there is rounded otherwise; no more than that."""
    inputs = kda_inputs(1, 64, 2, key_dim=128, gate="fast", normalized=False, dtype=torch.bfloat16, device="cuda")
    d_output = torch.randn(inputs.v.shape, device="cuda").to(torch.bfloat16)
    d_output[:, cut:] = 0
    runs = []
    for later in (-1e-3, -10.0, -99.0):
        gate = torch.cat([inputs.log_decay[:, :cut], torch.full_like(inputs.log_decay[:, cut:], later)], dim=1)
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, gate, inputs.beta)]
        output = chunk_kda(*leaves, normalize_qk=True, impl="triton").output
        runs.append([x[:, :cut] for x in (output, *torch.autograd.grad(output, leaves, d_output))])
    for output, *of_inputs in runs[1:]:
        assert relative_error(output, runs[0][0]) < LIMIT
        for a, b in zip(of_inputs, runs[0][1:], strict=True):
            assert relative_error(a, b) < GRADIENT_LIMIT


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_small_gradients_are_as_exact_as_large_ones(gate: GateKind) -> None:
    """A loss averaged over many tokens, times an anchor 2^-110 away, would be below the least number of fp32."""
    inputs = kda_inputs(
        1, 300, 2, key_dim=128, raw=True, gate=gate, normalized=False, dtype=torch.bfloat16, device="cuda"
    )
    d_output = torch.randn(inputs.v.shape, device="cuda").to(torch.bfloat16)
    usual = gradients(inputs, d_output, None, "triton")
    for found, expected in zip(gradients(inputs, d_output * 2.0**-40, None, "triton"), usual, strict=True):
        assert relative_error(found.double() * 2.0**40, expected) < 1e-3


@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 32), (64, 128)])
def test_gradients_past_two_to_the_31(key_dim: int, value_dim: int) -> None:
    """The last tokens of 513K get the gradients of their segment alone. One of K and V at a time: both do not fit into 80 GB."""
    tokens, tail, dims = 513 * 1024, 512, (key_dim, key_dim, value_dim, key_dim)
    q, k, v, x = (torch.randn(1, tokens, 32, dim, device="cuda", dtype=torch.bfloat16) for dim in dims)
    gate = x.sigmoid_().neg_().mul_(3)
    beta = torch.rand(1, tokens, 32, device="cuda")
    head = (y[:, :-tail] for y in (q, k, v, gate, beta))
    with torch.no_grad():
        state = chunk_kda(*head, normalize_qk=True, impl="triton").final_state
    leaves = [y.requires_grad_() for y in (q, k, v, gate, beta)]
    d_output = torch.randn(1, tail, 32, value_dim, device="cuda", dtype=torch.bfloat16)
    whole = chunk_kda(*leaves, normalize_qk=True, impl="triton").output[:, -tail:]
    of_whole = [y[:, -tail:].clone() for y in torch.autograd.grad(whole, leaves, d_output)]
    last = [y[:, -tail:].detach().requires_grad_() for y in leaves]
    alone = chunk_kda(*last, normalize_qk=True, initial_state=state, impl="triton").output
    for a, b in zip(of_whole, torch.autograd.grad(alone, last, d_output), strict=True):
        assert torch.equal(a, b)


COMPILED = """
import torch
from kimi_linear.ops import chunk_kda
from kimi_linear.testing.factories import kda_inputs

inputs = kda_inputs(2, 128, 2, key_dim=128, raw=True, normalized=False, dtype=torch.bfloat16, device="cuda")
d_output = torch.randn(inputs.v.shape, device="cuda").to(torch.bfloat16)
step = lambda q, k, v: chunk_kda(q * 1.0, k, v, inputs.gate, inputs.beta, normalize_qk=True, impl="triton").output
leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
eager, compiled = step(*leaves), torch.compile(step, fullgraph=True)(*leaves)
assert torch.equal(eager, compiled)
wanted = torch.autograd.grad(eager, leaves, d_output)
for a, b in zip(torch.autograd.grad(compiled, leaves, d_output), wanted, strict=True):
    assert torch.equal(a, b)
with torch.no_grad():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step(*leaves)
    recorded.zero_()
    graph.replay()
assert torch.equal(recorded, eager)
"""


def test_compiles_into_one_graph_and_records_into_a_cuda_graph() -> None:
    """In a process of its own: the compiler does not look through the wrappers that check shapes here."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_is_a_sound_operator_of_torch() -> None:
    inputs = kda_inputs(
        1, 70, 2, key_dim=32, raw=True, normalized=False, dtype=torch.bfloat16, device="cuda"
    ).with_grad()
    gate = inputs.gate
    assert not isinstance(gate, torch.Tensor)
    arguments = (
        inputs.q, inputs.k, inputs.v, gate.x, inputs.beta, gate.A_log, gate.dt_bias, inputs.initial_state, None, None,
        32**-0.5, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kimi_linear.chunk_kda_train.default, arguments)


def test_auto_takes_it_with_a_gradient_too() -> None:
    inputs = kda_inputs(1, 64, 1, key_dim=128, dtype=torch.bfloat16, device="cuda").with_grad()
    assert torch.equal(call(inputs, impl="auto").output, call(inputs).output)
