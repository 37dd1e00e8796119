"""The ConceptCLIP a run starts from: a saved model, two pre-trained towers, or a configuration alone."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf.modeling.conceptclip import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.processing.conceptclip import ConceptCLIPProcessor
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

logger = logging.getLogger(__name__)

MAX_TOKENIZER_CAPTIONS = 100_000
# What stage 2 has and stage 1 has not; everything else must come from the folder a run starts from.
FRESH_IN_STAGE_2 = ("patch_projection.", "token_projection.", "concept_logit_scale", "concept_logit_bias")


@dataclass(frozen=True)
class ModelSection:
    """Where the model comes from: `from_pretrained`, or `vision_tower` and `text_tower`, or `config` alone.

    Args:
        from_pretrained: folder of a ConceptCLIP; a stage 1 folder starts stage 2, with fresh heads.
        vision_tower: folder or Hub name of a SigLIP.
        text_tower: folder or Hub name of a BERT.
        config: fields of ConceptCLIPConfig, on top of those of the towers.
        tokenizer: folder or Hub name; None: that of the model or text tower, or one learned from the captions.
        vocab_size: of a tokenizer learned from the captions.
    """

    from_pretrained: str | None = None
    vision_tower: str | None = None
    text_tower: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    vocab_size: int = 30522

    def __post_init__(self) -> None:
        if (self.vision_tower is None) != (self.text_tower is None):
            raise ValueError("model.vision_tower and model.text_tower come together.")
        if self.from_pretrained is not None and (self.vision_tower is not None or self.config is not None):
            raise ValueError("model.from_pretrained comes alone: its folder names towers and config.")
        if self.from_pretrained is None and self.vision_tower is None and self.config is None:
            raise ValueError("the model section needs from_pretrained, or vision_tower and text_tower, or config.")


def build_conceptclip(
    section: ModelSection, stage: Mapping[str, Any], captions: Iterable[str], max_length: int
) -> tuple[ConceptCLIPModel, ConceptCLIPProcessor]:
    """The model to start from and its processor, the same on every process that seeded alike.

    Args:
        section: where the model comes from.
        stage: `use_patch_concept_alignment` and `patch_concept_loss_weight` of the run.
        captions: read only where a tokenizer is to be learned.
        max_length: of a caption in tokens, [CLS] and [SEP] counted.

    Raises:
        ValueError: weights that do not fit, or a text tower that cannot take what the tokenizer gives.
    """
    if section.from_pretrained is not None:
        model = load_for_stage(section.from_pretrained, stage)
        processor = ConceptCLIPProcessor.from_pretrained(section.from_pretrained)
        if section.tokenizer is not None:
            processor.tokenizer = _read_tokenizer(section.tokenizer)
    else:
        tokenizer = _load_or_learn_tokenizer(section, captions, max_length)
        model = _assemble_model(section, stage, tokenizer)
        image_size = model.config.vision_config.image_size
        image_processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
        processor = ConceptCLIPProcessor(image_processor, tokenizer)
    _check_fit(model, processor.tokenizer, max_length)
    return model, processor


def load_for_stage(folder: str, stage: Mapping[str, Any]) -> ConceptCLIPModel:
    """The model of a folder, made ready for the stage; what the stage adds is fresh, and named in the log.

    Raises:
        ValueError: the folder lacks other weights, or holds some that the stage has no place for.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"model.from_pretrained={folder} is no folder of a saved model: it has no config.json.")
    loaded: Any = ConceptCLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **stage)
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    fresh = [name for name in missing if name.startswith(FRESH_IN_STAGE_2)]
    lacking = sorted(set(missing) - set(fresh))
    homeless = sorted(loading["unexpected_keys"])
    misshapen = sorted(str(key) for key in loading["mismatched_keys"])
    if lacking or homeless or misshapen or (fresh and not _holds_stage_1(folder)):
        raise ValueError(
            f"the weights in {folder} do not fit: missing {lacking or fresh}, without a place {homeless}, "
            f"of another shape {misshapen}."
        )
    if fresh:
        logger.warning("not in %s, so fresh: %s", folder, ", ".join(fresh))
    return model


def _holds_stage_1(folder: str) -> bool:
    """Whether the folder says that its model was trained without patch-concept alignment."""
    return not ConceptCLIPConfig.from_pretrained(folder).use_patch_concept_alignment


def _read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or repository; code that it brings is not run, nor asked about."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return tokenizer


def _load_or_learn_tokenizer(
    section: ModelSection, captions: Iterable[str], max_length: int
) -> PreTrainedTokenizerBase:
    """The tokenizer named, that of the text tower, or one learned from the captions (the same in every process)."""
    source = section.tokenizer or section.text_tower
    if source is not None:
        return _read_tokenizer(source)
    logger.info("learning a tokenizer from the captions")
    return train_wordpiece_tokenizer(
        islice(captions, MAX_TOKENIZER_CAPTIONS), section.vocab_size, max_length=max_length
    )


def _assemble_model(
    section: ModelSection, stage: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> ConceptCLIPModel:
    """A model from two towers, or with fresh weights from a config."""
    asked = dict(section.config or {})
    if section.vision_tower is None or section.text_tower is None:
        vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        asked["text_config"] = vocabulary | asked.get("text_config", {})
        return ConceptCLIPModel(ConceptCLIPConfig(**asked, **stage))
    model = ConceptCLIPModel.from_vision_text_pretrained(section.vision_tower, section.text_tower, **stage)
    if not asked:
        return model
    # Values that change no shape, the activation for instance, reach the layers only while they are built.
    fields = model.config.to_dict()
    for name, value in asked.items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    rebuilt = ConceptCLIPModel(ConceptCLIPConfig.from_dict(fields))
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt


def _check_fit(model: ConceptCLIPModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise a ValueError where the text tower cannot take what the tokenizer gives."""
    text = model.config.text_config
    if len(tokenizer) > text.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text tower only {text.vocab_size}.")
    if max_length > text.max_position_embeddings:
        raise ValueError(
            f"data.max_length is {max_length}, but the text tower has {text.max_position_embeddings} positions."
        )
