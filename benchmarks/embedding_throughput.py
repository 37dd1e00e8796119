"""What becomes of the time of scripts/embed.py: its tower, waiting for data, and all else, which is the driver.

Measured on the very steps of the script. The driver's own work is what keeps the tower from running while data are
ready: batches received and stacked, values rounded and gathered, shards handed to their thread. Its share, tower /
(tower + driver), is what the pipeline reaches of the bare tower once its loaders keep up; how many cores that takes
follows from the processor time of reading one picture or scan.
"""

import argparse
import importlib.util
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BertConfig, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import (
    ConceptCLIPConfig,
    ConceptCLIPModel,
    ConceptCLIPProcessor,
    FVLMConfig,
    FVLMImageProcessor,
    FVLMModel,
)
from medclip_hf.data.ct.engine import EngineSettings, prepare_scans
from medclip_hf.data.ct.geometry import GeometryContract, resample
from medclip_hf.data.ct.reading import load_ct, read_volume
from medclip_hf.data.ct.sources import ct_rate_sources
from medclip_hf.data.phantoms.torso_files import write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings
from medclip_hf.data.workers import Task
from medclip_hf.evaluation.ct_zero_shot import PUBLISHED_WINDOW_DHW, Size, cut_window, plan_windows
from medclip_hf.evaluation.embedding_run import PictureStep, RunOptions
from medclip_hf.evaluation.embedding_sources import PictureFolder
from medclip_hf.evaluation.embedding_store import EmbeddingStore
from medclip_hf.evaluation.encoders import Encoder, ImageEmbeddings, make_encoder
from medclip_hf.evaluation.scan_embedding_run import ScanStep
from medclip_hf.modeling.fvlm.anatomy_masks_fvlm import anatomy_token_mask
from medclip_hf.training.scan_datasets import stored_scan_inputs
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@dataclass
class Spent:
    """Time, by the clock and of this thread's processor.

    Args:
        seconds: by the clock.
        cpu: seconds of the thread.
    """

    seconds: float = 0.0
    cpu: float = 0.0

    def during(self, work: Callable[[], Any]) -> Any:
        """What `work` gives; its time is added."""
        start, cpu_start = time.perf_counter(), time.thread_time()
        try:
            return work()
        finally:
            self.seconds += time.perf_counter() - start
            self.cpu += time.thread_time() - cpu_start


@dataclass(frozen=True)
class Run:
    """One pass over all pictures or scans.

    Args:
        whole: of the pass.
        tower: of its forwards passes.
        data: in which it asked for the next batch.
        first: of `data`, until the first batch: loader workers start, and read it.
        workers_cpu: processor seconds of the loader workers.
    """

    whole: Spent
    tower: Spent
    data: Spent
    first: float
    workers_cpu: float


def tell(name: str, count: int, runs: list[Run], bare: list[Spent], is_elsewhere: bool = False) -> None:
    """What came of one way to run, medians over rounds.

    Args:
        name: of the way.
        count: pictures or scans.
        runs: one a round.
        bare: the bare tower in the same rounds.
        is_elsewhere: the tower waits and takes no processor time: it counts by the clock.
    """

    def median(value: Callable[[Run], float]) -> float:
        return statistics.median(value(run) for run in runs)

    by_clock = [one.seconds / run.whole.seconds for one, run in zip(bare, runs, strict=True)]
    in_main = median(lambda run: run.workers_cpu) == 0  # nobody else reads: that is no work of the driver
    reading = median(lambda run: run.data.cpu if in_main else run.workers_cpu)
    tower = median(lambda run: run.tower.seconds if is_elsewhere else run.tower.cpu)
    driver = median(lambda run: driver_cpu(run, in_main))
    waiting = median(lambda run: run.data.seconds / run.whole.seconds)
    busy = median(lambda run: run.tower.seconds / run.whole.seconds)
    print(name)
    print(
        f"  {count / median(lambda run: run.whole.seconds):.2f} a second, {statistics.median(by_clock):.1%} of the "
        f"bare tower by the clock ({min(by_clock):.1%} to {max(by_clock):.1%})"
    )
    print(
        f"  by the clock: tower {busy:.1%}, waiting for data {waiting:.1%} (first batch "
        f"{median(lambda run: run.first):.2f} s), driver {1 - busy - waiting:.1%}"
    )
    print(
        f"  ms each: reading {1e3 * reading / count:.2f}, tower {1e3 * tower / count:.2f}, driver "
        f"{1e3 * driver / count:.3f}; with data ready {tower / (tower + driver):.1%} of the bare tower, for which "
        f"reading needs {reading / (tower + driver):.2f} cores"
    )


