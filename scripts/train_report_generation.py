r"""Train a projection (and adapters) between a frozen tower and a language model to write reports, and measure them.

    python scripts/train_report_generation.py --config scripts/recipes/report_generation_tiny.yaml \
        --set data.folder=reports --set training.output_dir=runs/reports

`model.kind: images` reads studies of JSON lines or `annotation.json` (see `data.image_reports`) for a ConceptCLIP;
`model.kind: ct` reads scans prepared by `scripts/prepare_ct.py` for an fVLM. The best model by `training.best_metric`
lies in `<output_dir>/final` (with adapters: merged into plain weights in `<output_dir>/merged`). If a test split is
named, its reports are written once, after the training: `test_reports.jsonl`, and figures in `test_figures.json`.
SIGTERM or SIGINT ends the run after the step with a checkpoint; `--resume` continues it.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import medclip_hf  # noqa: F401 - makes the Auto classes know the models
from medclip_hf.data.image_reports import read_studies
from medclip_hf.data.parquet import write_text_atomically
from medclip_hf.data.reports.decomposition import anatomy_caption
from medclip_hf.evaluation.encoders import check_model_place
from medclip_hf.evaluation.report_generation import anatomy_labeller, clinical_figures, write_reports
from medclip_hf.evaluation.text_metrics import METRICS, text_figures
from medclip_hf.modeling.conceptclip import ConceptCLIPModel
from medclip_hf.modeling.conceptclip.report_generation_conceptclip import (
    ConceptCLIPForReportGeneration,
)
from medclip_hf.modeling.fvlm import FVLMModel
from medclip_hf.modeling.fvlm.report_generation_fvlm import FVLMForReportGeneration
from medclip_hf.processing.conceptclip import ConceptCLIPProcessor
from medclip_hf.processing.fvlm import FVLMProcessor
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.checkpoints import save_model
from medclip_hf.training.command_line import train_by_recipe
from medclip_hf.training.loop import TrainResult, train
from medclip_hf.training.report_generation import (
    ReportObjective,
    ScanReportCollator,
    StudyCollator,
    StudyDataset,
    scan_report,
)
from medclip_hf.training.scan_datasets import ScanDataset
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

logger = logging.getLogger("train_report_generation")


@dataclass(frozen=True)
class ModelSection:
    """Which towers, and what of them is trained beside the projection.

    Args:
        from_pretrained: folder or Hub name of a ConceptCLIP or an fVLM.
        kind: "images" or "ct".
        language_model: folder or Hub name of a causal language model with its tokenizer.
        language_config: fields of its config with `model_type` instead, for a model that starts from nothing; its
            tokenizer is learned from the reports.
        language_training: "frozen" as published, "lora": adapters of its attention and MLP, "full": all of it, which is
            what a model that starts from nothing needs.
        lora_rank: of the adapters.
        lora_targets: regular expression of the language model's layers.
        language_dtype: in which a frozen or adapted language model is kept, by name; None: as it was saved.
        prompt: between picture and report; None: that of the model's class.
        vocab_size: of a tokenizer learned from the reports.
    """

    from_pretrained: str
    kind: Literal["images", "ct"] = "images"
    language_model: str | None = None
    language_config: dict[str, Any] | None = None
    language_training: Literal["frozen", "lora", "full"] = "frozen"
    lora_rank: int = 16
    lora_targets: str = r"language_model\..*\.(q_proj|k_proj|v_proj|o_proj|c_attn|query_key_value)"
    language_dtype: str | None = None
    prompt: str | None = None
    vocab_size: int = 4000

    def __post_init__(self) -> None:
        if (self.language_model is None) == (self.language_config is None):
            raise ValueError("the model section needs exactly one of language_model and language_config.")
        if self.language_config is not None and self.language_training != "full":
            raise ValueError("a language model that starts from nothing needs model.language_training=full.")


@dataclass(frozen=True)
class DataSection:
    """Which studies.

    Args:
        folder: of the data set.
        train_split: trained on.
        validation_split: chooses the best model by its loss; None: no validation.
        test_split: its reports are written once at the end; None: not at all.
        max_length: of a report in tokens.
    """

    folder: str
    train_split: str = "train"
    validation_split: str | None = "validation"
    test_split: str | None = None
    max_length: int = 60

    def __post_init__(self) -> None:
        splits = [self.train_split, self.validation_split, self.test_split]
        if any(split is not None and splits.count(split) > 1 for split in splits):
            raise ValueError(f"the splits must differ from each other, got {splits}: choose and measure on others.")


@dataclass(frozen=True)
class GenerationSection:
    """How test reports are written and compared.

    Args:
        arguments: of the language model's `generate`.
        metrics: of `evaluation.text_metrics`.
        labeller_anatomies: anatomies of which the built-in labeller reads whether a report states something abnormal;
            empty: no clinical figures, or for CT those of the model.
    """

    arguments: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 100, "do_sample": False})
    metrics: tuple[str, ...] = METRICS
    labeller_anatomies: tuple[str, ...] = ()


SECTIONS = {
    "model": ModelSection,
    "data": DataSection,
    "generation": GenerationSection,
    "training": RunArguments,
}


@dataclass
class Split:
    """The examples of a split, and the written report and patient of each row id."""

    dataset: Any
    reports: dict[str, str]
    patients: dict[str, str]


def main(command_line: list[str] | None = None) -> int:
    """Train as the command line says; the exit code of the run, 2 for a mistake in what was asked."""
    return train_by_recipe(__doc__, SECTIONS, run, command_line)


def run(recipe: dict[str, Any], sections: dict[str, Any], resume: bool | Path, accelerator: Accelerator) -> TrainResult:
    """Load the tower, read the reports, build the model, train, write the test reports; how it ended."""
    section, data, arguments = sections["model"], sections["data"], sections["training"]
    set_seed(arguments.seed)
    is_ct = section.kind == "ct"
    tower, image_processor = load_tower(section)
    splits = {
        split: read_scans(data, split, tower, arguments.seed) if is_ct else read_images(data.folder, split)
        for split in (data.train_split, data.validation_split, data.test_split)
        if split is not None
    }
    language_model, tokenizer = build_language_model(section, splits[data.train_split].reports.values())
    model = assemble(section, tower, language_model)
    processor_class: Any = FVLMProcessor if is_ct else ConceptCLIPProcessor
    processor = processor_class(image_processor, tokenizer)
    collator_class: Any = ScanReportCollator if is_ct else StudyCollator
    collator = collator_class(processor, model.config.prompt, data.max_length)
    objective = ReportObjective()

    def batches(split: str) -> Any:
        """This process's share of a split."""
        dataset = splits[split].dataset
        share = Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))
        size = arguments.micro_batch_size or arguments.batch_size_per_process
        return DataLoader(share, batch_size=size, collate_fn=collator, num_workers=arguments.num_workers)

    def evaluate(judged: torch.nn.Module, step: int) -> dict[str, float]:
        totals = torch.zeros(2, dtype=torch.float64)
        for batch in batches(data.validation_split):
            moved = {k: v.to(accelerator.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            found = objective.embed(judged, moved)
            totals += torch.stack([found["sample_losses"].sum(), found["num_tokens"].sum()]).double().cpu()
        loss, count = torch.tensor(gather_object([totals.tolist()])).sum(dim=0).tolist()
        return {"loss": loss / max(count, 1.0)}

    result = train(
        model,
        splits[data.train_split].dataset,
        collator,
        objective,
        arguments,
        processor=processor,
        evaluate_fn=evaluate if data.validation_split is not None else None,
        resume=resume,
        recipe=recipe,
        accelerator=accelerator,
    )
    if result.model_path is None:
        return result
    best = load_best(result.model_path, model)
    if section.language_training == "lora" and accelerator.is_main_process:
        save_model(Path(arguments.output_dir) / "merged", best, processor)
    if data.test_split is None:
        return result
    written = write_reports(best, tokenizer, batches(data.test_split), **sections["generation"].arguments)
    reports = dict(gather_object(list(written)))
    anatomies = sections["generation"].labeller_anatomies or (tower.config.anatomies if is_ct else ())
    if not accelerator.is_main_process:
        return result
    figures = compare(splits[data.test_split], reports, sections["generation"].metrics, anatomies)
    write_test(Path(arguments.output_dir), splits[data.test_split], reports, figures)
    values = {f"test_{name}": interval["value"] for name, interval in figures["text"]["figures"].items()}
    return replace(result, metrics={**result.metrics, **values})


def load_tower(section: ModelSection) -> tuple[Any, Any]:
    """The pre-trained model and its image processor.

    Raises:
        ValueError: there is none of that name, or it lacks a file.
    """
    check_model_place(section.from_pretrained)
    is_ct = section.kind == "ct"
    model_class: Any = FVLMModel if is_ct else ConceptCLIPModel
    processor_class: Any = FVLMProcessor if is_ct else ConceptCLIPProcessor
    try:
        processor = processor_class.from_pretrained(section.from_pretrained)
        return model_class.from_pretrained(section.from_pretrained), processor.image_processor
    except OSError as error:
        raise ValueError(f"model.from_pretrained={section.from_pretrained} cannot be loaded: {error}") from error


def read_images(folder: str, split: str) -> Split:
    """The studies of a split; what was set aside is counted in the log."""
    rows, drops = read_studies(folder, split)
    for reason, count in Counter(drop.reason for drop in drops).most_common():
        first = next(drop for drop in drops if drop.reason == reason)
        logger.warning("%s: %d set aside: %s, the first %s %s", split, count, reason, first.row_id, first.detail)
    return Split(
        StudyDataset(folder, rows),
        {row.row_id: row.report for row in rows},
        {row.row_id: row.patient_id for row in rows},
    )


def read_scans(data: DataSection, split: str, tower: Any, seed: int) -> Split:
    """The studies of a split of prepared scans; not flipped, since reports name sides."""
    anatomies = tower.config.anatomies
    dataset = ScanDataset(
        data.folder,
        split,
        anatomies=anatomies,
        size_dhw=tower.config.vision_config.image_size_dhw,
        seed=seed,
        random_crop=split == data.train_split,
        flip_probability=(0.0, 0.0, 0.0),
    )
    captions = {
        row.scan_id: {text.anatomy: anatomy_caption(text) for text in row.anatomy_texts} for row in dataset.rows()
    }
    reports = {scan: scan_report([texts.get(name, "") for name in anatomies]) for scan, texts in captions.items()}
    return Split(dataset, reports, {row.scan_id: row.patient_id for row in dataset.rows()})


def build_language_model(section: ModelSection, reports: Iterable[str]) -> tuple[Any, Any]:
    """The language model and its tokenizer, as saved or from nothing.

    Raises:
        ValueError: there is none of that name, or it cannot be one.
    """
    if section.language_model is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(section.language_model)
            model = AutoModelForCausalLM.from_pretrained(section.language_model, dtype=section.language_dtype or "auto")
        except OSError as error:
            raise ValueError(f"model.language_model={section.language_model} cannot be loaded: {error}") from error
        return model, tokenizer
    tokenizer = train_wordpiece_tokenizer(reports, section.vocab_size)
    tokenizer.eos_token = tokenizer.sep_token
    special = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **special}
    config = AutoConfig.for_model(**{**fields, **(section.language_config or {})})
    return AutoModelForCausalLM.from_config(config), tokenizer


def assemble(section: ModelSection, tower: Any, language_model: Any) -> Any:
    """The model, with what is to be trained left free and everything else frozen."""
    prompt = {} if section.prompt is None else {"prompt": section.prompt}
    model: Any
    if section.kind == "ct":
        model = FVLMForReportGeneration.from_fvlm_language_pretrained(tower, language_model, **prompt)
    else:
        model = ConceptCLIPForReportGeneration.from_vision_language_pretrained(tower, language_model, **prompt)
    model.freeze_towers_()
    if section.language_training == "full":
        model.language_model.requires_grad_(True)
    if section.language_training == "lora":
        adapter = LoraConfig(
            r=section.lora_rank,
            lora_alpha=2 * section.lora_rank,
            target_modules=section.lora_targets,
            modules_to_save=["language_projection"],
        )
        model = get_peft_model(model, adapter)
    return model


def load_best(model_path: Path, model: Any) -> Any:
    """The plain model in that folder, on the device of `model`, which is the one that was trained."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(model_path), device=str(model.device)))
        return model.merge_and_unload()
    return type(model).from_pretrained(model_path).to(model.device)


def compare(split: Split, reports: dict[str, str], metrics: Sequence[str], anatomies: Sequence[str]) -> dict[str, Any]:
    """The figures of reports beside those that were written, ready for JSON."""
    generated = list(reports.values())
    references = [split.reports[row_id] for row_id in reports]
    groups = [split.patients[row_id] for row_id in reports]
    figures: dict[str, Any] = {"num_without_report": len(split.dataset) - len(reports)}
    figures["text"] = text_figures(generated, references, metrics=metrics, groups=groups).as_dict()
    if anatomies:
        label = anatomy_labeller(anatomies)
        figures["clinical"] = clinical_figures(generated, references, label, list(anatomies), groups=groups).as_dict()
    return figures


def write_test(output_dir: Path, split: Split, reports: dict[str, str], figures: dict[str, Any]) -> None:
    """Every report beside the one that was written, and the figures."""
    lines = [
        json.dumps({"id": row_id, "generated": report, "written": split.reports[row_id]}, ensure_ascii=False)
        for row_id, report in reports.items()
    ]
    write_text_atomically(output_dir / "test_reports.jsonl", "\n".join(lines) + "\n")
    write_text_atomically(output_dir / "test_figures.json", json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
