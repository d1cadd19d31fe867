"""Latent attention against softmax written out in fp64; the absorbed form against the plain one; rotary pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kimi_linear.ops import mla, mla_absorbed, mla_attention, rotary
from kimi_linear.testing.tolerances import assert_close, assert_close_to_reference

F64 = torch.float64
SCALE = 0.3


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query t of T sees the first S - T + t + 1 of S keys."""
    tokens, seen = q.shape[1], k.shape[1]
    output = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype)
    for t in range(tokens):
        reach = seen - tokens + t + 1
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, :reach]) * SCALE
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        output[:, t] = torch.einsum("bhs,bshv->bhv", weights / weights.sum(-1, keepdim=True), v[:, :reach])
    return output


def make(tokens: int, seen: int, batch: int = 2, dq: int = 24, dv: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, tokens, 3, dq), (batch, seen, 3, dq), (batch, seen, 3, dv))
    q, k, v = (torch.randn(shape, dtype=F64) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize(("dq", "dv"), [(24, 16), (8, 8), (8, 12)])
@pytest.mark.parametrize(("tokens", "seen"), [(1, 1), (13, 13), (1, 9), (5, 12)])
def test_equals_the_formula(tokens: int, seen: int, dq: int, dv: int) -> None:
    q, k, v = make(tokens, seen, dq=dq, dv=dv)
    assert_close(mla_attention(q, k, v, scale=SCALE), formula(q, k, v), "output")


@pytest.mark.parametrize("block", [1, 4, 512])
def test_segments_equal_the_whole(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "QUERY_BLOCK", block)
    q, k, v = make(20, 20)
    whole = mla_attention(q, k, v, scale=SCALE)
    pieces = [
        mla_attention(q[:, start:stop], k[:, :stop], v[:, :stop], scale=SCALE)
        for start, stop in itertools.pairwise([0, 1, 8, 20])
    ]
    assert_close(torch.cat(pieces, dim=1), whole, "segments")


def test_packed_sequences_equal_separate_ones() -> None:
    q, k, v = make(21, 21, batch=1)
    bounds = [0, 0, 4, 5, 5, 21]
    packed = mla_attention(q, k, v, scale=SCALE, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, stop in itertools.pairwise(bounds):
        assert_close(packed[:, start:stop], formula(*(x[:, start:stop] for x in (q, k, v))), f"{start}:{stop}")


def test_gradients() -> None:
    leaves = [x.requires_grad_() for x in make(5, 5, batch=1, dq=4, dv=3)]
    assert torch.autograd.gradcheck(lambda *x: mla_attention(*x, scale=SCALE), leaves, fast_mode=True)
    cu = torch.tensor([0, 2, 2, 5])
    assert torch.autograd.gradcheck(lambda *x: mla_attention(*x, scale=SCALE, cu_seqlens=cu), leaves, fast_mode=True)
    longer = [x.requires_grad_() for x in make(3, 5, dq=4, dv=3)]
    assert torch.autograd.gradcheck(lambda *x: mla_attention(*x, scale=SCALE), longer, fast_mode=True)


def test_no_token_at_all() -> None:
    q, k, v = make(0, 4)
    assert mla_attention(q, k, v, scale=SCALE).shape == (2, 0, 3, 16)
    q, k, v = make(0, 0, batch=1)
    assert mla_attention(q, k, v, scale=SCALE, cu_seqlens=torch.tensor([0, 0])).shape == (1, 0, 3, 16)


def test_memory_stays_linear() -> None:
    """At T == S == 8192 the scores of one head are 256 MiB; q, k, v, padding and output are 4."""
    from kimi_linear.testing.timers import peak_memory

    q, k, v = (x.float() for x in make(8192, 8192, batch=1))
    q, k, v = q[:, :, :1], k[:, :, :1], v[:, :, :1]
    assert peak_memory(lambda: mla_attention(q, k, v, scale=SCALE)) < 32 * 2**20


def latent_case(tokens: int, seen: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Arguments of the absorbed form (R 16, Dr 4, Dn 8, Dv 6, H 3), and the q, k, v that they stand for."""
    q_nope, q_shared = torch.randn(2, tokens, 3, 8, dtype=F64), torch.randn(2, tokens, 3, 4, dtype=F64)
    latent, kv_up = torch.randn(2, seen, 20, dtype=F64), torch.randn(3, 14, 16, dtype=F64) / 4
    keys_values = torch.einsum("bsr,her->bshe", latent[..., :16], kv_up)
    shared = latent[:, :, None, 16:].expand(-1, -1, 3, -1)
    k = torch.cat([keys_values[..., :8], shared], dim=-1)
    arguments = {"q_nope": q_nope, "q_shared": q_shared, "latent": latent, "kv_up": kv_up}
    return arguments, (torch.cat([q_nope, q_shared], dim=-1), k, keys_values[..., 8:].contiguous())


@pytest.mark.parametrize(("tokens", "seen"), [(1, 1), (1, 17), (3, 17), (6, 6)])
def test_absorbed_equals_unabsorbed(tokens: int, seen: int) -> None:
    arguments, (q, k, v) = latent_case(tokens, seen)
    assert_close(mla_absorbed(**arguments, scale=SCALE), formula(q, k, v), "absorbed")
    assert_close(mla_absorbed(**arguments, scale=SCALE), mla_attention(q, k, v, scale=SCALE), "unabsorbed")


@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_with_shorter_caches_ignore_the_rest(tokens: int) -> None:
    arguments, (q, k, v) = latent_case(tokens, 9)
    lengths = [9, 4]
    got = mla_absorbed(**arguments, scale=SCALE, lengths=torch.tensor(lengths, dtype=torch.int32))
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        assert_close(got[one], formula(q[one], k[one, :length], v[one, :length]), f"row {row}")


def test_absorbed_gradients() -> None:
    arguments, _ = latent_case(2, 4)
    leaves = [x.requires_grad_() for x in arguments.values()]
    assert torch.autograd.gradcheck(lambda *x: mla_absorbed(*x, scale=SCALE), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in make(40, 40))
    got = mla_attention(q, k, v, scale=SCALE)
    assert got.dtype == dtype
    exact = formula(q.double(), k.double(), v.double())
    # The kernel rounds the weights to the inputs' dtype before the second product, so the plain form does it too.
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * SCALE
    weights = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1).to(dtype)
    plain = torch.einsum("bhts,bshv->bthv", weights.float(), v.float()).to(dtype)
    assert_close_to_reference(got, exact, plain, "plain form")
    arguments, _ = latent_case(1, 30)
    rounded = {name: x.to(dtype) for name, x in arguments.items()}
    exact = mla_absorbed(**{name: x.double() for name, x in rounded.items()}, scale=SCALE)
    absorbed = torch.einsum("bthn,hnr->bthr", rounded["q_nope"].float(), rounded["kv_up"][:, :8].float()).to(dtype)
    query = torch.cat([absorbed, rounded["q_shared"]], dim=-1).float()
    weights = (torch.einsum("bthl,bsl->bths", query, rounded["latent"].float()) * SCALE).softmax(-1).to(dtype)
    read = torch.einsum("bths,bsr->bthr", weights.float(), rounded["latent"][..., :16].float()).to(dtype)
    plain = torch.einsum("bthr,hvr->bthv", read.float(), rounded["kv_up"][:, 8:].float()).to(dtype)
    assert_close_to_reference(mla_absorbed(**rounded, scale=SCALE), exact, plain, "absorbed form")


def test_rotary_turns_interleaved_pairs() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=F64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 100, 5, 1_000_000]])
    got = rotary(x, positions, 100.0)
    for row, t, pair in itertools.product(range(2), range(5), range(4)):
        angle = int(positions[row, t]) * 100.0 ** (-2 * pair / 8)
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=F64)
        two = slice(2 * pair, 2 * pair + 2)
        assert_close(got[row, t, :, two], x[row, t, :, two] @ turn.T, f"pair {pair}", tolerance=1e-9)
    assert torch.equal(rotary(x[:1], positions[0], 100.0), got[:1])
    assert torch.equal(rotary(x[:, :, 0], positions, 100.0), got[:, :, 0])


def test_rotary_scores_depend_on_distance_only_even_at_a_million() -> None:
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def score(query: int, key: int) -> Tensor:
        turned = rotary(q, torch.tensor([query]), 1e4) * rotary(k, torch.tensor([key]), 1e4)
        return turned.double().sum()

    torch.testing.assert_close(score(1_000_003, 1_000_000), score(3, 0), rtol=0, atol=1e-5)


@pytest.mark.unchecked_shapes
def test_bad_input() -> None:
    q, k, v = make(5, 5)
    with pytest.raises(ValueError, match=r"k: expected S >= T == 5.*got S == 4"):
        mla_attention(q, k[:, :4], v[:, :4], scale=SCALE)
    with pytest.raises(ValueError, match=r"v: expected shape \[2, 5, 3, 16\].*got \[2, 4, 3, 16\]"):
        mla_attention(q, k, v[:, :4], scale=SCALE)
    with pytest.raises(ValueError, match="packed sequences need S == T == 1, got S == 5"):
        mla_attention(q[:1, :1], k[:1], v[:1], scale=SCALE, cu_seqlens=torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"v: expected torch\.float64, as q, got torch\.float32"):
        mla_attention(q, k, v.float(), scale=SCALE)
    arguments, _ = latent_case(1, 4)
    with pytest.raises(ValueError, match=r"latent: expected shape \[2, 4, 20\].*got \[2, 4, 19\]"):
        mla_absorbed(**{**arguments, "latent": arguments["latent"][..., 1:]}, scale=SCALE)
    with pytest.raises(ValueError, match=r"lengths: expected values from T == 1 to S == 4, got \[5, 1\]"):
        mla_absorbed(**arguments, scale=SCALE, lengths=torch.tensor([5, 1]))
    with pytest.raises(ValueError, match=r"positions: expected shape \[5\] or \[2, 5\].*got \[4\]"):
        rotary(q, torch.arange(4), 1e4)
    with pytest.raises(ValueError, match=r"x: expected shape .* with Dr even"):
        rotary(q[..., 1:], torch.arange(5), 1e4)


@pytest.mark.parametrize(("tokens", "lengths"), [(1, None), (4, None), (3, [9, 5])])
def test_absorbed_by_products_is_the_same_attention(
    tokens: int, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on CUDA, in place of the fused attention, run here on the CPU."""
    arguments = latent_case(tokens, 9)[0]
    used = None if lengths is None else torch.tensor(lengths)
    fused = mla_absorbed(**arguments, scale=SCALE, lengths=used)
    seen = []

    def by_products(queries: Tensor, keys: Tensor, values: Tensor, *, attn_mask: Tensor | None, scale: float) -> Tensor:
        seen.append(1)
        return mla._read_by_products(queries, keys[:, 0], attn_mask, scale)

    monkeypatch.setattr(mla.F, "scaled_dot_product_attention", by_products)
    assert_close(mla_absorbed(**arguments, scale=SCALE, lengths=used), fused, "by products")
    assert seen


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "lengths"), [(1, None), (4, [300, 77])])
def test_absorbed_on_a_gpu(tokens: int, lengths: list[int] | None, dtype: torch.dtype) -> None:
    arguments = {name: x.to(dtype) for name, x in latent_case(tokens, 300)[0].items()}
    used = None if lengths is None else torch.tensor(lengths)
    exact = mla_absorbed(**{name: x.double() for name, x in arguments.items()}, scale=SCALE, lengths=used)
    plain = mla_absorbed(**arguments, scale=SCALE, lengths=used)
    moved = {name: x.cuda() for name, x in arguments.items()}
    got = mla_absorbed(**moved, scale=SCALE, lengths=None if used is None else used.cuda())
    assert_close_to_reference(got.cpu(), exact, plain, "absorbed on CUDA")
