"""Results of an evaluation on disk, so that a run goes on where it was; and several models compared, pair by pair.

<folder>/<task>/<model>.json           figures, data, settings, published figures
<folder>/<task>/<model>.safetensors    scores and labels, or hits, of the images in use
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from medclip_hf.data.parquet import require_writable, write_text_atomically
from medclip_hf.evaluation.comparisons import (
    PairedDifference,
    ResampledFigures,
    differences_of,
    holm,
    paired_mean_difference,
    resampled_figures,
)
from medclip_hf.evaluation.encoders import Encoder
from medclip_hf.evaluation.run import EvaluationSettings, TaskResult
from medclip_hf.evaluation.task_data import TaskData
from medclip_hf.evaluation.tasks import Task
from medclip_hf.evaluation.weighted_figures import ClassifiedSamples

logger = logging.getLogger(__name__)

_RESULT_VERSION = 3  # 2: decisions about several findings at chosen thresholds; 3: the published AUROC of CT
_MAX_NAMED = 100  # rows set aside that a result names; all are counted


@dataclass(frozen=True)
class StoredResult:
    """A result as it lies on disk.

    Args:
        record: what the JSON file holds.
        arrays: see `TaskResult.arrays`.
    """

    record: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.record["model"])


def fingerprint(identity: str, task: Task, data_identity: str, settings: Mapping[str, Any]) -> str:
    """Hash of all that a result depends on: model, data, labels, task and settings."""
    parts = [_RESULT_VERSION, identity, task.as_dict(), data_identity, dict(settings)]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def data_fingerprint(
    encoder: Encoder, task: Task, data: TaskData, settings: EvaluationSettings, validation: TaskData | None = None
) -> str:
    """`fingerprint` of a model on a task's data and on what chose its thresholds."""
    splits = [data] if validation is None else [data, validation]
    identity = "".join(f"{split.identity}{split.label_identity}" for split in splits)
    return fingerprint(encoder.identity, task, identity, settings.identity)


def describe(
    encoder: Encoder,
    task: Task,
    data: TaskData,
    settings: EvaluationSettings,
    result: TaskResult,
    validation: TaskData | None = None,
) -> dict[str, Any]:
    """The record of a result, for JSON."""
    set_aside = [*data.set_aside, *result.set_aside]
    counts = {**data.counts, "in use": result.facts.get("num_images", len(data.items))}
    for entry in result.set_aside:
        counts[entry.reason] = counts.get(entry.reason, 0) + 1
    return {
        "task": task.name,
        "title": task.title,
        "task_type": task.task_type,
        "modality": task.modality,
        "split": data.split,
        "model": encoder.name,
        "model_identity": encoder.identity,
        "fingerprint": data_fingerprint(encoder, task, data, settings, validation),
        "precision": str(encoder.dtype).removeprefix("torch."),
        "settings": settings.identity,
        "facts": result.facts,
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
        "data": {
            "counts": counts,
            "warnings": list(data.warnings),
            "set_aside": [asdict(entry) for entry in set_aside[:_MAX_NAMED]],
        },
        "figures": result.figures,
        "other_scores": result.other_scores,
        "published": [asdict(figure) for figure in task.published],
    }


