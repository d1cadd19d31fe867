"""The fused step of decoding on a GPU: exact at every gate, in a graph, in any row, far from the pool's start, and back."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kimi_linear.kernels.triton.configs import Config, device_arch, table
from kimi_linear.kernels.triton.decode import PASSES, TICKET, WAIT, prepare
from kimi_linear.ops import DecodePool, recurrent_kda
from kimi_linear.testing.decode import DecodeInputs, decode_inputs
from kimi_linear.testing.factories import GATE_KINDS, kda_inputs
from kimi_linear.testing.tolerances import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]

LIMIT = 5e-3
"""Relative error of a bf16 output against fp64; the memory itself stays in fp32."""
WIDE = {"key_dim": 128, "device": "cuda"}


def indices(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def close(inputs: DecodeInputs, limit: float, **places: torch.Tensor) -> None:
    exact = inputs.exact()
    expected = exact.step(**places, impl="torch")
    assert relative_error(inputs.step(**places, impl="triton"), expected) < limit
    assert relative_error(inputs.pool.memory, exact.pool.memory) < limit
    assert torch.equal(inputs.pool.window.double(), exact.pool.window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_exact_at_every_gate(gate: str, tokens: int, dtype: torch.dtype) -> None:
    inputs = decode_inputs(3, tokens, 2, gate=gate, dtype=dtype, **WIDE)
    close(inputs, LIMIT if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("v_heads", "activation", "conv_size"), [(2, "sigmoid", 4), (6, "swish", 3), (2, "none", 0)])
def test_every_width_and_grouped_heads(width: int, tokens: int, v_heads: int, activation: str, conv_size: int) -> None:
    inputs = decode_inputs(
        2, tokens, 2, v_heads, width, conv_size=conv_size, activation=activation, dtype=torch.bfloat16, device="cuda"
    )
    close(inputs, LIMIT)


def test_strided_projections_and_unaligned_views() -> None:
    """q, k, v as views into one product, and every row of the gates at an odd address."""
    inputs = decode_inputs(4, 2, 2, dtype=torch.bfloat16, **WIDE)
    joined = torch.cat([x.flatten(2) for x in (inputs.q, inputs.k, inputs.v)], dim=-1)
    q, k, v = (x.unflatten(-1, (2, 128)) for x in joined.split(256, dim=-1))
    odd = torch.empty(inputs.gate.x.numel() + 1, dtype=torch.bfloat16, device="cuda")[1:].view(inputs.gate.x.shape)
    odd.copy_(inputs.gate.x)
    views = replace(inputs.fresh(), q=q, k=k, v=v, gate=replace(inputs.gate, x=odd))
    assert torch.equal(views.step(impl="triton"), inputs.step(impl="triton"))
    assert torch.equal(views.pool.memory, inputs.pool.memory)


def test_a_padded_row_touches_nothing() -> None:
    inputs = decode_inputs(3, 2, 2, slots=12, dtype=torch.bfloat16, **WIDE)
    before = inputs.fresh().pool
    slots, keep = indices(4, -1, 2), indices([5, -1], [-1, -1], [7, 2])
    close(inputs.fresh(), LIMIT, slots=slots, keep=keep)
    output = inputs.step(slots=slots, keep=keep, out=torch.full_like(inputs.v, float("nan")))
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    untouched = [0, 1, 3, 4, 6, 8, 9, 10, 11]
    assert torch.equal(inputs.pool.memory[untouched], before.memory[untouched])
    assert torch.equal(inputs.pool.window[untouched], before.window[untouched])


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_graph_replays_what_an_eager_call_does(tokens: int) -> None:
    """Bitwise, and with slots that changed since the recording."""
    inputs = decode_inputs(5, tokens, 4, slots=40, dtype=torch.bfloat16, **WIDE)
    slots, out = indices(0, 1, 2, 3, 4), torch.empty_like(inputs.v)
    keep = indices(*range(8, 8 + 5 * tokens)).view(5, tokens)
    inputs.step(slots=slots, keep=keep, out=out)
    twin, graph = inputs.fresh(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.step(slots=slots, keep=keep, out=out)
    inputs.pool.memory.copy_(twin.pool.memory)
    for places in ([4, 3, 2, 1, 0], [5, -1, 0, 6, 7]):
        slots.copy_(torch.tensor(places))
        graph.replay()
        expected = twin.step(slots=slots, keep=keep)
        assert torch.equal(out, expected)
        assert torch.equal(inputs.pool.memory, twin.pool.memory)
        assert torch.equal(inputs.pool.window, twin.pool.window)


def test_neighbours_and_slots_do_not_matter() -> None:
    """Bitwise: a sequence alone in slot 0 is the sequence among others in any slot, and two runs are equal."""
    inputs = decode_inputs(33, 2, 4, slots=64, dtype=torch.bfloat16, **WIDE)
    order = torch.randperm(64, device="cuda")[:33]
    first, second = inputs.fresh(), inputs.fresh()
    output = first.step(slots=order)
    assert torch.equal(second.step(slots=order), output)
    assert torch.equal(second.pool.memory, first.pool.memory)
    for row in (0, 7, 32):
        alone = inputs.rows(slice(row, row + 1))
        place = order[row : row + 1]
        pool = DecodePool(memory=inputs.pool.memory[place].clone(), window=inputs.pool.window[place].clone())
        assert torch.equal(replace(alone, pool=pool).step()[0], output[row])
        assert torch.equal(pool.memory[0], first.pool.memory[order[row]])


def through(inputs: DecodeInputs, slots: torch.Tensor, config: Config, ending: int | None) -> torch.Tensor:
    """A step with a launch of one's own choice."""
    gate, taps, norm, pool = inputs.gate, inputs.taps, inputs.norm, inputs.pool
    assert taps is not None
    step = (
        inputs.q, inputs.k, inputs.v, gate.x, inputs.beta, norm.gate, gate.A_log, gate.dt_bias, taps.q, taps.k, taps.v,
        norm.weight, pool.memory, pool.window, slots, None,
    )  # fmt: skip
    output = torch.full_like(inputs.v, float("nan"))
    run = prepare(step, lower_bound=None, eps=norm.eps, activation=norm.activation, config=config, ending=ending)
    run(step, output)
    return output


