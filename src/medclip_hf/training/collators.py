"""Training examples to one batch of model inputs; what could not be read is named beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from medclip_hf.data.records import ConceptMention
from medclip_hf.data.stages import Drop
from medclip_hf.training.datasets import FigureExample

_CUI = re.compile(r"C(\d{7})")
_HASHED = 1 << 62  # set in every hashed identity, so that none can equal a CUI's number


class FigureCollator:
    """Calls the processor on a list of examples and gives the batch of the model with concept identities.

    Every concept mention of a caption is used, negated ones as well: "no pneumothorax" still says which words mean
    pneumothorax; whoever wants them out leaves them out of the rows.

    Images come in the size of the model's input (`FigureDataset(image_size=…)`), so that they are sampled only once.

    Args:
        processor: a `ConceptCLIPProcessor`.
        max_length: of a caption in tokens, [CLS] and [SEP] counted; spans beyond it are masked by the processor.

    Returns (of a call):
        pixel_values (B, 3, H, W), input_ids, attention_mask and token_type_ids (B, T), concept_token_spans (B, C, 2),
        concept_mask (B, C), concept_ids (B, C) int64 with -1 as padding, row_ids (list of B) and set_aside (list of
        {row_id, reason, detail}). B is the number of readable examples; it may be 0.
    """

    def __init__(self, processor: Any, max_length: int = 77) -> None:
        if max_length < 3:
            raise ValueError(f"max_length counts [CLS] and [SEP], so it must be at least 3; got {max_length}")
        self.processor = processor
        self.max_length = max_length

    def __call__(self, examples: Sequence[FigureExample | Drop]) -> dict[str, Any]:
        """One batch as a dict of tensors and two lists."""
        figures = [example for example in examples if isinstance(example, FigureExample)]
        set_aside = [
            {"row_id": example.row_id, "reason": example.reason, "detail": example.detail}
            for example in examples
            if isinstance(example, Drop)
        ]
        tensors = self._encode(figures) if figures else self._encode_nothing()
        return tensors | {"row_ids": [figure.row_id for figure in figures], "set_aside": set_aside}

    def _encode(self, figures: list[FigureExample]) -> dict[str, Any]:
        height, width = _input_size(self.processor)
        if any(figure.image.size != (width, height) for figure in figures):
            raise ValueError(
                f"the processor makes images of {height}×{width} pixels, but examples have "
                f"{sorted({figure.image.size[::-1] for figure in figures})}. Give FigureDataset the processor's size."
            )
        encoded = self.processor(
            images=[figure.image for figure in figures],
            text=[figure.caption for figure in figures],
            concept_char_spans=[[(c.start_char, c.end_char) for c in figure.concepts] for figure in figures],
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            do_resize=False,
            return_tensors="pt",
        )
        concept_ids = torch.full(encoded["concept_mask"].shape, -1, dtype=torch.int64)
        for row, figure in enumerate(figures):
            for column, concept in enumerate(figure.concepts):
                concept_ids[row, column] = concept_identity(concept)
        return dict(encoded) | {"concept_ids": concept_ids}

    def _encode_nothing(self) -> dict[str, Any]:
        """The tensors of an ordinary batch with every row taken away: right in every further axis, type and key."""
        height, width = _input_size(self.processor)
        stand_in = FigureExample("", Image.new("RGB", (width, height)), "nothing", ())
        return {name: tensor[:0] for name, tensor in self._encode([stand_in]).items()}


def concept_identity(concept: ConceptMention) -> int:
    """A number that is equal for mentions of the same concept, in every process and every run.

    A UMLS identifier gives its own number; any other identifier, or where there is none the mention's lower-cased
    name, a 62-bit hash above them all.
    """
    match = _CUI.fullmatch(concept.cui)
    if match:
        return int(match[1])
    key = f"cui:{concept.cui}" if concept.cui else f"name:{concept.name.lower()}"
    return _HASHED | int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "big") >> 2


def _input_size(processor: Any) -> tuple[int, int]:
    size = processor.image_processor.size
    return int(size["height"]), int(size["width"])
