"""Questions about images with their answers: read from JSON lines, SLAKE or VQA-RAD, checked, and the answers counted.

Answers are compared after `normalize_answer`. The vocabulary of a classifier is a list in a file, made from the
training split alone, in an order that no process changes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medclip_hf.data.images import UnreadableImage, path_inside
from medclip_hf.data.parquet import write_text_atomically
from medclip_hf.data.stages import Drop

ANSWER_TYPES = ("closed", "open")
SLAKE_SPLITS = {"train": "train", "validation": "validate", "test": "test"}
VQA_RAD_FILE, VQA_RAD_IMAGES = "VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"
VQA_RAD_VALIDATION_SHARE = 0.1  # of the images: the data set names none


@dataclass(frozen=True)
class QuestionRow:
    """A question about an image with its answer.

    Args:
        row_id: unique in its split.
        image_path: relative to the folder of the data set.
        question: as asked.
        answer: normalised.
        answer_type: "closed" (yes or no, one of those named) or "open".
        group: whose rows are not independent: the patient, or the image where no patient is known.
    """

    row_id: str
    image_path: str
    question: str
    answer: str
    answer_type: str
    group: str


def normalize_answer(answer: str) -> str:
    """The answer in lower case, with single spaces and without a final full stop: how answers are compared."""
    return " ".join(str(answer).lower().split()).rstrip(". ")


def read_questions(folder: str | Path, split: str) -> tuple[list[QuestionRow], list[Drop]]:
    """The questions of a split that can be used, in the order of the file, and why the others cannot.

    Layouts, told apart by their files:

    - `<split>.jsonl`: one object a line with image, question, answer, answer_type and, if there is one, id and
      patient_id; images relative to the folder.
    - SLAKE: `train.json`, `validate.json`, `test.json` and `imgs/`; the English questions.
    - VQA-RAD: `VQA_RAD Dataset Public.json` and `VQA_RAD Image Folder/`. Its test questions are those so marked; a
      tenth of the other images, chosen by a hash of the name, is the validation split.

    Args:
        folder: of the data set.
        split: "train", "validation" or "test".

    Raises:
        ValueError: no such split, a file that is not JSON, or not a row that can be used.
    """
    folder = Path(folder)
    if split not in SLAKE_SPLITS:
        raise ValueError(f"split must be one of {list(SLAKE_SPLITS)}, got {split!r}.")
    path, records, read = _find_layout(folder, split)
    rows: dict[str, QuestionRow] = {}
    drops: list[Drop] = []
    for number, record in enumerate(records):
        found = read(record, number) if isinstance(record, dict) else Drop("not an object", f"entry {number} of {path}")
        if isinstance(found, QuestionRow):
            found = _checked(found, folder, rows)
        if isinstance(found, QuestionRow):
            rows[found.row_id] = found
        elif found is not None:
            drops.append(found)
    if not rows:
        raise ValueError(
            f"{path} holds no question of the split {split!r} that can be used"
            + (f": {drops[0].reason} ({drops[0].row_id} {drops[0].detail})." if drops else ".")
        )
    return list(rows.values()), drops


def build_answers(rows: Iterable[QuestionRow], min_count: int = 1) -> list[str]:
    """The answers of the rows, the most frequent first and equally frequent ones by alphabet.

    Args:
        rows: of the training split alone: answers of other splits would tell the classifier what is asked there.
        min_count: how often an answer must occur.

    Raises:
        ValueError: none occurs so often.
    """
    counts = Counter(row.answer for row in rows)
    answers = sorted((answer for answer, count in counts.items() if count >= min_count), key=lambda a: (-counts[a], a))
    if not answers:
        raise ValueError(f"no answer occurs {min_count} times among {counts.total()} questions. Lower min_count.")
    return answers


def read_answers(path: str | Path) -> list[str]:
    """The vocabulary of a file: a JSON list of answers, normalised.

    Raises:
        ValueError: no such file, no JSON list of texts, or one that is empty or repeats an answer.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no vocabulary of answers at {path}.")
    answers = _read_json(path)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{path} must hold a JSON list of answers.")
    normal = [normalize_answer(answer) for answer in answers]
    repeated = sorted(answer for answer, count in Counter(normal).items() if count > 1 or not answer)
    if not normal or repeated:
        raise ValueError(f"{path} must hold different answers that are not empty, but has {repeated[:5] or 'none'}.")
    return normal


