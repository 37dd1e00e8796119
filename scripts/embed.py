r"""Embed millions of pictures, or CT scans by the hundred thousand, into shards that can be continued at any time.

    python scripts/embed.py --model runs/conceptclip/final --images pictures --output embeddings --num-workers 8
    accelerate launch --num_processes 8 scripts/embed.py --model runs/conceptclip/final --figures medconcept \
        --split train --patches --output embeddings --num-workers 12 --dtype bfloat16
    accelerate launch --num_processes 8 scripts/embed.py --model runs/fvlm/final --prepared prepared \
        --split validation --output embeddings --batch-size 4 --num-workers 12
    python scripts/embed.py --engine ray --num-actors 16 --model runs/conceptclip/final --images /data/pictures \
        --output /data/embeddings

Processes share the units of the source by their rank and never wait for each other; a run that is broken off, or of
which a process dies, goes on where it was when the same command is given again, with any number of processes. Pictures
and scans that cannot be used are set aside with their reason. For research only: no medical device.
"""

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from medclip_hf.data.ct.scan_index import read_scan_rows
from medclip_hf.data.parquet import SPLITS
from medclip_hf.data.stages import Tally
from medclip_hf.data.workers import Task, TaskReport
from medclip_hf.evaluation.embedding_run import STORED_TYPES, PictureStep, RunOptions
from medclip_hf.evaluation.embedding_sources import FigureShards, PictureFolder
from medclip_hf.evaluation.embedding_store import EmbeddingStore
from medclip_hf.evaluation.encoders import (
    OPEN_CLIP_PREFIX,
    Encoder,
    load_encoder,
    make_encoder,
    model_identity,
)
from medclip_hf.evaluation.quantization import quantize_linear_layers
from medclip_hf.evaluation.scan_embedding_run import ScanStep
from medclip_hf.modeling.fvlm import FVLMModel
from medclip_hf.modeling.loading import load_complete
from medclip_hf.pipelines.pipeline_ct import window_of
from medclip_hf.training.scan_datasets import stored_scan_inputs

logger = logging.getLogger("embed")

ROWS_PER_SHARD = {"pictures": 4096, "patches": 256, "scans": 256}
BATCH_SIZE = {"pictures": 64, "scans": 4}


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name; or open_clip:<architecture>/<tag>")
    parser.add_argument("--revision", help="of a model on the Hub")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of picture files, searched with its subfolders")
    source.add_argument("--figures", type=Path, help="folder of Parquet shards of figure rows")
    source.add_argument("--prepared", type=Path, help="folder of scripts/prepare_ct.py")
    parser.add_argument("--split", default="train", choices=SPLITS, help="of --figures and --prepared")
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--format", choices=("parquet", "safetensors"), help="default: parquet; safetensors with --patches"
    )
    parser.add_argument("--rows-per-shard", type=int, help=f"default: {ROWS_PER_SHARD}")
    parser.add_argument("--patches", action="store_true", help="keep the vectors of patches too (large)")
    parser.add_argument("--store-dtype", choices=sorted(STORED_TYPES), help="default: float16 with --patches")
    parser.add_argument("--batch-size", type=int, help=f"pictures, or windows of scans; default: {BATCH_SIZE}")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes of each process")
    parser.add_argument("--protocol", choices=("published", "shared"), default="published", help="of CT windows")
    parser.add_argument("--window", type=int, nargs=3, metavar=("D", "H", "W"), help="smallest CT window, voxels")
    parser.add_argument("--device", help="default: this process's accelerator if there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16", "int8"))
    parser.add_argument("--engine", default="processes", choices=("processes", "ray"))
    parser.add_argument("--num-actors", type=int, help="of Ray; default: as many as CPUs")
    parser.add_argument("--ray-address", help="of a cluster; default: one on this machine")
    parser.add_argument("--gpus-per-actor", type=float, default=0.0)
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Embed; 0 if this process did its share, 1 if nothing could be embedded, 2 for a mistake in what was asked."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    disable_progress_bar()
    options = parse_command_line(command_line)
    try:
        total = run(options)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if total is None:
        print(f"this share is done; others are not: give the same command again if one of them died. {options.output}")
        return 0
    print(total.table("scans" if options.prepared else "pictures"))
    return 0 if total.kept else 1


