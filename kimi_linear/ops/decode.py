"""The core of a KDA layer for one to eight decoded tokens, as one operation on a pool of states: ``kda_decode``.

Between a layer's input projections and its output projection lie the short convolution, the norms, the gate, the delta rule
and the gated norm of the output. For a whole prompt each is worth an operation of its own. For one token they are a few
kilobytes around a state that is read once and written once, and what counts is the number of launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.ops.contract import BoundedGate, Impl, SoftplusGate
from kimi_linear.ops.dispatch import OpFacts, choose_impl
from kimi_linear.ops.kda import recurrent_kda
from kimi_linear.ops.likeness import likeness
from kimi_linear.ops.norm import GateActivation, gated_rms_norm
from kimi_linear.ops.short_conv import short_conv
from kimi_linear.ops.validation_decode import check_decode, check_slot_values


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodePool:
    """What sequences remember, slot by slot. ``kda_decode`` writes into it.

    Attributes:
        memory: [slots, HV, V, K], value-major, fp32 (fp64 for fp64 inputs). Slots may lie at any stride.
        window: [slots, 2*H*K + HV*V, W-1] in the dtype of q: the last inputs of the short convolution on q, k and v,
            oldest first; W-1 is 0 where there is no convolution.
    """

    memory: Tensor
    window: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvTaps:
    """Weights of the short convolution; ``[:, -1]`` multiplies the current token.

    Attributes:
        q: [H*K, W].
        k: [H*K, W].
        v: [HV*V, W].
    """

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadNorm:
    """What happens to a head's output: ``gated_rms_norm(o, gate, weight, eps, activation)``.

    Attributes:
        weight: [V].
        eps: added to the mean of squares.
        gate: [B, S, HV, V] raw projection, or None with "none".
        activation: "sigmoid", "swish" or "none".
    """

    weight: Tensor
    eps: float
    gate: Tensor | None
    activation: GateActivation = "sigmoid"


def kda_decode(
    q: Float[Tensor, "B S H K"],
    k: Float[Tensor, "B S H K"],
    v: Float[Tensor, "B S HV V"],
    gate: SoftplusGate | BoundedGate,
    beta: Float[Tensor, "B S HV"],
    pool: DecodePool,
    taps: ConvTaps | None,
    norm: HeadNorm,
    *,
    slots: Int[Tensor, "B"] | None = None,
    keep: Int[Tensor, "B S"] | None = None,
    out: Float[Tensor, "B S HV V"] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B S HV V"]:
    """One step of decoding: convolution, SiLU, unit q and k, gate, delta rule, gated norm; the pool is updated in place.

    Equal to ``short_conv``, ``recurrent_kda(..., beta.sigmoid(), normalize_qk=True)`` and ``gated_rms_norm`` in turn, but
    with nothing rounded between them (arXiv 2510.26692, section 4). Not differentiable.

    With ``keep`` the state after every token stays: to take back the tokens after the j-th, which is what speculative
    decoding does, pass ``keep[:, j]`` as ``slots`` of the next call. No state is copied.

    On a GPU the host waits at most in the first call with a pool, and nothing is kept but at most two bytes a slot and value
    channel, for as long as the pool's memory lives. So a CUDA graph may record the call; the values of ``slots`` and ``keep`` may change
    between replays. Calls on different slots may run at the same time.

    Args:
        q, k: [B, S, H, K] raw projections of S in 1..8 tokens of each of B sequences; H and K dense.
        v: [B, S, HV, V] raw projection; HV a multiple of H.
        gate: raw, [B, S, HV, K] and its parameters.
        beta: [B, S, HV] raw: its sigmoid is the strength of the correction.
        pool: the states.
        taps: weights of the short convolution, or None where there is none; SiLU is taken either way.
        norm: the gated norm of the output.
        slots: [B] int32 or int64, the slot that each sequence continues from; row b where None. A negative one marks a
            padded row: it touches no state, and its output is zero.
        keep: [B, S] int32 or int64, the slot that takes the state after each token; a negative one keeps nothing. Where
            None, the state after the last token goes back into the slot that it came from. No two sequences may share
            a slot, neither for reading nor for writing; one sequence may write into the slot that it reads.
        out: takes the output, contiguous; allocated where None.
        impl: which implementation; "auto" takes Triton on CUDA, else plain torch.

    Returns:
        [B, S, HV, V] in the dtype of q.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, stride, device, slot or implementation, more than
        eight tokens, or a gradient asked for.
    """
    if type(gate) not in (SoftplusGate, BoundedGate):
        raise TypeError(
            f"gate: expected a SoftplusGate or a BoundedGate of a raw projection, got {type(gate).__name__}"
        )
    taps_q, taps_k, taps_v = (None, None, None) if taps is None else (taps.q, taps.k, taps.v)
    step = (  # no Step yet: making one costs as much as looking a kind up
        q, k, v, gate.x, beta, norm.gate, gate.A_log, gate.dt_bias, taps_q, taps_k, taps_v, norm.weight,
        pool.memory, pool.window, slots, keep,
    )  # fmt: skip
    bound = gate.lower_bound if isinstance(gate, BoundedGate) else None
    if torch.compiler.is_compiling():
        result = torch.ops.kimi_linear.kda_decode(*step, bound, norm.eps, norm.activation, impl)
        return result if out is None else out.copy_(result)
    return _run(step, out, bound, norm.eps, norm.activation, impl)


class Step(NamedTuple):
    """The tensors of a step in the order in which they travel to the kernel."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    beta: Tensor
    out_gate: Tensor | None
    A_log: Tensor
    dt_bias: Tensor
    taps_q: Tensor | None
    taps_k: Tensor | None
    taps_v: Tensor | None
    weight: Tensor
    memory: Tensor
    window: Tensor
    slots: Tensor | None
    keep: Tensor | None


