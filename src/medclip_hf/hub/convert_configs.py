"""The architecture of an official checkpoint, read off the shapes of its weights.

Widths, depths, patch sizes and vocabularies show in the shapes. What does not is taken from the published models where
the rest equals theirs, and must be told otherwise: heads, and the size of the images or crops.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from medclip_hf.data.ct.anatomy import ALL_ANATOMIES, THORACIC_ANATOMIES
from medclip_hf.hub.checkpoints import bare_name
from medclip_hf.modeling.conceptclip import ConceptCLIPConfig
from medclip_hf.modeling.fvlm import FVLMConfig

Architecture = Literal["conceptclip", "fvlm"]

_MARKS: dict[Architecture, tuple[str, ...]] = {
    "conceptclip": ("visual.trunk.pos_embed", "text.proj.weight"),
    "fvlm": ("query_tokens", "visual_encoder.patch_embedding.position_embeddings"),
}
_SECOND_STAGE = ("concept_logit_", "patch_projection.", "token_projection.")
_OF_THE_FOLDER = ("_name_or_path", "architectures", "auto_map", "transformers_version")
# Width of a tower -> its heads, of the towers that both papers use.
_VISION_HEADS = {1152: 16, 768: 12}
_BERT_HEADS = {768: 12}
_PUBLISHED_GRID = {(27, 14): 384}  # patches a side and patch size -> pixels; 384 is no multiple of 14
_PUBLISHED_FVLM_POSITIONS: dict[tuple[int, tuple[int, ...]], tuple[int, int, int]] = {
    (1232, (16, 16, 32)): (112, 256, 352),
}


def detect_architecture(keys: Mapping[str, Any]) -> Architecture:
    """Whose official weights these are, by their names.

    Raises:
        ValueError: neither model's.
    """
    names = {bare_name(key) for key in keys}
    for architecture, marks in _MARKS.items():
        if names.issuperset(marks):
            return architecture
    if {"vision_model.embeddings.patch_embedding.weight", "text_projection.weight"} <= names:
        raise ValueError("these weights have this package's names already: load their folder with from_pretrained.")
    examples = ", ".join(sorted(names)[:3]) or "none"
    raise ValueError(
        f"these are weights of another architecture: {len(names)} keys such as {examples}, but neither "
        f"{' and '.join(_MARKS['conceptclip'])} of ConceptCLIP nor {' and '.join(_MARKS['fvlm'])} of fVLM."
    )


def conceptclip_config(weights: Mapping[str, Tensor], overrides: Mapping[str, Any] | None = None) -> ConceptCLIPConfig:
    """The configuration that converted weights fit.

    Args:
        weights: of `ConceptCLIPModel`, under our names.
        overrides: fields of `ConceptCLIPConfig`, merged into what the shapes tell.

    Raises:
        ValueError: naming what the shapes do not tell and the overrides leave out.
    """
    patches = _shape(weights, "vision_model.embeddings.patch_embedding.weight", 4)
    hidden_size, patch_size = patches[0], patches[-1]
    side = math.isqrt(_shape(weights, "vision_model.embeddings.position_embedding.weight", 2)[0])
    layer = "vision_model.encoder.layers"
    vision = {
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(weights, rf"{re.escape(layer)}\.\d+\.layer_norm1\.weight"),
        "intermediate_size": _shape(weights, f"{layer}.0.mlp.fc1.weight", 2)[0],
        "image_size": _PUBLISHED_GRID.get((side, patch_size), side * patch_size),
        "patch_size": patch_size,
        "hidden_act": "gelu",  # exact, as the weights were trained; SigLIP's own configurations say tanh
        "layer_norm_eps": 1e-6,
    } | _heads("num_attention_heads", _VISION_HEADS, hidden_size)
    values = {
        "vision_config": vision,
        "text_config": _bert_values(weights),
        "use_patch_concept_alignment": any(key.startswith(_SECOND_STAGE) for key in weights),
    }
    check_fields(ConceptCLIPConfig, overrides)
    merged = _merged(values, overrides)
    _require(merged, {"vision_config": ("num_attention_heads",), "text_config": ("num_attention_heads",)})
    return configured(ConceptCLIPConfig, merged)


def fvlm_config(weights: Mapping[str, Tensor], overrides: Mapping[str, Any] | None = None) -> FVLMConfig:
    """The configuration that converted weights fit.

    Args:
        weights: of `FVLMModel`, under our names.
        overrides: fields of `FVLMConfig`, merged into what the shapes tell.

    Raises:
        ValueError: naming what the shapes do not tell and the overrides leave out.
    """
    hidden_size, _, *patch_size_dhw = _shape(weights, "vision_model.embeddings.patch_embedding.weight", 5)
    num_positions = _shape(weights, "vision_model.embeddings.position_embedding", 3)[1]
    vision: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(weights, r"vision_model\.layers\.\d+\.layer_norm1\.weight"),
        "intermediate_size": _shape(weights, "vision_model.layers.0.mlp.fc1.weight", 2)[0],
        "patch_size_dhw": tuple(patch_size_dhw),
    } | _heads("num_attention_heads", _VISION_HEADS, hidden_size)
    if image_size_dhw := _PUBLISHED_FVLM_POSITIONS.get((num_positions, tuple(patch_size_dhw))):
        vision["image_size_dhw"] = image_size_dhw
    values = {
        "vision_config": vision,
        "text_config": _bert_values(weights),
        "projection_dim": _shape(weights, "text_projection.weight", 2)[0],
    }
    num_anatomies = _count(weights, r"anatomy_heads\.\d+\.query")
    for anatomies in (THORACIC_ANATOMIES, ALL_ANATOMIES):
        if len(anatomies) == num_anatomies:
            values["anatomies"] = anatomies
    check_fields(FVLMConfig, overrides)
    merged = _merged(values, overrides)
    needed = {"vision_config": ("num_attention_heads", "image_size_dhw"), "text_config": ("num_attention_heads",)}
    _require(merged, needed)
    if "anatomies" not in merged:
        raise ValueError(
            f"the checkpoint has {num_anatomies} anatomies; name them in its order in the configuration: "
            '{"anatomies": ["...", ...]}.'
        )
    return configured(FVLMConfig, merged)


def check_fields(config_class: type[PreTrainedConfig], given: Mapping[str, Any] | None) -> None:
    """Refuse fields that a configuration, or that of a tower, does not have.

    Raises:
        ValueError: naming them.
    """
    config: Any = config_class()
    places: dict[str, tuple[Any, Any]] = {"the configuration": (config, given or {})}
    for tower in ("vision_config", "text_config"):
        own = (given or {}).get(tower, {})
        if not isinstance(own, Mapping):
            raise ValueError(f"{tower} must be an object with fields, but {own!r} came.")
        places[tower] = (getattr(config, tower), own)
    for place, (part, own) in places.items():
        known = {field.name for field in fields(part)}
        if unknown := sorted(own.keys() - known):
            raise ValueError(
                f"{place} of {config_class.model_type} has no {unknown}. Write the names of its own class."
            )


def tower_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a tower's configuration, without the path, the class and the code of the folder it came from."""
    return {key: value for key, value in config.to_dict().items() if key not in _OF_THE_FOLDER}


