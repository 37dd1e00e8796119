"""ConceptCLIP for visual question answering: two streams that attend to each other, and a classifier over answers.

Patches and words enter as PC-Align leaves them (projected into the joint space, not normalised). Two stacks of
transformer layers, one a stream, attend to themselves and to the other stream; the pooled streams choose one answer of
a fixed vocabulary. The design is METER's (Dou et al., "An Empirical Study of Training End-to-End Vision-and-Language
Transformers", 2022), with the sizes of ConceptCLIP's evaluation as defaults.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, SiglipVisionConfig, SiglipVisionModel
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec, strict
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_conceptclip import SO400M_PATCH14_384
from .modeling_conceptclip import ConceptCLIPModel, ConceptCLIPProjectionHead
from .spelling_conceptclip import refuse_misspelt

NO_ANSWER = -100  # label of a question whose answer the vocabulary does not hold
TEXT, IMAGE = 0, 1  # rows of the stream embedding


@strict
class ConceptCLIPVisualQuestionAnsweringConfig(PreTrainedConfig):
    """What fixes the shapes of a [`ConceptCLIPForVisualQuestionAnswering`], and its answers (`id2label`).

    Args:
        text_config: configuration of the text tower, as in `ConceptCLIPConfig`.
        vision_config: configuration of the image tower, as in `ConceptCLIPConfig`; its pooling head is left out, since
            the patches are used.
        cross_modal_config: a `BertConfig` of the layers of each stream; default as published: 6 layers, 768 wide, 12
            heads, dropout 0.1.
        project_tokens: patches and words pass PC-Align's projections first, as published; False for a model of the
            first stage, which has none.
    """

    model_type = "conceptclip_vqa"
    sub_configs_defaults = {  # noqa: RUF012 - as transformers wants it
        "text_config": SubConfigSpec(BertConfig),
        "vision_config": SubConfigSpec(SiglipVisionConfig, init_kwargs=SO400M_PATCH14_384),
        "cross_modal_config": SubConfigSpec(BertConfig, init_kwargs={"num_hidden_layers": 6}),
    }

    text_config: Any = None  # a configuration, its fields as a dict, or None; a configuration from here on
    vision_config: Any = None
    cross_modal_config: Any = None
    project_tokens: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.vision_config.vision_use_head = False  # a parameter that no loss reaches would stop plain DDP

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers in the order of the logits."""
        names: Any = self.id2label
        return tuple(names[place] for place in range(len(names)))


@dataclass
class ConceptCLIPVisualQuestionAnsweringOutput(ModelOutput):
    """What [`ConceptCLIPForVisualQuestionAnswering`] gives back.

    Args:
        loss (): mean cross-entropy over the questions that have a label; 0 where none has.
        logits (B, num_answers): one score an answer, for a softmax.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class ConceptCLIPCrossModalLayer(GradientCheckpointingLayer):
    """One layer of one stream: attention to itself, attention to the other stream, MLP; post-norm as in BERT."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self_attention = BertAttention(config)
        self.cross_attention = BertAttention(config, is_cross_attention=True)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, hidden_states: Tensor, other: Tensor, mask: Tensor | None, other_mask: Tensor | None) -> Tensor:
        """The stream (B, T, width) after the layer; `other` (B, S, width) is the stream that it looks at."""
        hidden_states, _ = self.self_attention(hidden_states, mask)
        hidden_states, _ = self.cross_attention(
            hidden_states, encoder_hidden_states=other, encoder_attention_mask=other_mask
        )
        return self.output(self.intermediate(hidden_states), hidden_states)