def run(options: argparse.Namespace) -> Tally | None:
    """Load, open, embed this process's share; what became of all rows once every share is done, else None."""
    rank, world_size = rank_of_processes()
    step = make_step(options)
    store: EmbeddingStore = step.store
    tasks = [Task(unit) for unit in range(store.num_units) if not store.is_done(unit)]
    if options.engine == "ray":
        reports = run_on_ray(options, tasks)
    else:
        if rank >= store.num_units:
            logger.warning("process %d of %d has nothing to do: %d shards", rank, world_size, store.num_units)
        # By number, not by what is left: processes that start late must share alike.
        tasks = [task for task in tasks if task.number % world_size == rank]
        reports = step.stream(tasks)
    show_progress(reports, sum(len(store.rows_of(task.number)) for task in tasks), is_shown=rank == 0)
    return store.finish()


def rank_of_processes() -> tuple[int, int]:
    """Rank and number of the processes that `accelerate launch`, `torchrun` or a cluster started.

    No process group is made: the processes have nothing to tell each other, and one that dies holds up nobody.

    Raises:
        ValueError: the environment says nonsense.
    """
    try:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise ValueError(f"RANK and WORLD_SIZE must be whole numbers: {error}") from error
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK {rank} does not fit WORLD_SIZE {world_size}.")
    return rank, world_size


def run_on_ray(options: argparse.Namespace, tasks: Sequence[Task]) -> Iterator[TaskReport]:
    """The reports of units that actors of Ray embed."""
    from medclip_hf.data.engine.ray import RayRunner

    if not tasks:
        return iter(())
    absolute = argparse.Namespace(**vars(options))
    for name in ("images", "figures", "prepared", "output"):  # an actor runs in another folder
        path = getattr(options, name)
        setattr(absolute, name, path.resolve() if path else None)
    if Path(options.model).is_dir():
        absolute.model = str(Path(options.model).resolve())
    runner = RayRunner(options.num_actors, options.ray_address, options.gpus_per_actor)
    return runner(partial(make_step, absolute), tasks)


def show_progress(reports: Iterator[TaskReport], num_rows: int, is_shown: bool) -> None:
    """Consume the reports, with a bar that counts rows."""
    with tqdm(total=num_rows, unit=" rows", disable=not (is_shown and sys.stderr.isatty())) as bar:
        for report in reports:
            bar.update(report.num_items)


def make_step(options: argparse.Namespace) -> PictureStep | ScanStep:
    """The step that embeds units of what was asked for, its store opened.

    Raises:
        ValueError: model, source or folder do not fit.
    """
    device = place_of(options)
    if options.prepared:
        return make_scan_step(options, device)
    source = PictureFolder(options.images) if options.images else FigureShards(options.figures, options.split)
    encoder = load_picture_encoder(options, device)
    kind = "patches" if options.patches else "pictures"
    how = run_options(options, BATCH_SIZE["pictures"])
    settings = {
        "source": source.identity,
        "patches": options.patches,
        "stored_type": how.stored_type,
        "device_type": device.type,  # a process without a GPU among others would leave other numbers
    }
    store = EmbeddingStore(
        options.output,
        settings | {"model": encoder.identity, "logit_scale": encoder.logit_scale, "logit_bias": encoder.logit_bias},
        num_rows=len(source),
        rows_per_shard=ROWS_PER_SHARD[kind] if options.rows_per_shard is None else options.rows_per_shard,
        # Parquet takes 15 ms of a core for the patches of a picture, longer than an accelerator for the picture.
        store_format=options.format or ("safetensors" if options.patches else "parquet"),
    )
    step = PictureStep(encoder, source, store, how)
    store.open()
    return step


