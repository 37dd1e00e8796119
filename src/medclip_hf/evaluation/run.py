"""One model on one task: embeddings from the cache, scores by the protocol, figures with intervals."""

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medclip_hf.evaluation.classification import classification_figures
from medclip_hf.evaluation.decisions import ScoredFindings, figures_with_chosen_thresholds
from medclip_hf.evaluation.embedding_cache import (
    DEFAULT_BATCH_SIZE,
    CachedImages,
    PatchQuestion,
    Progress,
    embed_images,
    embed_texts,
)
from medclip_hf.evaluation.encoders import Encoder
from medclip_hf.evaluation.retrieval import retrieval_hits
from medclip_hf.evaluation.task_data import SetAside, TaskData
from medclip_hf.evaluation.tasks import RETRIEVAL_KS, Task, with_split
from medclip_hf.evaluation.zero_shot import (
    PUBLISHED_LOCAL_WEIGHT,
    Activation,
    ZeroShotScores,
    average_templates,
    published_share_of_patches,
    scores_from_cosines,
)

logger = logging.getLogger(__name__)

ScoreKind = Literal["mixed", "global", "local"]


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is evaluated; what changes a figure is in `identity`.

    Args:
        score: of a model with patch heads: "mixed" as published, "global" or "local"; others have a global score alone.
        activation: None: softmax where one class is true, sigmoid where several may be.
        use_bias: add the trained biases, which makes sigmoids probabilities; the published protocol leaves them out.
        top_patches: of the local score; None: as large a share as the published 128 of 729.
        local_weight: of the mixed score.
        ks: cut-offs of retrieval.
        num_resamples: of the bootstrap; 0: no intervals.
        confidence: of intervals.
        seed: of the bootstrap.
        batch_size: images of a forward pass to start with; halved where memory does not suffice.
        num_workers: processes that decode images.

    Raises:
        ValueError: a number out of range.
    """

    score: ScoreKind = "mixed"
    activation: Activation | None = None
    use_bias: bool = False
    top_patches: int | None = None
    local_weight: float = PUBLISHED_LOCAL_WEIGHT
    ks: tuple[int, ...] = RETRIEVAL_KS
    num_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0
    batch_size: int = DEFAULT_BATCH_SIZE
    num_workers: int = 0

    def __post_init__(self) -> None:
        if (self.top_patches is not None and self.top_patches < 1) or self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                "expected top_patches ≥ 1, batch_size ≥ 1 and num_workers ≥ 0, got "
                f"{self.top_patches}, {self.batch_size} and {self.num_workers}"
            )
        if not 0.0 <= self.local_weight <= 1.0 or not 0.0 < self.confidence < 1.0 or self.num_resamples < 0:
            raise ValueError(
                "expected local_weight in [0, 1], confidence in (0, 1) and num_resamples ≥ 0, got "
                f"{self.local_weight}, {self.confidence} and {self.num_resamples}"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What figures depend on."""
        return {key: value for key, value in asdict(self).items() if key not in ("batch_size", "num_workers")}


