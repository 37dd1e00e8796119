"""fVLM's vision tower: a 3-D vision transformer, tokens of a CT volume."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .anatomy_masks_fvlm import count_patches
from .anatomy_pooling_fvlm import FVLMAnatomyHead, FVLMAnatomyPooling, check_heads
from .configuration_fvlm import FVLMConfig, FVLMVisionConfig


@dataclass
class FVLMVisionOutput(BaseModelOutputWithPooling):
    """What `FVLMVisionModel` gives back.

    Args:
        last_hidden_state: (B, P, hidden), layer-normed tokens of the last block.
        pooler_output: always None; tokens are pooled for each anatomy by `FVLMModel`.
        hidden_states: on request, the embeddings and every block's output.
        attentions: on request (eager attention), (B, heads, P, P) of every block.
        feature_levels: (B, L, P, hidden), the blocks asked for in `feature_layers` and then `last_hidden_state`;
            None where none was asked for.
    """

    feature_levels: Tensor | None = None


def check_pixel_values(pixel_values: Tensor, num_channels: int) -> None:
    """Refuse what is no batch of volumes."""
    if pixel_values.ndim != 5 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values has shape (batch, {num_channels}, depth, height, width), but {tuple(pixel_values.shape)} "
            "came. FVLMImageProcessor gives this shape."
        )


class FVLMPatchEmbedding(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product: the same numbers in half the time."""

    def __init__(self, config: FVLMVisionConfig) -> None:
        depth, height, width = config.patch_size_dhw
        patch_size_dhw = (depth, height, width)
        super().__init__(config.num_channels, config.hidden_size, kernel_size=patch_size_dhw, stride=patch_size_dhw)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, P, hidden) of `pixel_values` (B, channels, D, H, W)."""
        patches = pixel_values.to(self.weight.dtype)
        for dim, size in zip((2, 4, 6), self.kernel_size, strict=True):
            patches = patches.unflatten(dim, (-1, size))  # (batch, channels, d, patch_d, h, patch_h, w, patch_w)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7)
        return F.linear(patches.flatten(4).flatten(1, 3), self.weight.flatten(1), self.bias)


class FVLMVisionEmbeddings(nn.Module):
    """Patches of a volume as tokens with learned positions."""

    def __init__(self, config: FVLMVisionConfig) -> None:
        super().__init__()
        self.patch_size_dhw = config.patch_size_dhw
        self.grid_size_dhw = config.grid_size_dhw
        self.num_channels = config.num_channels
        self.initializer_range = config.initializer_range
        self.patch_embedding = FVLMPatchEmbedding(config)
        num_positions = math.prod(self.grid_size_dhw)
        self.position_embedding = nn.Parameter(torch.empty(1, num_positions, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def interpolate_pos_encoding(self, grid_size_dhw: tuple[int, int, int]) -> Tensor:
        """Positions for a grid of patches, (1, P, hidden): the learned ones, or trilinear between them."""
        if grid_size_dhw == self.grid_size_dhw:
            return self.position_embedding
        positions = self.position_embedding.unflatten(1, self.grid_size_dhw).permute(0, 4, 1, 2, 3)
        positions = F.interpolate(positions.float(), size=grid_size_dhw, mode="trilinear", align_corners=False)
        return positions.flatten(2).transpose(1, 2).to(self.position_embedding.dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, P, hidden) tokens of `pixel_values` (B, channels, D, H, W)."""
        check_pixel_values(pixel_values, self.num_channels)
        grid_size_dhw = count_patches(pixel_values.shape[2:], self.patch_size_dhw, "pixel_values")
        hidden_states = self.patch_embedding(pixel_values)  # (batch, num_patches, hidden)
        return self.dropout(hidden_states + self.interpolate_pos_encoding(grid_size_dhw))


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention spelled out, with its weights; the shape of transformers' attention functions."""
    attention_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        attention_weights = attention_weights + attention_mask
    attention_weights = attention_weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    attention_weights = F.dropout(attention_weights, p=dropout, training=module.training)
    return torch.matmul(attention_weights, value).transpose(1, 2).contiguous(), attention_weights


