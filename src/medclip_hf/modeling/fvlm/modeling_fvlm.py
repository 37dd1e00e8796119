"""fVLM: a CT volume gives one embedding for each anatomy, compared with texts about that anatomy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .anatomy_masks_fvlm import anatomy_token_mask, count_patches, touching_anatomies
from .configuration_fvlm import FVLMConfig, FVLMVisionConfig
from .loss_fvlm import anatomy_alignment_loss

# Bounds of the temperature in the release, which clamps it before every training step.
MIN_TEMPERATURE = 0.001
MAX_TEMPERATURE = 0.5


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


@dataclass
class FVLMAnatomyOutput(BaseModelOutputWithPooling):
    """What `FVLMModel.get_image_features` gives back.

    Args:
        last_hidden_state: (B, P, hidden), tokens of the volume.
        pooler_output: (B, A, projection_dim), one projected embedding for each anatomy, not normalised.
        hidden_states: on request, see `FVLMVisionOutput`.
        attentions: on request, see `FVLMVisionOutput`.
        anatomy_present: (B, A) bool, the anatomy owns at least one token; rows of others are zero.
        anatomy_attentions: (B, heads, A, L, P), what each anatomy's query looked at, by level and token; sums to 1
            over the last two axes where the anatomy is present.
    """

    anatomy_present: Tensor | None = None
    anatomy_attentions: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Values that are there, as plain as a tuple's readers expect."""
        return _plain_values(self)


@dataclass
class FVLMOutput(ModelOutput):
    """What `FVLMModel` gives back; T texts, B volumes, A anatomies.

    Args:
        loss: scalar, with `return_loss=True`: the sum of `anatomy_losses`.
        anatomy_losses: (A,), zero where an anatomy has nothing to learn from the batch.
        logits_per_anatomy: (B, A, T), scaled cosine of every anatomy with every text; a zero-shot probability is the
            softmax over the (absent, present) prompts of a finding.
        anatomy_embeds: (B, A, projection_dim), L2-normalised, zero where not present.
        anatomy_present: (B, A) bool, the anatomy owns at least one token.
        text_embeds: (T, projection_dim), L2-normalised.
        logit_scale: (1,), exponentiated: one over the temperature.
        text_model_output: output of the text tower.
        vision_model_output: output of the vision tower with what was pooled from it.
    """

    loss: Tensor | None = None
    anatomy_losses: Tensor | None = None
    logits_per_anatomy: Tensor | None = None
    anatomy_embeds: Tensor | None = None
    anatomy_present: Tensor | None = None
    text_embeds: Tensor | None = None
    logit_scale: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: FVLMAnatomyOutput | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Values that are there, as plain as a tuple's readers expect."""
        return _plain_values(self)


def _plain_values(output: ModelOutput) -> tuple[Any, ...]:
    """Nested outputs as tuples and masks as 0 and 1: whatever reads tuples may do arithmetic on every entry."""
    values = (value.to_tuple() if isinstance(value, ModelOutput) else value for value in output.values())
    return tuple(value.long() if isinstance(value, Tensor) and value.dtype == torch.bool else value for value in values)


# Vision tower ----------------------------------------------------------------------------------------------------


def _check_pixel_values(pixel_values: Tensor, num_channels: int) -> None:
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
        _check_pixel_values(pixel_values, self.num_channels)
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


def _check_heads(hidden_size: int, num_heads: int, name: str) -> None:
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} of the vision tower must be a multiple of {name} {num_heads}.")


class FVLMVisionAttention(nn.Module):
    """Self-attention of one block."""

    def __init__(self, config: FVLMVisionConfig) -> None:
        super().__init__()
        _check_heads(config.hidden_size, config.num_attention_heads, "num_attention_heads")
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


# Anatomy pooling -------------------------------------------------------------------------------------------------


