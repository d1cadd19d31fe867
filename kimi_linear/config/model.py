"""One configuration for every model that the paper compares: what varies is a field, not a fork.

Dataclasses are frozen and keyword-only; an unknown key is an error. Letters as in NOTATION.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

Mixer: TypeAlias = Literal["kda", "gdn", "mamba2", "simple-gla", "mla"]
"""What mixes the tokens of one layer: a memory of fixed size, or full attention ("mla")."""
LinearMixer: TypeAlias = Literal["kda", "gdn", "mamba2", "simple-gla"]


MAX_SIZE, MAX_LAYERS = 1 << 31, 10_000
"""Bounds far above any model: past them a config.json is damaged or hostile, and would cost memory to disbelieve."""


class ConfigError(ValueError):
    """A configuration that cannot be: the field's name, what was expected, what came, and the way out."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """The linear-attention layers (KDA, and its relatives GDN, Mamba-2 and simple GLA at the same shape)."""

    num_heads: int
    """H, key heads."""
    head_dim: int = 128
    """K, width of a query and key head."""
    num_v_heads: int | None = None
    """HV, value heads, a multiple of H; H where None."""
    v_head_dim: int | None = None
    """V, width of a value head; K where None."""
    conv_size: int = 4
    """Taps of the causal depthwise convolution on q, k and v; 0 leaves it out."""
    gate: Literal["softplus", "bounded"] = "softplus"
    """Forgetting gate: the released checkpoint's unbounded softplus, or its successors' bounded sigmoid."""
    gate_lower_bound: float = -5.0
    """Strongest log-decay of one step where ``gate`` is "bounded"."""
    gate_rank: int | None = None
    """Rank of the forgetting gate's projection; K where None."""
    output_gate: Literal["sigmoid", "swish", "none"] = "sigmoid"
    """Activation of the gate on the normalised output."""
    output_gate_rank: int | Literal["full"] | None = None
    """Rank of the output gate's projection; V where None, one full matrix where "full"."""
    output_gate_bias: bool = False
    """Add a bias to the low-rank output gate, as fla's layer does; the released model has none."""

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def value_dim(self) -> int:
        """V."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "head_dim", "value_heads", "value_dim")
        _expect(
            self.value_heads % self.num_heads == 0,
            "num_v_heads",
            f"a multiple of num_heads == {self.num_heads}",
            self.num_v_heads,
        )
        _expect(
            self.conv_size == 0 or 2 <= self.conv_size <= 16, "conv_size", "0 (none) or 2 to 16 taps", self.conv_size
        )
        _expect(self.gate_lower_bound < 0, "gate_lower_bound", "a negative number", self.gate_lower_bound)
        _choice(self, "gate", "output_gate")
        _expect(
            not self.output_gate_bias or (self.output_gate != "none" and self.output_gate_rank != "full"),
            "output_gate_bias",
            "false where there is no low-rank output gate",
            self.output_gate_bias,
        )


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """The full-attention layers: multi-head latent attention, without position encoding unless asked for."""

    num_heads: int
    """Query heads."""
    kv_lora_rank: int = 512
    """Width of the compressed latent that keys and values are made from."""
    qk_nope_head_dim: int = 128
    """Width of the part of a query or key head made from the latent."""
    qk_rope_head_dim: int = 64
    """Width of the key part shared by all heads; it is rotated only where ``position`` is "rope"."""
    v_head_dim: int = 128
    """Width of a value head."""
    position: Literal["nope", "rope"] = "nope"
    """No position encoding, as released, or rotary encoding of the shared part."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    kv_norm_eps: float | None = None
    """Epsilon of the latent's RMSNorm; the model's ``rms_norm_eps`` where None. The publisher's code uses 1e-6."""

    @property
    def qk_head_dim(self) -> int:
        """Width of a whole query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token: the latent and the shared key part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        _choice(self, "position")
        if self.position == "rope":
            _expect(
                self.qk_rope_head_dim % 2 == 0,
                "qk_rope_head_dim",
                "an even number for rotary pairs",
                self.qk_rope_head_dim,
            )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts feed-forward layers: sigmoid scores, a correction bias that only selects, top-k."""

    num_experts: int
    """Routed experts."""
    experts_per_token: int
    """Routed experts that each token visits."""
    expert_size: int
    """Inner width of one expert."""
    num_shared_experts: int = 1
    """Experts that every token visits, merged into one of this many times the width; 0 for none."""
    first_dense_layers: int = 1
    """Leading layers with a dense feed-forward instead."""
    num_groups: int = 1
    """Groups of experts for group-limited routing; 1 for none."""
    groups_per_token: int = 1
    """Groups that a token's experts are chosen from."""
    renormalize: bool = True
    """Scale the chosen weights to sum to one."""
    scaling_factor: float = 1.0
    """Multiplies the chosen weights last."""
    bias_in_weights: bool = False
    """Let the correction bias into the mixture weights too, as the publisher's remote code does by aliasing. The
    default gathers unbiased scores, as vLLM, SGLang and transformers do."""

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "experts_per_token", "expert_size", "num_groups", "groups_per_token")
        _expect(self.num_shared_experts >= 0, "num_shared_experts", ">= 0", self.num_shared_experts)
        _expect(self.first_dense_layers >= 0, "first_dense_layers", ">= 0", self.first_dense_layers)
        _expect(
            self.num_experts % self.num_groups == 0,
            "num_groups",
            f"a divisor of num_experts == {self.num_experts}",
            self.num_groups,
        )
        _expect(
            self.groups_per_token <= self.num_groups,
            "groups_per_token",
            f"at most num_groups == {self.num_groups}",
            self.groups_per_token,
        )
        reachable = self.num_experts // self.num_groups * self.groups_per_token
        _expect(
            self.experts_per_token <= reachable,
            "experts_per_token",
            f"at most the {reachable} reachable experts",
            self.experts_per_token,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Kimi Linear model, or one of the models that it is compared with."""

    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """D, width of the residual stream."""
    num_layers: int
    """Blocks."""
    intermediate_size: int
    """Inner width of a dense feed-forward."""
    linear: LinearConfig
    """Shape of the linear-attention layers."""
    mla: MLAConfig
    """Shape of the full-attention layers."""
    moe: MoEConfig | None = None
    """Mixture of experts; every feed-forward is dense where None."""
    linear_mixer: LinearMixer = "kda"
    """Which mixer the pattern's linear layers are."""
    pattern: str = "3:1"
    """Linear layers to full-attention layers, repeated; a pattern with full layers ends on one. "1:0" has none."""
    mixers: tuple[Mixer, ...] | None = None
    """Explicit mixer of each layer, instead of ``pattern``."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMSNorm that names no other."""
    tie_embeddings: bool = False
    """Let the output projection be the embedding."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    max_position_embeddings: int = 1048576
    """Longest context that the model is meant for; nothing is sized by it."""
    bos_token_id: int | None = None
    """Token that begins a document."""
    eos_token_id: int | None = None
    """Token that ends a document or turn."""
    pad_token_id: int | None = None
    """Token that fills unused places."""

    @cached_property
    def layer_mixers(self) -> tuple[Mixer, ...]:
        """The mixer of each layer, first to last."""
        if self.mixers is not None:
            return self.mixers
        linear, full = parse_pattern(self.pattern)
        period = linear + full
        ends_full = full > 0
        return tuple(
            "mla" if i % period >= linear or (ends_full and i == self.num_layers - 1) else self.linear_mixer
            for i in range(self.num_layers)
        )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) has a mixture of experts."""
        return self.moe is not None and layer >= self.moe.first_dense_layers

    @property
    def kv_norm_eps(self) -> float:
        """Epsilon of the latent's RMSNorm in the full-attention layers."""
        return self.rms_norm_eps if self.mla.kv_norm_eps is None else self.mla.kv_norm_eps

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden_size", "num_layers", "intermediate_size")
        _expect(self.num_layers <= MAX_LAYERS, "num_layers", f"at most {MAX_LAYERS:,}", self.num_layers)
        _choice(self, "linear_mixer")
        if self.mixers is not None:
            _expect(
                len(self.mixers) == self.num_layers,
                "mixers",
                f"one mixer for each of num_layers == {self.num_layers}",
                len(self.mixers),
            )
            for mixer in self.mixers:
                _expect(mixer in get_args(Mixer), "mixers", f"each one of {', '.join(get_args(Mixer))}", mixer)
        else:
            parse_pattern(self.pattern)
        if "mamba2" in self.layer_mixers:
            # Its decay is made from the step size that tokens are written with.
            _expect(
                self.linear.gate == "softplus", "linear.gate", "'softplus' where a layer is mamba2", self.linear.gate
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            _expect(token is None or 0 <= token < self.vocab_size, name, f"a token in [0, {self.vocab_size})", token)

    @staticmethod
    def preset(name: str, **changes: Any) -> ModelConfig:
        """A named configuration, with ``changes`` to its fields.

        Raises:
            ConfigError: no preset has that name, or a change names no field.
        """
        from kimi_linear.config.presets import preset

        return replace(preset(name), **changes) if changes else preset(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, nested; ``from_dict`` gives back an equal configuration."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelConfig:
        """The configuration that ``to_dict`` wrote. Raises ``ConfigError`` for an unknown or missing key."""
        if not isinstance(values, dict):
            raise ConfigError(f"config: expected an object of ModelConfig's keys, got {values!r}")
        values = dict(values)
        for name, kind in NESTED.items():
            if values.get(name) is not None:
                values[name] = _build(kind, values[name], f"{name}.")
        if values.get("mixers") is not None:
            values["mixers"] = tuple(values["mixers"])
        return _build(ModelConfig, values, "")


NESTED: dict[str, type] = {"linear": LinearConfig, "mla": MLAConfig, "moe": MoEConfig}
"""The fields of ``ModelConfig`` that are configurations themselves."""


def parse_pattern(pattern: str) -> tuple[int, int]:
    """("3:1") -> (3, 1): linear layers, then full-attention layers."""
    parts = pattern.split(":")
    if len(parts) != 2 or not all(p.isdigit() for p in parts) or sum(map(int, parts)) == 0:
        raise ConfigError(f"pattern: expected 'linear:full' such as '3:1', '0:1' or '1:0', got {pattern!r}")
    return int(parts[0]), int(parts[1])


def replace(config: ModelConfig, **changes: Any) -> ModelConfig:
    """``config`` with other field values; a dict for a nested part changes only its named fields."""
    names = {f.name for f in dataclasses.fields(config)}
    merged: dict[str, Any] = {}
    for name, value in changes.items():
        _expect(name in names, name, f"a field of ModelConfig ({', '.join(sorted(names))})", value)
        kind, current = NESTED.get(name), getattr(config, name)
        if kind is None or not isinstance(value, dict):
            merged[name] = value
        else:
            before = {} if current is None else dataclasses.asdict(current)
            merged[name] = _build(kind, {**before, **value}, f"{name}.")
    return dataclasses.replace(config, **merged)


def _build(kind: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: expected an object of {kind.__name__}'s keys, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{prefix}{unknown[0]}: unknown key; expected one of {', '.join(sorted(fields))}")
    missing = sorted(
        name for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )  # fmt: skip
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: missing key; {kind.__name__} needs it")
    hints = get_type_hints(kind)
    for name, value in values.items():
        _plain_type(f"{prefix}{name}", value, hints[name])
    return kind(**values)


def _plain_type(name: str, value: object, hint: Any) -> None:
    """A number, switch or text of the field's type; values read from a file are only as good as the file."""
    options = [o for part in get_args(hint) or (hint,) for o in (get_args(part) or (part,))]
    allowed = tuple(t for t in options if t in (int, float, bool, str))
    if not allowed or value in options or (value is None and type(None) in options):
        return
    exact = type(value) in allowed or (float in allowed and type(value) is int)
    _expect(exact, name, " or ".join(t.__name__ for t in allowed), value)


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _expect(isinstance(value, int) and 0 < value < MAX_SIZE, name, "a positive integer below 2**31", value)


def _choice(config: Any, *names: str) -> None:
    hints = get_type_hints(type(config))
    for name in names:
        options = get_args(hints[name])
        _expect(getattr(config, name) in options, name, f"one of {', '.join(map(str, options))}", getattr(config, name))
