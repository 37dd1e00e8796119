"""Examples that load in one click: drawn figures and drawn torsos, nobody's images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from medclip_hf.data.phantoms.figures import draw_figure
from medclip_hf.data.phantoms.findings import FINDINGS as FIGURE_FINDINGS
from medclip_hf.data.phantoms.torso_files import FIRST_PATIENT, write_ct_rate
from medclip_hf.data.phantoms.torso_findings import FINDINGS as TORSO_FINDINGS
from medclip_hf.data.phantoms.torso_reports import PROMPTS as TORSO_PROMPTS
from medclip_hf.data.phantoms.torsos import TorsoSettings, plan_patient
from medclip_hf.evaluation.ct_zero_shot import CT_RATE_FINDINGS

FIGURE_CONCEPTS = tuple(finding.name for finding in FIGURE_FINDINGS)
FIGURE_PROMPTS = ("Chest radiograph showing nodule.", "Ultrasound image showing linear scarring.", "Skin photograph.")
_FIGURE_SEED, _FIGURE_SIZE = 7, 192
_FIGURES = {"Radiograph": 10, "CT": 11, "Ultrasound": 13, "Dermoscopy": 5, "Histology": 12}

# As the demo's, on a finer grid, so that they are good to look at.
_TORSOS = TorsoSettings(
    in_plane_size=128,
    slice_spacing_mm=(4.0, 4.0),
    body_scale=(0.96, 1.04),
    max_shift_mm=4.0,
    noise_hu=(10.0, 25.0),
    prevalence=0.12,
    max_studies=1,
    max_reconstructions=1,
    findings=(
        *("emphysema", "ground-glass opacity", "pleural effusion", "cardiomegaly"),
        *("pericardial effusion", "hiatal hernia", "aortic wall calcification"),
    ),
)
# In the words of the drawn torsos' reports, from which the demo models learned.
DRAWN_CT_FINDINGS = tuple(
    replace(finding, absent=TORSO_PROMPTS[finding.name][0], present=TORSO_PROMPTS[finding.name][1])
    for finding in CT_RATE_FINDINGS
    if finding.name in TORSO_PROMPTS
)
_TORSO_SEEDS = {"Torso with effusion": 26, "Torso with large heart": 38, "Torso without findings": 0}


@dataclass(frozen=True)
class FigureExample:
    """A drawn figure, its name, and what was drawn into it."""

    name: str
    image: Image.Image
    findings: tuple[str, ...]


@dataclass(frozen=True)
class TorsoExample:
    """A drawn CT as files, a picture of it, and what was drawn into it, in CT-RATE's words."""

    name: str
    scan: Path
    labels: Path
    thumbnail: Image.Image
    findings: tuple[str, ...]


@lru_cache(maxsize=1)
def figure_examples() -> tuple[FigureExample, ...]:
    """The drawn figures; no training of the demo saw them."""
    examples = []
    for name, index in _FIGURES.items():
        figure = draw_figure(_FIGURE_SEED, "test", index, size=_FIGURE_SIZE)
        examples.append(FigureExample(name, Image.fromarray(figure.image), figure.findings))
    return tuple(examples)


def draw_torsos(folder: Path, window_hu: Sequence[float] = (-1150.0, 350.0)) -> tuple[TorsoExample, ...]:
    """The drawn torsos, written below `folder`, which is made."""
    examples = []
    for name, seed in _TORSO_SEEDS.items():
        [scan] = write_ct_rate(folder / str(seed), 1, split="valid", seed=seed, orientations=("LPS",), settings=_TORSOS)
        labels = (
            folder / str(seed) / "dataset" / "ts_seg" / "ts_total" / scan.relative_to(folder / str(seed) / "dataset")
        )
        findings = plan_patient(seed, FIRST_PATIENT["valid"], _TORSOS)[0].findings
        names = [TORSO_FINDINGS[finding].ct_rate_name for finding in findings]
        examples.append(TorsoExample(name, scan, labels, _coronal(scan, window_hu), tuple(filter(None, names))))
    return tuple(examples)


def _coronal(scan: Path, window_hu: Sequence[float]) -> Image.Image:
    values = np.asanyarray(nibabel.load(scan).dataobj)  # type: ignore[attr-defined]  # (x, y, z), LPS
    middle = values[:, values.shape[1] // 2, ::-1].T.astype(np.float32)
    low, high = window_hu
    grey = (np.clip((middle - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(grey).resize((96, 96))