class FVLMAnatomyHead(nn.Module):
    """What belongs to one anatomy alone: its query into the volume and its projection into the shared space.

    A module of its own for each anatomy, so that anatomies can be added, trained and frozen one by one.
    """

    def __init__(self, hidden_size: int, projection_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(hidden_size))
        self.projection = nn.Linear(hidden_size, projection_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, hidden) -> (B, projection_dim)."""
        return self.projection(pooled)


class FVLMAnatomyPooling(nn.Module):
    """Multi-head attention of one query for each anatomy over the tokens of that anatomy.

    The numbers and the parameters are those of `nn.MultiheadAttention`, but no token is projected: with q, k, v linear,

        <W_q q, W_k x> = <W_k^T W_q q, x>    and    sum_j p_j W_v x_j = W_v sum_j p_j x_j,

    so the few queries are carried back to the space of the tokens and the few pooled vectors forward. For 4 anatomies
    and 4928 tokens this is 1/48 of the multiplications, and no key or value of a token is kept for the backward pass.
    The key's bias adds the same number to all scores of a query, so softmax cancels it; it is kept for conversion.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        _check_heads(hidden_size, num_heads, "pooling_num_attention_heads")
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.attention_dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, levels: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled tokens (B, A, hidden) and the attention weights (B, heads, A, L, P).

        Args:
            queries: (A, hidden).
            levels: (B, L, P, hidden), tokens of L levels of one grid.
            token_mask: (B, A, P) bool; a row without any token gives zeros.
        """
        num_levels = levels.shape[1]
        tokens = levels.flatten(1, 2)  # (B, L * P, hidden)
        is_present = token_mask.any(dim=-1)
        # Rows without a token look at everything, so that softmax stays finite, and are set to zero afterwards.
        is_seen = (token_mask | ~is_present[..., None]).repeat(1, 1, num_levels)

        scores = self._scores(queries, tokens).masked_fill(~is_seen[:, None], -math.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(tokens.dtype)  # (B, heads, A, L * P)
        kept = F.dropout(weights, p=self.attention_dropout, training=self.training)
        pooled = self.out_proj(self._values(kept, tokens))
        pooled = pooled.masked_fill(~is_present[..., None], 0.0)
        weights = weights.masked_fill(~is_present[:, None, :, None], 0.0).unflatten(-1, (num_levels, -1))
        return pooled, weights

    def _scores(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(B, heads, A, tokens): <W_q q + b_q, W_k x + b_k> / sqrt(head_dim)."""
        query_weight, key_weight, _ = self.in_proj_weight.chunk(3)
        query_bias, key_bias, _ = self.in_proj_bias.chunk(3)
        projected = F.linear(queries, query_weight, query_bias) * self.head_dim**-0.5
        projected = projected.unflatten(-1, (self.num_heads, self.head_dim))  # (A, heads, head_dim)
        key_weight = key_weight.unflatten(0, (self.num_heads, self.head_dim))
        key_bias = key_bias.unflatten(0, (self.num_heads, self.head_dim))
        carried = torch.einsum("ahc,hcd->had", projected, key_weight).flatten(0, 1)  # (heads * A, hidden)
        offsets = torch.einsum("ahc,hc->ha", projected, key_bias)
        scores = F.linear(tokens, carried).transpose(1, 2).unflatten(1, (self.num_heads, -1))
        return scores + offsets[None, :, :, None]

    def _values(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """(B, A, hidden): the heads' weighted sums of W_v x + b_v, side by side."""
        value_weight = self.in_proj_weight.chunk(3)[2].unflatten(0, (self.num_heads, self.head_dim))
        value_bias = self.in_proj_bias.chunk(3)[2].unflatten(0, (self.num_heads, self.head_dim))
        pooled = torch.matmul(weights.flatten(1, 2), tokens).unflatten(1, (self.num_heads, -1))  # (B, heads, A, hidden)
        values = torch.einsum("bhad,hcd->bahc", pooled, value_weight)
        # Dropped weights no longer sum to one, so neither does the bias that they carry.
        carried_bias = torch.einsum("bha,hc->bahc", weights.sum(dim=-1), value_bias)
        return (values + carried_bias).flatten(2)


# Models ----------------------------------------------------------------------------------------------------------


class FVLMPreTrainedModel(PreTrainedModel):
    """What both models share: initial weights and what they support."""

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
        elif isinstance(module, FVLMModel):
            init.constant_(module.logit_scale, module.config.logit_scale_init_value)


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


class FVLMModel(FVLMPreTrainedModel):
    """fVLM: CT volumes and texts in one space, compared anatomy by anatomy.

    How texts map to scans: a batch holds T distinct texts, each encoded once, and `text_index` (B, A) names the row of
    the text that belongs to an anatomy of a scan (-1: none). `text_ids` (T,) identifies texts across batches.

    Examples:
        >>> model = AutoModel.from_pretrained(folder)
        >>> processor = AutoProcessor.from_pretrained(folder)
        >>> inputs = processor(images=volume_hu, anatomy_mask=mask, text=["Not Cardiomegaly.", "Cardiomegaly."])
        >>> heart = model.config.anatomies.index("heart")
        >>> model(**inputs).logits_per_anatomy[0, heart].softmax(-1)[1]  # probability of cardiomegaly
    """

    config: FVLMConfig
    main_input_name = "input_ids"

    def __init__(self, config: FVLMConfig) -> None:
        super().__init__(config)
        text_config: Any = config.text_config
        vision_config: Any = config.vision_config
        hidden_size = vision_config.hidden_size
        self.vision_model = FVLMVisionModel._from_config(vision_config)
        self.text_model = BertModel._from_config(text_config, add_pooling_layer=False)
        self.anatomy_pooling = FVLMAnatomyPooling(
            hidden_size, config.pooling_num_attention_heads, config.pooling_dropout
        )
        self.anatomy_heads = nn.ModuleList(
            [FVLMAnatomyHead(hidden_size, config.projection_dim) for _ in config.anatomies]
        )
        self.text_projection = nn.Linear(text_config.hidden_size, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings of the text tower."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the word embeddings of the text tower."""
        self.text_model.set_input_embeddings(value)

    @torch.no_grad()
    def clamp_logit_scales_(self) -> None:
        """Keeps the temperature in [0.001, 0.5], in place; the training loop calls it after every step."""
        self.logit_scale.clamp_(-math.log(MAX_TEMPERATURE), -math.log(MIN_TEMPERATURE))

    def add_anatomies(self, anatomies: Sequence[str], *, freeze_existing: bool = False) -> None:
        """Appends heads for new anatomies; what the model gives for the old ones stays the same.

        New ids in `anatomy_mask` follow the old ones. A new query is zero, that is, a plain mean of the tokens.

        Args:
            anatomies: names that the config does not hold yet.
            freeze_existing: stop training everything that was there, towers included, so that the old anatomies give
                exactly the same results for good. `requires_grad` is not saved: after loading, freeze again.

        Raises:
            ValueError: a name is empty, repeated or there already, or the anatomies become too many.
        """
        config = type(self.config).from_dict(
            self.config.to_dict() | {"anatomies": (*self.config.anatomies, *anatomies)}
        )
        if freeze_existing:
            self.requires_grad_(False)
        hidden_size = self.vision_model.config.hidden_size
        for _ in anatomies:
            head = FVLMAnatomyHead(hidden_size, self.config.projection_dim)
            head.apply(self._init_weights)
            self.anatomy_heads.append(head.to(self.logit_scale.device, self.text_projection.weight.dtype))
        self.config.anatomies = config.anatomies

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Output of the text tower; `pooler_output` is the projected [CLS] state (T, projection_dim), not normalised.

        Args:
            input_ids: (T, L), padded at the end: the first token is [CLS].
            attention_mask: (T, L), 1 for tokens, 0 for padding; by default what is not the padding token.
            position_ids: (T, L).
            token_type_ids: (T, L); converted weights hold zeros for them, as the release adds none.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: where the text is longer than the position table, or the mask of another shape.
        """
        self._check_text(input_ids, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ne(input_ids, self.text_model.config.pad_token_id or 0).long()
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.text_projection(outputs.last_hidden_state[:, 0]),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        anatomy_mask: Tensor | None = None,
        anatomy_token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> FVLMAnatomyOutput:
        """Output of the vision tower; `pooler_output` is one embedding for each anatomy, not normalised.

        Args:
            pixel_values: (B, 1, D, H, W) in [0, 1], each size a multiple of the patch.
            anatomy_mask: (B, D, H, W) integer ids, 0 = background, i + 1 = `config.anatomies[i]`.
            anatomy_token_mask: (B, A, P) bool instead: which patches belong to which anatomy.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: not exactly one mask came, or a shape is not as described.
        """
        token_mask = self._token_mask(pixel_values, anatomy_mask, anatomy_token_mask)
        outputs = self.vision_model(pixel_values, feature_layers=self.config.feature_layers, **kwargs)
        queries = torch.stack([head.get_parameter("query") for head in self.anatomy_heads])
        pooled, weights = self.anatomy_pooling(queries, outputs.feature_levels, token_mask)
        projected = torch.stack([head(row) for head, row in zip(self.anatomy_heads, pooled.unbind(1), strict=True)], 1)
        is_present = token_mask.any(dim=-1)
        return FVLMAnatomyOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=projected.masked_fill(~is_present[..., None], 0.0),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            anatomy_present=is_present,
            anatomy_attentions=weights,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        anatomy_mask: Tensor | None = None,
        anatomy_token_mask: Tensor | None = None,
        is_complete: Tensor | None = None,
        is_abnormal: Tensor | None = None,
        text_index: Tensor | None = None,
        text_ids: Tensor | None = None,
        return_loss: bool | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> FVLMOutput:
        """Embeddings of volumes and texts, their logits and the loss. Either side may be left out.

        Args:
            input_ids: (T, L), the distinct texts of the batch.
            pixel_values: (B, 1, D, H, W) in [0, 1].
            attention_mask: (T, L), 1 for tokens, 0 for padding.
            position_ids: (T, L).
            token_type_ids: (T, L).
            anatomy_mask: (B, D, H, W) integer ids, 0 = background, i + 1 = `config.anatomies[i]`.
            anatomy_token_mask: (B, A, P) bool instead.
            is_complete: (B, A) bool, the anatomy lies completely inside the crop; by default found in `anatomy_mask`.
            is_abnormal: (B, A) bool, the report describes something abnormal. Needed for the loss.
            text_index: (B, A) int64, row of `input_ids` of that anatomy's text, -1 for none. Needed for the loss.
            text_ids: (T,) int64, equal exactly where texts are equal; by default every row is its own text.
            return_loss: compute `loss` and `anatomy_losses` from this batch alone. The trainer computes it from the
                batches of all processes.
            return_logits: compute `logits_per_anatomy`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: nothing came, a shape is not as described, or the loss lacks an input.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("Neither input_ids nor pixel_values came; give volumes, texts or both.")
        image_outputs = text_outputs = anatomy_embeds = text_embeds = None
        if pixel_values is not None:
            image_outputs = self.get_image_features(
                pixel_values, anatomy_mask, anatomy_token_mask, return_dict=True, **kwargs
            )
            anatomy_embeds = _normalize_exactly(image_outputs.pooler_output)
        if input_ids is not None:
            text_outputs = self.get_text_features(
                input_ids, attention_mask, position_ids, token_type_ids, return_dict=True, **kwargs
            )
            text_embeds = _normalize_exactly(text_outputs.pooler_output)

        anatomy_present = None if image_outputs is None else image_outputs.anatomy_present
        logit_scale = self.logit_scale.exp()
        logits = losses = None
        if return_logits and anatomy_embeds is not None and text_embeds is not None:
            with torch.autocast(anatomy_embeds.device.type, enabled=False):
                logits = torch.matmul(anatomy_embeds, text_embeds.T) * logit_scale
        if return_loss:
            losses = self._losses(
                anatomy_present,
                anatomy_embeds,
                text_embeds,
                anatomy_mask,
                is_complete,
                is_abnormal,
                text_index,
                text_ids,
            )
        return FVLMOutput(
            loss=None if losses is None else losses.sum(),
            anatomy_losses=losses,
            logits_per_anatomy=logits,
            anatomy_embeds=anatomy_embeds,
            anatomy_present=anatomy_present,
            text_embeds=text_embeds,
            logit_scale=logit_scale,
            text_model_output=text_outputs,
            vision_model_output=image_outputs,
        )

    def _token_mask(self, pixel_values: Tensor, anatomy_mask: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """(B, A, P) bool from whichever mask came; raises where it does not belong to the volumes."""
        if (anatomy_mask is None) == (token_mask is None):
            raise ValueError("Exactly one of anatomy_mask and anatomy_token_mask must come with pixel_values.")
        _check_pixel_values(pixel_values, self.vision_model.config.num_channels)
        patch_size_dhw = self.vision_model.config.patch_size_dhw
        size_dhw = tuple(pixel_values.shape[2:])
        if anatomy_mask is not None:
            if tuple(anatomy_mask.shape) != (pixel_values.shape[0], *size_dhw):
                raise ValueError(
                    f"anatomy_mask has shape {tuple(anatomy_mask.shape)}, but the volumes need "
                    f"{(pixel_values.shape[0], *size_dhw)}: mask and volume must share one grid."
                )
            return anatomy_token_mask(anatomy_mask, self.config.num_anatomies, patch_size_dhw)
        num_patches = math.prod(count_patches(size_dhw, patch_size_dhw, "pixel_values"))
        expected = (pixel_values.shape[0], self.config.num_anatomies, num_patches)
        if token_mask is None or tuple(token_mask.shape) != expected:
            raise ValueError(f"anatomy_token_mask must have shape (batch, anatomies, patches) {expected}.")
        return token_mask.bool()

    # Same as in conceptclip.
    def _check_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        max_tokens = self.text_model.config.max_position_embeddings
        if input_ids.dim() != 2 or not 1 <= input_ids.shape[1] <= max_tokens:
            raise ValueError(
                f"input_ids should be (B, T) with 1 to {max_tokens} tokens, got {tuple(input_ids.shape)}. "
                "Tokenise with truncation=True and max_length."
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask should be {tuple(input_ids.shape)} like input_ids, got {tuple(attention_mask.shape)}."
            )

    def _losses(
        self,
        anatomy_present: Tensor | None,
        anatomy_embeds: Tensor | None,
        text_embeds: Tensor | None,
        anatomy_mask: Tensor | None,
        is_complete: Tensor | None,
        is_abnormal: Tensor | None,
        text_index: Tensor | None,
        text_ids: Tensor | None,
    ) -> Tensor:
        """(A,) losses of this batch alone."""
        if anatomy_present is None or anatomy_embeds is None or text_embeds is None:
            raise ValueError("The loss compares volumes with texts: pixel_values and input_ids must both come.")
        if text_index is None or is_abnormal is None:
            raise ValueError("The loss needs text_index and is_abnormal, (batch, anatomies) each.")
        _check_labels(text_index, is_abnormal, is_complete, text_ids, anatomy_present.shape, len(text_embeds))
        is_used = anatomy_present & (text_index >= 0)
        if is_complete is not None:
            is_used = is_used & is_complete.bool()
        elif anatomy_mask is not None:
            is_used = is_used & ~touching_anatomies(anatomy_mask, self.config.num_anatomies)
        # A row before the first text stands for "no text", -1; so an index beyond the last text finds no row at all.
        row = text_index + 1
        return anatomy_alignment_loss(
            anatomy_embeds,
            F.pad(text_embeds, (0, 0, 1, 0))[row],
            self.logit_scale.exp(),
            text_ids=text_index if text_ids is None else F.pad(text_ids, (1, 0))[row],
            is_abnormal=is_abnormal.bool(),
            is_used=is_used,
        )


def _check_labels(
    text_index: Tensor,
    is_abnormal: Tensor,
    is_complete: Tensor | None,
    text_ids: Tensor | None,
    shape: torch.Size,
    num_texts: int,
) -> None:
    """Refuse labels of other scans or anatomies, which would else be broadcast."""
    for name, labels in (("text_index", text_index), ("is_abnormal", is_abnormal), ("is_complete", is_complete)):
        if labels is not None and labels.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} (batch, anatomies), got {tuple(labels.shape)}.")
    if text_ids is not None and text_ids.shape != (num_texts,):
        raise ValueError(f"text_ids must have shape ({num_texts},), one a text, but {tuple(text_ids.shape)} came.")


# Same as in conceptclip.
def _normalize_exactly(embeds: Tensor) -> Tensor:
    """The embeddings L2-normalised in float32 at least: a norm rounded to half precision shifts logits of scale 100."""
    return F.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)


__all__ = ["FVLMModel", "FVLMPreTrainedModel", "FVLMVisionModel"]
