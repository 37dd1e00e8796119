"""ConceptCLIP's image tower with a linear head: one label of an image, or several."""

import json
import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionModel
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, cached_file, can_return_tuple, find_adapter_config_file

from .configuration_conceptclip import ConceptCLIPConfig
from .spelling_conceptclip import refuse_misspelt

# Beside an adapter: the fields of the configuration that its head was built with, since the base knows no labels.
HEAD_CONFIG = "head_config.json"
HEAD_FIELDS = ("id2label", "problem_type", "classifier_dropout")
SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"


@dataclass
class ConceptCLIPImageClassifierOutput(ModelOutput):
    """What [`ConceptCLIPForImageClassification`] gives back.

    Args:
        loss (): with `labels`.
        logits (B, num_labels): softmax over them for a single label, sigmoid of each for several.
        image_embeds (B, D): L2-normalised, as [`ConceptCLIPModel`] gives them.
        hidden_states: of the image tower, on request.
        attentions: of the image tower, on request (eager attention).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None, class_weights: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of the known labels; 0, with a gradient of 0, where none is known.

    Args:
        logits (B, K): scores of the labels, not normalised.
        labels (B,): place of the label, -100 for unknown; or (B, K): 1 present, 0 absent, -100 unknown.
        problem_type: "single_label_classification" (softmax) or "multi_label_classification" (a sigmoid a label).
        class_weights (K,): of each label's loss for a single label, of its positives for several; default: 1.

    Raises:
        ValueError: where labels do not have the shape of the problem, or the problem is unknown.
    """
    expected = {SINGLE_LABEL: tuple(logits.shape[:1]), MULTI_LABEL: tuple(logits.shape)}
    if problem_type not in expected:
        raise ValueError(f"config.problem_type must be one of {sorted(expected)}, but is {problem_type!r}.")
    if tuple(labels.shape) != expected[problem_type]:
        raise ValueError(
            f"labels for {problem_type} should be {expected[problem_type]}, got {tuple(labels.shape)}. "
            "Give another config.problem_type, or other labels."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = None if class_weights is None else class_weights.to(logits)
    if problem_type == SINGLE_LABEL:
        losses = F.cross_entropy(logits, labels.long(), weights, reduction="none", ignore_index=-100)
        is_known = labels != -100
        shares = torch.ones_like(losses) if weights is None else weights[labels.long().clamp(min=0)]
        return (losses * is_known).sum() / (shares * is_known).sum().clamp(min=1e-8)
    is_known = labels >= 0
    targets = labels.to(logits.dtype).clamp(0, 1)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=weights)
    return (losses * is_known).sum() / is_known.sum().clamp(min=1)


