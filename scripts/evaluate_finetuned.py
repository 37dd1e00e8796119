r"""Measure a fine-tuned model on the test patients: figures with intervals, calibration, subgroups, report and card.

    python scripts/evaluate_finetuned.py --model runs/adapter/final --data prepared --output runs/adapter/evaluation

The model is an adapter, a merged or a plain model, with a head of labels; one without (task.kind=contrastive) is asked
with --prompts, a YAML file "label: [absent, present]". The temperature and the thresholds are chosen on the validation
split, everything else is measured on the test split, with intervals by patient. Written: `evaluation.json`,
`report.html`, `reliability.png`, `roc.png`, and with --card the model's `README.md` (and `.eval_results`, where the
test set is on the Hub). No file names a patient.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor
from transformers.utils.logging import disable_progress_bar

import medclip_hf  # noqa: F401 - makes the Auto classes know the models
from medclip_hf.data.ct.geometry import UnusableScan
from medclip_hf.data.hospital.rows import PatientGroups, read_subgroups
from medclip_hf.data.parquet import require_writable, write_text_atomically
from medclip_hf.evaluation.calibration import reliability_curve
from medclip_hf.evaluation.ct_zero_shot import (
    CT_RATE_FINDINGS,
    Finding,
    FindingEmbeddings,
    embed_findings,
    embed_scan,
)
from medclip_hf.evaluation.curves import roc_curve_band
from medclip_hf.evaluation.label_predictions import (
    FigureOptions,
    LabelPredictions,
    best_temperature,
    groups_left_out,
    label_figures,
    subgroup_figures,
    thresholds_at_specificity,
)
from medclip_hf.explain.evaluation_report import figure_table, write_evaluation_report
from medclip_hf.explain.plots import MAX_CURVES, reliability_plot, roc_plot
from medclip_hf.explain.report import Picture
from medclip_hf.hub.cards import ModelFacts, write_card
from medclip_hf.hub.finetuned_card import finetuned_facts
from medclip_hf.training.classification import (
    LabelledFigureCollator,
    LabelledFigureDataset,
    LabelledScanDataset,
    check_patients_disjoint,
    run_over_rows,
)
from medclip_hf.training.lora import MODEL_CLASSES, load_adapters, read_base_facts

logger = logging.getLogger("evaluate_finetuned")


@dataclass(frozen=True)
class Loaded:
    """A model and what it is asked.

    Args:
        model: in eval mode.
        processor: of the model.
        classes: labels.
        is_single_label: whether exactly one of them is present.
        findings: label → anatomy, of an fVLM.
        prompts: label → (absent, present), or label → one prompt of its class; None for a model with a head.
        is_adapter: whether the folder holds an adapter.
    """

    model: Any
    processor: Any
    classes: tuple[str, ...]
    is_single_label: bool
    findings: dict[str, str] | None
    prompts: dict[str, Any] | None
    is_adapter: bool


def main(command_line: list[str] | None = None) -> int:
    """Measure as the command line says; 0, or 2 for a mistake in what was asked."""
    options = parse_command_line(command_line)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        disable_progress_bar()  # of transformers
        require_writable(options.output)
        loaded = load(options)
        evaluation = evaluate(loaded, options)
        if options.card:
            write_card(options.model, card_facts(loaded, evaluation, options))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(figure_table({"test": evaluation["figures"]}).as_text())
    print(f"temperature {evaluation['temperature'] or 'not fitted'}; report: {options.output / 'report.html'}")
    return 0


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of an adapter or a model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data")
    parser.add_argument("--output", type=Path, required=True, help="folder of what is written")
    parser.add_argument("--split", default="test", help="measured on (default: test)")
    parser.add_argument(
        "--validation-split", default="validation", help="temperature and thresholds are chosen on; 'none': neither"
    )
    parser.add_argument("--base", help="folder or Hub name of an adapter's base, if it is not where the adapter says")
    parser.add_argument("--prompts", type=Path, help="YAML: label to [absent, present], for a model without a head")
    parser.add_argument("--specificity", type=float, default=0.9, help="at which sensitivity is told (default: 0.9)")
    parser.add_argument("--num-resamples", type=int, default=1000, help="of the bootstrap (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--ct-protocol", choices=("published", "shared"), default="published", help="windows of scans")
    card = parser.add_argument_group("card", "what README.md of the model says")
    card.add_argument("--card", action="store_true", help="write README.md, and .eval_results, beside the model")
    card.add_argument("--name", help="of the model; default: name of the run's folder")
    card.add_argument("--license", default="unknown", help="of the weights, as the Hub spells it")
    card.add_argument("--base-model", help="owner/name of the base on the Hub")
    card.add_argument("--data-description", default="", help="a sentence on the training data; no identifiers")
    card.add_argument("--dataset-id", help="owner/name of the test set, where it is on the Hub")
    return parser.parse_args(command_line)


# Model -------------------------------------------------------------------------------------------------------------


def load(options: argparse.Namespace) -> Loaded:
    """The model and what it can be asked.

    Raises:
        ValueError: no such model, or prompts missing or not fitting.
    """
    is_adapter = (options.model / "adapter_config.json").is_file()
    try:
        if is_adapter:
            model: Any = load_adapters({"default": options.model}, base=options.base)
            class_name = read_base_facts(options.model).model_class
        else:
            class_name = (AutoConfig.from_pretrained(options.model).architectures or [""])[0]
            if class_name not in MODEL_CLASSES:
                raise ValueError(f"{options.model} is a {class_name or 'model of unknown class'}, not of this package.")
            model = MODEL_CLASSES[class_name].from_pretrained(options.model, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(options.model)
    except OSError as error:
        if Path(options.model).is_absolute() and not Path(options.model).exists():
            raise ValueError(f"there is no folder {options.model}. Name the 'final' folder of a training.") from error
        raise ValueError(f"{options.model} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    model = model.to(options.device).eval()
    config = model.config
    if hasattr(model, "classifier"):
        if options.prompts is not None:
            raise ValueError(f"{options.model} has a head of labels: --prompts are for models without one.")
        classes = tuple(config.id2label[place] for place in range(len(config.id2label)))
        is_single = config.problem_type == "single_label_classification"
        return Loaded(model, processor, classes, is_single, getattr(config, "findings", None), None, is_adapter)
    prompts = read_prompts(options.prompts, options.model)
    kinds = {type(prompt) for prompt in prompts.values()}
    findings = None
    if config.model_type == "fvlm":
        known = {finding.name: finding.anatomy for finding in CT_RATE_FINDINGS}
        if missing := [name for name in prompts if name not in known or known[name] not in config.anatomies]:
            raise ValueError(f"no anatomy of the model is known for {missing}; known are {sorted(known)}.")
        findings = {name: known[name] for name in prompts}
    return Loaded(model, processor, tuple(prompts), kinds == {str}, findings, prompts, is_adapter)


def read_prompts(path: Path | None, model: Path) -> dict[str, Any]:
    """Label → [absent, present], or label → prompt of its class."""
    if path is None:
        raise ValueError(f"{model} has no head of labels. Say with --prompts what it shall be asked.")
    try:
        prompts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the prompts {path} cannot be read: {error}") from error
    pairs = isinstance(prompts, dict) and all(
        isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
        for value in prompts.values()
    )
    singles = isinstance(prompts, dict) and all(isinstance(value, str) for value in prompts.values())
    if not prompts or not (pairs or singles):
        raise ValueError(f"{path} must map each label to [absent, present], or each class to one prompt.")
    return prompts


# Predictions -------------------------------------------------------------------------------------------------------


def predict(loaded: Loaded, split: str, options: argparse.Namespace) -> LabelPredictions:
    """The logits and labels of a split."""
    is_ct = loaded.model.config.model_type == "fvlm"
    return predict_scans(loaded, split, options) if is_ct else predict_images(loaded, split, options)


@torch.no_grad()
def predict_images(loaded: Loaded, split: str, options: argparse.Namespace) -> LabelPredictions:
    """Every image as a whole, squeezed to the model's input as the processor does."""
    size = loaded.model.config.vision_config.image_size
    dataset = LabelledFigureDataset(options.data, split, classes=loaded.classes, image_size=size, crop_scale=None)
    collator = LabelledFigureCollator(loaded.processor, len(loaded.classes), is_single_label=loaded.is_single_label)
    forward = image_head if loaded.prompts is None else image_prompts
    rows, logits = run_over_rows(
        dataset,
        collator,
        forward(loaded, torch.device(options.device)),
        batch_size=options.batch_size,
        device=torch.device(options.device),
        description=split,
    )
    return LabelPredictions(
        logits.double().numpy(),
        dataset.labels[rows].astype(np.float64),
        np.array(dataset.patient_ids)[rows],
        tuple(dataset.row_ids[row] for row in rows),
        loaded.classes,
        loaded.is_single_label,
        len(dataset) - len(rows),
    )