class FVLMVisionAttention(nn.Module):
    """Self-attention of one block."""

    def __init__(self, config: FVLMVisionConfig) -> None:
        super().__init__()
        check_heads(config.hidden_size, config.num_attention_heads, "num_attention_heads")
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> tuple[Tensor, Tensor | None]:
        """(B, P, hidden) attended tokens, and the weights (B, heads, P, P) where the implementation gives them."""
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # (batch, heads, num_patches, head_dim)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention_output, attention_weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            is_causal=self.is_causal,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        attention_output = attention_output.reshape(*input_shape, -1).contiguous()
        return self.out_proj(attention_output), attention_weights


class FVLMVisionMLP(nn.Module):
    """Two-layer perceptron of one block."""

    def __init__(self, config: FVLMVisionConfig) -> None:
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, P, hidden) -> (B, P, hidden)."""
        hidden_states = self.dropout(self.activation_fn(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class FVLMVisionLayer(GradientCheckpointingLayer):
    """One pre-norm transformer block."""

    def __init__(self, config: FVLMVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = FVLMVisionAttention(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FVLMVisionMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        """(B, P, hidden) -> (B, P, hidden)."""
        attention_output, _ = self.self_attn(self.layer_norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attention_output)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class FVLMPreTrainedModel(PreTrainedModel):
    """What the models share: initial weights and what they support."""

    config: FVLMConfig
    base_model_prefix = "fvlm"
    input_modalities: tuple[str, ...] = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["FVLMVisionEmbeddings", "FVLMVisionLayer", "FVLMAnatomyPooling", "FVLMAnatomyHead"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FVLMVisionEmbeddings):
            init.trunc_normal_(module.position_embedding, std=module.initializer_range)
        elif isinstance(module, FVLMAnatomyHead):
            init.zeros_(module.query)  # the first step pools a plain mean, as in the release
        elif isinstance(module, FVLMAnatomyPooling):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)


class FVLMVisionModel(FVLMPreTrainedModel):
    """The 3-D vision transformer alone: tokens of a CT volume.

    Examples:
        >>> model = FVLMVisionModel(FVLMVisionConfig(num_hidden_layers=1))
        >>> model(pixel_values=torch.zeros(1, 1, 112, 256, 352)).last_hidden_state.shape
        torch.Size([1, 1232, 768])
    """

    config: FVLMVisionConfig  # type: ignore[assignment]
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {"hidden_states": FVLMVisionLayer, "attentions": FVLMVisionAttention}  # noqa: RUF012

    def __init__(self, config: FVLMVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = FVLMVisionEmbeddings(config)
        self.layers = nn.ModuleList([FVLMVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        feature_layers: Sequence[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FVLMVisionOutput:
        """Tokens of the volumes, and on request those of earlier blocks.

        Args:
            pixel_values: (B, channels, D, H, W) in [0, 1], each size a multiple of the patch. Positions are
                interpolated where the grid is not that of the training crops.
            feature_layers: 0-based blocks whose outputs, not layer-normed, are given back in `feature_levels`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: the shape is not as described, or there is no such block.
        """
        if any(not 0 <= index < len(self.layers) for index in feature_layers or ()):
            raise ValueError(f"feature_layers {tuple(feature_layers or ())}: blocks are 0 to {len(self.layers) - 1}.")
        hidden_states = self.embeddings(pixel_values)
        levels = []
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, **kwargs)
            if feature_layers is not None and index in feature_layers:
                levels.append(hidden_states)
        hidden_states = self.post_layernorm(hidden_states)
        return FVLMVisionOutput(
            last_hidden_state=hidden_states,
            feature_levels=None if feature_layers is None else torch.stack([*levels, hidden_states], dim=1),
        )


__all__ = ["FVLMPreTrainedModel", "FVLMVisionModel", "FVLMVisionOutput"]
