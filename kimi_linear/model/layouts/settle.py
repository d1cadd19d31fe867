"""config.json against the weights: the weights' names and shapes settle what the file leaves out or gets wrong.

Which layers are KDA, which are dense, how many heads there are: all of it can be read off a checkpoint's table, so a
config.json that says otherwise can be mended without guessing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kimi_linear.config.release import ONLY, RENAMED_MOE
from kimi_linear.config.transformers import EXPERT_KEYS, FLAT, FULL, LINEAR, SPELLINGS, written_by_transformers
from kimi_linear.model.layouts.defects import Defect
from kimi_linear.model.layouts.names import Layout
from kimi_linear.model.safetensors_file import StoredTensor

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
MARKS = (
    ("mixer", "self_attn.A_log", "kda"), ("mixer", "self_attn.forget_gate.A_log", "kda"),
    ("mixer", "self_attn.kv_b_proj.weight", "mla"),
    ("mlp", "mlp.gate_proj.weight", "dense"), ("mlp", "block_sparse_moe.gate_proj.weight", "dense"),
    ("mlp", "block_sparse_moe.gate.weight", "sparse"), ("mlp", "mlp.gate.weight", "sparse"),
    ("gate", "self_attn.g_proj.weight", "full"), ("gate", "self_attn.g_b_proj.weight", "low"),
)  # fmt: skip
"""A tensor that shows of what kind a layer's part is."""
UNSETTLED = ("rms_norm_eps", "num_attention_heads")
UNSETTLED_MOE = ("num_experts_per_token", "routed_scaling_factor")
"""Keys that no weight shows and that readers fill differently."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the names of the weights show of each layer, from 0; None where a part is missing."""

    mixers: tuple[str | None, ...]
    mlps: tuple[str | None, ...]
    gates: frozenset[str]

    @property
    def full(self) -> list[int]:
        """Full-attention layers, counted from 1."""
        return [i for i, kind in enumerate(self.mixers, start=1) if kind == "mla"]

    @property
    def kda(self) -> list[int]:
        """KDA layers, counted from 1."""
        return [i for i, kind in enumerate(self.mixers, start=1) if kind == "kda"]

    @property
    def dense(self) -> int | None:
        """Leading dense layers, or None where dense ones follow sparse ones or a layer shows neither."""
        count = sum(kind == "dense" for kind in self.mlps)
        ordered = ("dense",) * count + ("sparse",) * (len(self.mlps) - count)
        return count if self.mlps == ordered else None


def shown_by(names: Iterable[str]) -> Shown:
    """Read the kinds of layers off the names of a checkpoint."""
    found: dict[str, dict[int, str]] = {"mixer": {}, "mlp": {}, "gate": {}}
    layers = 0
    for name in names:
        match = LAYER.search(name)
        if match is not None and len(match[1]) < 6:
            layers = max(layers, int(match[1]) + 1)
            for part, mark, kind in MARKS:
                if match[2] == mark:
                    found[part][int(match[1])] = kind
    return Shown(
        mixers=tuple(found["mixer"].get(i) for i in range(layers)),
        mlps=tuple(found["mlp"].get(i) for i in range(layers)),
        gates=frozenset(found["gate"].values()),
    )


def mend_config(
    values: dict[str, Any], tensors: Mapping[str, StoredTensor], layout: Layout
) -> tuple[dict[str, Any], list[Defect]]:
    """config.json as the weights say it should be, and what was wrong with it.

    What the weights do not settle stays as it is; reading the result tells whether it is enough.

    Args:
        values: of config.json.
        tensors: of the checkpoint, by name.
        layout: of the names. A folder in transformers' own layout is read by nobody else, so keys that only others need
            are not missed there.
    """
    mended, defects = dict(values), []
    shown = shown_by(tensors)
    if layout == "release":
        _spelling(mended, defects)
    _null_keys(mended, defects)
    count = mended.get("num_hidden_layers")
    if count is None or len(shown.mixers) != count or None in shown.mixers:
        shown = Shown(mixers=(), mlps=(), gates=frozenset())  # weights are missing: they settle nothing
    _linear(mended, defects, shown, tensors, layout)
    _layer_types(mended, defects, shown)
    _dense(mended, defects, shown, layout)
    _gate(mended, defects, shown)
    if layout == "release":
        _absent(mended, defects, shown)
    if mended.get("tie_word_embeddings"):
        found = "expected false, got true: the output projection is to be the embedding"
        defects.append(Defect(kind="tied", places=("tie_word_embeddings",), found=found))
    return mended, defects


def _spelling(mended: dict[str, Any], defects: list[Defect]) -> None:
    others = [key for key, name in SPELLINGS.items() if key in mended and name not in mended]
    for key in others:
        mended[SPELLINGS[key]] = mended.pop(key)
    if others:
        found = f"expected the key {SPELLINGS[others[0]]}, got {others[0]}"
        defects.append(Defect(kind="other-spelling", places=tuple(others), found=found))


def _null_keys(mended: dict[str, Any], defects: list[Defect]) -> None:
    null = [key for key in RENAMED_MOE if key in mended and mended[key] is None]
    if null and mended.get("num_experts") is None:
        for key in null:
            del mended[key]
        mended["first_k_dense_replace"] = mended.get("num_hidden_layers")
        defects.append(Defect(kind="null-keys", places=tuple(null), found="expected a number or no such key, got null"))


