"""GDN and Mamba-2-style attention: every implementation against the recurrence written out in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kimi_linear.ops import (
    KDAOutput,
    chunk_gdn,
    chunk_kda,
    chunk_mamba2,
    l2_normalize,
    recurrent_gdn,
    recurrent_mamba2,
)
from kimi_linear.ops.linear_attention import FORGIVING
from kimi_linear.testing.tolerances import assert_close, assert_close_to_reference

OPS: dict[str, Callable[..., KDAOutput]] = {
    "chunk_gdn": chunk_gdn,
    "recurrent_gdn": recurrent_gdn,
    "chunk_mamba2": chunk_mamba2,
    "recurrent_mamba2": recurrent_mamba2,
}
GATES = {"init": (-0.5, 0.0), "fast": (-8.0, -0.5), "stress": (-60.0, 0.0), "none": (0.0, 0.0)}
every_op = pytest.mark.parametrize("name", OPS)
every_impl = pytest.mark.parametrize("impl", ["torch", "reference"])


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token after the other, with k already normalised and the default scale."""
    shared = v.shape[2] // q.shape[2]
    outputs = []
    for t in range(q.shape[1]):
        query, key = (x[:, t].repeat_interleave(shared, dim=1) for x in (q, k))
        state = state * g[:, t, :, None, None].exp()
        write = v[:, t]
        if beta is not None:
            write = beta[:, t, :, None] * (write - torch.einsum("bhvk,bhk->bhv", state, key))
        state = state + torch.einsum("bhv,bhk->bhvk", write, key)
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, query) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


def make(
    name: str, *, batch: int = 2, tokens: int = 75, sequences: int | None = None, gate: str = "init",
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """([q, k, v, gate(, beta)], state): 2 key heads, 4 value heads, K == 8, V == 6."""
    low, high = GATES[gate]
    q, k = (torch.randn(batch, tokens, 2, 8, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, tokens, 4, 6, dtype=torch.float64)
    g = low + (high - low) * torch.rand(batch, tokens, 4, dtype=torch.float64)
    if gate == "stress":  # strong and weak forgetting in turn: sums of hundreds with weak decays between them
        g[:, ::3] = -1e-3
    beta = [torch.rand(batch, tokens, 4, dtype=torch.float64)] if "gdn" in name else []
    state = torch.randn(sequences or batch, 4, 6, 8, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rounded = [x.to(dtype) for x in (q, l2_normalize(k), v)]
    return [*rounded, *(x.to(wide) for x in (g, *beta))], state.to(wide)


def run_formula(inputs: list[Tensor], state: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (x if x is None else x.to(dtype) for x in (*inputs, *[None] * (5 - len(inputs))))
    assert q is not None
    assert k is not None
    assert v is not None
    assert g is not None
    return recurrence(q, k, v, g, beta, state.to(dtype))


@every_op
@every_impl
@pytest.mark.parametrize("gate", GATES)
def test_equals_the_recurrence(name: str, impl: str, gate: str) -> None:
    inputs, state = make(name, gate=gate)
    out = OPS[name](*inputs, initial_state=state, impl=impl)
    expected = run_formula(inputs, state)
    assert_close(out.output, expected[0], "output")
    assert_close(out.final_state, expected[1], "final_state")


@every_op
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 96])
def test_every_length_and_no_state(name: str, tokens: int) -> None:
    inputs, state = make(name, tokens=tokens)
    out = OPS[name](*inputs, impl="torch")
    expected = run_formula(inputs, torch.zeros_like(state))
    assert_close(out.output, expected[0], "output")
    assert_close(out.final_state, expected[1], "final_state")


@every_op
@every_impl
def test_no_token_hands_the_state_through(name: str, impl: str) -> None:
    inputs, state = make(name, tokens=0)
    out = OPS[name](*inputs, initial_state=state, impl=impl)
    assert out.output.shape == (2, 0, 4, 6)
    assert torch.equal(out.final_state, state)


@every_op
def test_packed_sequences_equal_separate_ones(name: str) -> None:
    bounds = [0, 3, 3, 70, 71, 134]
    inputs, state = make(name, batch=1, tokens=134, sequences=5)
    packed = OPS[name](*inputs, initial_state=state, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), impl="torch")
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            assert torch.equal(packed.final_state[i], state[i])
            continue
        output, final_state = run_formula([x[:, start:stop] for x in inputs], state[i : i + 1])
        assert_close(packed.output[:, start:stop], output, f"output of sequence {i}")
        assert_close(packed.final_state[i : i + 1], final_state, f"state of sequence {i}")


@every_op
def test_segments_with_carried_state_equal_the_whole(name: str) -> None:
    inputs, state = make(name)
    whole = OPS[name](*inputs, initial_state=state, impl="torch")
    first = OPS[name](*(x[:, :40] for x in inputs), initial_state=state, impl="torch")
    second = OPS[name](*(x[:, 40:] for x in inputs), initial_state=first.final_state, impl="torch")
    assert_close(torch.cat([first.output, second.output], dim=1), whole.output, "output")
    assert_close(second.final_state, whole.final_state, "final_state")


@every_op
def test_gradients_equal_those_of_the_recurrence(name: str) -> None:
    """Over several chunks, packed, at a strong gate, through output and final state."""
    inputs, state = make(name, batch=1, tokens=75, sequences=3, gate="stress")
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    bounds = [0, 7, 7, 75]
    out = OPS[name](*inputs, initial_state=state, cu_seqlens=torch.tensor(bounds), impl="torch")
    pieces = [
        run_formula([x[:, start:stop] for x in inputs], state[i : i + 1])
        for i, (start, stop) in enumerate(itertools.pairwise(bounds))
        if stop > start
    ]
    expected = torch.cat([p[0] for p in pieces], dim=1)
    states = torch.cat([pieces[0][1], state[1:2], pieces[1][1]])
    d_output, d_state = torch.randn_like(expected), torch.randn_like(states)
    got = torch.autograd.grad([out.output, out.final_state], leaves, [d_output, d_state])
    want = torch.autograd.grad([expected, states], leaves, [d_output, d_state])
    for label, a, b in zip(("q", "k", "v", "gate", *["beta"] * (len(inputs) == 5), "state"), got, want, strict=True):
        assert_close(a, b, f"gradient of {label}", tolerance=1e-11)


@pytest.mark.parametrize("name", ["chunk_gdn", "chunk_mamba2"])
def test_gradcheck(name: str) -> None:
    inputs, state = make(name, batch=1, tokens=5)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    assert torch.autograd.gradcheck(
        lambda *x: tuple(OPS[name](*x[:-1], initial_state=x[-1], impl="torch")), leaves, fast_mode=True
    )


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["init", "stress"])
def test_low_precision(name: str, dtype: torch.dtype, gate: str) -> None:
    inputs, state = make(name, tokens=200, gate=gate, dtype=dtype)
    out = OPS[name](*inputs, initial_state=state, impl="torch")
    assert out.output.dtype == dtype
    assert out.final_state.dtype == torch.float32
    exact, plain = run_formula(inputs, state), run_formula(inputs, state, torch.float32)
    assert_close_to_reference(out.output, exact[0], plain[0].to(dtype), "output")
    assert_close_to_reference(out.final_state, exact[1], plain[1], "final_state")


