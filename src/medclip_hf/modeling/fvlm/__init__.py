"""fVLM: configuration, network and losses."""

from medclip_hf.modeling.fvlm.configuration_fvlm import FVLMConfig, FVLMVisionConfig
from medclip_hf.modeling.fvlm.modeling_fvlm import (
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
