"""What varies between models, as frozen dataclasses, and the named presets."""

from kimi_linear.config.model import ConfigError, LinearConfig, Mixer, MLAConfig, ModelConfig, MoEConfig, replace
from kimi_linear.config.presets import PRESETS, Baseline, baseline, preset
from kimi_linear.config.release import from_release, to_release

__all__ = [
    "PRESETS",
    "Baseline",
    "ConfigError",
    "LinearConfig",
    "MLAConfig",
    "Mixer",
    "MoEConfig",
    "ModelConfig",
    "baseline",
    "from_release",
    "preset",
    "replace",
    "to_release",
]
