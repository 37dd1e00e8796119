"""fVLM: configuration, network and losses."""

from .configuration_fvlm import FVLMConfig, FVLMVisionConfig
from .modeling_fvlm import (
    FVLMAnatomyOutput,
    FVLMModel,
    FVLMOutput,
    FVLMVisionModel,
    FVLMVisionOutput,
)

__all__ = [
    "FVLMAnatomyOutput",
    "FVLMConfig",
    "FVLMModel",
    "FVLMOutput",
    "FVLMVisionConfig",
    "FVLMVisionModel",
    "FVLMVisionOutput",
]
