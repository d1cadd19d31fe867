"""Our KDA behind flash-linear-attention's own ``chunk_kda`` (fla-core >= 0.6), and so in everything that calls it.

fla lets a backend register for an operation: it asks the backend's verifier at each call, and runs its own kernels where
the verifier says no. Whatever our operation does not cover is refused there, with the reason, which fla logs.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops import AVAILABLE, BoundedGate, Choice, Gate, Impl, OpFacts, SoftplusGate, choose_impl, kda_facts
from kimi_linear.ops import chunk_kda as our_chunk_kda
from kimi_linear.ops.validation import check_kda

NAME = "kimi_linear"
"""What fla calls the backend in its log."""
PRIORITY = 4
"""After FlashKDA (3), which somebody who installed it wants, and before fla's own kernels."""
KERNELS: tuple[Impl, ...] = ("triton", "hopper")
"""Implementations that are worth taking from fla on a GPU; our plain torch form is not."""

UNDERSTOOD = frozenset({
    "q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel",
    "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "lower_bound", "state_v_first", "cu_seqlens",
    "A_log", "dt_bias",
})  # fmt: skip
"""Arguments of fla's ``chunk_kda`` that say what is computed."""
ONLY_HOW = frozenset({"safe_gate", "disable_recompute", "cu_seqlens_cpu", "max_num_seqs", "chunk_size"})
"""Arguments that say how fla's kernels compute it; the result is the same, so they change nothing here."""

_settings: dict[str, Any] = {"impl": "auto", "registered": False, "in_force": False}


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """One call of fla's ``chunk_kda`` in our terms."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Gate
    beta: Tensor
    scale: float | None
    normalize_qk: bool
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    wants_state: bool
    value_major: bool

    def run(self, impl: Impl) -> tuple[Tensor, Tensor | None]:
        """(output in q's dtype, final state in the caller's layout or None), as fla returns them."""
        output, state = our_chunk_kda(
            self.q, self.k, self.v, self.gate, self.beta, scale=self.scale, normalize_qk=self.normalize_qk,
            initial_state=self.initial_state, cu_seqlens=self.cu_seqlens, impl=impl,
        )  # fmt: skip
        if not self.wants_state:
            return output.to(self.q.dtype), None
        return output.to(self.q.dtype), state if self.value_major else state.transpose(-1, -2).contiguous()

    def facts(self) -> OpFacts:
        """What the choice of an implementation depends on."""
        return kda_facts("chunk_kda", self.q, self.k, self.v, self.gate, self.beta, self.initial_state)


def register(*, impl: Impl = "auto") -> None:
    """Register with fla: from now on ``fla.ops.kda.chunk_kda`` runs on ``kimi_linear.ops`` where that covers the call.

    fla's layers, transformers' native model where fla is installed, and NeMo Automodel call that function. With
    ``"auto"`` a call on a GPU is taken where one of our GPU kernels computes it, and left to fla otherwise; a call on a
    CPU, where fla cannot run, is always taken. Another ``impl`` is taken wherever it works. Calling it again only
    changes ``impl``.

    Args:
        impl: which implementation of ``chunk_kda`` runs.

    Raises:
        ImportError: fla-core is absent or older than 0.6. ValueError: no implementation has that name.
    """
    if impl != "auto" and impl not in AVAILABLE["chunk_kda"]:
        raise ValueError(f"impl: expected 'auto' or one of {', '.join(AVAILABLE['chunk_kda'])}, got {impl!r}")
    try:
        from fla.backends import BaseBackend  # type: ignore[import-not-found]
        from fla.backends import register as register_backend  # type: ignore[import-not-found]
        from fla.ops.kda import chunk_kda  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(
            f"fla: expected fla-core 0.6 or later, got: {error}; install it with pip install 'fla-core>=0.6'"
        ) from error
    _settings.update(impl=impl, in_force=True)
    if _settings["registered"]:
        return
    signature = inspect.signature(inspect.unwrap(chunk_kda))

    class KimiLinearBackend(BaseBackend):
        """Our ``chunk_kda`` as fla calls a backend."""

        backend_type = NAME
        priority = PRIORITY

        @classmethod
        def is_available(cls) -> bool:
            return bool(_settings["in_force"])

        def chunk_kda_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            reason = why_not(_arguments(signature, args, kwargs), _settings["impl"])
            return reason is None, reason

        def chunk_kda(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            return translate(_arguments(signature, args, kwargs)).run(_settings["impl"])

    register_backend(chunk_kda)(KimiLinearBackend)
    _settings["registered"] = True


def unregister() -> None:
    """Leave every call to fla again. Nothing happens without a ``register``."""
    _settings["in_force"] = False


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument that differs from fla's default, by name."""
    bound = signature.bind(*args, **kwargs).arguments
    starred = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    extra = bound.pop(starred, {}) if starred else {}
    defaults = {name: p.default for name, p in signature.parameters.items()}
    return {
        name: value
        for name, value in {**bound, **extra}.items()
        if isinstance(value, Tensor) or value != defaults.get(name)
    }


