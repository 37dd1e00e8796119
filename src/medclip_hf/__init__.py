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
from medclip_hf.processing.conceptclip import ConceptCLIPProcessor


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


_register_conceptclip()

__all__ = ["ConceptCLIPConfig", "ConceptCLIPModel", "ConceptCLIPProcessor"]