_Tensors = tuple[Any, ...]
"""What a ``Step`` holds, in its order."""
_Runner = Callable[[_Tensors, Tensor], None]
MEMORY, WINDOW = Step._fields.index("memory"), Step._fields.index("window")


class _Kind(NamedTuple):
    """Calls of which one was checked, and what runs them: checks and the choice depend on nothing else."""

    others: tuple[object, ...]
    """Arguments that are no tensors, and which tensors there are."""
    given: Callable[[_Tensors], tuple[Tensor, ...]]
    """Those that are there."""
    alike: Callable[..., bool]
    empty: Callable[[Tensor], Tensor]
    """Of v: room for an output."""
    run: _Runner


_KNOWN: dict[torch.Size, list[_Kind]] = {}
"""By the shape of q. All layers of a model make calls of one kind."""
MOST_KINDS = 64
"""For one shape of q, and of such shapes."""


def _run(
    step: _Tensors, out: Tensor | None, bound: float | None, eps: float, activation: GateActivation, impl: Impl
) -> Tensor:
    """A step of a known kind goes straight to its kernel."""
    q, _, v, _, _, out_gate, _, _, taps_q, taps_k, taps_v, _, _, _, slots, keep = step
    others = (
        bound, eps, activation, impl, out_gate is None, taps_q is None, taps_k is None, taps_v is None, slots is None,
        keep is None, out is None, torch.is_grad_enabled(),
    )  # fmt: skip
    found = None
    if type(q) is Tensor:
        for kind in _KNOWN.get(q.shape, ()):
            if kind.others == others and kind.alike(*kind.given(step), *(() if out is None else (out,))):
                found = kind
                break
    if found is None:
        found = _met(Step._make(step), out, others, bound, eps, activation, impl)
    if out is None:
        out = found.empty(v)
    found.run(step, out)
    return out


def _met(
    step: Step,
    out: Tensor | None,
    others: tuple[object, ...],
    bound: float | None,
    eps: float,
    activation: GateActivation,
    impl: Impl,
) -> _Kind:
    """Check the first step of a kind, and remember what runs it."""
    check_decode(step._asdict() | {"out": out}, bound, eps, activation)
    empty = torch.empty_like
    if not step.v.is_contiguous():
        empty = partial(torch.empty_like, memory_format=torch.contiguous_format)
    known = _Kind(
        others=others,
        given=itemgetter(*(i for i, x in enumerate(step) if x is not None)),
        alike=likeness([x for x in (*step, out) if x is not None]),
        empty=empty,
        run=_runner(step, bound, eps, activation, impl),
    )
    if len(_KNOWN) >= MOST_KINDS:
        _KNOWN.clear()
    kinds = _KNOWN.setdefault(step.q.shape, [])
    if len(kinds) >= MOST_KINDS:
        kinds.clear()
    kinds.append(known)
    return known


