"""Every check of the public operations' inputs, in one place.

A message gives the argument's name, what was expected, what came, and the way out. Checks that would have to read
values (sign of the log-decay, order of ``cu_seqlens``) run only on CPU tensors, where they cost no synchronisation.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kimi_linear.ops.contract import BoundedGate, Gate, SoftplusGate, gate_values

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape_of(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def check_float(name: str, tensor: Tensor) -> None:
    if check_tensor(name, tensor).dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected one of float64, float32, bfloat16, float16, got {tensor.dtype}; "
            f"convert it with {name}.float()"
        )


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {list(expected)} ({letters}), got {shape_of(tensor)}")


def check_device(name: str, tensor: Tensor, like: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name}: expected device {device}, where {like} is, got {tensor.device}; move it with {name}.to({like}.device)"
        )


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, tokens: int, device: torch.device) -> None:
    """``cu_seqlens`` [N+1]: int32 or int64, from 0 to T, never falling, and B == 1."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}; use cu_seqlens.to(torch.int32)")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: expected shape [N+1] with N >= 1, got {shape_of(cu_seqlens)}")
    if batch != 1:
        raise ValueError(
            f"cu_seqlens: packed sequences need B == 1, got B == {batch}; flatten the batch to [1, B*T, ...] first"
        )
    check_device("cu_seqlens", cu_seqlens, "q", device)
    if cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens: expected to run from 0 to T == {tokens}, got {bounds[0]} to {bounds[-1]}")
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop < start:
            raise ValueError(
                f"cu_seqlens: expected offsets that never fall, got {start} then {stop} at index {i}; "
                "pass cumulative lengths, not lengths"
            )


def check_gate(gate: Gate, shape: tuple[int, ...], device: torch.device) -> None:
    """The gate's tensors: [B, T, HV, K], and for the parameterised gates A_log [HV] and dt_bias [HV, K]."""
    if not isinstance(gate, Tensor | SoftplusGate | BoundedGate):
        raise TypeError(f"gate: expected a Tensor, SoftplusGate or BoundedGate, got {type(gate).__name__}")
    values = gate_values(gate)
    name = "gate" if isinstance(gate, Tensor) else "gate.x"
    check_float(name, values)
    check_shape(name, values, shape, "B, T, HV, K")
    check_device(name, values, "q", device)
    if isinstance(gate, Tensor):
        if gate.device.type == "cpu" and gate.numel() and not bool((gate.detach() <= 0).all()):
            highest = gate.detach().max().item()
            raise ValueError(
                f"gate: expected a log-decay <= 0 everywhere, got a maximum of {highest:g}; a raw projection belongs in "
                "SoftplusGate(x, A_log, dt_bias) or BoundedGate(x, A_log, dt_bias)"
            )
        return
    heads, key_dim = shape[2], shape[3]
    for part, expected, letters in (("A_log", (heads,), "HV"), ("dt_bias", (heads, key_dim), "HV, K")):
        tensor = getattr(gate, part)
        check_float(f"gate.{part}", tensor)
        check_shape(f"gate.{part}", tensor, expected, letters)
        check_device(f"gate.{part}", tensor, "q", device)
    if isinstance(gate, BoundedGate) and not gate.lower_bound < 0:
        raise ValueError(f"gate.lower_bound: expected a negative number, got {gate.lower_bound}")


def check_state(
    name: str, state: Tensor, shape: tuple[int | None, ...], device: torch.device, dtype: torch.dtype
) -> None:
    """A recurrent state [N, HV, V, K]; ``None`` in ``shape`` leaves that length free (a pool's number of slots)."""
    check_tensor(name, state)
    expected = tuple(n if n is not None else state.shape[i] for i, n in enumerate(shape) if i < state.ndim)
    if state.ndim != 4 or tuple(state.shape) != expected:
        shown = [n if n is not None else "slots" for n in shape]
        raise ValueError(
            f"{name}: expected shape {shown} (N, HV, V, K: value-major), got {shape_of(state)}; "
            "a key-major state is transposed with state.transpose(-1, -2)"
        )
    if state.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {state.dtype}; a state in less precision drifts")
    check_device(name, state, "q", device)


def check_state_indices(indices: Tensor, sequences: int, slots: int, device: torch.device) -> None:
    """``state_indices`` [N]: distinct slots of the pool, int32 or int64."""
    check_tensor("state_indices", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"state_indices: expected int32 or int64, got {indices.dtype}")
    check_shape("state_indices", indices, (sequences,), "N")
    check_device("state_indices", indices, "q", device)
    if indices.device.type != "cpu":
        return
    values = indices.tolist()
    if any(not 0 <= i < slots for i in values):
        raise ValueError(f"state_indices: expected slots in [0, {slots}), got {values}")
    if len(set(values)) != len(values):
        raise ValueError(
            f"state_indices: expected distinct slots (two sequences would overwrite each other), got {values}"
        )


def check_kda(
    q: Tensor, k: Tensor, v: Tensor, gate: Gate, beta: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, state_indices: Tensor | None = None,
) -> None:  # fmt: skip
    """All inputs of ``chunk_kda`` and ``recurrent_kda`` against the contract."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("beta", beta)):
        check_float(name, tensor)
    if q.ndim != 4:
        raise ValueError(f"q: expected shape [B, T, H, K], got {shape_of(q)}")
    batch, tokens, heads, key_dim = q.shape
    check_shape("k", k, tuple(q.shape), "B, T, H, K, as q")
    if v.ndim != 4 or tuple(v.shape[:2]) != (batch, tokens):
        raise ValueError(f"v: expected shape [{batch}, {tokens}, HV, V], got {shape_of(v)}")
    v_heads, value_dim = v.shape[2:]
    if heads == 0 or v_heads % heads:
        raise ValueError(f"v: expected HV to be a multiple of H == {heads}, got HV == {v_heads}")
    check_shape("beta", beta, (batch, tokens, v_heads), "B, T, HV")
    for name, tensor in (("k", k), ("v", v), ("beta", beta)):
        check_device(name, tensor, "q", q.device)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype}, as q, got {tensor.dtype}")
    check_gate(gate, (batch, tokens, v_heads, key_dim), q.device)
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, tokens, q.device)
        sequences = cu_seqlens.numel() - 1
    state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state_indices is not None:
        if initial_state is None:
            raise ValueError("state_indices: expected initial_state to hold the pool of slots, got None")
        check_state("initial_state", initial_state, (None, v_heads, value_dim, key_dim), q.device, state_dtype)
        check_state_indices(state_indices, sequences, initial_state.shape[0], q.device)
    elif initial_state is not None:
        check_state("initial_state", initial_state, (sequences, v_heads, value_dim, key_dim), q.device, state_dtype)
