"""The ConceptCLIP network: a SigLIP image tower and a BERT text tower that meet in one space, twice.

Whole image and whole caption meet through the towers' pooled vectors (IT-Align); patches and the concepts a caption
mentions meet through two projection heads (PC-Align).
"""

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, SiglipVisionModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_conceptclip import ConceptCLIPConfig
from .loss_conceptclip import (
    best_patch_similarity,
    image_text_alignment_loss,
    patch_concept_alignment_loss,
    pool_concepts,
    usable_concepts,
)
from .spelling_conceptclip import refuse_misspelt

MAX_LOGIT_SCALE = math.log(100)  # of the stored logarithm, as in CLIP and in ConceptCLIP's release


@dataclass
class ConceptCLIPOutput(ModelOutput):
    """What [`ConceptCLIPModel`] gives back; a field is None where its modality, stage or request is missing.

    All embeddings are projected into the joint space and L2-normalised.

    Args:
        loss (): image_text_loss + patch_concept_loss_weight * patch_concept_loss.
        image_text_loss (): IT-Align of this batch.
        patch_concept_loss (): PC-Align of this batch, 0 where the batch holds no concept.
        logits_per_image (num_images, num_texts): logit_scale * cosine + logit_bias.
        logits_per_text (num_texts, num_images): its transpose.
        image_embeds (num_images, D): one vector an image.
        text_embeds (num_texts, D): one vector a text.
        patch_embeds (num_images, P, D): one vector a patch, row by row.
        concept_embeds (num_texts, C, D): one vector a concept, zero where masked.
        concept_logits (num_images, num_texts, C): concept_logit_scale * cosine of the concept with its best patch of
            the image + concept_logit_bias; meaningless where the concept is masked.
        logit_scale (1,): exponentiated.
        logit_bias (1,): as stored.
        concept_logit_scale (1,): exponentiated.
        concept_logit_bias (1,): as stored.
        text_model_output: of the text tower; `pooler_output` (num_texts, D) is projected, not normalised.
        vision_model_output: of the image tower; `pooler_output` (num_images, D) is not normalised.
    """

    loss: Tensor | None = None
    image_text_loss: Tensor | None = None
    patch_concept_loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    patch_embeds: Tensor | None = None
    concept_embeds: Tensor | None = None
    concept_logits: Tensor | None = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    concept_logit_scale: Tensor | None = None
    concept_logit_bias: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, tower outputs as tuples too."""
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


class ConceptCLIPProjectionHead(nn.Module):
    """Two bias-free layers with a GELU between them: patches or tokens (..., in_dim) -> joint space (..., out_dim)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, out_dim, bias=False)
        self.fc2 = nn.Linear(out_dim, out_dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The projected vectors, not normalised."""
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class ConceptCLIPModel(PreTrainedModel):
    """Image and text tower in one space, with patches and concepts aligned as well (Nie et al., "ConceptCLIP", 2025).

    Examples:
        >>> from medclip_hf import ConceptCLIPModel, ConceptCLIPProcessor
        >>> model = ConceptCLIPModel.from_pretrained("my-conceptclip")
        >>> processor = ConceptCLIPProcessor.from_pretrained("my-conceptclip")
        >>> prompts = ["a chest radiograph of pneumothorax", "a normal chest radiograph"]
        >>> inputs = processor(images="radiograph.png", text=prompts)
        >>> model(**inputs).logits_per_image.softmax(dim=-1)
    """

    config: ConceptCLIPConfig
    base_model_prefix = "conceptclip"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["ConceptCLIPProjectionHead"]  # noqa: RUF012 - those of the towers are added by post_init
    # In bfloat16 a scale is up to 1.6 % off, more than all that the towers round.
    _keep_in_fp32_modules_strict = ["logit_scale", "logit_bias"]  # noqa: RUF012 - of the concepts as well

    def __init__(self, config: ConceptCLIPConfig) -> None:
        super().__init__(config)
        embed_dim = config.vision_config.hidden_size
        text_dim = config.text_config.hidden_size
        self.vision_model = SiglipVisionModel._from_config(config.vision_config)
        self.text_model = BertModel._from_config(config.text_config, add_pooling_layer=False)
        self.text_projection = nn.Linear(text_dim, embed_dim, bias=False)
        # Shape (1,) and not (), since FSDP shards no scalar parameters.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1))
        if config.use_patch_concept_alignment:
            self.patch_projection = ConceptCLIPProjectionHead(embed_dim, embed_dim)
            self.token_projection = ConceptCLIPProjectionHead(text_dim, embed_dim)
            self.concept_logit_scale = nn.Parameter(torch.empty(1))
            self.concept_logit_bias = nn.Parameter(torch.empty(1))
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_path: str | PathLike[str], text_path: str | PathLike[str], **config_kwargs: Any
    ) -> "ConceptCLIPModel":
        """A model whose towers hold pre-trained weights and whose projections are fresh.

        The towers keep their own configurations: a SigLIP folder that names the tanh GELU stays with it.

        Args:
            vision_path: folder or Hub name of a SigLIP model, or of its vision tower alone.
            text_path: folder or Hub name of a BERT model.
            config_kwargs: further arguments of [`ConceptCLIPConfig`].

        Raises:
            ValueError: where a folder lacks weights of its tower.
        """
        vision = _load_complete(SiglipVisionModel, vision_path)
        text = _load_complete(BertModel, text_path, add_pooling_layer=False)
        config = ConceptCLIPConfig(
            vision_config=_portable(vision.config), text_config=_portable(text.config), **config_kwargs
        )
        model = cls(config)
        model.vision_model.load_state_dict(vision.state_dict())
        model.text_model.load_state_dict(text.state_dict())
        return model

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: this class initialises through `transformers.initialization`, which never touches a loaded weight.

        For a class outside its own package transformers guards against `_init_weights` that write in place, and skips
        modules without parameters of their own. SigLIP initialises its attention and MLP blocks at that level, so with
        the guard a checkpoint without a tower would get that tower at the wrong scale.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            # As `nn.Linear` does, and hence the release; the towers initialise their own layers.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, ConceptCLIPModel):
            names = ["logit_scale", "logit_bias"]
            if self.config.use_patch_concept_alignment:
                names += ["concept_logit_scale", "concept_logit_bias"]
            for name in names:
                init.constant_(getattr(module, name), getattr(self.config, f"{name}_init_value"))

    @torch.no_grad()
    def clamp_logit_scales_(self) -> None:
        """Clamp the stored scales to [0, ln 100] in place; the training loop calls it after every optimiser step."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
        if self.config.use_patch_concept_alignment:
            self.concept_logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)

    # Same as in fvlm.
    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights; scalars stay in float32, see `_keep_in_fp32_modules_strict`."""
        return next(one.dtype for one in self.parameters() if one.is_floating_point() and one.numel() != 1)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings of the text tower."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text tower."""
        self.text_model.set_input_embeddings(value)

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel` does; code that travels along is named for zero-shot image classification too."""
        if self._auto_class is not None:
            name = f"{type(self).__module__.rsplit('.', 1)[-1]}.{type(self).__name__}"
            tasks = ("AutoModel", "AutoModelForZeroShotImageClassification")
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **dict.fromkeys(tasks, name)}
        super().save_pretrained(save_directory, *args, **kwargs)

    @can_return_tuple
    @refuse_misspelt
    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Output of the image tower: `last_hidden_state` (B, P, D) its patches, `pooler_output` (B, D); not normalised.

        Args:
            pixel_values (B, 3, H, W): normalised pixels.
            interpolate_pos_encoding: resample the position table for images of another size than the configured.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: where the images do not fit the position table.
        """
        self._check_pixel_values(pixel_values, interpolate_pos_encoding)
        return self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )

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
        """Output of the text tower: `last_hidden_state` (B, T, text_dim), `pooler_output` (B, D); not normalised.

        `pooler_output` is the projected mean over all real tokens, [CLS] and [SEP] among them.

        Args:
            input_ids (B, T): token ids.
            attention_mask (B, T): 1 for real tokens; default: every token but padding.
            position_ids (B, T): default: counted from 0.
            token_type_ids (B, T): default: 0.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: where the text is longer than the position table, or the mask of another shape.
        """
        self._check_text(input_ids, attention_mask)
        if attention_mask is None:
            attention_mask = self._real_token_mask(input_ids)
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            return_dict=True,
            **kwargs,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.text_projection(_masked_mean(outputs.last_hidden_state, attention_mask)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_concept_embeds(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        concept_token_spans: Tensor | None = None,
        concept_mask: Tensor | None = None,
    ) -> Tensor:
        """Concept vectors (B, C, D), L2-normalised, zero where masked: what patches are compared with.

        Args:
            input_ids (B, T): token ids of texts that mention concepts.
            attention_mask (B, T): 1 for real tokens; default: every token but padding.
            position_ids (B, T): default: counted from 0.
            token_type_ids (B, T): default: 0.
            concept_token_spans (B, C, 2): [start, end) token positions, [CLS] counted. Default: each text is one
                concept (C = 1), all its real tokens but the first and the last, [CLS] and [SEP].
            concept_mask (B, C): True where a concept stands; default: everywhere.

        Raises:
            ValueError: for a model of the first stage, or shapes that do not fit.
        """
        self._check_has_heads("concept vectors")
        if attention_mask is None:
            attention_mask = self._real_token_mask(input_ids)
        if concept_token_spans is None:
            concept_token_spans = _whole_text_spans(attention_mask)
        text_output = self.get_text_features(input_ids, attention_mask, position_ids, token_type_ids, return_dict=True)
        concept_mask = _complete_concept_mask(concept_token_spans, concept_mask, input_ids.shape[1])
        return pool_concepts(self.token_projection(text_output.last_hidden_state), concept_token_spans, concept_mask)

    def get_concept_maps(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        concept_token_spans: Tensor | None = None,
        concept_mask: Tensor | None = None,
        concept_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Cosine similarity of every patch with each concept, (B, C, rows, columns): where in the image a concept is.

        Concepts are either those of each image's own text (`input_ids` and what belongs to it, one text an image, see
        [`~ConceptCLIPModel.get_concept_embeds`]) or any others, as vectors made before (`concept_embeds`).

        Args:
            pixel_values (B, 3, H, W): normalised pixels; rows = H // patch_size, columns = W // patch_size.
            input_ids (B, T): token ids; image i is searched for the concepts of text i.
            attention_mask (B, T): 1 for real tokens; default: every token but padding.
            position_ids (B, T): default: counted from 0.
            token_type_ids (B, T): default: 0.
            concept_token_spans (B, C, 2): [start, end) token positions; default: each whole text is one concept.
            concept_mask (B, C): True where a concept stands; the maps of others are 0.
            concept_embeds (N, D) or (B, N, D): instead of texts; (N, D) is looked for in every image.
            interpolate_pos_encoding: as in [`~ConceptCLIPModel.get_image_features`].

        Raises:
            ValueError: for a model of the first stage, or where texts and images do not fit.

        Examples:
            >>> names = processor(text=["pleural effusion", "cardiomegaly", "pneumothorax"])
            >>> concepts = model.get_concept_embeds(**names).flatten(0, 1)  # (3, D)
            >>> maps = model.get_concept_maps(**processor(images=images), concept_embeds=concepts)  # (B, 3, 27, 27)
        """
        self._check_has_heads("concept maps")
        if concept_embeds is not None and input_ids is not None:
            raise ValueError("Concept maps take either input_ids or concept_embeds, but both came.")
        self._check_pixel_values(pixel_values, interpolate_pos_encoding)
        num_images, _, height, width = pixel_values.shape
        if concept_embeds is None:
            if input_ids is None:
                raise ValueError("Concept maps need the concepts: give input_ids or concept_embeds.")
            concept_embeds = self.get_concept_embeds(
                input_ids, attention_mask, position_ids, token_type_ids, concept_token_spans, concept_mask
            )
        if concept_embeds.dim() == 2:
            concept_embeds = concept_embeds.expand(num_images, -1, -1)
        self._check_concept_embeds(concept_embeds, num_images)
        vision_output = self.get_image_features(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True
        )
        patch_embeds = F.normalize(self.patch_projection(vision_output.last_hidden_state), dim=-1)
        similarity = concept_embeds.to(patch_embeds.dtype) @ patch_embeds.transpose(1, 2)  # (B, C, P)
        patch_size = self.config.vision_config.patch_size
        return similarity.unflatten(2, (height // patch_size, width // patch_size))

    @can_return_tuple
    @refuse_misspelt
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        concept_token_spans: Tensor | None = None,
        concept_mask: Tensor | None = None,
        concept_ids: Tensor | None = None,
        return_loss: bool | None = None,
        return_logits: bool = True,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ConceptCLIPOutput:
        """Embeddings, logits and losses of images, texts or both.

        Args:
            input_ids (num_texts, T): token ids.
            pixel_values (num_images, 3, H, W): normalised pixels.
            attention_mask (num_texts, T): 1 for real tokens; default: every token but padding.
            position_ids (num_texts, T): default: counted from 0.
            token_type_ids (num_texts, T): default: 0.
            concept_token_spans (num_texts, C, 2): [start, end) token positions of concepts, [CLS] counted; without
                them the texts hold no concept.
            concept_mask (num_texts, C): True where a concept stands; default: everywhere.
            concept_ids (num_texts, C): identity of each concept, so that the loss takes the same concept in another
                caption for no negative.
            return_loss: compute the losses; text i is then the caption of image i.
            return_logits: compute `logits_per_image`, `logits_per_text` and `concept_logits`.
            interpolate_pos_encoding: as in [`~ConceptCLIPModel.get_image_features`].
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: where nothing is given, shapes do not fit, or a loss is asked for without pairs.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("Give pixel_values, input_ids or both.")
        if concept_token_spans is None and return_loss and input_ids is not None:
            # One empty span: no concept, but PC-Align's parameters stay in the graph, as plain DDP needs.
            concept_token_spans = input_ids.new_zeros((len(input_ids), 1, 2))

        vision_output = image_embeds = patch_embeds = None
        if pixel_values is not None:
            vision_output = self.get_image_features(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
            )
            image_embeds = _normalize_exactly(vision_output.pooler_output)
            if self.config.use_patch_concept_alignment:
                patch_embeds = F.normalize(self.patch_projection(vision_output.last_hidden_state), dim=-1)

        text_output = text_embeds = concept_embeds = None
        if input_ids is not None:
            text_output = self.get_text_features(
                input_ids, attention_mask, position_ids, token_type_ids, return_dict=True, **kwargs
            )
            text_embeds = _normalize_exactly(text_output.pooler_output)
            if self.config.use_patch_concept_alignment and concept_token_spans is not None:
                concept_mask = _complete_concept_mask(concept_token_spans, concept_mask, input_ids.shape[1])
                token_embeds = self.token_projection(text_output.last_hidden_state)
                concept_embeds = pool_concepts(token_embeds, concept_token_spans, concept_mask)

        logits, losses = {}, {}
        if return_logits:
            logits = self._logits(image_embeds, text_embeds, patch_embeds, concept_embeds)
        if return_loss:
            losses = self._losses(image_embeds, text_embeds, patch_embeds, concept_embeds, concept_mask, concept_ids)
        return ConceptCLIPOutput(
            **losses,
            **logits,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            patch_embeds=patch_embeds,
            concept_embeds=concept_embeds,
            # Without texts there is nothing to compare; pipelines cut every tensor of an image batch row by row.
            **(self._scales() if text_embeds is not None else {}),
            text_model_output=text_output,
            vision_model_output=vision_output,
        )

    def _scales(self) -> dict[str, Tensor]:
        """Scales, exponentiated, and biases of both comparisons, (1,) each."""
        scales = {"logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias}
        if self.config.use_patch_concept_alignment:
            scales["concept_logit_scale"] = self.concept_logit_scale.exp()
            scales["concept_logit_bias"] = self.concept_logit_bias
        return scales

    def _logits(
        self,
        image_embeds: Tensor | None,
        text_embeds: Tensor | None,
        patch_embeds: Tensor | None,
        concept_embeds: Tensor | None,
    ) -> dict[str, Tensor]:
        """Every image against every text, and against every concept where there are concepts."""
        if image_embeds is None or text_embeds is None:
            return {}
        with torch.autocast(image_embeds.device.type, enabled=False):
            logits_per_image = image_embeds @ text_embeds.T * self.logit_scale.exp() + self.logit_bias
        logits = {"logits_per_image": logits_per_image, "logits_per_text": logits_per_image.T}
        if patch_embeds is not None and concept_embeds is not None:
            num_texts, num_concepts, _ = concept_embeds.shape
            similarity, _ = best_patch_similarity(patch_embeds, concept_embeds.flatten(0, 1))
            concept_logits = similarity * self.concept_logit_scale.exp() + self.concept_logit_bias
            logits["concept_logits"] = concept_logits.unflatten(1, (num_texts, num_concepts))
        return logits

    def _losses(
        self,
        image_embeds: Tensor | None,
        text_embeds: Tensor | None,
        patch_embeds: Tensor | None,
        concept_embeds: Tensor | None,
        concept_mask: Tensor | None,
        concept_ids: Tensor | None,
    ) -> dict[str, Tensor]:
        """IT-Align, PC-Align where the model has it, and their weighted sum, of the pairs of this batch."""
        if image_embeds is None or text_embeds is None or len(image_embeds) != len(text_embeds):
            num_images, num_texts = (0 if x is None else len(x) for x in (image_embeds, text_embeds))
            raise ValueError(f"A loss needs one text an image, got {num_images} images and {num_texts} texts.")
        image_text_loss = image_text_alignment_loss(image_embeds, text_embeds, self.logit_scale.exp(), self.logit_bias)
        if patch_embeds is None or concept_embeds is None or concept_mask is None:
            return {"loss": image_text_loss, "image_text_loss": image_text_loss}
        if concept_ids is not None and concept_ids.shape != concept_mask.shape:
            raise ValueError(
                f"concept_ids should be {tuple(concept_mask.shape)} as concept_token_spans tells, "
                f"got {tuple(concept_ids.shape)}."
            )
        # Padding stays in, marked by -1: dropping it would make the shapes depend on the data and wait for the device.
        images = torch.arange(len(concept_mask), device=concept_mask.device).unsqueeze(1)
        concept_to_image = torch.where(concept_mask, images, -1)
        patch_concept_loss = patch_concept_alignment_loss(
            patch_embeds,
            concept_embeds.flatten(0, 1),
            concept_to_image.flatten(),
            self.concept_logit_scale.exp(),
            self.concept_logit_bias,
            concept_ids=None if concept_ids is None else concept_ids.flatten(),
        )
        return {
            "loss": image_text_loss + self.config.patch_concept_loss_weight * patch_concept_loss,
            "image_text_loss": image_text_loss,
            "patch_concept_loss": patch_concept_loss,
        }

    def _real_token_mask(self, input_ids: Tensor) -> Tensor:
        """Which tokens are not padding, (B, T) int64."""
        pad_token_id = self.config.text_config.pad_token_id
        if pad_token_id is None:
            return torch.ones_like(input_ids)
        return (input_ids != pad_token_id).to(input_ids.dtype)

    def _check_has_heads(self, wish: str) -> None:
        if not self.config.use_patch_concept_alignment:
            raise ValueError(
                f"No {wish} from a model of the first stage: its configuration says use_patch_concept_alignment=False. "
                "Train the second stage from it, or load a model that was trained so."
            )

    def _check_concept_embeds(self, concept_embeds: Tensor, num_images: int) -> None:
        embed_dim = self.config.vision_config.hidden_size
        if concept_embeds.dim() != 3 or concept_embeds.shape[2] != embed_dim:
            raise ValueError(
                f"concept_embeds should be (N, {embed_dim}) or (B, N, {embed_dim}), got {tuple(concept_embeds.shape)}."
            )
        if len(concept_embeds) != num_images:
            raise ValueError(
                f"{num_images} images but concepts of {len(concept_embeds)} texts. To look for the same concepts in "
                "every image, give concept_embeds=model.get_concept_embeds(...).flatten(0, 1)."
            )

    def _check_pixel_values(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> None:
        config = self.config.vision_config
        if pixel_values.dim() == 4 and pixel_values.shape[1] == config.num_channels:
            rows, columns = (size // config.patch_size for size in pixel_values.shape[2:])
            side = config.image_size // config.patch_size
            if (rows, columns) == (side, side) or (interpolate_pos_encoding and rows and columns):
                return
        raise ValueError(
            f"pixel_values should be (B, {config.num_channels}, {config.image_size}, {config.image_size}), got "
            f"{tuple(pixel_values.shape)}. Resize the images, or pass interpolate_pos_encoding=True for other sizes of "
            f"at least {config.patch_size} pixels."
        )

    # Same as in fvlm.
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


def _masked_mean(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the real tokens: (B, T, width), (B, T) -> (B, width); 0 for a text without tokens."""
    is_real = attention_mask.bool().unsqueeze(-1)
    num_real = is_real.sum(dim=1).clamp(min=1)
    # A product with 0 would keep what an attention kernel leaves at padding, NaN included.
    return hidden_states.masked_fill(~is_real, 0.0).sum(dim=1) / num_real


def _portable(config: Any) -> dict[str, Any]:
    """A tower's configuration without what tells where it lay and whose code it had."""
    foreign = ("_name_or_path", "architectures", "auto_map", "transformers_version")
    return {name: value for name, value in config.to_dict().items() if name not in foreign}


# Same as in fvlm.
def _normalize_exactly(embeds: Tensor) -> Tensor:
    """The embeddings L2-normalised in float32 at least: a norm rounded to half precision shifts logits of scale 100."""
    return F.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)


def _complete_concept_mask(concept_token_spans: Tensor, concept_mask: Tensor | None, num_tokens: int) -> Tensor:
    """Which concepts have a vector, (B, C) bool; by default all whose span holds tokens."""
    if concept_mask is None:
        concept_mask = concept_token_spans.new_ones(concept_token_spans.shape[:2], dtype=torch.bool)
    return usable_concepts(concept_token_spans, concept_mask, num_tokens)


def _whole_text_spans(attention_mask: Tensor) -> Tensor:
    """One span a text, (B, 1, 2): its real tokens but the first and the last, on whichever side the padding is."""
    is_real = attention_mask.bool().long()
    first = is_real.argmax(dim=1)
    last = is_real.shape[1] - 1 - is_real.flip(1).argmax(dim=1)
    return torch.stack([first + 1, last], dim=1).unsqueeze(1)


def _load_complete(tower_class: type[PreTrainedModel], path: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """The pre-trained tower at that path, with no weight made up."""
    loaded: Any = tower_class.from_pretrained(path, output_loading_info=True, **kwargs)
    tower, loading_info = loaded
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(
            f"{path} is no complete {tower_class.__name__}: {len(missing)} weights are missing, such as {missing[0]}."
        )
    return tower


__all__ = ["ConceptCLIPModel", "ConceptCLIPOutput"]
