"""What tests and benchmarks share: realistic inputs, derived tolerances with a report, timers."""

from kimi_linear.testing.factories import GATE_KINDS, GateKind, KDAInputs, kda_inputs
from kimi_linear.testing.gradients import results
from kimi_linear.testing.timers import Timing, compare, median_time, peak_memory
from kimi_linear.testing.tolerances import (
    assert_close,
    assert_close_to_reference,
    relative_error,
    rounding_band,
    worst_element_report,
)
from kimi_linear.testing.vocabulary import make_tiktoken_folder

__all__ = [
    "GATE_KINDS",
    "GateKind",
    "KDAInputs",
    "Timing",
    "assert_close",
    "assert_close_to_reference",
    "compare",
    "kda_inputs",
    "make_tiktoken_folder",
    "median_time",
    "peak_memory",
    "relative_error",
    "results",
    "rounding_band",
    "worst_element_report",
]
