"""States handed out on the way are those of the prefix alone, and a sequence goes on from them as if it had never stopped."""

from __future__ import annotations

import inspect

import pytest
import torch

from kimi_linear.ops import Impl, KDAStates, choose_impl, chunk_kda, chunk_kda_states, kda_facts
from kimi_linear.ops.validation import check_offsets
from kimi_linear.testing.factories import KDAInputs, kda_inputs
from kimi_linear.testing.tolerances import assert_close

LAYOUTS = {
    "batch": ({"batch": 2, "tokens": 150, "heads": 1, "v_heads": 2}, [(1, 128), (0, 64), (1, 64)]),
    "packed": ({"tokens": 290, "heads": 1, "lengths": [0, 130, 64, 0, 96]}, [(4, 64), (1, 128), (2, 64), (1, 64)]),
}
CASES = pytest.mark.parametrize("layout", LAYOUTS)
IMPLS = pytest.mark.parametrize("impl", ["torch", "reference"])


def call(inputs: KDAInputs, offsets: list[tuple[int, int]], impl: Impl = "auto") -> KDAStates:
    return chunk_kda_states(
        *inputs.positional(), offsets, normalize_qk=True, initial_state=inputs.initial_state,
        cu_seqlens=inputs.cu_seqlens, impl=impl,
    )  # fmt: skip


@CASES
@IMPLS
def test_a_state_is_that_of_its_prefix_and_continues_its_sequence(layout: str, impl: Impl) -> None:
    arguments, offsets = LAYOUTS[layout]
    inputs = kda_inputs(**arguments, key_dim=8, value_dim=4, raw=True, normalized=False, dtype=torch.float64)
    whole = chunk_kda(
        *inputs.positional(), normalize_qk=True, initial_state=inputs.initial_state, cu_seqlens=inputs.cu_seqlens,
        impl=impl,
    )  # fmt: skip
    got = call(inputs, offsets, impl)
    assert_close(got.output, whole.output, "output")
    assert_close(got.final_state, whole.final_state, "final_state")
    assert got.states.shape == (len(offsets), *whole.final_state.shape[1:])
    parts = (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta)
    for (n, offset), state in zip(offsets, got.states, strict=True):
        start, stop = (0, 150) if inputs.cu_seqlens is None else inputs.cu_seqlens[n : n + 2].tolist()
        row = slice(n, n + 1) if inputs.cu_seqlens is None else slice(0, 1)
        before = tuple(x[row, start : start + offset] for x in parts)
        first = chunk_kda(*before, normalize_qk=True, initial_state=inputs.initial_state[n : n + 1], impl="reference")
        assert_close(state, first.final_state[0], f"state {n} after {offset}")
        after = tuple(x[row, start + offset : stop] for x in parts)
        rest = chunk_kda(*after, normalize_qk=True, initial_state=state[None], impl="reference")
        assert_close(rest.final_state[0], whole.final_state[n], f"final state {n} from {offset}")
        assert_close(rest.output, whole.output[row, start + offset : stop], f"output {n} from {offset}")


@IMPLS
def test_without_offsets_or_an_initial_state(impl: Impl) -> None:
    inputs = kda_inputs(2, 70, 1, key_dim=8, dtype=torch.float64)
    got = chunk_kda_states(*inputs.positional(), [], impl=impl)
    expected = chunk_kda(*inputs.positional(), impl="reference")
    assert_close(got.output, expected.output, "output")
    assert_close(got.final_state, expected.final_state, "final_state")
    assert got.states.shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([(2, 64)], r"offsets: expected a sequence in \[0, 2\), got \(2, 64\)"),
        ([(0, 0)], r"multiples of 64 from 64 on, got \(0, 0\)"),
        ([(0, 65)], r"multiples of 64 from 64 on, got \(0, 65\)"),
        ([(1, 128)], r"up to the sequence's length 70, got \(1, 128\)"),
        ([(0, 64), (0, 64)], "no pair twice"),
    ],
)
def test_offsets_that_do_not_fit(offsets: list[tuple[int, int]], message: str) -> None:
    for inputs in (kda_inputs(2, 70, 1, key_dim=8), kda_inputs(1, 140, 1, key_dim=8, lengths=[70, 70])):
        with pytest.raises(ValueError, match=message):
            call(inputs, offsets)


@pytest.mark.parametrize("pair", [64, (0, 64.0), (0, 64, 1)])
def test_offsets_of_another_kind(pair: object) -> None:
    """Asked of the bare check: under pytest types are looked at before anything runs."""
    with pytest.raises(TypeError, match=r"offsets: expected pairs of int, \(sequence, tokens\), got "):
        inspect.unwrap(check_offsets)([pair], 1, 70, None, 64)  # type: ignore[list-item]


def test_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_kda_states: states handed out have no gradient"):
        call(kda_inputs(1, 70, 1, key_dim=8).with_grad(), [(0, 64)])


def test_facts_are_what_the_operation_asks() -> None:
    inputs = kda_inputs(1, 70, 1, key_dim=8).with_grad()
    facts = kda_facts("chunk_kda_states", *inputs.positional(), None)
    assert (facts.tokens, facts.key_dim, facts.device, facts.dtype, facts.needs_grad) == (70, 8, "cpu", "float32", True)
    with pytest.raises(ValueError, match="impl: chunk_kda_states with 'triton' expected CUDA tensors, got cpu"):
        choose_impl(facts, "triton")
