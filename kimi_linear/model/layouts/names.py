"""What each layout calls a tensor, and where in it a tensor of the release lies.

The release keeps every matrix by itself, so its names are the common tongue. A ``Place`` says where one of them is in
another layout: in a tensor of its own under another name, in some rows of a fused one, or in one expert of a stack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from kimi_linear.config import ModelConfig
from kimi_linear.model.checkpoint import release_tensors
from kimi_linear.model.model import KimiLinear

Layout: TypeAlias = Literal["release", "transformers", "fla"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Shape: TypeAlias = tuple[int, ...]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WIDE = ("A_log", "dt_bias")
"""Last part of the names that must be held in fp32."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor of the release lies in another layout."""

    tensor: str
    """The other layout's name."""
    expert: int | None = None
    """Which slice of the first dim, where experts are stacked."""
    rows: tuple[int, int] | None = None
    """Which rows (of that slice), where tensors are fused."""
    shape: Shape | None = None
    """Its shape there, where that is another with as many numbers."""


@dataclass(frozen=True, kw_only=True)
class LayoutTensor:
    """A tensor of some layout: its shape, and the tensors of the release that it is made of."""

    shape: Shape
    pieces: tuple[tuple[str, Place], ...]
    """Release name and place of each; empty for a tensor of zeros that the release has no name for."""
    like: str | None = None
    """Release tensor whose dtype a tensor of zeros takes."""


def release_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every tensor that a checkpoint of this model has in the release layout, by name."""
    with torch.device("meta"):
        model = KimiLinear(config)
    return {name: tuple(tensor.shape) for name, tensor in release_tensors(model).items()}


def layout_tensors(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, LayoutTensor]:
    """Every tensor of a checkpoint in ``layout``, by name.

    Args:
        layout: which.
        shapes: of the model's tensors in the release layout (``release_shapes``).
    """
    find = {"release": _release, "transformers": _transformers, "fla": _fla}[layout]
    pieces: dict[str, list[tuple[str, Place]]] = {}
    for name, shape in shapes.items():
        place = find(name, shape, shapes)
        pieces.setdefault(place.tensor, []).append((name, place))
    stored = {
        tensor: LayoutTensor(shape=_shape(parts, shapes), pieces=tuple(parts)) for tensor, parts in pieces.items()
    }
    if layout == "fla":
        stored |= _fla_biases(stored, shapes)
    return stored


def tell_layout(names: Iterable[str], model_type: object) -> Layout:
    """The layout that a checkpoint's names are of; ``model_type`` is config.json's."""
    if model_type == "kda":
        return "fla"
    marks = (".forget_gate.", ".self_attn.conv1d.", ".experts.gate_up_proj", ".experts.down_proj", ".mlp.gate.")
    return "transformers" if any(mark in name for name in names for mark in marks) else "release"


def is_wide(name: str) -> bool:
    """Whether the tensor must be held in fp32."""
    return name.rpartition(".")[2] in WIDE


def _shape(parts: list[tuple[str, Place]], shapes: Mapping[str, Shape]) -> Shape:
    name, place = parts[0]
    if place.rows is None and place.expert is None:
        return place.shape or shapes[name]
    rows = max(p.rows[1] for _, p in parts if p.rows is not None) if place.rows is not None else shapes[name][0]
    whole = (rows, *shapes[name][1:])
    experts = 1 + max(p.expert for _, p in parts if p.expert is not None) if place.expert is not None else None
    return whole if experts is None else (experts, *whole)


def _release(name: str, shape: Shape, shapes: Mapping[str, Shape]) -> Place:
    return Place(tensor=name)


GATE_PARTS = re.compile(r"\.self_attn\.(f_a_proj\.|f_b_proj\.|dt_bias$|A_log$)")
CONVOLUTION = re.compile(r"\.([qkv])_conv1d\.weight$")
EXPERT = re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.w([123])\.weight$")


def _transformers(name: str, shape: Shape, shapes: Mapping[str, Shape]) -> Place:
    """transformers >= 5.17, as its state_dict has them: convolutions fused, experts stacked, gate rows before up rows."""
    if match := CONVOLUTION.search(name):
        before = {"q": "", "k": "q", "v": "qk"}[match[1]]
        start = sum(shapes[f"{name[: match.start()]}.{letter}_conv1d.weight"][0] for letter in before)
        return Place(tensor=f"{name[: match.start()]}.conv1d.weight", rows=(start, start + shape[0]))
    if match := EXPERT.search(name):
        stem, number = f"{name[: match.start()]}.mlp.experts", int(match[1])
        if match[2] == "2":
            return Place(tensor=f"{stem}.down_proj", expert=number)
        start = 0 if match[2] == "1" else shape[0]
        return Place(tensor=f"{stem}.gate_up_proj", expert=number, rows=(start, start + shape[0]))
    name = GATE_PARTS.sub(r".self_attn.forget_gate.\1", name)
    return Place(tensor=name.replace(".block_sparse_moe.", ".mlp."))


FLA_NAMES = {
    "model.embed_tokens.": "model.embeddings.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
    ".self_attn.f_a_proj.": ".self_attn.f_proj.0.",
    ".self_attn.f_b_proj.": ".self_attn.f_proj.1.",
    ".self_attn.g_a_proj.": ".self_attn.g_proj.0.",
    ".self_attn.g_b_proj.": ".self_attn.g_proj.1.",
    ".self_attn.": ".attn.",
}
FLA_BIAS = ".attn.g_proj.1.bias"
"""The output gate's bias, which fla's layer always has and the release never."""


def _fla(name: str, shape: Shape, shapes: Mapping[str, Shape]) -> Place:
    """fla's KDAForCausalLM."""
    for ours, theirs in FLA_NAMES.items():
        name = name.replace(ours, theirs)
    return Place(tensor=name, shape=(math.prod(shape),) if name.endswith(".A_log") else None)


def _fla_biases(stored: Mapping[str, LayoutTensor], shapes: Mapping[str, Shape]) -> dict[str, LayoutTensor]:
    """A bias of zeros beside each output gate that has none."""
    biases: dict[str, LayoutTensor] = {}
    for tensor, kept in stored.items():
        if tensor.endswith(".attn.g_proj.1.weight"):
            bias = tensor.removesuffix("weight") + "bias"
            if bias not in stored:
                biases[bias] = LayoutTensor(shape=kept.shape[:1], pieces=(), like=kept.pieces[0][0])
    return biases
