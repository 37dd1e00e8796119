r"""Pre-train ConceptCLIP on figures with captions and concepts, as a recipe says.

    python scripts/pretrain_conceptclip.py --config scripts/recipes/conceptclip_tiny.yaml \
        --set data.folder=figures --set training.output_dir=runs/tiny

    accelerate launch --config_file scripts/launch/cpu_processes.yaml scripts/pretrain_conceptclip.py \
        --config scripts/recipes/conceptclip_tiny.yaml --set training.batch_size_per_process=8 --resume

The data are Parquet shards as `scripts/import_medconcept.py` writes them. The trained model lies in
`<output_dir>/final`. SIGTERM or SIGINT ends the run after the step with a checkpoint, and with exit code 143 or 130;
`--resume` continues it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from medclip_hf.evaluation.retrieval import retrieval_recall
from medclip_hf.pipelines import add_pipelines
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.collators import FigureCollator
from medclip_hf.training.command_line import train_by_recipe
from medclip_hf.training.conceptclip_start import ModelSection, build_conceptclip
from medclip_hf.training.datasets import FigureDataset, read_captions
from medclip_hf.training.distributed import gather_counts, gather_rows
from medclip_hf.training.loop import EvaluateFn, TrainResult, to_device, train
from medclip_hf.training.objectives import ConceptCLIPObjective
from medclip_hf.training.signals import ignore_stop_signals


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
    return train_by_recipe(__doc__, SECTIONS, run, command_line)


def run(recipe: dict[str, Any], sections: dict[str, Any], resume: bool | Path, accelerator: Accelerator) -> TrainResult:
    """Build the model, load the data, train; how it ended."""
    data, loss, arguments = sections["data"], sections["loss"], sections["training"]

    set_seed(arguments.seed)
    stage = {
        "use_patch_concept_alignment": loss.use_patch_concept_alignment,
        "patch_concept_loss_weight": loss.patch_concept_loss_weight,
    }
    captions = read_captions(data.folder, data.train_split)
    model, processor = build_conceptclip(sections["model"], stage, captions, data.max_length)
    image_size = model.config.vision_config.image_size
    collator = FigureCollator(processor, data.max_length, raw_pixels=True)
    objective = ConceptCLIPObjective(
        loss.patch_concept_loss_weight,
        loss.use_concept_identity,
        search_dtype=torch.bfloat16 if arguments.mixed_precision == "bf16" else None,
    )

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
    if result.model_path is not None and accelerator.is_main_process:
        add_pipelines(result.model_path)
    return result


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
    sys.exit(main())
