"""The layers, the model, its state, and its checkpoints."""

from kimi_linear.model.model import KimiLinear
from kimi_linear.model.state import KDAState, LayerState, MLAState, ModelState
from kimi_linear.model.trace import KDATrace, Trace

__all__ = ["KDAState", "KDATrace", "KimiLinear", "LayerState", "MLAState", "ModelState", "Trace"]
