"""Captions per second of concept extraction, and its agreement with published concepts on real captions.

    OMP_NUM_THREADS=1 python benchmarks/concept_linking.py --sample ../shared/data/pmc_sample --names 1000000

One process, one thread. Speed: the captions of the sample, each followed by a number so that no caption repeats, with
the shipped vocabulary and with a synthetic one whose names are two to four made-up words; there each caption gets four
of its names, two of them misspelled. Memory: resident megabytes
after a quarter of the captions and after all. Agreement: published mentions, their offsets repaired (`data.offsets`),
against ours; "covered" are those whose words are a name of the vocabulary. Published concepts were thinned out by a
filter that is not public, so precision against them is a lower bound.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from medclip_hf.data.concepts.extraction import ConceptExtractor, ExtractorOptions
from medclip_hf.data.concepts.index import Concept, ConceptIndex
from medclip_hf.data.offsets import DecodedCaption
from medclip_hf.data.stages import Drop

STEMS = (
    "cardi neph hepat oste neur derm gastr pulmon angi arthr cephal crani cyst cyt encephal enter erythr gli hem hist "
    "lip lymph mast melan men my nas ocul onc ophthalm ot path ped phleb pleur pneum proct psych py ren retin rhin "
    "scler splen spondyl stomat thorac thyr trache ur vas ven"
)
ENDINGS = "itis osis oma al ic ectomy graphy pathy emia ation ous ary ine ism ia"
CAPTIONS_AT_ONCE = 256  # as the engine asks


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=Path, required=True, help="folder with the metadata.jsonl of real figures")
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--names", type=int, default=0, help="of the synthetic vocabulary; 0 leaves it out")
    arguments = parser.parse_args()
    lines = (arguments.sample / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    captions = [rows[n % len(rows)]["caption"] + f" Case {n}." for n in range(arguments.captions)]
    shipped = ConceptExtractor.from_vocabulary("shipped")
    print(f"shipped vocabulary: {len(shipped.index.ids)} concepts, {len(shipped.index.names)} names")
    report_agreement(shipped, rows)
    exact = ConceptExtractor(shipped.index, ExtractorOptions(similar_spelling=False))
    report_agreement(exact, rows)
    report_speed("shipped", shipped, captions)
    report_speed("shipped, exact names", exact, captions)
    if arguments.names:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            ConceptIndex.build(synthetic_vocabulary(arguments.names)).save(Path(folder))
            seconds = time.process_time() - start
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            print(
                f"synthetic: {arguments.names:,} names made and indexed in {seconds:.0f} s of processor time, "
                f"{size / 2**20:.0f} MiB on disk"
            )
            start = time.perf_counter()
            index = ConceptIndex.load(Path(folder))
            print(f"synthetic: loaded in {time.perf_counter() - start:.2f} s")
            captions = [add_names(caption, index, number) for number, caption in enumerate(captions)]
            exact = ConceptExtractor(index, ExtractorOptions(similar_spelling=False))
            report_speed("synthetic, exact names", exact, captions)
            report_speed("synthetic", ConceptExtractor(index), captions)


def synthetic_vocabulary(num_names: int) -> Iterator[Concept]:
    """Concepts of two names each, of made-up words that look medical."""
    rng = np.random.default_rng(0)
    stems, endings = STEMS.split(), ENDINGS.split()
    for number in range(num_names // 2):
        names = []
        for length in rng.integers(2, 5, size=2):
            parts = rng.integers(len(stems), size=(length, 2)).tolist()
            last = rng.integers(len(endings), size=length).tolist()
            names.append(" ".join(f"{stems[a]}o{stems[b]}{endings[c]}" for (a, b), c in zip(parts, last, strict=True)))
        yield Concept(f"S{number:07d}", names[0], (names[1],), ("T047",))


def add_names(caption: str, index: ConceptIndex, number: int) -> str:
    """A caption with four names of the vocabulary in it, two of them without their fifth letter."""
    rng = np.random.default_rng(number)
    names = [index.names[int(place)] for place in rng.integers(len(index.names), size=4)]
    return f"{caption} Then {names[0]}, {names[1]}, {names[2][:4]}{names[2][5:]} and {names[3][:4]}{names[3][5:]}."


def report_speed(name: str, extractor: ConceptExtractor, captions: Sequence[str]) -> None:
    """Captions per second of processor time, and resident memory on the way."""
    extractor.extract(captions[:CAPTIONS_AT_ONCE])
    memory, num_mentions = [], 0
    start, wall = time.process_time(), time.perf_counter()
    for first in range(0, len(captions), CAPTIONS_AT_ONCE):
        num_mentions += sum(map(len, extractor.extract(captions[first : first + CAPTIONS_AT_ONCE])))
        memory.append(resident_mib())
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    print(
        f"{name:<24} {len(captions) / seconds:>8.0f} captions/s of processor time ({len(captions) / wall:.0f} by the "
        f"clock), {num_mentions / len(captions):.1f} mentions a caption, {memory[len(memory) // 4]:.0f} to "
        f"{memory[-1]:.0f} MiB resident"
    )


def resident_mib() -> float:
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def report_agreement(extractor: ConceptExtractor, rows: Sequence[dict]) -> None:
    """Spans and identifiers against the published ones."""
    counts = dict.fromkeys(("published", "covered", "ours", "spans", "covered spans", "touching", "cuis", "umls"), 0)
    for row, mentions in zip(rows, extractor.extract([row["caption"] for row in rows]), strict=True):
        ours = {(mention.start_char, mention.end_char): mention for mention in mentions}
        published = list(published_spans(row))
        counts["ours"] += len(ours)
        for span, cui in published:
            text = row["caption"][span[0] : span[1]]
            is_covered = [(m.start_char, m.end_char) for m in extractor.extract([text])[0]] == [(0, len(text))]
            counts["published"] += 1
            counts["covered"] += is_covered
            counts["spans"] += span in ours
            counts["covered spans"] += is_covered and span in ours
            if span in ours and ours[span].cui.startswith("C"):
                counts["umls"] += 1
                counts["cuis"] += ours[span].cui == cui
        counts["touching"] += sum(any(a < end and start < b for (a, b), _ in published) for start, end in ours)
    print(f"similar spelling {extractor.options.similar_spelling}: {counts}")
    print(
        f"  recall of covered spans {counts['covered spans'] / counts['covered']:.3f}, of all published "
        f"{counts['spans'] / counts['published']:.3f}; precision, same span {counts['spans'] / counts['ours']:.3f}, "
        f"overlapping {counts['touching'] / counts['ours']:.3f}; same CUI where ours is of UMLS "
        f"{counts['cuis'] / counts['umls']:.3f}"
    )


def published_spans(row: dict) -> Iterator[tuple[tuple[int, int], str]]:
    """((start, end), CUI) on the raw caption of the published concepts of a row."""
    decoded = DecodedCaption(row["caption"])
    for concept in row["umls_meta_info"]:
        span = decoded.raw_span(concept["start_char"], concept["end_char"], concept["tokens"])
        if not isinstance(span, Drop):
            yield span, concept["umls_cui"]


if __name__ == "__main__":
    main()
