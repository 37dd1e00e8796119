"""How well compound figures are taken apart: panels of drawn figures in known places, captions of known parts.

    OMP_NUM_THREADS=1 python benchmarks/panels.py --figures 400

For each kind of gutter: figures whose panels were all found in their order (overlap with the truth at least 0.5), the
share of those that were taken apart that are right, and the same for captions by the way they are lettered. A figure
is "taken apart" where the number of panels agrees with that of the captions; all others are kept whole and marked. With
the shared data beside the checkout, how many of its 70 real figures are taken apart; there is no truth for these.
"""

import argparse
import io
import json
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

from medclip_hf.data.articles.panel_captions import split_caption
from medclip_hf.data.articles.panels import Box, find_panels, take_apart
from medclip_hf.data.phantoms.compounds import CompoundPhantom, draw_compound
from medclip_hf.data.records import FigureRow

MIN_OVERLAP = 0.5  # intersection over union; panels are trimmed to what is drawn in them


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared)


def are_right(found: list[Box], drawn: CompoundPhantom) -> bool:
    """Whether all panels were found, in the order of their letters."""
    return len(found) == len(drawn.boxes) and all(
        overlap(*pair) >= MIN_OVERLAP for pair in zip(found, drawn.boxes, strict=True)
    )


def measure(seed: int, num_figures: int) -> dict[str, dict[str, dict[str, float]]]:
    """Shares by kind of gutter and of lettering, and milliseconds a figure."""
    pictures: dict[str, Counter[str]] = defaultdict(Counter)
    captions: dict[str, Counter[str]] = defaultdict(Counter)
    seconds = 0.0
    for index in range(num_figures):
        drawn = draw_compound(seed, index)
        image = Image.open(io.BytesIO(drawn.content))
        image.load()
        start = time.perf_counter()
        boxes = find_panels(image, len(drawn.boxes))
        parts = split_caption(drawn.caption)
        seconds += time.perf_counter() - start
        has_pair = "pair" in drawn.kinds
        for kind in (drawn.gutter, f"{drawn.gutter}, with a pair" if has_pair else f"{drawn.gutter}, no pair", "all"):
            pictures[kind]["figures"] += 1
            pictures[kind]["taken apart"] += len(boxes) == len(drawn.boxes)
            pictures[kind]["right"] += are_right(boxes, drawn)
        for kind in (drawn.style, "all"):
            captions[kind]["figures"] += 1
            captions[kind]["taken apart"] += bool(parts)
            captions[kind]["right"] += bool(parts) and tuple(part.text for part in parts) == drawn.texts
    return {
        "pictures": {kind: shares(counts) for kind, counts in sorted(pictures.items())},
        "captions": {kind: shares(counts) for kind, counts in sorted(captions.items())},
        "speed": {"all": {"milliseconds a figure": round(1000 * seconds / num_figures, 1)}},
    }


def shares(counts: Counter[str]) -> dict[str, float]:
    """Recall over all figures, precision over those taken apart."""
    taken, right = counts["taken apart"], counts["right"]
    return {
        "figures": counts["figures"],
        "taken apart": taken,
        "right": right,
        "recall": round(right / counts["figures"], 3),
        "precision": round(right / taken, 3) if taken else float("nan"),
    }


def take_real_figures_apart() -> Counter[str]:
    """What becomes of the shared real figures; empty where they are not there."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MEDCLIP_HF_SHARED", default)) / "data" / "pmc_sample"
    outcome: Counter[str] = Counter()
    if not (folder / "metadata.jsonl").is_file():
        return outcome
    for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines():
        values = json.loads(line)
        path = next(folder.rglob(Path(values["image"]).name))
        rows = list(take_apart(FigureRow("real", values["caption"], image_bytes=path.read_bytes())))
        outcome["figures"] += 1
        outcome["captions with parts"] += bool(split_caption(values["caption"]))
        outcome["taken apart"] += len(rows) > 1
        outcome["panels"] += len(rows) if len(rows) > 1 else 0
        outcome["kept whole and marked"] += rows[0].is_compound
    return outcome


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=int, default=400)
    parser.add_argument("--seed", type=int, default=11, help="another one than those the rules were made with (0 to 5)")
    arguments = parser.parse_args()
    results = measure(arguments.seed, arguments.figures)
    results["real figures"] = {"all": dict(take_real_figures_apart())}
    for subject, table in results.items():
        print(f"\n{subject}")
        for kind, values in table.items():
            print(f"  {kind:<24}" + "  ".join(f"{name} {value}" for name, value in values.items()))
    json.dump(results, sys.stderr)


if __name__ == "__main__":
    main()
