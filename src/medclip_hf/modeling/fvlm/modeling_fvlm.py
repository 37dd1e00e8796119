"""fVLM: a CT volume gives one embedding for each anatomy, compared with texts about that anatomy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .anatomy_masks_fvlm import anatomy_token_mask, count_patches, touching_anatomies
from .anatomy_pooling_fvlm import FVLMAnatomyHead, FVLMAnatomyPooling
from .configuration_fvlm import FVLMConfig
from .loss_fvlm import anatomy_alignment_loss
from .spelling_fvlm import refuse_misspelt
from .vision_fvlm import FVLMPreTrainedModel, FVLMVisionModel, check_pixel_values

# Bounds of the temperature in the release, which clamps it before every training step.
MIN_TEMPERATURE = 0.001
MAX_TEMPERATURE = 0.5


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
    _keep_in_fp32_modules_strict = ["logit_scale"]  # noqa: RUF012 - in bfloat16 a scale is up to 1.6 % off

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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FVLMModel):
            init.constant_(module.logit_scale, module.config.logit_scale_init_value)

    # Same as in conceptclip.
    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights; scalars stay in float32, see `_keep_in_fp32_modules_strict`."""
        return next(one.dtype for one in self.parameters() if one.is_floating_point() and one.numel() != 1)

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
    @refuse_misspelt
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
    @refuse_misspelt
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
    @refuse_misspelt
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
        image_outputs = anatomy_embeds = anatomy_present = None
        if pixel_values is not None:
            image_outputs = self.get_image_features(
                pixel_values, anatomy_mask, anatomy_token_mask, return_dict=True, **kwargs
            )
            anatomy_embeds = _normalize_exactly(image_outputs.pooler_output)
            anatomy_present = image_outputs.anatomy_present

        text_outputs = text_embeds = None
        if input_ids is not None:
            text_outputs = self.get_text_features(
                input_ids, attention_mask, position_ids, token_type_ids, return_dict=True, **kwargs
            )
            text_embeds = _normalize_exactly(text_outputs.pooler_output)

        logits, losses = {}, {}
        if return_logits:
            logits = self._logits(anatomy_embeds, text_embeds)
        if return_loss:
            if is_complete is None and anatomy_mask is not None:
                is_complete = ~touching_anatomies(anatomy_mask, self.config.num_anatomies)
            losses = self._losses(
                anatomy_embeds, text_embeds, anatomy_present, is_complete, is_abnormal, text_index, text_ids
            )
        return FVLMOutput(
            **losses,
            **logits,
            anatomy_embeds=anatomy_embeds,
            anatomy_present=anatomy_present,
            text_embeds=text_embeds,
            logit_scale=self.logit_scale.exp(),
            text_model_output=text_outputs,
            vision_model_output=image_outputs,
        )

    def _logits(self, anatomy_embeds: Tensor | None, text_embeds: Tensor | None) -> dict[str, Tensor]:
        """Every anatomy of every volume against every text."""
        if anatomy_embeds is None or text_embeds is None:
            return {}
        with torch.autocast(anatomy_embeds.device.type, enabled=False):
            return {"logits_per_anatomy": torch.matmul(anatomy_embeds, text_embeds.T) * self.logit_scale.exp()}

    def _token_mask(self, pixel_values: Tensor, anatomy_mask: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """(B, A, P) bool from whichever mask came; raises where it does not belong to the volumes."""
        if (anatomy_mask is None) == (token_mask is None):
            raise ValueError("Exactly one of anatomy_mask and anatomy_token_mask must come with pixel_values.")
        check_pixel_values(pixel_values, self.vision_model.config.num_channels)
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
        anatomy_embeds: Tensor | None,
        text_embeds: Tensor | None,
        anatomy_present: Tensor | None,
        is_complete: Tensor | None,
        is_abnormal: Tensor | None,
        text_index: Tensor | None,
        text_ids: Tensor | None,
    ) -> dict[str, Tensor]:
        """The loss of each anatomy in this batch alone, (A,), and their sum."""
        if anatomy_present is None or anatomy_embeds is None or text_embeds is None:
            raise ValueError("The loss compares volumes with texts: pixel_values and input_ids must both come.")
        if text_index is None or is_abnormal is None:
            raise ValueError("The loss needs text_index and is_abnormal, (batch, anatomies) each.")
        _check_labels(text_index, is_abnormal, is_complete, text_ids, anatomy_present.shape, len(text_embeds))
        is_used = anatomy_present & (text_index >= 0)
        if is_complete is not None:
            is_used = is_used & is_complete.bool()
        # A row before the first text stands for "no text", -1; so an index beyond the last text finds no row at all.
        row = text_index + 1
        losses = anatomy_alignment_loss(
            anatomy_embeds,
            F.pad(text_embeds, (0, 0, 1, 0))[row],
            self.logit_scale.exp(),
            text_ids=text_index if text_ids is None else F.pad(text_ids, (1, 0))[row],
            is_abnormal=is_abnormal.bool(),
            is_used=is_used,
        )
        return {"loss": losses.sum(), "anatomy_losses": losses}


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


__all__ = ["FVLMAnatomyOutput", "FVLMModel", "FVLMOutput"]
