"""fVLM's vision tower with a linear layer for each finding, on the embedding of the anatomy where it occurs."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput, cached_file, can_return_tuple, find_adapter_config_file

from .anatomy_pooling_fvlm import FVLMAnatomyHead, FVLMAnatomyPooling
from .configuration_fvlm import FVLMConfig
from .modeling_fvlm import FVLMAnatomyOutput, FVLMModel
from .spelling_fvlm import refuse_misspelt
from .vision_fvlm import FVLMPreTrainedModel, FVLMVisionModel

# Beside an adapter: the fields of the configuration that its head was built with, since the base knows no findings.
HEAD_CONFIG = "head_config.json"
HEAD_FIELDS = ("id2label", "problem_type", "classifier_dropout", "findings")
MULTI_LABEL = "multi_label_classification"


@dataclass
class FVLMAnatomyClassifierOutput(ModelOutput):
    """What [`FVLMForAnatomyClassification`] gives back; B volumes, A anatomies, F findings.

    Args:
        loss: scalar, with `labels`.
        logits: (B, F), NaN where the finding's anatomy is missing from the volume; sigmoid gives probabilities.
        anatomy_embeds: (B, A, projection_dim), L2-normalised, zero where not present.
        anatomy_present: (B, A) bool, the anatomy owns at least one token.
        hidden_states: of the vision tower, on request.
        attentions: of the vision tower, on request (eager attention).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    anatomy_embeds: Tensor | None = None
    anatomy_present: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def finding_loss(logits: Tensor, labels: Tensor, positive_weights: Tensor | None = None) -> Tensor:
    """Mean binary cross entropy of what is known and seen; 0, with a gradient of 0, where nothing is.

    Args:
        logits: (B, F), NaN where the anatomy is missing.
        labels: (B, F), 1 present, 0 absent, -100 unknown.
        positive_weights: (F,), of the loss of the scans that have a finding; default: 1.

    Raises:
        ValueError: labels have another shape.
    """
    if labels.shape != logits.shape:
        raise ValueError(f"labels should be (scans, findings) {tuple(logits.shape)}, got {tuple(labels.shape)}.")
    is_used = (labels >= 0) & ~logits.isnan()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~is_used, 0.0)
    weights = None if positive_weights is None else positive_weights.to(logits)
    targets = labels.to(logits.dtype).clamp(0, 1)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=weights)
    return (losses * is_used).sum() / is_used.sum().clamp(min=1)


class FVLMFindingHead(nn.Linear):
    """One row of weights and one bias for each finding, each on an embedding of its own: (B, F, dim) -> (B, F)."""

    def forward(self, features: Tensor) -> Tensor:
        """The logit of every finding from the embedding of its anatomy."""
        return torch.einsum("bfd,fd->bf", features, self.weight) + self.bias


