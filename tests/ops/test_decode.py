"""The fused step of decoding against the operations that it is made of, slot by slot, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kimi_linear.ops import (
    ConvTaps,
    DecodePool,
    OpFacts,
    SoftplusGate,
    choose_impl,
    gated_rms_norm,
    kda_decode,
    recurrent_kda,
    short_conv,
)
from kimi_linear.testing import assert_close, relative_error
from kimi_linear.testing.decode import DecodeInputs, decode_inputs

SMALL = {"heads": 1, "v_heads": 2, "key_dim": 4, "value_dim": 6, "dtype": torch.float64}


def whole(inputs: DecodeInputs) -> torch.Tensor:
    """All tokens at once through the separate operations, from the rows' own states."""
    rows, taps, norm = inputs.q.shape[0], inputs.taps, inputs.norm
    mixed = torch.cat([x.flatten(2) for x in (inputs.q, inputs.k, inputs.v)], dim=-1)
    if taps is None:
        mixed = torch.nn.functional.silu(mixed)
    else:
        weight = torch.cat([taps.q, taps.k, taps.v])
        mixed = short_conv(mixed, weight, initial_state=inputs.pool.window[:rows]).output
    keys = inputs.q[0, 0].numel()
    q, k, v = mixed.split([keys, keys, inputs.v[0, 0].numel()], dim=-1)
    q, k, v = q.view(inputs.q.shape), k.view(inputs.k.shape), v.view(inputs.v.shape)
    output = recurrent_kda(
        q, k, v, inputs.gate, inputs.beta.sigmoid(), normalize_qk=True, initial_state=inputs.pool.memory[:rows]
    ).output
    return gated_rms_norm(output, norm.gate, norm.weight, norm.eps, norm.activation)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("conv_size", [0, 1, 4])
@pytest.mark.parametrize(("gate", "activation"), [("init", "sigmoid"), ("bounded", "swish"), ("stress", "none")])
def test_equals_the_operations_in_turn(impl: str, conv_size: int, gate: str, activation: str) -> None:
    inputs = decode_inputs(3, 5, gate=gate, activation=activation, conv_size=conv_size, **SMALL)
    expected = whole(inputs)
    assert_close(inputs.fresh().step(impl=impl), expected, "at once")
    single = inputs.fresh()
    pieces = [single.rows(slice(None), slice(t, t + 1)).step(impl=impl) for t in range(5)]
    assert_close(torch.cat(pieces, dim=1), expected, "one by one")


def test_slots_are_read_and_written_and_no_others() -> None:
    inputs = decode_inputs(3, 1, slots=7, **SMALL)
    slots = torch.tensor([5, -1, 2], dtype=torch.int32)
    before, own = inputs.fresh().pool, inputs.fresh()
    output = inputs.step(slots=slots)
    for row, slot in ((0, 5), (2, 2)):
        alone = own.rows(slice(row, row + 1))
        pool = DecodePool(memory=before.memory[slot : slot + 1].clone(), window=before.window[slot : slot + 1].clone())
        assert_close(output[row : row + 1], replace(alone, pool=pool).step(), "output")
        assert_close(inputs.pool.memory[slot], pool.memory[0], "memory")
        assert torch.equal(inputs.pool.window[slot], pool.window[0])
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    untouched = [0, 1, 3, 4, 6]
    assert torch.equal(inputs.pool.memory[untouched], before.memory[untouched])
    assert torch.equal(inputs.pool.window[untouched], before.window[untouched])


