r"""Fine-tune ConceptCLIP or fVLM on a hospital's data, as a recipe says: an adapter, everything, or the head alone.

    python scripts/finetune_lora.py --config scripts/recipes/finetune_classification.yaml \
        --set model.from_pretrained=my-conceptclip --set data.folder=prepared --set training.output_dir=runs/adapter

The data are a folder as `scripts/prepare_hospital.py` writes it (for task.kind=contrastive also any folder of figure
shards, or of `scripts/prepare_ct.py`). The adapter, or the model, lies in `<output_dir>/final`. SIGTERM or SIGINT ends
the run after the step with a checkpoint; `--resume` continues it.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

import medclip_hf  # noqa: F401 - makes the Auto classes know the models
from medclip_hf.data.ct.scan_index import read_scan_rows
from medclip_hf.data.hospital.rows import DATASET_FILE, read_dataset_facts, read_labels
from medclip_hf.data.records import ScanRow
from medclip_hf.evaluation.classification import classification_figures
from medclip_hf.evaluation.ct_zero_shot import CT_RATE_FINDINGS, Finding, embed_findings, score_scan
from medclip_hf.evaluation.intervals import Interval, mean_with_interval
from medclip_hf.evaluation.retrieval import hit_probability
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.classification import (
    ClassificationObjective,
    LabelledFigureCollator,
    LabelledFigureDataset,
    LabelledScanCollator,
    LabelledScanDataset,
    check_both_values,
    check_patients_disjoint,
    class_weights,
    run_over_rows,
)
from medclip_hf.training.collators import FigureCollator, ScanCollator
from medclip_hf.training.command_line import train_by_recipe
from medclip_hf.training.datasets import FigureDataset, read_captions
from medclip_hf.training.distributed import gather_counts, gather_rows
from medclip_hf.training.finetuning import (
    BaseSection,
    MethodSection,
    Started,
    head_fields,
    read_base_config,
    start,
    to_features,
)
from medclip_hf.training.loop import EvaluateFn, TrainResult, to_device, train
from medclip_hf.training.objectives import ConceptCLIPObjective, FVLMObjective
from medclip_hf.training.scan_datasets import PUBLISHED_FLIP_PROBABILITY, ScanDataset

logger = logging.getLogger("finetune_lora")

NUM_RESAMPLES = 200  # of the intervals that a validation logs
RECALL_CHUNK = 1024


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


SECTIONS = {
    "model": BaseSection,
    "data": DataSection,
    "task": TaskSection,
    "method": MethodSection,
    "training": RunArguments,
}


@dataclass(frozen=True)
class Job:
    """What the loop is given beside the model."""

    dataset: Any
    collator: Callable[[list[Any]], dict[str, Any]]
    objective: Any
    evaluate_fn: EvaluateFn | None = None


def main(command_line: list[str] | None = None) -> int:
    """Train as the command line says; the exit code of the run, 2 for a mistake in what was asked."""
    return train_by_recipe(__doc__, SECTIONS, run, command_line)


def run(recipe: dict[str, Any], sections: dict[str, Any], resume: bool | Path, accelerator: Accelerator) -> TrainResult:
    """Check the data, build model and objective, train."""
    data, task, arguments = sections["data"], sections["task"], sections["training"]

    set_seed(arguments.seed)
    base_config = read_base_config(sections["model"].from_pretrained)
    check_task_fits(task, base_config, data)
    check_splits(data, is_ct=base_config.model_type == "fvlm")
    labels = label_plan(task, data, base_config)
    started = start(sections["model"], sections["method"], labels.head if labels else None)
    build = {
        ("contrastive", "conceptclip"): figure_text_job,
        ("contrastive", "fvlm"): scan_text_job,
        ("classification", "conceptclip"): label_job,
        ("anatomy_findings", "fvlm"): label_job,
    }[task.kind, base_config.model_type]
    job = build(started, sections, labels, accelerator)
    return train(
        started.model,
        job.dataset,
        job.collator,
        job.objective,
        arguments,
        processor=started.saved_beside,
        evaluate_fn=job.evaluate_fn,
        resume=resume,
        recipe=recipe,
        accelerator=accelerator,
    )


# What the data must keep -------------------------------------------------------------------------------------------


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


def label_plan(task: TaskSection, data: DataSection, base_config: Any) -> LabelPlan | None:
    """Which labels are learned; None for a task without."""
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
        findings = task.findings or {finding.name: finding.anatomy for finding in CT_RATE_FINDINGS}
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


# Image or scan with its text ---------------------------------------------------------------------------------------


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


def figure_text_job(started: Started, sections: dict[str, Any], _: None, accelerator: Accelerator) -> Job:
    """Images and captions; the validation is their recall."""
    data, arguments = sections["data"], sections["training"]
    check_texts(data)
    size = started.model.config.vision_config.image_size
    collator = FigureCollator(started.processor, text_length(started, data, 77))
    dataset = FigureDataset(
        data.folder, data.train_split, seed=arguments.seed, image_size=size, crop_scale=data.crop_scale
    )
    objective = ConceptCLIPObjective(started.model.config.patch_concept_loss_weight)
    evaluate_fn = None
    if data.validation_split is not None:
        validation = FigureDataset(data.folder, data.validation_split, image_size=size, crop_scale=None)
        patients = patient_of_rows(data)
        evaluate_fn = recall_fn(validation, collator, objective, patients, arguments, accelerator)
    return Job(dataset, collator, objective, evaluate_fn)


def patient_of_rows(data: DataSection) -> dict[str, str]:
    """Row id → patient of the validation rows; empty where the data do not tell."""
    if not (Path(data.folder) / DATASET_FILE).is_file():
        return {}
    assert data.validation_split is not None
    return {row_id: patient for row_id, (patient, _) in read_labels(Path(data.folder), data.validation_split).items()}


def recall_fn(
    dataset: FigureDataset,
    collator: FigureCollator,
    objective: ConceptCLIPObjective,
    patients: dict[str, str],
    arguments: RunArguments,
    accelerator: Accelerator,
) -> EvaluateFn:
    """Recall of texts by images, identical texts counted as one, with its interval by patient."""

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        embeds, row_ids, texts = embed_pairs(model, dataset, collator, objective, arguments, accelerator.device)
        images, captions = embeds.unbind(1)
        same_text = torch.tensor(np.unique(texts, return_inverse=True)[1])
        hits = torch.cat(
            [
                hit_probability(
                    images[first : first + RECALL_CHUNK] @ captions.T,
                    same_text[first : first + RECALL_CHUNK, None] == same_text[None],
                    (1, 5),
                )
                for first in range(0, len(images), RECALL_CHUNK)
            ]
        ).numpy()
        groups = np.array([patients.get(row_id, row_id) for row_id in row_ids])
        at_1, at_5 = (
            mean_with_interval(hits[:, place], groups=groups, num_resamples=NUM_RESAMPLES) for place in range(2)
        )
        return spread("recall@1", at_1) | spread("recall@5", at_5) | {"num_pairs": float(len(images))}

    return evaluate


@torch.no_grad()
def embed_pairs(
    model: torch.nn.Module,
    dataset: FigureDataset,
    collator: FigureCollator,
    objective: ConceptCLIPObjective,
    arguments: RunArguments,
    device: torch.device,
) -> tuple[Tensor, list[str], list[str]]:
    """(N, 2, D) image and text embeddings of all readable rows, their ids and token ids; the same on each process."""
    embeds, row_ids, texts = [], [], []
    size = arguments.batch_size_per_process
    batches = [list(range(first, min(first + size, len(dataset)))) for first in range(0, len(dataset), size)]
    loader: Any = DataLoader(dataset, batch_sampler=batches, collate_fn=collator, num_workers=arguments.num_workers)  # type: ignore[arg-type]
    for batch in loader:
        if batch["row_ids"]:
            found = objective.embed(model, to_device(batch, device))
            embeds.append(torch.stack([found["image_embeds"], found["text_embeds"]], dim=1).float().cpu())
            row_ids += batch["row_ids"]
            texts += [
                str(tokens[mask.bool()].tolist())
                for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
    if not embeds:
        raise ValueError("not one row of the validation split could be read.")
    return torch.cat(embeds), row_ids, texts


def scan_text_job(started: Started, sections: dict[str, Any], _: None, accelerator: Accelerator) -> Job:
    """Scans and reports, anatomy by anatomy; the validation is the zero-shot AUROC of the labels, or the loss."""
    data, task, arguments = sections["data"], sections["task"], sections["training"]
    collator = ScanCollator(started.processor, text_length(started, data, 384))
    objective = FVLMObjective(started.model.config.anatomies)
    dataset = open_scans(ScanDataset, started, data, data.train_split, seed=arguments.seed)
    evaluate_fn = None
    if data.validation_split is not None:
        validation = open_scans(ScanDataset, started, data, data.validation_split, random_crop=False)
        evaluate_fn = zero_shot_fn(validation, collator, objective, started, task, arguments, accelerator)
    return Job(dataset, collator, objective, evaluate_fn)


def open_scans(dataset_class: Any, started: Started, data: DataSection, split: str, **options: Any) -> Any:
    """The studies of a split in the size of the model.

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


