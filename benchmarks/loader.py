"""Images/s that one core decodes, crops and collates, against what a GPU asks for at the published size.

    OMP_NUM_THREADS=1 python benchmarks/loader.py --sides 512 1024 2048 --images 24

Photographs are noise smoothed to the bytes per pixel of a real figure, JPEG of quality 90, in Parquet shards read by
`FigureDataset` as in training: random crop, resized to 384 pixels. A JPEG that is much larger than needed is decoded at
1/2, 1/4 or 1/8 of its size; "in full" has that switched off. Then the collator, with pixels scaled in the worker
(float32) or left to the device (uint8), and tokenisation alone. The appetite of a GPU follows from the operations of an
image and an assumed utilisation. Seconds are CPU seconds of one thread: other work on the machine does not count, and
workers multiply it.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, JpegImagePlugin
from step_models import transformer_flops
from transformers import BertTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf.data.parquet import write_figure_rows
from medclip_hf.data.records import ConceptMention, FigureRow
from medclip_hf.processing.conceptclip import ConceptCLIPProcessor
from medclip_hf.training.collators import FigureCollator
from medclip_hf.training.datasets import FigureDataset

SIDE = 384
CAPTION = "Axial contrast enhanced image of the chest shows a spiculated mass in the left upper lobe with effusion."


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048], help="of square figures, pixels")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU, dense bf16")
    parser.add_argument("--utilisation", type=float, default=0.5, help="assumed share of it that training reaches")
    options = parser.parse_args()
    full = {}
    for side in options.sides:
        with tempfile.TemporaryDirectory() as folder:
            size = write_figures(Path(folder), side, options.images)
            dataset = FigureDataset(folder, "train", image_size=SIDE)
            draft = images_per_second(dataset, options.repeats)
            full[side] = (draft, without_draft(lambda d=dataset: images_per_second(d, options.repeats)))
            print(
                f"{side:>5} px, {size / 1024:6.0f} KiB: {draft:7.1f} images/s a core, in full {full[side][1]:7.1f} "
                f"({draft / full[side][1]:.2f} ×)",
                flush=True,
            )
            examples = [dataset[(0, index)] for index in range(options.images)]
    collation(examples, options.repeats)
    appetite(options, {side: draft for side, (draft, _) in full.items()})


def write_figures(folder: Path, side: int, count: int) -> float:
    """Mean bytes of an encoded figure."""
    generator = np.random.default_rng(0)
    rows, sizes = [], []
    for number in range(count):
        noise = Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        noise.filter(ImageFilter.GaussianBlur(2)).save(buffer, "JPEG", quality=90)
        sizes.append(buffer.tell())
        start = CAPTION.index("mass")
        concept = ConceptMention("C0577559", "mass", start, start + 4)
        rows.append(FigureRow(str(number), CAPTION, image_bytes=buffer.getvalue(), concepts=(concept,)))
    write_figure_rows(rows, folder, "train")
    return statistics.mean(sizes)


def images_per_second(dataset: FigureDataset, repeats: int) -> float:
    """Median over repeats, each of them another epoch with other crops."""
    dataset[(0, 0)]
    rates = []
    for epoch in range(repeats):
        start = time.process_time()
        for index in range(len(dataset)):
            dataset[(epoch, index)]
        rates.append(len(dataset) / (time.process_time() - start))
    return statistics.median(rates)


def without_draft(measure: Callable[[], float]) -> float:
    """What is measured while JPEGs are decoded in full."""
    draft = JpegImagePlugin.JpegImageFile.draft
    JpegImagePlugin.JpegImageFile.draft = lambda *_: None  # type: ignore[method-assign, assignment]
    try:
        return measure()
    finally:
        JpegImagePlugin.JpegImageFile.draft = draft  # type: ignore[method-assign]


def collation(examples: list[Any], repeats: int) -> None:
    """Milliseconds and bytes an image from the collator."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *sorted(set(CAPTION.lower().rstrip(".").split()))]
    images = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = ConceptCLIPProcessor(images, BertTokenizer(vocab={word: place for place, word in enumerate(words)}))
    for name, raw in (("float32, scaled by the worker", False), ("uint8, scaled on the device", True)):
        collator = FigureCollator(processor, raw_pixels=raw)
        batch, milliseconds = timed(lambda collate=collator: collate(examples), repeats)
        megabytes = batch["pixel_values"].nbytes / len(examples) / 1e6
        print(f"collating, {name}: {milliseconds / len(examples):.2f} ms and {megabytes:.2f} MB an image")
    _, milliseconds = timed(lambda: processor.tokenizer([CAPTION] * len(examples)), repeats)
    print(f"of that tokenisation: {milliseconds / len(examples):.3f} ms an image")


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What it gives, and the median of its milliseconds."""
    found, times = call(), []
    for _ in range(repeats):
        start = time.process_time()
        found = call()
        times.append(1000 * (time.process_time() - start))
    return found, statistics.median(times)


def appetite(options: argparse.Namespace, rates: dict[int, float]) -> None:
    """Images/s that the GPU consumes in stage 1, and how many cores keep up."""
    flops = 3 * (transformer_flops(729, 1152, 4304, 27) + transformer_flops(40, 768, 3072, 12))
    wanted = options.utilisation * options.peak_tflops * 1e12 / flops
    cores = ", ".join(f"{wanted / rate:.0f} cores at {side} px" for side, rate in rates.items())
    print(
        f"a GPU of {options.peak_tflops:g} TFLOP/s used to {100 * options.utilisation:g} % (assumed) takes "
        f"{wanted:.0f} images/s in stage 1: {cores}"
    )


if __name__ == "__main__":
    main()
