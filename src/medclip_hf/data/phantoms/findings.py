"""The findings of the drawn figures: a shape, a texture, a true region and the words for them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Finding:
    """A kind of lesion that the phantoms draw and name.

    `concept_id` stands in the CUI column. Its letter P marks a private vocabulary: UMLS identifiers start with C, so no
    drawn shape can pass for a real disease in a mixture of data sets.

    Args:
        name: preferred name, used in prompts.
        concept_id: identifier in the private vocabulary.
        synonyms: other wordings of captions; they carry the same identifier.
        relative_radius: radius over that of the average finding.
        paint: (x, y, blur, rng) -> (contrast, region) on a window around the finding. `x`, `y` run in radii, tilted at
            random; `blur` is a pixel in radii; `contrast` in [-1, 1] is what is added to the picture, and
            `region` > 0.5 is the true mask.
    """

    name: str
    concept_id: str
    synonyms: tuple[str, ...]
    relative_radius: float
    paint: Callable[[Plane, Plane, float, np.random.Generator], tuple[Plane, Plane]]


def soft_step(signed_distance: Plane, blur: float) -> Plane:
    """1 where `signed_distance` is positive, 0 where negative, with a ramp of two pixels between."""
    return np.clip(0.5 + signed_distance / (2.0 * blur), 0.0, 1.0)


def _nodule(x: Plane, y: Plane, blur: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    radius_squared = x * x + y * y
    region = soft_step(1.0 - np.sqrt(radius_squared), blur)
    return 0.65 * region * (1.0 - 0.35 * radius_squared), region


def _cyst(x: Plane, y: Plane, blur: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    radius = np.hypot(x, y)
    region = soft_step(1.0 - radius, blur)
    lumen = soft_step(0.78 - radius, blur)
    return 0.5 * (region - lumen) - 0.55 * lumen, region


def _microcalcifications(x: Plane, y: Plane, blur: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    num_specks = int(rng.integers(11, 16))
    angle = rng.uniform(0.0, 2.0 * np.pi, num_specks)
    radius = 0.85 * np.sqrt(rng.random(num_specks))
    speck_x = (radius * np.cos(angle)).astype(np.float32)[:, None, None]
    speck_y = (radius * np.sin(angle)).astype(np.float32)[:, None, None]
    nearest = np.sqrt(((x - speck_x) ** 2 + (y - speck_y) ** 2).min(axis=0))
    # The region is the outline that a reader would draw around the group, not the single specks.
    return 0.85 * soft_step(0.15 - nearest, blur), soft_step(1.0 - np.hypot(x, y), blur)


def _fracture(x: Plane, y: Plane, blur: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    phase = rng.uniform(0.0, 1.0)
    zigzag = 0.25 * (np.abs((1.6 * x + phase) % 2.0 - 1.0) * 2.0 - 1.0)
    distance = np.abs(y - zigzag)
    length = soft_step(1.15 - np.abs(x), blur)
    gap = soft_step(0.17 - distance, blur) * length
    rim = soft_step(0.36 - distance, blur) * length
    return 0.35 * (rim - gap) - 0.75 * gap, soft_step(0.4 - distance, blur) * length


def _spiculated_mass(x: Plane, y: Plane, blur: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    num_spikes = int(rng.integers(7, 11))
    spike = np.abs(np.cos(0.5 * num_spikes * np.arctan2(y, x))) ** 3
    region = soft_step(0.5 + 0.6 * spike - np.hypot(x, y), blur)
    return 0.6 * region, region


def _honeycombing(x: Plane, y: Plane, blur: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    frequency = rng.uniform(7.0, 8.5)
    half_x, tall_y = 0.5 * x, 0.866 * y
    cells = np.cos(frequency * x) + np.cos(frequency * (half_x + tall_y)) + np.cos(frequency * (half_x - tall_y))
    region = soft_step(1.0 - np.hypot(x, y), blur)
    return np.clip(0.35 - 0.6 * cells, -0.6, 0.5) * region, region


def _linear_scarring(x: Plane, y: Plane, blur: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    frequency = rng.uniform(6.5, 8.0)
    region = soft_step(np.minimum(1.05 - np.abs(x), 0.8 - np.abs(y)), blur)
    return 0.5 * np.cos(frequency * y) * region, region


def _consolidation(x: Plane, y: Plane, blur: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    angle = np.arctan2(y, x)
    phase = rng.uniform(0.0, 2.0 * np.pi, 2)
    outline = 0.85 + 0.14 * np.sin(3.0 * angle + phase[0]) + 0.08 * np.sin(5.0 * angle + phase[1])
    region = soft_step(outline - np.hypot(x, y), 0.2)
    grain = rng.standard_normal(x.shape, dtype=np.float32)
    return (0.38 + 0.22 * grain) * region, region


def _surgical_clip(x: Plane, y: Plane, blur: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    length = 1.0 - far
    return 0.95 * soft_step(np.minimum(0.22 - near, length), blur), soft_step(np.minimum(0.36 - near, length), blur)


def _crescentic_hematoma(x: Plane, y: Plane, blur: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    region = soft_step(1.05 - np.hypot(x, y), blur) * soft_step(np.hypot(x - 0.5, y) - 0.85, blur)
    return 0.6 * region, region


FINDINGS: tuple[Finding, ...] = (
    Finding("nodule", "P0000001", ("nodular opacity",), 0.80, _nodule),
    Finding("cyst", "P0000002", ("cystic lesion",), 0.95, _cyst),
    Finding("microcalcifications", "P0000003", ("clustered calcifications",), 1.05, _microcalcifications),
    Finding("fracture", "P0000004", ("fracture line",), 1.10, _fracture),
    Finding("spiculated mass", "P0000005", ("stellate mass",), 1.05, _spiculated_mass),
    Finding("honeycombing", "P0000006", ("honeycomb pattern",), 1.10, _honeycombing),
    Finding("linear scarring", "P0000007", ("fibrotic bands",), 1.05, _linear_scarring),
    Finding("consolidation", "P0000008", ("airspace opacity",), 1.20, _consolidation),
    Finding("surgical clip", "P0000009", ("metallic clip",), 0.90, _surgical_clip),
    Finding("crescentic hematoma", "P0000010", ("crescent-shaped hematoma",), 1.05, _crescentic_hematoma),
)
