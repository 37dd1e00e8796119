"""fVLM for report generation: one embedding for each anatomy, projected, as the beginning of a language model's text.

fVLM and the language model stay frozen; a linear layer with a norm and an embedding for each anatomy are trained, and
on request low-rank adapters of the language model, which can be any causal one of transformers.
"""

import inspect
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec, strict
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_fvlm import FVLMConfig
from .modeling_fvlm import FVLMModel
from .spelling_fvlm import refuse_misspelt

NO_TARGET = -100  # label of a token that is not to be predicted: prompt and padding


@strict
class FVLMReportGenerationConfig(PreTrainedConfig):
    """What fixes the shapes of a [`FVLMForReportGeneration`].

    Args:
        text_config: configuration of the language model, any that `AutoModelForCausalLM` knows; default Llama.
        fvlm_config: `FVLMConfig` or its dict.
        prompt: text between the anatomies and the report, kept so that reports are asked for as they were trained.
    """

    model_type = "fvlm_report_generation"
    sub_configs_defaults = {  # noqa: RUF012 - as transformers wants it
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
        "fvlm_config": SubConfigSpec(FVLMConfig),
    }

    text_config: Any = None  # a configuration, its fields as a dict, or None; a configuration from here on
    fvlm_config: Any = None
    prompt: str = "\nWrite a comprehensive report of this CT scan.\nReport: "


@dataclass
class FVLMReportGenerationOutput(ModelOutput):
    """What [`FVLMForReportGeneration`] gives back.

    Args:
        loss (): mean negative log-likelihood over the target tokens of the batch; 0 where there is none.
        sample_losses (B,): its sum over the target tokens of each scan, so that ragged batches can be weighed right.
        num_tokens (B,): target tokens of each scan.
        logits (B, T, vocabulary): place t holds the scores of token t of `input_ids`, given what stands before it.
    """

    loss: Tensor | None = None
    sample_losses: Tensor | None = None
    num_tokens: Tensor | None = None
    logits: Tensor | None = None


