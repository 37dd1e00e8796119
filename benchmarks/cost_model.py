"""How the cost of a step grows: measured here, described by a small model, and carried on to 48 and 512 GPUs.

    OMP_NUM_THREADS=1 python benchmarks/cost_model.py

First part: CPU seconds over batch, concepts, anatomies, volume size and rows, each with the others fixed. A straight
line through the smallest and the largest value (for the volume: operations of its tokens, as `step_models.fvlm_flops`
counts them) foretells the one between; how far off it is, is printed. The losses of 1, 2 and 4 gloo processes are
foretold in the same way, and the bytes that they exchange by the formula of the second part. That one measures nothing:
operations and bytes of a step at the published size, with the assumed machine printed beside them, give time and
traffic by the number of GPUs.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from step_models import conceptclip_batch, conceptclip_model, fvlm_batch, fvlm_flops, fvlm_model, transformer_flops
from torch import Tensor
from torch.multiprocessing import start_processes
from torch.nn import functional as F

from medclip_hf.modeling.conceptclip.loss_conceptclip import patch_concept_alignment_loss
from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel
from medclip_hf.training.gradients import backward
from medclip_hf.training.objectives import ConceptCLIPObjective, FVLMObjective
from medclip_hf.training.sampling import permuted


@dataclass(frozen=True)
class Machine:
    """What is assumed of a GPU and its network; none of it was measured.

    Args:
        flops: dense bf16 operations a second (H100 SXM).
        towers: share of them that the towers reach; the target of stage 1.
        loss: share that the search for the best patch reaches, one long matrix product with a maximum.
        nvlink: bytes a second of a GPU to the others of its node of 8.
        network: bytes a second of a GPU to other nodes (400 Gbit/s).
        overlap: share of the gradients' exchange that hides behind the backward pass.
    """

    flops: float = 989e12
    towers: float = 0.5
    loss: float = 0.4
    nvlink: float = 350e9
    network: float = 45e9
    overlap: float = 0.8


def main() -> None:
    """Measure, check, foretell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128, help="images of a GPU in the second part; published: 128")
    parser.add_argument("--concepts", type=int, default=4, help="of a caption there; the release's sample has 4.0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'grows with':22}{'values':>18}{'CPU ms':>26}{'foretold between':>20}{'off by':>9}")
    for name, values, axis, measure in curves():
        seconds = [median_seconds(measure(value), options.repeats) for value in values]
        show(name, values, axis(values), seconds)
    measured = [losses_of(processes, options.repeats) for processes in PROCESSES]
    show("processes, both losses", PROCESSES, [float(one) for one in PROCESSES], [seconds for seconds, _ in measured])
    for processes, (_, travelled) in zip(PROCESSES[1:], measured[1:], strict=True):
        told = sum(exchanged_bytes(processes, SHARE.images, rows, SHARE.width) for rows in (1, SHARE.concepts))
        print(
            f"bytes that a process of {processes} exchanges: {travelled / 1e6:.3f} MB, by the formula {told / 1e6:.3f} "
            f"({100 * (travelled / told - 1):+.1f}%)"
        )
    print()
    foretell(Machine(), options.batch, options.concepts)


Curve = tuple[str, Sequence[int], Callable[[Sequence[int]], list[float]], Callable[[int], Callable[[], object]]]


def curves() -> list[Curve]:
    """Name, three values, what the time is straight in, and the step at a value."""

    def same(values: Sequence[int]) -> list[float]:
        return [float(value) for value in values]

    return [
        ("batch, ConceptCLIP", (16, 32, 64), same, batch_step),
        ("concepts, PC-Align", (128, 256, 512), same, concept_loss),
        ("anatomies, fVLM", (2, 6, 10), same, anatomy_step),
        ("depth of a volume", (32, 64, 128), volume_operations, volume_step),
        ("rows of the data", (10**4, 10**6, 10**8), same, sampler),
    ]


def batch_step(rows: int) -> Callable[[], object]:
    """Stage 2, tiny towers."""
    model = conceptclip_model("tiny")
    batch = conceptclip_batch(model.config, rows, concepts=2)
    return lambda: backward(model, ConceptCLIPObjective(), batch, 1, Accelerator(cpu=True))