@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 3])
def test_launches_give_the_same_bits(width: int, tokens: int) -> None:
    """The table chooses by the number of tokens and of heads, so a sequence among others is launched otherwise than alone."""
    by_arch, (major, minor) = table()["kda_decode"], device_arch(torch.cuda.current_device())
    classes = by_arch[max(arch for arch in by_arch if arch <= 10 * major + minor)]
    configs = [config for name, config in classes.items() if name.startswith(f"K = {width},")]
    configs.append(replace(configs[0], constants={**configs[0].constants, "BV": min(width, 16), "PDL": 0}))
    configs.append(replace(configs[0], constants={**configs[0].constants, "PASS": min(width // 4, 32)}))
    for v_heads in (4, 2):  # a head in passes takes as many of one kind as of the other
        inputs = decode_inputs(3, tokens, 2, v_heads, width, dtype=torch.bfloat16, device="cuda")
        slots, expected = indices(5, 1, 2), None
        for config in configs:
            endings = [WAIT.value, TICKET.value] if tokens == 1 else [TICKET.value]
            if tokens == 1 and v_heads == 2 and "PASS" in config.constants:
                endings.append(PASSES.value)
            config = replace(config, constants={**config.constants, "BV": min(width, config["BV"])})
            for ending in endings:
                twin = inputs.fresh()
                got = (through(twin, slots, config, ending), twin.pool.memory, twin.pool.window)
                expected = expected or got
                for a, b in zip(got, expected, strict=True):
                    assert torch.equal(a, b), (config, ending)


@pytest.mark.parametrize("heads", [4, 64])
def test_slots_may_be_written_by_the_kernel_right_before(heads: int) -> None:
    """A step may be launched before that one has ended: what it read of the slots then was a guess."""
    inputs = decode_inputs(3, 1, heads, slots=9, dtype=torch.bfloat16, **WIDE)
    orders = [torch.randperm(9, device="cuda", dtype=torch.int32)[:3] for _ in range(60)]
    for i, order in enumerate(orders):
        order[i % 3] = order[i % 3] if i % 4 else -1
    twin, slots, out, graph = inputs.fresh(), indices(0, 1, 2), torch.empty_like(inputs.v), torch.cuda.CUDAGraph()
    expected = torch.stack([twin.step(slots=order) for order in orders])
    found = torch.zeros_like(expected)
    inputs.fresh().step(slots=slots, out=out)
    with torch.cuda.graph(graph):
        for order, place in zip(orders, found, strict=True):
            slots.copy_(order)
            inputs.step(slots=slots, out=out)
            place.copy_(out)
    graph.replay()
    assert torch.equal(found, expected)
    assert torch.equal(inputs.pool.memory, twin.pool.memory)
    assert torch.equal(inputs.pool.window, twin.pool.window)


@pytest.mark.parametrize("rows", [5, 40])
def test_one_row_of_many_heads_is_a_row_alone(rows: int) -> None:
    """At the released model's heads one sequence and five take different entries of the table; forty ask for rows ahead."""
    inputs = decode_inputs(rows, 1, 32, slots=rows + 3, dtype=torch.bfloat16, **WIDE)
    many, alone = inputs.fresh(), inputs.fresh()
    slots = torch.randperm(rows + 3, device="cuda", dtype=torch.int32)[:rows]
    slots[rows // 2] = -1
    output = many.step(slots=slots)
    for row in range(rows):
        part = alone.rows(slice(row, row + 1))
        assert torch.equal(part.step(slots=slots[row : row + 1])[0], output[row])
    assert torch.equal(alone.pool.memory, many.pool.memory)
    assert torch.equal(alone.pool.window, many.pool.window)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_calls_on_two_streams_do_not_disturb_each_other(rows: int) -> None:
    """Two halves of one pool, 200 steps each at the same time: bitwise what one half after the other gives."""
    inputs = decode_inputs(2 * rows, 1, 32, slots=2 * rows, dtype=torch.bfloat16, **WIDE)
    together, apart = inputs.fresh(), inputs.fresh()
    halves = [(slice(start, start + rows), indices(*range(start, start + rows))) for start in (0, rows)]
    streams = [torch.cuda.Stream() for _ in halves]
    torch.cuda.synchronize()
    for _ in range(200):
        for (rows, slots), stream in zip(halves, streams, strict=True):
            with torch.cuda.stream(stream):
                together.rows(rows).step(slots=slots)
    torch.cuda.synchronize()
    for rows, slots in halves:
        for _ in range(200):
            apart.rows(rows).step(slots=slots)
    assert torch.equal(together.pool.memory, apart.pool.memory)
    assert torch.equal(together.pool.window, apart.pool.window)


def test_a_graph_may_be_recorded_on_a_pool_that_no_call_has_met() -> None:
    """Its tickets are the recording's own, and replays leave those of later calls alone."""
    inputs = decode_inputs(2, 1, 4, slots=4, dtype=torch.bfloat16, **WIDE)
    inputs.fresh().step(slots=indices(0, 1))  # compiles
    twin, slots, out, graph = inputs.fresh(), indices(2, 1), torch.empty_like(inputs.v), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.step(slots=slots, out=out)
    for _ in range(3):
        graph.replay()
        assert torch.equal(twin.step(slots=slots), out)
        assert torch.equal(inputs.step(slots=slots), twin.step(slots=slots))
    assert torch.equal(inputs.pool.memory, twin.pool.memory)


@pytest.mark.parametrize("tokens", [2, 5, 8])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_taking_back_tokens_equals_sequential_decoding(width: int, tokens: int) -> None:
    """Bitwise, for every number of accepted tokens, outputs, memories and windows: what a call of S tokens promises.

    Each S is compiled apart, so this holds only while no build may fuse or order its sums otherwise than another.
    """
    inputs = decode_inputs(2, tokens, 2, key_dim=width, slots=32, dtype=torch.bfloat16, device="cuda")
    sequential, slots = inputs.fresh(), indices(0, 1)
    keep = indices(*range(2, 2 + 2 * tokens)).view(2, tokens)
    keep[0, tokens - 1] = 0  # a row may write into the slot that it reads
    output = inputs.step(slots=slots, keep=keep)
    for t in range(tokens):
        one = sequential.rows(slice(None), slice(t, t + 1))
        assert torch.equal(one.step(slots=slots), output[:, t : t + 1]), t
        assert torch.equal(inputs.pool.memory[keep[:, t]], sequential.pool.memory[:2]), t
        assert torch.equal(inputs.pool.window[keep[:, t]], sequential.pool.window[:2]), t
    whole = decode_inputs(2, tokens, 2, key_dim=width, slots=32, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(whole.step(slots=slots), output)
    assert torch.equal(whole.pool.memory[:2], sequential.pool.memory[:2])


@pytest.mark.parametrize("rows", [1, 5])
def test_offsets_past_two_to_the_31(rows: int) -> None:
    """A pool of 2.4e9 numbers: the last slots give what the first give, where heads are few and where they are many."""
    inputs = decode_inputs(rows, 1, 32, slots=rows, dtype=torch.bfloat16, **WIDE)
    slots = 4600
    memory = torch.empty(slots, 32, 128, 128, device="cuda")
    window = torch.empty(slots, 3 * 32 * 128, 3, device="cuda", dtype=torch.bfloat16)
    memory[-rows:], window[-rows:] = inputs.pool.memory, inputs.pool.window
    assert memory.numel() > 2**31
    far = replace(inputs, pool=DecodePool(memory=memory, window=window))
    assert torch.equal(far.step(slots=indices(*range(slots - rows, slots))), inputs.step())
    assert torch.equal(memory[-rows:], inputs.pool.memory)
    assert torch.equal(window[-rows:], inputs.pool.window)


@pytest.mark.parametrize("gate", ["init", "mixed"])
def test_512_steps_do_not_drift(gate: str) -> None:
    inputs = decode_inputs(2, 1, 2, gate=gate, dtype=torch.bfloat16, **WIDE)
    exact, errors = inputs.exact(), []
    for step in range(512):
        fresh = decode_inputs(2, 1, 2, gate=gate, seed=step, dtype=torch.bfloat16, **WIDE)
        now = replace(fresh, pool=inputs.pool, taps=inputs.taps, norm=fresh.norm)
        wide = replace(fresh.exact(), pool=exact.pool, taps=exact.taps)
        errors.append(relative_error(now.step(impl="triton"), wide.step(impl="torch")))
    assert max(errors) < LIMIT
    assert relative_error(inputs.pool.memory, exact.pool.memory) < 1e-5


def test_a_slot_stride_of_the_callers_own() -> None:
    """Memories and windows of many layers may lie side by side in one buffer."""
    inputs = decode_inputs(2, 1, 2, slots=4, dtype=torch.bfloat16, **WIDE)
    layers = torch.zeros(4, 3, *inputs.pool.memory.shape[1:], device="cuda")
    layers[:, 1] = inputs.pool.memory
    mixed = replace(inputs, pool=DecodePool(memory=layers[:, 1], window=inputs.pool.window.clone()))
    assert torch.equal(mixed.step(), inputs.step())
    assert torch.equal(layers[:, 1], inputs.pool.memory)
    assert not layers[:, [0, 2]].any()


@pytest.mark.parametrize(("first", "apart"), [(0, 0), (1, 0), (0, 1), (3, 2)])
def test_states_of_many_heads_may_begin_anywhere(first: int, apart: int) -> None:
    """What is stored in bulk lies at multiples of 16 bytes; where states do not, each thread stores its own, and sums otherwise."""
    inputs = decode_inputs(5, 1, 32, slots=6, dtype=torch.bfloat16, **WIDE)
    shape = inputs.pool.memory.shape
    step = shape[1:].numel() + apart
    buffer = torch.zeros(first + shape[0] * step, device="cuda")
    memory = buffer.as_strided(shape, (step, *inputs.pool.memory.stride()[1:]), first)
    memory.copy_(inputs.pool.memory)
    moved = replace(inputs, pool=DecodePool(memory=memory, window=inputs.pool.window.clone()))
    slots = indices(5, 0, 3, -1, 2)
    for _ in range(2):
        assert relative_error(moved.step(slots=slots), inputs.step(slots=slots)) < LIMIT
    assert relative_error(memory, inputs.pool.memory) < 1e-5
    assert torch.equal(moved.pool.window, inputs.pool.window)
    between = torch.ones_like(buffer, dtype=torch.bool)
    between.as_strided(shape, memory.stride(), first).fill_(False)
    assert not buffer[between].any()


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_recurrent_at_every_gate_and_layout(gate: str, raw: bool, dtype: torch.dtype) -> None:
    limit = LIMIT if dtype == torch.bfloat16 else 1e-5
    for layout in (
        {"batch": 2, "tokens": 40, "heads": 2, "v_heads": 4},
        {"tokens": 60, "heads": 2, "lengths": [0, 20, 1, 39]},
    ):
        inputs = kda_inputs(**layout, gate=gate, raw=raw, normalized=False, dtype=dtype, **WIDE)
        wide = inputs.to(torch.float64)
        places = {"normalize_qk": True, "cu_seqlens": inputs.cu_seqlens}
        exact = recurrent_kda(*wide.positional(), initial_state=wide.initial_state, impl="torch", **places)
        got = recurrent_kda(*inputs.positional(), initial_state=inputs.initial_state, impl="triton", **places)
        assert relative_error(got.output, exact.output) < limit
        assert relative_error(got.final_state, exact.final_state) < limit
        pool, slots = torch.randn(9, *inputs.initial_state.shape[1:], device="cuda"), indices(7, 0, 3, 5)
        slots = slots[: len(inputs.initial_state)]
        pool[slots.long()] = inputs.initial_state
        before = pool.clone()
        there = recurrent_kda(*inputs.positional(), initial_state=pool, state_indices=slots, impl="triton", **places)
        assert there.final_state is pool
        assert torch.equal(there.output, got.output)
        assert torch.equal(pool[slots.long()], got.final_state)
        others = [i for i in range(9) if i not in slots.tolist()]
        assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("width", [32, 64, 256])
def test_recurrent_at_every_width(width: int) -> None:
    inputs = kda_inputs(2, 9, 2, key_dim=width, raw=True, dtype=torch.bfloat16, device="cuda")
    exact = recurrent_kda(*inputs.to(torch.float64).positional(), impl="torch")
    got = recurrent_kda(*inputs.positional(), impl="triton")
    assert relative_error(got.output, exact.output) < LIMIT
    assert relative_error(got.final_state, exact.final_state) < LIMIT


COMPILED = """
import torch
from kimi_linear.testing.decode import decode_inputs

inputs = decode_inputs(2, 1, 2, key_dim=128, dtype=torch.bfloat16, device="cuda")
twin = inputs.fresh()
compiled = torch.compile(lambda x: x.step() * 2, fullgraph=True)
assert torch.equal(compiled(inputs), twin.step() * 2)
assert torch.equal(inputs.pool.memory, twin.pool.memory)
assert torch.equal(inputs.pool.window, twin.pool.window)
"""


def test_compiled_without_a_break() -> None:
    """In a process of its own: the compiler does not look through the wrappers that check shapes here."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
