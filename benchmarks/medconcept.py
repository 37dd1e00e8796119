"""The MedConcept engine measured: rates of its stages, scaling, memory, and how well it judges real figures.

    python benchmarks/medconcept.py stages
    python benchmarks/medconcept.py scaling --figures 4000 --workers 1 2 4
    python benchmarks/medconcept.py memory --captions 40000
    python benchmarks/medconcept.py concepts --captions 1000000
    python benchmarks/medconcept.py duplicates --rows 4000000
    python benchmarks/medconcept.py quality --sample ../shared/data/pmc_sample --others ../shared/data/bccd

Figures are drawn (512 × 512 JPEG, the size of the published sample) with captions of some 520 characters. `stages` and
`memory` run in one process with one thread. Times are of the processor (`process_time`) where a line says CPU.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medclip_hf.data.articles.jats import parse_article
from medclip_hf.data.engine.dedup import FINGERPRINT, DuplicateRules, find_duplicates, fingerprint, hamming
from medclip_hf.data.engine.figure_images import prepare_image
from medclip_hf.data.engine.figure_type import MAX_BLANK_SHARE, blank_share, named_modality
from medclip_hf.data.engine.language import check_caption, clean_caption
from medclip_hf.data.engine.run import build_medconcept
from medclip_hf.data.engine.settings import (
    ConceptSettings,
    EngineSettings,
    ImageRules,
    OutputSettings,
    SourceSettings,
)
from medclip_hf.data.engine.steps import concept_extractor
from medclip_hf.data.records import FigureRow
from medclip_hf.data.workers import MakeStep, ProcessRunner, Task, TaskReport

# Of the 70 figures of the published sample, by their line, judged by eye. The rule's threshold was chosen on them, so
# they flatter it; the photographs of `--others` had no part in it.
DRAWINGS = {0, 3, 6, 7, 14, 20, 29, 30, 36, 37, 40, 45, 57, 58, 59, 60, 62, 66, 67, 68, 69}
MIXED = {4, 12, 19, 25, 26, 27, 32, 41, 50, 51, 52, 63}  # pictures beside charts; not counted
TRUE_MODALITIES = {
    "computed tomography": {8, 15, 21, 31},
    "magnetic resonance": {2, 10, 19, 47, 49, 53, 55, 64},
    "histology": {5, 23, 24, 28, 44, 46, 52, 54, 56},
    "endoscopy": {11},
    "optical coherence tomography": {63},
}
SENTENCES = (
    "Axial contrast-enhanced CT of the chest shows a spiculated mass in the right upper lobe (arrow).",
    "Coronal T2-weighted MRI demonstrates hyperintense lesions without restricted diffusion.",
    "Histopathology reveals invasive ductal carcinoma with lymphovascular invasion, H&E stain, original magnification.",
    "No pleural effusion or pneumothorax was seen on the follow-up radiograph after six weeks of treatment.",
    "The patient presented with fever, dyspnea and elevated C-reactive protein; sepsis was suspected.",
    "Ultrasound of the abdomen showed cholelithiasis, thickening of the gallbladder wall and hepatomegaly.",
    "Scale bars represent 50 µm, and error bars the standard deviation of three independent experiments.",
    "Fundus photograph with drusen and retinal haemorrhages in diabetic retinopathy, left eye.",
)


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stages", "scaling", "memory", "concepts", "duplicates", "quality"))
    parser.add_argument("--figures", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--captions", type=int, default=40_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sample", type=Path, help="the published sample: metadata.jsonl and images/")
    parser.add_argument("--others", type=Path, help="photographs that look alike, any folder of JPEG files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure_child(json.loads(arguments.child))))
        return
    measurements: dict[str, Callable[[argparse.Namespace], None]] = {
        "stages": measure_stages,
        "scaling": measure_scaling,
        "memory": measure_memory,
        "concepts": measure_concepts,
        "duplicates": measure_duplicates,
        "quality": measure_quality,
    }
    measurements[arguments.what](arguments)


# --- stages ---------------------------------------------------------------------------------------------------------


def measure_stages(arguments: argparse.Namespace) -> None:
    """CPU time of every stage for one figure, one caption or one article."""
    rng = np.random.default_rng(0)
    files = [draw_jpeg(rng) for _ in range(200)]
    captions = draw_captions(2000)
    rules = ImageRules()
    images = [prepare_image(content, "a", rules)[1] for content in files]
    xml = [draw_article(number) for number in range(50)]
    extract = concept_extractor(ConceptSettings())
    extract(captions[:10])
    rows = [FigureRow("a", caption) for caption in captions]
    stages: list[tuple[str, int, Callable[[], Any]]] = [
        ("read JATS (article of 4 figures, 60 kB)", len(xml), lambda: [parse_article(text) for text in xml]),
        ("decode and check image", len(files), lambda: [prepare_image(content, "a", rules) for content in files]),
        ("picture or drawing", len(images), lambda: [blank_share(image) for image in images]),
        ("fingerprint", len(images), lambda: [fingerprint("a", b"", image) for image in images]),
        ("clean caption", len(captions), lambda: [clean_caption(caption) for caption in captions]),
        ("language and length", len(rows), lambda: [check_caption(row, 3, 10_000, "English") for row in rows]),
        ("modality", len(captions), lambda: [named_modality(caption) for caption in captions]),
        ("concepts, shipped vocabulary", len(captions), lambda: extract(captions)),
    ]
    print(f"{'stage':<45}{'CPU ms each':>12}{'per core second':>18}")
    for name, count, run in stages:
        seconds = min(cpu_seconds(run) for _ in range(3)) / count
        print(f"{name:<45}{1000 * seconds:>12.3f}{1 / seconds:>18,.0f}")


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


# --- scaling and memory ---------------------------------------------------------------------------------------------


def measure_scaling(arguments: argparse.Namespace) -> None:
    """Wall and CPU time of the whole engine for each number of workers, and whether the files are the same."""
    with tempfile.TemporaryDirectory() as folder:
        table = write_source(Path(folder), arguments.figures)
        print(f"{arguments.figures:,} figures; load of the machine before: {os.getloadavg()[0]:.1f}")
        print(
            f"{'workers':>8}{'wall s':>9}{'start s':>9}{'figures/s':>11}{'efficiency':>12}{'without start':>15}"
            f"{'CPU efficiency':>16}{'of the machine alone':>22}"
        )
        alone = machine_rate(1)
        first: tuple[float, float, float] | None = None
        for workers in arguments.workers:
            output = Path(folder) / f"out{workers}"
            runner = TimedRunner(workers, Path(folder) / "seconds")
            start = time.perf_counter()
            report = build_medconcept(engine_settings(table, output), runner)
            wall, cpu = time.perf_counter() - start, worker_seconds(runner.notes)
            running = wall - runner.start_seconds
            first = first or (wall * workers, running * workers, cpu)
            print(
                f"{workers:>8}{wall:>9.1f}{runner.start_seconds:>9.1f}{report.num_items / wall:>11.0f}"
                f"{first[0] / (wall * workers):>12.2f}{first[1] / (running * workers):>15.2f}{first[2] / cpu:>16.2f}"
                f"{machine_rate(workers) / (workers * alone):>22.2f}",
                flush=True,
            )
            shutil.rmtree(output)


def machine_rate(workers: int, seconds: float = 5.0) -> float:
    """Pictures a second that so many processes decode and fingerprint, each its own, none of them sharing anything.

    What the cores give: an engine cannot scale better than processes that know nothing of each other.
    """
    # Not by the fork server, which the engine starts with its own imports done.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(count_pictures, [0.1] * workers, chunksize=1)  # imports and first calls
        return sum(pool.map(count_pictures, [seconds] * workers, chunksize=1)) / seconds


def count_pictures(seconds: float) -> int:
    """How many times one picture is decoded and fingerprinted in that time."""
    content, count, end = draw_jpeg(np.random.default_rng(0)), 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        fingerprint("a", content, prepare_image(content, "a", ImageRules())[1])
        count += 1
    return count


class TimedStep:
    """A step that notes the processor time of each of its tasks in a file."""

    def __init__(self, make_step: MakeStep, notes: Path) -> None:
        self.step, self.notes = make_step(), notes
        notes.with_suffix(f".{os.getpid()}.ready").write_text(str(time.time()))

    def __call__(self, task: Task) -> TaskReport:
        """Do the task."""
        start = time.process_time()
        report = self.step(task)
        with self.notes.open("a") as file:
            file.write(f"{time.process_time() - start}\n")
        return report

    def set_aside(self, task: Task, reason: str) -> TaskReport:
        """Write its empty result."""
        return self.step.set_aside(task, reason)


class TimedRunner:
    """Processes whose tasks are timed.

    `start_seconds` is what passed, in all steps, until their first worker had its imports and models: the same for few
    figures and for many.
    """

    def __init__(self, num_workers: int, notes: Path) -> None:
        self.runner, self.notes, self.start_seconds = ProcessRunner(num_workers), notes, 0.0

    def __call__(self, make_step: MakeStep, tasks: Sequence[Task]) -> Iterator[TaskReport]:
        """The reports of all tasks."""
        start = time.time()
        yield from self.runner(partial(TimedStep, make_step, self.notes), tasks)
        ready = list(self.notes.parent.glob(f"{self.notes.name}.*.ready"))
        self.start_seconds += min(float(file.read_text()) for file in ready) - start
        for file in ready:
            file.unlink()


def worker_seconds(notes: Path) -> float:
    """Processor time of all tasks, and an empty file for the next run."""
    total = sum(map(float, notes.read_text().split()))
    notes.unlink()
    return total


def measure_memory(arguments: argparse.Namespace) -> None:
    """Largest memory of one process that does everything, at a quarter of the captions and at all of them."""
    for count in (arguments.captions // 4, arguments.captions):
        request = json.dumps({"captions": count})
        command = [sys.executable, __file__, "memory", "--child", request]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{count:>10,} captions: {result['seconds']:>7.1f} s, largest memory {result['megabytes']:,.0f} MB")


def measure_child(request: dict[str, Any]) -> dict[str, float]:
    """Build a set of small pictures in this process; its time and largest memory."""
    with tempfile.TemporaryDirectory() as folder:
        table = write_source(Path(folder), request["captions"], size=64)
        start = time.perf_counter()
        build_medconcept(engine_settings(table, Path(folder) / "out"))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure_concepts(arguments: argparse.Namespace) -> None:
    """Memory and rate of the concept extractor over captions of which no two are alike, and most words of each new."""
    extract = concept_extractor(ConceptSettings())
    rng = random.Random(1)
    start, done, step = time.process_time(), 0, max(1, arguments.captions // 8)
    print(f"{'captions':>10}{'CPU s':>9}{'captions/s':>12}{'largest memory MB':>19}")
    while done < arguments.captions:
        for _ in range(0, step, 250):
            extract([new_caption(rng) for _ in range(250)])
            done += 250
        seconds, megabytes = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{done:>10,}{seconds:>9.1f}{done / seconds:>12,.0f}{megabytes:>19,.0f}", flush=True)


def new_caption(rng: random.Random) -> str:
    """Some 520 characters, half of them words that no other caption has."""
    invented = ("".join(rng.choices("abcdefghilmnoprstu", k=rng.randint(4, 11))) for _ in range(30))
    return " ".join([*rng.choices(SENTENCES, k=3), *invented, "."])


def engine_settings(table: Path, output: Path) -> EngineSettings:
    """The engine on a table, in pieces so small that a few thousand figures are many tasks, as millions are."""
    source = SourceSettings("table", str(table), items_per_unit=100)
    return EngineSettings(source, OutputSettings(str(output), rows_per_shard=250))


def write_source(folder: Path, count: int, size: int = 512) -> Path:
    """A table of `count` captions with drawn pictures."""
    rng = np.random.default_rng(1)
    captions = draw_captions(2000)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / "images" / f"{number}.jpg").write_bytes(draw_jpeg(rng, size))
    table = folder / "table.jsonl"
    with table.open("w") as file:
        for number in range(count):
            line = {
                "image": f"images/{number}.jpg",
                "caption": f"{captions[number % len(captions)]} {number}",
                "pmcid": f"PMC{number}",
            }
            file.write(json.dumps(line) + "\n")
    return table


# --- duplicates -----------------------------------------------------------------------------------------------------


def measure_duplicates(arguments: argparse.Namespace) -> None:
    """Time and memory of the search over random fingerprints, one in twenty a changed copy."""
    rng = np.random.default_rng(0)
    for rows in (arguments.rows // 4, arguments.rows):
        found = np.zeros(rows, FINGERPRINT)
        for name in ("row_id", "content", "phash", "dhash"):
            found[name] = rng.integers(0, 2**64, found[name].shape, dtype=np.uint64)
        copies = rng.choice(rows, rows // 10, replace=False)
        half = len(copies) // 2
        found["phash"][copies[:half]] = found["phash"][copies[half : 2 * half]] ^ np.uint64(0b101)
        found["dhash"][copies[:half]] = found["dhash"][copies[half : 2 * half]]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start = time.process_time()
        result = find_duplicates(found, DuplicateRules())
        seconds = time.process_time() - start
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{rows:>12,} pictures: {seconds:>7.1f} CPU s, {len(result.rows):,} of {half:,} copies found, "
            f"largest memory {after:,.0f} MB ({after - before:,.0f} MB more than before)"
        )


# --- quality --------------------------------------------------------------------------------------------------------


def measure_quality(arguments: argparse.Namespace) -> None:
    """The picture test, the modality by caption and the duplicate rules on real figures."""
    if arguments.sample is None:
        sys.exit("quality needs --sample, the folder of the published sample")
    lines = [json.loads(line) for line in (arguments.sample / "metadata.jsonl").open(encoding="utf-8")]
    files = [(arguments.sample / "images" / line["image"]).read_bytes() for line in lines]
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in files]
    kept = {number for number, image in enumerate(images) if blank_share(image) <= MAX_BLANK_SHARE}
    pictures = set(range(len(lines))) - DRAWINGS - MIXED
    print(f"pictures kept {len(pictures & kept)} of {len(pictures)}; lost: {sorted(pictures - kept)}")
    print(f"drawings dropped {len(DRAWINGS - kept)} of {len(DRAWINGS)}; kept: {sorted(DRAWINGS & kept)}")
    print(f"mixed figures kept {len(MIXED & kept)} of {len(MIXED)}")
    named = {number: named_modality(line["caption"]) for number, line in enumerate(lines)}
    truth = {number: name for name, numbers in TRUE_MODALITIES.items() for number in numbers}
    right = sum(truth.get(number) == name for number, name in named.items() if name)
    print(f"modality: {right} of {sum(map(bool, named.values()))} named right, {right} of {len(truth)} found")
    report_duplicates("sample", images)
    if arguments.others:
        paths = sorted(arguments.others.rglob("*.jpg"))
        others = [Image.open(path).convert("RGB") for path in paths]
        blank = sum(blank_share(image) > MAX_BLANK_SHARE for image in others)
        print(f"others: {blank} of {len(others)} taken for drawings")
        report_duplicates("others", others)


def report_duplicates(name: str, images: list[Image.Image]) -> None:
    """Changed copies found, and different pictures taken for the same."""
    rules = DuplicateRules()
    originals = fingerprints([encode(image, 90) for image in images])
    changes: dict[str, Callable[[Image.Image], bytes]] = {
        "JPEG quality 40": lambda image: encode(image, 40),
        "half size": lambda image: encode(image.resize((image.width // 2, image.height // 2)), 90),
        "grey": lambda image: encode(image.convert("L"), 90),
        "15 % brighter": lambda image: encode(image.point(lambda value: min(255, int(1.15 * value))), 90),
        "2 % cropped off each side": lambda image: encode(crop(image, 0.02), 90),
    }
    for change, apply in changes.items():
        copies = fingerprints([apply(image) for image in images])
        found = is_near(originals, copies, rules)
        print(f"{name}: {change}: {found.sum()} of {len(images)} copies found")
    first, second = np.triu_indices(len(images), 1)
    near = is_near(originals[first], originals[second], rules).sum()
    alike = (hamming(originals["phash"][first], originals["phash"][second]) <= rules.max_phash_distance).sum()
    print(f"{name}: {near} of {len(first):,} pairs of different pictures taken for the same (by pHash alone {alike})")


def is_near(first: Any, second: Any, rules: DuplicateRules) -> Any:
    """Whether the perceptual hashes agree, pair by pair."""
    is_alike = hamming(first["phash"], second["phash"]) <= rules.max_phash_distance
    return is_alike & (hamming(first["dhash"], second["dhash"]).sum(-1) <= rules.max_dhash_distance)


def fingerprints(files: list[bytes]) -> Any:
    """Of encoded pictures."""
    return np.array([fingerprint("a", content, Image.open(io.BytesIO(content))) for content in files], FINGERPRINT)


# --- what is drawn --------------------------------------------------------------------------------------------------


def draw_jpeg(rng: np.random.Generator, size: int = 512) -> bytes:
    """A picture of smooth shapes and noise."""
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.int16)
    noisy = image + rng.integers(-12, 13, (size, size, 1), dtype=np.int16)
    return encode(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), 85)


def draw_captions(count: int) -> list[str]:
    """Captions of about 520 characters, as the published ones."""
    rng = random.Random(0)
    return [" ".join(rng.choices(SENTENCES, k=5)) for _ in range(count)]


def draw_article(number: int) -> bytes:
    """A JATS article of four figures and some 60 kB of text."""
    captions = draw_captions(8)
    paragraphs = "".join(
        f"<p>{' '.join(captions)} <xref ref-type='fig' rid='F1'>Figure 1</xref></p>" for _ in range(12)
    )
    figures = "".join(
        f"<fig id='F{figure}'><label>Figure {figure}</label><caption><p>{captions[figure].replace('&', '&amp;')}</p>"
        f"</caption><graphic xmlns:xlink='http://www.w3.org/1999/xlink' xlink:href='g{figure}'/></fig>"
        for figure in range(1, 5)
    )
    return (
        f"<article><front><article-meta><article-id pub-id-type='pmcid'>PMC{number}</article-id></article-meta></front>"
        f"<body><sec><title>Results</title>{paragraphs.replace('&', '&amp;')}{figures}</sec></body></article>"
    ).encode()


def encode(image: Image.Image, quality: int) -> bytes:
    """As JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def crop(image: Image.Image, share: float) -> Image.Image:
    """Without a share of each side."""
    dx, dy = int(share * image.width), int(share * image.height)
    return image.crop((dx, dy, image.width - dx, image.height - dy))


if __name__ == "__main__":
    main()
