"""Public mathematics: the operations of Kimi Linear, validated and differentiable, whatever implementation runs them."""

from kimi_linear.ops.contract import BoundedGate, Gate, Impl, KDAOutput, SoftplusGate, log_decay
from kimi_linear.ops.dispatch import AVAILABLE, Choice, OpFacts, choose_impl
from kimi_linear.ops.kda import chunk_kda, l2_normalize, recurrent_kda

__all__ = [
    "AVAILABLE",
    "BoundedGate",
    "Choice",
    "Gate",
    "Impl",
    "KDAOutput",
    "OpFacts",
    "SoftplusGate",
    "choose_impl",
    "chunk_kda",
    "l2_normalize",
    "log_decay",
    "recurrent_kda",
]
