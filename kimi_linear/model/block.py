"""One block: a mixer over tokens, then a feed-forward over channels, each on a normed copy added back to the stream."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from kimi_linear.config import Mixer, ModelConfig
from kimi_linear.model.gdn import GDN
from kimi_linear.model.kda import KDA
from kimi_linear.model.linear_mixer import LinearMixer
from kimi_linear.model.mamba2 import Mamba2
from kimi_linear.model.mla import MLA
from kimi_linear.model.mlp import MLP
from kimi_linear.model.moe import MoE
from kimi_linear.model.parameters import RMSNorm
from kimi_linear.model.simple_gla import SimpleGLA
from kimi_linear.model.state import KDAState, LayerState, MLAState

MIXERS: dict[Mixer, type[LinearMixer] | type[MLA]] = {
    "kda": KDA,
    "gdn": GDN,
    "mamba2": Mamba2,
    "simple-gla": SimpleGLA,
    "mla": MLA,
}


class Block(nn.Module):
    """Pre-norm residual block. The feed-forward is called ``mlp`` or ``block_sparse_moe``, as in the release."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = MIXERS[config.layer_mixers[layer]](config)  # type: ignore[call-arg]
        if config.is_moe_layer(layer):
            self.block_sparse_moe = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def feed_forward(self) -> MLP | MoE:
        """The dense or sparse feed-forward layer."""
        return self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        cu_seqlens: Int[Tensor, "N1"] | None = None,
        state: LayerState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """[B, T, D] -> [B, T, D]; ``state`` is read and updated."""
        expected = MLAState if isinstance(self.self_attn, MLA) else KDAState
        if state is not None and not isinstance(state, expected):
            raise TypeError(
                f"state: expected a {expected.__name__} for {type(self.self_attn).__name__}, got "
                f"{type(state).__name__}; make the state with this model's make_state"
            )
        x = x + self.self_attn(self.input_layernorm(x), cu_seqlens=cu_seqlens, state=state)
        return x + self.feed_forward(self.post_attention_layernorm(x))
