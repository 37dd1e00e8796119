"""ConceptCLIP for report generation: patches of a study, projected, as the beginning of a language model's text.

Image tower and language model stay frozen; one linear layer with a norm between them is trained (R2GenGPT's shallow
alignment: Wang et al., "R2GenGPT: Radiology Report Generation with frozen LLMs", 2023), and on request low-rank
adapters of the language model, which can be any causal one of transformers.
"""

import inspect
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec, strict
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_conceptclip import SO400M_PATCH14_384
from .modeling_conceptclip import ConceptCLIPModel
from .spelling_conceptclip import refuse_misspelt

NO_TARGET = -100  # label of a token that is not to be predicted: prompt and padding


@strict
class ConceptCLIPReportGenerationConfig(PreTrainedConfig):
    """What fixes the shapes of a [`ConceptCLIPForReportGeneration`].

    Args:
        text_config: configuration of the language model, any that `AutoModelForCausalLM` knows; default Llama.
        vision_config: configuration of the image tower, as in `ConceptCLIPConfig`; its pooling head is left out, since
            the patches are used.
        prompt: text between the images and the report, kept so that reports are asked for as they were trained.
    """

    model_type = "conceptclip_report_generation"
    sub_configs_defaults = {  # noqa: RUF012 - as transformers wants it
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(SiglipVisionConfig, init_kwargs=SO400M_PATCH14_384),
    }

    text_config: Any = None  # a configuration, its fields as a dict, or None; a configuration from here on
    vision_config: Any = None
    prompt: str = "\nWrite a comprehensive report of these images.\nReport: "

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.vision_config.vision_use_head = False  # a parameter that no loss reaches would stop plain DDP


@dataclass
class ConceptCLIPReportGenerationOutput(ModelOutput):
    """What [`ConceptCLIPForReportGeneration`] gives back.

    Args:
        loss (): mean negative log-likelihood over the target tokens of the batch; 0 where there is none.
        sample_losses (B,): its sum over the target tokens of each study, so that ragged batches can be weighed right.
        num_tokens (B,): target tokens of each study.
        logits (B, T, vocabulary): place t holds the scores of token t of `input_ids`, given what stands before it.
    """

    loss: Tensor | None = None
    sample_losses: Tensor | None = None
    num_tokens: Tensor | None = None
    logits: Tensor | None = None


class ConceptCLIPLanguageProjection(nn.Module):
    """Patches (..., in_dim) -> embeddings of the language model (..., out_dim): a linear layer and a norm."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The projected vectors."""
        return self.norm(self.linear(hidden_states))


