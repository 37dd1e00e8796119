r"""Pre-train fVLM on CT scans with reports, anatomy by anatomy, as a recipe says.

    python scripts/pretrain_fvlm.py --config scripts/recipes/fvlm_tiny.yaml \
        --set data.folder=prepared --set training.output_dir=runs/fvlm

    accelerate launch --config_file scripts/launch/cpu_processes.yaml scripts/pretrain_fvlm.py \
        --config scripts/recipes/fvlm_tiny.yaml --set training.batch_size_per_process=4 --resume

The data are a folder as `scripts/prepare_ct.py` writes it. The trained model lies in `<output_dir>/final`. SIGTERM or
SIGINT ends the run after the step with a checkpoint, and with exit code 143 or 130; `--resume` continues it.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from medclip_hf import FVLMConfig, FVLMModel, FVLMProcessor
from medclip_hf.data.ct.anatomy import margin_voxels
from medclip_hf.data.ct.geometry import GeometryContract
from medclip_hf.data.records import ScanRow
from medclip_hf.evaluation.ct_zero_shot import (
    CT_RATE_FINDINGS,
    Finding,
    Protocol,
    embed_findings,
    score_scan,
)
from medclip_hf.evaluation.metrics import auroc
from medclip_hf.hub.convert import read_bert_tokenizer
from medclip_hf.hub.convert_fvlm import from_towers
from medclip_hf.pipelines import add_pipelines
from medclip_hf.processing.fvlm import FVLMImageProcessor
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.calibration import CalibratedFVLMObjective, PeerModel, TextTeacher
from medclip_hf.training.collators import ScanCollator
from medclip_hf.training.command_line import train_by_recipe
from medclip_hf.training.distributed import gather_counts, gather_rows
from medclip_hf.training.loop import EvaluateFn, TrainResult, train
from medclip_hf.training.objectives import FVLMObjective
from medclip_hf.training.scan_datasets import PUBLISHED_FLIP_PROBABILITY, ScanDataset
from medclip_hf.training.sharded import gathered
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

logger = logging.getLogger("pretrain_fvlm")


@dataclass(frozen=True)
class ModelSection:
    """Where the model comes from: `from_pretrained`, or towers and `config`, where what is left out starts fresh.

    Args:
        from_pretrained: folder or Hub name of an fVLM.
        vision_weights: file of an MAE or ViT image encoder, for the vision tower.
        patch_embedding: of a tower from `vision_weights`: "random" as published, or "inflated" from the 2-D one.
        text_tower: folder or Hub name of a BERT.
        config: fields of FVLMConfig.
        tokenizer: folder or Hub name; None: that of the model or text tower, or one learned from the texts.
        vocab_size: of a tokenizer learned from the texts.
    """

    from_pretrained: str | None = None
    vision_weights: str | None = None
    patch_embedding: Literal["random", "inflated"] = "random"
    text_tower: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    vocab_size: int = 30522

    def __post_init__(self) -> None:
        others = (self.vision_weights, self.text_tower, self.config)
        if self.from_pretrained is not None and any(other is not None for other in others):
            raise ValueError("model.from_pretrained comes alone: its folder names towers and config.")


@dataclass(frozen=True)
class DataSection:
    """Which scans, and what becomes of them.

    Args:
        folder: of the prepared scans.
        train_split: name of the split trained on.
        validation_split: name of the split validated on; None: no validation.
        flip_probability: of each axis (depth, height, width).
        max_length: of a text in tokens, [CLS] and [SEP] counted.
        text_buckets: groups of like length that the texts of a batch are encoded in, each padded to its longest.
        whole_volume: compare whole volumes with whole reports; the config then names one anatomy, such as [body].
    """

    folder: str
    train_split: str = "train"
    validation_split: str | None = None
    flip_probability: tuple[float, float, float] = (PUBLISHED_FLIP_PROBABILITY,) * 3
    max_length: int = 384
    text_buckets: int = 4
    whole_volume: bool = False


@dataclass(frozen=True)
class LossSection:
    """Which answers count as right.

    Args:
        reduce_false_negatives: normal scans, and identical texts, are right answers for each other. False: as CLIP.
        abnormal: what corrects the targets of abnormal scans: "none" as released, "text_teacher" (soft targets from a
            moving average of the text tower) or "peer" (the answers of another model, co-teaching).
        teacher_momentum: of the moving average, at each step.
        peer_model: folder of the other model.
        peer_weight: of its answers after the ramp.
        peer_ramp_steps: steps over which the weight grows from 0.
    """

    reduce_false_negatives: bool = True
    abnormal: Literal["none", "text_teacher", "peer"] = "none"
    teacher_momentum: float = 0.995
    peer_model: str | None = None
    peer_weight: float = 0.5
    peer_ramp_steps: int = 0

    def __post_init__(self) -> None:
        if (self.abnormal == "peer") != (self.peer_model is not None):
            raise ValueError("loss.peer_model and loss.abnormal=peer come together.")
        if self.abnormal != "none" and not self.reduce_false_negatives:
            raise ValueError(f"loss.abnormal={self.abnormal} needs loss.reduce_false_negatives.")


@dataclass(frozen=True)
class ValidationSection:
    """How the validation split is scored: the 16 CT-RATE findings, as far as model and labels know them.

    Args:
        protocol: of the windows, see `evaluation.ct_zero_shot`.
        window_size_dhw: smallest window, voxels; None: the size of the training crops.
        max_scans: score so many scans alone, spread over the split; None: all.
    """

    protocol: Protocol = "published"
    window_size_dhw: tuple[int, int, int] | None = None
    max_scans: int | None = None


SECTIONS = {
    "model": ModelSection,
    "data": DataSection,
    "loss": LossSection,
    "validation": ValidationSection,
    "training": RunArguments,
}


def main(command_line: list[str] | None = None) -> int:
    """Train as the command line says; the exit code of the run, 2 for a mistake in what was asked."""
    return train_by_recipe(__doc__, SECTIONS, run, command_line)


def run(recipe: dict[str, Any], sections: dict[str, Any], resume: bool | Path, accelerator: Accelerator) -> TrainResult:
    """Load the data, build model and objective, train."""
    data, loss, arguments = sections["data"], sections["loss"], sections["training"]

    set_seed(arguments.seed)
    with what_is_named("model"):
        config = read_config(sections["model"])
    dataset = open_split(data, data.train_split, config, arguments.seed)
    with what_is_named("model"):
        model, processor = build_model_and_processor(sections["model"], config, dataset, data.max_length)
    collator = ScanCollator(
        processor, data.max_length, reduce_false_negatives=loss.reduce_false_negatives, raw_pixels=True
    )
    with what_is_named("loss"):
        objective = build_objective(loss, model, data.text_buckets)

    evaluate_fn = None
    if data.validation_split is not None:
        validation = open_split(data, data.validation_split, config)
        evaluate_fn = make_evaluate_fn(validation, processor, sections["validation"], accelerator)

    result = train(
        model,
        dataset,
        collator,
        objective,
        arguments,
        processor=processor,
        evaluate_fn=evaluate_fn,
        resume=resume,
        recipe=recipe,
        accelerator=accelerator,
    )
    if result.model_path is not None and accelerator.is_main_process:
        add_pipelines(result.model_path)
    return result


@contextmanager
def what_is_named(section: str) -> Iterator[None]:
    """Tells a folder or file that a section names wrongly as the caller's mistake."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"what the section '{section}' names cannot be loaded: {reason}") from error


