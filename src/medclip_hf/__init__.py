"""Medical vision-language models for the Hugging Face ecosystem.

Importing the package makes the Auto classes and pipelines of transformers know its models. Whatever is saved afterwards
carries its own code, so that `trust_remote_code=True` loads it where this package is not installed.

This loads PyTorch and every model: seconds, and some 500 MB. Two kinds of process do without until they call `register`
or name a model: the program `medclip-hf`, which answers --help at once, and processes started with
`MEDCLIP_HF_REGISTER=0`, as the workers that only handle data are.
"""

import importlib
import os
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    "register",
]


def register() -> None:
    """Make the Auto classes and pipelines of transformers know the models, where the import was told not to."""
    importlib.import_module("medclip_hf.registration")


def __getattr__(name: str) -> Any:
    """The class of that name, registered."""
    if name in __all__:
        return getattr(importlib.import_module("medclip_hf.registration"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_is_the_program = PurePath(sys.argv[0] if sys.argv else "").name in ("medclip-hf", "medclip-hf.exe")
if not _is_the_program and os.environ.get("MEDCLIP_HF_REGISTER") != "0":
    register()
