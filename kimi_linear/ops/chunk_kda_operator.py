"""``chunk_kda`` of the Triton kernels as operators of torch: for inference, to train, its gradient; and ``chunk_kda_states``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.contract import BoundedGate, Gate, KDAOutput, KDAStates, gate_values
from kimi_linear.ops.library import define

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor gate, Tensor beta, Tensor? A_log, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, float? lower_bound, float scale, bool normalize_qk"
)
_DIFFERENTIABLE = 8  # the first inputs; cu_seqlens and the numbers after them have no gradient
_SAVED = 15  # tensors that a forward leaves for its backward: kernels/triton/saved.py


def triton_chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, gate: Gate, beta: Tensor, scale: float, normalize_qk: bool,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> KDAOutput:  # fmt: skip
    """The gate goes into the kernels as it came: no fp32 log-decay is made."""
    inputs = _inputs(q, k, v, gate, beta, scale, normalize_qk, initial_state, cu_seqlens)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:_DIFFERENTIABLE])
    return KDAOutput(*(TRAIN if wanted else FORWARD)(*inputs)[:2])


def triton_chunk_kda_states(
    q: Tensor, k: Tensor, v: Tensor, gate: Gate, beta: Tensor, offsets: Sequence[tuple[int, int]], scale: float,
    normalize_qk: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> KDAStates:  # fmt: skip
    """As ``triton_chunk_kda``, with the states at ``offsets``."""
    inputs = _inputs(q, k, v, gate, beta, scale, normalize_qk, initial_state, cu_seqlens)
    return KDAStates(*STATES(*inputs, [n for n, _ in offsets], [offset for _, offset in offsets]))


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, gate: Gate, beta: Tensor, scale: float, normalize_qk: bool,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """In the order of ``_INPUTS``."""
    A_log, dt_bias = (None, None) if isinstance(gate, Tensor) else (gate.A_log, gate.dt_bias)
    lower_bound = gate.lower_bound if isinstance(gate, BoundedGate) else None
    return (
        q, k, v, gate_values(gate), beta, A_log, dt_bias, initial_state, cu_seqlens, lower_bound, scale, normalize_qk,
    )  # fmt: skip


def _problem(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, lower_bound: float | None, scale: float, normalize: bool,
) -> Any:  # fmt: skip
    from kimi_linear.kernels.triton.chunk_kda import Problem

    return Problem(
        q=q, k=k, v=v, gate=gate, beta=beta, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, scale=scale,
        normalize=normalize, initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from kimi_linear.kernels.triton.chunk_kda import forward

    return forward(_problem(*inputs))[:2]


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    q, _, v, *_, cu_seqlens = inputs[:9]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty((sequences, v.shape[2], v.shape[3], q.shape[3]), dtype=torch.float32)
    return v.new_empty(v.shape), state


def _states(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from kimi_linear.kernels.triton.chunk_kda import forward

    *inputs, sequences, tokens = arguments
    output, final_state, states = forward(_problem(*inputs), export=list(zip(sequences, tokens, strict=True)))
    return output, final_state, final_state.new_empty(0, *final_state.shape[1:]) if states is None else states


def _states_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    output, final_state = _forward_fake(*inputs[:-2])
    return output, final_state, final_state.new_empty(len(inputs[-1]), *final_state.shape[1:])


def _train(*inputs: Any) -> tuple[Tensor, ...]:
    from kimi_linear.kernels.triton.chunk_kda import forward_to_train

    output, state, saved = forward_to_train(_problem(*inputs))
    return output, state, *saved


def _lengths(*inputs: Any) -> Iterator[tuple[Any, ...]]:
    """Inputs of the same kernels and little memory: one sequence of a few tokens, and where long ones are cut into segments, which
    takes other kernels, one that is. First what is like these inputs."""
    from kimi_linear.kernels.triton.cuts import Cut, choose_cut, may_be_cut
    from kimi_linear.kernels.triton.saved import CHUNK

    *rows, A_log, dt_bias, initial_state, cu_seqlens = inputs[: _DIFFERENTIABLE + 1]
    heads = rows[2].shape[2:]
    state = None if initial_state is None else initial_state.new_empty(1, *initial_state.shape[1:])
    short, long = CHUNK, Cut.FEWEST * choose_cut(*heads).least * CHUNK
    is_long = rows[0].shape[1] >= long  # packed sequences may each be short: then what they need comes second
    for tokens in ((long, short) if is_long else (short, long)) if may_be_cut(*heads) else (short,):
        # Parts of what was given, as strides matter to a kernel.
        some = [x[:1, :tokens] if x.shape[1] >= tokens else x.new_empty(1, tokens, *x.shape[2:]) for x in rows]
        ends = None
        if cu_seqlens is not None:
            ends = torch.arange(0, 2 * tokens, tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        yield (*some, A_log, dt_bias, state, ends, *inputs[_DIFFERENTIABLE + 1 :])


def _rehearse(*inputs: Any) -> Iterator[None]:
    for some in _lengths(*inputs):
        _forward(*some)
        yield


def _rehearse_training(*inputs: Any) -> Iterator[None]:
    """The backward, too, which will come: of the output alone, as is usual."""
    for some in _lengths(*inputs):
        output, _, *saved = _train(*some)
        _backward(*some, saved, output, torch.empty_like(output), None)
        yield


def _train_fake(*inputs: Any) -> tuple[Tensor, ...]:
    from kimi_linear.kernels.triton.saved import shapes_of

    q, v, cu_seqlens = inputs[0], inputs[2], inputs[8]
    output, state = _forward_fake(*inputs)
    (batch, tokens, _, key_dim), (v_heads, value_dim), packed = q.shape, v.shape[2:], cu_seqlens is not None
    shapes = shapes_of(batch, tokens, state.shape[0], v_heads, key_dim, value_dim, q.dtype, packed)
    return output, state, *(q.new_empty(shape, dtype=dtype) for shape, dtype in shapes.values())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[: _DIFFERENTIABLE + 1], output[0], *output[2:])
    ctx.numbers = inputs[_DIFFERENTIABLE + 1 :]


def _gradients(ctx: Any, d_output: Tensor | None, d_final_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors[: _DIFFERENTIABLE + 1]
    output, *saved = ctx.saved_tensors[_DIFFERENTIABLE + 1 :]
    d_output = torch.zeros_like(output) if d_output is None else d_output
    found = BACKWARD(*inputs, *ctx.numbers, saved, output, d_output, d_final_state)
    given = [None if x is None else dx for x, dx in zip(inputs[:_DIFFERENTIABLE], found, strict=True)]
    return (*given, *[None] * (1 + len(ctx.numbers)))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from kimi_linear.kernels.triton.chunk_kda import backward
    from kimi_linear.kernels.triton.saved import Saved

    *inputs, saved, output, d_output, d_final_state = arguments
    found = backward(_problem(*inputs), Saved(*saved), output, d_output, d_final_state)
    # A schema has no optional results: an input that was not given has an empty gradient.
    return tuple(inputs[0].new_empty(0) if x is None else x for x in found)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = arguments[:_DIFFERENTIABLE]
    return tuple(inputs[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


BACKWARD = define(
    f"chunk_kda_backward({_INPUTS}, Tensor[] saved, Tensor output, Tensor d_output, Tensor? d_final_state) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
    rehearse=_backward,
)
FORWARD = define(
    f"chunk_kda_forward({_INPUTS}) -> (Tensor, Tensor)", kernel=_forward, fake=_forward_fake, rehearse=_rehearse
)
TRAIN = define(
    f"chunk_kda_train({_INPUTS}) -> ({', '.join(['Tensor'] * (2 + _SAVED))})",
    kernel=_train,
    fake=_train_fake,
    setup_context=_setup,
    backward=_gradients,
    rehearse=_rehearse_training,
)
STATES = define(
    f"chunk_kda_states({_INPUTS}, int[] sequences, int[] tokens) -> (Tensor, Tensor, Tensor)",
    kernel=_states,
    fake=_states_fake,
    rehearse=_states,
)
