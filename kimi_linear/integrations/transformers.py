"""Our KDA inside transformers' native Kimi Linear model: one call makes packing right and decoding exact, with our kernels.

The methods of transformers' own classes are exchanged. Its registry of replacement classes would reach only models
made by ``from_pretrained`` and ``from_config``, and never the model class, which alone knows ``position_ids``; this way
every model of the process is reached, whoever made it, and its class, parameters and checkpoints stay transformers' own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.ops import (
    AVAILABLE,
    BoundedGate,
    Impl,
    SoftplusGate,
    chunk_kda,
    gated_rms_norm,
    recurrent_kda,
    short_conv,
)

RECURRENT_TOKENS = 16
"""With a cache, up to this many tokens go one by one; more go in chunks, with the same result."""
FP32 = ("A_log", "dt_bias", "e_score_correction_bias")
"""Parameters that a model loaded in 16 bits keeps in fp32, as the released checkpoint stores the first two."""
PACKED = "kda_cu_seqlens"
"""Keyword under which the model tells its layers where the documents of a packed batch begin and end."""
MOE_PARTS = ("gate", "experts", "shared_experts")
"""Children of a mixture of experts."""

_undo: list[Callable[[], None]] = []
_impl: list[Impl] = ["auto"]


def patch(*, impl: Impl = "auto") -> None:
    """Let every Kimi Linear model of transformers (>= 5.17) in this process run on our operations.

    - KDA layers run on ``kimi_linear.ops``, with transformers' own cache: generation, beams, left padding and gradient
      checkpointing work as before. The bounded gate and the full-rank output gate of the successors are built where
      ``config.linear_attn_config`` names them; transformers alone ignores these keys.
    - Packed documents never see each other, in KDA and in full attention, whether the batch says where they begin by
      ``position_ids``, ``cu_seq_lens_q`` or ``seq_idx``; where two of these disagree, the call is refused.
    - A model loaded in bf16 or fp16 keeps A_log, dt_bias and the router's bias in fp32.
    - ``save_pretrained`` writes the dense feed-forward under the name that the release layout gives it, and every
      config key that readers of that layout need.

    Calling it again only changes ``impl``. ``unpatch`` undoes it.

    Args:
        impl: which implementation of ``chunk_kda`` and ``recurrent_kda`` runs.

    Raises:
        ImportError: transformers is absent or older than its Kimi Linear model. ValueError: no operation has ``impl``.
    """
    if impl != "auto" and impl not in AVAILABLE["chunk_kda"]:
        raise ValueError(f"impl: expected 'auto' or one of {', '.join(AVAILABLE['chunk_kda'])}, got {impl!r}")
    native = _native()
    _impl[0] = impl
    if _undo:
        return
    from transformers.integrations.accelerate import force_accelerate_hooks

    layer, model, base = native.KimiLinearDeltaAttention, native.KimiLinearModel, native.KimiLinearPreTrainedModel
    _replace(layer, "__init__", _layer_init(layer.__init__))
    # Children whose weights are read directly: a hook that brings offloaded weights back must fire for them.
    _replace(layer, "forward", force_accelerate_hooks(["conv1d", "forget_gate", "o_norm"])(_layer_forward))
    _replace(model, "forward", _model_forward(model.forward))
    _replace(base, "_keep_in_fp32_modules_strict", list(FP32))
    _replace(base, "save_pretrained", _save_pretrained(base.save_pretrained))
    _mend_names()


def unpatch() -> None:
    """Undo ``patch``: transformers' own methods again, also in models that exist. Nothing happens without a patch."""
    while _undo:
        _undo.pop()()


def is_patched() -> bool:
    """Whether ``patch`` is in force."""
    return bool(_undo)


def _native() -> Any:
    try:
        from transformers.models.kimi_linear import modeling_kimi_linear
    except ImportError as error:
        raise ImportError(
            f"transformers: expected 5.17 or later, with its Kimi Linear model, got: {error}; "
            "install it with pip install 'kimi-linear[hf]'"
        ) from error
    return modeling_kimi_linear


def _replace(owner: type, name: str, value: object) -> None:
    """Set a class attribute, and remember how to set it back."""
    if name in vars(owner):
        before = vars(owner)[name]
        _undo.append(lambda: setattr(owner, name, before))
    else:
        _undo.append(lambda: delattr(owner, name))
    setattr(owner, name, value)


# The KDA layer.


