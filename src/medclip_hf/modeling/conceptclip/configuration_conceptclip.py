"""Configuration of ConceptCLIP: two tower configurations and what joins them."""

import math
from dataclasses import fields
from typing import Any

from transformers import BertConfig, SiglipVisionConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec, strict

from .spelling_conceptclip import check_spelling

# SigLIP SO400M, patch 14, 384 pixels. ConceptCLIP's weights were trained with the exact GELU; SigLIP's own
# configuration files name the tanh approximation.
SO400M_PATCH14_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


@strict
class ConceptCLIPConfig(PreTrainedConfig):
    """What fixes the shapes and initial values of a [`ConceptCLIPModel`].

    Args:
        text_config: configuration of the text tower; default PubMedBERT base (the defaults of `BertConfig`).
        vision_config: configuration of the image tower; default SigLIP SO400M patch 14 at 384 pixels with exact GELU.
            Its width is the width of the joint space.
        use_patch_concept_alignment: False is the published first stage, IT-Align alone: the heads and scalars of
            PC-Align do not exist then, so no parameter stays without gradient.
        patch_concept_loss_weight: weight of PC-Align in the loss, 0.5 as published.
        logit_scale_init_value: logarithm of the initial scale of the image-text logits, ln(1 / 0.07) as published.
        logit_bias_init_value: initial bias of the image-text logits.
        concept_logit_scale_init_value: as `logit_scale_init_value`, for the patch-concept logits.
        concept_logit_bias_init_value: as `logit_bias_init_value`, for the patch-concept logits.

    Raises:
        ValueError: on a misspelt key or a tower that cannot serve.
    """

    model_type = "conceptclip"
    sub_configs_defaults = {  # noqa: RUF012 - as transformers wants it
        "text_config": SubConfigSpec(BertConfig),
        "vision_config": SubConfigSpec(SiglipVisionConfig, init_kwargs=SO400M_PATCH14_384),
    }

    text_config: Any = None  # a configuration, its fields as a dict, or None; a configuration from here on
    vision_config: Any = None
    use_patch_concept_alignment: bool = True
    patch_concept_loss_weight: float | int = 0.5
    logit_scale_init_value: float | int = math.log(1 / 0.07)
    logit_bias_init_value: float | int = -10.0
    concept_logit_scale_init_value: float | int = math.log(1 / 0.07)
    concept_logit_bias_init_value: float | int = -10.0

    def __post_init__(self, **kwargs: Any) -> None:
        check_spelling(type(self).__name__, kwargs, [field.name for field in fields(type(self))])
        super().__post_init__(**kwargs)
        _check_vision_config(self.vision_config)


def _check_vision_config(config: PreTrainedConfig) -> None:
    if not getattr(config, "vision_use_head", True):  # transformers 5.21 declares no such field
        raise ValueError("vision_config.vision_use_head is False, but the pooled image vector comes from that head.")
    if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
        raise ValueError(
            f"vision_config needs square images and patches given as one integer each, got "
            f"image_size={config.image_size}, patch_size={config.patch_size}."
        )


__all__ = ["ConceptCLIPConfig"]
