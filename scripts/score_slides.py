r"""Classify whole-slide images by attention over their tiles: features, training, figures, and attention on the slides.

    python scripts/score_slides.py --slides slides.csv --model runs/conceptclip/final --output runs/slides
    python scripts/score_slides.py --slides new.csv --model runs/conceptclip/final \
        --classifier runs/slides/mil.safetensors --output runs/new_slides

The table has the columns slide_id, path, label, split and, if there are any, patient_id and mpp. Without `--classifier`
one is trained on its train slides, chosen on its validation slides and measured on its test slides; with one, label and
split may be missing and all slides are scored. Written are features/ (one file a slide, used again by the next start
while slide, contract and model are the same), set_aside.csv, mil.safetensors, scores.csv, figures.json, maps/ with the
attention of test slides, and maps/labelled/ with the same beside the slide, under its class. For research only: no
medical device.
"""

import argparse
import csv
import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from medclip_hf.data.parquet import require_writable, write_text_atomically
from medclip_hf.evaluation.classification import classification_figures
from medclip_hf.evaluation.encoders import Encoder, load_encoder
from medclip_hf.evaluation.multiple_instance import (
    AttentionMIL,
    Bag,
    MILPrediction,
    MILSettings,
    predict_slides,
    train_mil,
)
from medclip_hf.evaluation.slides import (
    SlideRow,
    TileContract,
    UnusableSlide,
    attention_map,
    embed_slide,
    feature_identity,
    has_features,
    load_features,
    read_slide_table,
    save_features,
    tile_encoder,
)
from medclip_hf.explain.overlay import draw_concept_panel, overlay_map, save_png

logger = logging.getLogger("score_slides")

MAP_ENLARGEMENT = 2  # of the overview, which has 8 pixels a tile
MAP_INCHES = 6.0


