"""Peak memory and time of one step over the batch: in one pass, and micro-batch by micro-batch with the same gradient.

    OMP_NUM_THREADS=1 python benchmarks/gradient_caching.py --batches 32 64 128 256 --micro-batch 16

ConceptCLIP, stage 2, tiny towers on a CPU; the patches of a micro-batch go by and are not kept. Memory is the growth of
the largest resident set over the step, in a process of its own, after a step of 4 rows has loaded what libraries keep;
the gradients of both ways are compared in the same process, dropout off. Time is CPU seconds of one thread, the second
forward pass included.
"""

import argparse
import json
import resource
import time
from typing import Any

import torch
from accelerate import Accelerator
from step_models import conceptclip_batch, conceptclip_model, in_own_process

from medclip_hf.training.gradients import backward
from medclip_hf.training.objectives import ConceptCLIPObjective


def main() -> None:
    """Print a line for each batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--size", choices=("small", "tiny"), default="small")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    print(f"micro-batches of {options.micro_batch}, {options.size} towers")
    print(f"{'batch':>6}{'one pass MiB':>14}{'s':>8}{'cached MiB':>13}{'s':>8}{'gradients differ by':>22}")
    for rows in options.batches:
        request = {"rows": rows, "size": options.size}
        whole = in_own_process(__file__, request | {"micro_batches": 1})
        cached = in_own_process(__file__, request | {"micro_batches": -(-rows // options.micro_batch), "compare": True})
        for found in (whole, cached):
            if "error" in found:
                raise SystemExit(f"a step of {rows} rows failed: {found['error']}")
        print(
            f"{rows:>6}{whole['mebibytes']:>14.0f}{whole['seconds']:>8.2f}"
            f"{cached['mebibytes']:>13.0f}{cached['seconds']:>8.2f}{cached['difference']:>22.1e}",
            flush=True,
        )


def measure(rows: int, size: str, micro_batches: int, compare: bool = False) -> dict[str, float]:
    """Growth of memory and seconds of one step, and how far its gradients are from those in one pass."""
    torch.set_num_threads(1)
    model, objective = conceptclip_model(size, dropout=0.0), ConceptCLIPObjective()
    accelerator = Accelerator(cpu=True)
    backward(model, objective, conceptclip_batch(model.config, 4), min(micro_batches, 2), accelerator)
    model.zero_grad(set_to_none=False)  # gradients stay allocated: they are no part of what differs
    batch = conceptclip_batch(model.config, rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    backward(model, objective, batch, micro_batches, accelerator)
    seconds = time.process_time() - start
    mebibytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    found = {"mebibytes": mebibytes, "seconds": seconds}
    return found | ({"difference": difference(model, objective, batch, accelerator)} if compare else {})


def difference(model: Any, objective: Any, batch: Any, accelerator: Accelerator) -> float:
    """Largest difference of a gradient to that in one pass, relative to the largest entry of all gradients."""
    cached = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    backward(model, objective, batch, 1, accelerator)
    whole = dict(model.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in whole.values())
    return max(float((whole[name].grad - gradient).abs().max()) for name, gradient in cached.items()) / largest


if __name__ == "__main__":
    main()
