"""The looks of the drawn figures: what the tissue of an imaging modality resembles before a finding is put in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from medclip_hf.data.phantoms.findings import Plane, soft_step

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """How pictures of one modality are drawn and named.

    Args:
        modality: what `FigureRow.modality` says.
        names: wordings of captions.
        tissue: (x, y, rng) -> grey plane in [0, 1], `x` and `y` in [-1, 1].
        dark: colour of grey 0, in [0, 1] RGB.
        light: colour of grey 1.
        speckle: strength of the noise that multiplies the picture, findings included.
        grain: strength of the noise that is added to it.
    """

    modality: str
    names: tuple[str, ...]
    tissue: Callable[[Plane, Plane, np.random.Generator], Plane]
    dark: Colour = (0.0, 0.0, 0.0)
    light: Colour = (1.0, 1.0, 1.0)
    speckle: float = 0.0
    grain: float = 0.02


@cache
def unit_grid(size: int) -> tuple[Plane, Plane]:
    """Columns x and rows y of a square picture, both running over [-1, 1] at pixel centres."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * 2.0 / size - 1.0).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    x.setflags(write=False)  # shared by all pictures of this size
    y.setflags(write=False)
    return x, y


def render(grey: Plane, look: Look, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture (size, size, 3), uint8, of a grey plane with the noise and the colours of a look."""
    if look.speckle:
        grey = grey * (1.0 + look.speckle * (rng.rayleigh(0.8, grey.shape).astype(np.float32) - 1.0))
    grey = np.clip(grey + look.grain * rng.standard_normal(grey.shape, dtype=np.float32), 0.0, 1.0)
    dark, light = np.array(look.dark, np.float32), np.array(look.light, np.float32)
    return np.rint((dark + grey[..., None] * (light - dark)) * 255.0).astype(np.uint8)


def _blob(x: Plane, y: Plane, centre: tuple[float, float], radii: tuple[float, float], blur: float = 0.05) -> Plane:
    distance = np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1])
    return soft_step(1.0 - distance, blur)


def _radiograph(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    shift, height = rng.uniform(-0.08, 0.08, 2)
    lungs = _blob(x, y, (-0.45 + shift, height), (0.36, 0.72), 0.12) + _blob(
        x, y, (0.45 + shift, height), (0.36, 0.72), 0.12
    )
    ribs = np.cos(rng.uniform(11.0, 14.0) * (y + 0.35 * x * x) + rng.uniform(0.0, 6.0))
    return 0.55 - 0.12 * y - 0.28 * lungs + 0.1 * np.clip(ribs, 0.0, 1.0) * lungs


def _ct(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    width, height = rng.uniform(0.86, 0.98), rng.uniform(0.78, 0.92)
    body = _blob(x, y, (0.0, 0.0), (width, height), 0.02)
    fat = body - _blob(x, y, (0.0, 0.0), (width - 0.1, height - 0.1), 0.03)
    spine = _blob(x, y, (rng.uniform(-0.05, 0.05), 0.68), (0.13, 0.12), 0.1)
    return 0.42 * body - 0.14 * fat + 0.4 * spine


def _mr(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    head = _blob(x, y, (0.0, 0.0), (0.92, 0.96), 0.02)
    brain = _blob(x, y, (0.0, 0.0), (0.8, 0.84), 0.04)
    folds = np.sin(8.0 * x + 2.5 * np.sin(4.0 * y + rng.uniform(0.0, 6.0))) * np.sin(7.0 * y + rng.uniform(0.0, 6.0))
    coil = 1.0 + rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.2) * y  # uneven sensitivity of the receiver
    return (0.62 * (head - brain) + (0.4 + 0.06 * folds) * brain) * coil


def _ultrasound(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    depth = np.hypot(x, y + 1.5)
    angle = np.arctan2(x, y + 1.5)
    fan = soft_step(0.62 - np.abs(angle), 0.02) * soft_step(2.45 - depth, 0.02) * soft_step(depth - 0.5, 0.02)
    layers = np.sin(rng.uniform(7.0, 10.0) * depth + rng.uniform(0.0, 6.0))
    return (0.5 - 0.12 * (depth - 1.5) + 0.06 * layers) * fan + 0.03


def _histology(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    field = gaussian_filter(rng.standard_normal(x.shape, dtype=np.float32), max(1.0, x.shape[0] / 56.0))
    nuclei = np.clip(field / field.std() - 1.3, 0.0, 0.8)
    stroma = np.sin(rng.uniform(4.0, 7.0) * (x + 0.6 * np.sin(3.0 * y + rng.uniform(0.0, 6.0))))
    return 0.55 + 0.06 * stroma - 0.3 * nuclei


def _dermoscopy(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    centre = rng.uniform(-0.2, 0.2, 2)
    naevus = np.exp(-1.6 * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2))
    slope, offset = rng.uniform(-1.0, 1.0), rng.uniform(-0.7, 0.7)
    hair = soft_step(0.02 - np.abs(y - slope * x - offset - 0.1 * np.sin(3.0 * x)), 0.02)
    return 0.68 - 0.24 * naevus - 0.2 * hair - 0.08 * (x * x + y * y)


def _fundus(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    retina = _blob(x, y, (0.0, 0.0), (0.97, 0.97), 0.02)
    side = 1.0 if rng.random() < 0.5 else -1.0
    disc_x = 0.62 * side
    disc = _blob(x, y, (disc_x, 0.0), (0.15, 0.18), 0.1)
    along = side * (disc_x * side - x * side)
    vessels = soft_step(0.03 - np.abs(np.abs(y) - 0.5 * np.sqrt(np.abs(along) + 1e-3) - 0.03 * np.sin(9.0 * x)), 0.03)
    return (0.48 + 0.35 * disc - 0.18 * vessels) * retina


def _oct(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    height = y - rng.uniform(-0.1, 0.1) + 0.18 * np.exp(-6.0 * (x - rng.uniform(-0.3, 0.3)) ** 2)
    tissue = soft_step(0.85 - np.abs(height), 0.05)
    layers = 0.5 + 0.5 * np.cos(rng.uniform(9.0, 11.0) * height)
    return (0.3 + 0.2 * layers) * tissue + 0.06


LOOKS: tuple[Look, ...] = (
    Look("radiograph", ("radiograph", "x-ray", "plain film"), _radiograph),
    Look("computed tomography", ("CT slice", "computed tomography image", "axial CT scan"), _ct),
    Look("magnetic resonance", ("MR image", "magnetic resonance image", "MRI scan"), _mr),
    Look("ultrasound", ("ultrasound image", "sonogram", "B-mode ultrasound"), _ultrasound, speckle=0.2),
    Look(
        "histology",
        ("histology section", "photomicrograph", "stained tissue section"),
        _histology,
        dark=(0.36, 0.16, 0.46),
        light=(1.0, 0.86, 0.93),
    ),
    Look(
        "dermoscopy",
        ("dermoscopy image", "dermatoscopic photograph", "skin surface microscopy"),
        _dermoscopy,
        dark=(0.28, 0.14, 0.10),
        light=(1.0, 0.88, 0.78),
    ),
    Look(
        "fundus photography",
        ("fundus photograph", "retinal photograph", "color fundus image"),
        _fundus,
        dark=(0.12, 0.02, 0.02),
        light=(1.0, 0.75, 0.45),
    ),
    Look(
        "optical coherence tomography",
        ("OCT scan", "optical coherence tomography image", "retinal cross-section"),
        _oct,
        speckle=0.15,
    ),
)
