"""Report generation as a training task: studies or CT scans with reports as examples, batches, and the objective."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medclip_hf.data.image_reports import StudyRow
from medclip_hf.data.images import UnreadableImage
from medclip_hf.data.reports.sentences import split_sentences
from medclip_hf.data.stages import Drop
from medclip_hf.training.scan_datasets import ScanExample
from medclip_hf.training.supervised import (
    Batch,
    mean_over_all,
    model_inputs,
    name_set_aside,
    read_picture,
    split_rows,
)

NO_TARGET = -100  # as the models have it
PUBLISHED_MAX_LENGTH = 60  # tokens of a report, for IU X-Ray


@dataclass(frozen=True)
class StudyExample:
    """A study with its pictures, RGB."""

    row: StudyRow
    images: tuple[Image.Image, ...]


class StudyDataset:
    """A map-style data set of `StudyExample`; a study with a picture that cannot be read gives a `Drop`.

    Args:
        folder: of the pictures.
        rows: from `read_studies`.
    """

    def __init__(self, folder: str | Path, rows: Sequence[StudyRow]) -> None:
        self.folder = Path(folder)
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> StudyExample | Drop:
        row = self.rows[key[1] if isinstance(key, tuple) else key]
        try:
            return StudyExample(row, tuple(read_picture(self.folder, path) for path in row.image_paths))
        except UnreadableImage as error:
            return Drop(error.reason, error.detail, row.row_id)


class StudyCollator:
    """Batches of `ConceptCLIPForReportGeneration` from studies.

    Args:
        processor: a `ConceptCLIPProcessor` with the tokenizer of the language model.
        prompt: of the model's config.
        max_length: of a report in tokens; the end-of-text token comes on top and is left out where a report is cut.

    Returns (of a call):
        pixel_values (B, V, 3, H, W), view_mask (B, V) bool, input_ids, attention_mask and labels (B, T), row_ids (list
        of B), set_aside (list of {row_id, reason, detail}).
    """

    def __init__(self, processor: Any, prompt: str, max_length: int = PUBLISHED_MAX_LENGTH) -> None:
        self.processor = processor
        self.prompt = prompt
        self.max_length = max_length

    def __call__(self, examples: Sequence[StudyExample | Drop]) -> dict[str, Any]:
        """One batch as a dict of tensors and two lists."""
        studies = [example for example in examples if isinstance(example, StudyExample)]
        reports = [study.row.report for study in studies]
        return {
            **encode_views(self.processor, [study.images for study in studies]),
            **encode_reports(self.processor.tokenizer, self.prompt, reports, self.max_length),
            "row_ids": [study.row.row_id for study in studies],
            "set_aside": name_set_aside(examples),
        }


class ScanReportCollator:
    """Batches of `FVLMForReportGeneration` from the crops of `ScanDataset`.

    The report is what it says of the model's anatomies, a sentence that several share once. An anatomy that the crop
    cuts is read as far as it lies in the crop.

    Args:
        processor: an `FVLMProcessor` with the tokenizer of the language model.
        prompt: of the model's config.
        max_length: as in `StudyCollator`.

    Returns (of a call):
        pixel_values (B, 1, D, H, W), anatomy_mask (B, D, H, W), input_ids, attention_mask and labels (B, T), row_ids
        (list of B), set_aside (list of {row_id, reason, detail}).
    """

    def __init__(self, processor: Any, prompt: str, max_length: int = 200) -> None:
        self.processor = processor
        self.prompt = prompt
        self.max_length = max_length

    def __call__(self, examples: Sequence[ScanExample | Drop]) -> dict[str, Any]:
        """One batch as a dict of tensors and two lists."""
        scans = [example for example in examples if isinstance(example, ScanExample)]
        window = self.processor.image_processor
        volumes = np.zeros((len(scans), 1, *window.size_dhw), dtype=np.float32)
        masks = np.zeros((len(scans), *window.size_dhw), dtype=np.uint8)
        for place, scan in enumerate(scans):
            scaled = (scan.image.astype(np.float32) - window.hu_min) / (window.hu_max - window.hu_min)
            volumes[place, 0], masks[place] = np.clip(scaled, 0.0, 1.0), scan.anatomy_mask
        reports = [scan_report(scan.texts) for scan in scans]
        return {
            "pixel_values": torch.from_numpy(volumes),
            "anatomy_mask": torch.from_numpy(masks),
            **encode_reports(self.processor.tokenizer, self.prompt, reports, self.max_length),
            "row_ids": [scan.row_id for scan in scans],
            "set_aside": name_set_aside(examples),
        }


class ReportObjective:
    """Negative log-likelihood of the reports, mean over all their tokens of the global batch.

    A long report so counts for as many tokens as it has, wherever it lies; a mean of micro-batches' means would not.
    """

    inputs = ("input_ids", "pixel_values", "attention_mask", "view_mask", "anatomy_mask", "labels")

    def split(self, batch: Batch, num_chunks: int) -> list[Batch]:
        """Micro-batches of the batch."""
        return split_rows(batch, num_chunks)

    def embed(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss and number of tokens of each report."""
        inputs, num_rows = model_inputs(batch, self.inputs)
        outputs = model(**inputs)
        return {name: outputs[name][:num_rows] for name in ("sample_losses", "num_tokens")}

    def compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """`loss` to call backward on, and the global loss a token for the log."""
        return mean_over_all(embeddings["sample_losses"], embeddings["num_tokens"])


def scan_report(texts: Sequence[str]) -> str:
    """The report that the captions of the anatomies make up, in their order, each sentence once."""
    sentences = dict.fromkeys(sentence for text in texts for sentence in split_sentences(text))
    return " ".join(sentence if sentence.endswith(".") else f"{sentence}." for sentence in sentences)


def encode_views(processor: Any, studies: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
    """Pixels (B, V, 3, H, W) of all views of the studies, and which of them stand, (B, V) bool."""
    size = processor.image_processor.size
    num_views = max([1, *(len(views) for views in studies)])
    pixel_values = torch.zeros(len(studies), num_views, 3, size["height"], size["width"])
    view_mask = torch.zeros(len(studies), num_views, dtype=torch.bool)
    for place, views in enumerate(studies):
        pixel_values[place, : len(views)] = processor(images=list(views), return_tensors="pt")["pixel_values"]
        view_mask[place, : len(views)] = True
    return {"pixel_values": pixel_values, "view_mask": view_mask}


def encode_reports(tokenizer: Any, prompt: str, reports: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Prompt, report and end of text as token ids (B, T), padded to the right, and what of them is to be predicted.

    Raises:
        ValueError: a tokenizer without an end-of-text token: the model would never learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token): reports could not end. Set one.")
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    rows = [_encode(tokenizer, report, max_length) for report in reports]
    length = len(start) + max([0, *map(len, rows)])
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.full((len(rows), length), padding, dtype=torch.int64)
    labels = torch.full((len(rows), length), NO_TARGET, dtype=torch.int64)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for place, tokens in enumerate(rows):
        stop = len(start) + len(tokens)
        input_ids[place, :stop] = torch.tensor([*start, *tokens])
        labels[place, len(start) : stop] = torch.tensor(tokens)
        attention_mask[place, :stop] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _encode(tokenizer: Any, report: str, max_length: int) -> list[int]:
    """The report's tokens and the end of text; a report that is cut does not end."""
    tokens = tokenizer(report, add_special_tokens=False)["input_ids"]
    return [*tokens, tokenizer.eos_token_id] if len(tokens) <= max_length else tokens[:max_length]
