"""fVLM: configuration, network and losses."""

from .configuration_fvlm import FVLMConfig, FVLMVisionConfig
from .modeling_fvlm import FVLMAnatomyOutput, FVLMModel, FVLMOutput
from .vision_fvlm import FVLMVisionModel, FVLMVisionOutput

__all__ = [
    "FVLMAnatomyOutput",
    "FVLMConfig",
    "FVLMModel",
    "FVLMOutput",
    "FVLMVisionConfig",
    "FVLMVisionModel",
    "FVLMVisionOutput",
]
