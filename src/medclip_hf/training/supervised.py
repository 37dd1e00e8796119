"""What the objectives of heads share: rows apart, a mean over all samples of all processes, pictures from files.

A head's loss is a sum over its samples, unlike a contrastive one, so an objective only has to weigh them right: each
sample counts the same whatever micro-batch or process it lies in.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from medclip_hf.data.images import UnreadableImage, decode_image, open_image, path_inside, read_file
from medclip_hf.data.stages import Drop
from medclip_hf.processing.conceptclip.processing_conceptclip import to_rgb
from medclip_hf.training.distributed import num_processes, sum_over_processes

Batch = Mapping[str, Any]


def split_rows(batch: Batch, num_chunks: int) -> list[Batch]:
    """At most `num_chunks` micro-batches of nearly equal size; `set_aside`, which belongs to no row, stays behind."""
    if num_chunks < 1:
        raise ValueError(f"num_chunks should be at least 1, got {num_chunks}.")
    num_rows = len(batch["row_ids"])
    num_chunks = min(num_chunks, max(num_rows, 1))
    bounds = [num_rows * chunk // num_chunks for chunk in range(num_chunks + 1)]
    by_row = {name: values for name, values in batch.items() if name != "set_aside"}
    return [{name: values[start:stop] for name, values in by_row.items()} for start, stop in pairwise(bounds)]


def model_inputs(batch: Batch, names: Sequence[str]) -> tuple[dict[str, Tensor], int]:
    """The inputs of the model and how many of their rows count: a batch without rows gets one of zeros, counted as 0.

    Every process has to run the model, as DistributedDataParallel waits for its gradients. All that is called a mask is
    1 in that row: attention to nothing would be NaN.
    """
    inputs = {name: batch[name] for name in names if name in batch}
    num_rows = len(batch["row_ids"])
    if num_rows == 0:
        inputs = {
            name: values.new_full((1, *values.shape[1:]), name.endswith("mask")) for name, values in inputs.items()
        }
    return inputs, num_rows


def mean_over_all(sums: Tensor, counts: Tensor, **logged: Tensor) -> dict[str, Tensor]:
    """`loss` to call backward on, whose mean gradient over processes is the global one, and means to log.

    Args:
        sums: (B,), loss of each row, summed over what it counts.
        counts: (B,), how much each row counts: 1, a number of tokens, or 0.
        logged: further sums (B,) whose global mean over the counts is logged under their names.
    """
    share = sums.sum()
    totals = sum_over_processes(
        torch.stack([counts.sum().float(), share.float(), *(x.sum().float() for x in logged.values())])
    )
    count = totals[0].clamp(min=1)
    means = dict(zip(("total_loss", *logged), totals[1:] / count, strict=True))
    return {"loss": share / count * num_processes(), **means, "num_counted": totals[0]}


def read_picture(folder: Path, relative: str) -> Image.Image:
    """The picture of a file below `folder` as 8-bit RGB.

    Raises:
        UnreadableImage: with the reason.
    """
    image = decode_image(open_image(read_file(path_inside(folder, relative)), relative), relative)
    try:
        return to_rgb(image)
    except ValueError as error:  # decoded, but with values that have no meaning as RGB
        raise UnreadableImage("image cannot become RGB", f"{relative}: {error}") from error


def name_set_aside(examples: Sequence[Any]) -> list[dict[str, str]]:
    """What the run record keeps of the examples that could not be read."""
    drops = [example for example in examples if isinstance(example, Drop)]
    return [{"row_id": drop.row_id, "reason": drop.reason, "detail": drop.detail} for drop in drops]
