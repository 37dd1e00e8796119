"""Pipelines of transformers that take a file: importing this room registers them."""

from typing import Any

from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from medclip_hf.modeling.conceptclip import ConceptCLIPConfig
from medclip_hf.modeling.fvlm import FVLMConfig
from medclip_hf.pipelines.inputs import read_picture
from medclip_hf.pipelines.pipeline_concept_annotation import ConceptAnnotationPipeline
from medclip_hf.pipelines.pipeline_ct import CTFeatureExtractionPipeline, CTZeroShotClassificationPipeline
from medclip_hf.pipelines.pipeline_saving import add_pipelines


class _CarriedPipelines:
    """`config.custom_pipelines`, which looks empty where the package is installed.

    What it names is the code in the folder of a model, and transformers runs no such code unless it is trusted. Here
    the same pipelines are registered already: seeing no others, `pipeline` takes these and needs no trust. Nor is the
    entry kept: a model saved without the code of its pipelines must not name them (`add_pipelines` writes both).
    """

    def __get__(self, config: Any, owner: type) -> dict[str, Any]:
        return {}

    def __set__(self, config: Any, value: dict[str, Any]) -> None:
        """Keep nothing."""


def register_pipelines() -> None:
    """Make `transformers.pipeline` know the pipelines of both models by their tasks."""
    tasks = {
        "medical-concept-annotation": ConceptAnnotationPipeline,
        "ct-zero-shot-classification": CTZeroShotClassificationPipeline,
        "ct-feature-extraction": CTFeatureExtractionPipeline,
    }
    for task, pipeline_class in tasks.items():
        if task not in PIPELINE_REGISTRY.supported_tasks:
            PIPELINE_REGISTRY.register_pipeline(task, pipeline_class, pt_model=AutoModel, type="multimodal")
    configs: tuple[Any, ...] = (ConceptCLIPConfig, FVLMConfig)
    for config in configs:
        config.custom_pipelines = _CarriedPipelines()


register_pipelines()

__all__ = [
    "CTFeatureExtractionPipeline",
    "CTZeroShotClassificationPipeline",
    "ConceptAnnotationPipeline",
    "add_pipelines",
    "read_picture",
    "register_pipelines",
]
