"""``chunk_kda`` and ``recurrent_kda``: every implementation against the fp64 recurrence, at every gate and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kimi_linear.ops import KDAOutput, chunk_kda, l2_normalize, recurrent_kda
from kimi_linear.testing.factories import GATE_KINDS, KDAInputs, kda_inputs
from kimi_linear.testing.tolerances import assert_close_to_reference, relative_error

OPS = {"chunk": chunk_kda, "recurrent": recurrent_kda}
LAYOUTS = {
    "batch": {"batch": 2, "tokens": 64, "heads": 2, "key_dim": 32},
    "odd": {"batch": 2, "tokens": 45, "heads": 1, "v_heads": 3, "key_dim": 16, "value_dim": 24},
    "packed": {"tokens": 100, "heads": 2, "key_dim": 16, "lengths": [0, 33, 1, 64, 0, 2]},
    "one token": {"batch": 3, "tokens": 1, "heads": 2, "key_dim": 8},
}


def run(inputs: KDAInputs, op: str, impl: str) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input under fixed random weights, by name."""
    inputs = inputs.with_grad()
    result = OPS[op](
        *inputs.positional(),
        initial_state=inputs.initial_state,
        cu_seqlens=inputs.cu_seqlens,
        normalize_qk=True,
        impl=impl,  # type: ignore[arg-type]
    )
    random = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in result]
    weights[1] /= inputs.q.shape[-1]  # or the last tokens, which alone reach the final state, would drown the others
    loss = sum((x.to(torch.float64) * w).sum() for x, w in zip(result, weights, strict=True))
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = dict(zip(leaves, gradients, strict=True))
    return {"output": result.output, "final_state": result.final_state} | {f"d {n}": x for n, x in named.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize(("op", "impl"), [("chunk", "torch"), ("recurrent", "torch"), ("chunk", "reference")])
def test_equals_the_recurrence(op: str, impl: str, gate: str, layout: str) -> None:
    """In fp64, where only a wrong formula can differ: outputs, states and all gradients."""
    inputs = kda_inputs(**LAYOUTS[layout], gate=gate, raw=True, dtype=torch.float64)
    exact, actual = run(inputs, "recurrent", "reference"), run(inputs, op, impl)
    errors = {name: relative_error(actual[name], exact[name]) for name in exact}
    # The readable chunked form differences cumulative sums: a 1e3 sum leaves 1e-13 of the decay that remains.
    assert max(errors.values()) < (1e-9 if impl == "reference" else 1e-12), errors


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_the_recurrence(gate: str, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice the recurrence's own at that precision, plus the rounding of the result.

    The gate is a plain log-decay here: the gradients of A_log and dt_bias are long sums made of its gradient by code
    that all implementations share, and the rounding of a sum that nearly cancels is a matter of luck.
    """
    inputs = kda_inputs(batch=8, tokens=128, heads=2, key_dim=64, gate=gate, dtype=dtype)
    exact = run(inputs.to(torch.float64), "recurrent", "reference")
    plain, actual = run(inputs, "recurrent", "reference"), run(inputs, "chunk", "torch")
    for name, value in actual.items():
        assert_close_to_reference(value, exact[name], plain[name], name)


def call(inputs: KDAInputs, op: str = "chunk", impl: str = "torch", **changes: object) -> KDAOutput:
    arguments = {"initial_state": inputs.initial_state, "cu_seqlens": inputs.cu_seqlens, "impl": impl} | changes
    return OPS[op](*inputs.positional(), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", OPS)
def test_segments_with_carried_state_equal_the_whole(op: str) -> None:
    whole = kda_inputs(batch=2, tokens=150, heads=2, key_dim=16, dtype=torch.float64)
    outputs, state = [], whole.initial_state
    for start, stop in [(0, 33), (33, 33), (33, 97), (97, 98), (98, 150)]:
        parts = (x[:, start:stop] for x in (whole.q, whole.k, whole.v, whole.log_decay, whole.beta))
        output, state = OPS[op](*parts, initial_state=state, impl="torch")
        outputs.append(output)
    expected = call(whole, op)
    torch.testing.assert_close(torch.cat(outputs, 1), expected.output, rtol=0, atol=1e-13)
    torch.testing.assert_close(state, expected.final_state, rtol=0, atol=1e-13)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_packed_equals_separate(op: str, impl: str) -> None:
    """Neighbours in the pack do not matter, and an empty sequence hands its state through."""
    lengths = [70, 0, 1, 32, 97]
    packed = kda_inputs(tokens=200, heads=2, v_heads=4, key_dim=16, gate="mixed", lengths=lengths)
    result = call(packed, op, impl)
    start = 0
    for n, length in enumerate(lengths):
        own = slice(start, start + length)
        start += length
        parts = (x[:, own] for x in (packed.q, packed.k, packed.v, packed.log_decay, packed.beta))
        alone = OPS[op](*parts, initial_state=packed.initial_state[n : n + 1], impl=impl)
        torch.testing.assert_close(result.output[:, own], alone.output, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.final_state[n], alone.final_state[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(result.final_state[1], packed.initial_state[1])


def test_batch_slot_and_neighbours_do_not_matter_bitwise() -> None:
    """A row of a batch, moved to another slot among other rows, gives the same bits; so do two equal runs."""
    a = kda_inputs(batch=4, tokens=80, heads=2, key_dim=32, seed=1)
    b = kda_inputs(batch=4, tokens=80, heads=2, key_dim=32, seed=2)
    mixed = [torch.cat([y[:2], x[1:2], y[2:3]]) for x, y in zip(a.positional(), b.positional(), strict=True)]
    first, second = call(a, initial_state=None), chunk_kda(*mixed, impl="torch")
    assert torch.equal(first.output[1], second.output[2])
    assert torch.equal(first.final_state[1], second.final_state[2])
    assert torch.equal(first.output, call(a, initial_state=None).output)


def test_the_past_does_not_depend_on_later_tokens_or_gates() -> None:
    """Outputs and gradients of a prefix are bitwise the same whatever follows, at the strongest gates too."""
    inputs = kda_inputs(batch=1, tokens=96, heads=2, key_dim=32, gate="mixed")
    cut, results = 41, []
    for later in (-1e-3, -99.0):
        gate = torch.cat([inputs.log_decay[:, :cut], torch.full_like(inputs.log_decay[:, cut:], later)], dim=1)
        leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, gate, inputs.beta)]
        output = chunk_kda(*leaves, impl="torch").output
        gradients = torch.autograd.grad(output[:, :cut].square().sum(), leaves)
        results.append([output[:, :cut], *(x[:, :cut] for x in gradients)])
    for early, late in zip(*results, strict=True):
        assert torch.equal(early, late)


def test_no_drift_over_512_decoded_tokens() -> None:
    """bf16 inputs, fp32 state: 512 single steps stay with the chunked form over the whole."""
    inputs = kda_inputs(batch=1, tokens=512, heads=2, key_dim=32, dtype=torch.bfloat16)
    state, outputs = inputs.initial_state, []
    for t in range(512):
        step = (x[:, t : t + 1] for x in inputs.positional())
        output, state = recurrent_kda(*step, initial_state=state, impl="torch")  # type: ignore[arg-type]
        outputs.append(output)
    whole = call(inputs)
    assert relative_error(torch.cat(outputs, 1), whole.output) < 2 * torch.finfo(torch.bfloat16).eps
    assert relative_error(state, whole.final_state) < 1e-5


def test_state_indices_update_the_pool_in_place() -> None:
    inputs = kda_inputs(batch=2, tokens=3, heads=2, key_dim=16)
    pool = torch.randn(5, 2, 16, 16)
    before, slots = pool.clone(), torch.tensor([3, 1])
    result = call(inputs, "recurrent", initial_state=pool, state_indices=slots)
    expected = call(inputs, "recurrent", initial_state=before[slots])
    assert result.final_state is pool
    assert torch.equal(pool[slots], expected.final_state)
    assert torch.equal(result.output, expected.output)
    assert torch.equal(pool[[0, 2, 4]], before[[0, 2, 4]])


def test_the_callers_state_is_left_alone() -> None:
    inputs = kda_inputs(batch=2, tokens=40, heads=2, key_dim=16)
    before = inputs.initial_state.clone()
    call(inputs), call(inputs, "recurrent")
    assert torch.equal(inputs.initial_state, before)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens_at_all(op: str) -> None:
    inputs = kda_inputs(batch=2, tokens=1, heads=2, key_dim=16)
    empty = [x[:, :0] for x in inputs.positional()]  # type: ignore[index]
    result = OPS[op](*empty, initial_state=inputs.initial_state, impl="torch")
    assert result.output.shape == (2, 0, 2, 16)
    assert torch.equal(result.final_state, inputs.initial_state)


def test_strided_views_give_the_same_bits() -> None:
    inputs = kda_inputs(batch=2, tokens=64, heads=2, key_dim=16)
    fused = torch.cat([inputs.q, inputs.k, inputs.v], dim=-1)
    q, k, v = fused.chunk(3, dim=-1)
    assert not q.is_contiguous()
    strided = chunk_kda(q, k, v, inputs.log_decay, inputs.beta, impl="torch")
    assert torch.equal(strided.output, call(inputs, initial_state=None).output)


def test_l2_normalize_and_its_backward() -> None:
    """Against the formula and its autograd gradient, in fp64 exactly, in bf16 within its rounding; zeros stay zero."""
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    x[0, 0] = 0
    weight = torch.randn_like(x)

    def formula(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, exact = l2_normalize(leaf), formula(other)
    torch.testing.assert_close(actual, exact, rtol=0, atol=1e-15)
    (d_actual,), (d_exact,) = (torch.autograd.grad((y * weight).sum(), z) for y, z in ((actual, leaf), (exact, other)))
    torch.testing.assert_close(d_actual, d_exact, rtol=1e-13, atol=1e-13)
    low = x.bfloat16()
    assert relative_error(l2_normalize(low), formula(low.double())) < torch.finfo(torch.bfloat16).eps / 2
