r"""Name the concepts that images show, with score, identifier and place, from a vocabulary of tens of thousands.

    python scripts/annotate_images.py --model runs/conceptclip/final --images figures --output annotations.jsonl
    python scripts/annotate_images.py --model runs/conceptclip/final --images figures --vocabulary umls.jsonl \
        --bank umls_bank --top-k 20 --shortlist 2000 --overlays pictures --output annotations.parquet

One line an image: its path, its size and its concepts, best first. The vectors of the vocabulary are made once and kept
in --bank. Broken off, it goes on where it was when started again. It measures instead, one AUC per concept, with
--labels (a CSV: image, perhaps patient, then one column of 0 and 1 for each concept) or with --figures (shards of
figures with concepts). For research only: no medical device.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from medclip_hf.data.concepts.index import read_vocabulary
from medclip_hf.data.images import UnreadableImage, decode_image, open_image, path_inside, read_file
from medclip_hf.data.parquet import find_shards, record_to_row, write_text_atomically
from medclip_hf.evaluation.annotation import AnnotationFigures, annotation_figures, embed_prompts, score_images
from medclip_hf.evaluation.concept_bank import ConceptBank, ConceptHit, annotate_image, build_concept_bank
from medclip_hf.evaluation.csv_tables import open_csv
from medclip_hf.evaluation.encoders import Encoder, load_encoder
from medclip_hf.explain.overlay import draw_boxes, draw_concept_panel, save_png
from medclip_hf.processing.conceptclip import to_rgb

logger = logging.getLogger("annotate_images")


@dataclass(frozen=True)
class Labelled:
    """N images with what is true of them.

    Args:
        images: bytes or paths.
        names: what to call them.
        concept_names: C names.
        labels: (N, C) bool.
        patients: (N,) whose each is; None: each is its own.
    """

    images: list[Any]
    names: list[str]
    concept_names: list[str]
    labels: np.ndarray[Any, Any]
    patients: np.ndarray[Any, Any] | None = None


ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2")
CONCEPT_FIELDS = pa.struct(
    [
        ("concept_id", pa.string()),
        ("name", pa.string()),
        ("score", pa.float64()),
        ("global_score", pa.float64()),
        ("local_score", pa.float64()),
        ("box", pa.list_(pa.int32())),
    ]
)
SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("concepts", pa.list_(CONCEPT_FIELDS)),
        ("set_aside", pa.string()),
    ]
)


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a ConceptCLIP or CLIP-like model")
    parser.add_argument("--revision", help="of a model on the Hub")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder, searched with its subfolders")
    source.add_argument("--figures", type=Path, help="folder of figure shards: measure, captions' concepts being true")
    parser.add_argument("--output", type=Path, required=True, help="file ending in .jsonl or .parquet")
    parser.add_argument("--vocabulary", type=Path, help="JSON lines: concept_id, canonical_name; default: the shipped")
    parser.add_argument("--bank", type=Path, help="folder for the vectors; default: <output>.bank")
    parser.add_argument("--template", action="append", help="prompt with one {}; may be given several times")
    parser.add_argument("--top-k", type=int, default=10, help="concepts an image")
    parser.add_argument("--shortlist", type=int, help="compare patches with so many concepts only")
    parser.add_argument("--local-weight", type=float, default=0.5, help="of the best patch beside the whole image")
    parser.add_argument("--top-patches", type=int, help="where it measures: best patches averaged; default: all")
    parser.add_argument("--overlays", type=Path, help="folder for a picture of the maps and boxes of each image")
    parser.add_argument("--labels", type=Path, help="CSV of images and concepts: measure one AUC per concept")
    parser.add_argument("--neutral", action="append", help="where it measures: prompt without a concept")
    parser.add_argument("--split", default="test", help="of --figures")
    parser.add_argument("--least", type=int, default=5, help="with --figures: a concept must occur in so many of them")
    parser.add_argument("--device", help="default: the accelerator if there is one")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Annotate or measure; 0, 1 where no image could be read, 2 for a mistake in what was asked."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = parse_command_line(command_line)
    try:
        return measure(options) if options.labels or options.figures else annotate(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def annotate(options: argparse.Namespace) -> int:
    """Write the annotations of every image of the folder; the exit code."""
    if options.output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output {options.output} must end in .jsonl or .parquet.")
    images = find_images(options.images)
    encoder = load_encoder(options.model, device=options.device, revision=options.revision)
    bank = load_or_build_bank(options, encoder)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = options.output if options.output.suffix == ".jsonl" else options.output.with_suffix(".jsonl")
    found = read_progress(lines, settings_of(options, bank))
    counts = {"annotated": 0, "found": len(found), "set_aside": 0}
    with lines.open("a", encoding="utf-8") as file:
        for path in tqdm([path for path in images if path.as_posix() not in found], unit="image", disable=None):
            record = annotate_file(options, path, bank, encoder)
            counts["set_aside" if record["set_aside"] else "annotated"] += 1
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    if options.output.suffix == ".parquet":
        write_parquet(lines, options.output)
    print(
        f"{counts['annotated']} images annotated with {len(bank)} concepts, {counts['found']} there already, "
        f"{counts['set_aside']} set aside: {options.output}"
    )
    return 0 if counts["annotated"] + counts["found"] else 1


def annotate_file(options: argparse.Namespace, path: Path, bank: ConceptBank, encoder: Encoder) -> dict[str, Any]:
    """The line of an image; one that cannot be read has its reason instead of concepts."""
    record: dict[str, Any] = {
        "image": path.as_posix(),
        "width": None,
        "height": None,
        "concepts": [],
        "set_aside": None,
    }
    try:
        picture = read_picture(options.images / path)
    except (UnreadableImage, ValueError) as error:
        return record | {"set_aside": str(error)}
    hits = annotate_image(
        picture,
        bank,
        encoder,
        top_k=options.top_k,
        local_weight=options.local_weight,
        shortlist=options.shortlist,
    )
    if options.overlays:
        draw_overlays(picture, hits, options.overlays / path)
    return record | {"width": picture.width, "height": picture.height, "concepts": [hit.as_dict() for hit in hits]}


def read_picture(path: Path) -> Image.Image:
    """The picture of a file as upright RGB.

    Raises:
        UnreadableImage: with the reason.
    """
    image = open_image(read_file(path), path.name)
    return to_rgb(decode_image(image, path.name))


def draw_overlays(picture: Image.Image, hits: list[ConceptHit], path: Path) -> None:
    """`<name>.maps.png` and `<name>.boxes.png` of an image, where the model has patches."""
    shown = [hit for hit in hits if hit.concept_map is not None and hit.box is not None][:9]
    if shown:
        names = [f"{hit.name} {hit.score:.2f}" for hit in shown]
        panel = draw_concept_panel(picture, np.stack([hit.concept_map for hit in shown]), names)  # type: ignore[misc]
        save_png(panel, path.with_name(path.name + ".maps.png"))
        boxes = draw_boxes(picture, [hit.box for hit in shown], names)  # type: ignore[misc]
        save_png(boxes, path.with_name(path.name + ".boxes.png"))


def find_images(folder: Path) -> list[Path]:
    """Paths below the folder, relative and sorted; hidden files and other kinds are passed over.

    Raises:
        ValueError: no folder, or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is no folder.")
    found = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise ValueError(f"--images {folder} holds no image: expected files ending in {', '.join(ENDINGS)}.")
    return found


