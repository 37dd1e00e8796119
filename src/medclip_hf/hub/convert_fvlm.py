"""fVLM's official weights to ours and back, and starting weights from an image MAE and a BERT.

The official file is `{"model", "optimizer", "config", "scaler", "epoch"}`; only "model" is used. Every key is
accounted for: converted, dropped with a reason, or an error.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from medclip_hf.hub.checkpoints import (
    Conversion,
    first_match,
    load_without_gap,
    read_weights,
    single,
    thirds,
    without_wrapper_prefix,
)
from medclip_hf.hub.convert_configs import tower_fields
from medclip_hf.modeling.fvlm import FVLMModel, FVLMVisionModel
from medclip_hf.modeling.fvlm.configuration_fvlm import FVLMConfig

logger = logging.getLogger(__name__)

# (pattern of an official key, ours). Keys that need more than a new name are handled by name below.
_RENAMED = (
    (r"attention\.(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)", r"anatomy_pooling.\1"),
    (r"vision_projs\.(\d+)\.(weight|bias)", r"anatomy_heads.\1.projection.\2"),
    (r"text_proj\.(weight|bias)", r"text_projection.\1"),
    (r"text_encoder\.(embeddings\.(?:word_embeddings|position_embeddings|LayerNorm)\..+)", r"text_model.\1"),
    (r"text_encoder\.(encoder\.layer\..+)", r"text_model.\1"),
    (r"visual_encoder\.patch_embedding\.position_embeddings", r"vision_model.embeddings.position_embedding"),
    (
        r"visual_encoder\.patch_embedding\.patch_embeddings\.(weight|bias)",
        r"vision_model.embeddings.patch_embedding.\1",
    ),
    (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.(weight|bias)", r"vision_model.layers.\1.layer_norm\2.\3"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"vision_model.layers.\1.self_attn.out_proj.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.linear([12])\.(weight|bias)", r"vision_model.layers.\1.mlp.fc\2.\3"),
    (r"visual_encoder\.norm\.(weight|bias)", r"vision_model.post_layernorm.\1"),
)
_RENAMED_BACK = (
    (r"anatomy_pooling\.(.+)", r"attention.\1"),
    (r"anatomy_heads\.(\d+)\.projection\.(weight|bias)", r"vision_projs.\1.\2"),
    (r"text_projection\.(weight|bias)", r"text_proj.\1"),
    (r"text_model\.(.+)", r"text_encoder.\1"),
    (r"vision_model\.embeddings\.position_embedding", r"visual_encoder.patch_embedding.position_embeddings"),
    (
        r"vision_model\.embeddings\.patch_embedding\.(weight|bias)",
        r"visual_encoder.patch_embedding.patch_embeddings.\1",
    ),
    (r"vision_model\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)", r"visual_encoder.blocks.\1.norm\2.\3"),
    (r"vision_model\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"visual_encoder.blocks.\1.attn.out_proj.\2"),
    (r"vision_model\.layers\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"visual_encoder.blocks.\1.mlp.linear\2.\3"),
    (r"vision_model\.post_layernorm\.(weight|bias)", r"visual_encoder.norm.\1"),
)
_FUSED_QKV = re.compile(r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")

_DROPPED = (
    (r"text_encoder\.cls\..+", "head of masked language modelling, frozen and without use in the forward pass"),
    (r"text_encoder\.embeddings\.position_ids", "a counter, not a weight"),
    (r"text_encoder\.embeddings\.token_type_embeddings\.weight", "never added by the release: zeros take its place"),
    (r"text_encoder\.pooler\..+", "[CLS] is used without a pooler"),
    (r"text_encoder\..+\.crossattention\..+", "cross-attention is never called"),
    (
        r"visual_encoder\.blocks\.\d+\.(norm_cross_attn|cross_attn)\..+",
        "cross-attention of MONAI's block, never called",
    ),
)

_TYPE_EMBEDDINGS = "text_model.embeddings.token_type_embeddings.weight"
_TEXT_POSITIONS = "text_model.embeddings.position_embeddings.weight"


def from_official_state_dict(official: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights of `FVLMModel` from the release's names, and the keys that were dropped with the reason for each.

    Args and errors: see `convert_official`.
    """
    conversion = convert_official(official)
    return conversion.weights, conversion.dropped


