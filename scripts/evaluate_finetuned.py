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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor
from transformers.utils.logging import disable_progress_bar

import medclip_hf  # noqa: F401 - makes the Auto classes know the models
from medclip_hf.data.ct.geometry import UnusableScan
from medclip_hf.data.hospital.rows import DATASET_FILE, GROUP_COLUMNS, read_dataset_facts, read_subgroups
from medclip_hf.data.parquet import require_writable, write_text_atomically
from medclip_hf.evaluation.calibration import fit_temperature, reliability_curve
from medclip_hf.evaluation.classification import ClassificationFigures, classification_figures
from medclip_hf.evaluation.ct_zero_shot import (
    CT_RATE_FINDINGS,
    Finding,
    FindingEmbeddings,
    embed_findings,
    embed_scan,
)
from medclip_hf.evaluation.curves import roc_curve_band, threshold_at_specificity
from medclip_hf.explain.evaluation_report import figure_table, write_evaluation_report
from medclip_hf.explain.plots import MAX_CURVES, reliability_plot, roc_plot
from medclip_hf.explain.report import Picture
from medclip_hf.hub.cards import ModelFacts, write_card
from medclip_hf.hub.results import MeasuredFigure
from medclip_hf.training.classification import (
    LabelledFigureCollator,
    LabelledFigureDataset,
    LabelledScanDataset,
    check_patients_disjoint,
    run_over_rows,
)
from medclip_hf.training.lora import MODEL_CLASSES, load_adapters, read_base_facts

logger = logging.getLogger("evaluate_finetuned")

Floats = NDArray[np.float64]
MIN_PATIENTS = 10  # of a subgroup: figures of fewer say little, and come close to telling of a person


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


@dataclass(frozen=True)
class Predictions:
    """What the model says of a split, and what is true.

    Args:
        logits: (N, K), NaN where an anatomy is missing.
        labels: (N, K) 1, 0, NaN where unknown.
        patients: (N,).
        row_ids: N.
        num_unreadable: rows that could not be read.
    """

    logits: Floats
    labels: Floats
    patients: NDArray[np.str_]
    row_ids: list[str]
    num_unreadable: int

    def known(self) -> NDArray[np.bool_]:
        """(N, K): label and logit are both there."""
        return ~np.isnan(self.logits) & ~np.isnan(self.labels)


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


def predict(loaded: Loaded, split: str, options: argparse.Namespace) -> Predictions:
    """The logits and labels of a split."""
    is_ct = loaded.model.config.model_type == "fvlm"
    return predict_scans(loaded, split, options) if is_ct else predict_images(loaded, split, options)