def image_head(loaded: Loaded, device: torch.device) -> Any:
    """Pixels → logits of the head."""
    return lambda batch: loaded.model(pixel_values=batch["pixel_values"]).logits


def image_prompts(loaded: Loaded, device: torch.device) -> Any:
    """Pixels → logits by prompts: of the class, or present minus absent."""
    assert loaded.prompts is not None
    texts = [text for value in loaded.prompts.values() for text in ([value] if isinstance(value, str) else value)]
    tokens = loaded.processor(text=texts).to(device)

    def forward(batch: dict[str, Any]) -> torch.Tensor:
        logits = loaded.model(pixel_values=batch["pixel_values"], **tokens).logits_per_image
        return logits if loaded.is_single_label else logits.unflatten(1, (-1, 2)).diff(dim=-1).squeeze(-1)

    return forward


@torch.no_grad()
def predict_scans(loaded: Loaded, split: str, options: argparse.Namespace) -> LabelPredictions:
    """Every study's first scan as a whole, in windows around its anatomies."""
    config = loaded.model.config
    size_dhw: Any = tuple(config.vision_config.image_size_dhw)
    dataset = LabelledScanDataset(
        options.data, split, classes=loaded.classes, anatomies=config.anatomies, size_dhw=size_dhw, random_crop=False
    )
    asked = embed_prompts(loaded) if loaded.prompts is not None else None
    logits, kept = [], []
    for place, row in enumerate(tqdm(dataset.first_scans(), desc=split, disable=None)):
        try:
            image, mask = dataset.read_whole(row)
        except UnusableScan as error:
            logger.warning("scan %s is set aside: %s", row.scan_id, error.reason)
            continue
        inputs = loaded.processor.image_processor(image, anatomy_mask=mask, do_crop=False)
        embeds = embed_scan(
            loaded.model,
            inputs["pixel_values"][0, 0],
            inputs["anatomy_mask"][0],
            protocol=options.ct_protocol,
            window_size_dhw=size_dhw,
        )
        head = asked is None
        logits.append(
            loaded.model(anatomy_embeds=embeds[None]).logits[0] if head else asked_logits(loaded, embeds, asked)
        )
        kept.append(place)
    if not kept:
        raise ValueError(f"none of {len(dataset)} scans in the split {split} of {options.data} could be read.")
    return LabelPredictions(
        torch.stack(logits).double().cpu().numpy(),
        dataset.labels[kept].astype(np.float64),
        np.array(dataset.patient_ids)[kept],
        tuple(dataset.row_ids[place] for place in kept),
        loaded.classes,
        loaded.is_single_label,
        len(dataset) - len(kept),
    )


