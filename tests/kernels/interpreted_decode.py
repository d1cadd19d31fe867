"""Run by test_decode.py in a process of its own: Triton's interpreter has to be asked for before kernels are imported.

The decoding step and the recurrent kernel through their real launch code, on CPU tensors in fp32, against plain torch in
fp64. Prints one line per case: name, and the errors of output, memory and window.
"""

import torch

from kimi_linear.kernels.triton.configs import Config
from kimi_linear.kernels.triton.decode import WAIT, prepare
from kimi_linear.kernels.triton.recurrent_kda import recurrent_kda
from kimi_linear.kernels.triton.tickets import tickets_of
from kimi_linear.ops import recurrent_kda as public
from kimi_linear.testing.decode import decode_inputs
from kimi_linear.testing.factories import GATE_KINDS, kda_inputs
from kimi_linear.testing.tolerances import relative_error

torch.set_num_threads(1)
STEPS = {
    "one token": {"batch": 2, "heads": 1, "v_heads": 2},
    "three tokens": {"batch": 2, "tokens": 3, "heads": 2},
    "short window": {"batch": 2, "tokens": 3, "heads": 1, "conv_size": 2, "activation": "swish"},
    "long window": {"batch": 2, "tokens": 2, "heads": 1, "conv_size": 6},
    "no window": {"batch": 2, "heads": 1, "conv_size": 0, "activation": "none"},
    "sliced": {"batch": 1, "tokens": 2, "heads": 1, "v_heads": 2, "key_dim": 64, "value_dim": 32},
    "waiting": {"batch": 2, "heads": 2, "conv_size": 3},
    "one pass": {"batch": 2, "heads": 2, "conv_size": 3},
    "two passes": {"batch": 2, "heads": 2, "key_dim": 64, "value_dim": 32, "activation": "swish"},
    "four passes": {"batch": 2, "heads": 1, "conv_size": 0, "activation": "none"},
}
CONFIGS = {
    "sliced": Config(constants={"BV": 16, "PDL": 0, "AHEAD": 0}, num_warps=1),
    # One program a head, or the first would wait for those that the interpreter runs after it.
    "waiting": Config(constants={"BV": 32, "PDL": 0, "AHEAD": 2}, num_warps=1),
    "one pass": Config(constants={"BV": 32, "PDL": 0, "AHEAD": 1, "PASS": 64}, num_warps=2),
    "two passes": Config(constants={"BV": 32, "PDL": 0, "AHEAD": 1, "PASS": 16}, num_warps=2),
    "four passes": Config(constants={"BV": 32, "PDL": 0, "AHEAD": 1, "PASS": 8}, num_warps=1),
}


def step(name: str, gate: str, places: str) -> None:
    inputs = decode_inputs(**STEPS[name], gate=gate)
    exact, tokens = inputs.exact(), inputs.q.shape[1]
    last = len(inputs.pool.memory) - 1
    slots = keep = None
    if places != "rows":
        slots = torch.tensor([last, -1], dtype=torch.int32)[: len(inputs.q)]
    if places == "keep":  # the first token is not kept, and the last goes back into the slot that was read
        keep = torch.arange(len(inputs.q) * tokens).view(-1, tokens)
        keep[0, 0], keep[0, -1] = -1, last
    parts, norm, taps = inputs.gate, inputs.norm, inputs.taps
    window = (None, None, None) if taps is None else (taps.q, taps.k, taps.v)
    tensors = (
        inputs.q, inputs.k, inputs.v, parts.x, inputs.beta, norm.gate, parts.A_log, parts.dt_bias, *window, norm.weight,
        inputs.pool.memory, inputs.pool.window, slots, keep,
    )  # fmt: skip
    output = torch.full_like(inputs.v, float("nan"))
    config = CONFIGS.get(name)
    bound = getattr(parts, "lower_bound", None)
    ending = WAIT.value if name == "waiting" else None
    run = prepare(tensors, lower_bound=bound, eps=norm.eps, activation=norm.activation, config=config, ending=ending)
    run(tensors, output)
    count = len(inputs.pool.memory) * inputs.q.shape[2]
    assert not tickets_of(inputs.pool.memory, count, torch.int32).any(), "the last program did not set its ticket back"
    expected = exact.step(slots=slots, keep=keep)
    pairs = [(output, expected), (inputs.pool.memory, exact.pool.memory), (inputs.pool.window, exact.pool.window)]
    print(f"{name},{gate},{places}".replace(" ", "-"), *(relative_error(a, e) for a, e in pairs))


def recurrent(gate: str, raw: bool, pool: bool) -> None:
    layout = {"batch": 2, "tokens": 9}
    if pool:
        layout = {"tokens": 21, "heads": 1, "v_heads": 2, "value_dim": 64, "lengths": [0, 20, 1]}
    inputs = kda_inputs(**layout, gate=gate, raw=raw, normalized=False)
    wide, parts = inputs.to(torch.float64), (None, None, None)
    exact = public(*wide.positional(), normalize_qk=True, initial_state=wide.initial_state, cu_seqlens=wide.cu_seqlens)
    values = inputs.gate
    if raw:
        values, parts = (
            inputs.gate.x,
            (inputs.gate.A_log, inputs.gate.dt_bias, getattr(inputs.gate, "lower_bound", None)),
        )
    state, slots, source = torch.full_like(inputs.initial_state, float("nan")), None, inputs.initial_state
    if pool:
        slots = torch.tensor([4, 0, 2])
        state = torch.zeros(5, *inputs.initial_state.shape[1:])
        state[slots], source = inputs.initial_state, None
    output = recurrent_kda(
        inputs.q, inputs.k, inputs.v, values, *parts, inputs.beta, inputs.q.shape[-1] ** -0.5, True, source, state, slots,
        inputs.cu_seqlens,
    )  # fmt: skip
    errors = (
        relative_error(output, exact.output),
        relative_error(state if slots is None else state[slots], exact.final_state),
    )
    rest = float(state[[1, 3]].abs().max()) if pool else 0.0
    print(f"recurrent,{gate},{'raw' if raw else 'plain'},{'pool' if pool else 'own'}", *errors, rest)


for case in STEPS:
    for where in ("rows", "slots") if case == "waiting" or "pass" in case else ("rows", "slots", "keep"):
        step(case, "init", where)
for kind in GATE_KINDS:
    step("three tokens", kind, "keep")
    recurrent(kind, raw=True, pool=True)
    recurrent(kind, raw=False, pool=False)