def concept_loss(concepts: int) -> Callable[[], object]:
    """PC-Align of 16 images of 196 patches, width 256."""
    torch.manual_seed(0)
    patches = F.normalize(torch.randn(16, 196, 256), dim=-1).requires_grad_()
    vectors = F.normalize(torch.randn(concepts, 256), dim=-1).requires_grad_()
    owner = torch.arange(concepts) % 16
    scale, bias = torch.tensor([10.0]), torch.tensor([-10.0])
    return lambda: patch_concept_alignment_loss(patches, vectors, owner, scale, bias).backward()


def anatomy_step(anatomies: int) -> Callable[[], object]:
    """Each anatomy brings a text a scan, a query and a head."""
    model = fvlm_model("tiny", anatomies=anatomies)
    batch = fvlm_batch(model.config, 4, tokens=(24, 24))
    return lambda: backward(model, FVLMObjective(model.config.anatomies), batch, 1, Accelerator(cpu=True))


def deep_model(depth: int) -> FVLMModel:
    """The tiny model for volumes of another depth; 64 tokens for each 16 slices."""
    config = fvlm_model("tiny").config.to_dict()
    config["vision_config"] |= {"image_size_dhw": (depth, 128, 256)}
    return FVLMModel(FVLMConfig(**{name: value for name, value in config.items() if name != "model_type"})).train()


def volume_step(depth: int) -> Callable[[], object]:
    """One step of 2 scans."""
    model = deep_model(depth)
    batch = fvlm_batch(model.config, 2, tokens=(12, 12))
    return lambda: backward(model, FVLMObjective(model.config.anatomies), batch, 1, Accelerator(cpu=True))


def volume_operations(depths: Sequence[int]) -> list[float]:
    """Of the towers: straight in the tokens but for attention, which grows with their square."""
    models = [deep_model(depth) for depth in depths]
    return [fvlm_flops(model.config, fvlm_batch(model.config, 2, tokens=(12, 12))) for model in models]


def sampler(rows: int) -> Callable[[], object]:
    """Where 256 positions of an epoch lie among the rows: no index is kept, so it should not grow."""
    positions = np.arange(256)
    return lambda: [permuted(positions, rows, 0, epoch) for epoch in range(20)]


@dataclass(frozen=True)
class Share:
    """What one process brings to the losses that several measure."""

    images: int = 32
    patches: int = 64
    concepts: int = 4
    width: int = 256


SHARE = Share()
PROCESSES = (1, 2, 4)


def losses_of(processes: int, repeats: int) -> tuple[float, float]:
    """CPU seconds of process 0 in both losses with their gradients, and the bytes that came to it and left it."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(losses_of_one, (processes, repeats, folder), nprocs=processes, start_method="fork")
        seconds, travelled = json.loads((Path(folder) / "found.json").read_text())
    return seconds, travelled


def losses_of_one(rank: int, processes: int, repeats: int, folder: str) -> None:
    """The share of one process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes)
    torch.manual_seed(rank)
    shapes = {"image": (), "text": (), "patch": (SHARE.patches,), "concept": (SHARE.concepts,)}
    embeddings = {
        f"{name}_embeds": F.normalize(torch.randn(SHARE.images, *shape, SHARE.width), dim=-1).requires_grad_()
        for name, shape in shapes.items()
    }
    for name, value in (("logit_scale", 10.0), ("logit_bias", -10.0)):
        embeddings |= {name: torch.tensor([value]), f"concept_{name}": torch.tensor([value])}
    batch = {
        "concept_token_spans": torch.tensor([1, 2]).expand(SHARE.images, SHARE.concepts, 2),
        "concept_mask": torch.ones(SHARE.images, SHARE.concepts, dtype=torch.bool),
        "concept_ids": torch.randint(1000, (SHARE.images, SHARE.concepts)),
        "input_ids": torch.ones(SHARE.images, 4, dtype=torch.int64),
    }
    with counted_bytes() as travelled:
        ConceptCLIPObjective().compare(embeddings, batch)["loss"].backward()
    seconds = median_seconds(lambda: ConceptCLIPObjective().compare(embeddings, batch)["loss"].backward(), repeats)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps([seconds, travelled[0]]))
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def counted_bytes() -> Iterator[list[float]]:
    """Adds up what the exchanges of rows and their gradients move to and from this process, labels included."""
    total, gather, scatter = [0.0], dist.all_gather_single, dist.reduce_scatter_single

    def gathered(everyones: Tensor, own: Tensor, *args: Any, **kwargs: Any) -> Any:
        total[0] += everyones.nbytes - own.nbytes
        return gather(everyones, own, *args, **kwargs)

    def scattered(own: Tensor, everyones: Tensor, *args: Any, **kwargs: Any) -> Any:
        total[0] += everyones.nbytes - own.nbytes
        return scatter(own, everyones, *args, **kwargs)

    dist.all_gather_single, dist.reduce_scatter_single = gathered, scattered
    try:
        yield total
    finally:
        dist.all_gather_single, dist.reduce_scatter_single = gather, scatter


