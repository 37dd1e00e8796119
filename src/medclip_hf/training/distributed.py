"""Rows of all processes on every process, at once or block by block; their gradients find their way to the owner.

Without a process group, or in a group of one, everything here is the identity. All functions but `num_processes` and
`process_index` are collective: every process has to call them, in the same order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS_AT_ONCE = 8192  # of all processes together: 36 MB of float32 at the published width of 1152


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
    _check_counts(counts, rows)
    if len(counts) == 1:
        return rows
    return _GatherRows.apply(rows, counts)


@dataclass(frozen=True)
class Block:
    """Some rows of every process.

    Args:
        rows (n, ...): in the order of the processes.
        labels (n, ...): what goes with them and has no gradient.
        own_rows: which of this process's rows are among them.
        first_own: where those begin in `rows`.
    """

    rows: Tensor
    labels: Tensor
    own_rows: slice
    first_own: int


def sum_over_blocks(
    share_of_block: Callable[..., Tensor],
    rows: Tensor,
    labels: Tensor,
    counts: list[int],
    *local: Tensor,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Tensor:
    """The sum of `share_of_block(block, *local)` over blocks that together hold the rows of all processes, a scalar.

    A block is gathered, used and forgotten with all that the share needed for its gradient, so memory does not grow
    with the number of processes. Gradients are taken in the forward pass, as each block goes by, and those of `rows`
    are summed over processes at once and arrive at their owner; the backward pass only scales them. So that this is
    right, the factor that comes from behind has to be the same on all processes, as it is where each is to minimise
    the sum of the shares. A second derivative does not exist.

    Args:
        share_of_block: a pure function; what it gives for several blocks adds up to what it would give for them all.
        rows (n, ...): this process's, as in `gather_rows`.
        labels (n, ...): of the rows, without gradient.
        counts: n of every process, as `gather_counts` tells.
        local: what else the share depends on and wants gradients for; stays on this process.
        rows_at_once: of all processes together in one block.

    Raises:
        ValueError: where `counts` does not describe `rows`.
    """
    _check_counts(counts, rows)
    if len(counts) == 1:
        return share_of_block(Block(rows, labels, slice(0, len(rows)), 0), *local)
    wants_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows, *local))
    return _SumOverBlocks.apply(share_of_block, counts, rows_at_once, wants_gradients, labels, rows, *local)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, equal on all of them and detached."""
    total = tensor.detach().clone()
    if num_processes() > 1:
        dist.all_reduce(total)
    return total


def in_float32(embeds: Tensor) -> Tensor:
    """In float32 at least: gradients are added up over processes in that precision."""
    return embeds.to(torch.promote_types(embeds.dtype, torch.float32))


class _GatherRows(torch.autograd.Function):
    """All-gather of a ragged first axis; backwards a sum over processes that leaves each its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _Gathering(rows, counts).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_everyones: Tensor) -> tuple[Tensor, None]:
        return _sum_at_owners(grad_everyones, ctx.counts), None


class _SumOverBlocks(torch.autograd.Function):
    """Value and gradients block by block; the next block travels while this one is worked on."""

    @staticmethod
    def forward(
        ctx: Any,
        share_of_block: Callable[..., Tensor],
        counts: list[int],
        rows_at_once: int,
        wants_gradients: bool,
        labels: Tensor,
        rows: Tensor,
        *local: Tensor,
    ) -> Tensor:
        total = rows.new_zeros(())
        leaves = [tensor.detach().requires_grad_(wants_gradients) for tensor in local]
        slopes: list[Tensor | None] = [None] * len(leaves)
        row_slopes = [torch.zeros_like(rows[:0])]  # a piece from every block
        for block, block_counts in _blocks(rows, labels, counts, rows_at_once):
            block.rows.requires_grad_(wants_gradients)
            with torch.set_grad_enabled(wants_gradients):
                share = share_of_block(block, *leaves)
            total += share.detach()
            if wants_gradients:
                of_rows, *of_leaves = torch.autograd.grad(share, [block.rows, *leaves], materialize_grads=True)
                row_slopes.append(_sum_at_owners(of_rows, block_counts))
                slopes = [_add(slope, piece) for slope, piece in zip(slopes, of_leaves, strict=True)]
                del of_rows, of_leaves
        if wants_gradients:
            known = (torch.zeros_like(t) if slope is None else slope for t, slope in zip(leaves, slopes, strict=True))
            ctx.save_for_backward(torch.cat(row_slopes), *known)
            ctx.dtypes = [rows.dtype, *(leaf.dtype for leaf in leaves)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        slopes = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, None, None, None, *((grad_total * slope).to(dtype) for slope, dtype in slopes)


def _add(slope: Tensor | None, piece: Tensor) -> Tensor:
    """Their sum, in float32 at least once there is something to add up."""
    return piece if slope is None else slope.to(torch.promote_types(slope.dtype, torch.float32)).add_(piece)


def _blocks(rows: Tensor, labels: Tensor, counts: list[int], rows_at_once: int) -> Iterator[tuple[Block, list[int]]]:
    """Blocks of equally many rows of every process, as far as it has them, and how many each gave."""
    rank, share = process_index(), max(rows_at_once // len(counts), 1)

    def gathering(start: int) -> tuple[_Gathering, _Gathering, list[int]]:
        given = [min(max(count - start, 0), share) for count in counts]
        own = slice(start, start + share)
        return _Gathering(rows.detach()[own], given), _Gathering(labels[own], given), given

    starts = range(0, max(counts), share)
    upcoming = gathering(0) if starts else None
    for start in starts:
        assert upcoming is not None
        some_rows, some_labels, given = upcoming
        block = Block(
            some_rows.wait(), some_labels.wait(), slice(start, start + given[rank]), first_own=sum(given[:rank])
        )
        upcoming = gathering(start + share) if start + share < max(counts) else None
        yield block, given


class _Gathering:
    """Rows of all processes on their way: asked for now, had from `wait`."""

    def __init__(self, rows: Tensor, counts: list[int]) -> None:
        self.counts = counts
        self.padded = _pad_rows(rows, max(counts))
        self.everyones = self.padded.new_empty((len(counts) * len(self.padded), *rows.shape[1:]))
        self.work = None
        if self.everyones.numel() > 0:
            self.work = dist.all_gather_single(self.everyones, self.padded, async_op=True)

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        if min(self.counts) == max(self.counts):
            return self.everyones
        blocks = self.everyones.split(max(self.counts))
        return torch.cat([block[:count] for block, count in zip(blocks, self.counts, strict=True)])


def _sum_at_owners(grad_everyones: Tensor, counts: list[int]) -> Tensor:
    """This process's rows of the sum over processes."""
    longest = max(counts)
    padded = torch.cat([_pad_rows(block, longest) for block in grad_everyones.split(counts)])
    grad_rows = padded.new_empty((longest, *grad_everyones.shape[1:]))
    if padded.numel() > 0:
        dist.reduce_scatter_single(grad_rows, padded)
    return grad_rows[: counts[process_index()]]


def _check_counts(counts: list[int], rows: Tensor) -> None:
    if len(counts) != num_processes() or counts[process_index()] != len(rows):
        raise ValueError(
            f"counts {counts} should hold one number for each of {num_processes()} processes, and {len(rows)} at place "
            f"{process_index()}, the number of rows here. Get it from gather_counts."
        )


def _pad_rows(rows: Tensor, num_rows: int) -> Tensor:
    """`rows` followed by as many rows of zeros as `num_rows` asks for, contiguous."""
    missing = num_rows - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)).contiguous()