def make_scan_step(options: argparse.Namespace, device: torch.device) -> ScanStep:
    """The same for scans."""
    model, processor = load_model(options, device)
    if not isinstance(model, FVLMModel):
        raise ValueError(f"--prepared holds CT scans, but {options.model} is a {type(model).__name__}, no fVLM.")
    source = PreparedScans(options.prepared, options.split, processor.image_processor)
    identity = model_identity(model, processor, model.dtype)  # before int8, which hides the weights
    if options.dtype == "int8":
        quantize_linear_layers(model)
    how = run_options(options, BATCH_SIZE["scans"])
    window = tuple(options.window) if options.window else window_of(model)
    settings = {
        "model": identity + ("-int8" if options.dtype == "int8" else ""),
        "anatomies": list(model.config.anatomies),
        "logit_scale": float(model.logit_scale.detach().exp()),
        "source": source.identity,
        "protocol": options.protocol,
        "window_size_dhw": list(window),
        "device_type": device.type,
        "stored_type": how.stored_type,
    }
    store = EmbeddingStore(
        options.output,
        settings,
        num_rows=len(source),
        rows_per_shard=ROWS_PER_SHARD["scans"] if options.rows_per_shard is None else options.rows_per_shard,
        store_format=options.format or "parquet",
    )
    step = ScanStep(model, source, store, how, protocol=options.protocol, window_size_dhw=window)
    store.open()
    return step


def run_options(options: argparse.Namespace, batch_size: int) -> RunOptions:
    """How the run goes."""
    stored_type = options.store_dtype or ("float16" if options.patches else "float32")
    return RunOptions(
        batch_size if options.batch_size is None else options.batch_size,
        options.num_workers,
        stored_type,
        options.patches,
    )


def place_of(options: argparse.Namespace) -> torch.device:
    """The device of this process: the accelerator of its number on this machine, or the CPU."""
    if options.device:
        try:
            device = torch.device(options.device)
        except RuntimeError as error:
            raise ValueError(f"--device {options.device} is no device: say cpu, cuda or cuda:1.") from error
        if options.dtype == "int8" and device.type != "cpu":
            raise ValueError("--dtype int8 runs on the CPU alone: leave --device out, or take bfloat16.")
        return device
    if options.dtype == "int8" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}. Start "
            "as many processes, or name --device."
        )
    torch.cuda.set_device(local_rank)  # pinned memory and streams would else take room on the first GPU
    return torch.device("cuda", local_rank)


def load_picture_encoder(options: argparse.Namespace, device: torch.device) -> Encoder:
    """The encoder of a 2-D model in the precision asked for."""
    if options.model.startswith(OPEN_CLIP_PREFIX):
        if options.dtype == "int8":
            raise ValueError("int8 is for models of transformers.")
        return load_encoder(options.model, device=device, dtype=options.dtype)
    model, processor = load_model(options, device)
    encoder = make_encoder(model, processor, name=Path(options.model).name, device=device, dtype=model.dtype)
    if options.dtype == "int8":
        quantize_linear_layers(model)
        encoder = replace(encoder, identity=f"{encoder.identity}-int8")
    return encoder


def load_model(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """Model, in eval mode on its device, and processor.

    Raises:
        ValueError: there is none, or weights are missing.
    """
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    names = {"auto": "bfloat16" if on_gpu else "float32", "int8": "float32"}
    dtype = getattr(torch, names.get(options.dtype, options.dtype))
    model, processor = load_complete(options.model, revision=options.revision, dtype=dtype)
    return model.to(device).eval(), processor


class PreparedScans:
    """The scans of one split of a prepared folder, as the model takes them."""

    def __init__(self, folder: Path, split: str, image_processor: Any) -> None:
        self.folder = folder
        self.image_processor = image_processor
        self.rows = read_scan_rows(folder, split)
        if not self.rows:
            raise ValueError(f"the split {split!r} in {folder} has no scans.")
        listed = repr([(row.scan_id, row.store_path, row.shape_dhw) for row in self.rows])
        self.identity = hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def row_id(self, index: int) -> str:
        """The scan's name in the index."""
        return self.rows[index].scan_id

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Volume in [0, 1] and anatomy mask."""
        return stored_scan_inputs(self.folder / self.rows[index].store_path, self.image_processor)


if __name__ == "__main__":
    sys.exit(main())
