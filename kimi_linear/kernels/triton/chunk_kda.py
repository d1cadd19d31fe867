"""Forward of Kimi Delta Attention in three Triton kernels: pairs and inverse, fading, and the scan over chunks.

Raw gate, l2 norm and beta go in as they are; no fp32 gate tensor is made. Exact at every gate. Without a backward yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.common import CHUNK
from kimi_linear.kernels.triton.fade import fade_kernel
from kimi_linear.kernels.triton.pairs import pairs_kernel
from kimi_linear.kernels.triton.scan import scan_kernel


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Block sizes, warps and stages of the three kernels for one class of shapes."""

    pairs_block: int
    pairs_warps: int
    fade_block: int
    fade_warps: int
    scan_block: int
    scan_warps: int
    scan_stages: int


def launch_of(key_dim: int, value_dim: int, wide: bool) -> Launch:
    """The configuration for K in {32, 64, 128} and V in {32, 64, 128, 256}; ``wide`` for fp32 inputs.

    The bf16 ones do not spill on sm_90 and sm_100. The fp32 ones do; they are for the interpreter, whose bf16 is wrong.
    """
    block = min(32, key_dim, value_dim)
    heavy = wide and key_dim > 64
    return Launch(
        pairs_block=block,
        pairs_warps=8,
        fade_block=block,
        fade_warps=4,
        scan_block=32,
        scan_warps=8 if heavy else 4,
        scan_stages=1 if heavy else 3,
    )


def chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None,
    beta: Tensor, scale: float, normalize: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [B, T, HV, V] in v's dtype, final_state [N, HV, V, K] fp32).

    ``gate`` [B, T, HV, K] is a plain log-decay where ``A_log`` is None, a raw projection otherwise: of the softplus gate
    where ``lower_bound`` is None, of the bounded gate where it is not. q, k, v are bf16 or fp32.
    """
    (batch, tokens, heads, key_dim), (v_heads, value_dim) = q.shape, v.shape[2:]
    q, k, v, gate, beta = (_rows(x) for x in (q, k, v, gate, beta))
    kind = 0 if A_log is None else 1 if lower_bound is None else 2
    sequences, chunks, cu_chunks = batch, batch * triton.cdiv(tokens, CHUNK), None
    if cu_seqlens is not None:
        sequences = cu_seqlens.numel() - 1
        cu_chunks = F.pad(((cu_seqlens.diff() + CHUNK - 1) // CHUNK).cumsum(0), (1, 0)).to(torch.int32)
        chunks = tokens // CHUNK + sequences  # at most; the exact number would make the host wait
    wide = q.dtype == torch.float32
    launch = launch_of(key_dim, value_dim, wide)
    dot, precision = (tl.float32, "ieee") if wide else (tl.bfloat16, "tf32")

    def made(*shape: int, dtype: torch.dtype = q.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    pairs_q, solve = made(chunks, v_heads, CHUNK, CHUNK), made(chunks, v_heads, CHUNK, CHUNK)
    erase, read, write = (made(chunks, v_heads, CHUNK, key_dim) for _ in range(3))
    u = made(chunks, v_heads, CHUNK, value_dim)
    decay = made(chunks, v_heads, key_dim, dtype=torch.float32)
    norms = made(chunks, v_heads, 2, CHUNK, dtype=torch.float32)
    output = made(batch, tokens, v_heads, value_dim)
    final_state = made(sequences, v_heads, value_dim, key_dim, dtype=torch.float32)
    if chunks:
        pairs_kernel[(chunks, v_heads)](
            q, k, gate, beta, A_log, dt_bias, cu_seqlens, cu_chunks, solve, pairs_q, norms,
            scale, lower_bound or 0.0, sequences, tokens, q.stride(1), k.stride(1), gate.stride(1), beta.stride(1),
            heads, v_heads, key_dim, launch.pairs_block, kind, normalize, cu_seqlens is not None, dot, precision,
            num_warps=launch.pairs_warps, num_stages=1,
        )  # fmt: skip
        fade_kernel[(chunks, v_heads)](
            q, k, v, gate, A_log, dt_bias, cu_seqlens, cu_chunks, solve, norms, erase, u, read, write, decay,
            lower_bound or 0.0, sequences, tokens, q.stride(1), k.stride(1), v.stride(1), gate.stride(1),
            heads, v_heads, key_dim, value_dim, launch.fade_block, launch.fade_block, kind, cu_seqlens is not None,
            dot, precision, num_warps=launch.fade_warps, num_stages=1,
        )  # fmt: skip
    scan_kernel[(value_dim // launch.scan_block, sequences * v_heads)](
        erase, u, read, write, pairs_q, decay, initial_state, output, final_state, cu_seqlens, cu_chunks, tokens,
        v_heads, key_dim, value_dim, launch.scan_block, cu_seqlens is not None, initial_state is not None,
        launch.scan_stages, precision, num_warps=launch.scan_warps, num_stages=launch.scan_stages,
    )  # fmt: skip
    return output, final_state


def _rows(x: Tensor) -> Tensor:
    """``x`` [B, T, ...] with tokens at one stride and everything after them dense; copied only where it is not so."""
    dense = x[0, 0].is_contiguous() if x.numel() else True
    whole = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if dense and whole else x.contiguous()
