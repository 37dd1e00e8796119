r"""Fine-tune ConceptCLIP or fVLM on a hospital's data, as a recipe says: an adapter, everything, or the head alone.

    python scripts/finetune_lora.py --config scripts/recipes/finetune_classification.yaml \
        --set model.from_pretrained=my-conceptclip --set data.folder=prepared --set training.output_dir=runs/adapter

The data are a folder as `scripts/prepare_hospital.py` writes it (for task.kind=contrastive also any folder of figure
shards, or of `scripts/prepare_ct.py`). The adapter, or the model, lies in `<output_dir>/final`. SIGTERM or SIGINT ends
the run after the step with a checkpoint; `--resume` continues it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import medclip_hf  # noqa: F401 - makes the Auto classes know the models
from medclip_hf.data.records import ScanRow
from medclip_hf.evaluation.classification import classification_figures
from medclip_hf.evaluation.ct_zero_shot import CT_RATE_FINDINGS, Finding, embed_findings, score_scan
from medclip_hf.evaluation.intervals import Interval, mean_with_interval
from medclip_hf.evaluation.retrieval import hit_probability
from medclip_hf.training import sharded
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.classification import (
    ClassificationObjective,
    check_both_values,
    class_weights,
    run_over_rows,
)
from medclip_hf.training.collators import FigureCollator, ScanCollator
from medclip_hf.training.command_line import train_by_recipe
from medclip_hf.training.datasets import FigureDataset
from medclip_hf.training.finetuning import (
    BaseSection,
    MethodSection,
    Started,
    read_base_config,
    start,
    to_features,
)
from medclip_hf.training.finetuning_data import (
    DataSection,
    LabelPlan,
    TaskSection,
    check_splits,
    check_task_fits,
    check_texts,
    label_plan,
    open_labelled,
    open_scans,
    patient_of_rows,
    text_length,
)
from medclip_hf.training.loop import EvaluateFn, TrainResult, train
from medclip_hf.training.objectives import ConceptCLIPObjective, FVLMObjective
from medclip_hf.training.scan_datasets import ScanDataset
from medclip_hf.training.validation import embed_pairs, gathered, validation_loss

NUM_RESAMPLES = 200  # of the intervals that a validation logs
RECALL_CHUNK = 1024

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
    labels = label_plan(task, data, base_config, {finding.name: finding.anatomy for finding in CT_RATE_FINDINGS})
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


# Image or scan with its text ---------------------------------------------------------------------------------------


def figure_text_job(started: Started, sections: dict[str, Any], _: None, accelerator: Accelerator) -> Job:
    """Images and captions; the validation is their recall."""
    data, arguments = sections["data"], sections["training"]
    check_texts(data)
    size = started.model.config.vision_config.image_size
    collator = FigureCollator(started.processor, text_length(started, data, 77), raw_pixels=True)
    dataset = FigureDataset(
        data.folder, data.train_split, seed=arguments.seed, image_size=size, crop_scale=data.crop_scale
    )
    objective = ConceptCLIPObjective(
        started.model.config.patch_concept_loss_weight,
        search_dtype=torch.bfloat16 if arguments.mixed_precision == "bf16" else None,
    )
    evaluate_fn = None
    if data.validation_split is not None:
        validation = FigureDataset(data.folder, data.validation_split, image_size=size, crop_scale=None)
        patients = patient_of_rows(data)
        evaluate_fn = recall_fn(validation, collator, objective, patients, arguments, accelerator)
    return Job(dataset, collator, objective, evaluate_fn)


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


def scan_text_job(started: Started, sections: dict[str, Any], _: None, accelerator: Accelerator) -> Job:
    """Scans and reports, anatomy by anatomy; the validation is the zero-shot AUROC of the labels, or the loss."""
    data, task, arguments = sections["data"], sections["task"], sections["training"]
    collator = ScanCollator(started.processor, text_length(started, data, 384), raw_pixels=True)
    objective = FVLMObjective(started.model.config.anatomies)
    dataset = open_scans(ScanDataset, started, data, data.train_split, seed=arguments.seed)
    evaluate_fn = None
    if data.validation_split is not None:
        validation = open_scans(ScanDataset, started, data, data.validation_split, random_crop=False)
        evaluate_fn = zero_shot_fn(validation, collator, objective, started, task, arguments, accelerator)
    return Job(dataset, collator, objective, evaluate_fn)


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

    def score_mine(model: torch.nn.Module) -> torch.Tensor:
        """Scores (N, F) of this process's scans."""
        asked = embed_findings(model, started.processor.tokenizer, findings, max_length=collator.max_length)
        scores = torch.full((len(mine), len(findings)), torch.nan)
        for place, row in enumerate(mine):
            image, mask = dataset.read_whole(rows[row])
            inputs = started.processor.image_processor(image, anatomy_mask=mask, do_crop=False)
            volume, ids = inputs["pixel_values"][0, 0], inputs["anatomy_mask"][0]
            found = score_scan(model, volume, ids, asked, window_size_dhw=dataset.size_dhw)
            scores[place] = torch.tensor([found[finding.name] for finding in findings])
        return scores

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        values = validation_loss(model, dataset, collator, objective, arguments, accelerator)
        if not findings:
            return values
        with sharded.gathered(model):  # processes have more or less to score
            scores = score_mine(model)
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
