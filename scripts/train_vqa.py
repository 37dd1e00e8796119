r"""Train ConceptCLIP to answer questions about images, and measure its answers on questions kept apart.

    python scripts/train_vqa.py --config scripts/recipes/vqa_tiny.yaml --set data.folder=questions \
        --set model.from_pretrained=demo_output/conceptclip/stage2/final --set training.output_dir=runs/vqa

The data are JSON lines, SLAKE or VQA-RAD as downloaded (see `data.question_answers`). The vocabulary of answers comes
from a file or from the training split alone, and is written to `<output_dir>/answers.json`. The best model by accuracy
on the validation split lies in `<output_dir>/final`; if a test split is named, it is asked once, after the training:
answers in `test_answers.jsonl`, figures in `test_figures.json`. SIGTERM or SIGINT ends the run after the step with a
checkpoint; `--resume` continues it.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from medclip_hf.data.parquet import write_text_atomically
from medclip_hf.data.question_answers import QuestionRow, build_answers, read_answers, read_questions, write_answers
from medclip_hf.data.stages import Drop
from medclip_hf.evaluation.encoders import check_model_place
from medclip_hf.evaluation.vqa import Answer, QuestionFigures, answer_questions, question_figures
from medclip_hf.modeling.conceptclip.visual_question_answering_conceptclip import ConceptCLIPForVisualQuestionAnswering
from medclip_hf.processing.conceptclip import ConceptCLIPProcessor
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.command_line import train_by_recipe
from medclip_hf.training.loop import TrainResult, train
from medclip_hf.training.vqa import QuestionCollator, QuestionDataset, QuestionObjective

logger = logging.getLogger("train_vqa")


@dataclass(frozen=True)
class ModelSection:
    """Which model.

    Args:
        from_pretrained: folder or Hub name of a ConceptCLIP.
        cross_modal_config: fields of a `BertConfig` for the layers of each stream; None: as published.
        freeze_towers: train the streams and the classifier alone; as published everything is trained.
    """

    from_pretrained: str
    cross_modal_config: dict[str, Any] | None = None
    freeze_towers: bool = False


@dataclass(frozen=True)
class DataSection:
    """Which questions.

    Args:
        folder: of the data set.
        train_split: trained on.
        validation_split: chooses the best model; None: no validation.
        test_split: asked once at the end; None: not at all.
        answers: file of the vocabulary, a JSON list; None: the answers of the training split.
        min_answer_count: how often an answer must occur there to be in the vocabulary.
        max_length: of a question in tokens.
    """

    folder: str
    train_split: str = "train"
    validation_split: str | None = "validation"
    test_split: str | None = None
    answers: str | None = None
    min_answer_count: int = 1
    max_length: int = 50

    def __post_init__(self) -> None:
        splits = [self.train_split, self.validation_split, self.test_split]
        if any(split is not None and splits.count(split) > 1 for split in splits):
            raise ValueError(f"the splits must differ from each other, got {splits}: choose and measure on others.")


SECTIONS = {"model": ModelSection, "data": DataSection, "training": RunArguments}


def main(command_line: list[str] | None = None) -> int:
    """Train as the command line says; the exit code of the run, 2 for a mistake in what was asked."""
    return train_by_recipe(__doc__, SECTIONS, run, command_line)


def run(recipe: dict[str, Any], sections: dict[str, Any], resume: bool | Path, accelerator: Accelerator) -> TrainResult:
    """Read the questions, build the model, train, ask the test questions; how it ended."""
    section, data, arguments = sections["model"], sections["data"], sections["training"]
    splits = (data.train_split, data.validation_split, data.test_split)
    rows = {split: read_split(data.folder, split) for split in splits if split is not None}
    answers = choose_answers(data, rows[data.train_split], Path(arguments.output_dir), resume, accelerator)

    set_seed(arguments.seed)
    cross_modal = {"cross_modal_config": section.cross_modal_config} if section.cross_modal_config else {}
    check_model_place(section.from_pretrained)
    try:
        model = ConceptCLIPForVisualQuestionAnswering.from_conceptclip(section.from_pretrained, answers, **cross_modal)
        processor = ConceptCLIPProcessor.from_pretrained(section.from_pretrained)
    except OSError as error:
        raise ValueError(f"model.from_pretrained={section.from_pretrained} cannot be loaded: {error}") from error
    if section.freeze_towers:
        model.vision_model.requires_grad_(False)
        model.text_model.requires_grad_(False)

    def ask(asked: Any, split: str) -> tuple[list[Answer], QuestionFigures]:
        """Answers and figures of a split, each process answering its share."""
        share = rows[split][accelerator.process_index :: accelerator.num_processes]
        batch_size = arguments.micro_batch_size or arguments.batch_size_per_process
        found = answer_questions(
            asked, processor, data.folder, share, batch_size=batch_size, max_length=data.max_length
        )
        by_id = {answer.row_id: answer for answer in gather_object(found)}
        given = [by_id[row.row_id] for row in rows[split]]
        resamples = 0 if split == data.validation_split else 1000
        figures = question_figures(
            rows[split], given, answers, training_rows=rows[data.train_split], num_resamples=resamples
        )
        return given, figures

    def evaluate(asked: torch.nn.Module, step: int) -> dict[str, float]:
        figures = ask(asked, data.validation_split)[1]
        return {f"{kind}_accuracy": i.value for kind, i in figures.accuracy.items() if i.value is not None}

    result = train(
        model,
        QuestionDataset(data.folder, rows[data.train_split]),
        QuestionCollator(processor, answers, data.max_length),
        QuestionObjective(),
        arguments,
        processor=processor,
        evaluate_fn=evaluate if data.validation_split is not None else None,
        resume=resume,
        recipe=recipe,
        accelerator=accelerator,
    )
    if data.test_split is None or result.model_path is None:
        return result
    best = ConceptCLIPForVisualQuestionAnswering.from_pretrained(result.model_path).to(accelerator.device)
    given, figures = ask(best, data.test_split)
    if accelerator.is_main_process:
        write_test(Path(arguments.output_dir), rows[data.test_split], given, figures)
    measured = {f"test_{kind}_accuracy": i.value for kind, i in figures.accuracy.items() if i.value is not None}
    return replace(result, metrics={**result.metrics, **measured})


def read_split(folder: str, split: str) -> list[QuestionRow]:
    """The questions of a split; what was set aside is counted in the log."""
    rows, drops = read_questions(folder, split)
    for reason, count in Counter(drop.reason for drop in drops).most_common():
        first: Drop = next(drop for drop in drops if drop.reason == reason)
        logger.warning("%s: %d set aside: %s, the first %s %s", split, count, reason, first.row_id, first.detail)
    return rows


def choose_answers(
    data: DataSection, rows: Sequence[QuestionRow], output_dir: Path, resume: bool | Path, accelerator: Accelerator
) -> list[str]:
    """The vocabulary: of the file that was named, of the run that goes on, or of the training questions."""
    written = output_dir / "answers.json"
    if data.answers is not None:
        answers = read_answers(data.answers)
    elif resume is not False and written.is_file():
        answers = read_answers(written)
    else:
        answers = build_answers(rows, data.min_answer_count)
    accelerator.wait_for_everyone()
    if resume is False and written.is_file() and read_answers(written) != answers:
        raise ValueError(f"{written} holds another vocabulary: resume that run, or choose another training.output_dir.")
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_answers(written, answers)
    return answers


def write_test(
    output_dir: Path, rows: Sequence[QuestionRow], answers: Sequence[Answer], figures: QuestionFigures
) -> None:
    """Every answer beside the right one, and the figures."""
    lines = [
        json.dumps({**asdict(row), "given": answer.answer, "probability": round(answer.probability, 4)})
        for row, answer in zip(rows, answers, strict=True)
    ]
    write_text_atomically(output_dir / "test_answers.jsonl", "\n".join(lines) + "\n")
    write_text_atomically(output_dir / "test_figures.json", json.dumps(figures.as_dict(), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