@every_op
def test_scale_and_normalize_qk(name: str) -> None:
    inputs, state = make(name)
    raw = [3 * inputs[0], 5 * inputs[1], *inputs[2:]]
    normal = [l2_normalize(raw[0]), l2_normalize(raw[1]), *inputs[2:]]
    out = OPS[name](*raw, scale=0.5, normalize_qk=True, initial_state=state)
    expected = run_formula(normal, state)[0] * 0.5 * 8**0.5
    assert_close(out.output, expected, "output")


@every_op
def test_later_tokens_change_nothing_before_them(name: str) -> None:
    inputs, _ = make(name, dtype=torch.float32)
    changed = [torch.cat([x[:, :50], x[:, 50:].flip(1)], dim=1) for x in inputs]
    before, after = (OPS[name](*x).output[:, :50] for x in (inputs, changed))
    assert torch.equal(before, after)


@pytest.mark.unchecked_shapes
def test_bad_input() -> None:
    (q, k, v, g, beta), state = make("chunk_gdn")
    with pytest.raises(
        ValueError, match=r"gate: expected a log-decay <= 0 everywhere, got a maximum of 0\.5; pass -exp"
    ):
        chunk_gdn(q, k, v, g * 0 + 0.5, beta)
    with pytest.raises(ValueError, match=r"gate: expected shape \[2, 75, 4\] .*got \[2, 75, 4, 8\]"):
        chunk_gdn(q, k, v, g[..., None].expand(-1, -1, -1, 8), beta)
    with pytest.raises(ValueError, match=r"beta: expected shape \[2, 75, 4\]"):
        chunk_gdn(q, k, v, g, beta[:, :, :2])
    with pytest.raises(TypeError, match=r"k: expected torch\.float64, as q, got torch\.float32"):
        chunk_mamba2(q, k.float(), v, g)
    with pytest.raises(ValueError, match=r"initial_state: expected shape \[2, 4, 6, 8\] .*value-major"):
        recurrent_mamba2(q, k, v, g, initial_state=state.mT)
    with pytest.raises(ValueError, match="impl: recurrent_gdn has no 'triton' implementation yet"):
        recurrent_gdn(q, k, v, g, beta, impl="triton")


