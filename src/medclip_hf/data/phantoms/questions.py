"""The drawn figures with questions and with reports, of which every right answer is known by construction."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medclip_hf.data.parquet import write_text_atomically
from medclip_hf.data.phantoms.figures import FigurePhantom, draw_figures
from medclip_hf.data.phantoms.findings import FINDINGS

FINDING_NAMES = tuple(finding.name for finding in FINDINGS)


def write_question_phantoms(folder: str | Path, counts: dict[str, int], *, seed: int = 0, size: int = 64) -> None:
    """Write `images/` and `<split>.jsonl` with questions, as `data.question_answers` reads them.

    Of every figure: whether a finding is there that is, whether one is there that is not (so that "yes" and "no" are
    equally frequent), what kind of image it is, and, where it shows one finding alone, which.

    Args:
        folder: of the data set.
        counts: split → number of figures.
        seed: of the figures and of the choice of findings.
        size: side of the pictures in pixels.
    """
    _write(Path(folder), counts, seed, size, _questions)


def write_report_phantoms(folder: str | Path, counts: dict[str, int], *, seed: int = 0, size: int = 64) -> None:
    """Write `images/` and `<split>.jsonl` with reports, as `data.image_reports` reads them.

    A report names the kind of image and every finding, and denies one that is not there. Arguments as in
    `write_question_phantoms`.
    """
    _write(Path(folder), counts, seed, size, _reports)


def _write(
    folder: Path,
    counts: dict[str, int],
    seed: int,
    size: int,
    describe: Callable[[FigurePhantom, str, np.random.Generator], list[dict[str, Any]]],
) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        records = []
        for number, phantom in enumerate(draw_figures(seed, split, count, size)):
            path = f"images/{split}-{number:05d}.png"
            (folder / path).write_bytes(phantom.row.image_bytes or b"")
            records += describe(phantom, path, np.random.default_rng((seed, number)))
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_text_atomically(folder / f"{split}.jsonl", text)


def _questions(phantom: FigurePhantom, path: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    absent = [name for name in FINDING_NAMES if name not in phantom.findings]
    there, not_there = rng.choice(phantom.findings), rng.choice(absent)
    asked = [
        (f"Does it show {there}?", "yes", "closed"),
        (f"Does it show {not_there}?", "no", "closed"),
        ("What kind of image is this?", phantom.row.modality, "open"),
    ]
    if len(phantom.findings) == 1:
        asked.append(("Which finding is shown?", phantom.findings[0], "open"))
    return [
        {"id": f"{Path(path).stem}-{place}", "image": path, "question": q, "answer": a, "answer_type": kind}
        for place, (q, a, kind) in enumerate(asked)
    ]


def _reports(phantom: FigurePhantom, path: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    absent = [name for name in FINDING_NAMES if name not in phantom.findings]
    findings = " ".join(f"There is {name}." for name in FINDING_NAMES if name in phantom.findings)
    report = f"Kind of image: {phantom.row.modality}. {findings} No {rng.choice(absent)}."
    return [{"id": Path(path).stem, "images": [path], "report": report}]