def read_config(section: ModelSection) -> FVLMConfig:
    """The architecture: that of the folder, or what the recipe asks for on top of the published one."""
    if section.from_pretrained is not None:
        return FVLMConfig.from_pretrained(section.from_pretrained)
    return FVLMConfig(**(section.config or {}))


def open_split(data: DataSection, split: str, config: FVLMConfig, seed: int = 0) -> ScanDataset:
    """The studies of a split, cropped to the size of the model."""
    return ScanDataset(
        data.folder,
        split,
        anatomies=config.anatomies,
        size_dhw=config.vision_config.image_size_dhw,
        seed=seed,
        flip_probability=data.flip_probability,
        whole_volume=data.whole_volume,
    )


def build_model_and_processor(
    section: ModelSection, config: FVLMConfig, dataset: ScanDataset, max_length: int
) -> tuple[FVLMModel, FVLMProcessor]:
    """The model to start from and its processor, the same on every process."""
    if section.from_pretrained is not None:
        model = FVLMModel.from_pretrained(section.from_pretrained, dtype=torch.float32)
        processor = FVLMProcessor.from_pretrained(section.from_pretrained)
        if section.tokenizer is not None:
            processor.tokenizer = read_bert_tokenizer(section.tokenizer)
    else:
        tokenizer = load_or_learn_tokenizer(section, dataset, max_length)
        if section.text_tower is None:
            config.text_config.vocab_size = len(tokenizer)
            config.text_config.pad_token_id = tokenizer.pad_token_id
        model = from_towers(
            config,
            mae_path=section.vision_weights,
            text_path=section.text_tower,
            patch_embedding=section.patch_embedding,
        )
        processor = FVLMProcessor(make_image_processor(config, dataset.contract), tokenizer)
    check_fit(model, processor, dataset, max_length)
    return model, processor


