"""A pre-trained model made ready for new data: loaded, given a head where the task has labels, adapted or frozen."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from medclip_hf.modeling.conceptclip import ConceptCLIPModel
from medclip_hf.modeling.conceptclip import image_classification_conceptclip as conceptclip_head
from medclip_hf.modeling.fvlm import FVLMModel
from medclip_hf.modeling.fvlm import anatomy_classification_fvlm as fvlm_head
from medclip_hf.processing.conceptclip import ConceptCLIPProcessor
from medclip_hf.processing.fvlm import FVLMProcessor
from medclip_hf.training.classification import FeatureDataset, LabelledDataset, run_over_rows
from medclip_hf.training.lora import (
    AdapterSettings,
    BaseFacts,
    SavedTogether,
    add_adapter,
    load_pretrained,
    quantized_base,
    require_4bit,
)

logger = logging.getLogger(__name__)

Kind = Literal["contrastive", "classification", "anatomy_findings"]


@dataclass(frozen=True)
class BaseSection:
    """The model to start from.

    Args:
        from_pretrained: folder or Hub name of a ConceptCLIP or fVLM.
        adapter_base_name: what the adapter names as its base instead of `from_pretrained`: the Hub name of a base that
            lies in a local folder here, so that the adapter can be published.
    """

    from_pretrained: str
    adapter_base_name: str | None = None


@dataclass(frozen=True)
class MethodSection:
    """What is trained; the fields behind `mode` are those of `lora.AdapterSettings` and count for "lora" alone.

    Args:
        mode: "lora": an adapter in the towers (and the head); "full": everything; "linear_probe": the head alone, on
            embeddings that are computed once.
        rank: see `AdapterSettings`.
        alpha: see `AdapterSettings`.
        dropout: see `AdapterSettings`.
        use_dora: see `AdapterSettings`.
        targets: see `AdapterSettings`.
        towers: see `AdapterSettings`.
        quantization: "4bit" keeps the frozen base in 4 bits (QLoRA); needs CUDA and bitsandbytes.
    """

    mode: Literal["lora", "full", "linear_probe"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_dora: bool = False
    targets: tuple[str, ...] = ("query", "value")
    towers: tuple[str, ...] | None = None
    quantization: Literal["none", "4bit"] = "none"

    def __post_init__(self) -> None:
        if self.quantization != "none" and self.mode != "lora":
            raise ValueError(f"method.quantization goes with mode=lora, but the mode is {self.mode}.")
        self.adapter_settings()

    def adapter_settings(self) -> AdapterSettings:
        """Those of the adapter."""
        return AdapterSettings(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            use_dora=self.use_dora,
            targets=self.targets,
            towers=self.towers,
        )


@dataclass(frozen=True)
class Started:
    """What a run starts from.

    Args:
        model: ready to train; what is frozen is frozen.
        processor: of the base.
        saved_beside: what is saved into the model's folder beside it.
    """

    model: Any
    processor: Any
    saved_beside: Any


def read_base_config(base: str) -> Any:
    """The configuration of the base.

    Raises:
        ValueError: it cannot be loaded, or is of none of our models.
    """
    if (Path(base) / "adapter_config.json").is_file():
        raise ValueError(
            f"model.from_pretrained={base} is an adapter. Merge it first: scripts/merge_adapter.py --adapter {base}"
        )
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.from_pretrained={base} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    if config.model_type not in ("conceptclip", "fvlm"):
        raise ValueError(f"model.from_pretrained={base} is a {config.model_type!r}, not a ConceptCLIP or fVLM.")
    return config


def head_fields(
    kind: Kind, classes: Sequence[str], *, is_single_label: bool, dropout: float, findings: Mapping[str, str] | None
) -> dict[str, Any] | None:
    """The fields of the configuration that a task adds to its base; None for a task without labels."""
    if kind == "contrastive":
        return None
    problem_type = conceptclip_head.SINGLE_LABEL if is_single_label else conceptclip_head.MULTI_LABEL
    fields = {"id2label": dict(enumerate(classes)), "problem_type": problem_type, "classifier_dropout": dropout}
    if kind == "anatomy_findings":
        fields["findings"] = {name: (findings or {})[name] for name in classes}
    return fields


def start(section: BaseSection, method: MethodSection, head: dict[str, Any] | None) -> Started:
    """The model of a run: the base with a fresh head, with an adapter on it or partly frozen as the method says.

    Args:
        section: where the base comes from.
        method: what is trained.
        head: see `head_fields`.

    Raises:
        ValueError: a base that cannot be loaded or cannot take the head, a method that does not go with the task.
    """
    if method.mode == "linear_probe" and head is None:
        raise ValueError("method.mode=linear_probe trains the head of a classifier; a contrastive task has none.")
    if method.quantization != "none":
        require_4bit()
    config = read_base_config(section.from_pretrained)
    model_class, processor_class = _classes(config.model_type, has_head=head is not None)
    if head is not None:
        config = _head_module(config.model_type).config_with_head(config, head)
    model = load_pretrained(model_class, section.from_pretrained, config)
    try:
        processor = processor_class.from_pretrained(section.from_pretrained)
    except OSError as error:
        raise ValueError(
            f"model.from_pretrained={section.from_pretrained} has no processor: {' '.join(str(error).split())[:300]}"
        ) from error
    if method.mode == "lora":
        return _with_adapter(model, processor, section, method)
    if method.mode == "linear_probe":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    return Started(model, processor, processor)


def _with_adapter(model: Any, processor: Any, section: BaseSection, method: MethodSection) -> Started:
    facts = BaseFacts.of(model)
    if method.quantization != "none":
        device_map = {"": torch.cuda.current_device()}
        model = quantized_base(type(model), section.from_pretrained, config=model.config, device_map=device_map)
    is_folder = Path(section.from_pretrained).is_dir()
    own_name = str(Path(section.from_pretrained).resolve()) if is_folder else section.from_pretrained
    base_name = section.adapter_base_name or own_name
    adapted = add_adapter(model, method.adapter_settings(), base_name)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    logger.info("training %s weights of %s", f"{trained:,}", f"{sum(p.numel() for p in adapted.parameters()):,}")
    return Started(adapted, processor, SavedTogether((processor, facts)))


def to_features(
    model: Any, dataset: LabelledDataset, collator: Any, *, batch_size: int, device: torch.device, show_progress: bool
) -> FeatureDataset:
    """The rows as embeddings of the frozen towers, in eval mode: what a linear probe trains on.

    Every row is embedded once, as it is without random crops and flips; the loop then costs next to nothing.
    """
    name = "anatomy_embeds" if hasattr(model, "anatomy_pooling") else "image_embeds"

    def embeds(batch: dict[str, Any]) -> Tensor:
        inputs = {key: batch[key] for key in ("pixel_values", "anatomy_mask") if key in batch}
        return model(**inputs)[name]

    was_training = model.training
    model.to(device).eval()
    rows, features = run_over_rows(
        dataset,
        collator,
        embeds,
        batch_size=batch_size,
        device=device,
        description="embedding" if show_progress else None,
    )
    model.train(was_training)
    if len(rows) < len(dataset):
        logger.warning("%d of %d rows could not be read and are left out", len(dataset) - len(rows), len(dataset))
    is_single_label = model.config.problem_type == conceptclip_head.SINGLE_LABEL
    return FeatureDataset(dataset, rows, features, name, is_single_label=is_single_label)


def _classes(model_type: str, *, has_head: bool) -> tuple[Any, Any]:
    if model_type == "conceptclip":
        model: Any = conceptclip_head.ConceptCLIPForImageClassification if has_head else ConceptCLIPModel
        return model, ConceptCLIPProcessor
    return (fvlm_head.FVLMForAnatomyClassification if has_head else FVLMModel), FVLMProcessor


def _head_module(model_type: str) -> Any:
    return conceptclip_head if model_type == "conceptclip" else fvlm_head
