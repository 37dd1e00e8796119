"""Memory and time of ConceptCLIP's losses by number of processes: all rows gathered, and block by block.

    python benchmarks/loss_processes.py --processes 1 2 4 8

Each of the gloo processes holds the same share of the batch, so the global batch grows with their number. "gathered" is
what releases do: every process holds the texts and concepts of all. Memory is the growth of the largest resident set of
process 0 over the step, embeddings and their own gradients included; time is of one step, first one left out. Processes
share the cores of one machine, so time shows the cost of more blocks and not how a cluster scales.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from medclip_hf.training.objectives import ConceptCLIPObjective

EVERYTHING = 2**40
WIDTH = 512
NUM_PATCHES = 4  # few, so that what grows with the processes shows beside the patches, which stay at home


def main() -> None:
    """Print one line for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=256, help="images of each process")
    parser.add_argument("--concepts", type=int, default=12, help="of each image")
    parser.add_argument("--rows-at-once", type=int, default=2048)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        start_processes(step, (options, json.loads(options.child)), nprocs=options.processes[0], start_method="fork")
        return
    print(f"{options.rows} images a process, {options.concepts} concepts each, width {WIDTH}")
    print(f"{'processes':>10}{'gathered MB':>13}{'s':>8}{f'blocks of {options.rows_at_once} MB':>22}{'s':>8}")
    for processes in options.processes:
        found = [measure(options, processes, rows) for rows in (EVERYTHING, options.rows_at_once)]
        print(
            f"{processes:>10}{found[0][0]:>13.0f}{found[0][1]:>8.2f}{found[1][0]:>22.0f}{found[1][1]:>8.2f}", flush=True
        )


def measure(options: argparse.Namespace, processes: int, rows_at_once: int) -> tuple[float, float]:
    """Megabytes and seconds of process 0, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        request = json.dumps({"folder": folder, "rows_at_once": rows_at_once})
        sizes = ["--rows", str(options.rows), "--concepts", str(options.concepts)]
        command = [sys.executable, __file__, "--processes", str(processes), *sizes, "--child", request]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        megabytes, seconds = json.loads((Path(folder) / "found.json").read_text())
    return megabytes, seconds


def step(rank: int, options: argparse.Namespace, request: dict[str, str]) -> None:
    """Two steps of one process; the second is timed."""
    folder, (processes,) = request["folder"], options.processes
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes)
    objective = ConceptCLIPObjective(rows_at_once=int(request["rows_at_once"]))
    objective.compare(*share_of_batch(2, 2))["loss"].backward()  # first calls allocate what stays
    embeddings, batch = share_of_batch(options.rows, options.concepts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    objective.compare(embeddings, batch)["loss"].backward()
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    dist.barrier()
    start = time.perf_counter()
    objective.compare(embeddings, batch)["loss"].backward()
    seconds = time.perf_counter() - start
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps([megabytes, seconds]))
    dist.destroy_process_group()


def share_of_batch(rows: int, concepts: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Embeddings of one process as leaves, and what the objective asks of its batch."""
    shapes = {
        "image_embeds": (rows, WIDTH),
        "text_embeds": (rows, WIDTH),
        "patch_embeds": (rows, NUM_PATCHES, WIDTH),
        "concept_embeds": (rows, concepts, WIDTH),
    }
    embeddings = {name: torch.nn.functional.normalize(torch.randn(shape), dim=-1) for name, shape in shapes.items()}
    for name, value in (("logit_scale", 10.0), ("logit_bias", -10.0)):
        embeddings |= {name: torch.tensor([value]), f"concept_{name}": torch.tensor([value])}
    batch = {
        "concept_token_spans": torch.tensor([1, 2]).expand(rows, concepts, 2),
        "concept_mask": torch.ones(rows, concepts, dtype=torch.bool),
        "concept_ids": torch.randint(1000, (rows, concepts)),
        "input_ids": torch.ones(rows, 4, dtype=torch.int64),
    }
    return {name: value.requires_grad_() for name, value in embeddings.items()}, batch


if __name__ == "__main__":
    main()
