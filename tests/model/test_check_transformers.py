"""What transformers itself writes: its defects made by the real library, named, repaired, and read by both with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kimi_linear.config import replace
from kimi_linear.model.layouts.check import examine
from kimi_linear.model.layouts.convert import plan_conversion, write_conversion

from .foreign import (
    LAYER_TYPES,
    SMALL,
    config_of,
    logits_here,
    logits_there,
    native,
    same_tensors,
    saved,
    some_tokens,
    tensors_of,
)

EPS = 1e-6
"""transformers' epsilon in kv_a_layernorm, whatever config.json says."""
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def kinds(folder: Path) -> dict[str, str]:
    return {defect.kind: defect.level for defect in examine(folder).defects}


def converted(folder: Path, target: Path, **how: object) -> Path:
    for _ in write_conversion(plan_conversion(folder, **how), target):
        pass
    return target


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model made from scratch by transformers, with the paper's layer types, saved by save_pretrained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("native") / "m"
    native(layer_types=LAYER_TYPES).save_pretrained(folder)
    return folder


def test_a_model_from_scratch_lacks_keys_and_misnames_its_dense_layer(scratch: Path, tmp_path: Path) -> None:
    assert kinds(scratch) == dict.fromkeys(
        ("dense-misnamed", "no-linear-attn-config", "no-mla-use-nope", "absent-keys"), "error"
    )
    there = logits_there(scratch)
    repaired = converted(scratch, tmp_path / "r", repair=True)
    assert kinds(repaired) == {}
    values = config_of(repaired)
    assert values["linear_attn_config"] == {
        "num_heads": 2, "head_dim": 8, "short_conv_kernel_size": 4, "kda_layers": [1, 2, 3], "full_attn_layers": [4],
    }  # fmt: skip
    assert (values["mla_use_nope"], values["first_k_dense_replace"]) == (True, 1)
    assert torch.equal(logits_there(repaired), there)
    torch.testing.assert_close(logits_here(repaired, latent_eps=EPS), there, **CLOSE)


def test_transformers_own_names_load_in_both_after_conversion(scratch: Path, tmp_path: Path) -> None:
    model = native(layer_types=LAYER_TYPES)
    model.load_state_dict(type(model).from_pretrained(scratch).state_dict())
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    assert examine(tmp_path / "own").layout == "transformers"
    assert kinds(tmp_path / "own") == {}
    release = converted(tmp_path / "own", tmp_path / "release")
    assert kinds(release) == {}
    assert same_tensors(release, converted(scratch, tmp_path / "r", repair=True))
    assert torch.equal(logits_there(release), logits_there(tmp_path / "own"))


def test_the_default_layer_types_are_told_and_kept(tmp_path: Path) -> None:
    """Full attention at layer 5 of 5, counted from 1, where the paper has it at 4: the weights are trained so."""
    native(num_hidden_layers=5).save_pretrained(tmp_path / "m")
    assert kinds(tmp_path / "m")["layer-types-default"] == "warning"
    repaired = converted(tmp_path / "m", tmp_path / "r", repair=True)
    assert config_of(repaired)["linear_attn_config"]["full_attn_layers"] == [5]
    assert kinds(repaired) == {"layer-types-default": "warning"}
    assert torch.equal(logits_there(repaired), logits_there(tmp_path / "m"))
    torch.testing.assert_close(logits_here(repaired, latent_eps=EPS), logits_there(repaired), **CLOSE)


def test_four_layers_by_default_have_no_full_attention_and_crash_there(tmp_path: Path) -> None:
    model = native()
    with pytest.raises(ValueError, match="get_seq_length"):
        model(some_tokens(), use_cache=True)
    model.save_pretrained(tmp_path / "m")
    assert kinds(tmp_path / "m")["no-full-attention"] == "warning"
    repaired = converted(tmp_path / "m", tmp_path / "r", repair=True)
    assert kinds(repaired) == {"no-full-attention": "warning"}
    torch.testing.assert_close(logits_here(repaired), logits_there(repaired), **CLOSE)


def test_loading_in_bf16_narrows_the_gate(tmp_path: Path) -> None:
    from transformers import KimiLinearForCausalLM

    good = saved(tmp_path / "good", dtype=torch.bfloat16)
    KimiLinearForCausalLM.from_pretrained(good).save_pretrained(tmp_path / "m")
    assert kinds(tmp_path / "m") == {"dense-misnamed": "error", "narrow-gate": "error"}
    repaired = converted(tmp_path / "m", tmp_path / "r", repair=True)
    assert kinds(repaired) == {}
    narrow, wide = tensors_of(good), tensors_of(repaired)
    for name, tensor in wide.items():
        if name.endswith(("A_log", "dt_bias")):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, narrow[name].bfloat16().float())
        else:
            assert torch.equal(tensor, narrow[name].to(tensor.dtype))
    there = logits_there(repaired)
    torch.testing.assert_close(logits_here(repaired, latent_eps=EPS), there, **CLOSE)


def test_layer_types_that_contradict_the_weights(scratch: Path, tmp_path: Path) -> None:
    """transformers believes layer_types, builds other layers, and finds that the weights do not fit."""
    from transformers import KimiLinearForCausalLM

    release = converted(scratch, tmp_path / "r", repair=True)
    values = config_of(release)
    values["layer_types"] = ["linear_attention"] * 2 + ["full_attention", "linear_attention"]
    (release / "config.json").write_text(json.dumps(values))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        KimiLinearForCausalLM.from_pretrained(release)
    assert kinds(release) == {"layer-types-wrong": "error"}
    repaired = converted(release, tmp_path / "again", repair=True)
    assert kinds(repaired) == {}
    assert torch.equal(logits_there(repaired), logits_there(scratch))


def test_what_we_save_loads_in_transformers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    torch.testing.assert_close(logits_here(folder, latent_eps=EPS), logits_there(folder), **CLOSE)


def test_a_tied_model_is_noise_in_transformers_until_it_is_untied(tmp_path: Path) -> None:
    from transformers import KimiLinearForCausalLM

    folder = saved(tmp_path / "m", replace(SMALL, tie_embeddings=True))
    _, info = KimiLinearForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    repaired = converted(folder, tmp_path / "r", repair=True)
    torch.testing.assert_close(logits_here(folder, latent_eps=EPS), logits_there(repaired), **CLOSE)


def test_a_dense_model_loads_in_transformers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", replace(SMALL, moe=None))
    torch.testing.assert_close(logits_here(folder, latent_eps=EPS), logits_there(folder), **CLOSE)
