"""Which rows each process reads at each step: a function of (seed, epoch, step) alone, so that resuming is exact."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_SMALLEST_BITS = 4  # a smaller Feistel domain would not mix
_ROUNDS = 8


def permuted(positions: np.ndarray, num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(num_rows) sends the positions: row indices, int64, same shape.

    The permutation is a Feistel network over the next even power of two, walked until it falls into the range (cycle
    walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Unlike a shuffled index it takes no
    memory and no time to set up, whatever the number of rows, and any place in an epoch is reached at once.

    Args:
        positions: integers in [0, num_rows).
        num_rows: of the data set.
        seed: of the run.
        epoch: every epoch has its own permutation.
    """
    half_bits = (max(_SMALLEST_BITS, int(num_rows - 1).bit_length()) + 1) // 2
    round_keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    rows = _feistel(positions.astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(rows >= num_rows)
    while outside.size:
        rows[outside] = _feistel(rows[outside], half_bits, round_keys)
        outside = outside[rows[outside] >= num_rows]
    return rows.astype(np.int64)


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, row index) for one process, from `first_step` to `max_steps`, through all epochs.

    Step `s` is batch `s % steps_per_epoch` of epoch `s // steps_per_epoch`. The global batch of a step is a run of
    positions of the epoch's permutation; process r takes the r-th part of it. The same global batch size therefore
    gives the same rows at each step for any number of processes, and no two processes share a row within an epoch.

    Args:
        num_rows: of the data set.
        batch_size: rows a process.
        seed: of the run.
        max_steps: of the run.
        first_step: where to start; nothing before it is read.
        rank: of this process.
        num_processes: of the run.

    Raises:
        ValueError: fewer rows than one global batch takes.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        max_steps: int,
        *,
        first_step: int = 0,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.max_steps = max_steps
        self.first_step = first_step
        self.rank = rank
        self.num_processes = num_processes
        self.steps_per_epoch = steps_per_epoch(num_rows, batch_size, num_processes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.max_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            start = (batch * self.num_processes + self.rank) * self.batch_size
            rows = permuted(np.arange(start, start + self.batch_size), self.num_rows, self.seed, epoch)
            yield [(epoch, row) for row in rows.tolist()]

    def __len__(self) -> int:
        return max(0, self.max_steps - self.first_step)


def steps_per_epoch(num_rows: int, batch_size: int, num_processes: int) -> int:
    """How many whole global batches the rows give.

    Raises:
        ValueError: not one.
    """
    steps = num_rows // (batch_size * num_processes)
    if steps == 0:
        raise ValueError(
            f"the training split has {num_rows} rows, but one global batch takes {batch_size * num_processes} "
            f"({batch_size} × {num_processes} processes). Lower "
            "training.batch_size_per_process, or start fewer processes."
        )
    return steps


def _feistel(values: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 4^half_bits), uint64 in and out."""
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in round_keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << shift) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the output depends on every bit of the input."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