def load_or_learn_tokenizer(section: ModelSection, dataset: ScanDataset, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer named, that of the text tower, or one learned from the texts (the same in every process)."""
    source = section.tokenizer or section.text_tower
    if source is not None:
        return read_bert_tokenizer(source)
    logger.info("learning a tokenizer from the texts of %s", dataset.folder)
    return train_wordpiece_tokenizer(dataset.captions(), section.vocab_size, max_length=max_length)


def make_image_processor(config: FVLMConfig, contract: GeometryContract) -> FVLMImageProcessor:
    """The image processor that asks of new scans what the training scans keep."""
    return FVLMImageProcessor(
        anatomies=config.anatomies,
        size_dhw=config.vision_config.image_size_dhw,
        patch_size_dhw=config.vision_config.patch_size_dhw,
        crop_margin_dhw=margin_voxels(contract.spacing_mm_dhw),
        **contract.to_dict(),
    )


def check_fit(model: FVLMModel, processor: FVLMProcessor, dataset: ScanDataset, max_length: int) -> None:
    """Raise a ValueError where the model cannot take what tokenizer and scans give."""
    text: Any = model.config.text_config
    if len(processor.tokenizer) > text.vocab_size:
        raise ValueError(f"the tokenizer has {len(processor.tokenizer)} tokens, the text tower only {text.vocab_size}.")
    if max_length > text.max_position_embeddings:
        raise ValueError(
            f"data.max_length is {max_length}, but the text tower has {text.max_position_embeddings} positions."
        )
    kept = dataset.contract.to_dict()
    asked = {name: getattr(processor.image_processor, name) for name in kept}
    different = {name: (kept[name], asked[name]) for name in kept if kept[name] != asked[name]}
    if different:
        told = "; ".join(f"{name} is {mine}, the model wants {wanted}" for name, (mine, wanted) in different.items())
        raise ValueError(f"the scans in {dataset.folder} do not fit the model: {told}. Prepare them again.")


def build_objective(loss: LossSection, model: FVLMModel, text_buckets: int) -> FVLMObjective:
    """The disease-aware loss, with what corrects the targets of abnormal scans."""
    anatomies = model.config.anatomies
    if loss.abnormal == "text_teacher":
        teacher = TextTeacher(model, loss.teacher_momentum)
        return CalibratedFVLMObjective(anatomies, teacher, text_buckets=text_buckets)
    if loss.abnormal == "peer":
        peer = FVLMModel.from_pretrained(loss.peer_model, dtype=torch.float32)
        if peer.config.anatomies != anatomies:
            raise ValueError(f"{loss.peer_model} has the anatomies {peer.config.anatomies}, the model {anatomies}.")
        calibration = PeerModel(peer, loss.peer_weight, loss.peer_ramp_steps)
        return CalibratedFVLMObjective(anatomies, calibration, text_buckets=text_buckets)
    return FVLMObjective(anatomies, text_buckets=text_buckets)


def make_evaluate_fn(
    dataset: ScanDataset, processor: FVLMProcessor, section: ValidationSection, accelerator: Accelerator
) -> EvaluateFn:
    """Zero-shot AUC of each finding and their mean, over labelled scans; every process scores its share.

    Shares and their windows differ in number, so a model in shards is gathered for it.
    """
    rows = dataset.labelled_rows()
    if section.max_scans is not None:
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(section.max_scans, len(rows))).round().astype(int)]
    findings = known_findings(dataset, rows)
    window = section.window_size_dhw or dataset.size_dhw
    mine = rows[accelerator.process_index :: accelerator.num_processes]

    def score_mine(model: torch.nn.Module) -> torch.Tensor:
        """Scores and labels (N, 2, F) of this process's scans; NaN where a scan cannot be read."""
        embeddings = embed_findings(model, processor.tokenizer, findings)
        scored = torch.full((len(mine), 2, len(findings)), torch.nan)
        for place, row in enumerate(mine):
            try:
                volume, mask = load_scan(dataset, row, processor)
            except ValueError as error:  # its row stays NaN, which counts nowhere
                logger.warning("validation scan %s is set aside: %s", row.scan_id, error)
                continue
            scores = score_scan(model, volume, mask, embeddings, protocol=section.protocol, window_size_dhw=window)
            labels = dict(row.labels)
            scored[place] = torch.tensor([[scores[f.name] for f in findings], [labels[f.name] for f in findings]])
        return scored

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        with gathered(model):
            scored = score_mine(model)
        device = accelerator.device
        scored = gather_rows(scored.to(device), [count for (count,) in gather_counts([len(mine)], device)]).cpu()
        areas = {finding.name: area_of(scored[:, :, place]) for place, finding in enumerate(findings)}
        known = {name: area for name, area in areas.items() if area is not None}
        named = {f"auc_{name.lower().replace(' ', '_')}": area for name, area in known.items()}
        num_set_aside = int(scored[:, 1].isnan().all(dim=1).sum())
        mean = {"mean_auc": float(np.mean(list(known.values())))} if known else {}
        return mean | named | {"num_scans": float(len(scored)), "num_scans_set_aside": float(num_set_aside)}

    return evaluate


def known_findings(dataset: ScanDataset, rows: list[ScanRow]) -> list[Finding]:
    """The findings that model and labels know and that some but not all of the scans have."""
    findings = []
    for finding in CT_RATE_FINDINGS:
        labels = [dict(row.labels).get(finding.name) for row in rows]
        if set(labels) == {True, False}:
            if dataset.whole_volume:
                findings.append(replace(finding, anatomy=dataset.anatomies[0]))
            elif finding.anatomy in dataset.anatomies:
                findings.append(finding)
    if not findings:
        raise ValueError(
            f"the validation split of {dataset.folder} has no labels that differ between scans for any finding of the "
            f"anatomies {dataset.anatomies}. Leave data.validation_split out, or prepare scans with labels."
        )
    return findings


def load_scan(dataset: ScanDataset, row: ScanRow, processor: FVLMProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """A stored scan as the model takes it: volume in [0, 1] and mask, padded to the size of the training crops."""
    image, mask = dataset.read_whole(row)
    inputs = processor.image_processor(image, anatomy_mask=mask, do_crop=False)
    return inputs["pixel_values"][0, 0], inputs["anatomy_mask"][0]


def area_of(scores_and_labels: torch.Tensor) -> float | None:
    """AUC of (N, 2) scores and labels, scans that lack the anatomy left out."""
    kept = scores_and_labels[~scores_and_labels[:, 0].isnan()].double().numpy()
    return auroc(kept[:, 0], kept[:, 1])


if __name__ == "__main__":
    sys.exit(main())
