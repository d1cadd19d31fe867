"""Defects of a folder: each one made, named with its place, repaired where that can be, and gone afterwards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kimi_linear as kl
from kimi_linear.config import replace
from kimi_linear.model.layouts.check import Examination, examine, scan
from kimi_linear.model.layouts.convert import plan_conversion, write_conversion
from kimi_linear.model.layouts.defects import KINDS, Defect
from kimi_linear.model.safetensors_file import CheckpointError

from .foreign import KDA_ONLY, SMALL, config_of, edit_config, edit_tensors, logits_here, same_tensors, saved, tensors_of

# Nothing here has shapes in its signature, and the checks of every small function would take half the time.
pytestmark = pytest.mark.unchecked_shapes

A_LOG = "model.layers.0.self_attn.A_log"
INDEX = "model.safetensors.index.json"


def kinds(folder: Path) -> dict[str, Defect]:
    """Every defect by its kind, those of the numbers too."""
    found = examine(folder)
    bad = [step.defect for step in scan(found) if step.defect is not None]
    return {defect.kind: defect for defect in (*found.defects, *bad)}


def repaired(folder: Path, target: Path) -> Examination:
    for _ in write_conversion(plan_conversion(folder, repair=True), target):
        pass
    return examine(target)


def linear(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda v: v["linear_attn_config"].update(changes))


def keys(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def rename(old: str, new: str) -> Callable[[Path], None]:
    found = re.compile(old)
    return tensors(lambda t: [t.update({found.sub(new, name): t.pop(name)}) for name in list(t) if found.search(name)])


def test_a_sound_folder_has_no_defect(tmp_path: Path) -> None:
    assert kinds(saved(tmp_path / "one")) == {}
    found = examine(saved(tmp_path / "m", dtype=torch.bfloat16, shard=8000))
    assert (found.layout, found.defects, found.config) == ("release", (), SMALL)
    total = sum(t.nbytes for t in tensors_of(tmp_path / "m").values())
    assert found.nbytes == total == list(scan(found))[-1].nbytes


@pytest.mark.parametrize(
    ("damage", "kind", "place", "found"),
    [
        (keys(lambda v: v.pop("linear_attn_config")), "no-linear-attn-config", "linear_attn_config", "found none"),
        (keys(lambda v: v.pop("mla_use_nope")), "no-mla-use-nope", "mla_use_nope", "found none"),
        (keys(lambda v: v.pop("first_k_dense_replace")), "absent-keys", "first_k_dense_replace", "expected 1"),
        (keys(lambda v: v.update(first_k_dense_replace=2)), "dense-range-wrong", "first_k_dense_replace", "got 2"),
        (linear(kda_layers=[0, 1, 2], full_attn_layers=[3]), "layer-lists-from-0", "linear_attn_config.kda_layers", r"\[0, 1, 2\]"),
        (linear(kda_layers=[1, 2, 4], full_attn_layers=[3]), "layer-lists-wrong", "linear_attn_config.kda_layers", r"expected \[1, 2, 3\]"),
        (linear(use_full_rank_gate=True), "gate-rank-wrong", "linear_attn_config.use_full_rank_gate", "expected false"),
        (keys(lambda v: v.update(dtype="bfloat16")), "dtype-wrong", "dtype", "expected 'float32'"),
        (keys(lambda v: v.pop("dtype")), "dtype-wrong", "dtype", "got None"),
        (keys(lambda v: v.update(norm_topk_prob=v.pop("moe_renormalize"))), "other-spelling", "norm_topk_prob", "expected the key moe_renormalize"),
        (tensors(lambda t: t.update({A_LOG: t[A_LOG].bfloat16()})), "narrow-gate", A_LOG, "expected float32, got bfloat16"),
        (tensors(lambda t: t.update({A_LOG: t[A_LOG].flatten()})), "flattened", A_LOG, r"expected \[1, 1, 2, 1\], got \[2\]"),
        (tensors(lambda t: t.update({"model.layers.3.self_attn.rotary_emb.inv_freq": torch.ones(2)})), "leftover-tensor", "model.layers.3.self_attn.rotary_emb.inv_freq", r"found \[2\]"),
        (rename("model.layers.0.mlp.", "model.layers.0.block_sparse_moe."), "dense-misnamed", "model.layers.0.block_sparse_moe.gate_proj.weight", "expected model.layers.0.mlp.gate_proj"),
        (rename("^", "_orig_mod."), "prefixed-names", f"_orig_mod.{A_LOG}", "behind '_orig_mod.'"),
    ],
)  # fmt: skip
def test_what_can_be_mended(tmp_path: Path, damage: Callable, kind: str, place: str, found: str) -> None:
    folder = saved(tmp_path / "m")
    before, weights = logits_here(folder), tensors_of(folder)
    damage(folder)
    defects = kinds(folder)
    assert set(defects) == {kind}
    assert place in defects[kind].places
    assert re.search(found, defects[kind].found), defects[kind].found
    assert defects[kind].can_mend
    with pytest.raises(CheckpointError, match=rf"1 defects; --repair mends them\n  {kind}: "):
        plan_conversion(folder)
    assert repaired(folder, tmp_path / "r").defects == ()
    if kind == "narrow-gate":  # the digits that it lost in bf16 are lost for good
        weights[A_LOG] = weights[A_LOG].bfloat16().float()
    else:
        assert torch.equal(before, logits_here(tmp_path / "r"))
    after = tensors_of(tmp_path / "r")
    assert after.keys() == weights.keys()
    assert all(after[n].dtype == torch.float32 and torch.equal(after[n], weights[n]) for n in weights)


@pytest.mark.parametrize(
    ("damage", "kind", "place", "found"),
    [
        (lambda f: (f / "config.json").unlink(), "config-missing", "config.json", "found none"),
        (lambda f: (f / "config.json").write_text("{"), "config-unreadable", "config.json", "expected JSON"),
        (keys(lambda v: v.update(new_trick=1)), "unknown-key", "new_trick", "may change the model"),
        (keys(lambda v: v.update(q_lora_rank=8)), "config-unreadable", "q_lora_rank", "nothing else is built"),
        (keys(lambda v: v.update(model_type="llama")), "config-unreadable", "model_type", "got 'llama'"),
        (keys(lambda v: v.pop("rms_norm_eps")), "absent-keys", "rms_norm_eps", "no weight shows its value"),
        (keys(lambda v: v.pop("routed_scaling_factor")), "absent-keys", "routed_scaling_factor", "no weight shows"),
        (keys(lambda v: v.update(num_experts=1 << 30)), "config-unreadable", "num_experts", "at most 1,000,000 tensors"),
        (keys(lambda v: v.update(linear_attn_config=[1])), "config-unreadable", "linear_attn_config", "got list"),
        (keys(lambda v: v.update(vocab_size="many")), "config-unreadable", "vocab_size", "got 'many'"),
        (keys(lambda v: v.update(hidden_size=32)), "wrong-shape", "lm_head.weight", r"expected \[40, 32\], got \[40, 16\]"),
        (tensors(lambda t: t.pop("lm_head.weight")), "missing", "lm_head.weight", r"shape \[40, 16\]"),
        (tensors(lambda t: t.update(stray=torch.ones(2))), "unknown-tensor", "stray", r"found \[2\]"),
        (rename("model.layers.3.", "model.layers.4."), "missing", "model.layers.3.self_attn.q_proj.weight", "in no file"),
        (tensors(lambda t: t.update({A_LOG: torch.ones(3)})), "wrong-shape", A_LOG, r"got \[3\]"),
        (tensors(lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)})), "quantised", "model.norm.weight", "got int8"),
        (tensors(lambda t: t["model.norm.weight"][3:4].fill_(torch.nan)), "not-finite", "model.norm.weight", "NaN"),
        (tensors(lambda t: t["lm_head.weight"][-1:].fill_(-torch.inf)), "not-finite", "lm_head.weight", "infinity"),
        (lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 100), "truncated", "model.safetensors", "tensors are lost"),
        (lambda f: os.truncate(f / "model.safetensors", 40), "truncated", "model.safetensors", "expected a table"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated", "model.safetensors", "no bytes"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" * 50), "damaged-file", "model.safetensors", "of another kind"),
        (lambda f: (f / "model.safetensors").unlink(), "no-weights", "*.safetensors", "found no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_mended(tmp_path: Path, damage: Callable, kind: str, place: str, found: str) -> None:
    folder = saved(tmp_path / "m")
    damage(folder)
    defects = kinds(folder)
    assert kind in defects, defects
    assert place in defects[kind].places
    assert re.search(found, defects[kind].found), defects[kind].found
    assert not defects[kind].can_mend

    def convert() -> None:
        for _ in write_conversion(plan_conversion(folder, repair=True), tmp_path / "r"):
            pass

    with pytest.raises(CheckpointError):
        convert()
    assert not (tmp_path / "r").exists()
    if kind != "absent-keys":  # that one is read here with our default, which need not be that of the model
        with pytest.raises((ValueError, FileNotFoundError)):
            kl.load(folder)


def test_a_layer_too_many_is_told_as_such(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    rename("model.layers.3.", "model.layers.4.")(folder)
    assert "config.json has 4 layers" in kinds(folder)["unknown-tensor"].found


def sharded(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    folder = saved(tmp_path / "m", shard=8000)
    return folder, json.loads((folder / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda f, m: (f / INDEX).unlink(), "index-missing"),
        (lambda f, m: (f / INDEX).write_text("{"), "index-damaged"),
        (lambda f, m: (f / INDEX).write_text('{"weight_map": 3}'), "index-damaged"),
        (lambda f, m: (f / INDEX).write_text(json.dumps({"weight_map": m | {"stray": m[A_LOG]}})), "index-wrong"),
        (lambda f, m: (f / INDEX).write_text(json.dumps({"weight_map": m | {A_LOG: m["lm_head.weight"]}})), "index-wrong"),
        (lambda f, m: (f / INDEX).write_text(json.dumps({"weight_map": {n: m[n] for n in m if n != A_LOG}})), "index-wrong"),
        (lambda f, m: save_file({A_LOG: torch.zeros(1, 1, 2, 1)}, f / "old.safetensors"), "duplicate"),
    ],
)  # fmt: skip
def test_an_index_that_disagrees_is_rewritten(tmp_path: Path, damage: Callable, kind: str) -> None:
    folder, weight_map = sharded(tmp_path)
    good = saved(tmp_path / "good")
    damage(folder, weight_map)
    defects = kinds(folder)
    assert set(defects) == {kind}
    assert repaired(folder, tmp_path / "r").defects == ()
    assert same_tensors(good, tmp_path / "r")


def test_files_that_are_not_there_or_lead_elsewhere(tmp_path: Path) -> None:
    folder, weight_map = sharded(tmp_path)
    name = weight_map[A_LOG]
    (folder / name).rename(tmp_path / "elsewhere.safetensors")
    assert kinds(folder)["shard-missing"].places == (name,)
    (folder / name).symlink_to(tmp_path / "elsewhere.safetensors")
    assert kinds(folder)["outside"].places == (name,)
    (folder / name).unlink()
    (tmp_path / "elsewhere.safetensors").rename(folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {A_LOG: "../evil.safetensors"}}))
    defect = kinds(folder)["outside"]
    assert (defect.places, defect.can_mend) == ((INDEX,), False)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    assert kinds(folder)["outside"].places == ("tokenizer.json",)


def test_two_files_with_one_tensor_and_no_index_to_decide(tmp_path: Path) -> None:
    folder, weight_map = sharded(tmp_path)
    save_file({A_LOG: torch.zeros(1, 1, 2, 1)}, folder / "old.safetensors")
    del weight_map[A_LOG]
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert not kinds(folder)["duplicate"].can_mend
    with pytest.raises(CheckpointError, match="duplicate"):
        plan_conversion(folder, repair=True)


def test_a_pickle_is_told_and_never_opened(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    defects = kinds(folder)
    assert defects["pickles"].level == "warning"
    assert repaired(folder, tmp_path / "r").defects == ()
    assert not (tmp_path / "r" / "pytorch_model.bin").exists()


def test_tied_embeddings_are_a_warning_and_are_untied(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", replace(SMALL, tie_embeddings=True))
    defects = kinds(folder)
    assert {kind: d.level for kind, d in defects.items()} == {"tied": "warning"}
    assert repaired(folder, tmp_path / "r").defects == ()
    head = tensors_of(tmp_path / "r")
    assert torch.equal(head["lm_head.weight"], head["model.embed_tokens.weight"])
    assert torch.equal(logits_here(folder), logits_here(tmp_path / "r"))


def test_a_head_beside_tied_embeddings_is_kept(tmp_path: Path) -> None:
    """transformers trains the two apart, whatever the key says: the head in the file is the model's."""
    folder = saved(tmp_path / "m")
    edit_config(folder, lambda v: v.update(tie_word_embeddings=True))
    assert set(kinds(folder)) == {"tied"}
    before = tensors_of(folder)["lm_head.weight"]
    assert repaired(folder, tmp_path / "r").config == SMALL
    assert torch.equal(tensors_of(tmp_path / "r")["lm_head.weight"], before)


