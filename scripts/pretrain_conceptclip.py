r"""Pre-train ConceptCLIP on figures with captions and concepts, as a recipe says.

    python scripts/pretrain_conceptclip.py --config scripts/recipes/conceptclip_tiny.yaml \
        --set data.folder=figures --set training.output_dir=runs/tiny

    accelerate launch --config_file scripts/launch/cpu_processes.yaml scripts/pretrain_conceptclip.py \
        --config scripts/recipes/conceptclip_tiny.yaml --set training.batch_size_per_process=8 --resume

The data are Parquet shards as `scripts/import_medconcept.py` writes them. The trained model lies in
`<output_dir>/final`. SIGTERM or SIGINT ends the run after the step with a checkpoint, and with exit code 143 or 130;
`--resume` continues it.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor
from medclip_hf.data.parquet import find_shards
from medclip_hf.evaluation.retrieval import retrieval_recall
from medclip_hf.training.arguments import RunArguments, build_sections, read_recipe
from medclip_hf.training.collators import FigureCollator
from medclip_hf.training.datasets import FigureDataset
from medclip_hf.training.distributed import gather_counts, gather_rows
from medclip_hf.training.loop import EvaluateFn, make_accelerator, to_device, train
from medclip_hf.training.objectives import ConceptCLIPObjective
from medclip_hf.training.signals import ignore_stop_signals
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

logger = logging.getLogger("pretrain_conceptclip")

MAX_TOKENIZER_CAPTIONS = 100_000
# What stage 2 has and stage 1 has not; everything else must come from the folder a run starts from.
FRESH_IN_STAGE_2 = ("patch_projection.", "token_projection.", "concept_logit_scale", "concept_logit_bias")


@dataclass(frozen=True)
class ModelSection:
    """Where the model comes from: `from_pretrained`, or `vision_tower` and `text_tower`, or `config` alone.

    Args:
        from_pretrained: folder of a ConceptCLIP; a stage 1 folder starts stage 2, with fresh heads.
        vision_tower: folder or Hub name of a SigLIP.
        text_tower: folder or Hub name of a BERT.
        config: fields of ConceptCLIPConfig, on top of those of the towers.
        tokenizer: folder or Hub name; None: that of the model or text tower, or one learned from the captions.
        vocab_size: of a tokenizer learned from the captions.
    """

    from_pretrained: str | None = None
    vision_tower: str | None = None
    text_tower: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    vocab_size: int = 30522

    def __post_init__(self) -> None:
        if (self.vision_tower is None) != (self.text_tower is None):
            raise ValueError("model.vision_tower and model.text_tower come together.")
        if self.from_pretrained is not None and (self.vision_tower is not None or self.config is not None):
            raise ValueError("model.from_pretrained comes alone: its folder names towers and config.")
        if self.from_pretrained is None and self.vision_tower is None and self.config is None:
            raise ValueError("the model section needs from_pretrained, or vision_tower and text_tower, or config.")


@dataclass(frozen=True)
class DataSection:
    """Which rows, and what becomes of them.

    Args:
        folder: of the Parquet shards.
        train_split: name of the split trained on.
        validation_split: name of the split validated on; None: no validation.
        crop_scale: share of the area that a random crop covers; None: no crop.
        max_length: of a caption in tokens, [CLS] and [SEP] counted.
    """

    folder: str
    train_split: str = "train"
    validation_split: str | None = None
    crop_scale: tuple[float, float] | None = (0.5, 1.0)
    max_length: int = 77


@dataclass(frozen=True)
class LossSection:
    """What is trained for.

    Args:
        use_patch_concept_alignment: False is stage 1, IT-Align alone.
        patch_concept_loss_weight: of PC-Align beside IT-Align.
        use_concept_identity: the same concept in another caption is no negative.
    """

    use_patch_concept_alignment: bool = True
    patch_concept_loss_weight: float = 0.5
    use_concept_identity: bool = True


SECTIONS = {"model": ModelSection, "data": DataSection, "loss": LossSection, "training": RunArguments}


def main(command_line: list[str] | None = None) -> int:
    """Train as the command line says; the exit code of the run, 2 for a mistake in what was asked."""
    options = parse_command_line(command_line)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        recipe = read_recipe(options.config, options.set)
        sections = build_sections(recipe, SECTIONS, str(options.config))
        accelerator = make_accelerator(sections["training"])
        if not accelerator.is_main_process:
            logging.getLogger().setLevel(logging.ERROR)
        return run(recipe, sections, options.resume, accelerator)
    except ValueError as error:
        logger.debug("where it was found", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 2


def run(recipe: dict[str, Any], sections: dict[str, Any], resume: bool | Path, accelerator: Accelerator) -> int:
    """Load the data, build model and objective, train; the exit code."""
    data, loss, arguments = sections["data"], sections["loss"], sections["training"]

    set_seed(arguments.seed)
    model, processor = build_model_and_processor(sections["model"], loss, data)
    image_size = model.config.vision_config.image_size
    collator = FigureCollator(processor, data.max_length)
    objective = ConceptCLIPObjective(loss.patch_concept_loss_weight, loss.use_concept_identity)

    dataset = FigureDataset(
        data.folder, data.train_split, seed=arguments.seed, image_size=image_size, crop_scale=data.crop_scale
    )
    evaluate_fn = None
    if data.validation_split is not None:
        validation = FigureDataset(data.folder, data.validation_split, image_size=image_size, crop_scale=None)
        evaluate_fn = make_evaluate_fn(validation, collator, objective, arguments, accelerator)

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
    accelerator.end_training()
    if accelerator.is_main_process:
        print(f"{result.status} at step {result.step}: {result.model_path or arguments.output_dir}")
        for name, value in result.metrics.items():
            print(f"  {name} {value:.4g}")
    return result.exit_code


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe, a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value of the recipe"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        type=Path,
        metavar="CHECKPOINT",
        help="continue from the newest complete checkpoint of the output folder, or from the one given",
    )
    return parser.parse_args(command_line)


def build_model_and_processor(
    section: ModelSection, loss: LossSection, data: DataSection
) -> tuple[ConceptCLIPModel, ConceptCLIPProcessor]:
    """The model to start from and its processor, the same on every process."""
    stage = {
        "use_patch_concept_alignment": loss.use_patch_concept_alignment,
        "patch_concept_loss_weight": loss.patch_concept_loss_weight,
    }
    if section.from_pretrained is not None:
        model = load_for_stage(section.from_pretrained, stage)
        processor = ConceptCLIPProcessor.from_pretrained(section.from_pretrained)
        if section.tokenizer is not None:
            processor.tokenizer = AutoTokenizer.from_pretrained(section.tokenizer)
    else:
        tokenizer = load_or_learn_tokenizer(section, data)
        model = assemble_model(section, stage, tokenizer)
        image_size = model.config.vision_config.image_size
        image_processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
        processor = ConceptCLIPProcessor(image_processor, tokenizer)
    check_fit(model, processor.tokenizer, data.max_length)
    return model, processor


def load_for_stage(folder: str, stage: dict[str, Any]) -> ConceptCLIPModel:
    """The model of a folder, made ready for the stage; what the stage adds is fresh, and named in the log.

    Raises:
        ValueError: the folder lacks other weights, or holds some that the stage has no place for.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"model.from_pretrained={folder} is no folder of a saved model: it has no config.json.")
    model, loading = ConceptCLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **stage)
    missing = sorted(loading["missing_keys"])
    fresh = [name for name in missing if name.startswith(FRESH_IN_STAGE_2)]
    lacking = sorted(set(missing) - set(fresh))
    homeless = sorted(loading["unexpected_keys"])
    misshapen = sorted(str(key) for key in loading["mismatched_keys"])
    if lacking or homeless or misshapen or (fresh and not holds_stage_1(folder)):
        raise ValueError(
            f"the weights in {folder} do not fit: missing {lacking or fresh}, without a place {homeless}, "
            f"of another shape {misshapen}."
        )
    if fresh:
        logger.warning("not in %s, so fresh: %s", folder, ", ".join(fresh))
    return model


