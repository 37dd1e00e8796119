"""The splits of a linear probe from a task's images: embeddings from the cache of an evaluation, or into it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from medclip_hf.evaluation.embedding_cache import DEFAULT_BATCH_SIZE, embed_images
from medclip_hf.evaluation.encoders import Encoder
from medclip_hf.evaluation.probe import ProbeSplit
from medclip_hf.evaluation.probe_data import ProbeData
from medclip_hf.evaluation.task_data import ALL_SPLITS, TaskData, read_task_data, read_validation_data
from medclip_hf.evaluation.tasks import Task


def embed_probe_data(
    encoder: Encoder,
    task: Task,
    source: str | Path,
    cache: Path | None,
    *,
    columns: Mapping[str, str] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    num_workers: int = 0,
) -> ProbeData:
    """Features (pooled vectors, not normalised) and labels of the train, validation and tested split of a task.

    Args:
        encoder: of the model.
        task: of the type zero_shot_classification, on the split that is tested.
        source: see `read_task_data`.
        cache: folder of embeddings, that of scripts/evaluate.py for one; None: nothing is kept.
        columns: see `read_task_data`.
        batch_size: see `embed_images`.
        num_workers: see `embed_images`.

    Raises:
        ValueError: a task of another type or of all splits, or as `read_task_data` and `embed_images`.
    """
    if task.task_type != "zero_shot_classification" or task.split in (ALL_SPLITS, "train"):
        raise ValueError(
            f"{task.name}: a probe needs a classification task and a split to test beside 'train', got "
            f"{task.task_type!r} and {task.split!r}"
        )
    found = {
        "train": read_task_data(replace(task, split="train"), source, columns=columns),
        "validation": read_validation_data(task, source, columns=columns),
        "test": read_task_data(task, source, columns=columns),
    }
    splits: dict[str, ProbeSplit] = {}
    set_aside: dict[str, dict[str, int]] = {}
    for name, data in found.items():
        if data is not None:
            splits[name] = _embedded(encoder, data, cache, batch_size, num_workers)
            unreadable = len(data.items) - len(splits[name].features)
            set_aside[name] = {reason: count for reason, count in data.counts.items() if reason != "in use"}
            set_aside[name] |= {"image could not be read": unreadable} if unreadable else {}
    tested = found["test"]
    assert tested is not None  # reading it raises where there is none
    return ProbeData(splits, tuple(tested.class_names), set_aside)


def _embedded(encoder: Encoder, data: TaskData, cache: Path | None, batch_size: int, num_workers: int) -> ProbeSplit:
    assert data.labels is not None  # of a classification task
    images = embed_images(encoder, data, cache, batch_size=batch_size, num_workers=num_workers)
    kept = images.is_readable.numpy()
    features = (images.image_embeds.double() * images.image_norms.double()[:, None]).numpy()
    return ProbeSplit(
        features[kept],
        data.labels[kept],
        None if data.patients is None else data.patients[kept],
        None if data.known is None else data.known[kept],
    )
