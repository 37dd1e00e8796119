"""Training examples to one batch of model inputs; what could not be read is named beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from medclip_hf.data.records import ConceptMention
from medclip_hf.data.stages import Drop
from medclip_hf.processing.fvlm.processing_fvlm import MAX_TEXT_LENGTH, index_texts, text_id
from medclip_hf.processing.pixels import SCALING, empty_batch, figure_scaling, scan_scaling, stacked_figures
from medclip_hf.training.datasets import FigureExample
from medclip_hf.training.scan_datasets import ScanExample

_CUI = re.compile(r"C(\d{7})")
_HASHED = 1 << 62  # set in every hashed identity, so that none can equal a CUI's number


class FigureCollator:
    """Calls the processor on a list of examples and gives the batch of the model with concept identities.

    Every concept mention of a caption is used, negated ones as well: "no pneumothorax" still says which words mean
    pneumothorax; whoever wants them out leaves them out of the rows.

    Images come in the size of the model's input (`FigureDataset(image_size=…)`), so that they are sampled only once.
    Rows come with the longest caption first: micro-batches are runs of rows, and each pads to its own longest caption.

    Args:
        processor: a `ConceptCLIPProcessor`.
        max_length: of a caption in tokens, [CLS] and [SEP] counted; spans beyond it are masked by the processor.
        raw_pixels: leave the scaling to the device (`processing.pixels`); `pixel_values` are then uint8 and
            `pixel_scaling` (B, 2, 3) comes with them.

    Returns (of a call):
        pixel_values (B, 3, H, W), input_ids, attention_mask and token_type_ids (B, T), concept_token_spans (B, C, 2),
        concept_mask (B, C), concept_ids (B, C) int64 with -1 as padding, text_lengths (list of B, in tokens), row_ids
        (list of B) and set_aside (list of {row_id, reason, detail}). B is the number of readable examples; it may be 0.
    """

    def __init__(self, processor: Any, max_length: int = 77, *, raw_pixels: bool = False) -> None:
        if max_length < 3:
            raise ValueError(f"max_length counts [CLS] and [SEP], so it must be at least 3; got {max_length}")
        self.processor = processor
        self.max_length = max_length
        self.raw_pixels = raw_pixels

    def __call__(self, examples: Sequence[FigureExample | Drop]) -> dict[str, Any]:
        """One batch as a dict of tensors and lists."""
        figures = [example for example in examples if isinstance(example, FigureExample)]
        batch = self._encode(figures) if figures else self._encode_nothing()
        return batch | {"set_aside": _set_aside(examples)}

    def _encode(self, figures: list[FigureExample]) -> dict[str, Any]:
        height, width = _input_size(self.processor)
        if any(figure.image.size != (width, height) for figure in figures):
            raise ValueError(
                f"the processor makes images of {height}×{width} pixels, but examples have "
                f"{sorted({figure.image.size[::-1] for figure in figures})}. Give FigureDataset the processor's size."
            )
        encoded = self.processor(
            text=[figure.caption for figure in figures],
            concept_char_spans=[[(c.start_char, c.end_char) for c in figure.concepts] for figure in figures],
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        concept_ids = torch.full(encoded["concept_mask"].shape, -1, dtype=torch.int64)
        for identities, figure in zip(concept_ids.numpy(), figures, strict=True):
            identities[: len(figure.concepts)] = [concept_identity(concept) for concept in figure.concepts]
        lengths, order = _longest_first(encoded["attention_mask"])
        texts = {name: tensor[order] for name, tensor in (dict(encoded) | {"concept_ids": concept_ids}).items()}
        in_order = [figures[row] for row in order.tolist()]
        row_ids = [figure.row_id for figure in in_order]
        return texts | self._pixels(in_order) | {"text_lengths": lengths, "row_ids": row_ids}

    def _pixels(self, figures: list[FigureExample]) -> dict[str, torch.Tensor]:
        images = [figure.image for figure in figures]
        if not self.raw_pixels:
            return dict(self.processor(images=images, do_resize=False, return_tensors="pt"))
        scaling = figure_scaling(self.processor.image_processor, len(images))
        return {"pixel_values": stacked_figures(images), SCALING: scaling}

    def _encode_nothing(self) -> dict[str, Any]:
        """The tensors of an ordinary batch with every row taken away: right in every further axis, type and key."""
        height, width = _input_size(self.processor)
        stand_in = FigureExample("", Image.new("RGB", (width, height)), "nothing", ())
        return {name: values[:0] for name, values in self._encode([stand_in]).items()}


class ScanCollator:
    """Windows the crops, encodes each distinct text once, and says which text belongs to which anatomy of which scan.

    The text of an anatomy that is not complete in its crop has no part in the loss and is not encoded.

    Args:
        processor: an `FVLMProcessor`; its image processor holds the Hounsfield window, the anatomies and the size.
        max_length: of a text in tokens, [CLS] and [SEP] counted.
        reduce_false_negatives: False trains as CLIP does, for comparison: an anatomy's text is the right answer for its
            own scan alone, even where another scan is normal too or has the very same text. Then every text is encoded
            for itself under an identity of its own, and `is_abnormal` is true everywhere.
        raw_pixels: leave the window to the device (`processing.pixels`); `pixel_values` are then int16 and
            `pixel_scaling` (B, 2, 1) comes with them.

    Returns (of a call):
        pixel_values (B, 1, D, H, W) in [0, 1], anatomy_mask (B, D, H, W) uint8, input_ids and attention_mask (T, L) of
        the T distinct texts, the longest first, padded to it, text_lengths (list of T, in tokens), text_ids (T,) int64
        (the same for the same text in any batch), text_index (B, A) int64 with -1 for none, is_complete and
        is_abnormal (B, A) bool, row_ids (list of B) and set_aside (list of {row_id, reason, detail}). B and T may be 0.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int = MAX_TEXT_LENGTH,
        *,
        reduce_false_negatives: bool = True,
        raw_pixels: bool = False,
    ) -> None:
        if max_length < 3:
            raise ValueError(f"max_length counts [CLS] and [SEP], so it must be at least 3; got {max_length}")
        self.processor = processor
        self.max_length = max_length
        self.reduce_false_negatives = reduce_false_negatives
        self.raw_pixels = raw_pixels
        self.anatomies = tuple(processor.image_processor.anatomies)
        self.size_dhw = tuple(processor.image_processor.size_dhw)

    def __call__(self, examples: Sequence[ScanExample | Drop]) -> dict[str, Any]:
        """One batch as a dict of tensors and two lists."""
        scans = [example for example in examples if isinstance(example, ScanExample)]
        for scan in scans:
            self._check(scan)
        flags = (len(self.anatomies),)
        tensors = self._volumes(scans) | {
            "is_complete": _stacked([scan.is_complete for scan in scans], flags, np.bool_),
            "is_abnormal": _stacked([self._is_abnormal(scan) for scan in scans], flags, np.bool_),
        }
        rows = {"row_ids": [scan.row_id for scan in scans], "set_aside": _set_aside(examples)}
        return tensors | self._encode(scans) | rows

    def _check(self, scan: ScanExample) -> None:
        if scan.image.shape != self.size_dhw or len(scan.texts) != len(self.anatomies):
            raise ValueError(
                f"the processor is for crops of {self.size_dhw} voxels and the anatomies {self.anatomies}, but scan "
                f"{scan.row_id} came with {scan.image.shape} and {len(scan.texts)} texts. Give ScanDataset the "
                "processor's size and anatomies."
            )

    def _is_abnormal(self, scan: ScanExample) -> np.ndarray:
        return scan.is_abnormal if self.reduce_false_negatives else np.ones_like(scan.is_abnormal)

    def _volumes(self, scans: list[ScanExample]) -> dict[str, torch.Tensor]:
        images = [scan.image for scan in scans]
        masks = {"anatomy_mask": _stacked([scan.anatomy_mask for scan in scans], self.size_dhw, np.uint8)}
        if not self.raw_pixels:
            return masks | {"pixel_values": self._window(images)}
        volumes = _stacked(images, self.size_dhw, np.int16).unsqueeze(1)
        window = self.processor.image_processor
        return masks | {"pixel_values": volumes, SCALING: scan_scaling(window.hu_min, window.hu_max, len(images))}

    def _window(self, images: list[np.ndarray]) -> torch.Tensor:
        """As the processor does it; Hounsfield units were checked when the scans were prepared."""
        low, high = self.processor.image_processor.hu_min, self.processor.image_processor.hu_max
        scaled = _stacked(images, self.size_dhw, np.float32).unsqueeze(1)
        for values in scaled.flatten(0, 2):  # slice by slice, which the processor's cache holds
            values.sub_(low).div_(high - low).clamp_(0, 1)
        return scaled

    def _encode(self, scans: list[ScanExample]) -> dict[str, Any]:
        texts, identities, text_index = self._distinct_texts(scans)
        encoded = self.processor.tokenizer(
            texts or [""],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        lengths, order = _longest_first(encoded["attention_mask"][: len(texts)])
        places = torch.cat([order.argsort(), torch.tensor([-1])])  # the last one is that of no text, -1
        index = torch.tensor(text_index, dtype=torch.int64).reshape(len(scans), len(self.anatomies))
        return {
            "input_ids": encoded["input_ids"][order],
            "attention_mask": encoded["attention_mask"][order],
            "text_lengths": lengths,
            "text_ids": torch.tensor([text_id(identities[row]) for row in order.tolist()], dtype=torch.int64),
            "text_index": places[index],
        }

    def _distinct_texts(self, scans: list[ScanExample]) -> tuple[list[str], list[str], list[list[int]]]:
        """T texts, what each is recognised by, and the row of every anatomy's text (-1: none)."""
        used = [
            {name: scan.texts[place] for place, name in enumerate(self.anatomies) if scan.is_complete[place]}
            for scan in scans
        ]
        if self.reduce_false_negatives:
            texts, text_index = index_texts(used, self.anatomies)
            return texts, texts, text_index
        marked = [
            {name: f"{scan.row_id}\n{name}\n{text}" if text else "" for name, text in entry.items()}
            for scan, entry in zip(scans, used, strict=True)
        ]
        identities, text_index = index_texts(marked, self.anatomies)
        return [identity.split("\n", 2)[2] for identity in identities], identities, text_index


def _set_aside(examples: Sequence[Any]) -> list[dict[str, str]]:
    """What the run record keeps of the examples that could not be read."""
    drops = [example for example in examples if isinstance(example, Drop)]
    return [{"row_id": drop.row_id, "reason": drop.reason, "detail": drop.detail} for drop in drops]


def _longest_first(attention_mask: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Lengths of the texts in tokens from the longest on, and which text has each; equal ones keep their order."""
    lengths, order = attention_mask.sum(dim=1).sort(descending=True, stable=True)
    return lengths.tolist(), order


def _stacked(arrays: list[np.ndarray], shape: tuple[int, ...], dtype: type) -> torch.Tensor:
    """The arrays as one tensor (B, *shape), also where there are none."""
    stacked = empty_batch((len(arrays), *shape), dtype)
    for target, array in zip(stacked.numpy(), arrays, strict=True):
        target[...] = array
    return stacked


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
