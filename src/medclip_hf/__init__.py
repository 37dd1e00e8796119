"""Medical vision-language models for the Hugging Face ecosystem.

Importing the package makes the Auto classes of transformers know its models. Whatever is saved afterwards carries its
own code, so that `trust_remote_code=True` loads it where this package is not installed.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf.modeling.conceptclip import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel, FVLMVisionConfig, FVLMVisionModel
from medclip_hf.processing.conceptclip import ConceptCLIPProcessor
from medclip_hf.processing.fvlm import FVLMImageProcessor, FVLMProcessor


def _register_conceptclip() -> None:
    AutoConfig.register(ConceptCLIPConfig.model_type, ConceptCLIPConfig, exist_ok=True)
    AutoModel.register(ConceptCLIPConfig, ConceptCLIPModel, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(ConceptCLIPConfig, ConceptCLIPModel, exist_ok=True)
    AutoProcessor.register(ConceptCLIPConfig, ConceptCLIPProcessor, exist_ok=True)
    AutoTokenizer.register(ConceptCLIPConfig, tokenizer_class=BertTokenizer, exist_ok=True)
    AutoImageProcessor.register(
        ConceptCLIPConfig, image_processor_classes={"pil": SiglipImageProcessorPil}, exist_ok=True
    )
    ConceptCLIPConfig.register_for_auto_class()
    ConceptCLIPModel.register_for_auto_class("AutoModel")
    ConceptCLIPProcessor.register_for_auto_class()


def _register_fvlm() -> None:
    for config, model in ((FVLMConfig, FVLMModel), (FVLMVisionConfig, FVLMVisionModel)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModel")
    AutoProcessor.register(FVLMConfig, FVLMProcessor, exist_ok=True)
    AutoTokenizer.register(FVLMConfig, tokenizer_class=BertTokenizer, exist_ok=True)
    # "pil" is the name of the backend that needs no torchvision; volumes go through NumPy.
    AutoImageProcessor.register(FVLMConfig, image_processor_classes={"pil": FVLMImageProcessor}, exist_ok=True)
    FVLMProcessor.register_for_auto_class()
    FVLMImageProcessor.register_for_auto_class()


_register_conceptclip()
_register_fvlm()

__all__ = [
    "ConceptCLIPConfig",
    "ConceptCLIPModel",
    "ConceptCLIPProcessor",
    "FVLMConfig",
    "FVLMImageProcessor",
    "FVLMModel",
    "FVLMProcessor",
    "FVLMVisionConfig",
    "FVLMVisionModel",
]
