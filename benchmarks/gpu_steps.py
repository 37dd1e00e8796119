"""Speed, utilisation and memory of training steps in variants, each in a process of its own; for gpu_*.py beside it."""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import required_versions  # noqa: F401 - first of all: what follows fails on older ones
import torch
from step_models import in_own_process, peak_bytes, seconds_of

# Dense bf16 without sparsity, as the makers state it; the first name that is part of the device's counts.
PEAK_TFLOPS = {
    "MIG": None,  # a slice of a GPU
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}

Request = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A variant, ready to be measured.

    Args:
        step: a whole optimiser step.
        losses: of that step the losses alone, with the gradients of the embeddings.
        rows: of a step.
        flops: its useful floating-point operations.
    """

    step: Callable[[], torch.Tensor]
    losses: Callable[[], torch.Tensor]
    rows: int
    flops: float


class NotMeasured(Exception):
    """A variant that cannot be measured here, and why."""


def add_arguments(parser: argparse.ArgumentParser, batches: list[int]) -> None:
    """Arguments that the benchmarks share."""
    parser.add_argument("--batches", type=int, nargs="+", default=batches, help="rows of one step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=1, help="the batch is cut into so many, same gradient")
    parser.add_argument("--variants", nargs="+", help="some of them alone")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script; runs on a CPU too")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def measure(
    script: str, options: argparse.Namespace, variants: dict[str, Request], prepare: Callable[[Request], Prepared]
) -> None:
    """Print a line for each batch and variant; every figure beside that of "published" at the same batch.

    Args:
        script: this one's path, to be started again for every figure.
        options: of the command line.
        variants: what each name means, for `prepare`.
        prepare: builds a step from a variant with "batch", "tiny" and the options in it.
    """
    if options.one:
        print(json.dumps(_one(json.loads(options.one), prepare)))
        return
    if not torch.cuda.is_available() and not options.tiny:
        _stop("no GPU was found: the published size needs one. Use --tiny to try the script on a CPU.")
    if min(*options.batches, options.repeats, options.micro_batches) < 1:
        _stop("--batches, --repeats and --micro-batches are at least 1.")
    unknown = set(options.variants or ()) - variants.keys()
    if unknown:
        _stop(f"no variant {sorted(unknown)}; there are {list(variants)}.")
    print(_machine(), flush=True)
    print(
        f"{'rows':>6} {'variant':28}{'rows/s':>10}{'ratio':>8}{'MFU':>8}{'losses':>8}{'peak GiB':>10}{'ms/step':>10}"
        f"{'range':>18}"
    )
    for rows in options.batches:
        baseline = None
        for name in options.variants or variants:
            request = {"rows": rows, "tiny": options.tiny, "repeats": options.repeats}
            request |= {"micro_batches": options.micro_batches} | vars_of(options) | variants[name]
            found = in_own_process(script, request)
            if "error" in found:
                print(f"{rows:>6} {name:28}{found['error']}", flush=True)
                continue
            baseline = baseline or (found["rows_per_second"] if name == "published" else None)
            ratio = f"{found['rows_per_second'] / baseline:8.2f}" if baseline else f"{'–':>8}"
            mfu = f"{100 * found['mfu']:7.1f}%" if found["mfu"] else f"{'–':>8}"
            losses = f"{100 * found['losses']:.1f}%"
            low, high = found["range_ms"]
            spread = f"{low:.0f}-{high:.0f}"
            print(
                f"{rows:>6} {name:28}{found['rows_per_second']:>10.1f}{ratio}{mfu}{losses:>8}"
                f"{found['peak'] / 2**30:>10.2f}{found['ms']:>10.1f}{spread:>18}",
                flush=True,
            )


def _stop(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def vars_of(options: argparse.Namespace) -> Request:
    """What a script's own options say, beside those that all share."""
    shared = {"batches", "repeats", "micro_batches", "variants", "tiny", "one"}
    return {name: value for name, value in vars(options).items() if name not in shared}


def device_here() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _one(request: Request, prepare: Callable[[Request], Prepared]) -> Request:
    torch.set_float32_matmul_precision("high")
    try:
        prepared = prepare(request)
    except NotMeasured as error:
        return {"error": str(error)}
    device = device_here()
    times = seconds_of(prepared.step, request["repeats"], device)
    seconds, memory, peak = statistics.median(times), peak_bytes(device), _peak_tflops()
    losses = statistics.median(seconds_of(prepared.losses, request["repeats"], device))
    return {
        "rows_per_second": prepared.rows / seconds,
        "ms": 1000 * seconds,
        "range_ms": [1000 * min(times), 1000 * max(times)],
        "mfu": prepared.flops / seconds / 1e12 / peak if peak else None,
        "losses": losses / seconds,
        "peak": memory,
    }


def _peak_tflops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((value for known, value in PEAK_TFLOPS.items() if known in name), None)


def _machine() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU: these figures say nothing of a GPU"
    return f"{where}, torch {torch.__version__}; peak for MFU: {_peak_tflops() or 'unknown'} TFLOP/s dense bf16"