@dataclass(frozen=True)
class TaskResult:
    """What one model reached on one task.

    Args:
        figures: "overall" and more, as `explain.evaluation_report` takes them.
        arrays: scores and labels, or hits, of the images in use: what a paired comparison needs. "rows" are the places
            of these images in the data.
        other_scores: "overall" of the scores beside the chosen one.
        set_aside: images that could not be read.
        seconds: "embed", "score" and "figures".
        facts: numbers of images, encoded ones, the batch size, the patches that were averaged.
    """

    figures: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    other_scores: dict[str, Any] = field(default_factory=dict)
    set_aside: tuple[SetAside, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def evaluate_task(
    encoder: Encoder,
    task: Task,
    data: TaskData,
    settings: EvaluationSettings | None = None,
    *,
    validation: TaskData | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Figures of a model on a task.

    Args:
        encoder: of the model.
        task: of the type zero_shot_classification or retrieval.
        data: from `read_task_data`.
        settings: the defaults are the published protocol.
        validation: another split of the same task, on which decisions about several findings get their thresholds;
            images of patients that are tested are left out. None: thresholds are cross-fitted on the other patients.
        cache: folder of embeddings; None: nothing is kept.
        progress: called with (images done, images of all).

    Raises:
        ValueError: the task is of another type, its classes are not those of the data, a score that the model does not
            have, or as `embed_images`.
    """
    settings = settings or EvaluationSettings()
    if task.task_type == "zero_shot_classification":
        return _classify(encoder, task, data, validation, settings, cache, progress)
    if task.task_type == "retrieval":
        return _retrieve(encoder, data, settings, cache, progress)
    raise ValueError(f"{task.name} is a task of {task.task_type}: run {task.script}")


# Zero-shot classification ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    """Scores of the images of a split that could be read.

    Args:
        images: from the cache or computed.
        rows: (N,) their places in the data.
        by_kind: (N, K) of each kind the model has.
        labels: (N,) or (N, K).
        known: (N, K); None where all are.
        embedded: when the embeddings were there.
    """

    images: CachedImages
    rows: Tensor
    by_kind: dict[ScoreKind, NDArray[np.float64]]
    labels: NDArray[Any]
    known: NDArray[np.bool_] | None
    embedded: float


def _classify(
    encoder: Encoder,
    task: Task,
    data: TaskData,
    validation: TaskData | None,
    settings: EvaluationSettings,
    cache: Path | None,
    progress: Progress | None,
) -> TaskResult:
    if data.labels is None:
        raise ValueError(f"{task.name} needs labels, the data hold captions")
    if settings.score == "local" and not encoder.has_patches:
        raise ValueError(f"{encoder.name} has no patch heads, so there is no local score: ask for mixed or global")
    text_embeds, concept_embeds = _class_vectors(encoder, task, data)
    top_patches = settings.top_patches or published_share_of_patches(encoder.num_patches)
    kind: ScoreKind = settings.score if encoder.has_patches else "global"
    question = None
    if kind != "global" and concept_embeds is not None:
        question = PatchQuestion(concept_embeds, top_patches)
    start = time.perf_counter()
    tested = _score_split(encoder, task, data, text_embeds, question, settings, cache, progress)
    other_split = None
    if validation is not None and task.is_multi_label:
        other_split = _score_split(encoder, task, validation, text_embeds, question, settings, cache, None)
    scored = time.perf_counter()
    figures = {
        name: _figures(name, task, (tested, data), (other_split, validation), settings) for name in tested.by_kind
    }
    arrays = {"scores": tested.by_kind[kind], "labels": tested.labels, "rows": tested.rows.numpy()}
    return TaskResult(
        figures=figures[kind],
        arrays=arrays if tested.known is None else {**arrays, "known": tested.known},
        other_scores={name: found["overall"] for name, found in figures.items() if name != kind},
        set_aside=_unreadable(tested.images, data),
        seconds=_seconds(start, tested.embedded, scored),
        facts=_facts(tested.images, tested.rows) | {"score": kind} | ({"top_patches": top_patches} if question else {}),
    )


def _score_split(
    encoder: Encoder,
    task: Task,
    data: TaskData,
    text_embeds: Tensor,
    question: PatchQuestion | None,
    settings: EvaluationSettings,
    cache: Path | None,
    progress: Progress | None,
) -> _Scored:
    images = embed_images(
        encoder,
        data,
        cache,
        question=question,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        progress=progress,
    )
    embedded = time.perf_counter()
    rows = images.is_readable.nonzero()[:, 0]
    scores = _scores(encoder, images, rows, text_embeds, settings, is_multi_label=task.is_multi_label)
    by_kind: dict[ScoreKind, NDArray[np.float64]] = {"global": scores.global_scores}
    if scores.local_scores is not None:
        by_kind = {"mixed": scores.mixed_scores, "global": scores.global_scores, "local": scores.local_scores}
    assert data.labels is not None  # checked by the caller; a task's splits are alike
    known = None if data.known is None else data.known[rows.numpy()]
    return _Scored(images, rows, by_kind, data.labels[rows.numpy()], known, embedded)


def _class_vectors(encoder: Encoder, task: Task, data: TaskData) -> tuple[Tensor, Tensor | None]:
    """Text and concept vectors (K, D) on the CPU, averaged over the task's templates."""
    if task.class_names is not None and tuple(task.class_names) != tuple(data.class_names):
        raise ValueError(f"{task.name} has the classes {task.class_names}, the data {data.class_names}")
    names, templates = (task if task.class_names else with_split(task, None, data.class_names)).prompts()
    classes = encoder.encode_classes(names, templates)
    concepts = None if classes.concept_embeds is None else average_templates(classes.concept_embeds).cpu()
    return average_templates(classes.text_embeds).cpu(), concepts


def _scores(
    encoder: Encoder,
    images: CachedImages,
    rows: Tensor,
    text_embeds: Tensor,
    settings: EvaluationSettings,
    *,
    is_multi_label: bool,
) -> ZeroShotScores:
    return scores_from_cosines(
        images.image_embeds[rows] @ text_embeds.T,
        encoder.logit_scale,
        None if images.patch_means is None else images.patch_means[rows],
        encoder.concept_logit_scale,
        logit_bias=encoder.logit_bias if settings.use_bias else 0.0,
        concept_logit_bias=encoder.concept_logit_bias if settings.use_bias else 0.0,
        activation=settings.activation or ("sigmoid" if is_multi_label else "softmax"),
        local_weight=settings.local_weight,
    )


def _figures(
    kind: ScoreKind,
    task: Task,
    tested: tuple[_Scored, TaskData],
    validation: tuple[_Scored | None, TaskData | None],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    scored, data = tested
    resampling: dict[str, Any] = {
        "num_resamples": settings.num_resamples,
        "confidence": settings.confidence,
        "seed": settings.seed,
    }
    if not task.is_multi_label:
        groups = _groups(data, scored.rows)
        return classification_figures(
            scored.by_kind[kind], scored.labels, data.class_names, groups=groups, **resampling
        ).as_dict()
    of_test = _findings(kind, scored, data)
    of_validation = None
    if validation[0] is not None and validation[1] is not None:
        of_validation = _without(_findings(kind, validation[0], validation[1]), of_test.patients)
    return figures_with_chosen_thresholds(of_test, of_validation, **resampling)


def _findings(kind: ScoreKind, scored: _Scored, data: TaskData) -> ScoredFindings:
    """Scores of several findings, NaN where the label is not known; an image without a patient is its own."""
    scores = scored.by_kind[kind]
    if scored.known is not None:
        scores = np.where(scored.known, scores, np.nan)
    patients = _groups(data, scored.rows)
    if patients is None:
        patients = np.array([f"\0{data.split} {row}" for row in scored.rows.tolist()])
    return ScoredFindings(scores, scored.labels, patients, tuple(data.class_names))


def _without(findings: ScoredFindings, patients: NDArray[Any]) -> ScoredFindings | None:
    """The rows of other patients, None where there is none."""
    kept = ~np.isin(findings.patients, patients)
    if not kept.any():
        return None
    return ScoredFindings(findings.scores[kept], findings.labels[kept], findings.patients[kept], findings.finding_names)


# Retrieval -------------------------------------------------------------------------------------------------------


def _retrieve(
    encoder: Encoder, data: TaskData, settings: EvaluationSettings, cache: Path | None, progress: Progress | None
) -> TaskResult:
    if data.captions is None:
        raise ValueError("retrieval needs captions, the data hold labels")
    start = time.perf_counter()
    images = embed_images(
        encoder,
        data,
        cache,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        progress=progress,
    )
    rows = images.is_readable.nonzero()[:, 0]
    captions = [data.captions[row] for row in rows.tolist()]
    owner = torch.tensor([place for place, texts in enumerate(captions) for _ in texts])
    text_embeds = embed_texts(encoder, [text for texts in captions for text in texts], cache)
    embedded = time.perf_counter()
    gallery = min(len(captions), len(text_embeds))
    ks = tuple(k for k in settings.ks if k < gallery) or (1,)
    place = encoder.device
    hits = retrieval_hits(images.image_embeds[rows].to(place), text_embeds.to(place), ks, text_to_image=owner.to(place))
    scored = time.perf_counter()
    groups = _groups(data, rows)
    intervals = hits.recall_with_intervals(
        groups=groups, num_resamples=settings.num_resamples, confidence=settings.confidence, seed=settings.seed
    )
    figures = {
        "overall": {name: interval.as_dict() for name, interval in intervals.items()},
        "left_out": {f"recall@{k}": f"the gallery has {gallery}" for k in settings.ks if k not in ks},
        "num_samples": len(captions),
        "num_groups": len(captions) if groups is None else len(np.unique(groups)),
        "settings": {"num_resamples": settings.num_resamples, "confidence": settings.confidence, "seed": settings.seed},
    }
    return TaskResult(
        figures=figures,
        arrays={
            "image_to_text": hits.image_to_text.numpy(),
            "text_to_image": hits.text_to_image.numpy(),
            "ks": np.array(ks),
            "owner": owner.numpy(),
            "rows": rows.numpy(),
        },
        set_aside=_unreadable(images, data),
        seconds=_seconds(start, embedded, scored),
        facts=_facts(images, rows) | {"num_texts": len(text_embeds)},
    )


# What both share -------------------------------------------------------------------------------------------------


def _groups(data: TaskData, rows: Tensor) -> NDArray[np.str_] | None:
    return None if data.patients is None else data.patients[rows.numpy()]


def _unreadable(images: CachedImages, data: TaskData) -> tuple[SetAside, ...]:
    """The images that have no embedding; of those in the cache the reason is not kept."""
    seen = {entry.where: entry for entry in images.unreadable}
    places = (~images.is_readable).nonzero()[:, 0].tolist()
    names = [data.items[place].item_id for place in places]
    return tuple(seen.get(name, SetAside(name, "image could not be read", "when it was cached")) for name in names)


def _facts(images: CachedImages, rows: Tensor) -> dict[str, Any]:
    return {"num_images": len(rows), "num_encoded": images.num_computed, "batch_size": images.batch_size}


def _seconds(start: float, embedded: float, scored: float) -> dict[str, float]:
    now = time.perf_counter()
    return {"embed": embedded - start, "score": scored - embedded, "figures": now - scored}