@pytest.mark.parametrize("accepted", [1, 2, 4])
def test_taking_back_tokens_is_the_same_as_never_having_read_them(accepted: int) -> None:
    inputs = decode_inputs(2, 4, slots=10, **SMALL)
    sequential = inputs.fresh()
    for t in range(accepted):
        last = sequential.rows(slice(None), slice(t, t + 1)).step()
    keep = torch.tensor([[2, 3, 4, 0], [1, 6, -1, 7]])  # a row's own slot may be among them; -1 keeps nothing
    slots = torch.tensor([0, 1])
    output = inputs.step(slots=slots, keep=keep)
    assert torch.equal(output[:, accepted - 1 : accepted], last)
    for row in range(2):
        slot = int(keep[row, accepted - 1])
        if slot >= 0:
            assert torch.equal(inputs.pool.memory[slot], sequential.pool.memory[row])
            assert torch.equal(inputs.pool.window[slot], sequential.pool.window[row])
    # The next call goes on from there.
    fresh = decode_inputs(2, 3, seed=1, **SMALL)
    on = replace(fresh, pool=inputs.pool, taps=inputs.taps).rows(slice(0, 1))
    straight = replace(fresh, pool=sequential.pool, taps=inputs.taps).rows(slice(0, 1))
    assert torch.equal(on.step(slots=keep[:1, accepted - 1]), straight.step(slots=slots[:1]))


def test_out_is_filled_and_returned() -> None:
    inputs = decode_inputs(2, 2, **SMALL)
    out = torch.empty_like(inputs.v)
    expected = inputs.fresh().step()
    assert inputs.step(out=out) is out
    assert torch.equal(out, expected)


def test_bf16_stays_near_the_exact_result() -> None:
    inputs = decode_inputs(2, 3, 2, 4, 32, dtype=torch.bfloat16)
    exact = inputs.exact()
    assert relative_error(inputs.step(), exact.step()) < 1e-2
    assert relative_error(inputs.pool.memory, exact.pool.memory) < 1e-2


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    inputs = decode_inputs(2, 2, **SMALL)
    gate, taps, norm, pool = inputs.gate, inputs.taps, inputs.norm, inputs.pool
    arguments = (
        inputs.q, inputs.k, inputs.v, gate.x, inputs.beta, norm.gate, gate.A_log, gate.dt_bias, taps.q, taps.k, taps.v,
        norm.weight, pool.memory, pool.window, torch.tensor([1, 3]), None, None, norm.eps, norm.activation, "torch",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kimi_linear.kda_decode.default, arguments)


IN_ONE_GRAPH = """
import torch
from kimi_linear.testing.decode import decode_inputs

inputs = decode_inputs(2, 1, 1, 2, 4, 6, dtype=torch.float64)
twin, slots = inputs.fresh(), torch.tensor([1, 0])
compiled = torch.compile(lambda x: x.step(slots=slots), fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(inputs), twin.step(slots=slots))
assert torch.equal(inputs.pool.memory, twin.pool.memory)
assert torch.equal(inputs.pool.window, twin.pool.window)
"""


def test_one_graph_for_the_compiler() -> None:
    """In a process of its own: the compiler does not look through the wrappers that check shapes here."""
    done = subprocess.run([sys.executable, "-c", IN_ONE_GRAPH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def facts(**changes: object) -> OpFacts:
    known = {"op": "kda_decode", "device": "cuda", "arch": (9, 0), "dtype": "bfloat16", "tokens": 1, "key_dim": 128}
    return OpFacts(**(known | {"value_dim": 128, "needs_grad": False} | changes))  # type: ignore[arg-type]


def test_the_choice() -> None:
    for op in ("kda_decode", "recurrent_kda"):
        for dtype in ("bfloat16", "float16", "float32"):
            assert choose_impl(facts(op=op, dtype=dtype, arch=(8, 0), key_dim=256)).impl == "triton"
        assert choose_impl(facts(op=op, device="cpu", arch=None)).impl == "torch"
        for changes in ({"dtype": "float64"}, {"key_dim": 48}, {"arch": (7, 5)}, {"needs_grad": True}):
            assert choose_impl(facts(op=op, **changes)).impl == "torch"
            with pytest.raises(ValueError, match=f"impl: {op} with 'triton'"):
                choose_impl(facts(op=op, **changes), "triton")


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"q": torch.zeros(2, 9, 1, 4)}, ValueError, "k: expected shape"),
        ({"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
        ({"gate": torch.zeros(2, 2, 2, 4)}, TypeError, "gate: expected a SoftplusGate or a BoundedGate"),
        ({"beta": torch.zeros(2, 2, 1, dtype=torch.float64)}, ValueError, r"beta: expected shape \[2, 2, 2\]"),
        ({"slots": torch.tensor([0.0, 1.0])}, TypeError, "slots: expected int32 or int64"),
        ({"slots": torch.tensor([0, 0])}, ValueError, "slots: expected no slot to belong to two sequences"),
        ({"slots": torch.tensor([0, 99])}, ValueError, "slots: expected slots below 7, got 99"),
        ({"keep": torch.tensor([0, 1])}, ValueError, r"keep: expected shape \[2, 2\]"),
        ({"keep": torch.tensor([[0, 1], [0, 2]]), "slots": torch.tensor([3, 4])}, ValueError, "two sequences"),
        ({"out": torch.zeros(2, 2, 2, 4, dtype=torch.float32)}, TypeError, "out: expected torch.float64, as q"),
        ({"impl": "hopper"}, ValueError, "kda_decode has no 'hopper' implementation"),
        ({"impl": "triton"}, ValueError, "kda_decode with 'triton' expected CUDA tensors"),
    ],
)
def test_bad_input_is_named(changes: dict, kind: type[Exception], message: str) -> None:
    inputs = decode_inputs(2, 2, 1, 2, 4, slots=7, dtype=torch.float64)
    names = ("q", "k", "v", "gate", "beta", "pool", "taps", "norm")
    with pytest.raises(kind, match=message):
        kda_decode(**({name: getattr(inputs, name) for name in names} | changes))