def zero_shot_fn(
    dataset: ScanDataset,
    collator: ScanCollator,
    objective: FVLMObjective,
    started: Started,
    task: TaskSection,
    arguments: RunArguments,
    accelerator: Accelerator,
) -> EvaluateFn:
    """The loss, and where findings are labelled their zero-shot AUROC with its interval by patient."""
    rows = dataset.labelled_rows()
    findings = prompted_findings(task, rows, dataset.anatomies)
    mine = list(range(accelerator.process_index, len(rows), accelerator.num_processes))

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        values = validation_loss(model, dataset, collator, objective, arguments, accelerator)
        if not findings:
            return values
        asked = embed_findings(model, started.processor.tokenizer, findings, max_length=collator.max_length)
        scores = torch.full((len(mine), len(findings)), torch.nan)
        for place, row in enumerate(mine):
            image, mask = dataset.read_whole(rows[row])
            inputs = started.processor.image_processor(image, anatomy_mask=mask, do_crop=False)
            volume, ids = inputs["pixel_values"][0, 0], inputs["anatomy_mask"][0]
            found = score_scan(model, volume, ids, asked, window_size_dhw=dataset.size_dhw)
            scores[place] = torch.tensor([found[finding.name] for finding in findings])
        order, scores = gathered(torch.tensor(mine), scores, accelerator.device)
        names = [finding.name for finding in findings]
        labels = np.array([[dict(rows[row].labels).get(name, np.nan) for name in names] for row in order], float)
        patients = [rows[row].patient_id for row in order]
        return values | figures_of(scores.numpy(), labels, names, patients, is_single_label=False)

    return evaluate


