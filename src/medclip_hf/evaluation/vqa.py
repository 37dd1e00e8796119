"""Visual question answering: answers of a model, and their accuracy on closed, open and all questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medclip_hf.data.question_answers import ANSWER_TYPES, QuestionRow
from medclip_hf.evaluation.intervals import Interval, mean_with_interval

PUBLISHED_MAX_LENGTH = 50  # tokens of a question


@dataclass(frozen=True)
class Answer:
    """The answer to a question with its softmax probability; `answer` is None, with a `reason`, where there is none."""

    row_id: str
    answer: str | None
    probability: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class QuestionFigures:
    """How often a model answers right.

    Args:
        accuracy: "overall", "closed" and "open" to the share of right answers, by exact match of normalised answers.
        most_frequent: the same for the model that always gives the most frequent answer of the training split, which
            looks at nothing; empty where that split was not given.
        num_questions: counted, by the same names.
        num_outside_vocabulary: questions whose right answer the vocabulary does not hold; they count as wrong.
        unanswered: reason to number of questions without an answer; they do not count.
        num_images_shared: images of these questions that training questions are about as well; None where unknown.
    """

    accuracy: dict[str, Interval]
    most_frequent: dict[str, Interval]
    num_questions: dict[str, int]
    num_outside_vocabulary: int
    unanswered: dict[str, int]
    num_images_shared: int | None

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        intervals = {
            name: {kind: interval.as_dict() for kind, interval in getattr(self, name).items()}
            for name in ("accuracy", "most_frequent")
        }
        return vars(self) | intervals


@torch.no_grad()
def answer_questions(
    model: Any,
    processor: Any,
    folder: str | Path,
    rows: Sequence[QuestionRow],
    *,
    batch_size: int = 32,
    max_length: int = PUBLISHED_MAX_LENGTH,
) -> list[Answer]:
    """The model's answer to every question, in their order; a picture that cannot be read gives a reason instead.

    Args:
        model: a `ConceptCLIPForVisualQuestionAnswering`; put into evaluation mode for the time.
        processor: its `ConceptCLIPProcessor`.
        folder: of the pictures.
        rows: the questions.
        batch_size: questions a forward pass.
        max_length: of a question in tokens.
    """
    was_training = model.training
    model.eval()
    answers: list[Answer] = []
    try:
        for start in range(0, len(rows), batch_size):
            answers += _answer_batch(model, processor, Path(folder), rows[start : start + batch_size], max_length)
    finally:
        model.train(was_training)
    return answers


def question_figures(
    rows: Sequence[QuestionRow],
    answers: Sequence[Answer],
    vocabulary: Sequence[str],
    *,
    training_rows: Sequence[QuestionRow] = (),
    num_resamples: int = 1000,
    seed: int = 0,
) -> QuestionFigures:
    """Accuracy over closed, open and all questions, with intervals by patient (or image, where none is known).

    Args:
        rows: the questions with their right answers.
        answers: one a question, in their order.
        vocabulary: of the model.
        training_rows: for the most frequent answer and the images shared; may be left out.
        num_resamples: of the bootstrap; 0: no intervals.
        seed: of the bootstrap.

    Raises:
        ValueError: answers to other questions.
    """
    if [row.row_id for row in rows] != [answer.row_id for answer in answers]:
        raise ValueError(
            f"{len(answers)} answers do not belong to these {len(rows)} questions, one each in their order."
        )
    asked = [(row, answer.answer) for row, answer in zip(rows, answers, strict=True) if answer.answer is not None]
    kinds = {"overall": set(ANSWER_TYPES)} | {kind: {kind} for kind in ANSWER_TYPES}
    counts = Counter(row.answer for row in training_rows)
    guess = min(counts, key=lambda answer: (-counts[answer], answer)) if counts else None

    def accuracy(is_right: Sequence[bool]) -> dict[str, Interval]:
        figures = {}
        for name, types in kinds.items():
            chosen = [place for place, (row, _) in enumerate(asked) if row.answer_type in types]
            figures[name] = mean_with_interval(
                [float(is_right[place]) for place in chosen],
                groups=[asked[place][0].group for place in chosen],
                num_resamples=num_resamples,
                seed=seed,
            )
        return figures

    known, training_images = set(vocabulary), {row.image_path for row in training_rows}
    return QuestionFigures(
        accuracy=accuracy([row.answer == answer for row, answer in asked]),
        most_frequent=accuracy([row.answer == guess for row, _ in asked]) if guess is not None else {},
        num_questions={name: sum(row.answer_type in types for row, _ in asked) for name, types in kinds.items()},
        num_outside_vocabulary=sum(row.answer not in known for row, _ in asked),
        unanswered=dict(Counter(answer.reason for answer in answers if answer.answer is None)),
        num_images_shared=len({row.image_path for row, _ in asked} & training_images) if training_rows else None,
    )


def _answer_batch(
    model: Any, processor: Any, folder: Path, rows: Sequence[QuestionRow], max_length: int
) -> list[Answer]:
    pixels: dict[str, torch.Tensor] = {}  # several questions are often about one picture
    reasons: dict[str, str] = {}
    for path in dict.fromkeys(row.image_path for row in rows):
        try:
            pixels[path] = processor(images=folder / path, return_tensors="pt")["pixel_values"]
        except (OSError, ValueError) as error:
            reasons[path] = f"image unreadable: {type(error).__name__}"
    readable = [row for row in rows if row.image_path in pixels]
    found: dict[str, Answer] = {}
    if readable:
        text = processor(
            text=[row.question for row in readable], truncation=True, max_length=max_length, return_tensors="pt"
        ).to(model.device)
        images = torch.cat([pixels[row.image_path] for row in readable]).to(model.device, model.dtype)
        probabilities = model(**text, pixel_values=images).logits.float().softmax(dim=-1)
        best = probabilities.max(dim=-1)
        for row, place, value in zip(readable, best.indices.tolist(), best.values.tolist(), strict=True):
            found[row.row_id] = Answer(row.row_id, model.config.answers[place], value)
    return [found.get(row.row_id) or Answer(row.row_id, None, 0.0, reasons[row.image_path]) for row in rows]