def load_or_build_bank(options: argparse.Namespace, encoder: Encoder) -> ConceptBank:
    """The bank of the vocabulary, from its folder if it was made with this model, vocabulary and templates.

    Raises:
        ValueError: the folder holds a bank of another model, vocabulary or templates.
    """
    folder = options.bank or options.output.with_name(options.output.name + ".bank")
    source = options.vocabulary or Path(str(files("medclip_hf.data.concepts") / "vocabulary" / "shipped.jsonl"))
    if not source.is_file():
        raise ValueError(f"there is no vocabulary at {source}.")
    templates = tuple(options.template or ("{}",))
    # Which file the vectors came from stands beside them: the names alone would not tell of a concept set aside.
    made_of = {"vocabulary": hashlib.blake2b(source.read_bytes(), digest_size=16).hexdigest(), "templates": templates}
    note = folder / "made_of.json"
    if (folder / "concept_bank.json").is_file():
        bank = ConceptBank.load(folder, encoder)
        if not note.is_file() or json.loads(note.read_text()) != json.loads(json.dumps(made_of)):
            raise ValueError(f"{folder} holds the bank of another vocabulary or template: name another --bank.")
        return bank
    with tqdm(unit="name", desc="concepts", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        bank = build_concept_bank(encoder, read_vocabulary(source), templates=templates, on_progress=show)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(note, json.dumps(made_of))
    bank.save(folder)
    if bank.set_aside:
        logger.warning("%d concepts set aside, the first: %s", len(bank.set_aside), bank.set_aside[0])
    return bank


def settings_of(options: argparse.Namespace, bank: ConceptBank) -> dict[str, Any]:
    """What the lines of a file have in common."""
    names = ("top_k", "shortlist", "local_weight")
    return {"bank": bank.fingerprint, "images": str(options.images.resolve())} | {n: getattr(options, n) for n in names}


def read_progress(lines: Path, settings: dict[str, Any]) -> set[str]:
    """Images that have a line already; a line cut off by a crash is removed.

    Raises:
        ValueError: the lines were made with other settings, or are no annotations.
    """
    note = lines.with_name(lines.name + ".settings.json")
    if not lines.is_file() or not lines.stat().st_size:
        write_text_atomically(note, json.dumps(settings))
        return set()
    if not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{lines} was written with another model, vocabulary or options: name another --output.")
    content = lines.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(lines, len(whole))
    try:
        return {json.loads(line)["image"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{lines} holds lines that are no annotations: {error}") from error


def write_parquet(lines: Path, output: Path) -> None:
    """The lines as a Parquet file, whole or not at all."""
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    partial = output.with_name(f".{output.name}.tmp")
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), partial, compression="zstd")
    partial.replace(output)


def measure(options: argparse.Namespace) -> int:
    """Print and write one AUC per concept that is labelled; the exit code."""
    data = labelled_figures(options) if options.figures else labelled_images(options)
    encoder = load_encoder(options.model, device=options.device, revision=options.revision)
    templates = options.template or ["this image shows {}."]
    neutral = options.neutral or [template.replace(" {}", "").replace("{}", "") for template in templates]
    prompts = embed_prompts(encoder, data.concept_names, templates, neutral)
    scores = score_images(
        encoder,
        tqdm(data.images, unit="image", disable=None),
        prompts,
        top_patches=options.top_patches,
        local_weight=options.local_weight,
    )
    set_aside = [{"image": data.names[position], "reason": reason} for position, reason in scores.unreadable]
    for entry in set_aside:
        logger.warning("set aside %s: %s", entry["image"], entry["reason"])
    kept = np.setdiff1d(np.arange(len(data.images)), [position for position, _ in scores.unreadable])
    groups = None if data.patients is None else data.patients[kept]
    figures = annotation_figures(scores, data.labels[kept], data.concept_names, groups=groups)
    record = {**figures.as_dict(), "num_images": len(kept), "set_aside": set_aside}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(options.output, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"{len(kept)} images, {len(set_aside)} set aside\n{table_of(figures)}")
    return 0


def labelled_images(options: argparse.Namespace) -> Labelled:
    """The images of --labels; one that is absent is set aside when it is read.

    Raises:
        ValueError: as `read_labels`; none of the images is there.
    """
    data = read_labels(options.labels)
    paths = []
    for name in data.names:
        try:
            paths.append(path_inside(options.images, name))
        except UnreadableImage as error:
            raise ValueError(f"{options.labels}: {error}") from error
    if not any(path.is_file() for path in paths):
        raise ValueError(
            f"none of the {len(paths)} images of {options.labels} is below {options.images}, first {data.names[0]}"
        )
    return replace(data, images=paths)


def labelled_figures(options: argparse.Namespace) -> Labelled:
    """The figures of --figures; what a caption affirms is shown, all else counts as absent.

    Raises:
        ValueError: no complete split, or no concept in `--least` figures.
    """
    shards = find_shards(options.figures, options.split)
    rows = [record_to_row(record) for shard in shards for record in pq.read_table(shard).to_pylist()]
    shown = [{c.cui or c.name: c.name for c in row.concepts if not (c.is_negated or c.is_uncertain)} for row in rows]
    counts = Counter(key for concepts in shown for key in concepts)
    name_of = {key: name for concepts in shown for key, name in concepts.items()}
    keys = [key for key, count in counts.most_common() if count >= options.least]
    # Two concepts of one name are one prompt; the more frequent one keeps it.
    keys = list({name_of[key].lower(): key for key in reversed(keys) if name_of[key]}.values())[::-1]
    if not keys:
        raise ValueError(f"no concept with a name is in {options.least} figures of {options.figures}: lower --least.")
    labels = np.array([[key in concepts for key in keys] for concepts in shown])
    images = [row.image_bytes or options.figures / (row.image_path or "") for row in rows]
    return Labelled(images, [row.row_id for row in rows], [name_of[key] for key in keys], labels)


def read_labels(path: Path) -> Labelled:
    """What a table says of its images, which are not looked for here.

    Raises:
        ValueError: no such table, no column "image", no concept, an image twice, a cell other than 0 and 1.
    """
    if not path.is_file():
        raise ValueError(f"there is no table of labels at {path}.")
    with open_csv(path) as reader:
        concepts = [name for name in reader.fieldnames or [] if name not in ("image", "patient")]
        rows = list(reader)
    if not rows or not concepts or "image" not in rows[0]:
        raise ValueError(f"{path} must have rows, a column 'image' and a column for each concept.")
    names = [row["image"] for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"{path} names an image twice.")
    wrong = [(row["image"], name) for row in rows for name in concepts if row[name] not in ("0", "1")]
    if wrong:
        raise ValueError(f"{path}: every label must be 0 or 1, but is not for {wrong[0]} and {len(wrong) - 1} others.")
    labels = np.array([[row[name] == "1" for name in concepts] for row in rows])
    patients = None
    if "patient" in rows[0]:  # an image without a patient is a patient of its own
        patients = np.array([row["patient"] or f"\0{row['image']}" for row in rows])
    return Labelled([], names, concepts, labels, patients)


def table_of(figures: AnnotationFigures) -> str:
    """Markdown: one row a concept, then their mean."""
    kinds = {"global": figures.global_only, "local": figures.local_only, "mixed": figures.mixed}
    known = {name: areas for name, areas in kinds.items() if areas is not None}
    lines = [f"| AUC | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
    for concept in figures.mixed.per_class:
        lines.append(f"| {concept} | {' | '.join(areas.per_class[concept].as_text() for areas in known.values())} |")
    lines.append(f"| **mean** | {' | '.join(areas.macro.as_text() for areas in known.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