def why_not(arguments: dict[str, Any], impl: Impl) -> str | None:
    """Why a call of fla's ``chunk_kda`` is left to fla; None where ours computes the same.

    Args:
        arguments: what the caller passed, by fla's names; those at their defaults may be absent.
        impl: as for ``register``.
    """
    unknown = sorted(set(arguments) - UNDERSTOOD - ONLY_HOW)
    if unknown:
        return f"{unknown[0]}: not supported"
    gate_inside, lower_bound = arguments.get("use_gate_in_kernel", False), arguments.get("lower_bound")
    if gate_inside and arguments.get("A_log") is None and lower_bound is None:
        return "A_log: missing, and the softplus gate needs it"
    if gate_inside and arguments.get("safe_gate", False) and lower_bound is None:
        return "lower_bound: missing, and safe_gate needs it"
    if arguments.get("allow_neg_eigval", False) and not arguments.get("use_beta_sigmoid_in_kernel", False):
        return "allow_neg_eigval: needs use_beta_sigmoid_in_kernel"
    state = arguments.get("initial_state")
    if state is not None and state.dtype != torch.float32:
        return f"initial_state: expected float32, got {state.dtype}"
    call = translate(arguments)
    try:
        check_kda(call.q, call.k, call.v, call.gate, call.beta, call.initial_state, call.cu_seqlens)
        choice: Choice = choose_impl(call.facts(), impl)
    except (TypeError, ValueError) as error:
        return str(error)
    if impl == "auto" and call.q.device.type != "cpu" and choice.impl not in KERNELS:
        return f"no GPU kernel of ours computes this call ({choice.reason}); fla's own is faster than plain torch"
    return None


def translate(arguments: dict[str, Any]) -> Call:
    """A call of fla's ``chunk_kda`` in our terms; whether it is supported, ``why_not`` says.

    The state is key-major [N, HV, K, V] unless ``state_v_first``, beta may be a logit, and the gate may come raw with
    A_log [HV] and dt_bias [HV*K], either of which may be absent, as zero.
    """
    q, value_major = arguments["q"], bool(arguments.get("state_v_first", False))
    beta = arguments["beta"]
    if arguments.get("use_beta_sigmoid_in_kernel", False):
        beta = beta.float().sigmoid() * (2.0 if arguments.get("allow_neg_eigval", False) else 1.0)
    state = arguments.get("initial_state")
    if state is not None and not value_major:
        state = state.transpose(-1, -2)
    return Call(
        q=q,
        k=arguments["k"],
        v=arguments["v"],
        gate=_gate(arguments),
        beta=beta,
        scale=arguments.get("scale"),
        normalize_qk=bool(arguments.get("use_qk_l2norm_in_kernel", False)),
        initial_state=state,
        cu_seqlens=arguments.get("cu_seqlens"),
        wants_state=bool(arguments.get("output_final_state", False)),
        value_major=value_major,
    )


def _gate(arguments: dict[str, Any]) -> Gate:
    g = arguments["g"]
    if not arguments.get("use_gate_in_kernel", False):
        return g
    heads, key_dim = g.shape[-2:]
    A_log, dt_bias = arguments.get("A_log"), arguments.get("dt_bias")
    A_log = g.new_zeros(heads, dtype=torch.float32) if A_log is None else A_log.reshape(heads).float()
    dt_bias = (
        g.new_zeros(heads, key_dim, dtype=torch.float32) if dt_bias is None else dt_bias.reshape(heads, key_dim).float()
    )
    lower_bound = arguments.get("lower_bound")
    return SoftplusGate(g, A_log, dt_bias) if lower_bound is None else BoundedGate(g, A_log, dt_bias, lower_bound)


__all__ = ["Call", "register", "translate", "unregister", "why_not"]
