"""Visual question answering as a training task: questions with pictures as examples, batches, and the objective."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from medclip_hf.data.images import UnreadableImage
from medclip_hf.data.question_answers import QuestionRow
from medclip_hf.data.stages import Drop
from medclip_hf.training.supervised import (
    Batch,
    mean_over_all,
    model_inputs,
    name_set_aside,
    read_picture,
    split_rows,
)

NO_ANSWER = -100  # as the model has it
PUBLISHED_MAX_LENGTH = 50  # tokens of a question


@dataclass(frozen=True)
class QuestionExample:
    """A question with its picture, RGB."""

    row: QuestionRow
    image: Image.Image


class QuestionDataset:
    """A map-style data set of `QuestionExample`; a picture that cannot be read gives a `Drop`.

    Args:
        folder: of the pictures.
        rows: from `read_questions`.
    """

    def __init__(self, folder: str | Path, rows: Sequence[QuestionRow]) -> None:
        self.folder = Path(folder)
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> QuestionExample | Drop:
        row = self.rows[key[1] if isinstance(key, tuple) else key]
        try:
            return QuestionExample(row, read_picture(self.folder, row.image_path))
        except UnreadableImage as error:
            return Drop(error.reason, error.detail, row.row_id)


class QuestionCollator:
    """Calls the processor on examples and gives the batch of the model.

    Args:
        processor: a `ConceptCLIPProcessor`; the picture is squashed to the model's size as it was in pre-training (the
            release crops its centre here, which loses what lies at the border).
        answers: the vocabulary, in the order of the logits.
        max_length: of a question in tokens.

    Returns (of a call):
        pixel_values (B, 3, H, W), input_ids, attention_mask and token_type_ids (B, T), labels (B,) with `NO_ANSWER` for
        what the vocabulary does not hold, row_ids (list of B), set_aside (list of {row_id, reason, detail}).
    """

    def __init__(self, processor: Any, answers: Sequence[str], max_length: int = PUBLISHED_MAX_LENGTH) -> None:
        self.processor = processor
        self.places = {answer: place for place, answer in enumerate(answers)}
        self.max_length = max_length

    def __call__(self, examples: Sequence[QuestionExample | Drop]) -> dict[str, Any]:
        """One batch as a dict of tensors and two lists."""
        questions = [example for example in examples if isinstance(example, QuestionExample)]
        # Without a row, an ordinary batch with its row taken away: right in every axis, type and key.
        stand_in = QuestionExample(QuestionRow("", "", "nothing", "", "open", ""), Image.new("RGB", (8, 8)))
        encoded = self.processor(
            images=[question.image for question in questions or [stand_in]],
            text=[question.row.question for question in questions or [stand_in]],
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        labels = [self.places.get(question.row.answer, NO_ANSWER) for question in questions]
        return {
            **{name: values[: len(questions)] for name, values in encoded.items()},
            "labels": torch.tensor(labels, dtype=torch.int64),
            "row_ids": [question.row.row_id for question in questions],
            "set_aside": name_set_aside(examples),
        }


class QuestionObjective:
    """Cross-entropy over the answers, mean over the questions of the global batch whose answer is in the vocabulary."""

    inputs = ("input_ids", "pixel_values", "attention_mask", "token_type_ids")

    def split(self, batch: Batch, num_chunks: int) -> list[Batch]:
        """Micro-batches of the batch."""
        return split_rows(batch, num_chunks)

    def embed(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The logits of the batch."""
        inputs, num_rows = model_inputs(batch, self.inputs)
        return {"logits": model(**inputs)["logits"][:num_rows]}

    def compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """`loss` to call backward on, and the global loss and accuracy for the log."""
        logits, labels = embeddings["logits"].float(), batch["labels"]
        losses = F.cross_entropy(logits, labels, ignore_index=NO_ANSWER, reduction="none")
        return mean_over_all(losses, labels != NO_ANSWER, accuracy=logits.argmax(dim=-1) == labels)
