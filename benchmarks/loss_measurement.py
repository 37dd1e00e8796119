"""Time and peak memory of one loss written in several ways, for the benchmarks of losses beside this file."""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

MEBIBYTE = 2**20
OURS, PLAIN, FLOOR = "medclip-hf", "plain", "floor"  # the names of the variants
Inputs = tuple[Tensor, ...]
Variants = dict[str, Callable[..., Tensor | None]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let the parser know the arguments of every benchmark of a loss but `--images`, whose default differs."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peak-of", metavar="VARIANT", help="print the peak memory of one variant in bytes, no more")


def measure(variants: Variants, make_inputs: Callable[[int], Inputs], arguments: argparse.Namespace) -> None:
    """Print time and peak memory of every variant.

    Times are of forward and backward together, of the variants in turn, round by round, after one round to warm up.
    Memory is the peak of processes of their own that run one step, less what they held before and the gradients.

    Args:
        variants: loss function by name; `medclip-hf` and `plain` are compared. One that gives None has no gradients.
        make_inputs: the arguments of them all for a number of images; those that require gradients get them.
        arguments: as `add_arguments` asks for them, and `images`.
    """
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        inputs = make_inputs(arguments.images)
        print(json.dumps(_peak_bytes(variants[arguments.peak_of], inputs, make_inputs(4))))
        return
    print(f"{_machine()}, {arguments.threads} threads, float32, median of {arguments.repeats} repeats\n")
    peaks = {name: _peak_in_own_process(name) for name in variants}
    inputs = make_inputs(arguments.images)
    seconds = _time_in_turn(variants, inputs, arguments.repeats)
    print(f"{'':12}{'seconds':>9}{'range':>16}{'peak MiB':>10}")
    for name, values in seconds.items():
        spread = f"{min(values):.3f}-{max(values):.3f}"
        print(f"{name:12}{statistics.median(values):9.3f}{spread:>16}{peaks[name] / MEBIBYTE:10.1f}")
    ratios = [plain / ours for plain, ours in zip(seconds[PLAIN], seconds[OURS], strict=True)]
    print(f"\n{OURS} against {PLAIN}: {statistics.median(ratios):.2f} times as fast (median over rounds), ", end="")
    print(f"{peaks[PLAIN] / max(peaks[OURS], 1):.1f} times less memory.")
    print(f"Largest difference of a gradient, relative to its largest entry: {_difference(variants, inputs):.1e}")


def unit_rows(*shape: int, seed: int) -> Tensor:
    """Random L2-normalised rows that want a gradient; built in place, so that the peak is what they occupy."""
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True)).requires_grad_()


def _step(loss_function: Callable[..., Tensor | None], inputs: Inputs) -> list[Tensor]:
    """The loss and its gradients, where the variant has them."""
    loss = loss_function(*inputs)
    if loss is None:
        return []
    return [loss, *torch.autograd.grad(loss, [tensor for tensor in inputs if tensor.requires_grad])]


def _time_in_turn(variants: Variants, inputs: Inputs, repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, loss_function in variants.items():
            start = time.perf_counter()
            _step(loss_function, inputs)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _difference(variants: Variants, inputs: Inputs) -> float:
    pairs = zip(_step(variants[OURS], inputs), _step(variants[PLAIN], inputs), strict=True)
    return max(((ours - plain).abs().max() / plain.abs().max()).item() for ours, plain in pairs)


def _peak_bytes(loss_function: Callable[..., Tensor | None], inputs: Inputs, small_inputs: Inputs) -> int:
    """This process's peak in one step above what it held, less the results; Linux only.

    A small step first loads what libraries keep.
    """
    _step(loss_function, small_inputs)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    results = sum(tensor.nbytes for tensor in _step(loss_function, inputs))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - results


def _peak_in_own_process(name: str) -> float:
    """Median over three fresh processes: which thread allocates what, and when, differs by some MiB."""
    command = [sys.executable, *sys.argv, "--peak-of", name]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3)]
    return statistics.median(json.loads(run.stdout) for run in runs)


def _machine() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
