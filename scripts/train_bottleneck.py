r"""Fit a classifier that sees nothing but scores of named concepts, and compare it with a probe that sees everything.

    python scripts/train_bottleneck.py --model runs/conceptclip/final --images cells --table cells.csv \
        --vocabulary attributes.jsonl --output bottleneck

The table is a CSV with the columns image, label and split (train, validation, test), and perhaps patient. The weights
are written as text, `weights.txt`; `results.json` has accuracy and AUROC beside those of the linear probe on the same
images, and what switching each important concept does. For research only: no medical device.
"""

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from medclip_hf.data.concepts.index import read_vocabulary
from medclip_hf.data.images import path_inside
from medclip_hf.data.parquet import write_text_atomically
from medclip_hf.evaluation.bottleneck import ConceptBottleneck, SwitchEffect, fit_bottleneck, switch_effect
from medclip_hf.evaluation.comparisons import PairedDifference, paired_differences
from medclip_hf.evaluation.concept_bank import ConceptBank, build_concept_bank
from medclip_hf.evaluation.csv_tables import open_csv
from medclip_hf.evaluation.encoders import Encoder, load_encoder
from medclip_hf.evaluation.probe import ProbeSplit, run_linear_probe
from medclip_hf.evaluation.task_layouts import canonical_split

logger = logging.getLogger("train_bottleneck")

SPLITS = ("train", "validation", "test")
FIGURES = ("balanced_accuracy", "accuracy", "auroc")
BATCH = 16