@dataclass(frozen=True)
class Embedded:
    """A slide whose features lie in a file."""

    row: SlideRow
    features: Path

    def load(self) -> Tensor:
        """Its features (N, D).

        Raises:
            ValueError: the file is gone or damaged.
        """
        found = load_features(self.features)
        if found is None:
            raise ValueError(f"{self.features} cannot be read any more. Start again: it is made anew.")
        return found.features


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=Path, required=True, help="CSV of slides")
    parser.add_argument("--model", required=True, help="ConceptCLIP or another encoder, see evaluation.encoders")
    parser.add_argument("--output", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--classifier", type=Path, help="mil.safetensors of another run, instead of training one")
    parser.add_argument("--tile-px", type=int, default=256, help="side of a tile in pixels")
    parser.add_argument("--mpp", type=float, default=0.5, help="micrometres a pixel of a tile")
    parser.add_argument("--min-tissue", type=float, default=0.5, help="share of a tile that must be tissue")
    parser.add_argument("--gated", action="store_true", help="gated attention; the published one is not")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--maps", type=int, default=20, help="how many test slides get a picture of their attention")
    parser.add_argument("--batch-size", type=int, default=64, help="tiles")
    parser.add_argument("--num-workers", type=int, default=4, help="threads that read tiles")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Score the slides; 0, or 2 for a mistake in what was asked."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    options = parse_command_line(command_line)
    try:
        run(options)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Read the table, embed the slides, train or load the classifier, write scores, figures and maps."""
    rows = read_slide_table(options.slides, to_train=options.classifier is None)
    contract = TileContract(options.tile_px, options.mpp, options.min_tissue)
    settings = MILSettings(gated=options.gated, num_epochs=options.epochs, learning_rate=options.learning_rate)
    require_writable(options.output)
    encoder = load_encoder(options.model, device=options.device)
    identity = f"{encoder.identity} {contract}"
    classifier = AttentionMIL.load(options.classifier) if options.classifier else None
    if classifier is not None and classifier.encoder_identity != identity:
        raise ValueError(
            f"{options.classifier} was trained on features of another model or of other tiles. Give the same --model, "
            f"--tile-px, --mpp and --min-tissue: {classifier.encoder_identity.split(' ', 1)[-1]}."
        )
    slides = embed_slides(rows, encoder, contract, options)
    class_names = list(classifier.class_names) if classifier else sorted({s.row.label for s in chosen(slides, "train")})
    places = place_labels(slides, class_names)
    if classifier is None:
        classifier, history = train_mil(
            bags(chosen(slides, "train"), places),
            bags(chosen(slides, "validation"), places),
            class_names,
            settings,
            seed=options.seed,
            device=options.device,
            encoder_identity=identity,
        )
        classifier.save(options.output / "mil.safetensors")
        write_text_atomically(options.output / "history.json", json.dumps(history, indent=1) + "\n")
    predictions = predict_slides(classifier.to(options.device), bags(slides, places))
    write_scores(options.output / "scores.csv", slides, predictions, class_names)
    tested = [n for n, slide in enumerate(slides) if slide.row.split == "test" or options.classifier]
    labelled = [(slides[n], predictions[n]) for n in tested if slides[n].row.label]
    write_figures(options.output, labelled, class_names, places)
    for number in tested[: options.maps]:
        write_maps(options.output / "maps", slides[number], predictions[number], class_names)


def embed_slides(
    rows: Sequence[SlideRow], encoder: Encoder, contract: TileContract, options: argparse.Namespace
) -> list[Embedded]:
    """The slides whose features could be had; the others are written to set_aside.csv and counted.

    Raises:
        ValueError: there is not one.
    """
    encode = tile_encoder(encoder)
    slides, aside = [], []
    for row in tqdm(rows, unit="slide", desc="features"):
        path = options.output / "features" / f"{row.slide_id}.safetensors"
        try:
            if not row.path.is_file():
                raise UnusableSlide("slide missing", f"{row.path} is no file")
            identity = feature_identity(row, contract, encoder.identity)
            if not has_features(path, identity):
                found = embed_slide(
                    row, encode, contract, batch_size=options.batch_size, num_workers=options.num_workers
                )
                save_features(path, found, identity)
        except UnusableSlide as error:
            aside.append({"slide_id": row.slide_id, "split": row.split, "reason": error.reason, "detail": error.detail})
        else:
            slides.append(Embedded(row, path))
    write_table(options.output / "set_aside.csv", aside, ["slide_id", "split", "reason", "detail"])
    for reason, count in Counter(entry["reason"] for entry in aside).most_common():
        logger.warning("%d slides set aside: %s (see set_aside.csv)", count, reason)
    if not slides:
        raise ValueError(
            f"no slide of {options.slides} can be used; the reasons stand in {options.output}/set_aside.csv"
        )
    return slides


def chosen(slides: Sequence[Embedded], split: str) -> list[Embedded]:
    """The slides of a split."""
    return [slide for slide in slides if slide.row.split == split]


def place_labels(slides: Sequence[Embedded], class_names: Sequence[str]) -> dict[str, int]:
    """Label → place among the classes; -1 where none is known.

    Raises:
        ValueError: a slide with a label that no class has.
    """
    places = {"": -1} | {name: place for place, name in enumerate(class_names)}
    for slide in slides:
        if slide.row.label not in places:
            raise ValueError(
                f"slide {slide.row.slide_id} ({slide.row.split}) has the label {slide.row.label!r}, but the classes "
                f"are {list(class_names)}."
            )
    return places


def bags(slides: Sequence[Embedded], places: dict[str, int]) -> list[Bag]:
    """What the classifier takes: features on demand, and the class."""
    return [(slide.load, places[slide.row.label]) for slide in slides]


def write_scores(
    path: Path, slides: Sequence[Embedded], predictions: Sequence[MILPrediction], class_names: Sequence[str]
) -> None:
    """One row a slide: what it is, and the probability of every class."""
    fields = ["slide_id", "patient_id", "split", "label", "num_tiles", *(f"p_{name}" for name in class_names)]
    records = [
        {
            **{name: getattr(slide.row, name) for name in ("slide_id", "patient_id", "split", "label")},
            "num_tiles": len(found.attention),
            **{f"p_{name}": round(float(p), 6) for name, p in zip(class_names, found.probabilities, strict=True)},
        }
        for slide, found in zip(slides, predictions, strict=True)
    ]
    write_table(path, records, fields)


def write_figures(
    output: Path, tested: Sequence[tuple[Embedded, MILPrediction]], class_names: Sequence[str], places: dict[str, int]
) -> None:
    """Figures of the slides that were tested, as JSON and on the screen; nothing where there is none."""
    if not tested:
        logger.warning("no test slide with a label could be scored: there are no figures")
        return
    figures = classification_figures(
        np.stack([found.probabilities for _, found in tested]),
        np.array([places[slide.row.label] for slide, _ in tested]),
        list(class_names),
        groups=[slide.row.patient_id for slide, _ in tested],
    )
    write_text_atomically(output / "figures.json", json.dumps(figures.as_dict(), indent=2) + "\n")
    print(f"{figures.num_samples} test slides of {figures.num_groups} patients")
    for name, interval in figures.overall.items():
        print(f"  {name:<32} {interval.as_text()}")


def write_maps(folder: Path, slide: Embedded, found: MILPrediction, class_names: Sequence[str]) -> None:
    """The rank of each tile's attention over the slide in small; and beside the slide, labelled, for a reader."""
    stored = load_features(slide.features)
    assert stored is not None  # its features were read a moment ago
    ranks = attention_map(found.attention, stored.places, stored.shape)
    overview = stored.overview.repeat(MAP_ENLARGEMENT, axis=0).repeat(MAP_ENLARGEMENT, axis=1)
    save_png(overlay_map(overview, ranks, value_range=(0.0, 1.0)), folder / f"{slide.row.slide_id}.png")
    best = int(found.probabilities.argmax())
    panel = draw_concept_panel(
        overview,
        ranks[None],
        ["attention"],
        value_range=(0.0, 1.0),
        value_label="rank among the slide's tiles",
        title=f"{slide.row.slide_id}: {class_names[best]} {float(found.probabilities[best]):.2f}",
        tile_inches=MAP_INCHES,
    )
    save_png(panel, folder / "labelled" / f"{slide.row.slide_id}.png")


def write_table(path: Path, records: Sequence[dict[str, object]], fields: Sequence[str]) -> None:
    """A CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text_atomically(path, text.getvalue())


if __name__ == "__main__":
    sys.exit(main())
