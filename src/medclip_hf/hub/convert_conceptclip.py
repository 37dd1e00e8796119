"""ConceptCLIP's official weights (open_clip layout) to ours and back.

Every key is accounted for: converted, dropped with a reason, or an error.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from medclip_hf.hub.checkpoints import (
    Conversion,
    first_match,
    single,
    thirds,
    without_wrapper_prefix,
)

_SCALARS = ("logit_scale", "logit_bias", "concept_logit_scale", "concept_logit_bias")  # () there, (1,) here
_POSITIONS = ("visual.trunk.pos_embed", "vision_model.embeddings.position_embedding.weight")  # (1, P, D) and (P, D)
_PROBE = ("visual.trunk.attn_pool.latent", "vision_model.head.probe")
_TEXT_PREFIX = ("text.transformer.", "text_model.")
_OFFICIAL_POOL = "visual.trunk.attn_pool"
_OUR_POOL = "vision_model.head"

_DROPPED = (
    (r"text\.transformer\.embeddings\.(position_ids|token_type_ids)", "a counter, not a weight"),
    (r"text\.transformer\.pooler\.dense\.(weight|bias)", "texts are pooled by the mean of their tokens"),
)


def _module_names(num_layers: int) -> dict[str, str]:
    """Official name -> our name of every module whose weights are the same tensors, text tower aside."""
    names = {
        "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "visual.trunk.norm": "vision_model.post_layernorm",
        f"{_OFFICIAL_POOL}.proj": f"{_OUR_POOL}.attention.out_proj",
        f"{_OFFICIAL_POOL}.norm": f"{_OUR_POOL}.layernorm",
        f"{_OFFICIAL_POOL}.mlp.fc1": f"{_OUR_POOL}.mlp.fc1",
        f"{_OFFICIAL_POOL}.mlp.fc2": f"{_OUR_POOL}.mlp.fc2",
        "text.proj": "text_projection",
        "image_proj.0": "patch_projection.fc1",
        "image_proj.2": "patch_projection.fc2",
        "text_proj.0": "token_projection.fc1",
        "text_proj.2": "token_projection.fc2",
    }
    for layer in range(num_layers):
        block, ours = f"visual.trunk.blocks.{layer}", f"vision_model.encoder.layers.{layer}"
        names |= {
            f"{block}.norm1": f"{ours}.layer_norm1",
            f"{block}.norm2": f"{ours}.layer_norm2",
            f"{block}.attn.proj": f"{ours}.self_attn.out_proj",
            f"{block}.mlp.fc1": f"{ours}.mlp.fc1",
            f"{block}.mlp.fc2": f"{ours}.mlp.fc2",
        }
    return names


def _count_layers(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state_dict)


def from_official_state_dict(official: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights of [`ConceptCLIPModel`] from the release's names, and the dropped keys with the reason for each.

    Args and errors: see [`convert_official`].
    """
    conversion = convert_official(official)
    return conversion.weights, conversion.dropped


def convert_official(official: Mapping[str, Tensor]) -> Conversion:
    """Weights of [`ConceptCLIPModel`] from the release's names, with the source of each and what was dropped.

    Fused projections of the blocks are split into query, key and value, those of the pooling head joined into one;
    scalars become vectors of one element. Weights of either stage convert; a `module.` of a distributed wrapper goes.
    The weights are views of those given, joined ones aside.

    Args:
        official: the open_clip state dict, as `model.safetensors` on the Hub or "state_dict" of a training file.

    Raises:
        ValueError: naming each key that is unknown, or half of a pair that belongs together.
    """
    rest = without_wrapper_prefix(official)
    conversion = Conversion(dropped={key: match[1] for key in rest if (match := first_match(_DROPPED, key))})
    rest = {key: value for key, value in rest.items() if key not in conversion.dropped}
    num_layers = _count_layers(rest, r"visual\.trunk\.blocks\.\d+\.norm1\.weight")
    names = _module_names(num_layers)
    _convert_attention(rest, num_layers, conversion)
    unknown = []
    for key, value in rest.items():
        module, _, leaf = key.rpartition(".")
        if key in _SCALARS:
            conversion.add(key, single(key, value), key)
        elif key == _POSITIONS[0]:
            conversion.add(_POSITIONS[1], value.squeeze(0), key)
        elif key == _PROBE[0]:
            conversion.add(_PROBE[1], value, key)
        elif key.startswith(_TEXT_PREFIX[0]):
            conversion.add(_TEXT_PREFIX[1] + key.removeprefix(_TEXT_PREFIX[0]), value, key)
        elif module in names:
            conversion.add(f"{names[module]}.{leaf}", value, key)
        else:
            unknown.append(key)
    if unknown or not num_layers:
        raise ValueError(
            f"This is no checkpoint of ConceptCLIP: {num_layers} blocks of its image tower, unknown keys "
            f"{sorted(unknown)}. Pass the open_clip state dict."
        )
    return conversion