def configured(config_class: Any, values: Mapping[str, Any]) -> Any:
    """The configuration with these values.

    Raises:
        ValueError: one of them is of another kind than its field.
    """
    try:
        return config_class.from_dict(dict(values))
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error


def without_weights(model_class: Any, config: PreTrainedConfig) -> Any:
    """A model of this configuration on the meta device.

    Raises:
        ValueError: none can be built: sizes below 1, an activation that does not exist.
    """
    try:
        with torch.device("meta"):
            return model_class(config)
    except (ArithmeticError, LookupError, RuntimeError) as error:
        raise ValueError(f"no model can be built with this configuration: {type(error).__name__}: {error}") from error


def _bert_values(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vocab_size, hidden_size = _shape(weights, "text_model.embeddings.word_embeddings.weight", 2)
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(weights, r"text_model\.encoder\.layer\.\d+\.attention\.self\.query\.weight"),
        "max_position_embeddings": _shape(weights, "text_model.embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": _shape(weights, "text_model.embeddings.token_type_embeddings.weight", 2)[0],
    } | _heads("num_attention_heads", _BERT_HEADS, hidden_size)
    if values["num_hidden_layers"]:  # a bag of words, as in the demo, has none
        inner = _shape(weights, "text_model.encoder.layer.0.intermediate.dense.weight", 2)
        values["intermediate_size"] = inner[0]
    return values


def _heads(name: str, known: Mapping[int, int], width: int) -> dict[str, Any]:
    return {name: known[width]} if width in known else {}


def _shape(weights: Mapping[str, Tensor], key: str, num_dims: int) -> tuple[int, ...]:
    if key not in weights:
        raise ValueError(f"the checkpoint is incomplete: nothing in it becomes {key}.")
    shape = tuple(weights[key].shape)
    if len(shape) != num_dims or 0 in shape:
        raise ValueError(f"{key} has {num_dims} axes, none empty, but a weight of shape {shape} came: it is damaged.")
    return shape


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in weights)


def _merged(values: dict[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """The values with the overrides in their place, tower by tower."""
    merged = dict(values)
    for key, value in (overrides or {}).items():
        own = merged.get(key)
        merged[key] = own | dict(value) if isinstance(own, dict) and isinstance(value, Mapping) else value
    return merged


def _require(values: Mapping[str, Any], needed: Mapping[str, tuple[str, ...]]) -> None:
    missing = {
        tower: {name: "..." for name in names if name not in values[tower]}
        for tower, names in needed.items()
        if any(name not in values[tower] for name in names)
    }
    if missing:
        raise ValueError(
            "the shapes of the weights do not tell these values; give them in a JSON file with --config: "
            f"{missing}".replace("'", '"')
        )
    for tower in needed:
        heads = values[tower]["num_attention_heads"]
        if not isinstance(heads, int) or heads < 1:
            raise ValueError(f"num_attention_heads of {tower} must be a whole number above 0, but {heads!r} came.")
