"""Where the time and memory of both training steps go, how often they stop the device, and what each measure brings.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --size small --repeats 5

Four tables. (1) Seconds by part of a step: towers forwards, losses with their gradients, backward through the towers,
clipping, update. (2) Operations that make the host wait for the device, counted as they are called in one step: on a
GPU each is a stop. (3) One measure at a time against the step without it, in turn, medians, with how far the loss of
the first step differs. (4) Memory that the graph keeps, by the share of blocks that recompute. Sizes are small ones for
a CPU: ratios of parts differ at the published size (`gpu_conceptclip.py`, `gpu_fvlm.py`), counts and numbers do not.
Times are CPU seconds of one thread, so that other work on the machine counts less.
"""

import argparse
import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from step_models import (
    Batch,
    conceptclip_batch,
    conceptclip_model,
    fvlm_batch,
    fvlm_model,
    make_step,
    padded,
)
from torch.utils._python_dispatch import TorchDispatchMode

from medclip_hf.training.acceleration import compile_blocks, recompute_blocks
from medclip_hf.training.gradients import backward
from medclip_hf.training.objectives import ConceptCLIPObjective, FVLMObjective

CPU = torch.device("cpu")
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Stops(TorchDispatchMode):
    """Counts the operations that need a value of the device before the host can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(getattr(index, "dtype", None) == torch.bool for index in indices):
            self.found["index by a mask"] += 1
        elif any(name.startswith(one) for one in SYNCHRONISING):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Print the four tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "tiny"), default="small")
    parser.add_argument("--rows", type=int, default=16, help="images of a step; scans are a quarter of it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks too; needs a C++ compiler")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = build(options.size, options.rows)
    for name, (model, objective, batch) in cases.items():
        print(f"\n{name}, {options.size}, {len(batch['row_ids'])} rows, {len(batch['input_ids'])} texts")
        print_parts(model, objective, batch, options.repeats)
        print_stops(model, objective, batch)
        print_measures(model, objective, batch, options)
        print_memory(model, objective, batch)


def build(size: str, rows: int) -> dict[str, tuple[Any, Any, Batch]]:
    """Model without dropout (numbers are compared), objective and batch of both."""
    clip, ct = conceptclip_model(size, dropout=0.0), fvlm_model(size, dropout=0.0)
    return {
        "ConceptCLIP stage 2": (clip, ConceptCLIPObjective(), conceptclip_batch(clip.config, rows)),
        "fVLM": (ct, FVLMObjective(ct.config.anatomies), fvlm_batch(ct.config, max(rows // 4, 2))),
    }


def print_parts(model: Any, objective: Any, batch: Batch, repeats: int) -> None:
    """Seconds by part, medians."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    times: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        clock = time.process_time()

        def lap(part: str, is_counted: bool = repeat > 0) -> None:
            nonlocal clock
            now = time.process_time()
            if is_counted:
                times.setdefault(part, []).append(now - clock)
            clock = now

        embeddings = objective.embed(model, batch)
        lap("towers forwards")
        leaves = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in embeddings.items()}
        objective.compare(leaves, batch)["loss"].backward()
        lap("losses, both ways")
        learning = [name for name, value in embeddings.items() if value.requires_grad]
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]
        by_name = dict(zip(leaves, gradients, strict=True))
        torch.autograd.backward([embeddings[name] for name in learning], [by_name[name] for name in learning])
        lap("towers backwards")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lap("clipping")
        optimizer.step()
        optimizer.zero_grad()
        lap("update")
    medians = {part: statistics.median(values) for part, values in times.items()}
    total = sum(medians.values())
    for part, seconds in medians.items():
        print(f"  {part:20}{1000 * seconds:9.1f} ms{100 * seconds / total:7.1f} %")


def print_stops(model: Any, objective: Any, batch: Batch) -> None:
    """How often one step asks the device for a value, by part; the loop itself asks once more for what it logs."""
    accelerator = Accelerator(cpu=True)
    with Stops() as forwards:
        embeddings = objective.embed(model, batch)
    with Stops() as losses:
        loss = objective.compare(embeddings, batch)["loss"]
    with Stops() as behind:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    model.zero_grad()
    for part, stops in (("towers", forwards), ("losses", losses), ("backwards, clipping", behind)):
        print(f"  stops in {part}: {sum(stops.found.values())} {dict(stops.found) or ''}")
    with Stops() as cached:
        backward(model, objective, batch, 4, accelerator)
    model.zero_grad()
    print(f"  stops in a step of 4 micro-batches: {sum(cached.found.values())}")


def print_measures(model: Any, objective: Any, batch: Batch, options: argparse.Namespace) -> None:
    """Steps with and without each measure, in turn."""
    limit = 77 if "concept_mask" in batch else 384
    steps = {
        "the step": step_of(model, objective, batch),
        f"texts padded to {limit}": step_of(model, objective, padded(batch, limit)),
        "AdamW not fused": step_of(model, objective, batch, fused=False),
        "half of the blocks recomputed": step_of(model, objective, batch, lambda one: recompute_blocks(one, 0.5)),
        "all blocks recomputed": step_of(model, objective, batch, recompute_blocks),
        "channels last": step_of(model, objective, batch, channels_last),
        "bf16 autocast": step_of(model, objective, batch, bf16=True),
        "4 micro-batches, by length": step_of(model, objective, batch, micro_batches=4),
        "4 micro-batches, all padded alike": step_of(model, objective, without(batch, "text_lengths"), micro_batches=4),
    }
    if options.compile:
        steps["compiled blocks"] = step_of(model, objective, batch, compile_blocks)
    losses = {name: [float(step()) for _ in range(2)] for name, step in steps.items()}  # warms up as well
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    plain = times["the step"]
    print(f"  {'':36}{'ms':>9}{'× the step':>12}{'loss differs by':>18}")
    for name, values in times.items():
        ratio = statistics.median(one / other for one, other in zip(values, plain, strict=True))
        differs = abs(losses[name][0] - losses["the step"][0]) / abs(losses["the step"][0])
        print(f"  {name:36}{1000 * statistics.median(values):9.1f}{ratio:12.2f}{differs:18.1e}")


def step_of(
    model: Any, objective: Any, batch: Batch, change: Callable[[Any], Any] | None = None, **options: Any
) -> Callable[[], torch.Tensor]:
    """A step of a copy of the model."""
    own = copy.deepcopy(model)
    if change is not None:
        change(own)
    return make_step(own, objective, batch, device=CPU, **options)


def channels_last(model: Any) -> None:
    """The memory format of kernels of two dimensions; volumes are cut into patches by a matrix product without one."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def without(batch: Mapping[str, Any], name: str) -> Batch:
    """The batch but for one entry."""
    return {key: value for key, value in batch.items() if key != name}


def print_memory(model: Any, objective: Any, batch: Batch) -> None:
    """Bytes of activations that wait for the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []
    for keep in (1.0, 0.75, 0.5, 0.25, 0.0):
        own = model
        recompute_blocks(own, keep)
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            embeddings = objective.embed(own, batch)
        kept.append((keep, sum(sizes.values())))
        del embeddings
    most = kept[0][1]
    shares = ", ".join(f"keep {keep:g}: {size / 2**20:.0f} MiB ({100 * size / most:.0f} %)" for keep, size in kept)
    print(f"  activations kept: {shares}")
    recompute_blocks(model, 1.0)


if __name__ == "__main__":
    main()