def _linear(
    mended: dict[str, Any], defects: list[Defect], shown: Shown, tensors: Mapping[str, StoredTensor], layout: Layout
) -> None:
    lists = {"kda_layers": shown.kda, "full_attn_layers": shown.full} if shown.mixers else {}
    there = mended.get("linear_attn_config")
    if there is None:
        if layout == "release":
            found = "expected the key, found none"
            known = bool(lists) or written_by_transformers(mended)
            defects.append(
                Defect(kind="no-linear-attn-config", places=("linear_attn_config",), found=found, mendable=known)
            )
        if lists:
            flat = {name: mended[key] for key, name in FLAT.items() if key in mended}
            mended["linear_attn_config"] = {**_shape_of_kda(tensors), **flat, **lists}
        return
    if not isinstance(there, dict) or not lists:
        return
    wrong = [name for name, layers in lists.items() if there.get(name) != layers]
    if wrong:
        from_0 = all(there.get(name) == [i - 1 for i in layers] for name, layers in lists.items())
        defects.append(
            Defect(
                kind="layer-lists-from-0" if from_0 else "layer-lists-wrong",
                places=tuple(f"linear_attn_config.{name}" for name in wrong),
                found=f"expected {lists[wrong[0]]}, as the weights are, got {there.get(wrong[0])}",
            )
        )
        mended["linear_attn_config"] = {**there, **lists}


def _shape_of_kda(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Heads, width of a head and taps, from the first KDA layer."""
    for name, tensor in tensors.items():
        if name.endswith((".self_attn.A_log", ".forget_gate.A_log")):
            stem = name[: name.index(".self_attn.")] + ".self_attn."
            heads = math.prod(tensor.shape)
            keys, taps = (
                tensors.get(f"{stem}k_proj.weight"),
                tensors.get(f"{stem}k_conv1d.weight") or tensors.get(f"{stem}conv1d.weight"),
            )
            if keys is not None and taps is not None and heads:
                return {
                    "num_heads": heads,
                    "head_dim": keys.shape[0] // heads,
                    "short_conv_kernel_size": taps.shape[-1],
                }
    return {}


def _layer_types(mended: dict[str, Any], defects: list[Defect], shown: Shown) -> None:
    if not shown.mixers:
        return
    types = [FULL if kind == "mla" else LINEAR for kind in shown.mixers]
    if "layer_types" in mended and mended["layer_types"] != types:
        defects.append(
            Defect(
                kind="layer-types-wrong",
                places=("layer_types",),
                found=f"expected full attention at {_places(types)} (from 0), as the weights are, got {_places(mended['layer_types'])}",
            )
        )
        mended["layer_types"] = types
    layers = len(shown.mixers)
    if not shown.full:
        found = f"none of the {layers} layers is full attention"
        defects.append(Defect(kind="no-full-attention", places=("layer_types",), found=found))
    elif shown.full == list(range(5, layers + 1, 4)):
        found = f"full attention is at layers {shown.full} of {layers}, counted from 1"
        defects.append(Defect(kind="layer-types-default", places=("layer_types",), found=found))


def _places(types: Any) -> Any:
    return [i for i, kind in enumerate(types) if kind == FULL] if isinstance(types, list) else types


def _dense(mended: dict[str, Any], defects: list[Defect], shown: Shown, layout: Layout) -> None:
    if not shown.mlps or shown.dense is None:
        return
    key, there = "first_k_dense_replace", mended.get("first_k_dense_replace")
    all_dense = shown.dense == len(shown.mlps)
    types = mended.get("mlp_layer_types")
    wrong_types = types is not None and types != list(shown.mlps)
    enough = there is not None and there >= shown.dense if all_dense else there == shown.dense
    if wrong_types or (there is not None and not enough and not (all_dense and mended.get("num_experts") is None)):
        found = f"expected {shown.dense} dense layers, as the weights are, got {there if not wrong_types else types}"
        place = "mlp_layer_types" if wrong_types else key
        defects.append(Defect(kind="dense-range-wrong", places=(place,), found=found))
        if types is not None:
            mended["mlp_layer_types"] = list(shown.mlps)
    elif (
        there is None
        and layout == "release"
        and not (all_dense and mended.get("num_experts") is None and types is None)
    ):
        found = f"expected {shown.dense}, as the weights are, found no such key"
        defects.append(Defect(kind="absent-keys", places=(key,), found=found))
    else:
        return
    mended[key] = shown.dense
    if all_dense:
        for name in EXPERT_KEYS:
            mended.pop(name, None)


def _gate(mended: dict[str, Any], defects: list[Defect], shown: Shown) -> None:
    linear = mended.get("linear_attn_config")
    if not isinstance(linear, dict) or len(shown.gates) != 1:
        return
    full = shown.gates == {"full"}
    if bool(linear.get("use_full_rank_gate")) != full:
        found = f"expected {str(full).lower()}, as the weights are, got {linear.get('use_full_rank_gate')}"
        defects.append(Defect(kind="gate-rank-wrong", places=("linear_attn_config.use_full_rank_gate",), found=found))
        mended["linear_attn_config"] = {**linear, "use_full_rank_gate": full}


def _absent(mended: dict[str, Any], defects: list[Defect], shown: Shown) -> None:
    if mended.get("mla_use_nope") is None:
        found = "expected the key, found none"
        defects.append(Defect(kind="no-mla-use-nope", places=("mla_use_nope",), found=found))
        mended["mla_use_nope"] = True
    needed = UNSETTLED + (UNSETTLED_MOE if "sparse" in shown.mlps else ())
    absent = tuple(key for key in needed if mended.get(key) is None)
    if absent:
        found = "expected the key, found none; no weight shows its value"
        defects.append(Defect(kind="absent-keys", places=absent, found=found, mendable=False))
    for key, allowed in ONLY.items():
        mended.setdefault(key, allowed[0])
