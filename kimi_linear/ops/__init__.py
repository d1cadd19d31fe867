"""Public mathematics: the operations of Kimi Linear, validated and differentiable, whatever implementation runs them."""

from kimi_linear.ops.contract import BoundedGate, Gate, Impl, KDAOutput, KDAStates, SoftplusGate, log_decay
from kimi_linear.ops.decode import ConvTaps, DecodePool, HeadNorm, kda_decode
from kimi_linear.ops.dispatch import AVAILABLE, Choice, OpFacts, choose_impl
from kimi_linear.ops.kda import chunk_kda, kda_facts, recurrent_kda
from kimi_linear.ops.kda_states import chunk_kda_states
from kimi_linear.ops.linear_attention import chunk_gdn, chunk_mamba2, recurrent_gdn, recurrent_mamba2
from kimi_linear.ops.mla import mla_absorbed, mla_attention, rotary
from kimi_linear.ops.moe import Routing, moe_experts, route, swiglu
from kimi_linear.ops.norm import gated_rms_norm, l2_normalize, rms_norm
from kimi_linear.ops.short_conv import ConvOutput, QKVConvOutput, short_conv, short_conv_qkv

__all__ = [
    "AVAILABLE",
    "BoundedGate",
    "Choice",
    "ConvOutput",
    "ConvTaps",
    "DecodePool",
    "Gate",
    "HeadNorm",
    "Impl",
    "KDAOutput",
    "KDAStates",
    "OpFacts",
    "QKVConvOutput",
    "Routing",
    "SoftplusGate",
    "choose_impl",
    "chunk_gdn",
    "chunk_kda",
    "chunk_kda_states",
    "chunk_mamba2",
    "gated_rms_norm",
    "kda_decode",
    "kda_facts",
    "l2_normalize",
    "log_decay",
    "mla_absorbed",
    "mla_attention",
    "moe_experts",
    "recurrent_gdn",
    "recurrent_kda",
    "recurrent_mamba2",
    "rms_norm",
    "rotary",
    "route",
    "short_conv",
    "short_conv_qkv",
    "swiglu",
]
