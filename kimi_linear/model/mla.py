"""The full-attention layer: multi-head latent attention, which caches one small latent per token.

Whole sequences expand the latent to keys and values; a few tokens against a long cache use the absorbed form, which
never expands it. Both are the same function.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kimi_linear.config import ModelConfig
from kimi_linear.model.parameters import Linear, RMSNorm
from kimi_linear.model.state import MLAState
from kimi_linear.ops.mla import mla_absorbed, mla_attention, rotary

ABSORBED_TOKENS = 16
"""With a state, up to this many tokens read the latent itself; more expand it first."""


class MLA(nn.Module):
    """Multi-head latent attention without position encoding, or with rotary pairs on the shared key part.

    Parameters are named as in the released checkpoint.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.mla
        self.shape = shape
        self.q_proj = Linear(config.hidden_size, shape.num_heads * shape.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, shape.latent_dim)
        self.kv_a_layernorm = RMSNorm(shape.kv_lora_rank, config.kv_norm_eps)
        self.kv_b_proj = Linear(shape.kv_lora_rank, shape.num_heads * (shape.qk_nope_head_dim + shape.v_head_dim))
        self.o_proj = Linear(shape.num_heads * shape.v_head_dim, config.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        cu_seqlens: Int[Tensor, "N1"] | None = None,
        state: MLAState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend to every earlier token of the sequence. With ``state``, to those in it too; the new ones join it."""
        shape, tokens = self.shape, x.shape[1]
        q = self.q_proj(x).unflatten(-1, (shape.num_heads, shape.qk_head_dim))
        q_nope, q_shared = q.split([shape.qk_nope_head_dim, shape.qk_rope_head_dim], dim=-1)
        compressed, k_shared = self.kv_a_proj_with_mqa(x).split([shape.kv_lora_rank, shape.qk_rope_head_dim], dim=-1)
        if shape.position == "rope":
            positions = _positions(tokens, 0 if state is None else state.length, cu_seqlens, x.device)
            q_shared = rotary(q_shared, positions, shape.rope_theta)
            k_shared = rotary(k_shared, positions, shape.rope_theta)
        latent = torch.cat([self.kv_a_layernorm(compressed), k_shared], dim=-1)
        if state is not None:
            latent = state.append(latent).to(q.dtype)
        scale = shape.qk_head_dim**-0.5
        if state is not None and 0 < tokens <= ABSORBED_TOKENS:
            kv_up = self.kv_b_proj.weight.view(shape.num_heads, -1, shape.kv_lora_rank).to(q.dtype)
            output = mla_absorbed(q_nope, q_shared, latent, kv_up, scale=scale)
        else:
            k, v = self._expand(latent)
            output = mla_attention(torch.cat([q_nope, q_shared], dim=-1), k, v, scale=scale, cu_seqlens=cu_seqlens)
        return self.o_proj(output.flatten(2))

    def _expand(self, latent: Float[Tensor, "B S L"]) -> tuple[Tensor, Tensor]:
        """Keys [B, S, H, Dn+Dr] and values [B, S, H, Dv] of every head."""
        shape = self.shape
        compressed, k_shared = latent.split([shape.kv_lora_rank, shape.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(compressed).unflatten(-1, (shape.num_heads, -1))
        k_nope, v = kv.split([shape.qk_nope_head_dim, shape.v_head_dim], dim=-1)
        shared = k_shared[:, :, None].expand(-1, -1, shape.num_heads, -1)
        return torch.cat([k_nope, shared], dim=-1), v

    def make_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> MLAState:
        """An empty latent cache."""
        return MLAState(buffer=torch.empty(batch_size, 0, self.shape.latent_dim, device=device, dtype=dtype))


def _positions(tokens: int, start: int, cu_seqlens: Tensor | None, device: torch.device) -> Int[Tensor, "T"]:
    """Position of each token in its own sequence."""
    positions = torch.arange(start, start + tokens, device=device)
    if cu_seqlens is None:
        return positions
    bounds = cu_seqlens.to(torch.long)
    return positions - bounds[:-1].repeat_interleave(bounds.diff(), output_size=tokens)
