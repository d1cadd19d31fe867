"""Multi-head latent attention: the plain form for whole sequences, the absorbed form for decoding, and rotary pairs.

The absorbed form never expands the cached latent to keys and values. It moves the up-projection of the keys to the
query, q_h . (U_h c) = (U_h^T q_h) . c, and that of the values behind the softmax, so that all heads read one latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kimi_linear.ops.autocast import autocast_like_linear
from kimi_linear.ops.validation import check_mla_absorbed, check_mla_attention, check_rotary

QUERY_BLOCK = 512


def mla_attention(
    q: Float[Tensor, "B T H Dq"],
    k: Float[Tensor, "B S H Dq"],
    v: Float[Tensor, "B S H Dv"],
    *,
    scale: float,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
) -> Float[Tensor, "B T H Dv"]:
    """Causal softmax attention of the last T of S positions. Differentiable.

    Args:
        q: [B, T, H, Dq] queries at positions S-T .. S-1.
        k: [B, S, H, Dq] keys.
        v: [B, S, H, Dv] values.
        scale: multiplies the scores.
        cu_seqlens: [N+1] int32 or int64 offsets of packed sequences, with B == 1 and S == T, which never see each
            other.

    Returns:
        [B, T, H, Dv] in v's dtype, or that of an active autocast.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device or offset.
    """
    q, k, v = autocast_like_linear(q, k, v)
    check_mla_attention(q, k, v, cu_seqlens)
    if q.shape[1] == 0:
        return v.new_zeros(q.shape[0], 0, q.shape[2], v.shape[3])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if cu_seqlens is None:
        return _causal(q, k, v, scale).transpose(1, 2)
    # split, not slices: the gradient of each slice would be a tensor of the whole size.
    lengths = cu_seqlens.diff().tolist()
    parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2), strict=True)
    outputs = [_causal(*part, scale=scale) for part in parts if part[0].shape[2]]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, H, T, Dq], [B, H, S, Dq], [B, H, S, Dv] -> [B, H, T, Dv]."""
    tokens, seen, width = q.shape[2], k.shape[2], v.shape[3]
    if q.device.type == "cpu" and q.shape[3] != width:
        # torch's CPU kernel of linear memory takes one width only; a third more products cost less than [T, S] scores.
        widest = max(q.shape[3], width)
        q, k, v = (F.pad(x, (0, widest - x.shape[3])) for x in (q, k, v))
    if tokens == seen or tokens == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, scale=scale)[..., :width]
    # is_causal aligns the first query with the first key; here the last query meets the last key. Blocks of queries
    # keep the mask at [QUERY_BLOCK, S].
    pieces = []
    for start in range(0, tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, tokens)
        reach = seen - tokens + stop
        rows = torch.arange(reach - (stop - start), reach, device=q.device)
        mask = torch.arange(reach, device=q.device) <= rows[:, None]
        part = q[:, :, start:stop], k[:, :, :reach], v[:, :, :reach]
        pieces.append(F.scaled_dot_product_attention(*part, attn_mask=mask, scale=scale))
    return torch.cat(pieces, dim=2)[..., :width]


def mla_absorbed(
    q_nope: Float[Tensor, "B T H Dn"],
    q_shared: Float[Tensor, "B T H Dr"],
    latent: Float[Tensor, "B S L"],
    kv_up: Float[Tensor, "H E R"],
    *,
    scale: float,
    lengths: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T H Dv"]:
    """The same attention over the cached latent itself, as multi-query attention: what decoding uses.

    Args:
        q_nope: [B, T, H, Dn] query part that meets the keys made from the latent.
        q_shared: [B, T, H, Dr] query part that meets the key part shared by all heads.
        latent: [B, S, R+Dr] cache: the normed compressed latent, then the shared key part.
        kv_up: [H, Dn+Dv, R] up-projection of each head, keys first, then values.
        scale: multiplies the scores.
        lengths: [B] int32 or int64, how many leading positions of each row are in use, the T queries included;
            S where None. The queries are the last T of them.

    Returns:
        [B, T, H, Dv] in q_nope's dtype, or that of an active autocast.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device or length.
    """
    q_nope, q_shared, latent, kv_up = autocast_like_linear(q_nope, q_shared, latent, kv_up)
    check_mla_absorbed(q_nope, q_shared, latent, kv_up, lengths)
    (_, tokens, _, nope), rank, seen = q_nope.shape, kv_up.shape[2], latent.shape[1]
    queries = torch.cat([torch.einsum("bthn,hnr->bthr", q_nope, kv_up[:, :nope]), q_shared], dim=-1)
    mask = None
    if tokens > 1 or lengths is not None:
        mask = _reach(tokens, seen, lengths, latent.device)[:, :, None]
    if latent.is_cuda:
        read = _read_by_products(queries, latent, mask, scale)[..., :rank]
    else:
        # The heads of one token are the rows of one attention, all over the same keys. The values are the whole latent,
        # as equal widths let torch choose its fast kernel: a third of the time of a narrower view, on a CPU.
        keys = latent[:, None].expand(-1, tokens, -1, -1)
        read = F.scaled_dot_product_attention(queries, keys, keys, attn_mask=mask, scale=scale)[..., :rank]
    return torch.einsum("bthr,hvr->bthv", read, kv_up[:, nope:])


def _read_by_products(queries: Tensor, latent: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of queries [B, T, H, L] over latent [B, S, L] as two matrix products, scores in fp32.

    On CUDA torch's fused kernels give one query head one thread block, whatever the length of the cache: 6 ms a layer
    for 64K positions of a small model. Products spread over the chip; the [T, H, S] scores of a few tokens are small.
    """
    rows = queries.flatten(1, 2)
    if rows.dtype.itemsize < 4:
        scores = torch.bmm(rows, latent.mT, out_dtype=torch.float32)
    else:
        scores = torch.bmm(rows, latent.mT)
    scores = (scores * scale).unflatten(1, queries.shape[1:3])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.bmm(scores.softmax(-1).to(latent.dtype).flatten(1, 2), latent).unflatten(1, queries.shape[1:3])


def _reach(tokens: int, seen: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """[B or 1, T, S]: query t of a row may read the positions up to its own, length - T + t."""
    used = torch.tensor([seen], device=device) if lengths is None else lengths
    own = used[:, None] - tokens + torch.arange(tokens, device=device)
    return torch.arange(seen, device=device) <= own[:, :, None]


def rotary(
    x: Float[Tensor, "B T *heads Dr"],
    positions: Int[Tensor, "T"] | Int[Tensor, "B T"],
    theta: float,
) -> Float[Tensor, "B T *heads Dr"]:
    """Rotary position encoding of interleaved pairs: (x[2i], x[2i+1]) turns by ``position * theta**(-2i/Dr)`` radians.

    Args:
        x: [B, T, ..., Dr], Dr even.
        positions: [T] or [B, T] integers.
        theta: base of the frequencies, > 0.

    Returns:
        as x; computed in fp32 (fp64 for fp64 inputs), the angles in fp64, which stay exact at a million tokens.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device or theta.
    """
    check_rotary(x, positions, theta)
    width = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    powers = torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width
    angles = positions.to(torch.float64)[..., None] * theta**-powers
    angles = angles.view(*angles.shape[:-1], *(1,) * (x.ndim - 3), width // 2)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