@pytest.mark.unchecked_shapes
def test_bad_states_and_views_are_named() -> None:
    inputs = decode_inputs(2, 2, 1, 2, 4, slots=7, dtype=torch.float64)
    pool, taps, norm, gate = inputs.pool, inputs.taps, inputs.norm, inputs.gate
    cases = [
        ({"pool": replace(pool, memory=pool.memory.float())}, TypeError, "pool.memory: expected torch.float64"),
        ({"pool": replace(pool, window=pool.window[..., 1:])}, ValueError, r"pool.window: expected shape \[7, 16, 3\]"),
        (
            {"pool": replace(pool, memory=pool.memory[:1], window=pool.window[:1])},
            ValueError,
            "a slot for each of 2 rows",
        ),
        ({"pool": replace(pool, memory=pool.memory.mT)}, ValueError, "pool.memory: expected it to be contiguous"),
        ({"taps": None}, ValueError, r"pool.window: expected shape \[7, 16, 0\]"),
        ({"taps": replace(taps, q=taps.q[:, None])}, ValueError, "taps.q: expected shape"),
        ({"norm": replace(norm, gate=None)}, ValueError, "norm.gate: expected a tensor unless"),
        ({"norm": replace(norm, eps=-1.0)}, ValueError, "norm.eps: expected a number >= 0"),
        ({"gate": replace(gate, A_log=gate.A_log[:1])}, ValueError, r"gate.A_log: expected shape \[2\]"),
        ({"q": inputs.q.requires_grad_()}, ValueError, "an update in place has no gradient"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            replace(inputs, **changes).step()
    inputs.q.requires_grad_(False)
    nine = decode_inputs(1, 9, **SMALL)
    with pytest.raises(ValueError, match=r"q: expected S in 1\.\.8 tokens, got 9"):
        nine.step()


def test_another_call_of_a_known_kind_checks_its_slots_again() -> None:
    inputs = decode_inputs(2, 1, slots=7, **SMALL)
    inputs.step(slots=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="slots: expected slots below 7"):
        inputs.step(slots=torch.tensor([0, 7]))
    assert isinstance(inputs.gate, SoftplusGate)
    assert isinstance(inputs.taps, ConvTaps)


def test_a_gradient_is_refused_after_a_call_that_asked_for_none() -> None:
    """Known calls are not checked again; what was right without gradients is not with them."""
    inputs = decode_inputs(2, 1, **SMALL)
    weight = inputs.norm.weight.requires_grad_()
    with torch.no_grad():
        inputs.step()
        inputs.step()
    assert weight.requires_grad
    with pytest.raises(ValueError, match="no gradient"):
        inputs.step()
