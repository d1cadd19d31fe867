"""Every check of the public operations' inputs, in one place.

A message gives the argument's name, what was expected, what came, and the way out. Checks that would have to read
values (sign of the log-decay, order of ``cu_seqlens``) run only on CPU tensors, where they cost no synchronisation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
        check_not_positive(
            "gate",
            gate,
            "a raw projection belongs in SoftplusGate(x, A_log, dt_bias) or BoundedGate(x, A_log, dt_bias)",
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


def check_offsets(
    offsets: Sequence[tuple[int, int]], sequences: int, tokens: int, cu_seqlens: Tensor | None, chunk: int
) -> None:
    """``offsets``: different pairs (sequence, tokens), tokens a multiple of ``chunk`` from there to the sequence's length."""
    lengths = None if cu_seqlens is None or cu_seqlens.device.type != "cpu" else cu_seqlens.diff().tolist()
    for pair in offsets:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(type(number) is int for number in pair)):
            raise TypeError(f"offsets: expected pairs of int, (sequence, tokens), got {pair!r}")
        n, offset = pair
        if not 0 <= n < sequences:
            raise ValueError(f"offsets: expected a sequence in [0, {sequences}), got {pair}")
        if offset < chunk or offset % chunk:
            raise ValueError(
                f"offsets: expected tokens in multiples of {chunk} from {chunk} on, got {pair}; round down, and run the "
                "tokens in between again"
            )
        length = tokens if lengths is None else lengths[n]
        if offset > length:
            raise ValueError(f"offsets: expected tokens up to the sequence's length {length}, got {pair}")
    if len(set(offsets)) != len(offsets):
        raise ValueError(f"offsets: expected no pair twice, got {list(offsets)}")


def check_not_positive(name: str, decay: Tensor, way_out: str) -> None:
    """A log-decay <= 0 everywhere, which also rules out NaN; read only on a CPU."""
    if decay.device.type == "cpu" and decay.numel() and not bool((decay.detach() <= 0).all()):
        highest = decay.detach().max().item()
        raise ValueError(f"{name}: expected a log-decay <= 0 everywhere, got a maximum of {highest:g}; {way_out}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None) -> tuple[int, int, int, int, int]:
    """q, k [B, T, H, K], v [B, T, HV, V] and beta [B, T, HV]; returns (B, T, HV, V, K)."""
    others = [("k", k), ("v", v), *([("beta", beta)] if beta is not None else [])]
    for name, tensor in [("q", q), *others]:
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
    if beta is not None:
        check_shape("beta", beta, (batch, tokens, v_heads), "B, T, HV")
    for name, tensor in others:
        check_device(name, tensor, "q", q.device)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype}, as q, got {tensor.dtype}")
    return batch, tokens, v_heads, value_dim, key_dim


def check_kda(
    q: Tensor, k: Tensor, v: Tensor, gate: Gate, beta: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, state_indices: Tensor | None = None,
) -> None:  # fmt: skip
    """All inputs of ``chunk_kda`` and ``recurrent_kda`` against the contract."""
    batch, tokens, v_heads, value_dim, key_dim = check_qkv(q, k, v, beta)
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


def check_scalar_gate(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """All inputs of the operations with one decay per head: as ``check_kda``, but gate [B, T, HV], and beta optional."""
    batch, tokens, v_heads, value_dim, key_dim = check_qkv(q, k, v, beta)
    check_float("gate", gate)
    check_shape("gate", gate, (batch, tokens, v_heads), "B, T, HV: one log-decay per head")
    check_device("gate", gate, "q", q.device)
    check_not_positive("gate", gate, "pass -exp(A_log) * softplus(x + dt_bias), not the raw projection x")
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, tokens, q.device)
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        check_state("initial_state", initial_state, (sequences, v_heads, value_dim, key_dim), q.device, state_dtype)


def check_ndim(name: str, tensor: Tensor, ndim: int, letters: str) -> None:
    check_float(name, tensor)
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: expected shape [{letters}], got {shape_of(tensor)}")


def check_like(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """Same dtype and device as ``other``."""
    check_float(name, tensor)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other.dtype}, as {like}, got {tensor.dtype}; use {name}.to({like}.dtype)")
    check_device(name, tensor, like, other.device)


def check_choice(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(options)}, got {value!r}")