class ConceptCLIPForVisualQuestionAnswering(PreTrainedModel):
    """ConceptCLIP's towers, two streams of cross-attention and a classifier over a fixed vocabulary of answers.

    Examples:
        >>> model = ConceptCLIPForVisualQuestionAnswering.from_conceptclip("my-conceptclip", ["no", "yes", "left lung"])
        >>> inputs = processor(images="radiograph.png", text="Is there an effusion?")
        >>> model.config.id2label[model(**inputs).logits.argmax(-1).item()]
    """

    config: ConceptCLIPVisualQuestionAnsweringConfig
    base_model_prefix = "visual_question_answering"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["ConceptCLIPProjectionHead", "ConceptCLIPCrossModalLayer"]  # noqa: RUF012

    def __init__(self, config: ConceptCLIPVisualQuestionAnsweringConfig) -> None:
        super().__init__(config)
        cross = config.cross_modal_config
        if cross._attn_implementation is None:  # the layers belong to no model of their own that would choose one
            cross._attn_implementation = config._attn_implementation
        embed_dim, text_dim = config.vision_config.hidden_size, config.text_config.hidden_size
        self.vision_model = SiglipVisionModel._from_config(config.vision_config)
        self.text_model = BertModel._from_config(config.text_config, add_pooling_layer=False)
        if config.project_tokens:
            self.patch_projection = ConceptCLIPProjectionHead(embed_dim, embed_dim)
            self.token_projection = ConceptCLIPProjectionHead(text_dim, embed_dim)
            text_dim = embed_dim
        self.image_embedding = nn.Linear(embed_dim, cross.hidden_size)
        self.text_embedding = nn.Linear(text_dim, cross.hidden_size)
        self.stream_embedding = nn.Embedding(2, cross.hidden_size)
        self.image_layers = nn.ModuleList([ConceptCLIPCrossModalLayer(cross) for _ in range(cross.num_hidden_layers)])
        self.text_layers = nn.ModuleList([ConceptCLIPCrossModalLayer(cross) for _ in range(cross.num_hidden_layers)])
        self.image_pooler = nn.Linear(cross.hidden_size, cross.hidden_size)
        self.text_pooler = nn.Linear(cross.hidden_size, cross.hidden_size)
        width = 2 * cross.hidden_size
        self.classifier = nn.Sequential(
            nn.Linear(width, width),
            nn.LayerNorm(width, eps=cross.layer_norm_eps),
            nn.GELU(),
            nn.Linear(width, len(config.answers)),
        )
        self.post_init()

    @classmethod
    def from_conceptclip(
        cls, conceptclip: str | PathLike[str] | ConceptCLIPModel, answers: Sequence[str], **config_kwargs: Any
    ) -> "ConceptCLIPForVisualQuestionAnswering":
        """A model with the towers and projections of a ConceptCLIP; streams and classifier are fresh.

        Args:
            conceptclip: the model, or its folder or Hub name.
            answers: the vocabulary; the order is that of the logits and is saved in the config.
            config_kwargs: further arguments of [`ConceptCLIPVisualQuestionAnsweringConfig`].

        Raises:
            ValueError: no answer, or one that is empty or repeated.
        """
        if not answers or len(set(answers)) < len(answers) or not all(answer.strip() for answer in answers):
            raise ValueError(f"answers must be different, not empty and at least one, got {list(answers)[:20]}.")
        if not isinstance(conceptclip, ConceptCLIPModel):
            conceptclip = ConceptCLIPModel.from_pretrained(conceptclip)
        config = ConceptCLIPVisualQuestionAnsweringConfig(
            text_config=conceptclip.config.text_config.to_dict(),
            vision_config=conceptclip.config.vision_config.to_dict(),
            project_tokens=conceptclip.config.use_patch_concept_alignment,
            id2label=dict(enumerate(answers)),
            label2id={answer: place for place, answer in enumerate(answers)},
            **config_kwargs,
        )
        model = cls(config)
        parts = ["vision_model", "text_model"]
        parts += ["patch_projection", "token_projection"] if config.project_tokens else []
        for part in parts:
            own = model.get_submodule(part)
            given = conceptclip.get_submodule(part).state_dict()
            own.load_state_dict({name: given[name] for name in own.state_dict()})  # all but the image tower's head
        return model

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, for the reason given in [`ConceptCLIPModel.is_custom_code`]."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Embedding)):  # those of the towers are initialised by their own classes
            init.normal_(module.weight, std=self.config.cross_modal_config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings of the text tower."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text tower."""
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    @refuse_misspelt
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ConceptCLIPVisualQuestionAnsweringOutput:
        """Scores of all answers, and the loss where labels are given; question i is asked of image i.

        Args:
            input_ids (B, T): token ids of the questions.
            pixel_values (B, 3, H, W): normalised pixels.
            attention_mask (B, T): 1 for real tokens; default: every token but padding.
            token_type_ids (B, T): default: 0.
            position_ids (B, T): default: counted from 0.
            labels (B,): place of the answer in the vocabulary; `NO_ANSWER` (-100) where it holds none.
            kwargs: `return_dict`.

        Raises:
            ValueError: shapes that do not fit, or a label outside the vocabulary.
        """
        self._check_inputs(input_ids, pixel_values, attention_mask, labels)
        if attention_mask is None:
            attention_mask = input_ids.ne(self.config.text_config.pad_token_id or 0).long()
        patches = self.vision_model(pixel_values, return_dict=True).last_hidden_state  # (B, P, embed_dim)
        words = self.text_model(
            input_ids, attention_mask, token_type_ids=token_type_ids, position_ids=position_ids, return_dict=True
        ).last_hidden_state  # (B, T, text_dim)
        if self.config.project_tokens:
            patches, words = self.patch_projection(patches), self.token_projection(words)
        image, text = self._attend(patches, words, attention_mask)
        # The image tower has no class token to pool by; of the text the first real token is [CLS].
        first = attention_mask.bool().long().argmax(dim=1)
        text_first = text[torch.arange(len(text), device=text.device), first]
        pooled = [self.text_pooler(text_first).tanh(), self.image_pooler(image.mean(dim=1)).tanh()]
        logits = self.classifier(torch.cat(pooled, dim=-1))
        loss = None if labels is None else _mean_cross_entropy(logits, labels)
        return ConceptCLIPVisualQuestionAnsweringOutput(loss=loss, logits=logits)

    def _attend(self, patches: Tensor, words: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams (B, P, width), (B, T, width) after all layers; each layer sees the other stream as it was."""
        image = self.image_embedding(patches) + self.stream_embedding.weight[IMAGE]
        text = self.text_embedding(words) + self.stream_embedding.weight[TEXT]
        cross: Any = self.config.cross_modal_config
        text_mask = create_bidirectional_mask(cross, text, attention_mask)
        text_mask_for_image = create_bidirectional_mask(cross, image, attention_mask, encoder_hidden_states=text)
        for image_layer, text_layer in zip(self.image_layers, self.text_layers, strict=True):
            image, text = (
                image_layer(image, text, None, text_mask_for_image),
                text_layer(text, image, text_mask, None),
            )
        return image, text

    def _check_inputs(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None, labels: Tensor | None
    ) -> None:
        vision, max_tokens = self.config.vision_config, self.config.text_config.max_position_embeddings
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != (
            vision.num_channels,
            vision.image_size,
            vision.image_size,
        ):
            raise ValueError(
                f"pixel_values should be (B, {vision.num_channels}, {vision.image_size}, {vision.image_size}), got "
                f"{tuple(pixel_values.shape)}. Give the images to the processor first."
            )
        if input_ids.dim() != 2 or not 1 <= input_ids.shape[1] <= max_tokens:
            raise ValueError(f"input_ids should be (B, T) with 1 to {max_tokens} tokens, got {tuple(input_ids.shape)}.")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask should be {tuple(input_ids.shape)} like input_ids, got {tuple(attention_mask.shape)}."
            )
        if len(input_ids) != len(pixel_values):
            raise ValueError(f"Each question needs its image, got {len(input_ids)} and {len(pixel_values)}.")
        if labels is not None and labels.shape != (len(input_ids),):
            raise ValueError(f"labels should be ({len(input_ids)},), one place each, got {tuple(labels.shape)}.")
        num_answers = len(self.config.answers)
        if labels is not None and len(labels) and (labels.max() >= num_answers or labels.min() < NO_ANSWER):
            raise ValueError(
                f"labels hold {int(labels.max())}, but the vocabulary has {num_answers} answers. Mark an "
                f"answer that it does not hold by {NO_ANSWER}."
            )


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in float32, mean over the labelled questions."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=NO_ANSWER, reduction="sum")
    return total / (labels != NO_ANSWER).sum().clamp(min=1)


__all__ = [
    "ConceptCLIPForVisualQuestionAnswering",
    "ConceptCLIPVisualQuestionAnsweringConfig",
    "ConceptCLIPVisualQuestionAnsweringOutput",
]
