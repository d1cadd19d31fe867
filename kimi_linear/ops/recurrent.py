"""The operator behind ``recurrent_kda(..., impl="triton")``: one kernel, with a state of its own or on a pool of slots."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_linear.ops.contract import BoundedGate, Gate, KDAOutput, gate_values
from kimi_linear.ops.validation import shape_of


def triton_recurrent_kda(
    q: Tensor, k: Tensor, v: Tensor, gate: Gate, beta: Tensor, scale: float, normalize_qk: bool,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, slots: Tensor | None,
) -> KDAOutput:  # fmt: skip
    """Checked inputs of ``recurrent_kda`` to its result. The gate goes into the kernel as it came."""
    A_log, dt_bias = (None, None) if isinstance(gate, Tensor) else (gate.A_log.contiguous(), gate.dt_bias.contiguous())
    lower_bound = gate.lower_bound if isinstance(gate, BoundedGate) else None
    if slots is None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        source = None if initial_state is None else initial_state.contiguous()
        final_state = q.new_empty(sequences, v.shape[2], v.shape[3], q.shape[3], dtype=torch.float32)
    else:
        assert initial_state is not None
        source, final_state = None, initial_state
        if not final_state[:1].is_contiguous():
            raise ValueError(
                f"initial_state: expected dense slots (the pool may have any stride between them), got shape "
                f"{shape_of(final_state)} with strides {final_state.stride()}; use .contiguous(), or impl='torch'"
            )
    output = torch.ops.kimi_linear.recurrent_kda(
        q, k, v, gate_values(gate), A_log, dt_bias, lower_bound, beta, scale, normalize_qk, source, final_state, slots,
        cu_seqlens,
    )  # fmt: skip
    return KDAOutput(output, final_state)


torch.library.define(
    "kimi_linear::recurrent_kda",
    "(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? A_log, Tensor? dt_bias, float? lower_bound, Tensor beta, "
    "float scale, bool normalize, Tensor? initial_state, Tensor(a!) final_state, Tensor? slots, Tensor? cu_seqlens) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("kimi_linear::recurrent_kda", "cuda")
def _on_cuda(q: Tensor, *others: object) -> Tensor:
    from kimi_linear.kernels.triton.recurrent_kda import recurrent_kda

    with torch.cuda.device(q.device):
        return recurrent_kda(q, *others)  # type: ignore[arg-type]


@torch.library.register_fake("kimi_linear::recurrent_kda")
def _fake(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    return v.new_empty(v.shape)
