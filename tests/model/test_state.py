"""The state between calls: its sizes, its copies, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from kimi_linear.config import ModelConfig
from kimi_linear.model import KDAState, KimiLinear, MLAState

TINY = ModelConfig.preset(
    "tiny",
    hidden_size=32,
    linear={"num_heads": 2, "head_dim": 8, "num_v_heads": 4, "v_head_dim": 12},
    mla={"num_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
)


@pytest.fixture
def model() -> KimiLinear:
    return KimiLinear(TINY, seed=0)


def test_linear_state_keeps_its_size_and_latents_grow_by_the_token(model: KimiLinear) -> None:
    state, fixed = model.make_state(3), 3 * 3 * 4 * (4 * 12 * 8 + (2 * 2 * 8 + 4 * 12) * 3)
    assert state.nbytes() == fixed
    with torch.no_grad():
        for tokens in (5, 1, 100):
            model(torch.randint(320, (3, tokens)), state=state)
    assert state.nbytes() == fixed + 106 * 3 * 4 * (16 + 4)
    assert (state.position, state.layers[3].length, state.batch_size) == (106, 106, 3)


def test_the_released_model_keeps_what_its_report_says() -> None:
    """40 MiB of memories and 1.4 MiB of windows per sequence, 8064 bytes per token in bf16."""
    with torch.device("meta"):
        model = KimiLinear(ModelConfig.preset("kimi-linear-48b-a3b")).bfloat16()
    state = model.make_state(1)
    linear = [layer for layer in state.layers if isinstance(layer, KDAState)]
    assert sum(layer.recurrent.nbytes for layer in linear) == 40 * 2**20
    assert sum(layer.conv.nbytes for layer in linear) == 20 * 3 * 4096 * 3 * 2
    before = state.nbytes()
    for layer in state.layers:
        if isinstance(layer, MLAState):
            layer.append(torch.empty(1, 1, 576, dtype=torch.bfloat16, device="meta"))
    assert state.nbytes() - before == 8064


def test_the_buffer_doubles_and_keeps_its_content() -> None:
    state = MLAState(buffer=torch.empty(2, 0, 3))
    pieces = [torch.randn(2, t, 3) for t in (1, 1, 3, 70, 1)]
    for i, piece in enumerate(pieces):
        got = state.append(piece)
        torch.testing.assert_close(got, torch.cat(pieces[: i + 1], 1), rtol=0, atol=0)
    assert state.buffer.shape[1] == 128
    with pytest.raises(ValueError, match=r"latent: expected shape \[2, 1, 3\]"):
        state.append(torch.zeros(2, 1, 4))


def test_a_state_filled_in_inference_mode_goes_on_outside_it(model: KimiLinear) -> None:
    tokens, state = torch.randint(320, (1, 9)), model.make_state(1)
    with torch.inference_mode():
        model(tokens[:, :5], state=state)
    with torch.no_grad():
        pieces = [model(token, state=state) for token in tokens[:, 5:].split(1, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens)[:, 5:])


def test_clones_and_selected_rows_go_their_own_way(model: KimiLinear) -> None:
    tokens, tail = torch.randint(320, (3, 20)), torch.randint(320, (3, 4))
    with torch.no_grad():
        state = model.make_state(3)
        model(tokens, state=state)
        copy, chosen = state.clone(), state.select([2, 0, 2])
        model(torch.randint(320, (3, 9)), state=copy)
        expected = model(torch.cat([tokens, tail], 1))[:, 20:]
        torch.testing.assert_close(model(tail, state=state), expected)
        torch.testing.assert_close(model(tail[[2, 0, 2]], state=chosen), expected[[2, 0, 2]])
    assert (state.position, copy.position, chosen.position) == (24, 29, 24)
    with pytest.raises(IndexError, match=r"rows: expected rows in \[0, 3\), got \[3\]"):
        state.select([3])


def test_dtype_of_the_state(model: KimiLinear) -> None:
    state = model.make_state(1, dtype=torch.bfloat16)
    assert [t.dtype for t in (state.layers[0].recurrent, state.layers[0].conv, state.layers[3].buffer)] == [
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]
    assert model.double().make_state(1).layers[0].recurrent.dtype == torch.float64


@pytest.mark.unchecked_shapes
def test_bad_input_is_named(model: KimiLinear) -> None:
    tokens = torch.randint(320, (2, 5))
    state = model.make_state(2)
    other = KimiLinear(ModelConfig.preset("tiny", mixers=("mla", "kda", "kda", "kda"))).make_state(2)
    bounds = torch.tensor([0, 2, 5])
    cases = [
        (TypeError, "tokens: expected an int64 tensor, got torch.float32", {"tokens": tokens.float()}),
        (TypeError, "tokens: expected an int64 tensor, got list", {"tokens": [1, 2]}),
        (ValueError, r"tokens: expected shape \[B, T\], got \[5\]", {"tokens": tokens[0]}),
        (ValueError, r"tokens: expected ids in \[0, 320\), got 320", {"tokens": tokens * 0 + 320}),
        (ValueError, r"tokens: expected ids in \[0, 320\), got -7", {"tokens": tokens * 0 - 7}),
        (ValueError, "tokens: expected device cpu", {"tokens": tokens.to("meta")}),
        (ValueError, "cu_seqlens: packed sequences need B == 1", {"tokens": tokens, "cu_seqlens": bounds}),
        (ValueError, "cannot be combined", {"tokens": tokens[:1], "cu_seqlens": bounds, "state": model.make_state(1)}),
        (ValueError, "state: expected 3 sequences", {"tokens": tokens[[0, 1, 1]], "state": state}),
        (TypeError, "state: expected a KDAState for KDA, got MLAState", {"tokens": tokens, "state": other}),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            model(**arguments)
    other.layers.pop()
    with pytest.raises(ValueError, match="state: expected 4 layers, got 3"):
        model(tokens, state=other)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        model.make_state(0)
    with pytest.raises(ValueError, match="impl: expected 'auto' or one that chunk_kda has"):
        model.set_impl("hopper")
    assert {block.self_attn.impl for block in model.blocks[:3]} == {"auto"}