class ConceptCLIPForImageClassification(PreTrainedModel):
    """ConceptCLIP's image tower and a linear layer on its embedding; the text tower is left out.

    The layer sees the L2-normalised embedding times the square root of its width, so that a feature has variance one
    whatever the tower's scale, and the same learning rate serves towers of any width.

    Which labels: `id2label` and `problem_type` of the configuration. From a pre-trained ConceptCLIP the tower is loaded
    and the head starts fresh; from an adapter folder both, through the `head_config.json` that lies in it.

    Examples:
        >>> labels = {0: "no effusion", 1: "effusion"}
        >>> model = ConceptCLIPForImageClassification.from_pretrained("my-conceptclip", id2label=labels)
        >>> inputs = processor(images="radiograph.png")
        >>> model(pixel_values=inputs["pixel_values"]).logits.softmax(dim=-1)
    """

    config: ConceptCLIPConfig
    base_model_prefix = "conceptclip"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 - the other half of a ConceptCLIP
        r"^text_model\.",
        r"^(text|patch|token)_projection\.",
        r"^(concept_)?logit_(scale|bias)$",
    ]

    def __init__(self, config: ConceptCLIPConfig) -> None:
        super().__init__(config)
        embed_dim = config.vision_config.hidden_size
        self.vision_model = SiglipVisionModel._from_config(config.vision_config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.classifier = nn.Linear(embed_dim, len(config.id2label or ()))
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | PathLike[str], *model_args: Any, config: Any = None, **kwargs: Any
    ) -> "ConceptCLIPForImageClassification":
        """As `PreTrainedModel.from_pretrained`; an adapter folder brings the labels of its head."""
        adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path") or pretrained_model_name_or_path
        if head := read_head_config(adapter):
            base = head.pop("base_model_name_or_path")
            if config is None:
                config, kwargs = ConceptCLIPConfig.from_pretrained(base, return_unused_kwargs=True, **kwargs)
            config = config_with_head(config, head)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, for the reason that `ConceptCLIPModel.is_custom_code` gives."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding of the image tower."""
        return self.vision_model.get_input_embeddings()

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel` does; the classes that the pre-trained model's folder named are not its own."""
        if self._auto_class is not None:
            self.config.auto_map = {}
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_image_embeds(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any) -> Any:
        """L2-normalised embeddings (B, D) and the output of the image tower."""
        expected = self.config.vision_config.image_size
        if not interpolate_pos_encoding and tuple(pixel_values.shape[-2:]) != (expected, expected):
            raise ValueError(
                f"pixel_values should be (B, 3, {expected}, {expected}), got {tuple(pixel_values.shape)}. Resize the "
                "images, or pass interpolate_pos_encoding=True."
            )
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        pooled = outputs.pooler_output
        return F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1), outputs

    @can_return_tuple
    @refuse_misspelt
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ConceptCLIPImageClassifierOutput:
        """Logits of the labels, and the loss where labels are given.

        Args:
            pixel_values (B, 3, H, W): normalised pixels.
            labels (B,) or (B, num_labels): see `classification_loss`.
            image_embeds (B, D): L2-normalised, instead of pixels: a frozen tower needs to see an image only once.
            interpolate_pos_encoding: resample the position table for images of another size than the configured.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: where not exactly one of images and embeddings comes, or shapes do not fit.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("Exactly one of pixel_values and image_embeds must come.")
        tower_output = None
        if pixel_values is not None:
            image_embeds, tower_output = self.get_image_embeds(pixel_values, interpolate_pos_encoding, **kwargs)
        assert image_embeds is not None
        features = image_embeds * math.sqrt(image_embeds.shape[-1])
        logits = self.classifier(self.dropout(features.to(self.classifier.weight.dtype)))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type or SINGLE_LABEL)
        return ConceptCLIPImageClassifierOutput(
            loss=loss,
            logits=logits,
            image_embeds=image_embeds,
            hidden_states=None if tower_output is None else tower_output.hidden_states,
            attentions=None if tower_output is None else tower_output.attentions,
        )


# Same as in fvlm.
def read_head_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """The fields of an adapter's head and the name of its base; empty where the folder holds no such adapter."""
    adapter_config = find_adapter_config_file(str(folder))
    head_config = None
    if adapter_config is not None:
        head_config = cached_file(str(folder), HEAD_CONFIG, _raise_exceptions_for_missing_entries=False)
    if adapter_config is None or head_config is None:
        return {}
    base = json.loads(Path(adapter_config).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return json.loads(Path(head_config).read_text(encoding="utf-8")) | {"base_model_name_or_path": base}


# Same as in fvlm but for the fields.
def config_with_head(config: ConceptCLIPConfig, head: dict[str, Any]) -> ConceptCLIPConfig:
    """The configuration of a base with the fields of a head; the base's own stays as it was."""
    if unknown := sorted(set(head) - set(HEAD_FIELDS)):
        raise ValueError(f"{HEAD_CONFIG} names {unknown}, but a head has the fields {HEAD_FIELDS}.")
    config = type(config).from_dict(config.to_dict())
    for name, value in head.items():
        setattr(config, name, {int(key): label for key, label in value.items()} if name == "id2label" else value)
    id2label: Any = config.id2label
    config.label2id = {label: place for place, label in id2label.items()}
    return config


__all__ = ["ConceptCLIPForImageClassification", "ConceptCLIPImageClassifierOutput"]
