"""A CT model's table of scores as a stored result, like that of a 2-D model: figures, and what comparisons need."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_hf.evaluation.ct_protocols import UNITS, LabelTable, ScoredScans, ct_figures, find_labels, read_scores
from medclip_hf.evaluation.results import StoredResult, fingerprint, load_result, save_result
from medclip_hf.evaluation.run import EvaluationSettings
from medclip_hf.evaluation.tasks import Task


def ct_result(
    folder: Path,
    task: Task,
    model_name: str,
    scores: Path,
    labels: LabelTable,
    settings: EvaluationSettings,
    validation: ScoredScans | None = None,
) -> StoredResult:
    """The result of a table of scores, found below `folder` if nothing changed, else computed and kept there.

    Args:
        folder: of results.
        task: CT-RATE or Rad-ChestCT, on the split that is tested.
        model_name: in tables and file names.
        scores: the table that scripts/score_ct.py wrote.
        labels: of the task, those findings that the table has.
        settings: of the bootstrap.
        validation: scores and labels of other patients, to choose thresholds on.

    Raises:
        ValueError: as `ct_protocols.read_scores` and `ct_protocols.ct_figures`.
    """
    model_identity = _hash(scores.read_bytes())
    parts = [labels] if validation is None else [labels, validation.table]
    of_labels = b"".join(part.labels.tobytes() + repr((part.scan_ids, part.findings)).encode() for part in parts)
    of_validation = b"" if validation is None else validation.scores.tobytes()
    wanted = fingerprint(model_identity, task, _hash(of_labels + of_validation), settings.identity)
    found = load_result(folder, task.name, model_name, wanted)
    if found is not None:
        return found
    scans = read_scores(scores, labels)
    record = {
        **_described(task, model_name, scans, settings, validation),
        "model_identity": model_identity,
        "fingerprint": wanted,
    }
    arrays = _arrays(scans, labels)
    save_result(folder, record, arrays)
    return StoredResult(record, arrays)


def validation_scans(path: Path, task: Task, folder: Path, findings: tuple[str, ...]) -> ScoredScans:
    """Scores of the train split with their labels, to choose thresholds on.

    Args:
        path: of the table of scores.
        task: of the data set, on any split.
        folder: of the data set.
        findings: those that are tested.

    Raises:
        ValueError: as `ct_protocols.find_labels` and `ct_protocols.read_scores`.
    """
    table = find_labels(replace(task, split="train"), folder)
    kept = [table.findings.index(name) for name in findings]
    return read_scores(path, replace(table, findings=findings, labels=table.labels[:, kept]))


def _described(
    task: Task, model_name: str, scans: ScoredScans, settings: EvaluationSettings, validation: ScoredScans | None
) -> dict[str, Any]:
    """The record: figures by volume, and those over all findings by study and patient."""
    by_unit = {
        unit: ct_figures(
            scans,
            unit=unit,
            validation=validation,
            num_resamples=settings.num_resamples,
            confidence=settings.confidence,
            seed=settings.seed,
        )
        for unit in UNITS
    }
    left_out = sorted(set(task.class_names or ()) - set(scans.table.findings))
    return {
        "task": task.name,
        "title": task.title,
        "task_type": task.task_type,
        "modality": task.modality,
        "split": task.split,
        "model": model_name,
        "settings": settings.identity,
        "data": {
            "counts": scans.counts,
            "warnings": [f"findings whose anatomy the model does not know: {', '.join(left_out)}"] if left_out else [],
            "set_aside": [],
        },
        "figures": by_unit["volume"],
        "by_unit": {unit: {key: by_unit[unit][key] for key in ("overall", "published", "counts")} for unit in UNITS},
        "published": [asdict(figure) for figure in task.published],
    }


def _arrays(scans: ScoredScans, labels: LabelTable) -> dict[str, NDArray[Any]]:
    place_of = {scan_id: place for place, scan_id in enumerate(labels.scan_ids)}
    known = ~np.isnan(scans.scores)
    return {
        "scores": np.where(known, scans.scores, 0.0),
        "known": known,
        "labels": scans.table.labels,
        "rows": np.array([place_of[scan_id] for scan_id in scans.table.scan_ids]),
    }


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
