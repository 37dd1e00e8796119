"""Medical vision-language models for the Hugging Face ecosystem.

Importing the package makes the Auto classes and pipelines of transformers know its models. Whatever is saved afterwards
carries its own code, so that `trust_remote_code=True` loads it where this package is not installed.
"""

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

# The program `medclip-hf` answers --help and mistakes without waiting for PyTorch; it registers what it loads.
_IS_THE_PROGRAM = PurePath(sys.argv[0] if sys.argv else "").name in ("medclip-hf", "medclip-hf.exe")

if TYPE_CHECKING or not _IS_THE_PROGRAM:
    from medclip_hf.registration import (
        ConceptCLIPConfig,
        ConceptCLIPForImageClassification,
        ConceptCLIPForReportGeneration,
        ConceptCLIPForVisualQuestionAnswering,
        ConceptCLIPModel,
        ConceptCLIPProcessor,
        ConceptCLIPReportGenerationConfig,
        ConceptCLIPVisualQuestionAnsweringConfig,
        FVLMConfig,
        FVLMForAnatomyClassification,
        FVLMForReportGeneration,
        FVLMImageProcessor,
        FVLMModel,
        FVLMProcessor,
        FVLMReportGenerationConfig,
        FVLMVisionConfig,
        FVLMVisionModel,
    )

__all__ = [
    "ConceptCLIPConfig",
    "ConceptCLIPForImageClassification",
    "ConceptCLIPForReportGeneration",
    "ConceptCLIPForVisualQuestionAnswering",
    "ConceptCLIPModel",
    "ConceptCLIPProcessor",
    "ConceptCLIPReportGenerationConfig",
    "ConceptCLIPVisualQuestionAnsweringConfig",
    "FVLMConfig",
    "FVLMForAnatomyClassification",
    "FVLMForReportGeneration",
    "FVLMImageProcessor",
    "FVLMModel",
    "FVLMProcessor",
    "FVLMReportGenerationConfig",
    "FVLMVisionConfig",
    "FVLMVisionModel",
]