def _layer_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, config: Any, layer_idx: int) -> None:
        original(self, config, layer_idx)
        self.gate_lower_bound, full_rank = _variant(config)
        if full_rank:
            del self.g_a_proj, self.g_b_proj
            self.g_proj = nn.Linear(config.hidden_size, self.qkv_dim, bias=False)

    return init


def _variant(config: Any) -> tuple[float | None, bool]:
    """(lower bound of the gate or None, whether the output gate is one full matrix), as the config's keys say."""
    values = getattr(config, "linear_attn_config", None) or {}
    return values.get("gate_lower_bound"), bool(values.get("use_full_rank_gate"))


def _built(layer: Any) -> tuple[float | None, bool]:
    """The same of a layer as it is; one made before ``patch`` is always the released kind."""
    return getattr(layer, "gate_lower_bound", None), hasattr(layer, "g_proj")


def _layer_forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """``KimiLinearDeltaAttention.forward``: [B, T, D] -> [B, T, D]. The cache holds what transformers' own layer puts
    there: the last W inputs of the convolution [B, 3*H*K, W], and the memory [B, H, K, V]."""
    batch, tokens = hidden_states.shape[:2]
    x = hidden_states
    if attention_mask is not None:
        x = (x * attention_mask[..., None]).to(x.dtype)
    cu_seqlens = kwargs.get(PACKED)
    if cu_seqlens is not None:
        x = x.flatten(0, 1)[None]
    heads = (self.num_heads, self.head_dim)
    mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
    window, memory = _read_cache(self, cache_params, mixed)
    taps = self.conv1d.weight[:, 0].to(mixed.dtype)
    mixed, _ = short_conv(mixed, taps, initial_state=window, cu_seqlens=cu_seqlens)
    q, k, v = (part.unflatten(-1, heads) for part in mixed.split(self.qkv_dim, dim=-1))
    beta = _wide(self.b_proj(x)).sigmoid()
    run = recurrent_kda if cache_params is not None and tokens <= RECURRENT_TOKENS else chunk_kda
    output, memory = run(
        q, k, v, _gate(self, x), beta,
        normalize_qk=True, initial_state=memory, cu_seqlens=cu_seqlens, impl=_impl[0],
    )  # fmt: skip
    if cache_params is not None:
        cache_params.update_recurrent_state(memory.transpose(-1, -2), self.layer_idx)
    gate = self.g_proj(x) if hasattr(self, "g_proj") else self.g_b_proj(self.g_a_proj(x))
    norm = self.o_norm
    output = gated_rms_norm(output, gate.unflatten(-1, heads), norm.weight, norm.variance_epsilon, "sigmoid")
    return self.o_proj(output.reshape(batch, tokens, -1))


def _gate(layer: Any, x: Tensor) -> SoftplusGate | BoundedGate:
    forget = layer.forget_gate
    raw = forget.f_b_proj(forget.f_a_proj(x)).unflatten(-1, (layer.num_heads, layer.head_dim))
    A_log, dt_bias = _wide(forget.A_log).view(-1), _wide(forget.dt_bias).view(layer.num_heads, -1)
    lower_bound = getattr(layer, "gate_lower_bound", None)
    if lower_bound is None:
        return SoftplusGate(raw, A_log, dt_bias)
    return BoundedGate(raw, A_log, dt_bias, lower_bound)


