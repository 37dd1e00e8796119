"""Findings of the drawn torsos: where they lie, how they look, and what CT-RATE calls them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medclip_hf.data.phantoms.torso_canvas import Canvas, Course, Heart, lung_depth

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Lesion:
    """One lesion of a finding: what the drawing and the report need to know.

    Args:
        finding: a name of `FINDINGS`.
        side: "right", "left", "both" or "" where the organ is single.
        region: where in the organ, in words of a report; may be empty.
        centre_zyx: canonical millimetres.
        size_mm: what a report would measure; 0 where it would not.
        texture: seed of what else is random in it.
    """

    finding: str
    side: str
    region: str
    centre_zyx: tuple[float, float, float]
    size_mm: float
    texture: int


@dataclass(frozen=True)
class Finding:
    """One kind of finding.

    Args:
        anatomy: where fVLM looks for it.
        ct_rate_name: its column among CT-RATE's labels; None where CT-RATE has none.
        is_chronic: stays with a patient from one study to the next.
        place: draws its lesions.
        draw: changes the canvas and marks the changed voxels in a mask.
    """

    anatomy: str
    ct_rate_name: str | None
    is_chronic: bool
    place: Callable[[np.random.Generator, str], tuple[Lesion, ...]]
    draw: Callable[[Canvas, Lesion, Mask, Heart, Course], None]


def place_findings(
    rng: np.random.Generator, names: Sequence[str], prevalence: float, is_chronic: bool
) -> tuple[Lesion, ...]:
    """Lesions of the findings among `names` that occur, each with the same probability and independently."""
    lesions: list[Lesion] = []
    for name, finding in FINDINGS.items():
        is_present = rng.random() < prevalence
        placed = finding.place(rng, name)  # always drawn: leaving a finding out does not move the others
        if is_present and finding.is_chronic == is_chronic and name in names:
            lesions.extend(placed)
    return tuple(lesions)


def draw_findings(canvas: Canvas, lesions: Sequence[Lesion], heart: Heart, aorta: Course) -> dict[str, Mask]:
    """Draw the lesions; gives back for each finding present the voxels that it changed, (D, H, W)."""
    masks: dict[str, Mask] = {}
    present = {lesion.finding for lesion in lesions}
    for name in FINDINGS:  # always in this order: what is drawn later covers what is drawn before
        if name not in present:
            continue
        masks[name] = np.zeros(canvas.hu.shape, dtype=bool)
        for lesion in lesions:
            if lesion.finding == name:
                FINDINGS[name].draw(canvas, lesion, masks[name], heart, aorta)
    return masks


def scale_of_heart(lesions: Sequence[Lesion]) -> float:
    """Size of the heart against the usual one: 1 without cardiomegaly."""
    return max((lesion.size_mm / 104.0 for lesion in lesions if lesion.finding == "cardiomegaly"), default=1.0)


# Places ---------------------------------------------------------------------------------------------------------------


def _texture(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _lobe(z: float, y: float, side: int) -> str:
    if z < 5 + 0.8 * y:
        return "lower lobe"
    return "middle lobe" if side == -1 and z < 12 else "upper lobe"


def _place_in_lung(rng: np.random.Generator, name: str, size_mm: float, depth: float, side: int = 0) -> Lesion:
    """A lesion whose centre lies deeper in a lung than `depth` (1 is its middle), away from the heart."""
    side = side or (1 if rng.random() < 0.5 else -1)
    while True:
        z, y, x = rng.uniform(-95, 95), rng.uniform(-60, 70), side * rng.uniform(50, 112)
        near_heart = z < 25 and y < 20 and x * side < (92 if side == 1 else 66)
        if lung_depth(z, y, x, side) > depth and not near_heart:
            word = "left" if side == 1 else "right"
            return Lesion(name, word, _lobe(z, y, side), (z, y, x), round(size_mm), _texture(rng))


def _place_nodules(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    return tuple(_place_in_lung(rng, name, rng.uniform(21, 30), 0.2) for _ in range(int(rng.integers(2, 6))))


def _place_consolidation(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    return (_place_in_lung(rng, name, rng.uniform(74, 104), 0.22),)


def _place_opacities(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    first = 1 if rng.random() < 0.5 else -1
    sides = [first * (-1) ** i for i in range(int(rng.integers(3, 7)))]
    return tuple(_place_in_lung(rng, name, rng.uniform(66, 96), 0.2, side) for side in sides)


def _place_atelectasis(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    side = 1 if rng.random() < 0.5 else -1
    z, y = float(rng.uniform(-62, -38)), float(rng.uniform(15, 45))
    centre = (z, y, side * float(rng.uniform(72, 92)))
    return (Lesion(name, "left" if side == 1 else "right", "lower lobe", centre, 0.0, _texture(rng)),)


def _place_both_lungs(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    return (Lesion(name, "both", "upper lobes", (0.0, 0.0, 0.0), 0.0, _texture(rng)),)


def _place_effusion(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    word = str(rng.choice(["right", "left", "both"]))
    thickness = float(rng.uniform(28, 55))
    return (Lesion(name, word, "", (0.0, 0.0, 0.0), round(thickness), _texture(rng)),)


def _place_cardiomegaly(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    return (Lesion(name, "", "", (0.0, 0.0, 0.0), round(float(rng.uniform(134, 148))), _texture(rng)),)


def _place_pericardial_effusion(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    return (Lesion(name, "", "", (0.0, 0.0, 0.0), round(float(rng.uniform(12, 19))), _texture(rng)),)


def _place_plain(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    return (Lesion(name, "", "", (0.0, 0.0, 0.0), 0.0, _texture(rng)),)


def _place_hernia(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    centre = (float(rng.uniform(-66, -54)), float(rng.uniform(26, 31)), float(rng.uniform(4, 16)))
    return (Lesion(name, "", "", centre, round(float(rng.uniform(52, 70))), _texture(rng)),)


def _place_liver_lesion(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    centre = (float(rng.uniform(-120, -95)), float(rng.uniform(-35, 40)), float(rng.uniform(-85, -45)))
    region = "right lobe" if centre[2] < -55 else "left lobe"
    return (Lesion(name, "", region, centre, round(float(rng.uniform(22, 42))), _texture(rng)),)


def _place_renal_cyst(rng: np.random.Generator, name: str) -> tuple[Lesion, ...]:
    side = 1 if rng.random() < 0.5 else -1
    centre = (-128.0 + float(rng.uniform(-8, 4)), 50.0 + float(rng.uniform(-6, 10)), side * 64.0)
    return (
        Lesion(name, "left" if side == 1 else "right", "", centre, round(float(rng.uniform(22, 34))), _texture(rng)),
    )


# Drawings -------------------------------------------------------------------------------------------------------------


def _lung_voxels(canvas: Canvas) -> Mask:
    return (canvas.labels >= 10) & (canvas.labels <= 14)


def _smooth_noise(canvas: Canvas, rng: np.random.Generator, box: tuple[slice, ...], scale_mm: float) -> NDArray:
    """Noise of mean 0 and deviation near 1 that changes over about `scale_mm`, for the voxels of a box."""
    shape = [part.stop - part.start for part in box]
    coarse = [max(2, round(n * step / scale_mm) + 2) for n, step in zip(shape, canvas.step, strict=True)]
    field = rng.standard_normal(coarse).astype(np.float32)
    zoomed = ndimage.zoom(field, [n / c for n, c in zip(shape, coarse, strict=True)], order=1, grid_mode=False)
    return zoomed * np.float32(1.6)  # interpolation takes about that much off


def _whole(canvas: Canvas) -> tuple[slice, slice, slice]:
    depth, height, width = canvas.hu.shape
    return slice(0, depth), slice(0, height), slice(0, width)


def _draw_nodule(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    radius = lesion.size_mm / 2
    canvas.blob(lesion.centre_zyx, (radius, radius, radius), 40.0, within=_lung_voxels(canvas), mask=mask)


def _draw_patch(canvas: Canvas, lesion: Lesion, mask: Mask, hu_of: Callable[[NDArray], NDArray]) -> None:
    """A region with a ragged border; `hu_of` gives the new intensities from the old ones."""
    rng = np.random.default_rng(lesion.texture)
    radius = lesion.size_mm / 2
    centre = np.asarray(lesion.centre_zyx)
    box = canvas.window(centre - 1.4 * radius, centre + 1.4 * radius)
    dz, dy, dx = canvas.offsets(box, centre)
    distance = np.sqrt(dz**2 + dy**2 + dx**2) / radius
    patch = (distance + 0.22 * _smooth_noise(canvas, rng, box, 12.0) < 1) & _lung_voxels(canvas)[box]
    canvas.hu[box] = np.where(patch, hu_of(canvas.hu[box]), canvas.hu[box])
    mask[box] |= patch


def _draw_consolidation(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    _draw_patch(canvas, lesion, mask, lambda hu: np.maximum(hu, 35.0))
    rng = np.random.default_rng([lesion.texture, 1])
    centre = np.asarray(lesion.centre_zyx)
    for _ in range(5):  # air bronchograms
        way = rng.normal(size=3)
        tip = centre + way / np.linalg.norm(way) * lesion.size_mm * 0.4
        canvas.tube(((centre, 3.0), (tip, 2.0)), -850.0, within=mask)


def _draw_opacity(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    _draw_patch(canvas, lesion, mask, lambda hu: np.where(hu < -600, 0.35 * hu - 270.0, hu))  # vessels stay visible


def _draw_atelectasis(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    rng = np.random.default_rng(lesion.texture)
    lung = _lung_voxels(canvas)
    centre = np.asarray(lesion.centre_zyx)
    box = canvas.window(centre - 48, centre + 48)
    normal = np.array((1.0, rng.uniform(-0.35, 0.35), rng.uniform(-0.35, 0.35)))
    normal /= np.linalg.norm(normal)
    dz, dy, dx = canvas.offsets(box, centre)
    height = dz * normal[0] + dy * normal[1] + dx * normal[2]
    flat = np.sqrt(np.maximum(dz**2 + dy**2 + dx**2 - height**2, 0))
    for offset in (-15.0, 4.0, 22.0):
        depth = np.minimum(rng.uniform(4.0, 5.5) - np.abs(height - offset), rng.uniform(36, 46) - flat)
        canvas.blend(box, np.clip(depth / 3 + 0.5, 0, 1), 15.0, within=lung, mask=mask)


def _draw_emphysema(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    rng = np.random.default_rng(lesion.texture)
    lung = _lung_voxels(canvas)
    canvas.hu[lung & (canvas.hu < -700)] -= 55.0
    for side in (1, -1):
        for _ in range(34):
            centre = (rng.uniform(5, 115), rng.uniform(-60, 65), side * rng.uniform(38, 118))
            radius = float(rng.uniform(6, 14))
            canvas.blob(centre, (radius, radius, radius), -1000.0, within=lung, mask=mask)


def _draw_mosaic(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    rng = np.random.default_rng(lesion.texture)
    bright = _smooth_noise(canvas, rng, _whole(canvas), 34.0) > 0
    lung = _lung_voxels(canvas) & (canvas.hu < -600)
    canvas.hu[lung & bright] += 135.0
    canvas.hu[lung & ~bright] -= 40.0  # air is trapped in the dark areas; the contrast of both is the finding
    mask |= lung


def _draw_effusion(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    lung = _lung_voxels(canvas)
    sides = {"left": (1,), "right": (-1,), "both": (1, -1)}[lesion.side]
    for side in sides:
        # Fluid gathers behind and below, its surface climbs towards the chest wall.
        surface = 88.0 - lesion.size_mm + 0.28 * (canvas.z + 60) - 0.0035 * (canvas.x - 60 * side) ** 2
        fluid = lung & (canvas.x * side > 0) & (canvas.y > surface) & (canvas.z < 75)
        canvas.paint(fluid, 8.0, 0)
        mask |= fluid


def _draw_cardiomegaly(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    box, depth = canvas.depth_in_heart(heart, margin_mm=0.0)  # the heart was drawn large already
    mask[box] |= depth > 0


def _draw_pericardial_effusion(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    box, depth = canvas.depth_in_heart(heart, margin_mm=lesion.size_mm + 8)
    labels = canvas.labels[box]
    free = (labels == 0) | ((labels >= 10) & (labels <= 14))
    chest = canvas.z[box[0]] > np.maximum(canvas.dome(1), canvas.dome(-1))[:, box[1], box[2]] - 12
    front = canvas.y[:, box[1]] < 30
    shell = (depth < -4) & (depth > -4 - lesion.size_mm) & free & chest & front & (canvas.hu[box] < 0)
    canvas.hu[box] = np.where(shell, 6.0, canvas.hu[box])
    canvas.labels[box][shell] = 0
    mask[box] |= shell


def _draw_coronary_calcification(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    rng = np.random.default_rng(lesion.texture)
    towards_front: NDArray[np.float64] = np.cross(heart.axis_zyx, np.array((0.0, 0.0, 1.0)))
    towards_front *= (1 if towards_front[1] < 0 else -1) / np.linalg.norm(towards_front)
    beside = np.cross(heart.axis_zyx, towards_front)
    for turn in (0.1, 1.3, -1.2):  # anterior, circumflex, right
        turn = turn + rng.uniform(-0.15, 0.15)
        across = np.cos(turn) * towards_front + np.sin(turn) * beside
        for angle in rng.uniform(0.55, 1.9, size=7):  # from the base of the heart towards its apex
            along = -np.cos(angle) * heart.radii_mm[0] * heart.axis_zyx
            point = heart.centre_zyx + along + np.sin(angle) * (heart.radii_mm[1] + 1) * across
            radius = float(rng.uniform(4.5, 6.5))
            canvas.blob(point, (1.5 * radius, radius, radius), float(rng.uniform(800, 1300)), mask=mask)


def _draw_hernia(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    centre = np.asarray(lesion.centre_zyx)
    radius = lesion.size_mm / 2
    free = (canvas.labels != 52) & ~((canvas.labels >= 26) & (canvas.labels <= 50))
    canvas.blob(centre, (radius, 0.72 * radius, radius), 42.0, within=free, mask=mask)
    inner = np.zeros_like(mask)
    canvas.blob(centre, (radius - 6, 0.72 * radius - 6, radius - 6), 15.0, within=free, mask=inner)
    canvas.paint(inner & (canvas.y < centre[1] - 3), -900.0)  # air rises in front of the fluid
    below = mask & (canvas.z < centre[0])
    canvas.labels[mask & ~below] = 15  # a segmenter calls its upper part esophagus
    canvas.labels[below] = 6


def _draw_wall_calcification(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    rng = np.random.default_rng(lesion.texture)
    for _ in range(int(rng.integers(14, 21))):
        i = int(rng.integers(2, len(aorta) - 2))
        share = rng.uniform()
        (start, start_radius), (end, end_radius) = aorta[i], aorta[i + 1]
        first, last = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
        radius = start_radius + share * (end_radius - start_radius)
        outward = np.cross(last - first, rng.normal(size=3))
        centre = first + share * (last - first) + outward / np.linalg.norm(outward) * radius
        _draw_plaque(
            canvas, centre, first, last, radius, float(rng.uniform(9, 14)), float(rng.uniform(650, 1100)), mask
        )


def _draw_plaque(
    canvas: Canvas,
    centre: NDArray[np.float64],
    first: NDArray[np.float64],
    last: NDArray[np.float64],
    vessel_radius: float,
    plaque_radius: float,
    hu: float,
    mask: Mask,
) -> None:
    """The part of a vessel's wall that lies within `plaque_radius` of a point of it."""
    box = canvas.window(centre - plaque_radius, centre + plaque_radius)
    depth = canvas.depth_in_segment(box, first, last, vessel_radius, vessel_radius)
    dz, dy, dx = canvas.offsets(box, centre)
    near = plaque_radius - np.sqrt(dz**2 + dy**2 + dx**2)
    coverage = np.clip(np.minimum(3.0 - np.abs(depth), near) / 3 + 0.5, 0, 1)
    canvas.blend(box, coverage.astype(np.float32), hu, mask=mask)