class ConceptCLIPForReportGeneration(PreTrainedModel):
    """ConceptCLIP's image tower, a projection and a causal language model: images of a study in, its report out.

    The language model reads: its beginning-of-text token (if it has one), the patches, the text of `input_ids`. Several
    images of a study are averaged patch by patch, as published.

    Examples:
        >>> model = ConceptCLIPForReportGeneration.from_vision_language_pretrained("my-conceptclip", "my-llm")
        >>> inputs = processor(images=["frontal.png", "lateral.png"], return_tensors="pt")
        >>> prompt = processor.tokenizer(model.config.prompt, add_special_tokens=False, return_tensors="pt")
        >>> tokens = model.generate(inputs["pixel_values"][None], **prompt, max_new_tokens=100, num_beams=3)
        >>> processor.batch_decode(tokens, skip_special_tokens=True)
    """

    config: ConceptCLIPReportGenerationConfig
    base_model_prefix = "report_generation"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["ConceptCLIPLanguageProjection"]  # noqa: RUF012 - those of the towers are added by post_init

    def __init__(
        self,
        config: ConceptCLIPReportGenerationConfig,
        vision_model: SiglipVisionModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.vision_model = vision_model or SiglipVisionModel._from_config(config.vision_config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        words: Any = self.language_model.get_input_embeddings()
        self.language_projection = ConceptCLIPLanguageProjection(config.vision_config.hidden_size, words.embedding_dim)
        self.post_init()

    @classmethod
    def from_vision_language_pretrained(
        cls,
        conceptclip: str | PathLike[str] | ConceptCLIPModel,
        language_model: str | PathLike[str] | PreTrainedModel,
        **config_kwargs: Any,
    ) -> "ConceptCLIPForReportGeneration":
        """A model from a ConceptCLIP and a language model, with a fresh projection.

        Args:
            conceptclip: the model, or its folder or Hub name.
            language_model: a causal one, or its folder or Hub name.
            config_kwargs: further arguments of [`ConceptCLIPReportGenerationConfig`].
        """
        if not isinstance(conceptclip, ConceptCLIPModel):
            conceptclip = ConceptCLIPModel.from_pretrained(conceptclip)
        if not isinstance(language_model, PreTrainedModel):
            language_model = AutoModelForCausalLM.from_pretrained(language_model)
        # Copies: a composite resets the attention of configurations it takes in, and without one the language model
        # would build no causal mask for layers that then need it.
        config = ConceptCLIPReportGenerationConfig(
            vision_config=conceptclip.config.vision_config.to_dict(),
            text_config=language_model.config.to_dict(),
            **config_kwargs,
        )
        vision_model = SiglipVisionModel._from_config(config.vision_config)
        given = conceptclip.vision_model.state_dict()
        vision_model.load_state_dict({name: given[name] for name in vision_model.state_dict()})  # all but the head
        return cls(config, vision_model, language_model)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, for the reason given in [`ConceptCLIPModel.is_custom_code`]."""
        return False

    def freeze_towers_(self) -> None:
        """Stop training everything but the projection. `requires_grad` is not saved: after loading, freeze again."""
        self.vision_model.requires_grad_(False)
        self.language_model.requires_grad_(False)

    # Same as in fvlm.
    def train(self, mode: bool = True) -> Any:
        """As `nn.Module` does, but a part without a trained parameter stays in evaluation mode: no dropout there."""
        super().train(mode)
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    # Same as in fvlm.
    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings of the language model."""
        return self.language_model.get_input_embeddings()

    # Same as in fvlm.
    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    # Same as in fvlm.
    def get_output_embeddings(self) -> Any:
        """The layer that gives the language model's logits."""
        return self.language_model.get_output_embeddings()

    # Same as in fvlm.
    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the layer that gives the language model's logits, as `resize_token_embeddings` does."""
        self.language_model.set_output_embeddings(value)

    @can_return_tuple
    @refuse_misspelt
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        view_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ConceptCLIPReportGenerationOutput:
        """Logits of the text, and the loss where labels are given.

        Args:
            input_ids (B, T): prompt, report and end-of-text token, without a beginning-of-text token; padded on either
                side.
            pixel_values (B, V, 3, H, W): normalised pixels of V views a study; (B, 3, H, W) for one view.
            attention_mask (B, T): 1 for real tokens; default: everywhere.
            view_mask (B, V): True where a view stands; default: everywhere.
            labels (B, T): the token ids to be predicted, `NO_TARGET` (-100) elsewhere.
            kwargs: `return_dict`.

        Raises:
            ValueError: shapes that do not fit, or a study without a view.
        """
        embeds, mask = self.embed_study(pixel_values, view_mask)
        return ConceptCLIPReportGenerationOutput(
            **_predict(self.language_model, embeds, mask, input_ids, attention_mask, labels)
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        view_mask: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Token ids of the reports alone, without the prompt, (B, longest).

        Args:
            pixel_values: as in `forward`.
            input_ids (B, T): the prompts, or (1, T) one for all; padded on either side.
            attention_mask (B, T): 1 for real tokens; default: everywhere.
            view_mask: as in `forward`.
            generation_kwargs: of the language model's `generate`. As published: `num_beams=3, min_new_tokens=40,
                max_new_tokens=100, repetition_penalty=2.0, length_penalty=2.0`.
        """
        embeds, mask = self.embed_study(pixel_values, view_mask)
        return _generate(self.language_model, embeds, mask, input_ids, attention_mask, generation_kwargs)

    def embed_study(self, pixel_values: Tensor, view_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, P, width) of each study's patches for the language model, and their mask (B, P), all True."""
        if pixel_values.dim() == 4:
            pixel_values = pixel_values.unsqueeze(1)
        vision = self.config.vision_config
        expected = (vision.num_channels, vision.image_size, vision.image_size)
        if pixel_values.dim() != 5 or pixel_values.shape[2:] != expected:
            raise ValueError(
                f"pixel_values should be (B, V, {', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}. "
                "Give the images to the processor first."
            )
        patches = self._mean_patches(pixel_values, view_mask)
        embeds = self.language_projection(patches.to(self.language_projection.linear.weight.dtype))
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)

    def _mean_patches(self, pixel_values: Tensor, view_mask: Tensor | None) -> Tensor:
        """Patches (B, P, dim) of each study, averaged over its views; absent views are not computed."""
        if view_mask is None:  # without the numbers of a mask, which the device would have to tell first
            patches = self.vision_model(pixel_values.flatten(0, 1), return_dict=True).last_hidden_state
            return patches.unflatten(0, pixel_values.shape[:2]).mean(dim=1)
        view_mask = view_mask.bool()
        if view_mask.shape != pixel_values.shape[:2] or not view_mask.any(dim=1).all():
            raise ValueError(
                f"view_mask should be {tuple(pixel_values.shape[:2])} with at least one view a study, got "
                f"{tuple(view_mask.shape)}: {view_mask.sum(dim=1).tolist()} views."
            )
        patches = self.vision_model(pixel_values[view_mask], return_dict=True).last_hidden_state  # (views, P, dim)
        study = view_mask.nonzero()[:, 0]
        total = patches.new_zeros(len(view_mask), *patches.shape[1:]).index_add(0, study, patches)
        return total / view_mask.sum(dim=1).to(total)[:, None, None]


# Same as in fvlm, from here on.


def _predict(
    language_model: Any,
    embeds: Tensor,
    mask: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
) -> dict[str, Tensor | None]:
    """The fields of an output: logits of the text that follows the picture, and losses where labels are given."""
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(f"labels should be {tuple(input_ids.shape)} like input_ids, got {tuple(labels.shape)}.")
    embeds, mask = _join(language_model, embeds, mask, input_ids, attention_mask)
    num_tokens = input_ids.shape[1]
    arguments: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask.long(), "use_cache": False}
    if "logits_to_keep" in inspect.signature(language_model.forward).parameters:
        arguments["logits_to_keep"] = num_tokens + 1  # not those of the patches, of which there are many more
    logits = language_model(**arguments, return_dict=True).logits[:, -num_tokens - 1 : -1]
    if labels is None:
        return {"logits": logits}
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_TARGET, reduction="none")
    sample_losses = flat.unflatten(0, labels.shape).sum(dim=1)
    num_targets = (labels != NO_TARGET).sum(dim=1)
    return {
        "loss": sample_losses.sum() / num_targets.sum().clamp(min=1),
        "sample_losses": sample_losses,
        "num_tokens": num_targets,
        "logits": logits,
    }


def _generate(
    language_model: Any,
    embeds: Tensor,
    mask: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation_kwargs: dict[str, Any],
) -> Tensor:
    """Tokens that the language model adds to picture and prompt."""
    if len(input_ids) == 1:
        input_ids = input_ids.expand(len(embeds), -1)
        attention_mask = None if attention_mask is None else attention_mask.expand(len(embeds), -1)
    embeds, mask = _join(language_model, embeds, mask, input_ids, attention_mask)
    order = mask.long().argsort(dim=1, stable=True)  # gaps to the left: the report follows the last real token
    embeds = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
    return language_model.generate(
        inputs_embeds=embeds, attention_mask=mask.gather(1, order).long(), **generation_kwargs
    )


def _join(
    language_model: Any, embeds: Tensor, mask: Tensor, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the language model reads, (B, S, width), and its mask (B, S): beginning of text, picture, text."""
    if input_ids.dim() != 2 or len(input_ids) != len(embeds):
        raise ValueError(f"input_ids should be ({len(embeds)}, T), one row a study, got {tuple(input_ids.shape)}.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask should be {tuple(input_ids.shape)} like input_ids, got {tuple(attention_mask.shape)}."
        )
    words = language_model.get_input_embeddings()
    text = words(input_ids)
    parts, masks = [embeds.to(text.dtype), text], [mask, attention_mask.bool()]
    begin = language_model.config.get_text_config().bos_token_id
    if isinstance(begin, int):
        parts.insert(0, words(input_ids.new_full((len(input_ids), 1), begin)))
        masks.insert(0, mask.new_ones(len(mask), 1))
    return torch.cat(parts, dim=1), torch.cat(masks, dim=1)


__all__ = [
    "ConceptCLIPForReportGeneration",
    "ConceptCLIPReportGenerationConfig",
    "ConceptCLIPReportGenerationOutput",
]
