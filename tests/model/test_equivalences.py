"""The same numbers however a sequence is cut, packed or batched, for every mixer."""

from __future__ import annotations

import pytest
import torch

from kimi_linear.config import ModelConfig, replace
from kimi_linear.model import KimiLinear
from kimi_linear.model.kda import KDA

TINY = ModelConfig.preset(
    "tiny-moe",
    hidden_size=32,
    vocab_size=50,
    intermediate_size=48,
    linear={"num_heads": 2, "head_dim": 8, "num_v_heads": 4, "v_head_dim": 12},
    mla={"num_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    moe={"expert_size": 16},
    initializer_range=0.2,
)
CASES = {
    "kda": TINY,
    "kda, bounded, no convolution": replace(TINY, linear={"gate": "bounded", "conv_size": 0}),
    "gdn": replace(TINY, linear_mixer="gdn"),
    "mamba2": replace(TINY, linear_mixer="mamba2"),
    "simple-gla": replace(TINY, linear_mixer="simple-gla"),
    "mla": replace(TINY, pattern="0:1"),
    "mla, rope": replace(TINY, pattern="0:1", mla={"position": "rope"}),
    "every mixer": replace(TINY, mixers=("kda", "gdn", "mamba2", "mla"), mla={"position": "rope"}, moe=None),
}
EXACT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def model(request: pytest.FixtureRequest) -> KimiLinear:
    return KimiLinear(request.param, seed=0).double()


@pytest.mark.parametrize(
    "cuts",
    [[40], [20, 1, 1, 18], [1] * 40, [2, 16, 17, 0, 5]],
    ids=["at once", "prefill and steps", "token by token", "odd"],
)
def test_segments_equal_the_whole(model: KimiLinear, cuts: list[int]) -> None:
    tokens = torch.randint(50, (2, 40))
    state = model.make_state(2)
    with torch.no_grad():
        whole = model(tokens)
        pieces = [model(piece, state=state) for piece in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    assert state.position == 40


def test_gradients_through_segments_equal_those_of_the_whole(model: KimiLinear) -> None:
    tokens, weights = torch.randint(50, (2, 30)), torch.randn(2, 30, 50, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad((model(tokens) * weights).sum(), trained)
    state = model.make_state(2)
    pieces = torch.cat([model(piece, state=state) for piece in tokens.split([7, 20, 1, 2], dim=1)], 1)
    for got, expected in zip(torch.autograd.grad((pieces * weights).sum(), trained), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_packed_equals_separate(model: KimiLinear) -> None:
    lengths = [13, 1, 0, 20, 2]
    tokens = torch.randint(50, (1, sum(lengths)))
    bounds = torch.tensor([0, 13, 14, 14, 34, 36], dtype=torch.int32)
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=bounds)
        separate = [model(piece) for piece in tokens.split(lengths, dim=1) if piece.numel()]
    torch.testing.assert_close(packed, torch.cat(separate, 1), **EXACT)


def test_rows_do_not_see_each_other(model: KimiLinear) -> None:
    tokens = torch.randint(50, (3, 17))
    with torch.no_grad():
        together = model(tokens)
        for row in range(3):
            torch.testing.assert_close(together[row : row + 1], model(tokens[row : row + 1]), **EXACT)


def test_logits_never_depend_on_later_tokens(model: KimiLinear) -> None:
    tokens = torch.randint(50, (1, 36))
    with torch.no_grad():
        before = model(tokens)
        for t in (1, 17, 32):
            other = tokens.clone()
            other[:, t:] = (other[:, t:] + 1 + torch.randint(49, (1, 36 - t))) % 50
            after = model(other)
            torch.testing.assert_close(after[:, :t], before[:, :t], **EXACT)
            assert not torch.allclose(after[:, t:], before[:, t:])


def test_reference_and_chosen_implementation_agree(model: KimiLinear) -> None:
    tokens = torch.randint(50, (2, 33))
    with torch.no_grad():
        chosen = model(tokens)
        model.set_impl("reference")
        torch.testing.assert_close(model(tokens), chosen, **EXACT)


def test_kda_whose_channels_all_forget_alike_is_gdn() -> None:
    """Only the gates' parameters differ: with the same rate in every channel, logits and gradients of all others are the same."""
    kda, gdn = (KimiLinear(replace(TINY, linear_mixer=m, moe=None), seed=0).double() for m in ("kda", "gdn"))
    alike = {name: value for name, value in kda.state_dict().items() if not name.endswith("dt_bias")}
    gdn.load_state_dict({name: alike.get(name, value) for name, value in gdn.state_dict().items()})
    with torch.no_grad():
        for one, other in zip(kda.blocks, gdn.blocks, strict=True):
            if isinstance(one.self_attn, KDA):
                one.self_attn.f_b_proj.weight.zero_()
                other.self_attn.a_proj.weight.zero_()
                one.self_attn.dt_bias.copy_(other.self_attn.dt_bias.repeat_interleave(kda.config.linear.head_dim))
    tokens, weights = torch.randint(50, (2, 40)), torch.randn(2, 40, 50, dtype=torch.float64)
    expected, got = gdn(tokens), kda(tokens)
    torch.testing.assert_close(got, expected, **EXACT)
    for output in (got, expected):
        (output * weights).sum().backward()
    gradients = {name: p.grad for name, p in gdn.named_parameters()}
    shared = [name for name, p in kda.named_parameters() if p.requires_grad and name in gradients]
    assert any(name.endswith("A_log") for name in shared)
    for name in shared:
        gradient = kda.get_parameter(name).grad
        if name.endswith("dt_bias"):
            gradient = gradient.unflatten(0, (-1, kda.config.linear.head_dim)).sum(1)
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-8, atol=1e-9)


def test_gradients_reach_every_parameter(model: KimiLinear) -> None:
    model(torch.randint(50, (4, 40))).logsumexp(-1).sum().backward()
    unreached = [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert unreached == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", ["kda", "gdn", "mamba2", "simple-gla"])
def test_lower_precision_is_as_exact_as_the_reference(mixer: str, dtype: torch.dtype) -> None:
    """Error of the logits against fp64: at most twice that with the token-by-token reference, plus one rounding."""
    # Dense, because a tie between experts may fall differently in bf16.
    model = KimiLinear(replace(TINY, linear_mixer=mixer, moe=None), seed=0).to(dtype)
    exact = KimiLinear(model.config).double()
    exact.load_state_dict(model.state_dict())
    tokens, errors = torch.randint(50, (2, 40)), {}
    with torch.no_grad():
        expected = exact(tokens)
        for impl in ("auto", "reference"):
            model.set_impl(impl)
            errors[impl] = (model(tokens).double() - expected).square().mean().sqrt() / expected.std()
    assert errors["auto"] < 2 * errors["reference"] + torch.finfo(dtype).eps
    assert errors["reference"] < 0.05


@pytest.mark.parametrize("mixer", ["kda", "gdn", "mamba2", "simple-gla", "mla"])
def test_autocast_is_as_exact_as_bf16_and_keeps_the_memory_wide(mixer: str) -> None:
    """At most twice the error of the model held in bf16 throughout, in one piece and in segments."""
    model = KimiLinear(replace(TINY, mixers=(mixer,) * 4, moe=None), seed=0)
    low = KimiLinear(model.config, seed=0).bfloat16()
    tokens = torch.randint(50, (2, 40))
    state = model.make_state(2)
    with torch.no_grad():
        exact, rounded = model(tokens), low(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            whole = model(tokens)
            pieces = torch.cat([model(piece, state=state) for piece in tokens.split([20, 1, 19], dim=1)], 1)
    allowed = 2 * (rounded - exact).square().mean()
    assert (whole - exact).square().mean() < allowed
    assert (pieces - exact).square().mean() < allowed
    if mixer != "mla":
        assert state.layers[0].recurrent.dtype == torch.float32
