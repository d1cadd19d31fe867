"""Conversions: there and back bit for bit, refused where a layout has no such model, and never half done."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import kimi_linear as kl
from kimi_linear.config import ConfigError, ModelConfig, replace
from kimi_linear.config.fla import to_fla
from kimi_linear.model.layouts import convert
from kimi_linear.model.layouts.check import examine
from kimi_linear.model.layouts.convert import plan_conversion, write_conversion
from kimi_linear.model.safetensors_file import CheckpointError

from .foreign import (
    KDA_ONLY,
    SMALL,
    config_of,
    copied,
    edit_config,
    edit_tensors,
    logits_here,
    logits_there,
    same_tensors,
    saved,
    tensors_of,
)  # fmt: skip

# Nothing here has shapes in its signature, and the checks of every small function would take half the time.
pytestmark = pytest.mark.unchecked_shapes

MOE = "model.layers.1"


def converted(folder: Path, target: Path, *, shard: int = 1 << 30, **how: object) -> Path:
    plan = plan_conversion(folder, **how)
    steps = list(write_conversion(plan, target, max_shard_bytes=shard))
    assert steps[-1].nbytes == plan.total == sum(t.nbytes for t in tensors_of(target).values())
    return target


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_release_to_transformers_and_back(tmp_path: Path, dtype: torch.dtype, own: bool) -> None:
    release = saved(tmp_path / "a", dtype=dtype, shard=8000)
    values = config_of(release) | {
        "auto_map": {"AutoConfig": "configuration_kimi.KimiLinearConfig"},
        "use_cache": False,
    }
    if not own:
        del values["kimi_linear_config"]
    (release / "config.json").write_text(json.dumps(values))
    there = converted(release, tmp_path / "b", to="transformers", shard=8000)
    assert examine(there).layout == "transformers"
    back = converted(there, tmp_path / "c", to="release", shard=8000)
    assert same_tensors(release, back)
    assert config_of(back) == values
    ours, theirs = tensors_of(release), tensors_of(there)
    experts = [f"{MOE}.block_sparse_moe.experts.{e}" for e in range(4)]
    stacked = torch.stack([torch.cat([ours[f"{e}.w1.weight"], ours[f"{e}.w3.weight"]]) for e in experts])
    assert torch.equal(theirs[f"{MOE}.mlp.experts.gate_up_proj"], stacked)
    assert torch.equal(theirs[f"{MOE}.mlp.experts.down_proj"], torch.stack([ours[f"{e}.w2.weight"] for e in experts]))
    taps = [ours[f"{MOE}.self_attn.{x}_conv1d.weight"] for x in "qkv"]
    assert torch.equal(theirs[f"{MOE}.self_attn.conv1d.weight"], torch.cat(taps))
    assert theirs[f"{MOE}.self_attn.forget_gate.A_log"].dtype == torch.float32


def test_the_middle_of_the_way_runs_in_transformers(tmp_path: Path) -> None:
    release = saved(tmp_path / "a")
    there = converted(release, tmp_path / "b", to="transformers")
    assert torch.equal(logits_there(there), logits_there(release))
    torch.testing.assert_close(logits_here(release, latent_eps=1e-6), logits_there(there), atol=2e-5, rtol=1e-4)


def test_the_released_config_goes_there_and_back(tmp_path: Path) -> None:
    """Every key of Kimi-Linear-48B-A3B's config.json, at the size of a tiny model."""
    release = saved(tmp_path / "a", dtype=torch.bfloat16)
    edit_config(release, lambda v: v.update(auto_map={"AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM"}))
    keys = set(config_of(release))
    back = converted(converted(release, tmp_path / "b", to="transformers"), tmp_path / "c")
    assert config_of(back) == config_of(release)
    assert {"linear_attn_config", "mla_use_nope", "first_k_dense_replace", "moe_layer_freq", "auto_map"} < keys
    assert "layer_types" not in config_of(back)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "pad_token_id": 3},
        {"linear": {"gate": "bounded", "gate_lower_bound": -4.0}},
        {"linear": {"num_v_heads": 4, "v_head_dim": 16, "gate_rank": 16}},
        {"linear": {"conv_size": 0}},
        {"linear": {"output_gate_bias": True}},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_release_to_fla_and_back(tmp_path: Path, changes: dict, dtype: torch.dtype) -> None:
    config = replace(KDA_ONLY, **changes)
    model = kl.KimiLinear(config, seed=0).to(dtype)
    for block in model.blocks:
        if config.linear.output_gate_bias:
            torch.nn.init.normal_(block.self_attn.g_b_proj.bias)
    kl.save(model, tmp_path / "a")
    there = converted(tmp_path / "a", tmp_path / "b", to="fla")
    assert (examine(there).layout, examine(there).defects) == ("fla", ())
    back = converted(there, tmp_path / "c")
    assert same_tensors(tmp_path / "a", back)
    assert config_of(back) == config_of(tmp_path / "a")
    theirs = tensors_of(there)
    assert theirs["model.layers.0.attn.A_log"].shape == (config.linear.value_heads,)
    bias = theirs["model.layers.0.attn.g_proj.1.bias"]
    assert (bias.dtype, bool(bias.any())) == (dtype, config.linear.output_gate_bias)


