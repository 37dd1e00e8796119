"""Memory and time to open a training set of a million figures: ours, that of `datasets`, and the release's list.

    python benchmarks/dataset_startup.py --rows 1000000

Each way is measured in a process of its own, at a quarter of the rows and at all of them; the line through the two
points is drawn on to MedConcept's 23.3 million. Rows are as long as the published ones (a caption of some 520
characters, four concepts); images are tiny, since no way holds images in memory. Columns, in MB:

rss, pss      what opening added: all resident pages, and with shared pages divided among those who share them
private       what opening added of memory that is no page of a file: each of a node's processes holds it anew
held          private memory of the process in all, Python and libraries included
read_rss      resident memory that 5,000 reads at random added: pages of files, which the system takes back at will
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medclip_hf.data.parquet import FigureShardWriter, shard_path, write_manifest
from medclip_hf.data.records import ConceptMention, FigureRow

ROWS_OF_MEDCONCEPT = 23_289_898  # 23,289,898 pairs after curation
ROWS_PER_SHARD = 50_000
MEMORY_FIELDS = {"rss": "Rss", "pss": "Pss", "private": "Anonymous"}
WORDS = ("axial", "contrast", "enhanced", "image", "shows", "a", "mass", "in", "the", "lung", "with", "calcification")


def main() -> None:
    """Build the two sets, measure every way on both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rounded up to shards of 50,000, at least four")
    parser.add_argument("--folder", type=Path, default=None, help="for the set, about 3 kB a row; default: temporary")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        num_shards = max(4, -(-arguments.rows // ROWS_PER_SHARD))
        sizes = [num_shards // 4, num_shards]
        for count in sizes:
            build(Path(folder) / str(count), count)
        ways = {
            "ours, first opening": open_ours,  # converts the shards
            "ours": open_ours,
            "datasets, first opening": open_with_datasets,  # converts them as well
            "datasets": open_with_datasets,
            "list of rows (release)": open_list,
        }
        results = {name: [run_alone(way, Path(folder) / str(count)) for count in sizes] for name, way in ways.items()}
    report(results)


def build(folder: Path, num_shards: int) -> None:
    """`num_shards` copies of one shard as Parquet and as JSON lines."""
    folder.mkdir()
    generator = random.Random(0)
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(buffer, "JPEG")
    first = FigureShardWriter(shard_path(folder, "train", 0))
    lines = []
    for number in range(ROWS_PER_SHARD):
        row = make_row(number, generator, buffer.getvalue())
        first.write(row)
        lines.append(json.dumps(as_published(row)))
    first.commit()
    shards = [first.path] + [shard_path(folder, "train", number) for number in range(1, num_shards)]
    for shard in shards[1:]:
        shutil.copyfile(first.path, shard)
    write_manifest(folder, "train", shards)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in shards:
            file.write("\n".join(lines) + "\n")


def make_row(number: int, generator: random.Random, image: bytes) -> FigureRow:
    """A row as long as the published ones."""
    caption = " ".join(generator.choices(WORDS, k=88))
    starts = sorted(generator.sample(range(0, 500, 20), 4))
    concepts = tuple(
        ConceptMention(f"C{generator.randrange(10**7):07d}", caption[start : start + 12], start, start + 12)
        for start in starts
    )
    return FigureRow(f"medconcept:{number}", caption, concepts, image_bytes=image, pmcid="PMC1234567", pmid="12345678")


def as_published(row: FigureRow) -> dict[str, Any]:
    """The keys that the release's loader keeps of a row."""
    spans = [[concept.start_char, concept.end_char] for concept in row.concepts]
    return {"caption": row.caption, "image": f"aa/bb/{row.pmcid}/{row.row_id}.jpg", "umls_meta_info": spans}


def run_alone(way: Callable[[Path], dict[str, float]], folder: Path) -> dict[str, float]:
    """What `way` gives back in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(way, (folder,))


def open_ours(folder: Path) -> dict[str, float]:
    """Figures of `FigureDataset`; reading decodes and crops the image."""
    from medclip_hf.training.datasets import FigureDataset

    return measure(lambda: FigureDataset(folder, image_size=32))


def open_with_datasets(folder: Path) -> dict[str, float]:
    """Figures of `Dataset.from_parquet`, the same columns; reading gives the row undecoded."""
    import datasets

    from medclip_hf.training.datasets import COLUMNS

    datasets.disable_progress_bars()
    shards = sorted(str(path) for path in folder.glob("*.parquet"))
    cache = str(folder / "datasets-cache")
    return measure(lambda: datasets.Dataset.from_parquet(shards, cache_dir=cache, columns=COLUMNS).with_format("arrow"))


def open_list(folder: Path) -> dict[str, float]:
    """Figures of reading every row into a list, as the release's loader does; reading gives the row undecoded."""
    return measure(lambda: [json.loads(line) for line in (folder / "rows.jsonl").open()])


def measure(open_rows: Callable[[], Any]) -> dict[str, float]:
    """Memory and time of opening, and of 5,000 reads at random."""
    before, started = memory_mb(), time.perf_counter()
    rows = open_rows()
    seconds, opened = time.perf_counter() - started, memory_mb()
    indices = [random.Random(number).randrange(len(rows)) for number in range(5000)]
    started = time.perf_counter()
    for index in indices:
        rows[index]
    rate = len(indices) / (time.perf_counter() - started)
    added = {name: opened[name] - before[name] for name in before}
    more = {"held": opened["private"], "read_rss": memory_mb()["rss"] - opened["rss"], "reads_per_s": rate}
    return {"rows": len(rows), "seconds": seconds} | added | more


def memory_mb() -> dict[str, float]:
    """Resident, proportional and private anonymous memory of this process (Linux)."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {name: int(fields[key].split()[0]) / 1000 for name, key in MEMORY_FIELDS.items()}


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Print the table."""
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; memory in MB\n")
    columns = list(next(iter(results.values()))[0])
    print(f"{'':<26}" + "".join(f"{column:>13}" for column in columns))
    for name, (small, large) in results.items():
        share = (ROWS_OF_MEDCONCEPT - large["rows"]) / (large["rows"] - small["rows"])
        drawn_on = {column: large[column] + share * (large[column] - small[column]) for column in columns[:-2]}
        for label, values in ((name, small), ("", large), ("  drawn on", drawn_on)):
            print(f"{label:<26}" + "".join(f"{value:>13,.1f}" for value in values.values()))


if __name__ == "__main__":
    main()