@pytest.mark.parametrize("tokens", [33, 96])
def test_states_of_mamba2_are_the_same_walked_and_at_once(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kimi_linear.kernels.torch import scalar_gate

    inputs, state = make("chunk_mamba2", tokens=tokens)
    found = []
    for most in (0, 64):
        monkeypatch.setattr(scalar_gate, "AT_ONCE", most)
        given = [x.clone().requires_grad_() for x in (*inputs, state)]
        out = chunk_mamba2(*given[:-1], initial_state=given[-1], impl="torch")
        weights = torch.linspace(-1, 1, out.output.numel(), dtype=torch.float64).view_as(out.output)
        found.append([out.output, out.final_state, *torch.autograd.grad((out.output * weights).sum() + out.final_state.square().sum(), given)])  # fmt: skip
    for walked, at_once in zip(*found, strict=True):
        assert_close(at_once, walked, "at once")


def test_an_empty_sequence_beside_equal_ones_hands_its_state_through() -> None:
    inputs, _ = make("chunk_mamba2", batch=1, tokens=80)
    state = torch.randn(3, 4, 6, 8, dtype=torch.float64)
    packed = chunk_mamba2(*inputs, initial_state=state, cu_seqlens=torch.tensor([0, 40, 40, 80]), impl="torch")
    assert torch.equal(packed.final_state[1], state[1])
    for n, (start, stop) in ((0, (0, 40)), (2, (40, 80))):
        alone = chunk_mamba2(*(x[:, start:stop] for x in inputs), initial_state=state[n : n + 1], impl="torch")
        assert_close(packed.output[:, start:stop], alone.output, f"output of {n}")
        assert_close(packed.final_state[n], alone.final_state[0], f"final_state of {n}")


@pytest.mark.parametrize("gate", ["init", "stress"])
def test_mamba2_is_kda_that_erases_next_to_nothing(gate: str) -> None:
    """What its Triton implementation rests on, in fp64: output, state and gradients."""
    (q, k, v, g), state = make("chunk_mamba2", batch=1, tokens=150, gate=gate)
    leaves = [x.requires_grad_() for x in (q, l2_normalize(k), v, g, state)]
    q, k, v, g, state = leaves
    expected = chunk_mamba2(q, k, v, g, initial_state=state, impl="torch")
    by_channel = g[..., None].expand(*g.shape, q.shape[-1])
    got = chunk_kda(q, k, v / FORGIVING, by_channel, torch.full_like(g, FORGIVING), initial_state=state, impl="torch")
    sent = [torch.randn_like(x) for x in expected]
    gradients = [torch.autograd.grad(tuple(out), leaves, sent) for out in (got, expected)]
    for name, x, y in zip(("output", "state", "dq", "dk", "dv", "dg", "dstate"), (*got, *gradients[0]), (*expected, *gradients[1]), strict=True):  # fmt: skip
        assert_close(x, y, name, tolerance=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 65, 300])
@pytest.mark.parametrize("op", ["chunk_gdn", "chunk_mamba2"])
def test_through_the_kernels_of_kda_on_a_gpu(op: str, tokens: int) -> None:
    """Output, state and gradients within the rounding of bf16 inputs, against the recurrence in fp64."""
    draw = torch.Generator("cuda").manual_seed(0)
    shape = (2, tokens, 2, 64)
    q, k, v = (torch.randn(shape, generator=draw, device="cuda").bfloat16() for _ in range(3))
    beta = torch.rand(shape[:3], generator=draw, device="cuda")
    given = {"q": q, "k": k, "v": v, "g": -torch.rand(shape[:3], generator=draw, device="cuda")}
    given |= {"beta": beta} if op == "chunk_gdn" else {}
    given = {name: x.requires_grad_() for name, x in given.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    state = torch.zeros(2, 2, 64, 64, device="cuda", dtype=torch.float64)
    expected = recurrence(wide["q"], l2_normalize(wide["k"]), wide["v"], wide["g"], wide.get("beta"), state)
    q, k, *rest = given.values()
    out = OPS[op](q, l2_normalize(k), *rest, impl="triton")
    weights = torch.randn(shape, generator=draw, device="cuda").double()
    ours = torch.autograd.grad((out.output.double() * weights).sum(), list(given.values()))
    exact = torch.autograd.grad((expected[0] * weights).sum(), list(wide.values()))
    names = ("output", "final_state", *(f"d{name}" for name in given))
    for name, x, y in zip(names, (*out, *ours), (*expected, *exact), strict=True):
        error = (x.double() - y).norm() / y.norm().clamp(min=1e-9)
        assert error < 1.5e-2, f"{name}: {error:.2e}"