def fla_folder(folder: Path, *, bias: float = 0.5, **keys: object) -> Path:
    """What fla's KDAForCausalLM.save_pretrained writes: its own keys, and a trained bias in the output gate."""
    config = replace(KDA_ONLY, tie_embeddings=False, linear={"output_gate_bias": True})
    model = kl.KimiLinear(config, seed=0)
    for block in model.blocks:
        torch.nn.init.constant_(block.self_attn.g_b_proj.bias, bias)
    release = folder.with_name(f"{folder.name}-release")
    kl.save(model, release)
    converted(release, folder, to="fla")
    values = {
        "architectures": ["KDAForCausalLM"], "model_type": "kda", "dtype": "float32", "transformers_version": "5.17.0",
        "allow_neg_eigval": False, "attn": None, "attn_mode": "chunk", "bos_token_id": 1, "conv_size": 4, "eos_token_id": 2,
        "expand_v": 1.0, "fuse_cross_entropy": True, "fuse_norm": True, "fuse_swiglu": True, "head_dim": 8,
        "hidden_act": "swish", "hidden_ratio": 4, "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 24,
        "lower_bound": None, "max_position_embeddings": 2048, "norm_eps": 1e-6, "num_heads": 2, "num_hidden_layers": 2,
        "num_v_heads": None, "safe_gate": False, "use_cache": True, "use_l2warp": False, "use_short_conv": True,
        "vocab_size": 40,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values | keys))
    return folder


def test_a_model_that_fla_trained_comes_here_with_its_bias(tmp_path: Path) -> None:
    there = fla_folder(tmp_path / "fla")
    here = converted(there, tmp_path / "r")
    model, _ = kl.load(here)
    assert (model.config.rms_norm_eps, model.config.layer_mixers) == (1e-6, ("kda", "kda"))
    layer, theirs = model.blocks[0].self_attn, tensors_of(there)
    x = torch.randn(1, 3, 16)
    names = [f"model.layers.0.attn.g_proj.{end}" for end in ("0.weight", "1.weight", "1.bias")]
    low, high, bias = (theirs[name] for name in names)
    torch.testing.assert_close(layer.output_gate(x), F.linear(F.linear(x, low), high, bias).unflatten(-1, (2, 8)))
    assert config_of(here)["model_type"] == "kimi_linear_variant"
    assert same_tensors(converted(here, tmp_path / "again", to="fla"), there)