def exchanged_bytes(processes: int, images: int, rows_of_each: int, width: int) -> float:
    """Of one kind of row: each comes in once from every other process, and its gradient leaves once, in float32."""
    return 2 * (processes - 1) * images * rows_of_each * width * 4


def median_seconds(step: Callable[[], object], repeats: int) -> float:
    """CPU seconds, after one step to warm up."""
    step()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return statistics.median(times)


def show(name: str, values: Sequence[int], axis: list[float], seconds: list[float]) -> None:
    """A line of the first table."""
    slope = (seconds[2] - seconds[0]) / (axis[2] - axis[0])
    foretold = seconds[0] + slope * (axis[1] - axis[0])
    told = " ".join(f"{1000 * one:.1f}" for one in seconds)
    shown = " ".join(f"{value:g}" for value in values)
    print(
        f"{name:22}{shown:>18}{told:>26}{1000 * foretold:>20.1f}{100 * (seconds[1] / foretold - 1):>8.0f}%", flush=True
    )


def foretell(machine: Machine, batch: int, concepts: int) -> None:
    """Time and traffic of stage 2 at the published size over the number of GPUs."""
    width, patches = 1152, 729
    image = transformer_flops(patches, width, 4304, 27) + 4 * patches * width**2
    text = transformer_flops(40, 768, 3072, 12)
    towers = 3 * batch * (image + text) / (machine.flops * machine.towers)
    parameters = 428e6 + 109e6 + 6e6  # of SO400M, BERT base and heads
    print(f"assumed: {machine}")
    print(f"stage 2, {batch} images a GPU, {concepts} concepts each; towers {1000 * towers:.0f} ms in every case")
    titles = (
        "global batch",
        "gradients GB",
        "texts GB",
        "concepts GB",
        "PC-Align ms",
        "exchange ms",
        "step ms",
        "useful",
    )
    print(f"{'GPUs':>6}" + "".join(f"{title:>14}" for title in titles))
    for gpus in (1, 8, 48, 128, 512, 1024):
        everyones = (gpus - 1) / gpus
        gradients = 2 * everyones * parameters * 4
        texts, vectors = (exchanged_bytes(gpus, batch, rows, width) for rows in (1, concepts))
        bandwidth = machine.nvlink if gpus <= 8 else machine.network
        search = 2 * batch * patches * (gpus * batch * concepts) * width / (machine.flops * machine.loss)
        # blocks travel while others are worked on: what is longer counts
        losses = max(search, (texts + vectors) / bandwidth)
        exchange = (1 - machine.overlap) * gradients / bandwidth + losses - search
        step = towers + search + exchange
        figures = (gradients / 1e9, texts / 1e9, vectors / 1e9, 1000 * search, 1000 * exchange, 1000 * step)
        print(
            f"{gpus:>6}{gpus * batch:>14}"
            + "".join(f"{figure:>14.2f}" for figure in figures[:3])
            + "".join(f"{figure:>14.0f}" for figure in figures[3:])
            + f"{100 * towers / step:>13.0f}%"
        )
    bend = towers * machine.flops * machine.loss / (2 * batch * patches * batch * concepts * width)
    print(
        f"PC-Align costs as much as the towers at {bend:.0f} GPUs, a tenth of them at {bend / 10:.0f}, 3 % at "
        f"{0.03 * bend:.0f}."
    )


if __name__ == "__main__":
    main()
