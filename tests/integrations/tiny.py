"""A tiny Kimi Linear model with weights that matter, ours and transformers', and a way from the one to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import kimi_linear as kl
from kimi_linear.config import LinearConfig, MLAConfig, ModelConfig, MoEConfig, replace
from kimi_linear.data import ByteTokenizer
from kimi_linear.model import KimiLinear

VOCAB = 257
"""The ids of the byte tokenizer, no more: what transformers draws our sampler may draw too."""
LENGTH = 70
"""Tokens: more than a chunk of 64, and no multiple of it."""


def tiny_config(**changes: Any) -> ModelConfig:
    """Three KDA layers and one full-attention layer of width 32, eight experts in all layers but the first."""
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=4,
        intermediate_size=48,
        linear=LinearConfig(num_heads=2, head_dim=16),
        mla=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
        moe=MoEConfig(
            num_experts=8, experts_per_token=2, expert_size=16, num_groups=2, groups_per_token=2, scaling_factor=2.446
        ),
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=256,
        eos_token_id=256,
    )
    return replace(config, **changes)


def tiny_model(**changes: Any) -> KimiLinear:
    """Weights large enough that every path shows in the logits, norms and router biases off their first values."""
    model = KimiLinear(tiny_config(**changes), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
            if "kv_a_proj_with_mqa" in name:
                # A latent so small that the epsilon of its norm shows.
                parameter *= 0.005
    return model.eval()


def reread(model: KimiLinear, **changes: Any) -> KimiLinear:
    """The same weights under another reading of them."""
    other = KimiLinear(replace(model.config, **changes))
    other.load_state_dict(model.state_dict())
    return other.eval()


def publisher(model: KimiLinear) -> KimiLinear:
    """``model`` with the epsilon that the publisher's code, and so transformers, gives the latent's norm."""
    return reread(model, mla={"kv_norm_eps": 1e-6})


def saved(model: KimiLinear, folder: Path) -> Path:
    """``folder`` with the model and a byte tokenizer, in the release layout."""
    kl.save(model, folder, ByteTokenizer())
    return folder


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Ids that no model takes for padding or an end."""
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(2))


def from_pretrained(folder: Path, **options: Any) -> Any:
    """transformers' model of a folder, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    assert a.shape == b.shape
    return float((a.detach().double() - b.detach().double()).abs().max())