@torch.no_grad()
def predict_images(loaded: Loaded, split: str, options: argparse.Namespace) -> Predictions:
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
    return Predictions(
        logits.double().numpy(),
        dataset.labels[rows].astype(np.float64),
        np.array(dataset.patient_ids)[rows],
        [dataset.row_ids[row] for row in rows],
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
def predict_scans(loaded: Loaded, split: str, options: argparse.Namespace) -> Predictions:
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
    return Predictions(
        torch.stack(logits).double().cpu().numpy(),
        dataset.labels[kept].astype(np.float64),
        np.array(dataset.patient_ids)[kept],
        [dataset.row_ids[place] for place in kept],
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
    has_validation = options.validation_split != "none"
    validation = usable(predict(loaded, options.validation_split, options), loaded) if has_validation else None
    test = usable(predict(loaded, options.split, options), loaded)
    if validation is not None:
        patients = {options.validation_split: validation.patients.tolist(), options.split: test.patients.tolist()}
        check_patients_disjoint(patients)
    temperature = None if validation is None else temperature_of(validation, loaded)
    thresholds = (
        None if validation is None else thresholds_of(validation, loaded, temperature or 1.0, options.specificity)
    )
    measured = figures(test, loaded, temperature or 1.0, options, thresholds)
    evaluation = {
        "split": options.split,
        "classes": list(loaded.classes),
        "protocol": protocol_name(loaded),
        "num_unreadable": test.num_unreadable,
        "temperature": temperature,
        "thresholds": thresholds,
        "figures": measured.as_dict(),
        "ece_before_temperature": figures(test, loaded, 1.0, options).as_dict()["overall"].get("ece"),
        "subgroups": subgroups(test, loaded, temperature or 1.0, options),
    }
    write_text_atomically(options.output / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    write_pictures(test, loaded, temperature, evaluation, options)
    return evaluation


def protocol_name(loaded: Loaded) -> str:
    """How the answer was obtained."""
    kind = "zero-shot by prompts" if loaded.prompts is not None else "head of labels"
    return f"{kind}, adapter" if loaded.is_adapter else kind


def usable(predictions: Predictions, loaded: Loaded) -> Predictions:
    """Without the rows of a single-label task that do not have exactly one label."""
    if not loaded.is_single_label:
        return predictions
    kept = np.nansum(predictions.labels, axis=1) == 1
    if not kept.any():
        raise ValueError("no row has exactly one of the classes.")
    return select(predictions, kept, predictions.num_unreadable + int((~kept).sum()))


def select(predictions: Predictions, kept: NDArray[np.bool_], num_unreadable: int = 0) -> Predictions:
    """Some of the rows."""
    return Predictions(
        predictions.logits[kept],
        predictions.labels[kept],
        predictions.patients[kept],
        [row for row, is_kept in zip(predictions.row_ids, kept, strict=True) if is_kept],
        num_unreadable,
    )


def probabilities(predictions: Predictions, loaded: Loaded, temperature: float) -> Floats:
    """(N, K), 0 where unknown."""
    scaled = torch.from_numpy(np.nan_to_num(predictions.logits) / temperature)
    return (scaled.softmax(dim=1) if loaded.is_single_label else scaled.sigmoid()).numpy()


def figures(
    predictions: Predictions,
    loaded: Loaded,
    temperature: float,
    options: argparse.Namespace,
    thresholds: list[float] | None = None,
) -> ClassificationFigures:
    """All figures of the rows."""
    scores = probabilities(predictions, loaded, temperature)
    common = {
        "groups": predictions.patients,
        "specificity": options.specificity,
        "num_resamples": options.num_resamples,
        "seed": options.seed,
    }
    if loaded.is_single_label:
        return classification_figures(scores, np.nan_to_num(predictions.labels).argmax(1), loaded.classes, **common)
    known = predictions.known()
    truth = np.where(known, predictions.labels, 0.0).astype(bool)
    return classification_figures(
        np.where(known, scores, 0.0), truth, loaded.classes, known=known, thresholds=thresholds, **common
    )


def temperature_of(validation: Predictions, loaded: Loaded) -> float | None:
    """The temperature of the least log loss on validation; None where none improves it."""
    try:
        if loaded.is_single_label:
            return fit_temperature(validation.logits, np.nan_to_num(validation.labels).argmax(1))
        known = validation.known()
        return fit_temperature(validation.logits[known][:, None], validation.labels[known][:, None].astype(int))
    except ValueError as error:
        logger.warning("no temperature was fitted: %s", error)
        return None


def thresholds_of(
    validation: Predictions, loaded: Loaded, temperature: float, specificity: float
) -> list[float] | None:
    """For each label the probability that keeps the specificity on validation; None for a single label."""
    if loaded.is_single_label:
        return None
    scores, known = probabilities(validation, loaded, temperature), validation.known()
    found = []
    for place, name in enumerate(loaded.classes):
        truth = validation.labels[known[:, place], place] == 1
        if truth.all():
            logger.warning("%s: no validation row without it, so its threshold is 0.5", name)
            found.append(0.5)
        else:
            chosen = threshold_at_specificity(scores[known[:, place], place], truth, specificity)
            found.append(min(chosen, 1.0))
    return found


def subgroups(
    test: Predictions, loaded: Loaded, temperature: float, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Column → value → figures, for every column with two values or more; groups of few patients are named alone."""
    try:
        groups = read_subgroups(options.data, options.split)
    except ValueError:
        return {}  # prepared by another script, which knows no groups
    found: dict[str, dict[str, Any]] = {}
    for column in GROUP_COLUMNS:
        values = np.array([asdict(groups[row])[column] if row in groups else "" for row in test.row_ids])
        names = [name for name in np.unique(values) if name]
        if len(names) < 2:
            continue
        found[column] = {}
        for name in names:
            member = select(test, values == name)
            num_patients = len(np.unique(member.patients))
            if num_patients < MIN_PATIENTS:
                found[column][str(name)] = {"left_out": f"fewer than {MIN_PATIENTS} patients"}
                continue
            found[column][str(name)] = figures(member, loaded, temperature, options).as_dict()
    return found


# What is written ---------------------------------------------------------------------------------------------------


def write_pictures(
    test: Predictions, loaded: Loaded, temperature: float | None, evaluation: Mapping[str, Any], options: Any
) -> None:
    """The reliability and ROC pictures, and the report that holds them."""
    bootstrap = {"num_resamples": options.num_resamples, "seed": options.seed}
    said = {"as trained": chosen_outcomes(test, loaded, 1.0)}
    if temperature is not None:
        said[f"temperature {temperature:.2f}"] = chosen_outcomes(test, loaded, temperature)
    curves = {
        name: reliability_curve(values, truth, groups=patients, **bootstrap)
        for name, (values, truth, patients) in said.items()
    }
    reliability = reliability_plot(curves, title="Reliability on the test patients")
    (options.output / "reliability.png").write_bytes(reliability)
    pictures = [Picture(reliability, "What was said and what came true, all labels together.")]
    scores, known = probabilities(test, loaded, temperature or 1.0), test.known()
    bands = {
        name: roc_curve_band(scores[rows, k], test.labels[rows, k] == 1, groups=test.patients[rows], **bootstrap)
        for k, name in enumerate(loaded.classes)
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
        "Groups left out": left_out(evaluation["subgroups"]) or "none",
    }
    write_evaluation_report(
        options.output / "report.html", "Fine-tuned model on the test patients", models, facts=facts, pictures=pictures
    )


def left_out(subgroups: Mapping[str, Mapping[str, Any]]) -> str:
    """The groups of too few patients."""
    return ", ".join(
        f"{column} {value}"
        for column, entries in subgroups.items()
        for value, entry in entries.items()
        if "left_out" in entry
    )


def chosen_outcomes(
    test: Predictions, loaded: Loaded, temperature: float
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.str_]]:
    """Probabilities, whether they came true, and patients: of the chosen class, or of every known label."""
    scores = probabilities(test, loaded, temperature)
    if loaded.is_single_label:
        return scores.max(axis=1), scores.argmax(1) == np.nan_to_num(test.labels).argmax(1), test.patients
    known = test.known()
    return scores[known], test.labels[known] == 1, np.broadcast_to(test.patients[:, None], known.shape)[known]


def card_facts(loaded: Loaded, evaluation: Mapping[str, Any], options: argparse.Namespace) -> ModelFacts:
    """What the card says; no path and no identifier."""
    overall = evaluation["figures"]["overall"]
    told = {
        "auroc": "AUROC",
        "auprc": "AUPRC",
        "sensitivity_at_specificity": f"sensitivity at specificity {options.specificity:g}",
        "ece": "expected calibration error",
    }
    shown = [name for name in told if name in overall]
    measured = tuple(
        MeasuredFigure(
            metric=f"{told[name]}, mean of {len(evaluation['classes'])} labels",
            value=overall[name]["value"],
            low=overall[name]["low"],
            high=overall[name]["high"],
            data=f"own data, {evaluation['split']} patients",
            num_samples=evaluation["figures"]["num_samples"],
            num_patients=evaluation["figures"]["num_groups"],
            protocol=evaluation["protocol"],
            dataset_id=options.dataset_id,
            task_id=name,
        )
        for name in shown
    )
    model_type: Literal["conceptclip", "fvlm"] = loaded.model.config.model_type
    return ModelFacts(
        name=options.name or options.model.resolve().parent.name,
        model_type=model_type,
        summary=f"Fine-tuned for: {', '.join(evaluation['classes'])}.",
        license=options.license,
        pipeline_tag="image-classification" if loaded.prompts is None and model_type == "conceptclip" else None,
        base_model=options.base_model,
        base_model_relation=("adapter" if loaded.is_adapter else "finetune") if options.base_model else None,
        is_adapter=loaded.is_adapter,
        auto_class="AutoModelForImageClassification" if loaded.prompts is None else "AutoModel",
        training_data=" ".join([options.data_description, counts_in_words(options.data)]).strip(),
        training=training_facts(options.model, evaluation),
        figures=measured,
        intended_use="Research at the hospital whose data it was fine-tuned on.",
        limits=(
            "Measured on the patients of one hospital: elsewhere scanners, wording and patients differ, and so will "
            "the figures.",
            *((f"Too few patients to measure: {few}.",) if (few := left_out(evaluation["subgroups"])) else ()),
        ),
    )


def counts_in_words(data: Path) -> str:
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


def training_facts(model: Path, evaluation: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """What matters of the run that wrote the model, from its `run.json` if that lies beside it."""
    facts: dict[str, str | int | float | bool] = {}
    record = model.parent / "run.json"
    if record.is_file():
        content = json.loads(record.read_text(encoding="utf-8"))
        recipe, arguments = content.get("recipe", {}), content.get("arguments", {})
        facts |= {f"method.{name}": str(value) for name, value in recipe.get("method", {}).items()}
        facts |= {
            name: arguments[name]
            for name in ("learning_rate", "batch_size_per_process", "mixed_precision", "seed")
            if name in arguments
        }
        facts["steps"] = content.get("step", "unknown")
    if evaluation["temperature"] is not None:
        facts["temperature for probabilities"] = round(evaluation["temperature"], 4)
    return facts


if __name__ == "__main__":
    sys.exit(main())