@dataclass(frozen=True)
class Split:
    """What was made of the images of one split.

    Args:
        scores: (N, C), cosine of each concept with its best patch, or with the whole image.
        features: (N, D), pooled vectors, not normalised: what the probe sees.
        labels: (N,), class numbers.
        patients: (N,), names.
        set_aside: image and reason of those that could not be read.
    """

    scores: NDArray[np.float64]
    features: NDArray[np.float64]
    labels: NDArray[np.int64]
    patients: NDArray[np.str_]
    set_aside: list[dict[str, str]]


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a ConceptCLIP or CLIP-like model")
    parser.add_argument("--images", type=Path, required=True, help="folder that the table's paths start from")
    parser.add_argument("--table", type=Path, required=True, help="CSV: image, label, split and perhaps patient")
    parser.add_argument("--vocabulary", type=Path, help="JSON lines: concept_id, canonical_name; default: the shipped")
    parser.add_argument("--template", action="append", help="prompt with one {}; may be given several times")
    parser.add_argument("--score", choices=("local", "global"), help="default: local where the model has patch heads")
    parser.add_argument("--top", type=int, default=8, help="concepts a class in the text")
    parser.add_argument("--output", type=Path, required=True, help="folder of all results")
    parser.add_argument("--device", help="default: the accelerator if there is one")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Fit, compare, write; 0, or 2 for a mistake in what was asked."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = parse_command_line(command_line)
    try:
        print(run(options))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def run(options: argparse.Namespace) -> str:
    """Everything; the text to print."""
    rows = read_table(options.table)
    class_names = sorted({row["label"] for row in rows})
    encoder = load_encoder(options.model, device=options.device)
    source = options.vocabulary or Path(str(files("medclip_hf.data.concepts") / "vocabulary" / "shipped.jsonl"))
    bank = build_concept_bank(encoder, read_vocabulary(source), templates=tuple(options.template or ("{}",)))
    use_patches = encoder.has_patches if options.score is None else options.score == "local"
    splits = {
        name: encode(
            [row for row in rows if row["split"] == name], options.images, encoder, bank, class_names, use_patches
        )
        for name in SPLITS
    }
    names = distinct_names(bank)
    train, validation, test = (splits[name] for name in SPLITS)
    bottleneck = fit_bottleneck(
        train.scores,
        train.labels,
        names,
        class_names,
        validation_scores=validation.scores,
        validation_labels=validation.labels,
    )
    black_box = probe_probabilities(splits, len(class_names))
    compared = paired_differences(
        black_box, bottleneck.probabilities(test.scores), test.labels, class_names, groups=test.patients
    )
    effects = [switch_effect(bottleneck, test.scores, name) for name in important_concepts(bottleneck, options.top)]
    data = {name: {"images": len(split.labels), "set_aside": split.set_aside} for name, split in splits.items()}
    return write_results(options.output, bottleneck, compared, effects, options.top, data)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of the table.

    Raises:
        ValueError: no table, a column or cell missing, another split, an image twice, a patient in two splits.
    """
    if not path.is_file():
        raise ValueError(f"there is no table at {path}.")
    with open_csv(path) as reader:
        rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    if not rows or not all(row.get(column) for row in rows for column in ("image", "label", "split")):
        raise ValueError(f"{path} must have rows with the columns image, label and split, no cell empty.")
    for row in rows:
        row["split"] = canonical_split(row["split"])
    wrong = sorted({row["split"] for row in rows} - set(SPLITS))
    if wrong or len({row["split"] for row in rows}) < len(SPLITS):
        raise ValueError(f"{path} must have rows of each split {', '.join(SPLITS)} and of no other, got also {wrong}.")
    if len({row["image"] for row in rows}) < len(rows):
        raise ValueError(f"{path} names an image twice.")
    split_of: dict[str, str] = {}
    for row in rows:
        row["patient"] = row.get("patient") or row["image"]
        if split_of.setdefault(row["patient"], row["split"]) != row["split"]:
            raise ValueError(f"{path}: a patient has images in two splits, for instance {row['image']}.")
    return rows


@torch.no_grad()
def encode(
    rows: list[dict[str, str]], folder: Path, encoder: Encoder, bank: ConceptBank, class_names: list[str], local: bool
) -> Split:
    """Concept scores and features of the images of a split; those that cannot be read are left out and named."""
    concepts = bank.concept_embeds if local else bank.text_embeds
    if concepts is None:
        raise ValueError(f"{encoder.name} has no patch heads, so there are no local scores: use --score global.")
    scores, features, kept, set_aside = [], [], [], []
    for first in tqdm(range(0, len(rows), BATCH), unit="batch", disable=None):
        pixels = []
        for row in rows[first : first + BATCH]:
            try:
                pixels.append(encoder.preprocess(path_inside(folder, row["image"])))
                kept.append(row)
            except (OSError, ValueError) as error:
                logger.warning("set aside %s: %s", row["image"], error)
                set_aside.append({"image": row["image"], "reason": str(error)})
        if pixels:
            found = encoder.encode_pixels(torch.stack(pixels))
            if local and found.patch_embeds is not None:
                scores.append(torch.stack([(patches @ concepts.T).amax(dim=0) for patches in found.patch_embeds]))
            else:
                scores.append(found.image_embeds @ concepts.T)
            features.append(found.image_embeds * found.image_norms[:, None])
    if not kept:
        raise ValueError(f"no image of the split {rows[0]['split']!r} below {folder} can be read.")
    return Split(
        torch.cat(scores).double().cpu().numpy(),
        torch.cat(features).double().cpu().numpy(),
        np.array([class_names.index(row["label"]) for row in kept]),
        np.array([row["patient"] for row in kept]),
        set_aside,
    )


def distinct_names(bank: ConceptBank) -> list[str]:
    """A name for each concept; where two share one, with their identifiers."""
    shared = {name for name in bank.names if bank.names.count(name) > 1}
    return [
        f"{name} ({identifier})" if name in shared else name
        for name, identifier in zip(bank.names, bank.concept_ids, strict=True)
    ]


def probe_probabilities(splits: dict[str, Split], num_classes: int) -> NDArray[np.float64]:
    """What the linear probe on the pooled vectors says of the test images, its penalty chosen on validation."""
    parts = [ProbeSplit(splits[name].features, splits[name].labels, splits[name].patients) for name in SPLITS]
    return run_linear_probe(*parts, num_classes, fractions=(1.0,))[0].probabilities


def important_concepts(bottleneck: ConceptBottleneck, top: int) -> list[str]:
    """Those with the greatest weights over all classes."""
    importance = np.abs(bottleneck.weights).sum(axis=0)
    return [bottleneck.concept_names[place] for place in np.argsort(-importance)[:top] if importance[place] > 0]


def write_results(
    folder: Path,
    bottleneck: ConceptBottleneck,
    compared: dict[str, PairedDifference],
    effects: list[SwitchEffect],
    top: int,
    data: dict[str, Any],
) -> str:
    """Write bottleneck, `weights.txt` and `results.json`; the text to print."""
    bottleneck.save(folder)
    weights = bottleneck.as_text(top)
    write_text_atomically(folder / "weights.txt", weights + "\n")
    figures = {name: compared[name] for name in FIGURES if name in compared}
    results: dict[str, Any] = {
        "data": data,
        "num_concepts": len(bottleneck.concept_names),
        "num_concepts_used": bottleneck.num_concepts_used,
        "strength": bottleneck.strength,
        "figures": {
            name: {"probe": f.first, "bottleneck": f.second, "bottleneck_minus_probe": f.difference.as_dict()}
            for name, f in figures.items()
        },
        "switches": [effect.as_dict() for effect in effects],
    }
    write_text_atomically(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    lines = ["| | probe | bottleneck | difference |", "|---|---|---|---|"]
    for name, f in figures.items():
        values = ["undefined" if value is None else f"{value:.3f}" for value in (f.first, f.second)]
        lines.append(f"| {name} | {values[0]} | {values[1]} | {f.difference.as_text('{:+.3f}')} |")
    lines += ["", f"| switched on | {' | '.join(bottleneck.class_names)} | predictions changed |"]
    lines.append("|---" * (len(bottleneck.class_names) + 2) + "|")
    for effect in effects:
        changes = " | ".join(f"{effect.change[name]:+.2f}" for name in bottleneck.class_names)
        lines.append(f"| {effect.concept} | {changes} | {effect.num_flipped} of {effect.num_cases} |")
    used = f"{bottleneck.num_concepts_used} of {len(bottleneck.concept_names)} concepts used"
    counts = ", ".join(f"{len(part['set_aside'])} of {name} set aside" for name, part in data.items())
    return "\n".join([weights, "", used, counts, "", *lines])


if __name__ == "__main__":
    sys.exit(main())
