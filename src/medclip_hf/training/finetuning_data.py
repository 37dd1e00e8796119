"""Which rows a fine-tuning learns from, which of their labels, and what both must keep; the rows opened."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medclip_hf.data.ct.scan_index import read_scan_rows
from medclip_hf.data.hospital.rows import DATASET_FILE, read_dataset_facts, read_labels
from medclip_hf.training.classification import (
    LabelledFigureCollator,
    LabelledFigureDataset,
    LabelledScanCollator,
    LabelledScanDataset,
    check_patients_disjoint,
)
from medclip_hf.training.datasets import read_captions
from medclip_hf.training.finetuning import Started, head_fields
from medclip_hf.training.scan_datasets import PUBLISHED_FLIP_PROBABILITY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSection:
    """Which rows, and what becomes of them.

    Args:
        folder: of the prepared data.
        train_split: name of the split trained on.
        validation_split: name of the split validated on; None: no validation.
        crop_scale: of images: share of the area that a random crop covers; None: no crop, since a crop may cut off what
            the label or text tells of.
        flip_probability: of scans: of each axis (depth, height, width).
        max_length: of a text in tokens, [CLS] and [SEP] counted; None: 77 for images, 384 for scans, or as many as the
            text tower takes.
    """

    folder: str
    train_split: str = "train"
    validation_split: str | None = "validation"
    crop_scale: tuple[float, float] | None = None
    flip_probability: tuple[float, float, float] = (PUBLISHED_FLIP_PROBABILITY,) * 3
    max_length: int | None = None


@dataclass(frozen=True)
class TaskSection:
    """What is learned.

    Args:
        kind: "contrastive" (image or scan with its text), "classification" (labels of an image), "anatomy_findings"
            (labels of a scan, each looked for in its anatomy).
        classes: labels to learn; None: all of the data set.
        findings: of "anatomy_findings": label → anatomy; None: the anatomies of CT-RATE's findings.
        class_weights: "balanced" makes up for rare labels.
        max_class_weight: no weight exceeds it.
        head_dropout: on the input of the head.
        prompts: of "contrastive" on scans: finding → [absent, present], for the validation; None: the published ones.
    """

    kind: Literal["contrastive", "classification", "anatomy_findings"]
    classes: tuple[str, ...] | None = None
    findings: dict[str, Any] | None = None
    class_weights: Literal["none", "balanced"] = "balanced"
    max_class_weight: float = 20.0
    head_dropout: float = 0.0
    prompts: dict[str, Any] | None = None


def check_task_fits(task: TaskSection, base_config: Any, data: DataSection) -> None:
    """Refuse a task that the model or the data are not for."""
    needed = {"classification": "conceptclip", "anatomy_findings": "fvlm"}.get(task.kind, base_config.model_type)
    if base_config.model_type != needed:
        raise ValueError(f"task.kind={task.kind} is for a {needed} model, but the base is a {base_config.model_type}.")
    if (Path(data.folder) / DATASET_FILE).is_file():
        kind = read_dataset_facts(data.folder).kind
        wanted = "scans" if base_config.model_type == "fvlm" else "figures"
        if kind != wanted:
            raise ValueError(f"{data.folder} holds {kind}, but a {base_config.model_type} model learns from {wanted}.")
    elif task.kind == "classification":
        raise ValueError(f"{data.folder} has no {DATASET_FILE}: prepare the data with scripts/prepare_hospital.py.")


def check_splits(data: DataSection, *, is_ct: bool) -> None:
    """Refuse data in which a patient of the training is validated or tested on."""
    folder = Path(data.folder)
    named = [data.train_split, *([data.validation_split] if data.validation_split else [])]
    splits = [*named, *(["test"] if "test" not in named and list(folder.glob("test-*.parquet")) else [])]
    if is_ct:
        patients = {split: [row.patient_id for row in read_scan_rows(folder, split)] for split in splits}
    elif (folder / DATASET_FILE).is_file():
        patients = {split: [patient for patient, _ in read_labels(folder, split).values()] for split in splits}
    else:
        logger.warning("%s does not name patients: whether one is in two splits was not checked", folder)
        return
    check_patients_disjoint(patients)


@dataclass(frozen=True)
class LabelPlan:
    """The labels of a run.

    Args:
        classes: their names, in the order of the head.
        is_single_label: whether exactly one of them is present.
        head: fields of the configuration.
    """

    classes: tuple[str, ...]
    is_single_label: bool
    head: dict[str, Any]


def label_plan(
    task: TaskSection, data: DataSection, base_config: Any, anatomy_of: Mapping[str, str]
) -> LabelPlan | None:
    """Which labels are learned; None for a task without.

    Args:
        task: what is learned.
        data: from which rows.
        base_config: of the base.
        anatomy_of: finding → anatomy, where the task names none.

    Raises:
        ValueError: a label that the data do not have, or whose anatomy the base does not have.
    """
    if task.kind == "contrastive":
        return None
    is_described = (Path(data.folder) / DATASET_FILE).is_file()
    facts = read_dataset_facts(data.folder) if is_described else None
    if task.kind == "classification":
        assert facts is not None
        known, is_single_label = facts.classes, facts.task == "single_label"
        findings = None
    else:
        rows = read_scan_rows(Path(data.folder), data.train_split)
        known = facts.classes if facts else tuple(dict.fromkeys(name for row in rows for name, _ in row.labels))
        is_single_label = False
        findings = task.findings or dict(anatomy_of)
    classes = task.classes or tuple(name for name in known if findings is None or name in findings)
    if unknown := [name for name in classes if name not in known or (findings is not None and name not in findings)]:
        raise ValueError(
            f"task.classes names {unknown}, but {data.folder} has the labels {list(known)}"
            + ("" if findings is None else f" and anatomies are known for {list(findings)}: name them in task.findings")
            + "."
        )
    if len(classes) < (2 if is_single_label else 1):
        raise ValueError(f"{data.folder} has the labels {list(known)}, of which {list(classes)} are left to learn.")
    if task.kind == "anatomy_findings":
        check_anatomies(classes, findings or {}, base_config)
    head = head_fields(
        task.kind, classes, is_single_label=is_single_label, dropout=task.head_dropout, findings=findings
    )
    return LabelPlan(classes, is_single_label, head or {})


def check_anatomies(classes: tuple[str, ...], findings: dict[str, str], base_config: Any) -> None:
    """Refuse findings of anatomies that the base does not have."""
    homeless = {name: findings[name] for name in classes if findings[name] not in base_config.anatomies}
    if homeless:
        raise ValueError(
            f"the findings {homeless} belong to anatomies that the base does not have: it knows "
            f"{list(base_config.anatomies)}. Leave them out with task.classes, or take another base."
        )


def text_length(started: Started, data: DataSection, usual: int) -> int:
    """Tokens of a text: what the recipe says, or the usual number within what the text tower takes."""
    positions = started.model.config.text_config.max_position_embeddings
    length = data.max_length or min(usual, positions)
    if length > positions:
        raise ValueError(f"data.max_length is {length}, but the text tower has {positions} positions.")
    return length


def check_texts(data: DataSection) -> None:
    """Refuse a split without texts; say how many rows have none."""
    num_texts = sum(1 for _ in read_captions(data.folder, data.train_split))
    if not num_texts:
        raise ValueError(
            f"the text column of the split {data.train_split} in {data.folder} is empty: there is nothing to compare "
            "images with. Bring texts, or set task.kind=classification if there are labels."
        )


def patient_of_rows(data: DataSection) -> dict[str, str]:
    """Row id → patient of the validation rows; empty where the data do not tell."""
    if not (Path(data.folder) / DATASET_FILE).is_file():
        return {}
    assert data.validation_split is not None
    return {row_id: patient for row_id, (patient, _) in read_labels(Path(data.folder), data.validation_split).items()}


def open_scans(dataset_class: Any, started: Started, data: DataSection, split: str, **options: Any) -> Any:
    """The studies of a split in the size of the model.

    Args:
        dataset_class: `ScanDataset` or one of its kind.
        started: the model and its processor.
        data: which rows.
        split: of them.
        options: of the class.

    Raises:
        ValueError: the scans keep another geometry than the model wants.
    """
    config = started.model.config
    dataset = dataset_class(
        data.folder,
        split,
        anatomies=config.anatomies,
        size_dhw=config.vision_config.image_size_dhw,
        flip_probability=data.flip_probability,
        **options,
    )
    kept = dataset.contract.to_dict()
    asked = {name: getattr(started.processor.image_processor, name) for name in kept}
    if different := [name for name in kept if kept[name] != asked[name]]:
        told = "; ".join(f"{name} is {kept[name]}, the model wants {asked[name]}" for name in different)
        raise ValueError(f"the scans in {data.folder} do not fit the model: {told}. Prepare them again.")
    return dataset


def open_labelled(
    started: Started, data: DataSection, labels: LabelPlan, split: str, *, is_random: bool, seed: int = 0
) -> tuple[Any, Any]:
    """The labelled rows of a split and their collator."""
    config = started.model.config
    if config.model_type == "conceptclip":
        dataset: Any = LabelledFigureDataset(
            data.folder,
            split,
            classes=labels.classes,
            seed=seed,
            image_size=config.vision_config.image_size,
            crop_scale=data.crop_scale if is_random else None,
        )
        num_classes = len(labels.classes)
        return dataset, LabelledFigureCollator(started.processor, num_classes, is_single_label=labels.is_single_label)
    dataset = open_scans(
        LabelledScanDataset, started, data, split, classes=labels.classes, seed=seed, random_crop=is_random
    )
    places = [list(config.anatomies).index(labels.head["findings"][name]) for name in labels.classes]
    return dataset, LabelledScanCollator(started.processor, places, needs_whole_anatomy=is_random)
