"""Rows gathered from several processes, and gradients that come back to their owner.

Run by pytest this file starts itself as the processes of gloo groups; each writes what it found.
"""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from medclip_hf.training.distributed import (
    gather_counts,
    gather_rows,
    num_processes,
    process_index,
    sum_over_processes,
)

WIDTH = 3
COUNTS = {  # rows of each process, by what the case shows
    2: {"equal": [2, 2], "ragged": [3, 1], "one without": [0, 2], "none anywhere": [0, 0]},
    4: {"equal": [1, 1, 1, 1], "ragged": [2, 0, 5, 1], "none anywhere": [0, 0, 0, 0]},
}


def rows_of(rank, count):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)


def weights_of(rank, count):
    """What process `rank` makes of the gathered rows: every process weighs them differently."""
    return torch.arange(count * WIDTH, dtype=torch.float64).view(count, WIDTH) * (rank + 1) + rank


def process_main(rank, world_size, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=180),
    )
    found = {"index": process_index(), "size": num_processes()}
    for case, counts in COUNTS[world_size].items():
        rows = rows_of(rank, counts[rank]).requires_grad_()
        everyones_counts = gather_counts([len(rows), rank], torch.device("cpu"))
        everyones = gather_rows(rows, [count for count, _ in everyones_counts])
        ids = gather_rows(torch.full((len(rows),), rank), counts)
        (everyones * weights_of(rank, sum(counts))).sum().backward()
        found[case] = {
            "counts": everyones_counts,
            "rows": everyones.tolist(),
            "ids": ids.tolist(),
            "gradient": rows.grad.tolist(),
            "sum": sum_over_processes(torch.tensor([float(rank)])).tolist(),
        }
    Path(folder, f"{world_size}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes of all groups left what they found."""
    folder = tmp_path_factory.mktemp("groups")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(folder)], env=environment, check=True, timeout=240)
    return folder


@pytest.fixture(params=COUNTS)
def found(request, folder):
    """What each process of one group found."""
    return [json.loads((folder / f"{request.param}-{rank}.json").read_text()) for rank in range(request.param)]


def test_every_process_has_the_rows_of_all_in_their_order(found):
    for case, counts in COUNTS[len(found)].items():
        expected = torch.cat([rows_of(rank, count) for rank, count in enumerate(counts)]).tolist()
        assert all(process[case]["rows"] == expected for process in found), case
        owners = [rank for rank, count in enumerate(counts) for _ in range(count)]
        assert all(process[case]["ids"] == owners for process in found), case


def test_the_gradient_of_a_row_is_the_sum_over_processes_at_its_owner(found):
    for case, counts in COUNTS[len(found)].items():
        total = sum(weights_of(rank, sum(counts)) for rank in range(len(counts)))
        for process, expected in zip(found, total.split(counts), strict=True):
            assert process[case]["gradient"] == expected.tolist(), case


def test_counts_and_sums_are_the_same_on_every_process(found):
    for case, counts in COUNTS[len(found)].items():
        pairs = [[count, rank] for rank, count in enumerate(counts)]
        assert all(process[case]["counts"] == pairs for process in found)
        assert all(process[case]["sum"] == [sum(range(len(counts)))] for process in found)
    assert [process["index"] for process in found] == list(range(len(found)))
    assert {process["size"] for process in found} == {len(found)}


def test_without_a_process_group_everything_is_the_identity():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows, [3]) is rows
    assert gather_counts([3, 5], rows.device) == [[3, 5]]
    assert torch.equal(sum_over_processes(rows), rows.detach())
    assert (num_processes(), process_index()) == (1, 0)


def test_counts_that_do_not_describe_the_rows_are_refused():
    for counts in ([2], [3, 3], []):
        with pytest.raises(ValueError, match="Get it from gather_counts"):
            gather_rows(torch.zeros(3, 2), counts)


if __name__ == "__main__":
    for size in COUNTS:  # forked, so that the package is imported once
        start_processes(process_main, (size, sys.argv[1]), nprocs=size, start_method="fork")