def prompted_findings(task: TaskSection, rows: list[ScanRow], anatomies: tuple[str, ...]) -> list[Finding]:
    """The findings that are labelled and that the model can look for, with their prompts."""
    labelled = {name for row in rows for name, _ in row.labels}
    findings = []
    for finding in CT_RATE_FINDINGS:
        if finding.name in labelled and finding.anatomy in anatomies:
            prompts = (task.prompts or {}).get(finding.name, (finding.absent, finding.present))
            if task.prompts is None or finding.name in task.prompts:
                findings.append(replace(finding, absent=str(prompts[0]), present=str(prompts[1])))
    return findings


def validation_loss(
    model: torch.nn.Module,
    dataset: ScanDataset,
    collator: ScanCollator,
    objective: FVLMObjective,
    arguments: RunArguments,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean loss over the batches of the split, all processes on the same one at a time."""
    size = arguments.batch_size_per_process * accelerator.num_processes
    losses = []
    for first in range(0, max(len(dataset) // size, 1) * size, size):
        share = range(first + accelerator.process_index, min(first + size, len(dataset)), accelerator.num_processes)
        batch = to_device(collator([dataset[index] for index in share]), accelerator.device)
        losses.append(float(objective.compare(objective.embed(model, batch), batch)["total_loss"]))
    return {"loss": float(np.mean(losses))}


def gathered(rows: Tensor, values: Tensor, device: torch.device) -> tuple[list[int], Tensor]:
    """Rows and values of all processes."""
    counts = [count for (count,) in gather_counts([len(rows)], device)]
    return gather_rows(rows.to(device), counts).tolist(), gather_rows(values.to(device), counts).cpu()


# Labels of images and scans ----------------------------------------------------------------------------------------


def label_job(started: Started, sections: dict[str, Any], labels: LabelPlan, accelerator: Accelerator) -> Job:
    """Labelled images or scans; the validation is AUROC and AUPRC with intervals by patient."""
    data, task, method, arguments = (sections[name] for name in ("data", "task", "method", "training"))
    is_probe = method.mode == "linear_probe"
    dataset, collator = open_labelled(
        started, data, labels, data.train_split, seed=arguments.seed, is_random=not is_probe
    )
    check_both_values(dataset.labels, labels.classes)
    weights = class_weights(
        dataset.labels, task.class_weights, is_single_label=labels.is_single_label, largest=task.max_class_weight
    )
    objective = ClassificationObjective(labels.head["problem_type"], weights)
    validation = None
    if data.validation_split is not None:
        validation = open_labelled(started, data, labels, data.validation_split, is_random=False)
    if is_probe:
        options = {
            "batch_size": arguments.batch_size_per_process,
            "device": accelerator.device,
            "show_progress": arguments.progress_bar and accelerator.is_main_process,
        }
        dataset = to_features(started.model, dataset, collator, **options)
        collator = dataset.collate
        if validation is not None:
            features = to_features(started.model, *validation, **options)
            validation = (features, features.collate)
    if validation is None:
        return Job(dataset, collator, objective)
    return Job(dataset, collator, objective, label_figures_fn(*validation, objective, labels, arguments, accelerator))


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


def label_figures_fn(
    dataset: Any,
    collator: Any,
    objective: ClassificationObjective,
    labels: LabelPlan,
    arguments: RunArguments,
    accelerator: Accelerator,
) -> EvaluateFn:
    """AUROC and AUPRC over the split, with intervals by patient."""

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        rows, logits = run_over_rows(
            dataset,
            collator,
            lambda batch: objective.embed(model, batch)["logits"],
            batch_size=arguments.batch_size_per_process,
            device=accelerator.device,
            num_workers=arguments.num_workers,
        )
        patients = [dataset.patient_ids[row] for row in rows]
        scores = logits.softmax(1) if labels.is_single_label else logits.sigmoid()
        truth = dataset.labels[rows]
        is_single_label = labels.is_single_label
        return figures_of(scores.numpy(), truth, list(labels.classes), patients, is_single_label=is_single_label)

    return evaluate


def figures_of(
    scores: np.ndarray, labels: np.ndarray, names: list[str], patients: list[str], *, is_single_label: bool
) -> dict[str, float]:
    """AUROC and AUPRC, means over the labels, with their intervals; NaN where no label has both values."""
    groups = np.array(patients)
    if is_single_label:
        is_usable = np.nansum(labels, axis=1) == 1
        scores, labels, groups = scores[is_usable], labels[is_usable], groups[is_usable]
        figures = classification_figures(
            scores, np.nan_to_num(labels).argmax(1), names, groups=groups, num_resamples=NUM_RESAMPLES
        )
    else:
        known = ~np.isnan(labels) & ~np.isnan(scores)
        figures = classification_figures(
            np.where(known, scores, 0.0),
            np.where(known, labels, 0.0).astype(bool),
            names,
            groups=groups,
            known=known,
            num_resamples=NUM_RESAMPLES,
        )
    shown = {name: figures.overall[name] for name in ("auroc", "auprc") if name in figures.overall}
    values = {key: value for name, figure in shown.items() for key, value in spread(name, figure).items()}
    return values | {"num_rows": float(len(labels)), "num_labels_undefined": float(len(figures.undefined))}


def spread(name: str, figure: Interval) -> dict[str, float]:
    """A figure and the ends of its interval as three values."""
    ends = {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    return {key: float("nan") if value is None else value for key, value in ends.items()}


if __name__ == "__main__":
    sys.exit(main())
