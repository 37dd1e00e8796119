"""What a validation of a fine-tuning runs over its rows: embeddings of pairs, the loss, values of all processes."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.collators import FigureCollator, ScanCollator
from medclip_hf.training.datasets import FigureDataset
from medclip_hf.training.distributed import gather_counts, gather_rows
from medclip_hf.training.loop import to_device
from medclip_hf.training.objectives import ConceptCLIPObjective, FVLMObjective
from medclip_hf.training.scan_datasets import ScanDataset


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
