"""The models, processors and pipelines of the package, made known to the Auto classes of transformers on import."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf.modeling.conceptclip import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.modeling.conceptclip.image_classification_conceptclip import ConceptCLIPForImageClassification
from medclip_hf.modeling.conceptclip.report_generation_conceptclip import (
    ConceptCLIPForReportGeneration,
    ConceptCLIPReportGenerationConfig,
)
from medclip_hf.modeling.conceptclip.visual_question_answering_conceptclip import (
    ConceptCLIPForVisualQuestionAnswering,
    ConceptCLIPVisualQuestionAnsweringConfig,
)
from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel, FVLMVisionConfig, FVLMVisionModel
from medclip_hf.modeling.fvlm.anatomy_classification_fvlm import FVLMForAnatomyClassification
from medclip_hf.modeling.fvlm.report_generation_fvlm import FVLMForReportGeneration, FVLMReportGenerationConfig
from medclip_hf.pipelines import register_pipelines
from medclip_hf.processing.conceptclip import ConceptCLIPProcessor
from medclip_hf.processing.fvlm import FVLMImageProcessor, FVLMProcessor


def _register_conceptclip() -> None:
    AutoConfig.register(ConceptCLIPConfig.model_type, ConceptCLIPConfig, exist_ok=True)
    AutoModel.register(ConceptCLIPConfig, ConceptCLIPModel, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(ConceptCLIPConfig, ConceptCLIPModel, exist_ok=True)
    AutoModelForImageClassification.register(ConceptCLIPConfig, ConceptCLIPForImageClassification, exist_ok=True)
    AutoProcessor.register(ConceptCLIPConfig, ConceptCLIPProcessor, exist_ok=True)
    AutoTokenizer.register(ConceptCLIPConfig, tokenizer_class=BertTokenizer, exist_ok=True)
    AutoImageProcessor.register(
        ConceptCLIPConfig, image_processor_classes={"pil": SiglipImageProcessorPil}, exist_ok=True
    )
    ConceptCLIPConfig.register_for_auto_class()
    ConceptCLIPModel.register_for_auto_class("AutoModel")
    ConceptCLIPForImageClassification.register_for_auto_class("AutoModelForImageClassification")
    ConceptCLIPProcessor.register_for_auto_class()


def _register_fvlm() -> None:
    for config, model in ((FVLMConfig, FVLMModel), (FVLMVisionConfig, FVLMVisionModel)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModel")
    AutoModelForImageClassification.register(FVLMConfig, FVLMForAnatomyClassification, exist_ok=True)
    FVLMForAnatomyClassification.register_for_auto_class("AutoModelForImageClassification")
    AutoProcessor.register(FVLMConfig, FVLMProcessor, exist_ok=True)
    AutoTokenizer.register(FVLMConfig, tokenizer_class=BertTokenizer, exist_ok=True)
    # "pil" is the name of the backend that needs no torchvision; volumes go through NumPy.
    AutoImageProcessor.register(FVLMConfig, image_processor_classes={"pil": FVLMImageProcessor}, exist_ok=True)
    FVLMProcessor.register_for_auto_class()
    FVLMImageProcessor.register_for_auto_class()


def _register_heads() -> None:
    """Models with a configuration of their own; each loads by the Auto class of its task, and by `AutoModel`."""
    heads: tuple[tuple[Any, Any, Any, Any], ...] = (
        (
            ConceptCLIPVisualQuestionAnsweringConfig,
            ConceptCLIPForVisualQuestionAnswering,
            AutoModelForVisualQuestionAnswering,
            ConceptCLIPProcessor,
        ),
        (
            ConceptCLIPReportGenerationConfig,
            ConceptCLIPForReportGeneration,
            AutoModelForImageTextToText,
            ConceptCLIPProcessor,
        ),
        (FVLMReportGenerationConfig, FVLMForReportGeneration, AutoModelForImageTextToText, FVLMProcessor),
    )
    for config, model, auto_class, processor in heads:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        auto_class.register(config, model, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)
        config.register_for_auto_class()
        model.register_for_auto_class(auto_class.__name__)


_register_conceptclip()
_register_fvlm()
_register_heads()
register_pipelines()