def test_null_expert_keys_of_a_dense_model(tmp_path: Path) -> None:
    dense = replace(KDA_ONLY, pattern="1:1", tie_embeddings=False)
    folder = saved(tmp_path / "m", dense)
    assert kinds(folder) == {}
    nulls = dict.fromkeys(("num_experts", "num_experts_per_token", "moe_intermediate_size", "first_k_dense_replace"))
    edit_config(folder, lambda v: v.update(nulls))
    assert set(kinds(folder)) == {"null-keys"}
    kl.load(folder)
    assert repaired(folder, tmp_path / "r").defects == ()
    assert None not in [config_of(tmp_path / "r").get(key, 0) for key in nulls]


def test_a_full_rank_gate_is_told_by_its_weights(tmp_path: Path) -> None:
    config = replace(SMALL, linear={"output_gate_rank": "full", "gate": "bounded"})
    folder = saved(tmp_path / "m", config)
    assert kinds(folder) == {}
    before = logits_here(folder)
    linear(use_full_rank_gate=False)(folder)
    assert set(kinds(folder)) == {"gate-rank-wrong"}
    found = repaired(folder, tmp_path / "r")
    assert found.config is not None
    assert found.config.linear == config.linear
    assert torch.equal(logits_here(tmp_path / "r"), before)


def test_a_variant_is_checked_by_its_own_configuration(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", replace(SMALL, linear_mixer="gdn"))
    assert kinds(folder) == {}
    edit_tensors(folder, lambda t: t.pop(A_LOG))
    assert kinds(folder)["missing"].places == (A_LOG,)


def test_several_defects_at_once(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    rename("model.layers.0.mlp.", "model.layers.0.block_sparse_moe.")(folder)
    edit_tensors(folder, lambda t: t.update({A_LOG: t[A_LOG].half()}))
    edit_config(
        folder, lambda v: [v.pop(key) for key in ("linear_attn_config", "mla_use_nope", "first_k_dense_replace")]
    )
    expected = {"dense-misnamed", "narrow-gate", "no-linear-attn-config", "no-mla-use-nope", "absent-keys"}
    assert set(kinds(folder)) == expected
    assert repaired(folder, tmp_path / "r").defects == ()


def test_every_kind_says_what_breaks_and_what_to_do() -> None:
    assert all(kind.breaks and kind.repair for kind in KINDS.values())
    mends = {name for name, kind in KINDS.items() if kind.mendable}
    assert all("convert --repair" in KINDS[name].repair or name == "duplicate" for name in mends)