def _convert_attention(rest: dict[str, Tensor], num_layers: int, conversion: Conversion) -> None:
    """Moves the input projections of all attention layers from `rest` to the conversion."""
    for kind in ("weight", "bias"):
        for layer in range(num_layers):
            key = f"visual.trunk.blocks.{layer}.attn.qkv.{kind}"
            for name, part in zip("qkv", thirds(key, _pop(rest, key)), strict=True):
                conversion.add(f"vision_model.encoder.layers.{layer}.self_attn.{name}_proj.{kind}", part, key)
        if num_layers:
            keys = [f"{_OFFICIAL_POOL}.{name}.{kind}" for name in ("q", "kv")]
            parts = [_pop(rest, key) for key in keys]
            shapes = [tuple(part.shape) for part in parts]
            if () in shapes or shapes[0][1:] != shapes[1][1:]:
                raise ValueError(f"{keys} of the pooling head have shapes {shapes}, which do not belong together.")
            joined = torch.cat(parts)
            conversion.add(f"{_OUR_POOL}.attention.in_proj_{kind}", joined, *keys)


def _pop(state_dict: dict[str, Tensor], key: str) -> Tensor:
    if key not in state_dict:
        raise ValueError(f"This checkpoint of ConceptCLIP is incomplete: {key} is missing.")
    return state_dict.pop(key)


def to_official_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's names and layout for the weights of [`ConceptCLIPModel`]; the way back is bit-equal.

    Args:
        state_dict: `ConceptCLIPModel(...).state_dict()`.

    Raises:
        ValueError: naming each key that is none of the model's, or one that is missing.
    """
    rest = dict(state_dict)
    num_layers = _count_layers(rest, r"vision_model\.encoder\.layers\.\d+\.layer_norm1\.weight")
    names = {ours: official for official, ours in _module_names(num_layers).items()}
    official = _revert_attention(rest, num_layers)
    unknown = []
    for key, value in rest.items():
        module, _, leaf = key.rpartition(".")
        if key in _SCALARS:
            official[key] = value.reshape(())
        elif key == _POSITIONS[1]:
            official[_POSITIONS[0]] = value.unsqueeze(0)
        elif key == _PROBE[1]:
            official[_PROBE[0]] = value
        elif key.startswith(_TEXT_PREFIX[1]):
            official[_TEXT_PREFIX[0] + key.removeprefix(_TEXT_PREFIX[1])] = value
        elif module in names:
            official[f"{names[module]}.{leaf}"] = value
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"These keys are none of ConceptCLIPModel: {sorted(unknown)}.")
    return official


def _revert_attention(rest: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Takes the input projections of all attention layers out of `rest` and gives them back under official names."""
    official = {}
    for kind in ("weight", "bias"):
        for layer in range(num_layers):
            ours = f"vision_model.encoder.layers.{layer}.self_attn"
            parts = [_pop(rest, f"{ours}.{name}_proj.{kind}") for name in "qkv"]
            official[f"visual.trunk.blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
        if num_layers:
            fused = _pop(rest, f"{_OUR_POOL}.attention.in_proj_{kind}")
            width = fused.shape[0] // 3
            official[f"{_OFFICIAL_POOL}.q.{kind}"] = fused[:width].clone()
            official[f"{_OFFICIAL_POOL}.kv.{kind}"] = fused[width:].clone()
    return official
