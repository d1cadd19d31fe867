"""Run as a script, with fla on the path: our operation behind fla's ``chunk_kda``, against fla's own naive recurrence.

In a process of its own, because transformers changes what it runs once fla can be imported.
"""

from __future__ import annotations

import itertools
import logging
import sys
import warnings

import torch

# fla says at import that there is no GPU here.
warnings.filterwarnings("ignore", message="Triton is not supported on current platform")


from fla.ops.kda import chunk_kda  # noqa: E402
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate  # noqa: E402
from fla.ops.kda.naive import naive_recurrent_kda  # noqa: E402

from kimi_linear.integrations import fla as integration  # noqa: E402

torch.set_num_threads(1)
LIMIT = 2e-5
B, T, H, HV, K, V = 2, 70, 2, 4, 16, 24


class Refusals(logging.Handler):
    """What fla logs of a call that a backend left to it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def inputs(batch: int = B) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shape = (batch, T)
    return {
        "q": torch.randn(*shape, H, K),
        "k": torch.randn(*shape, H, K),
        "v": torch.randn(*shape, HV, V),
        "g": torch.randn(*shape, HV, K),
        "beta": torch.randn(*shape, HV),
    }


def unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def check(name: str, found: torch.Tensor, expected: torch.Tensor, limit: float = LIMIT) -> None:
    error = float((found - expected).detach().abs().max())
    size = float(expected.detach().abs().max())
    print(f"{name:60s} {error:.1e} of {size:.1e}")
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    assert size > 1e-3, name
    assert error <= limit * max(size, 1.0), name


def gates(x: dict[str, torch.Tensor]) -> dict[str, tuple[dict, torch.Tensor]]:
    """(arguments of fla's operation, log-decay) of each kind of gate."""
    A_log, dt_bias = torch.randn(HV), torch.randn(HV * K)
    raw = x["g"]
    inside = {"g": raw, "use_gate_in_kernel": True}
    return {
        "plain": ({"g": -raw.exp()}, -raw.exp()),
        "softplus": (
            {**inside, "A_log": A_log, "dt_bias": dt_bias},
            naive_kda_gate(raw, A_log, dt_bias),
        ),
        "softplus, no bias": ({**inside, "A_log": A_log}, naive_kda_gate(raw, A_log, None)),
        "bounded": (
            {**inside, "A_log": A_log, "dt_bias": dt_bias, "lower_bound": -4.0, "safe_gate": True},
            naive_kda_lowerbound_gate(raw, A_log, dt_bias, -4.0),
        ),
        "bounded, no rate": (
            {**inside, "dt_bias": dt_bias, "lower_bound": -5.0},
            naive_kda_lowerbound_gate(raw, None, dt_bias, -5.0),
        ),
    }


def check_values() -> None:
    x = inputs()
    state = torch.randn(B, HV, K, V)
    for name, (arguments, decay) in gates(x).items():
        for negative in (False, True):
            call = {"q": x["q"], "k": x["k"], "v": x["v"], "beta": x["beta"], "initial_state": state, **arguments}
            call |= {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "chunk_size": 32}
            call |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": negative}
            beta = x["beta"].sigmoid() * (2 if negative else 1)
            expected = naive_recurrent_kda(
                unit(x["q"]), unit(x["k"]), x["v"], decay, beta, initial_state=state, output_final_state=True
            )
            output, final = chunk_kda(**call)
            check(f"{name}, beta up to {1 + negative}: output", output, expected[0])
            check(f"{name}, beta up to {1 + negative}: state", final, expected[1])
            # Value-major, and by position as transformers calls it.
            call = {n: v for n, v in call.items() if n not in ("q", "k", "v")}
            call |= {"state_v_first": True, "initial_state": state.mT.contiguous()}
            output, final = chunk_kda(x["q"], x["k"], x["v"], **call)
            check(f"{name}: value-major state", final, expected[1].mT)


def check_the_rest() -> None:
    """Scale, no norm, no state, packed sequences, gradients."""
    x = inputs(1)
    beta, decay = x["beta"].sigmoid(), -x["g"].exp()
    q, k = unit(x["q"]) * 0.5, unit(x["k"]) * 0.5
    bounds = [0, 5, 5, 41, T]
    leaves = [t.clone().requires_grad_() for t in (q, k, x["v"], decay, beta)]
    output, final = chunk_kda(*leaves, scale=0.7, cu_seqlens=torch.tensor(bounds))
    assert final is None
    other = [t.clone().requires_grad_() for t in (q, k, x["v"], decay, beta)]
    parts = [
        naive_recurrent_kda(*(t[:, a:b] for t in other), scale=0.7)[0] for a, b in itertools.pairwise(bounds) if b > a
    ]
    expected = torch.cat(parts, dim=1)
    check("packed", output, expected)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, a, b in zip(("q", "k", "v", "g", "beta"), leaves, other, strict=True):
        check(f"packed: gradient of {name}", a.grad, b.grad, 1e-4)


def check_refusals(log: Refusals) -> None:
    """Each is left to fla, with a reason. fla itself needs a GPU, so that the call then fails here."""
    x = inputs(1)
    call = {**x, "beta": x["beta"].sigmoid(), "g": -x["g"].exp()}
    raw = {**call, "g": x["g"], "use_gate_in_kernel": True}
    for name, arguments, reason in [
        ("an argument of tomorrow", {**call, "new_argument": 3}, "new_argument: not supported"),
        ("intermediate states", {**call, "return_intermediate_states": True}, "return_intermediate_states: not supported"),
        ("graph", {**call, "use_graph": True}, "use_graph: not supported"),
        ("context parallel", {**call, "cp_context": object()}, "cp_context: not supported"),
        ("16-bit state", {**call, "initial_state": torch.zeros(1, HV, K, V, dtype=torch.bfloat16)}, "initial_state: expected float32"),
        ("no rate", raw, "A_log: missing"),
        ("no bound", {**raw, "A_log": torch.zeros(HV), "safe_gate": True}, "lower_bound: missing"),
        ("negative without sigmoid", {**call, "allow_neg_eigval": True}, "allow_neg_eigval: needs"),
        ("wrong shape", {**call, "beta": call["beta"][:, :5]}, "beta: expected shape"),
        ("a growing state", {**call, "g": x["g"].abs()}, "gate: expected a log-decay <= 0"),
    ]:  # fmt: skip
        found = integration.why_not({n: v for n, v in arguments.items() if v is not None}, "auto")
        print(f"{name:60s} {found}")
        assert found is not None, name
        assert reason in found, (name, found)
    del log.lines[:]
    try:
        chunk_kda(**call, use_graph=True)
    except Exception as error:
        print(f"fla without a GPU: {type(error).__name__}")
    assert any("kimi_linear rejected: use_graph: not supported" in line for line in log.lines), log.lines


def main() -> int:
    log = Refusals()
    logger = logging.getLogger("fla.backends")
    logger.setLevel(logging.INFO)
    logger.addHandler(log)
    integration.register(impl="reference")
    integration.register()
    with torch.no_grad():
        check_values()
    assert any("chunk_kda -> kimi_linear" in line for line in log.lines), log.lines
    check_the_rest()
    check_refusals(log)
    integration.unregister()
    x = inputs(1)
    try:
        chunk_kda(**x)
    except Exception as error:
        print(f"unregistered, fla without a GPU: {type(error).__name__}")
    else:
        raise AssertionError("unregister: fla cannot have computed this on a CPU")
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