def convert_official(official: Mapping[str, Tensor]) -> Conversion:
    """Weights of `FVLMModel` from the release's names, with the source of each and what was dropped.

    Fused qkv is split into three, the temperature becomes a log scale, and token types become zeros, because the
    release adds none. The weights are views of those given, these two aside.

    Args:
        official: `torch.load(path, weights_only=True)["model"]`.

    Raises:
        ValueError: a key is unknown, or one that every model needs is missing.
    """
    conversion = Conversion()
    unknown: list[str] = []
    for key, value in without_wrapper_prefix(official).items():
        if leftover := first_match(_DROPPED, key):
            conversion.dropped[key] = leftover[1]
        elif key == "temp":
            conversion.add("logit_scale", _log_scale(single(key, value)), key)
        elif key == "query_tokens":
            if value.ndim != 2:
                raise ValueError(f"query_tokens has shape {tuple(value.shape)}; expected (anatomies, hidden).")
            for index, row in enumerate(value):
                conversion.add(f"anatomy_heads.{index}.query", row, key)
        elif match := _FUSED_QKV.fullmatch(key):
            for name, part in zip("qkv", thirds(key, value), strict=True):
                conversion.add(f"vision_model.layers.{match[1]}.self_attn.{name}_proj.{match[2]}", part, key)
        elif renamed := first_match(_RENAMED, key):
            conversion.add(renamed[0].expand(renamed[1]), value, key)
        else:
            unknown.append(key)
    weights = conversion.weights
    missing = [key for key in ("logit_scale", "anatomy_heads.0.query", _TEXT_POSITIONS) if key not in weights]
    if unknown or missing:
        raise ValueError(
            f"This is no checkpoint of fVLM: unknown keys {sorted(unknown)}, missing after renaming {missing}. "
            "Pass the dict under the key 'model' of the official file."
        )
    positions = weights[_TEXT_POSITIONS]
    conversion.add(_TYPE_EMBEDDINGS, positions.new_zeros(2, *positions.shape[1:]))
    return conversion


def _log_scale(temperature: Tensor) -> Tensor:
    """-ln of the temperature.

    Raises:
        ValueError: it is not above 0.
    """
    if not temperature.item() > 0:
        raise ValueError(f"temp is {temperature.item()}, but a temperature is above 0: the weights are damaged.")
    return -temperature.double().log().to(temperature.dtype)