def _read_cache(layer: Any, cache: Any, mixed: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The convolution's window [B, 3*H*K, W-1] and the memory [B, H, V, K] from before; takes ``mixed`` into the cache."""
    if cache is None:
        return None, None
    continues = cache.has_previous_state(layer.layer_idx)
    kept = cache.update_conv_state(
        mixed.transpose(1, 2), layer.layer_idx, conv_kernel_size=layer.conv_kernel_size
    )  # fmt: skip
    if not continues:
        return None, None
    tokens = mixed.shape[1]
    window = kept[..., -(tokens + layer.conv_kernel_size - 1) : -tokens]
    memory = cache.layers[layer.layer_idx].recurrent_states[0].transpose(-1, -2)
    return window, memory.to(torch.promote_types(mixed.dtype, torch.float32))


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least: gates and beta are computed there."""
    return x if x.dtype.itemsize >= 4 else x.float()


# Packing, once for all layers.


def _model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        _check_layers(self)
        given = input_ids if input_ids is not None else inputs_embeds
        bounds = None if given is None else packed_bounds(
            (given.shape[0], given.shape[1]), given.device, attention_mask=attention_mask, position_ids=position_ids,
            cu_seqlens=kwargs.get("cu_seq_lens_q"), seq_idx=kwargs.get("seq_idx"),
        )  # fmt: skip
        if bounds is not None:
            assert given is not None
            if use_cache or past_key_values is not None:
                raise ValueError(
                    "use_cache: a packed batch leaves nothing that generation could continue; expected no cache, got "
                    f"use_cache={use_cache}, past_key_values={type(past_key_values).__name__}; unpack the documents"
                )
            use_cache = False
            place = torch.arange(int(bounds[-1]), device=given.device)
            starts = bounds[:-1].long().repeat_interleave(bounds.diff().long())
            # Transformers builds the mask of full attention from position_ids, and only where there is no other.
            position_ids = (place - starts).view(given.shape[:2])
            attention_mask = None if attention_mask is _padding(attention_mask) else attention_mask
            kwargs[PACKED] = bounds
        return original(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip

    return forward


def _check_layers(model: Any) -> None:
    """A model with a bounded gate that was made before ``patch`` has a layer of another kind."""
    wanted = _variant(model.config)
    for decoder in model.layers:
        if hasattr(decoder.self_attn, "forget_gate") and _built(decoder.self_attn) != wanted:
            raise ValueError(
                f"model: expected KDA layers with (gate_lower_bound, use_full_rank_gate) == {wanted}, as its config says, "
                f"got {_built(decoder.self_attn)}; call kimi_linear.integrations.transformers.patch() before loading it"
            )


def _padding(mask: Any) -> Tensor | None:
    """transformers' usual mask [B, T], 1 for tokens and 0 for padding, alone or among masks made beforehand."""
    if isinstance(mask, dict):
        mask = mask.get("linear_attention")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def packed_bounds(
    shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | None:
    """Where the documents of a batch begin and end, from whatever the batch says of it.

    Args:
        shape: (B, T). Rows count as one after the other: the places run from 0 to B*T.
        device: where the result goes.
        attention_mask: [B, T or more], 0 for padding, or transformers' dict of masks; anything else is not read.
        position_ids: [B or 1, T]; a document begins where they do not go on by one.
        cu_seqlens: [N+1] bounds themselves.
        seq_idx: [B or 1, T] number of each token's document.

    Returns:
        [N+1] int64, from 0 to B*T; None where every row is one document at most.

    Raises:
        ValueError: two descriptions that differ, or bounds that do not cover the batch.
    """
    if shape[1] <= 1 or all(described is None for described in (position_ids, cu_seqlens, seq_idx)):
        return None
    real = torch.ones(shape, dtype=torch.bool, device=device)
    if (padding := _padding(attention_mask)) is not None:
        real = padding[:, -shape[1] :].to(device=device, dtype=torch.bool)
    begins: dict[str, Tensor] = {}
    if cu_seqlens is not None:
        begins["cu_seq_lens_q"] = _begins_at(cu_seqlens.to(device).long().flatten(), real)
    for name, value, step in (("position_ids", position_ids, 1), ("seq_idx", seq_idx, 0)):
        if value is not None and value.ndim == 2:
            found = _begins_where(value.to(device).expand(shape), step, real)
            # Positions that only count up are what every batch has: they say nothing against the other two.
            if _splits(found, real):
                begins[name] = found
    if not any(_splits(found, real) for found in begins.values()):
        return None
    (first, expected), *others = begins.items()
    for name, found in others:
        if not torch.equal(expected & real, found & real):
            raise ValueError(
                f"{name}: expected documents that begin where {first} says, at {_places(expected & real)}, got "
                f"{_places(found & real)}; pass one of the two, or make them agree"
            )
    places = torch.arange(real.numel() + 1, device=device)
    return torch.cat([places[:-1][expected.flatten()], places[-1:]])


def _begins_at(bounds: Tensor, real: Tensor) -> Tensor:
    """[B, T], true where ``bounds`` [N+1] says that a document begins, and where padding begins or ends."""
    places = real.numel()
    if bounds.numel() < 2 or int(bounds[0]) != 0 or int(bounds[-1]) != places or bool((bounds.diff() < 0).any()):
        raise ValueError(
            f"cu_seq_lens_q: expected bounds that rise from 0 to B*T == {places}, got {_shown(bounds)}; "
            "let them cover padding too"
        )
    flat = torch.zeros(places + 1, dtype=torch.bool, device=real.device)
    flat[bounds] = True
    begins = flat[:-1].view(real.shape)
    if not bool(begins[:, 0].all()):
        raise ValueError(
            f"cu_seq_lens_q: expected a document to begin at each of the {real.shape[0]} rows, multiples of "
            f"{real.shape[1]}, got {_shown(bounds)}; no document goes on in the next row"
        )
    begins[:, 1:] |= real[:, 1:] != real[:, :-1]
    return begins


def _begins_where(values: Tensor, step: int, real: Tensor) -> Tensor:
    """[B, T], true where ``values`` do not go on by ``step``, and where padding or a row begins or ends."""
    begins = torch.ones_like(real)
    begins[:, 1:] = (values.diff(dim=-1) != step) | (real[:, 1:] != real[:, :-1])
    return begins


def _splits(begins: Tensor, real: Tensor) -> bool:
    """Whether some document begins right after a token of another in the same row."""
    return bool((begins[:, 1:] & real[:, 1:] & real[:, :-1]).any())


def _places(begins: Tensor) -> str:
    return _shown(begins.flatten().nonzero().flatten())


def _shown(places: Tensor) -> str:
    values = places.tolist()
    return str(values) if len(values) <= 9 else f"[{', '.join(map(str, values[:9]))}, ...]"


# Saving.


def _save_pretrained(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        complete_config(self.config)
        original(self, *args, **kwargs)

    return save_pretrained


def complete_config(config: Any) -> None:
    """Add to a transformers config what other readers of the release layout need and transformers leaves out.

    These are ``linear_attn_config`` with lists of layers that count from 1, ``mla_use_nope`` and
    ``first_k_dense_replace``, in a config that was made from scratch. What is there already is left alone.

    Raises:
        ValueError: dense layers that do not come first, or a list of layers that contradicts ``layer_types``: the
            layout cannot say that.
    """
    kinds = list(config.layer_types)
    dense = sum(kind == "dense" for kind in config.mlp_layer_types)
    if config.mlp_layer_types != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
        raise ValueError(
            f"mlp_layer_types: expected every 'dense' before the first 'sparse', got {config.mlp_layer_types}; "
            "the release layout counts leading dense layers"
        )
    lists = {
        "kda_layers": [i for i, kind in enumerate(kinds, start=1) if kind == "linear_attention"],
        "full_attn_layers": [i for i, kind in enumerate(kinds, start=1) if kind == "full_attention"],
    }
    linear = {
        "num_heads": config.linear_num_heads,
        "head_dim": config.linear_head_dim,
        "short_conv_kernel_size": config.linear_conv_kernel_dim,
        **lists,
        **(getattr(config, "linear_attn_config", None) or {}),
    }
    for name, layers in lists.items():
        if sorted(linear[name]) != layers:
            raise ValueError(
                f"linear_attn_config.{name}: expected {layers}, as layer_types says counting from 1, got {linear[name]}; "
                f"delete one of the two"
            )
    config.linear_attn_config = linear
    for name, value in (("mla_use_nope", True), ("first_k_dense_replace", dense), ("moe_router_activation_func", "sigmoid"),
                        ("use_grouped_topk", True), ("moe_layer_freq", 1)):  # fmt: skip
        if not hasattr(config, name):
            setattr(config, name, value)


def _mend_names() -> None:
    """Write ``block_sparse_moe`` for mixtures of experts alone: transformers names the dense layers so too.

    Folders that were saved with that mistake are still read.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import WeightRenaming

    class ReadOnly(WeightRenaming):
        """Renames on load and leaves names alone on save."""

        __slots__ = ()

        def reverse_transform(self) -> WeightRenaming:
            return WeightRenaming(r"(?!)", "nothing matches")

    before = get_checkpoint_conversion_mapping("kimi_linear")
    assert before is not None
    mended = []
    for rule in before:
        if not any("block_sparse_moe" in source for source in rule.source_patterns):
            mended.append(rule)
            continue
        mended += [WeightRenaming(rf"\.block_sparse_moe\.{part}\.", rf"\.mlp\.{part}\.") for part in MOE_PARTS]
        mended.append(ReadOnly(r"\.block_sparse_moe\.", r"\.mlp\."))
    _undo.append(lambda: register_checkpoint_conversion_mapping("kimi_linear", before, overwrite=True))
    register_checkpoint_conversion_mapping("kimi_linear", mended, overwrite=True)