def write_answers(path: str | Path, answers: Sequence[str]) -> None:
    """Write the vocabulary as a JSON list, whole or not at all."""
    write_text_atomically(Path(path), json.dumps(list(answers), ensure_ascii=False, indent=0) + "\n")


def _find_layout(
    folder: Path, split: str
) -> tuple[Path, list[Any], Callable[[dict[str, Any], int], QuestionRow | Drop | None]]:
    """The file of the split, its entries, and how to read one (None: it belongs to another split)."""
    lines, slake, rad = folder / f"{split}.jsonl", folder / f"{SLAKE_SPLITS[split]}.json", folder / VQA_RAD_FILE
    if lines.is_file():
        texts = _read_text(lines).split("\n")  # splitlines would also cut at separators inside of a text
        return lines, [_parsed(text, f"{lines} line {n}") for n, text in enumerate(texts, 1) if text.strip()], _plain
    for path, read in ((slake, _slake), (rad, lambda record, number: _vqa_rad(record, number, split))):
        if path.is_file():
            records = _read_json(path)
            if not isinstance(records, list):
                raise ValueError(f"{path} must hold a JSON list of questions.")
            return path, records, read
    raise ValueError(f"{folder} holds neither {lines.name} nor {slake.name} (SLAKE) nor {VQA_RAD_FILE!r}.")


def _plain(record: dict[str, Any], number: int) -> QuestionRow | Drop:
    return _row(record, record.get("id", number), record.get("image"), record.get("patient_id"))


def _slake(record: dict[str, Any], number: int) -> QuestionRow | Drop | None:
    if record.get("q_lang", "en") != "en":
        return None
    name = record.get("img_name")
    return _row(record, record.get("qid", number), name and f"imgs/{name}", None)


def _vqa_rad(record: dict[str, Any], number: int, split: str) -> QuestionRow | Drop | None:
    name = str(record.get("image_name", ""))
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    is_validation = int.from_bytes(digest, "big") / 2**64 < VQA_RAD_VALIDATION_SHARE
    own = (
        "test" if str(record.get("phrase_type", "")).startswith("test") else "validation" if is_validation else "train"
    )
    return _row(record, record.get("qid", number), name and f"{VQA_RAD_IMAGES}/{name}", None) if own == split else None


def _row(record: dict[str, Any], row_id: Any, image: Any, patient: Any) -> QuestionRow | Drop:
    """The row of an entry whose fields all layouts name alike."""
    question, answer = record.get("question"), record.get("answer")
    answer_type = str(record.get("answer_type", "")).strip().lower()
    name = str(row_id)
    if not isinstance(question, str) or not question.strip():
        return Drop("question empty", "", name)
    if answer is None or not normalize_answer(answer):
        return Drop("answer empty", "", name)
    if answer_type not in ANSWER_TYPES:
        return Drop("answer type unknown", f"{answer_type!r} is none of {ANSWER_TYPES}", name)
    if not isinstance(image, str) or not image:
        return Drop("image not named", "", name)
    group = str(patient) if patient not in (None, "") else image
    return QuestionRow(name, image, question.strip(), normalize_answer(answer), answer_type, group)


def _checked(row: QuestionRow, folder: Path, known: dict[str, QuestionRow]) -> QuestionRow | Drop:
    """The row, or why it cannot be used: another of its name, or no image."""
    if row.row_id in known:
        return Drop("id repeated", "", row.row_id)
    try:
        exists = path_inside(folder, row.image_path).is_file()
    except UnreadableImage as error:
        return Drop(error.reason, error.detail, row.row_id)
    return row if exists else Drop("image missing", row.image_path, row.row_id)


def _read_json(path: Path) -> Any:
    return _parsed(_read_text(path), str(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
