"""Rows of all processes on every process, with gradients that find their way back to the owner.

Without a process group, or in a group of one, everything here is the identity. All functions but `num_processes` and
`process_index` are collective: every process has to call them, in the same order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def num_processes() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_counts(counts: list[int], device: torch.device) -> list[list[int]]:
    """Every process's `counts`, one list a process in their order, by one small exchange.

    Args:
        counts: as many numbers on every process, for example how many images and concepts it holds.
        device: where the process group exchanges tensors.
    """
    if num_processes() == 1:
        return [list(counts)]
    mine = torch.tensor(counts, dtype=torch.int64, device=device)
    everyones = mine.new_empty((num_processes() * len(counts),))
    dist.all_gather_single(everyones, mine)
    return everyones.view(num_processes(), len(counts)).tolist()


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes in the order of the processes, (sum(counts), ...), on every process.

    The gradient of a row is the sum of what all processes derive for it, and arrives at its owner. A process may hold
    no row. So that all take part in the backward pass, `rows.requires_grad` has to be the same everywhere.

    Args:
        rows (n, ...): this process's rows; the further axes are the same on every process.
        counts: n of every process, as `gather_counts` tells.

    Raises:
        ValueError: where `counts` does not describe `rows`.
    """
    if len(counts) != num_processes() or counts[process_index()] != len(rows):
        raise ValueError(
            f"counts {counts} should hold one number for each of {num_processes()} processes, and {len(rows)} at place "
            f"{process_index()}, the number of rows here. Get it from gather_counts."
        )
    if len(counts) == 1:
        return rows
    return _GatherRows.apply(rows, counts)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, equal on all of them and detached."""
    total = tensor.detach().clone()
    if num_processes() > 1:
        dist.all_reduce(total)
    return total


class _GatherRows(torch.autograd.Function):
    """All-gather of a ragged first axis; backwards a sum over processes that leaves each its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = _pad_rows(rows, max(counts))
        everyones = padded.new_empty((len(counts) * len(padded), *rows.shape[1:]))
        if everyones.numel() > 0:
            dist.all_gather_single(everyones, padded)
        if min(counts) == max(counts):
            return everyones
        blocks = everyones.split(max(counts))
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_everyones: Tensor) -> tuple[Tensor, None]:
        longest = max(ctx.counts)
        blocks = grad_everyones.split(ctx.counts)
        padded = torch.cat([_pad_rows(block, longest) for block in blocks])
        grad_rows = padded.new_empty((longest, *grad_everyones.shape[1:]))
        if padded.numel() > 0:
            dist.reduce_scatter_single(grad_rows, padded)
        return grad_rows[: ctx.counts[process_index()]], None


def _pad_rows(rows: Tensor, num_rows: int) -> Tensor:
    """`rows` followed by as many rows of zeros as `num_rows` asks for, contiguous."""
    missing = num_rows - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)).contiguous()
