"""The card of a fine-tuned model, from what was measured: no path, and nothing that identifies a patient."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from medclip_hf.data.hospital.rows import DATASET_FILE, read_dataset_facts
from medclip_hf.hub.cards import ModelFacts
from medclip_hf.hub.results import MeasuredFigure

_TOLD_ARGUMENTS = ("learning_rate", "batch_size_per_process", "mixed_precision", "seed")


def finetuned_facts(
    model: Path,
    data: Path,
    evaluation: Mapping[str, Any],
    *,
    name: str | None,
    model_type: Literal["conceptclip", "fvlm"],
    has_head: bool,
    is_adapter: bool,
    license: str,
    base_model: str | None,
    data_description: str,
    dataset_id: str | None,
    left_out: str,
) -> ModelFacts:
    """What the card says.

    Args:
        model: folder of the model, in the folder of its run.
        data: folder of the prepared data.
        evaluation: as `scripts/evaluate_finetuned.py` writes it.
        name: of the model; None: of the run's folder.
        model_type: of the base.
        has_head: whether the model has a head of labels.
        is_adapter: whether the folder holds an adapter.
        license: of the weights.
        base_model: owner/name on the Hub.
        data_description: a sentence on the training data.
        dataset_id: owner/name of the test set, where it is on the Hub.
        left_out: subgroups of too few patients, in words.
    """
    few = (f"Too few patients to measure: {left_out}.",) if left_out else ()
    return ModelFacts(
        name=name or model.resolve().parent.name,
        model_type=model_type,
        summary=f"Fine-tuned for: {', '.join(evaluation['classes'])}.",
        license=license,
        pipeline_tag="image-classification" if has_head and model_type == "conceptclip" else None,
        base_model=base_model,
        base_model_relation=("adapter" if is_adapter else "finetune") if base_model else None,
        is_adapter=is_adapter,
        auto_class="AutoModelForImageClassification" if has_head else "AutoModel",
        training_data=" ".join([data_description, _counts_in_words(data)]).strip(),
        training=_training_facts(model, evaluation),
        figures=_figures(evaluation, dataset_id),
        intended_use="Research at the hospital whose data it was fine-tuned on.",
        limits=(
            "Measured on the patients of one hospital: elsewhere scanners, wording and patients differ, and so will "
            "the figures.",
            *few,
        ),
    )


def _figures(evaluation: Mapping[str, Any], dataset_id: str | None) -> tuple[MeasuredFigure, ...]:
    overall, measured = evaluation["figures"]["overall"], evaluation["figures"]
    told = {
        "auroc": "AUROC",
        "auprc": "AUPRC",
        "sensitivity_at_specificity": f"sensitivity at specificity {evaluation['specificity']:g}",
        "ece": "expected calibration error",
    }
    return tuple(
        MeasuredFigure(
            metric=f"{words}, mean of {len(evaluation['classes'])} labels",
            value=overall[name]["value"],
            low=overall[name]["low"],
            high=overall[name]["high"],
            data=f"own data, {evaluation['split']} patients",
            num_samples=measured["num_samples"],
            num_patients=measured["num_groups"],
            protocol=evaluation["protocol"],
            dataset_id=dataset_id,
            task_id=name,
        )
        for name, words in told.items()
        if name in overall
    )


def _counts_in_words(data: Path) -> str:
    """How many rows and patients each split has, where the data tell."""
    if not (data / DATASET_FILE).is_file():
        return ""
    counts = read_dataset_facts(data).counts
    told = [
        f"{split}: {entry['rows']} rows of {entry['patients']} patients"
        for split, entry in counts.items()
        if {"rows", "patients"} <= entry.keys()
    ]
    return ("Patients are in one split alone. " + "; ".join(told) + ".") if told else ""


def _training_facts(model: Path, evaluation: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """What matters of the run that wrote the model, from its `run.json` if that lies beside it."""
    facts: dict[str, str | int | float | bool] = {}
    record = model.parent / "run.json"
    if record.is_file():
        content = json.loads(record.read_text(encoding="utf-8"))
        recipe, arguments = content.get("recipe", {}), content.get("arguments", {})
        facts |= {f"method.{name}": str(value) for name, value in recipe.get("method", {}).items()}
        facts |= {name: arguments[name] for name in _TOLD_ARGUMENTS if name in arguments}
        facts["steps"] = content.get("step", "unknown")
    if evaluation["temperature"] is not None:
        facts["temperature for probabilities"] = round(evaluation["temperature"], 4)
    return facts
