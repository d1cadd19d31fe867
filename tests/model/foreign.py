"""Tiny models of other libraries, folders of them, and their logits, for the tests of layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import kimi_linear as kl

SMALL = kl.ModelConfig.preset(
    "tiny-moe",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    tie_embeddings=False,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    linear={"num_heads": 2, "head_dim": 8},
    mla={"num_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    moe={"expert_size": 8, "num_experts": 4},
)
"""Three KDA layers and a full one, the first dense and the others sparse."""
KDA_ONLY = kl.ModelConfig.preset(
    "tiny",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    pattern="1:0",
    linear={"num_heads": 2, "head_dim": 8},
)
"""What fla's layout can hold."""
LAYER_TYPES = ["linear_attention"] * 3 + ["full_attention"]


def saved(
    folder: Path, config: kl.ModelConfig = SMALL, *, dtype: torch.dtype = torch.float32, shard: int = 1 << 30
) -> Path:
    """A random model in the release layout."""
    kl.save(kl.KimiLinear(config, seed=0).to(dtype), folder, max_shard_bytes=shard)
    return folder


def native(**changes: Any) -> Any:
    """transformers' own model at the size of ``SMALL``, made from scratch."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "qk_nope_head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "linear_head_dim": 8,
        "linear_num_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    return KimiLinearForCausalLM(KimiLinearConfig(**{**sizes, **changes})).eval()


def some_tokens() -> torch.Tensor:
    """The same few tokens for every model."""
    return torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits_here(folder: Path, *, latent_eps: float | None = None) -> torch.Tensor:
    """Logits of a folder, loaded by kimi_linear. ``latent_eps`` for a reader that has its own in kv_a_layernorm."""
    model, _ = kl.load(folder, dtype=torch.float32)
    for block in model.blocks:
        if latent_eps is not None and hasattr(block.self_attn, "kv_a_layernorm"):
            block.self_attn.kv_a_layernorm.eps = latent_eps
    return model(some_tokens())


@torch.no_grad()
def logits_there(folder: Path) -> torch.Tensor:
    """Logits of a folder, loaded by transformers, which must find every tensor and use every one."""
    from transformers import KimiLinearForCausalLM

    model, info = KimiLinearForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()(some_tokens(), use_cache=False).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    a, b = tensors_of(one), tensors_of(other)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def config_of(folder: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json in place, and drop the part that only kimi_linear writes."""
    values = config_of(folder)
    values.pop("kimi_linear_config", None)
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder with one weight file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def copied(folder: Path, to: Path) -> Path:
    """Another copy of a folder."""
    shutil.copytree(folder, to)
    return to