def to_official_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's names and layout for the weights of `FVLMModel`.

    Token types, of which the release adds none, are folded into the positions: type 0 is added to every token.

    Args:
        state_dict: `FVLMModel(...).state_dict()`.

    Raises:
        ValueError: a key is not one of `FVLMModel`.
    """
    ours = dict(state_dict)
    token_types = ours.pop(_TYPE_EMBEDDINGS)
    ours[_TEXT_POSITIONS] = ours[_TEXT_POSITIONS] + token_types[0]
    num_anatomies = sum(re.fullmatch(r"anatomy_heads\.\d+\.query", key) is not None for key in ours)
    num_layers = sum(re.fullmatch(r"vision_model\.layers\.\d+\.layer_norm1\.weight", key) is not None for key in ours)
    scale = ours.pop("logit_scale")
    official = {
        "temp": (-scale.double()).exp().to(scale.dtype).reshape(()),
        "query_tokens": torch.stack([ours.pop(f"anatomy_heads.{index}.query") for index in range(num_anatomies)]),
    }
    for layer in range(num_layers):
        for kind in ("weight", "bias"):
            parts = [ours.pop(f"vision_model.layers.{layer}.self_attn.{name}_proj.{kind}") for name in "qkv"]
            official[f"visual_encoder.blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    unknown = []
    for key, value in ours.items():
        renamed = first_match(_RENAMED_BACK, key)
        if renamed is None:
            unknown.append(key)
        else:
            official[renamed[0].expand(renamed[1])] = value
    if unknown:
        raise ValueError(f"These keys are none of FVLMModel: {sorted(unknown)}.")
    return official


# Starting points -------------------------------------------------------------------------------------------------

_MAE_RENAMED = (
    (r"blocks\.(\d+)\.norm([12])\.(weight|bias)", r"layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"layers.\1.self_attn.out_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"layers.\1.mlp.fc\2.\3"),
    (r"norm\.(weight|bias)", r"post_layernorm.\1"),
)
_MAE_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_MAE_DROPPED = (
    (r"(decoder|head|fc_norm).*", "not part of the encoder"),
    (r"(mask_token|cls_token)", "the 3-D tower has no such token"),
)


def initialize_from_mae(
    vision_model: FVLMVisionModel,
    weights: Mapping[str, Tensor],
    *,
    patch_embedding: Literal["random", "inflated"] = "random",
) -> dict[str, str]:
    """Sets a 3-D tower to the weights of a 2-D MAE or ViT encoder, in place; returns what was dropped, with reasons.

    The blocks and the last norm are taken as they are. Positions: the [CLS] slot is dropped, the square grid is
    resized bilinearly to (rows, columns) of the 3-D grid and repeated over depth, as the release does.

    Args:
        vision_model: the tower to set.
        weights: names of the MAE release (`mae_pretrain_vit_base.pth`, key "model") and of timm.
        patch_embedding: "random" leaves the patch embedding at its initial values, as the release does. "inflated"
            sums the 2-D kernel over colours, resizes it to (height, width) and spreads it evenly over depth, so that
            a volume that repeats one grey image gives the response of that image.

    Raises:
        ValueError: a key is unknown or missing, or a shape does not fit.
    """
    if patch_embedding not in ("random", "inflated"):
        raise ValueError(f"patch_embedding is 'random' or 'inflated', but {patch_embedding!r} came.")
    converted: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    embeddings = vision_model.embeddings
    for key, value in without_wrapper_prefix(weights).items():
        if key == "pos_embed":
            converted["embeddings.position_embedding"] = _inflate_positions(value, embeddings.grid_size_dhw)
        elif key == "patch_embed.proj.weight" and patch_embedding == "inflated":
            size = embeddings.patch_embedding.weight.shape
            converted["embeddings.patch_embedding.weight"] = _inflate_patch_embedding(value, size)
        elif key == "patch_embed.proj.bias" and patch_embedding == "inflated":
            converted["embeddings.patch_embedding.bias"] = value
        elif key.startswith("patch_embed."):
            dropped[key] = "2-D; the 3-D patch embedding starts random"
        elif match := _MAE_QKV.fullmatch(key):
            names = (f"layers.{match[1]}.self_attn.{name}_proj.{match[2]}" for name in "qkv")
            converted |= dict(zip(names, thirds(key, value), strict=True))
        elif renamed := first_match(_MAE_RENAMED, key):
            converted[renamed[0].expand(renamed[1])] = value
        elif leftover := first_match(_MAE_DROPPED, key):
            dropped[key] = leftover[1]
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"These keys belong to no MAE or ViT encoder that is known here: {sorted(unknown)}.")
    if patch_embedding == "random":
        own = embeddings.patch_embedding.state_dict()
        converted |= {f"embeddings.patch_embedding.{name}": value for name, value in own.items()}
    load_without_gap(vision_model, converted, "the image checkpoint")
    return dropped


def _inflate_positions(positions: Tensor, grid_size_dhw: tuple[int, int, int]) -> Tensor:
    """(1, 1 + n * n, hidden) positions of a square image -> (1, d * h * w, hidden), alike at every depth."""
    side = math.isqrt(max(0, positions.shape[1] - 1)) if positions.ndim == 3 else 0
    if side == 0 or side * side != positions.shape[1] - 1:
        raise ValueError(f"pos_embed has shape {tuple(positions.shape)}; a square grid and one [CLS] are needed.")
    depth, height, width = grid_size_dhw
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(height, width), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).repeat(1, depth, 1)


def _inflate_patch_embedding(weight: Tensor, size: torch.Size) -> Tensor:
    """(hidden, colours, h, w) -> (hidden, 1, D, H, W) with the same response to a constant input."""
    _, channels, depth, height, width = size
    grey = weight.float().sum(dim=1, keepdim=True)
    resized = F.interpolate(grey, size=(height, width), mode="bilinear", align_corners=False)
    resized = resized * (weight.shape[2] * weight.shape[3]) / (height * width * depth * channels)
    return resized[:, :, None].expand(-1, channels, depth, -1, -1).clone()


def from_towers(
    config: FVLMConfig | None = None,
    *,
    mae_path: str | Path | None = None,
    text_path: str | Path | None = None,
    patch_embedding: Literal["random", "inflated"] = "random",
) -> FVLMModel:
    """`FVLMModel` that starts from an image MAE and from any BERT, or from scratch where one is left out.

    Args:
        config: architecture. With `text_path` its `text_config` is replaced by that BERT's.
        mae_path: file of an MAE or ViT encoder (.pth or .safetensors), see `initialize_from_mae`.
        text_path: folder or Hub name of a BERT, CXR-BERT as well; code that it brings is not run. Its
            dropout is raised to that of the config given here.
        patch_embedding: see `initialize_from_mae`.
    """
    values: dict[str, Any] = (config or FVLMConfig()).to_dict()
    if text_path is not None:
        dropouts = {
            name: values["text_config"][name] for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
        }
        values["text_config"] = tower_fields(BertConfig.from_pretrained(text_path)) | dropouts
    model = FVLMModel(FVLMConfig.from_dict(values))
    if text_path is not None:
        loaded: Any = BertModel.from_pretrained(text_path, add_pooling_layer=False, output_loading_info=True)
        text_model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{text_path} is no complete BERT: {len(missing)} weights are missing, as {missing[0]}.")
        load_without_gap(model.text_model, text_model.state_dict(), str(text_path))
    if mae_path is not None:
        dropped = initialize_from_mae(model.vision_model, read_weights(mae_path), patch_embedding=patch_embedding)
        logger.info("%s: dropped %s", mae_path, dropped)
    return model