def embed_prompts(loaded: Loaded) -> FindingEmbeddings:
    """The prompts of the findings in the joint space."""
    assert loaded.prompts is not None
    assert loaded.findings is not None
    findings = [Finding(name, loaded.findings[name], *texts) for name, texts in loaded.prompts.items()]
    positions = loaded.model.config.text_config.max_position_embeddings
    return embed_findings(loaded.model, loaded.processor.tokenizer, findings, max_length=min(384, positions))


def asked_logits(loaded: Loaded, embeds: torch.Tensor, asked: FindingEmbeddings) -> torch.Tensor:
    """(F,) present minus absent, scaled: its sigmoid is the softmax over the two."""
    similarity = torch.einsum("fd,fpd->fp", embeds[asked.anatomy_index], asked.text_embeds.to(embeds.dtype))
    return (similarity * loaded.model.logit_scale.exp()).diff(dim=-1).squeeze(-1)


# Figures -----------------------------------------------------------------------------------------------------------


def evaluate(loaded: Loaded, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is told of the model; also written to the output folder."""
    told = FigureOptions(options.specificity, options.num_resamples, options.seed)
    has_validation = options.validation_split != "none"
    validation = predict(loaded, options.validation_split, options).usable() if has_validation else None
    test = predict(loaded, options.split, options).usable()
    temperature = thresholds = None
    if validation is not None:
        patients = {options.validation_split: validation.patients.tolist(), options.split: test.patients.tolist()}
        check_patients_disjoint(patients)
        temperature = best_temperature(validation)
        thresholds = thresholds_at_specificity(validation, temperature or 1.0, options.specificity)
    evaluation = {
        "split": options.split,
        "classes": list(loaded.classes),
        "protocol": protocol_name(loaded),
        "num_unreadable": test.num_unreadable,
        "specificity": options.specificity,
        "temperature": temperature,
        "thresholds": thresholds,
        "figures": label_figures(test, temperature or 1.0, told, thresholds).as_dict(),
        "ece_before_temperature": label_figures(test, 1.0, told).as_dict()["overall"].get("ece"),
        "subgroups": subgroup_figures(test, groups_of(options), temperature or 1.0, told),
    }
    write_text_atomically(options.output / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    write_pictures(test, temperature, evaluation, options)
    return evaluation


def protocol_name(loaded: Loaded) -> str:
    """How the answer was obtained."""
    kind = "zero-shot by prompts" if loaded.prompts is not None else "head of labels"
    return f"{kind}, adapter" if loaded.is_adapter else kind


def groups_of(options: argparse.Namespace) -> dict[str, PatientGroups]:
    """Row id → groups; empty for data of another script, which knows none."""
    try:
        return read_subgroups(options.data, options.split)
    except ValueError:
        return {}


# What is written ---------------------------------------------------------------------------------------------------


def write_pictures(
    test: LabelPredictions, temperature: float | None, evaluation: Mapping[str, Any], options: argparse.Namespace
) -> None:
    """The reliability and ROC pictures, and the report that holds them."""
    bootstrap = {"num_resamples": options.num_resamples, "seed": options.seed}
    said = {"as trained": test.outcomes(1.0)}
    if temperature is not None:
        said[f"temperature {temperature:.2f}"] = test.outcomes(temperature)
    curves = {
        name: reliability_curve(values, truth, groups=patients, **bootstrap)
        for name, (values, truth, patients) in said.items()
    }
    reliability = reliability_plot(curves, title="Reliability on the test patients")
    (options.output / "reliability.png").write_bytes(reliability)
    pictures = [Picture(reliability, "What was said and what came true, all labels together.")]
    scores, known = test.probabilities(temperature or 1.0), test.known()
    bands = {
        name: roc_curve_band(scores[rows, k], test.labels[rows, k] == 1, groups=test.patients[rows], **bootstrap)
        for k, name in enumerate(test.classes)
        for rows in [known[:, k]]
    }
    shown = {name: band for name, band in bands.items() if band is not None}
    if shown:
        roc = roc_plot(dict(list(shown.items())[:MAX_CURVES]), title="ROC on the test patients")
        (options.output / "roc.png").write_bytes(roc)
        pictures.append(Picture(roc, f"Sensitivity over 1 − specificity of {min(len(shown), MAX_CURVES)} labels."))
    models = {"All test patients": evaluation["figures"]} | {
        f"{column}: {value}": entry
        for column, entries in evaluation["subgroups"].items()
        for value, entry in entries.items()
        if "overall" in entry
    }
    facts = {
        "Split": options.split,
        "Asked by": evaluation["protocol"],
        "Temperature": "not fitted" if temperature is None else f"{temperature:.3f}, fitted on validation",
        "Rows that could not be read": str(evaluation["num_unreadable"]),
        "Groups left out": groups_left_out(evaluation["subgroups"]) or "none",
    }
    write_evaluation_report(
        options.output / "report.html", "Fine-tuned model on the test patients", models, facts=facts, pictures=pictures
    )


def card_facts(loaded: Loaded, evaluation: Mapping[str, Any], options: argparse.Namespace) -> ModelFacts:
    """What the card says."""
    return finetuned_facts(
        options.model,
        options.data,
        evaluation,
        name=options.name,
        model_type=loaded.model.config.model_type,
        has_head=loaded.prompts is None,
        is_adapter=loaded.is_adapter,
        license=options.license,
        base_model=options.base_model,
        data_description=options.data_description,
        dataset_id=options.dataset_id,
        left_out=groups_left_out(evaluation["subgroups"]),
    )


if __name__ == "__main__":
    sys.exit(main())
