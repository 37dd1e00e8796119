"""Studies of one or several images with a report: read from JSON lines or from `annotation.json`, and checked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medclip_hf.data.images import UnreadableImage, path_inside
from medclip_hf.data.stages import Drop

ANNOTATION_FILE = "annotation.json"
ANNOTATION_SPLITS = {"train": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class StudyRow:
    """A study: its images, relative to the folder of the data set, and its report.

    `patient_id` is the study's own name where none is known.
    """

    row_id: str
    image_paths: tuple[str, ...]
    report: str
    patient_id: str


def read_studies(folder: str | Path, split: str) -> tuple[list[StudyRow], list[Drop]]:
    """The studies of a split that can be used, in the order of the file, and why the others cannot.

    Layouts, told apart by their files:

    - `<split>.jsonl`: one object a line with images (a list), report and, if there is one, id and patient_id; images
      relative to the folder.
    - `annotation.json` with the lists train, val and test of {id, image_path, report}, as IU X-Ray and MIMIC-CXR are
      handed on for report generation; images below `images/`.

    Args:
        folder: of the data set.
        split: "train", "validation" or "test".

    Raises:
        ValueError: no such split, a file that is not JSON, or not a study that can be used.
    """
    folder = Path(folder)
    if split not in ANNOTATION_SPLITS:
        raise ValueError(f"split must be one of {list(ANNOTATION_SPLITS)}, got {split!r}.")
    path, records, below = _find_layout(folder, split)
    rows: dict[str, StudyRow] = {}
    drops: list[Drop] = []
    for number, record in enumerate(records):
        found = _row(record, number, folder, below)
        if isinstance(found, StudyRow) and found.row_id in rows:
            found = Drop("id repeated", "", found.row_id)
        if isinstance(found, StudyRow):
            rows[found.row_id] = found
        else:
            drops.append(found)
    if not rows:
        raise ValueError(
            f"{path} holds no study of the split {split!r} that can be used"
            + (f": {drops[0].reason} ({drops[0].row_id} {drops[0].detail})." if drops else ".")
        )
    return list(rows.values()), drops


def _find_layout(folder: Path, split: str) -> tuple[Path, list[Any], str]:
    """The file of the split, its entries, and what comes before their image paths."""
    lines, annotation = folder / f"{split}.jsonl", folder / ANNOTATION_FILE
    path = lines if lines.is_file() else annotation
    if not path.is_file():
        raise ValueError(f"{folder} holds neither {lines.name} nor {annotation.name}.")
    try:
        text = path.read_text(encoding="utf-8")
        if path == lines:
            return path, [json.loads(line) for line in text.splitlines() if line.strip()], ""
        splits = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    records = splits.get(ANNOTATION_SPLITS[split]) if isinstance(splits, dict) else None
    if not isinstance(records, list):
        raise ValueError(f"{path} must map {list(ANNOTATION_SPLITS.values())} to lists of studies.")
    return path, records, "images/"


def _row(record: Any, number: int, folder: Path, below: str) -> StudyRow | Drop:
    """The study of an entry, or why it cannot be used."""
    if not isinstance(record, dict):
        return Drop("not an object", f"entry {number}")
    name, report = str(record.get("id", number)), record.get("report")
    images = record.get("images", record.get("image_path"))
    images = [images] if isinstance(images, str) else images
    if not isinstance(report, str) or not report.strip():
        return Drop("report empty", "", name)
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        return Drop("image not named", "", name)
    paths = tuple(below + image for image in images)
    for path in paths:
        try:
            if not path_inside(folder, path).is_file():
                return Drop("image missing", path, name)
        except UnreadableImage as error:
            return Drop(error.reason, error.detail, name)
    patient = record.get("patient_id")
    return StudyRow(name, paths, report.strip(), str(patient) if patient not in (None, "") else name)