def test_a_bias_of_zeros_is_no_bias(tmp_path: Path) -> None:
    plan = plan_conversion(fla_folder(tmp_path / "fla", bias=0.0))
    assert not plan.config.linear.output_gate_bias
    assert plan.values["model_type"] == "kimi_linear"
    assert any("2 tensors of zeros are left out" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"allow_neg_eigval": True}, "allow_neg_eigval: expected False"),
        ({"attn": {"layers": [1], "num_heads": 2}}, "attn: expected None"),
        ({"hidden_act": "powlu"}, "hidden_act: expected 'swish'"),
        ({"attnres_block_size": 2}, "attnres_block_size: expected None"),
        ({"new_trick": 1}, "new_trick: unknown key"),
    ],
)
def test_fla_models_that_are_not_built_are_refused(tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(fla_folder(tmp_path / "fla", **keys))


@pytest.mark.parametrize(
    ("config", "to", "message"),
    [
        (SMALL, "fla", "mixers: for fla's layout expected KDA in every layer"),
        (replace(SMALL, pattern="1:0"), "fla", "moe: for fla's layout expected dense"),
        (replace(KDA_ONLY, linear={"output_gate_rank": "full"}), "fla", "output_gate_rank: for fla's layout"),
        (replace(KDA_ONLY, linear={"gate": "bounded", "gate_lower_bound": -8.0}), "fla", "gate_lower_bound: for fla's"),
        (replace(KDA_ONLY, linear={"output_gate": "swish"}), "fla", "linear.output_gate: for fla's layout expected 'sigmoid'"),
        (replace(SMALL, linear={"gate": "bounded"}), "transformers", "gate: transformers' Kimi Linear has no gate == 'bounded'"),
        (replace(SMALL, linear={"output_gate_rank": "full"}), "transformers", "no output_gate_rank == 'full'"),
        (replace(SMALL, mla={"position": "rope"}), "transformers", "no mla.position == 'rope'"),
        (replace(SMALL, linear_mixer="gdn"), "transformers", "mixers: transformers' Kimi Linear has no"),
        (replace(KDA_ONLY, linear={"output_gate_bias": True}), "transformers", "output_gate_bias: transformers"),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_say_is_refused(tmp_path: Path, config: ModelConfig, to: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_conversion(saved(tmp_path / "a", config), to=to)


def test_successors_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    """The bounded-gate models share model_type with the released one; only linear_attn_config tells."""
    config = replace(SMALL, linear={"gate": "bounded", "gate_lower_bound": -5.0, "output_gate_rank": "full"})
    folder = saved(tmp_path / "a", config)
    edit_config(folder, lambda v: None)
    values = config_of(folder)
    assert values["model_type"] == "kimi_linear"
    assert values["linear_attn_config"]["gate_lower_bound"] == -5.0
    plan = plan_conversion(folder)
    assert plan.config.linear == config.linear
    before = logits_here(folder)
    edit_config(folder, lambda v: v["linear_attn_config"].pop("gate_lower_bound"))
    assert plan_conversion(folder).config.linear.gate == "softplus"
    assert not torch.allclose(logits_here(folder), before, atol=1e-3)


def test_the_same_layout_is_a_copy_in_other_shards(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    before = (folder / "config.json").read_text()
    again = converted(folder, tmp_path / "b", shard=3000)
    assert same_tensors(folder, again)
    assert json.loads((again / "config.json").read_text()) == json.loads(before)
    files = sorted(path.name for path in again.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(t.nbytes for t in tensors_of_file(again / file).values()) for file in files]
    assert max(sizes) <= 3000
    assert torch.equal(logits_here(again), logits_here(folder))


def tensors_of_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_other_files_come_along_and_what_stays_is_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    (folder / "tiktoken.model").write_bytes(b"\x00\xffvocabulary")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "figures").mkdir()
    (folder / ".gitattributes").write_text("x")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    plan = plan_conversion(folder, to="transformers")
    assert plan.notes == ("left behind: .gitattributes, figures, optimizer.pt",)
    list(write_conversion(plan, tmp_path / "b"))
    assert (tmp_path / "b" / "tiktoken.model").read_bytes() == b"\x00\xffvocabulary"
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert names == ["config.json", "model.safetensors", "tiktoken.model", "tokenizer_config.json"]


def test_an_interrupted_conversion_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "a")
    whole = converted(folder, tmp_path / "whole", to="transformers", shard=4000)
    shards = len(list(whole.glob("*.safetensors")))
    saves: list[str] = []

    def stops(tensors: object, path: Path, **how: object) -> None:
        saves.append(path.name)
        if len(saves) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save_file(tensors, path, **how)

    monkeypatch.setattr(convert, "save_file", stops)
    with pytest.raises(KeyboardInterrupt):
        converted(folder, tmp_path / "b", to="transformers", shard=4000)
    assert not (tmp_path / "b").exists()
    assert len(list((tmp_path / ".b.partial").glob("*.safetensors"))) == 2
    converted(folder, tmp_path / "b", to="transformers", shard=4000)
    assert len(saves) == shards + 1
    assert same_tensors(tmp_path / "b", whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "whole"]
    assert not [p.name for p in (tmp_path / "b").iterdir() if p.suffix == ".tmp" or p.name == "plan.json"]


def test_finished_shards_of_another_source_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "a")

    def stops(tensors: object, path: Path, **how: object) -> None:
        if "00002" in path.name:
            raise KeyboardInterrupt
        save_file(tensors, path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "save_file", stops)
        with pytest.raises(KeyboardInterrupt):
            converted(folder, tmp_path / "b", shard=4000)
    edit_tensors(folder, lambda t: t["lm_head.weight"].add_(1))
    assert same_tensors(converted(folder, tmp_path / "b", shard=4000), folder)


def test_a_full_disk_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "a")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    with pytest.raises(
        OSError, match=r"could not save .*b: No space left on device.*was not made; free space"
    ) as caught:
        converted(folder, tmp_path / "b")
    assert caught.value.errno == 28
    assert not (tmp_path / "b").exists()
    assert (folder / "model.safetensors").exists()


def test_where_it_may_not_go(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    other = copied(folder, tmp_path / "other")
    with pytest.raises(FileExistsError, match="other: expected nothing or an empty folder"):
        converted(folder, other)
    with pytest.raises(ValueError, match="expected a folder outside the source"):
        converted(folder, folder / "inside")
    with pytest.raises(FileNotFoundError, match="expected a model folder, got"):
        plan_conversion(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert same_tensors(converted(folder, tmp_path / "empty"), folder)


def test_nan_is_not_carried_over(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    edit_tensors(folder, lambda t: t["model.norm.weight"].fill_(torch.nan))
    for to in ("release", "transformers"):
        with pytest.raises(CheckpointError, match=r"model.norm.weight: expected finite numbers"):
            converted(folder, tmp_path / "b", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_conversions_into_one_place_do_not_mix(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    first = write_conversion(plan_conversion(folder), tmp_path / "b")
    next(first)
    with pytest.raises(BlockingIOError, match="another conversion is writing"):
        converted(folder, tmp_path / "b")
    list(first)
    assert same_tensors(tmp_path / "b", folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("to", ["release", "transformers"])
def test_a_head_that_transformers_trained_beside_tied_embeddings_is_not_lost(tmp_path: Path, to: str) -> None:
    folder = saved(tmp_path / "a")
    edit_config(folder, lambda v: v.update(tie_word_embeddings=True))
    there = converted(folder, tmp_path / "b", to=to)
    assert config_of(there)["tie_word_embeddings"] is False
    assert torch.equal(tensors_of(there)["lm_head.weight"], tensors_of(folder)["lm_head.weight"])
    assert torch.equal(logits_there(there), logits_there(folder))


def test_fused_tensors_need_one_dtype(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    name = f"{MOE}.self_attn.k_conv1d.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].bfloat16()}))
    with pytest.raises(CheckpointError, match=f"{name}: expected torch.float32, as the tensors that it is joined with"):
        converted(folder, tmp_path / "b", to="transformers")


def test_fla_keys_that_contradict_our_own_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    kl.save(kl.KimiLinear(KDA_ONLY, seed=0), folder)
    there = converted(folder, tmp_path / "b", to="fla")
    values = config_of(there)
    (there / "config.json").write_text(json.dumps(values | {"lower_bound": -5.0}))
    with pytest.raises(CheckpointError, match="lower_bound: expected None, as kimi_linear_config says"):
        plan_conversion(there)
    assert to_fla(KDA_ONLY)["lower_bound"] is None