def result_paths(folder: Path, task_name: str, model_name: str) -> tuple[Path, Path]:
    """JSON and array file of a model's result."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", model_name).strip(".") or "model"
    return folder / task_name / f"{stem}.json", folder / task_name / f"{stem}.safetensors"


def save_result(folder: Path, record: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Path:
    """Path of the record; arrays are written first, so a record without them does not occur."""
    path, array_path = result_paths(folder, record["task"], record["model"])
    require_writable(path.parent)
    temporary = array_path.with_name(f".{array_path.name}.{os.getpid()}.tmp")
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, temporary)
    temporary.replace(array_path)
    write_text_atomically(path, json.dumps(dict(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def load_result(folder: Path, task_name: str, model_name: str, wanted: str) -> StoredResult | None:
    """The result with the fingerprint `wanted`, or None where there is none: it must be computed."""
    path, array_path = result_paths(folder, task_name, model_name)
    if not (path.is_file() and array_path.is_file()):
        return None
    try:
        record, arrays = json.loads(path.read_text(encoding="utf-8")), load_file(array_path)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        logger.warning("the result %s is damaged and is computed again: %s", path, error)
        return None
    if not isinstance(record, dict) or record.get("fingerprint") != wanted:
        logger.warning("the result %s is of another model, data set or setting and is computed again", path)
        return None
    return StoredResult(record, arrays)


# Several models --------------------------------------------------------------------------------------------------


def compare_models(
    results: Mapping[str, Sequence[StoredResult]],
    patients: Mapping[str, NDArray[Any] | None],
    settings: EvaluationSettings,
) -> dict[str, dict[str, Any]]:
    """Paired differences of every two models on every task, with Holm's correction over all of them.

    Models are compared on the images that both could read, resampled together by patient.

    Args:
        results: of each task, one result a model.
        patients: of each task, whose image each of the data's images is.
        settings: of the bootstrap.

    Returns:
        "<task>: <second> against <first>, <figure>" to "first", "second", "difference", "p_value" and "p_holm".
    """
    found: dict[str, dict[str, Any]] = {}
    for task_name, of_models in results.items():
        pairs = _Pairs(patients.get(task_name), settings)
        for first, second in combinations(of_models, 2):
            for figure, difference in pairs.differences(first, second).items():
                found[f"{task_name}: {second.model} against {first.model}, {figure}"] = difference.as_dict()
    known = {name: entry["p_value"] for name, entry in found.items() if entry["p_value"] is not None}
    adjusted = holm(known)
    return {name: {**entry, "p_holm": adjusted.get(name)} for name, entry in found.items()}


class _Pairs:
    """Differences of pairs of models on one task; a model is resampled once for all pairs that share their samples."""

    def __init__(self, patients: NDArray[Any] | None, settings: EvaluationSettings) -> None:
        self.patients = patients
        self.settings = settings
        self._resampled: dict[tuple[str, bytes], ResampledFigures] = {}

    def differences(self, first: StoredResult, second: StoredResult) -> dict[str, PairedDifference]:
        """Figure name to difference, on the images that both models could read."""
        common, *places = np.intersect1d(first.arrays["rows"], second.arrays["rows"], return_indices=True)
        groups = None if self.patients is None else self.patients[common]
        if "scores" in first.arrays:
            return self._of_scores((first, second), places, groups)
        return self._of_hits(first, second, places, groups)

    def _of_scores(
        self, pair: tuple[StoredResult, StoredResult], places: Sequence[NDArray[Any]], groups: NDArray[Any] | None
    ) -> dict[str, PairedDifference]:
        """AUROC of two models on the findings that both score; a CT model scores those whose anatomy it knows."""
        scored = [list(stored.record["figures"]["num_positive"]) for stored in pair]
        names = [name for name in scored[0] if name in scored[1]]
        if not names:
            return {}
        cells = [
            np.ix_(rows, np.array([of_model.index(name) for name in names]))
            for rows, of_model in zip(places, scored, strict=True)
        ]
        labels = pair[0].arrays["labels"]
        truth = labels[places[0]] if labels.ndim == 1 else labels[cells[0]]
        masks = [one.arrays["known"][kept] for one, kept in zip(pair, cells, strict=True) if "known" in one.arrays]
        known = np.logical_and.reduce(masks) if masks else None
        # Decisions about findings hang on each model's thresholds; the decision about a single label does not.
        compared = ("auroc", "balanced_accuracy") if truth.ndim == 1 else ("auroc",)
        samples = hashlib.blake2b(repr(names).encode(), digest_size=16)
        for part in (pair[0].arrays["rows"][places[0]], known):
            samples.update(b"" if part is None else part.tobytes())

        def resampled(stored: StoredResult, kept: tuple[NDArray[Any], ...]) -> ResampledFigures:
            key = (stored.model, samples.digest())
            if key not in self._resampled:
                scores = ClassifiedSamples(stored.arrays["scores"][kept], truth, names, known=known, wanted=compared)
                resampling = (groups, self.settings.num_resamples, self.settings.seed)
                self._resampled[key] = resampled_figures(scores, *resampling)
            return self._resampled[key]

        first, second = (resampled(stored, kept) for stored, kept in zip(pair, cells, strict=True))
        differences = differences_of(first, second, self.settings.confidence)
        return {name: differences[name] for name in compared if name in differences}

    def _of_hits(
        self, first: StoredResult, second: StoredResult, places: Sequence[NDArray[Any]], groups: NDArray[Any] | None
    ) -> dict[str, PairedDifference]:
        """Recall at each k both have, image to text: a text belongs to an image and is no sample of its own."""
        if len(first.arrays["rows"]) != len(second.arrays["rows"]):
            logger.warning("%s: the galleries differ, since not all images could be read by both", first.record["task"])
        found = {}
        for column, k in enumerate(first.arrays["ks"].tolist()):
            others = second.arrays["ks"].tolist()
            if k in others:
                found[f"image_to_text_recall@{k}"] = paired_mean_difference(
                    first.arrays["image_to_text"][places[0], column],
                    second.arrays["image_to_text"][places[1], others.index(k)],
                    groups=groups,
                    num_resamples=self.settings.num_resamples,
                    confidence=self.settings.confidence,
                    seed=self.settings.seed,
                )
        return found
