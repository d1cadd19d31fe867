"""The checks of ``kda_decode``'s inputs. They depend on shapes, strides, dtypes and devices, so each kind of call pays once;
values are read only on a CPU, as everywhere (``kimi_linear.ops.validation``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kimi_linear.ops.dispatch import STEP_TOKENS
from kimi_linear.ops.validation import (
    check_choice,
    check_device,
    check_float,
    check_qkv,
    check_shape,
    check_state,
    check_tensor,
    shape_of,
)

CALLED = {
    "gate": "gate.x",
    "out_gate": "norm.gate",
    "A_log": "gate.A_log",
    "dt_bias": "gate.dt_bias",
    "taps_q": "taps.q",
    "taps_k": "taps.k",
    "taps_v": "taps.v",
    "weight": "norm.weight",
    "memory": "pool.memory",
    "window": "pool.window",
}
"""What the caller of ``kda_decode`` knows a tensor as, where that is another name."""


def check_decode(named: Mapping[str, Tensor | None], lower_bound: float | None, eps: float, activation: str) -> None:
    """Every tensor of a step, by its field's name, against the contract of ``kda_decode``."""
    told = ((CALLED.get(name, name), x) for name, x in named.items())
    tensors = {name: check_tensor(name, x) for name, x in told if x is not None}
    q, k, v, beta = (tensors[name] for name in ("q", "k", "v", "beta"))
    batch, tokens, v_heads, value_dim, key_dim = check_qkv(q, k, v, beta)
    heads, channels = q.shape[2], 2 * q.shape[2] * key_dim + v_heads * value_dim
    if not 1 <= tokens <= STEP_TOKENS:
        raise ValueError(
            f"q: expected S in 1..{STEP_TOKENS} tokens, got {tokens}; use chunk_kda or recurrent_kda for more"
        )
    check_choice("norm.activation", activation, ("sigmoid", "swish", "none"))
    if ("norm.gate" in tensors) != (activation != "none"):
        got = "a tensor" if "norm.gate" in tensors else "None"
        raise ValueError(
            f"norm.gate: expected a tensor unless norm.activation is 'none', got {got} with {activation!r}"
        )
    if not eps >= 0:
        raise ValueError(f"norm.eps: expected a number >= 0, got {eps}")
    if lower_bound is not None and not lower_bound < 0:
        raise ValueError(f"gate.lower_bound: expected a negative number, got {lower_bound}")
    width = 0
    if "taps.q" in tensors:
        width = tensors["taps.q"].shape[-1]
        if tensors["taps.q"].ndim != 2 or width == 0:
            raise ValueError(
                f"taps.q: expected shape [{heads * key_dim}, W] (H*K, W), got {shape_of(tensors['taps.q'])}; "
                "a checkpoint's [D, 1, W] is squeezed with taps.squeeze(1)"
            )
    for name, shape, letters in (
        ("gate.x", (batch, tokens, v_heads, key_dim), "B, S, HV, K"),
        ("norm.gate", (batch, tokens, v_heads, value_dim), "B, S, HV, V"),
        ("gate.A_log", (v_heads,), "HV"),
        ("gate.dt_bias", (v_heads, key_dim), "HV, K"),
        ("taps.q", (heads * key_dim, width), "H*K, W"),
        ("taps.k", (heads * key_dim, width), "H*K, W"),
        ("taps.v", (v_heads * value_dim, width), "HV*V, W"),
        ("norm.weight", (value_dim,), "V"),
    ):
        if name in tensors:
            check_float(name, tensors[name])
            check_shape(name, tensors[name], shape, letters)
    for name, tensor in tensors.items():
        check_device(name, tensor, "q", q.device)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    check_state("pool.memory", tensors["pool.memory"], (None, v_heads, value_dim, key_dim), q.device, wide)
    slots = tensors["pool.memory"].shape[0]
    check_shape("pool.window", tensors["pool.window"], (slots, channels, max(0, width - 1)), "slots, 2*H*K + HV*V, W-1")
    for name in ("pool.window", "out"):
        if name in tensors and tensors[name].dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype}, as q, got {tensors[name].dtype}")
    if "out" in tensors:
        check_shape("out", tensors["out"], (batch, tokens, v_heads, value_dim), "B, S, HV, V")
    for name, shape, letters in (("slots", (batch,), "B"), ("keep", (batch, tokens), "B, S")):
        if name in tensors:
            if tensors[name].dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name}: expected int32 or int64, got {tensors[name].dtype}")
            check_shape(name, tensors[name], shape, letters)
    if "slots" not in tensors and slots < batch:
        raise ValueError(f"pool: expected a slot for each of {batch} rows, got {slots}; or pass slots")
    _check_strides(tensors)


def _check_strides(tensors: dict[str, Tensor]) -> None:
    """Rows may lie at any stride; what is inside them must be dense, and the parameters whole."""
    for name, tensor in tensors.items():
        if name in ("q", "k", "v", "gate.x", "norm.gate", "beta"):
            dense, way_out = tensor[:1, :1].is_contiguous(), "B and S may have any stride"
        elif name.startswith("pool."):
            dense, way_out = tensor[:1].is_contiguous(), "slots may have any stride"
        else:
            dense, way_out = tensor.is_contiguous(), "the whole tensor must be"
        if not dense:
            raise ValueError(f"{name}: expected it to be contiguous ({way_out}), got strides {tensor.stride()}")


def check_slot_values(slots: Tensor | None, keep: Tensor | None, available: int) -> None:
    """On a CPU: slots inside the pool, none shared by two sequences."""
    for name, tensor in (("slots", slots), ("keep", keep)):
        if tensor is not None and tensor.device.type == "cpu" and tensor.numel() and int(tensor.max()) >= available:
            raise ValueError(f"{name}: expected slots below {available}, got {int(tensor.max())}")
    if slots is not None and slots.device.type == "cpu":
        rows = [[int(slot), *([] if keep is None else keep[b].tolist())] for b, slot in enumerate(slots)]
        owned = [slot for row in rows if row[0] >= 0 for slot in {x for x in row if x >= 0}]
        if len(set(owned)) != len(owned):
            raise ValueError(f"slots: expected no slot to belong to two sequences, got {rows} (slot, then keep)")