def check_short_conv(
    x: Tensor, weight: Tensor, activation: str, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    bias: Tensor | None = None, *, name: str = "x", weight_name: str = "weight",
) -> None:  # fmt: skip
    """All inputs of ``short_conv``; ``name`` and ``weight_name`` are what the caller calls the first two."""
    check_choice("activation", activation, ("silu", "none"))
    check_ndim(name, x, 3, "B, T, D")
    check_float(weight_name, weight)
    if weight.ndim != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(
            f"{weight_name}: expected shape [{x.shape[2]}, W] (D, W), got {shape_of(weight)}; "
            "a checkpoint's [D, 1, W] is squeezed with weight.squeeze(1)"
        )
    check_device(weight_name, weight, name, x.device)
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (x.shape[2],), "D")
        check_device("bias", bias, name, x.device)
    sequences = x.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], x.device)
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        check_float("initial_state", initial_state)
        check_shape("initial_state", initial_state, (sequences, x.shape[2], weight.shape[1] - 1), "N, D, W-1")
        check_device("initial_state", initial_state, name, x.device)


def check_short_conv_qkv(
    parts: tuple[Tensor, Tensor, Tensor], weights: tuple[Tensor, Tensor, Tensor], activation: str,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """All inputs of ``short_conv_qkv``: each part as for ``short_conv``, all alike, and a state of all channels."""
    q, q_weight = parts[0], weights[0]
    width = 0
    for name, x, weight in zip("qkv", parts, weights, strict=True):
        check_short_conv(x, weight, activation, None, cu_seqlens, name=name, weight_name=f"weights ({name})")
        check_shape(name, x, (*q.shape[:2], x.shape[2]), f"B, T, D{name}, as q")
        check_like(name, x, "q", q)
        check_like(f"weights ({name})", weight, "weights (q)", q_weight)
        check_shape(f"weights ({name})", weight, (x.shape[2], q_weight.shape[1]), f"D{name}, W, as q's")
        width += x.shape[2]
    if initial_state is not None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        check_float("initial_state", initial_state)
        check_shape("initial_state", initial_state, (sequences, width, q_weight.shape[1] - 1), "N, Dq+Dk+Dv, W-1")
        check_device("initial_state", initial_state, "q", q.device)


def check_l2_normalize(x: Tensor, eps: float) -> None:
    """All inputs of ``l2_normalize``."""
    check_float("x", x)
    if x.ndim == 0:
        raise ValueError("x: expected shape [..., D], got a number")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")


def check_rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> None:
    """All inputs of ``rms_norm``."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype or None, got {dtype}")
    check_float("x", x)
    check_float("weight", weight)
    if x.ndim == 0:
        raise ValueError("x: expected shape [..., D], got a number")
    check_shape("weight", weight, (x.shape[-1],), "D, the last dim of x")
    check_device("weight", weight, "x", x.device)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")


def check_gated_rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, activation: str) -> None:
    """All inputs of ``gated_rms_norm``."""
    check_choice("activation", activation, ("sigmoid", "swish", "none"))
    check_rms_norm(x, weight, eps)
    if (gate is None) != (activation == "none"):
        got = "None" if gate is None else "a tensor"
        raise ValueError(
            f"gate: expected {'None' if activation == 'none' else 'a tensor'} with activation={activation!r}, got {got}; "
            "activation='none' means that there is no gate"
        )
    if gate is not None:
        check_float("gate", gate)
        check_shape("gate", gate, tuple(x.shape), "as x")
        check_device("gate", gate, "x", x.device)


def check_mla_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    """All inputs of ``mla_attention``."""
    check_ndim("q", q, 4, "B, T, H, Dq")
    batch, tokens, heads, width = q.shape
    check_ndim("k", k, 4, "B, S, H, Dq")
    seen = k.shape[1]
    check_shape("k", k, (batch, seen, heads, width), "B, S, H, Dq")
    check_ndim("v", v, 4, "B, S, H, Dv")
    check_shape("v", v, (batch, seen, heads, v.shape[3]), "B, S, H, Dv")
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    if seen < tokens:
        raise ValueError(f"k: expected S >= T == {tokens} (the queries are the last T of S positions), got S == {seen}")
    if cu_seqlens is not None:
        if seen != tokens:
            raise ValueError(f"cu_seqlens: packed sequences need S == T == {tokens}, got S == {seen}")
        check_cu_seqlens(cu_seqlens, batch, tokens, q.device)


def check_mla_absorbed(q_nope: Tensor, q_shared: Tensor, latent: Tensor, kv_up: Tensor, lengths: Tensor | None) -> None:
    """All inputs of ``mla_absorbed``."""
    check_ndim("q_nope", q_nope, 4, "B, T, H, Dn")
    batch, tokens, heads, nope = q_nope.shape
    check_ndim("q_shared", q_shared, 4, "B, T, H, Dr")
    shared = q_shared.shape[3]
    check_shape("q_shared", q_shared, (batch, tokens, heads, shared), "B, T, H, Dr")
    check_ndim("kv_up", kv_up, 3, "H, Dn+Dv, R")
    if kv_up.shape[0] != heads or kv_up.shape[1] <= nope:
        raise ValueError(f"kv_up: expected shape [{heads}, {nope}+Dv, R] (H, Dn+Dv, R), got {shape_of(kv_up)}")
    check_ndim("latent", latent, 3, "B, S, R+Dr")
    seen = latent.shape[1]
    check_shape("latent", latent, (batch, seen, kv_up.shape[2] + shared), "B, S, R+Dr")
    for name, tensor in (("q_shared", q_shared), ("latent", latent), ("kv_up", kv_up)):
        check_like(name, tensor, "q_nope", q_nope)
    if seen < tokens:
        raise ValueError(f"latent: expected S >= T == {tokens} (the queries are the last T positions), got S == {seen}")
    if lengths is None:
        return
    check_tensor("lengths", lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths: expected int32 or int64, got {lengths.dtype}")
    check_shape("lengths", lengths, (batch,), "B")
    check_device("lengths", lengths, "q_nope", q_nope.device)
    if lengths.device.type == "cpu" and any(not tokens <= n <= seen for n in lengths.tolist()):
        raise ValueError(f"lengths: expected values from T == {tokens} to S == {seen}, got {lengths.tolist()}")


def check_rotary(x: Tensor, positions: Tensor, theta: float) -> None:
    """All inputs of ``rotary``."""
    check_float("x", x)
    if x.ndim < 3 or x.shape[-1] % 2:
        raise ValueError(f"x: expected shape [B, T, ..., Dr] with Dr even, got {shape_of(x)}")
    check_tensor("positions", positions)
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions: expected int32 or int64, got {positions.dtype}")
    if tuple(positions.shape) not in ((x.shape[1],), tuple(x.shape[:2])):
        raise ValueError(
            f"positions: expected shape [{x.shape[1]}] or {list(x.shape[:2])} (T or B, T), got {shape_of(positions)}"
        )
    check_device("positions", positions, "x", x.device)
    if not theta > 0:
        raise ValueError(f"theta: expected a number > 0, got {theta}")


def check_route(logits: Tensor, correction_bias: Tensor, top_k: int, num_groups: int, groups_per_token: int) -> None:
    """All inputs of ``route``."""
    check_ndim("logits", logits, 2, "T, E")
    experts = logits.shape[1]
    check_float("correction_bias", correction_bias)
    check_shape("correction_bias", correction_bias, (experts,), "E")
    check_device("correction_bias", correction_bias, "logits", logits.device)
    if num_groups < 1 or experts % num_groups:
        raise ValueError(f"num_groups: expected a divisor of E == {experts}, got {num_groups}")
    if not 1 <= groups_per_token <= num_groups:
        raise ValueError(f"groups_per_token: expected 1 to num_groups == {num_groups}, got {groups_per_token}")
    reachable = experts // num_groups * groups_per_token
    if not 1 <= top_k <= reachable:
        raise ValueError(f"top_k: expected 1 to {reachable}, the experts that a token can reach, got {top_k}")


def check_swiglu(gate: Tensor, up: Tensor) -> None:
    """Both inputs of ``swiglu``."""
    check_float("gate", gate)
    check_like("up", up, "gate", gate)
    check_shape("up", up, tuple(gate.shape), "as gate")


def check_moe_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """All inputs of ``moe_experts``."""
    check_ndim("x", x, 2, "T, D")
    check_ndim("gate_up", gate_up, 3, "E, 2I, D")
    count, inner, width = gate_up.shape
    if width != x.shape[1] or inner % 2:
        raise ValueError(f"gate_up: expected shape [E, 2I, {x.shape[1]}] (E, 2I, D), got {shape_of(gate_up)}")
    check_ndim("down", down, 3, "E, D, I")
    check_shape("down", down, (count, width, inner // 2), "E, D, I")
    check_like("gate_up", gate_up, "x", x)
    check_like("down", down, "x", x)
    check_tensor("routing.experts", experts)
    if experts.dtype != torch.int64:
        raise TypeError(f"routing.experts: expected int64, got {experts.dtype}")
    if experts.ndim != 2 or experts.shape[0] != x.shape[0]:
        raise ValueError(f"routing.experts: expected shape [{x.shape[0]}, k] (T, k), got {shape_of(experts)}")
    check_float("routing.weights", weights)
    check_shape("routing.weights", weights, tuple(experts.shape), "T, k, as routing.experts")
    for name, tensor in (("routing.experts", experts), ("routing.weights", weights)):
        check_device(name, tensor, "x", x.device)
    if experts.device.type == "cpu" and experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < count:
        raise ValueError(f"routing.experts: expected experts in [0, {count}), got {experts.min()} to {experts.max()}")
