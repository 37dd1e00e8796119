"""What a figure shows, without a model: a picture or a drawing (chart, diagram, table), and of which modality.

The picture test asks how much of a figure is blank: white paper, or an area filled with one colour. Photographs, scans
and micrographs have noise and shading nearly everywhere (black background apart, which scans have and charts have not);
charts, diagrams and tables are blank for the most part. It cannot tell a medical picture from a photograph of a bottle:
that takes a model (`data.engine.image_text_model`). The modality is the one that the caption names. Both are measured
in `benchmarks/medconcept.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ANALYSIS_SIDE = 384  # pixels of the longer side
PAPER_LEVEL = 235  # of 255; JPEG leaves white paper above it
BLACK_LEVEL = 16
FLAT_RANGE = 2  # grey levels between the pixels of a 3 × 3 window; shading and noise exceed it
MAX_BLANK_SHARE = 0.5

MODALITIES = (
    "radiograph",
    "computed tomography",
    "magnetic resonance",
    "ultrasound",
    "mammography",
    "histology",
    "dermoscopy",
    "fundus photography",
    "optical coherence tomography",
    "endoscopy",
)


@dataclass(frozen=True)
class FigureRules:
    """Which figures are kept.

    Args:
        keep: ``"medical"``: pictures, and with a model those that it calls medical; ``"pictures"``: no drawings;
            ``"all"``.
        max_blank_share: a figure of which more is blank is a drawing.
        needs_modality: drop figures whose modality stays unknown.
    """

    keep: str = "pictures"
    max_blank_share: float = MAX_BLANK_SHARE
    needs_modality: bool = False

    def __post_init__(self) -> None:
        if self.keep not in ("medical", "pictures", "all"):
            raise ValueError(f"keep must be 'medical', 'pictures' or 'all', got {self.keep!r}")


def blank_share(image: Image.Image) -> float:
    """The part of a figure that is paper or one flat colour other than black, in [0, 1].

    Args:
        image: RGB.
    """
    small = image.copy()
    small.thumbnail((ANALYSIS_SIDE, ANALYSIS_SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    grey = small.convert("L")
    levels = np.asarray(grey)
    value_range = _of_windows(levels, np.maximum) - _of_windows(levels, np.minimum)
    is_flat = (value_range <= FLAT_RANGE) & (levels > BLACK_LEVEL)
    red, green, blue = (np.asarray(channel) for channel in small.split())
    is_paper = np.minimum(np.minimum(red, green), blue) >= PAPER_LEVEL
    return float(np.mean(is_flat | is_paper))


def _of_windows(levels: NDArray[np.uint8], choose: np.ufunc) -> NDArray[np.uint8]:
    """The largest or smallest value of the 3 × 3 window around every pixel, windows cut off at the border."""
    columns = levels.copy()
    choose(columns[1:], levels[:-1], out=columns[1:])
    choose(columns[:-1], levels[1:], out=columns[:-1])
    result = columns.copy()
    choose(result[:, 1:], columns[:, :-1], out=result[:, 1:])
    choose(result[:, :-1], columns[:, 1:], out=result[:, :-1])
    return result


def named_modality(caption: str) -> str:
    """The one of `MODALITIES` that a caption speaks of most, the first named where two are equal; "" for none."""
    pattern, modality_of = _terms()
    counts: dict[str, int] = {}
    for match in pattern.finditer(caption):
        modality = modality_of[_normal(match[0])]
        counts[modality] = counts.get(modality, 0) + 1
    return max(counts, key=lambda modality: counts[modality], default="")


@cache
def _terms() -> tuple[re.Pattern[str], dict[str, str]]:
    """One pattern of all terms, the longest first, and the modality of each."""
    table = json.loads(resources.files("medclip_hf.data.engine").joinpath("modalities.json").read_text("utf-8"))
    modality_of = {_normal(term): name for name in MODALITIES for term in table[name]}
    terms = sorted((term for name in MODALITIES for term in table[name]), key=len, reverse=True)
    # Short terms in capitals are abbreviations; "ct" in small letters may be anything.
    spelled = [
        re.escape(term).replace(r"\ ", r"[\s-]")
        if term.isupper()
        else f"(?i:{re.escape(term)})".replace(r"\ ", r"[\s-]")
        for term in terms
    ]
    return re.compile(rf"(?<![\w])(?:{'|'.join(spelled)})(?:s|es)?(?!\w)"), modality_of | {
        _normal(term) + ending: name for term, name in modality_of.items() for ending in ("s", "es")
    }


def _normal(term: str) -> str:
    return " ".join(term.lower().replace("-", " ").split())
