"""Which concepts a caption is about: a language-inference model asks whether the caption entails that it shows them.

ConceptCLIP's data set was filtered so with a model on PubMedBERT; its weights and threshold are not public, so the
model is named by the user, and any sequence classifier of transformers with a label "entailment" will do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from medclip_hf.data.records import ConceptMention

logger = logging.getLogger(__name__)

HYPOTHESIS = "This figure is about {concept}."


class EntailmentFilter:
    """Keeps the concepts that captions are about.

    Args:
        model: folder or Hub name of a sequence classifier that was trained for language inference.
        min_probability: of entailment, in [0, 1].
        hypothesis: a sentence with ``{concept}`` in place of the concept's name.
        batch_size: pairs of caption and concept at once.
        device: where the model runs; by default a GPU where there is one.

    Raises:
        ValueError: where the model cannot be loaded or none of its labels is "entailment".
    """

    def __init__(
        self,
        model: str,
        *,
        min_probability: float = 0.5,
        hypothesis: str = HYPOTHESIS,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        if not 0 <= min_probability <= 1:
            raise ValueError(f"min_probability must lie in 0 to 1, got {min_probability}")
        if "{concept}" not in hypothesis:
            raise ValueError(f"hypothesis must hold {{concept}}, got {hypothesis!r}")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModelForSequenceClassification.from_pretrained(model).eval()
        except OSError as error:
            raise ValueError(f"cannot load the entailment model {model!r}: {error}") from error
        self.label = entailment_label(self.model.config.id2label)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.to(self.device)
        self.min_probability = min_probability
        self.hypothesis = hypothesis
        self.batch_size = batch_size

    def __call__(
        self, captions: Sequence[str], mentions: Sequence[tuple[ConceptMention, ...]]
    ) -> list[tuple[ConceptMention, ...]]:
        """The mentions of each caption whose concept it entails, in their order.

        Denied mentions are kept without being asked: a caption never entails what it denies.

        Args:
            captions: raw texts.
            mentions: those of each caption.
        """
        pairs = [
            (caption, name)
            for caption, found in zip(captions, mentions, strict=True)
            for name in dict.fromkeys(mention.name for mention in found if not mention.is_negated)
        ]
        probability = dict(zip(pairs, self.probabilities(pairs), strict=False))
        return [
            tuple(
                mention
                for mention in found
                if mention.is_negated or probability[caption, mention.name] >= self.min_probability
            )
            for caption, found in zip(captions, mentions, strict=True)
        ]

    @torch.inference_mode()
    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The probability that each caption entails its concept.

        Args:
            pairs: (caption, name of a concept); captions are cut to the length of the model, never the concept.
        """
        order = sorted(range(len(pairs)), key=lambda place: len(pairs[place][0]))  # alike lengths: little padding
        result = [0.0] * len(pairs)
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            inputs = self.tokenizer(
                [pairs[place][0] for place in places],
                [self.hypothesis.format(concept=pairs[place][1]) for place in places],
                truncation="only_first",
                max_length=min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings),
                padding=True,
                return_tensors="pt",
            ).to(self.device)
            entailed = self.model(**inputs).logits.float().softmax(dim=-1)[:, self.label]
            for place, value in zip(places, entailed.tolist(), strict=True):
                result[place] = value
        return result


def entailment_label(id2label: dict[int, str]) -> int:
    """The class that means entailment.

    Raises:
        ValueError: where no label, or more than one, is called so.
    """
    labels = [number for number, name in id2label.items() if name.lower().startswith("entail")]
    if len(labels) != 1:
        raise ValueError(
            f"exactly one label of the model must be called entailment; it has {sorted(id2label.values())}. "
            "Name a model for language inference, or set id2label in its config."
        )
    return int(labels[0])