def driver_cpu(run: Run, in_main: bool) -> float:
    """What is neither tower nor reading: also what it takes to receive what a worker read."""
    return run.whole.cpu - run.tower.cpu - (run.data.cpu if in_main else 0.0)


class PinnedLoader:
    """A loader whose workers are started on cores of their own, where there are such.

    Args:
        loader: a `DataLoader`.
        cores: for its workers; the other one is this process's.
        spent: adds up the time in which a batch is waited for.
    """

    def __init__(self, loader: Any, cores: set[int], spent: Spent) -> None:
        self.loader = loader
        self.num_workers = loader.num_workers
        self.cores = cores
        self.spent = spent

    def __iter__(self) -> Iterator[Any]:
        own = os.sched_getaffinity(0)
        if self.cores:
            os.sched_setaffinity(0, self.cores)  # children inherit it
        try:
            batches = self.spent.during(lambda: iter(self.loader))
        finally:
            os.sched_setaffinity(0, own)
        end = object()
        while (batch := self.spent.during(lambda: next(batches, end))) is not end:
            yield batch


@dataclass
class Watch:
    """What one pass spends where.

    Args:
        cores: of the loader workers; empty: wherever the system puts them.
    """

    cores: set[int]

    def __post_init__(self) -> None:
        self.tower, self.data = Spent(), Spent()
        self.first: float | None = None

    def loader(self, loader: Any) -> PinnedLoader:
        """The loader, watched."""
        return PinnedLoader(loader, self.cores, self.data)

    def towers(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forwards pass, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.first is None:
                self.first = self.data.seconds
            return self.tower.during(lambda: forward(*args, **kwargs))

        return watched

    def run(self, work: Callable[[], Any]) -> Run:
        """Do it all."""
        whole, workers = Spent(), children_cpu()
        whole.during(work)
        return Run(whole, self.tower, self.data, self.first or 0.0, children_cpu() - workers)


def children_cpu() -> float:
    """Processor seconds of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def split_cores(loaders: int) -> set[int]:
    """Keep this process on one core and give back others for so many loader workers; none where they do not suffice."""
    cores = sorted(os.sched_getaffinity(0))
    if not loaders or len(cores) <= loaders:
        return set()
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # it counts this process's core alone
    os.sched_setaffinity(0, {cores[0]})
    return set(cores[1 : loaders + 1])


# Pictures --------------------------------------------------------------------------------------------------------


class WatchedPictureStep(PictureStep):
    """The step of scripts/embed.py with a watch on its loader."""

    watch: Watch

    def _loader(self, *args: Any, **kwargs: Any) -> Any:
        return self.watch.loader(super()._loader(*args, **kwargs))


def measure_pictures(arguments: argparse.Namespace) -> None:
    """Bare tower and pipeline, by turns."""
    encoder = random_encoder(arguments.layers, arguments.image_size)
    if arguments.elsewhere_ms is not None:
        encoder = waiting_encoder(encoder, arguments.elsewhere_ms / 1e3, arguments.patches)
    runs: dict[int, list[Run]] = {workers: [] for workers in arguments.workers}
    bare = []
    cores = split_cores(max(arguments.workers)) if arguments.own_cores else set()
    with tempfile.TemporaryDirectory() as name:
        source = draw_pictures(Path(name) / "pictures", arguments.pictures, arguments.side)
        pixels = torch.stack([encoder.preprocess(source.read(0))] * arguments.batch_size)
        for number in range(arguments.rounds):
            bare.append(Spent())
            bare[-1].during(partial(run_bare, encoder, pixels, arguments.pictures))
            for workers in arguments.workers:
                watch = Watch(cores if workers else set())
                watched = replace(encoder, forward_pixels=watch.towers(encoder.forward_pixels))
                stored = "float16" if arguments.patches else "float32"
                how = RunOptions(arguments.batch_size, workers, stored, arguments.patches)
                folder = Path(name) / f"out-{number}-{workers}"
                runs[workers].append(watch.run(partial(embed_pictures, watch, watched, source, folder, how)))
    print(f"bare tower: {arguments.pictures / statistics.median(one.seconds for one in bare):.2f} pictures/s")
    for workers, found in runs.items():
        on = f", tower and loaders on cores of their own ({len(cores)})" if cores and workers else ""
        is_elsewhere = arguments.elsewhere_ms is not None
        tell(f"pipeline, {workers} loader workers{on}", arguments.pictures, found, bare, is_elsewhere)


def embed_pictures(watch: Watch, encoder: Encoder, source: PictureFolder, folder: Path, how: RunOptions) -> None:
    """All that scripts/embed.py does once model and source are there, the start of workers included."""
    store_format = "safetensors" if how.with_patches else "parquet"  # as the script has it
    store = EmbeddingStore(folder, {}, num_rows=len(source), rows_per_shard=64, store_format=store_format)
    store.open()
    step = WatchedPictureStep(encoder, source, store, how)
    step.watch = watch
    for _ in step.stream([Task(unit) for unit in range(store.num_units)]):
        pass
    if store.finish() is None:
        raise RuntimeError("a shard is missing")


def random_encoder(num_layers: int, image_size: int) -> Encoder:
    """A SigLIP tower of random weights, 384 wide."""
    torch.manual_seed(0)
    tokenizer = train_wordpiece_tokenizer(["a cyst", "a mass"] * 3, vocab_size=60)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        image_size=image_size,
        patch_size=16,
    )
    text = BertConfig(vocab_size=len(tokenizer), **small)
    config = ConceptCLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    images = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    return make_encoder(ConceptCLIPModel(config), ConceptCLIPProcessor(images, tokenizer), name="random SigLIP")


def waiting_encoder(encoder: Encoder, seconds: float, with_patches: bool) -> Encoder:
    """An encoder that waits instead of computing, as for an accelerator: what it takes does not depend on the CPU."""
    embeds = torch.nn.functional.normalize(torch.randn(1, 1152), dim=-1)
    patches = torch.nn.functional.normalize(torch.randn(1, 729, 1152), dim=-1) if with_patches else None

    def forward(pixel_values: torch.Tensor) -> ImageEmbeddings:
        time.sleep(seconds * len(pixel_values))
        count = len(pixel_values)
        return ImageEmbeddings(
            embeds.expand(count, -1), torch.ones(count), None if patches is None else patches.expand(count, -1, -1)
        )

    return replace(encoder, forward_pixels=forward)


def draw_pictures(folder: Path, count: int, side: int) -> PictureFolder:
    """JPEG files of smooth noise, about as large as photographs of their size."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)
    return PictureFolder(folder)


def run_bare(encoder: Encoder, pixels: torch.Tensor, count: int) -> None:
    """The tower alone on as many pictures."""
    for first in range(0, count, len(pixels)):
        encoder.encode_pixels(pixels[: count - first])


# Scans -----------------------------------------------------------------------------------------------------------


class WatchedScanStep(ScanStep):
    """The step of scripts/embed.py for scans with a watch on its loader."""

    watch: Watch

    def _loader(self, *args: Any, **kwargs: Any) -> Any:
        return self.watch.loader(super()._loader(*args, **kwargs))


def measure_scans(arguments: argparse.Namespace) -> None:
    """Where the time of a scan goes on its way, and the pipeline beside the bare tower on windows that lie ready."""
    model, images, window = scan_model(arguments.tiny)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = prepare_drawn_scans(folder, arguments.scans, images)
        source = load_script("embed").PreparedScans(folder / "prepared", "validation", images)
        windows = [cut for index in range(len(source)) for cut in cut_scan(source, index, model, window, parts)]
        bare_tower = partial(run_bare_scans, model, windows)
        runs: dict[int, list[Run]] = {workers: [] for workers in arguments.workers}
        bare = []
        for number in range(arguments.rounds):
            bare.append(Spent())
            bare[-1].during(bare_tower)
            for workers in arguments.workers:
                watch = Watch(set())
                step_folder = folder / f"out-{number}-{workers}"
                runs[workers].append(
                    watch.run(partial(embed_scans, watch, model, source, step_folder, workers, window))
                )
    parts["tower, all windows"] = Spent(cpu=statistics.median(one.cpu for one in bare))
    print(f"{arguments.scans} drawn scans, {len(windows)} windows; processor ms a scan:")
    for part, spent in parts.items():
        print(f"  {part:34}{1e3 * spent.cpu / arguments.scans:10.1f}")
    print(f"bare tower: {arguments.scans / statistics.median(one.seconds for one in bare):.3f} scans/s")
    for workers, found in runs.items():
        tell(f"pipeline, {workers} loader workers", arguments.scans, found, bare)


def scan_model(is_tiny: bool) -> tuple[FVLMModel, FVLMImageProcessor, Size]:
    """Random weights of the published size, or tiny; what prepares its scans, and its smallest window."""
    torch.manual_seed(0)
    if not is_tiny:
        return FVLMModel(FVLMConfig()).eval(), FVLMImageProcessor(), PUBLISHED_WINDOW_DHW
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = small | {"image_size_dhw": (28, 48, 64), "patch_size_dhw": (7, 8, 8)}
    config = FVLMConfig(vision_config=vision, text_config=small | {"vocab_size": 60}, feature_layers=(0,))
    spacing = (12.0, 6.0, 6.0)
    images = FVLMImageProcessor(size_dhw=(28, 48, 64), patch_size_dhw=(7, 8, 8), spacing_mm_dhw=spacing)
    return FVLMModel(config).eval(), images, (28, 48, 64)


def prepare_drawn_scans(folder: Path, count: int, images: FVLMImageProcessor) -> dict[str, Spent]:
    """Draw scans as NIfTI files and prepare them as scripts/prepare_ct.py does; what reading and resampling takes."""
    import monai.transforms  # noqa: F401 - takes seconds, once

    settings = TorsoSettings(max_studies=1, max_reconstructions=1)
    write_ct_rate(folder / "ct_rate", count, split="valid", settings=settings)
    sources = ct_rate_sources(folder / "ct_rate", "validation")
    contract = GeometryContract(spacing_mm_dhw=tuple(images.spacing_mm_dhw))
    parts = {"NIfTI read": Spent(), "NIfTI resampled": Spent(), "read, checked, resampled, with mask": Spent()}
    for source in sources:
        volume = parts["NIfTI read"].during(partial(read_volume, source.image_path))
        parts["NIfTI resampled"].during(partial(resample, volume, contract.spacing_mm_dhw, "trilinear"))
        whole = partial(load_ct, source.image_path, contract, labels_path=source.labels_path)
        parts["read, checked, resampled, with mask"].during(whole)
    prepare_scans(sources, folder / "prepared", "validation", EngineSettings(contract=contract), show_progress=False)
    return parts


def cut_scan(source: Any, index: int, model: Any, window: Size, parts: dict[str, Spent]) -> list[tuple[Any, Any]]:
    """The windows of a prepared scan with their masks of patches, as a loader worker makes them."""
    path = source.folder / source.rows[index].store_path
    reading = parts.setdefault("prepared scan to input", Spent())
    volume, mask = reading.during(lambda: stored_scan_inputs(path, source.image_processor))
    patch_size_dhw = tuple(model.config.vision_config.patch_size_dhw)

    def cut() -> list[tuple[Any, Any]]:
        found = []
        for planned in plan_windows(mask.numpy(), model.config.num_anatomies, "published", window):
            pixels, window_mask = cut_window(volume, mask, planned, patch_size_dhw)
            tokens = anatomy_token_mask(window_mask[None], model.config.num_anatomies, patch_size_dhw)
            found.append((pixels[None, None], tokens))
        return found

    return parts.setdefault("windows planned and cut", Spent()).during(cut)


@torch.no_grad()
def run_bare_scans(model: Any, windows: list[tuple[Any, Any]]) -> None:
    """The tower alone, a window at a time."""
    for pixels, tokens in windows:
        model(pixel_values=pixels, anatomy_token_mask=tokens, return_logits=False)


def embed_scans(watch: Watch, model: Any, source: Any, folder: Path, workers: int, window: Size) -> None:
    """All that scripts/embed.py does for prepared scans."""
    store = EmbeddingStore(folder, {}, num_rows=len(source), rows_per_shard=8, store_format="parquet")
    store.open()
    step = WatchedScanStep(model, source, store, RunOptions(4, workers), window_size_dhw=window)
    step.watch = watch
    forward = model.forward
    model.forward = watch.towers(forward)
    try:
        for _ in step.stream([Task(unit) for unit in range(store.num_units)]):
            pass
    finally:
        model.forward = forward


def load_script(name: str) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{SCRIPTS / name}.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