class FVLMForAnatomyClassification(FVLMPreTrainedModel):
    """Findings of a CT volume, each from the anatomy where it occurs; the text tower is left out.

    A finding's layer sees the L2-normalised embedding of its anatomy times the square root of its width, the vector
    that `FVLMModel` compares with texts. Where an anatomy is missing from the volume, its findings have no logit (NaN)
    and no part in the loss.

    Which findings: `findings` of the configuration, name → anatomy, in the order of `id2label`. From a pre-trained fVLM
    the tower is loaded and the head starts fresh; from an adapter folder both, through the `head_config.json` in it.

    Examples:
        >>> findings = {"Cardiomegaly": "heart", "Pleural effusion": "lung"}
        >>> model = FVLMForAnatomyClassification.from_pretrained(folder, findings=findings)
        >>> inputs = processor(images=volume_hu, anatomy_mask=mask)
        >>> model(**inputs).logits.sigmoid()
    """

    config: FVLMConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]  # noqa: RUF012

    def __init__(self, config: FVLMConfig) -> None:
        super().__init__(config)
        self.anatomy_index = anatomy_index_of_findings(config)
        vision_config: Any = config.vision_config
        hidden_size = vision_config.hidden_size
        self.vision_model = FVLMVisionModel._from_config(vision_config)
        self.anatomy_pooling = FVLMAnatomyPooling(
            hidden_size, config.pooling_num_attention_heads, config.pooling_dropout
        )
        self.anatomy_heads = nn.ModuleList(
            [FVLMAnatomyHead(hidden_size, config.projection_dim) for _ in config.anatomies]
        )
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.classifier = FVLMFindingHead(config.projection_dim, len(self.anatomy_index))
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *model_args: Any,
        config: Any = None,
        findings: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> "FVLMForAnatomyClassification":
        """As `PreTrainedModel.from_pretrained`; `findings` (name → anatomy) are those of a new head.

        An adapter folder brings the findings of its head.
        """
        adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path") or pretrained_model_name_or_path
        head = read_head_config(adapter)
        base = head.pop("base_model_name_or_path", pretrained_model_name_or_path)
        if findings is not None:
            head = {"findings": dict(findings), "id2label": dict(enumerate(findings)), "problem_type": MULTI_LABEL}
        if head:
            if config is None:
                config, kwargs = FVLMConfig.from_pretrained(base, return_unused_kwargs=True, **kwargs)
            config = config_with_head(config, head)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding of the vision tower."""
        return self.vision_model.get_input_embeddings()

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel` does; the classes that the pre-trained model's folder named are not its own."""
        if self._auto_class is not None:
            self.config.auto_map = {}
        super().save_pretrained(save_directory, *args, **kwargs)

    # The same steps on the same modules: vision tower, pooling and projection of each anatomy.
    get_image_features = FVLMModel.get_image_features
    _token_mask = FVLMModel._token_mask

    @can_return_tuple
    @refuse_misspelt
    def forward(
        self,
        pixel_values: Tensor | None = None,
        anatomy_mask: Tensor | None = None,
        anatomy_token_mask: Tensor | None = None,
        labels: Tensor | None = None,
        is_complete: Tensor | None = None,
        anatomy_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> FVLMAnatomyClassifierOutput:
        """Logits of the findings, and the loss where labels are given.

        Args:
            pixel_values: (B, 1, D, H, W) in [0, 1], each size a multiple of the patch.
            anatomy_mask: (B, D, H, W) integer ids, 0 = background, i + 1 = `config.anatomies[i]`.
            anatomy_token_mask: (B, A, P) bool instead.
            labels: (B, F), 1 present, 0 absent, -100 unknown.
            is_complete: (B, A) bool, the anatomy lies completely inside the crop; labels of others do not count, since
                the finding may lie outside.
            anatomy_embeds: (B, A, projection_dim), L2-normalised, instead of volumes; a row of NaN or zeros is an
                anatomy that is missing.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: not exactly one of volumes and embeddings came, or a shape is not as described.
        """
        if (pixel_values is None) == (anatomy_embeds is None):
            raise ValueError("Exactly one of pixel_values and anatomy_embeds must come.")
        image_outputs: FVLMAnatomyOutput | None = None
        if anatomy_embeds is None:
            image_outputs = self.get_image_features(
                pixel_values, anatomy_mask, anatomy_token_mask, return_dict=True, **kwargs
            )
            pooled: Any = image_outputs.pooler_output
            anatomy_embeds = F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)
            is_present: Any = image_outputs.anatomy_present
        else:
            anatomy_embeds = anatomy_embeds.nan_to_num()
            is_present = anatomy_embeds.ne(0).any(dim=-1)
        logits = self._logits(anatomy_embeds, is_present)
        loss = None
        if labels is not None:
            if is_complete is not None:
                labels = labels.masked_fill(~is_complete.bool()[:, self.anatomy_index], -100)
            loss = finding_loss(logits, labels)
        return FVLMAnatomyClassifierOutput(
            loss=loss,
            logits=logits,
            anatomy_embeds=anatomy_embeds,
            anatomy_present=is_present,
            hidden_states=None if image_outputs is None else image_outputs.hidden_states,
            attentions=None if image_outputs is None else image_outputs.attentions,
        )

    def _logits(self, anatomy_embeds: Tensor, is_present: Tensor) -> Tensor:
        """(B, F), NaN where the finding's anatomy is missing."""
        features = anatomy_embeds[:, self.anatomy_index] * math.sqrt(anatomy_embeds.shape[-1])  # (B, F, dim)
        logits = self.classifier(self.dropout(features.to(self.classifier.weight.dtype)))
        return logits.masked_fill(~is_present[:, self.anatomy_index], torch.nan)


def anatomy_index_of_findings(config: FVLMConfig) -> list[int]:
    """For each label the place of its anatomy in `config.anatomies`.

    Raises:
        ValueError: the configuration names no findings, others than its labels, or anatomies that it does not have.
    """
    findings = getattr(config, "findings", None)
    id2label: Any = config.id2label
    labels = [id2label[place] for place in range(len(id2label))]
    if not findings or sorted(findings) != sorted(labels):
        raise ValueError(
            f"the configuration must name the anatomy of each label in `findings`, but findings is {findings} and the "
            f"labels are {labels}. Load with findings={{'Cardiomegaly': 'heart', ...}}."
        )
    unknown = {name: anatomy for name, anatomy in findings.items() if anatomy not in config.anatomies}
    if unknown:
        raise ValueError(
            f"the findings {unknown} belong to anatomies that the model does not have: it knows "
            f"{list(config.anatomies)}. Use FVLMModel.add_anatomies, or leave these findings out."
        )
    return [list(config.anatomies).index(findings[label]) for label in labels]


# Same as in conceptclip.
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


# Same as in conceptclip but for the fields.
def config_with_head(config: FVLMConfig, head: dict[str, Any]) -> FVLMConfig:
    """The configuration of a base with the fields of a head; the base's own stays as it was."""
    if unknown := sorted(set(head) - set(HEAD_FIELDS)):
        raise ValueError(f"{HEAD_CONFIG} names {unknown}, but a head has the fields {HEAD_FIELDS}.")
    config = type(config).from_dict(config.to_dict())
    for name, value in head.items():
        setattr(config, name, {int(key): label for key, label in value.items()} if name == "id2label" else value)
    id2label: Any = config.id2label
    config.label2id = {label: place for place, label in id2label.items()}
    return config


__all__ = ["FVLMAnatomyClassifierOutput", "FVLMForAnatomyClassification"]