def _runner(step: Step, bound: float | None, eps: float, activation: GateActivation, impl: Impl) -> _Runner:
    q = step.q
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in step)
    facts = OpFacts(
        op="kda_decode",
        device=q.device.type,
        arch=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
        dtype=str(q.dtype).removeprefix("torch."),
        tokens=q.shape[1],
        key_dim=q.shape[3],
        value_dim=step.v.shape[3],
        needs_grad=needs_grad,
    )
    choice = choose_impl(facts, impl)
    if needs_grad:
        raise ValueError("kda_decode: an update in place has no gradient; call under torch.no_grad()")
    if choice.impl == "triton":
        return _triton(step, bound, eps, activation)
    return lambda now, out: _compose(Step._make(now), out, bound, eps, activation, choice.impl)


def _triton(step: Step, bound: float | None, eps: float, activation: GateActivation) -> _Runner:
    from kimi_linear.kernels.triton.decode import prepare

    launch, device = prepare(step, lower_bound=bound, eps=eps, activation=activation), step.q.device.index
    counted = not (step.memory.is_inference() or step.window.is_inference())
    elsewhere = torch.cuda.device_count() > 1

    def run(now: _Tensors, out: Tensor) -> None:
        if elsewhere and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                launch(now, out)
        else:
            launch(now, out)
        if counted:  # or a graph that saved one of them would read the new values and not notice
            torch.autograd.graph.increment_version((now[MEMORY], now[WINDOW]))

    return run


def _compose(step: Step, out: Tensor, bound: float | None, eps: float, activation: GateActivation, impl: Impl) -> None:
    """The operations one after another, token by token: what the kernel is held to. On CUDA it makes the host wait."""
    memory, window, keep = step.memory, step.window, step.keep
    check_slot_values(step.slots, keep, len(memory))
    slots = torch.arange(step.q.shape[0], device=step.q.device) if step.slots is None else step.slots
    live = (slots >= 0).nonzero()[:, 0]
    sources = slots[live].long()
    state, inputs = memory[sources], window[sources]
    out.zero_()
    for s in range(step.q.shape[1]):
        now = slice(s, s + 1)
        projections = [raw[live, now] for raw in (step.q, step.k, step.v)]
        mixed = torch.cat([raw.flatten(2) for raw in projections], dim=-1)
        if step.taps_q is None or step.taps_k is None or step.taps_v is None:
            mixed = F.silu(mixed)
        else:
            taps = torch.cat([step.taps_q, step.taps_k, step.taps_v])
            mixed, inputs = short_conv(mixed, taps, initial_state=inputs)
        parts = mixed.split([raw[0, 0].numel() for raw in projections], dim=-1)
        q, k, v = (part.unflatten(-1, raw.shape[2:]) for part, raw in zip(parts, projections, strict=True))
        x = step.gate[live, now]
        gate = SoftplusGate(x, step.A_log, step.dt_bias)
        if bound is not None:
            gate = BoundedGate(x, step.A_log, step.dt_bias, bound)
        strength = step.beta[live, now].to(memory.dtype).sigmoid()
        result = recurrent_kda(q, k, v, gate, strength, normalize_qk=True, initial_state=state, impl=impl)
        state = result.final_state
        out_gate = None if step.out_gate is None else step.out_gate[live, now]
        out[live, now] = gated_rms_norm(result.output, out_gate, step.weight, eps, activation)
        targets = sources if keep is None else keep[live, s].long()
        if keep is not None or s == step.q.shape[1] - 1:
            kept = targets >= 0
            memory[targets[kept]], window[targets[kept]] = state[kept], inputs[kept]


torch.library.define(
    "kimi_linear::kda_decode",
    "(Tensor q, Tensor k, Tensor v, Tensor x, Tensor beta, Tensor? out_gate, Tensor A_log, Tensor dt_bias, Tensor? taps_q, "
    "Tensor? taps_k, Tensor? taps_v, Tensor weight, Tensor(a!) memory, Tensor(b!) window, Tensor? slots, Tensor? keep, "
    "float? lower_bound, float eps, str activation, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("kimi_linear::kda_decode", ("cpu", "cuda"))
def _operator(*arguments):  # type: ignore[no-untyped-def]
    return _run(arguments[:16], None, *arguments[16:])


@torch.library.register_fake("kimi_linear::kda_decode")
def _fake(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    return q.new_empty(v.shape)