class FVLMLanguageProjection(nn.Module):
    """Anatomies (B, A, in_dim) -> embeddings of the language model (B, A, out_dim), each with what tells it apart.

    Unlike the patches of a picture, an anatomy may be missing, so its place in the row does not say which one it is.
    """

    def __init__(self, num_anatomies: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        self.anatomy_embedding = nn.Embedding(num_anatomies, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, anatomy_embeds: Tensor) -> Tensor:
        """The projected vectors."""
        return self.norm(self.linear(anatomy_embeds) + self.anatomy_embedding.weight)


class FVLMForReportGeneration(PreTrainedModel):
    """fVLM, a projection and a causal language model: a CT volume with its anatomy mask in, its report out.

    The language model reads: its beginning-of-text token (if it has one), one embedding for each anatomy that the
    volume holds (L2-normalised by fVLM, then projected), the text of `input_ids`.

    Examples:
        >>> model = FVLMForReportGeneration.from_fvlm_language_pretrained("my-fvlm", "my-llm")
        >>> inputs = processor(images=volume_hu, anatomy_mask=mask)
        >>> prompt = processor.tokenizer(model.config.prompt, add_special_tokens=False, return_tensors="pt")
        >>> processor.batch_decode(model.generate(**inputs, **prompt, max_new_tokens=200), skip_special_tokens=True)
    """

    config: FVLMReportGenerationConfig
    base_model_prefix = "report_generation"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["FVLMLanguageProjection"]  # noqa: RUF012 - those of the parts are added by post_init

    def __init__(
        self,
        config: FVLMReportGenerationConfig,
        fvlm: FVLMModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.fvlm = fvlm or FVLMModel._from_config(config.fvlm_config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        words: Any = self.language_model.get_input_embeddings()
        fvlm_config = config.fvlm_config
        self.language_projection = FVLMLanguageProjection(
            fvlm_config.num_anatomies, fvlm_config.projection_dim, words.embedding_dim
        )
        self.post_init()

    @classmethod
    def from_fvlm_language_pretrained(
        cls,
        fvlm: str | PathLike[str] | FVLMModel,
        language_model: str | PathLike[str] | PreTrainedModel,
        **config_kwargs: Any,
    ) -> "FVLMForReportGeneration":
        """A model from an fVLM and a language model, with a fresh projection.

        Args:
            fvlm: the model, or its folder or Hub name.
            language_model: a causal one, or its folder or Hub name.
            config_kwargs: further arguments of [`FVLMReportGenerationConfig`].
        """
        if not isinstance(fvlm, FVLMModel):
            fvlm = FVLMModel.from_pretrained(fvlm)
        if not isinstance(language_model, PreTrainedModel):
            language_model = AutoModelForCausalLM.from_pretrained(language_model)
        # Copies: a composite resets the attention of configurations it takes in, and without one the language model
        # would build no causal mask for layers that then need it.
        config = FVLMReportGenerationConfig(
            fvlm_config=fvlm.config.to_dict(), text_config=language_model.config.to_dict(), **config_kwargs
        )
        return cls(config, fvlm, language_model)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: this class initialises through `transformers.initialization`, which never touches a loaded weight.

        For a class outside its own package transformers guards against `_init_weights` that write in place, and skips
        modules without parameters of their own, at which language models may initialise theirs.
        """
        return False

    dtype = FVLMModel.dtype

    def freeze_towers_(self) -> None:
        """Stop training everything but the projection. `requires_grad` is not saved: after loading, freeze again."""
        self.fvlm.requires_grad_(False)
        self.language_model.requires_grad_(False)

    # Same as in conceptclip.
    def train(self, mode: bool = True) -> Any:
        """As `nn.Module` does, but a part without a trained parameter stays in evaluation mode: no dropout there."""
        super().train(mode)
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    # Same as in conceptclip.
    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings of the language model."""
        return self.language_model.get_input_embeddings()

    # Same as in conceptclip.
    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    # Same as in conceptclip.
    def get_output_embeddings(self) -> Any:
        """The layer that gives the language model's logits."""
        return self.language_model.get_output_embeddings()

    # Same as in conceptclip.
    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the layer that gives the language model's logits, as `resize_token_embeddings` does."""
        self.language_model.set_output_embeddings(value)

    @can_return_tuple
    @refuse_misspelt
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        anatomy_mask: Tensor | None = None,
        anatomy_token_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> FVLMReportGenerationOutput:
        """Logits of the text, and the loss where labels are given.

        Args:
            input_ids: (B, T), prompt, report and end-of-text token, without a beginning-of-text token; padded on
                either side.
            pixel_values: (B, 1, D, H, W) in [0, 1].
            anatomy_mask: (B, D, H, W) integer ids, 0 = background, i + 1 = `config.fvlm_config.anatomies[i]`.
            anatomy_token_mask: (B, A, P) bool instead.
            attention_mask: (B, T), 1 for real tokens; default: everywhere.
            labels: (B, T), the token ids to be predicted, `NO_TARGET` (-100) elsewhere.
            **kwargs: `return_dict`.

        Raises:
            ValueError: shapes that do not fit, or not exactly one mask.
        """
        embeds, mask = self.embed_scan(pixel_values, anatomy_mask, anatomy_token_mask)
        return FVLMReportGenerationOutput(
            **_predict(self.language_model, embeds, mask, input_ids, attention_mask, labels)
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        anatomy_mask: Tensor | None = None,
        anatomy_token_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Token ids of the reports alone, without the prompt, (B, longest).

        Args:
            pixel_values: as in `forward`.
            input_ids: (B, T), the prompts, or (1, T) one for all; padded on either side.
            anatomy_mask: as in `forward`.
            anatomy_token_mask: as in `forward`.
            attention_mask: (B, T), 1 for real tokens; default: everywhere.
            **generation_kwargs: of the language model's `generate`.
        """
        embeds, mask = self.embed_scan(pixel_values, anatomy_mask, anatomy_token_mask)
        return _generate(self.language_model, embeds, mask, input_ids, attention_mask, generation_kwargs)

    def embed_scan(
        self, pixel_values: Tensor, anatomy_mask: Tensor | None = None, anatomy_token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, A, width) of the anatomies for the language model, and which are in the volume, (B, A)."""
        outputs = self.fvlm(pixel_values=pixel_values, anatomy_mask=anatomy_mask, anatomy_token_mask=anatomy_token_mask)
        embeds = self.language_projection(outputs.anatomy_embeds.to(self.language_projection.linear.weight.dtype))
        return embeds, outputs.anatomy_present


# Same as in conceptclip, from here on.


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


__all__ = ["FVLMForReportGeneration", "FVLMReportGenerationConfig", "FVLMReportGenerationOutput"]