def holds_stage_1(folder: str) -> bool:
    """Whether the folder says that its model was trained without patch-concept alignment."""
    return not ConceptCLIPConfig.from_pretrained(folder).use_patch_concept_alignment


def load_or_learn_tokenizer(section: ModelSection, data: DataSection) -> PreTrainedTokenizerBase:
    """The tokenizer named, that of the text tower, or one learned from the captions (the same in every process)."""
    source = section.tokenizer or section.text_tower
    if source is not None:
        return AutoTokenizer.from_pretrained(source)
    logger.info("learning a tokenizer from the captions of %s", data.folder)
    captions = islice(read_captions(Path(data.folder), data.train_split), MAX_TOKENIZER_CAPTIONS)
    return train_wordpiece_tokenizer(captions, section.vocab_size, max_length=data.max_length)


def read_captions(folder: Path, split: str) -> Iterator[str]:
    """The captions of a split, one after the other, without the images."""
    for shard in find_shards(folder, split):
        for rows in pq.ParquetFile(shard).iter_batches(columns=["caption"]):
            yield from (caption for caption in rows.column(0).to_pylist() if caption)


def assemble_model(
    section: ModelSection, stage: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> ConceptCLIPModel:
    """A model from two towers, or with fresh weights from a config."""
    asked = dict(section.config or {})
    if section.vision_tower is None or section.text_tower is None:
        vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        asked["text_config"] = vocabulary | asked.get("text_config", {})
        return ConceptCLIPModel(ConceptCLIPConfig(**asked, **stage))
    model = ConceptCLIPModel.from_vision_text_pretrained(section.vision_tower, section.text_tower, **stage)
    if not asked:
        return model
    # Values that change no shape, the activation for instance, reach the layers only while they are built.
    fields = model.config.to_dict()
    for name, value in asked.items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    rebuilt = ConceptCLIPModel(ConceptCLIPConfig.from_dict(fields))
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt


def check_fit(model: ConceptCLIPModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise a ValueError where the text tower cannot take what the tokenizer gives."""
    text = model.config.text_config
    if len(tokenizer) > text.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text tower only {text.vocab_size}.")
    if max_length > text.max_position_embeddings:
        raise ValueError(
            f"data.max_length is {max_length}, but the text tower has {text.max_position_embeddings} positions."
        )


def make_evaluate_fn(
    dataset: FigureDataset,
    collator: FigureCollator,
    objective: ConceptCLIPObjective,
    arguments: RunArguments,
    accelerator: Accelerator,
) -> EvaluateFn:
    """Losses and image-text recall over the split; every process embeds its share, all rows being one gallery."""
    batches = validation_batches(len(dataset), arguments.batch_size_per_process, accelerator)

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        losses: list[dict[str, float]] = []
        embeds: list[torch.Tensor] = []
        for batch in DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=arguments.num_workers,
            worker_init_fn=ignore_stop_signals,
        ):
            batch = to_device(batch, accelerator.device)
            embeddings = objective.embed(model, batch)
            values = objective.compare(embeddings, batch)
            losses.append({name: float(value) for name, value in values.items() if name.endswith("_loss")})
            embeds.append(torch.stack([embeddings["image_embeds"], embeddings["text_embeds"]], dim=1).float())
        pairs = torch.cat(embeds)
        pairs = gather_rows(pairs, [count for (count,) in gather_counts([len(pairs)], pairs.device)])
        means = {name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]}
        return means | retrieval_recall(pairs[:, 0], pairs[:, 1]) | {"num_pairs": float(len(pairs))}

    return evaluate


def validation_batches(num_rows: int, batch_size: int, accelerator: Accelerator) -> list[list[int]]:
    """This process's batches of row indices: equally many on every process, since they are compared with each other.

    All rows are used; sizes differ by one at most and do not exceed `batch_size`.

    Raises:
        ValueError: fewer rows than processes.
    """
    num_processes, rank = accelerator.num_processes, accelerator.process_index
    if num_rows < num_processes:
        raise ValueError(f"the validation split has {num_rows} rows, which {num_processes} processes cannot share.")
    num_parts = -(-num_rows // (batch_size * num_processes)) * num_processes
    bounds = [num_rows * part // num_parts for part in range(num_parts + 1)]
    return [list(range(bounds[part], bounds[part + 1])) for part in range(rank, num_parts, num_processes)]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # reading processes are forked
    sys.exit(main())