def _draw_liver_lesion(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    radius = lesion.size_mm / 2
    canvas.blob(lesion.centre_zyx, (radius, radius, radius), 4.0, within=canvas.labels == 5, mask=mask)


def _draw_renal_cyst(canvas: Canvas, lesion: Lesion, mask: Mask, heart: Heart, aorta: Course) -> None:
    radius = lesion.size_mm / 2
    free = (canvas.labels == 0) | (canvas.labels == 2) | (canvas.labels == 3)
    canvas.blob(lesion.centre_zyx, (radius, radius, radius), 3.0, within=free & (canvas.hu > -300), mask=mask)


FINDINGS: dict[str, Finding] = {
    "emphysema": Finding("lung", "Emphysema", True, _place_both_lungs, _draw_emphysema),
    "mosaic attenuation": Finding("lung", "Mosaic attenuation pattern", False, _place_both_lungs, _draw_mosaic),
    "ground-glass opacity": Finding("lung", "Lung opacity", False, _place_opacities, _draw_opacity),
    "consolidation": Finding("lung", "Consolidation", False, _place_consolidation, _draw_consolidation),
    "atelectasis": Finding("lung", "Atelectasis", False, _place_atelectasis, _draw_atelectasis),
    "lung nodule": Finding("lung", "Lung nodule", True, _place_nodules, _draw_nodule),
    "pleural effusion": Finding("lung", "Pleural effusion", False, _place_effusion, _draw_effusion),
    "cardiomegaly": Finding("heart", "Cardiomegaly", True, _place_cardiomegaly, _draw_cardiomegaly),
    "pericardial effusion": Finding(
        "heart", "Pericardial effusion", False, _place_pericardial_effusion, _draw_pericardial_effusion
    ),
    "hiatal hernia": Finding("esophagus", "Hiatal hernia", True, _place_hernia, _draw_hernia),
    "coronary calcification": Finding(
        "heart", "Coronary artery wall calcification", True, _place_plain, _draw_coronary_calcification
    ),
    "aortic wall calcification": Finding(
        "aorta", "Arterial wall calcification", True, _place_plain, _draw_wall_calcification
    ),
    "liver lesion": Finding("liver", None, True, _place_liver_lesion, _draw_liver_lesion),
    "renal cyst": Finding("kidney", None, True, _place_renal_cyst, _draw_renal_cyst),
}
