"""Slices of a CT as pictures, quick to draw: square millimetres, outlines of anatomies, the window of a finding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import markup
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_hf.explain.ct_overlay import DISPLAY_WINDOW_HU

AXIAL, CORONAL, SAGITTAL = 0, 1, 2  # the axis that a plane is a slice of
PLANES = {AXIAL: "Axial", CORONAL: "Coronal", SAGITTAL: "Sagittal"}
SIDES = {AXIAL: ("R", "L"), CORONAL: ("R", "L"), SAGITTAL: ("A", "P")}
HU_WINDOWS = {
    "As the model sees": DISPLAY_WINDOW_HU,
    "Lung": (-1350.0, 150.0),
    "Soft tissue": (-160.0, 240.0),
    "Bone": (-450.0, 1050.0),
}
# Okabe and Ito, 2008: told apart by colour-blind readers.
ANATOMY_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")
_VIEW_SIDE = 440  # pixels of the longer side of a slice
_DASH = 8

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # [start, end) along depth, height and width


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan as it is shown: on its own grid, not on the model's.

    Args:
        name: of the file.
        values: (D, H, W) in Hounsfield units, LPS.
        mask: (D, H, W), i + 1 = anatomy i; None where none came.
        affine: (4, 4), from the index (x, y, z) to RAS+ mm.
        spacing_mm_dhw: of the voxels.
        anatomies: names of the mask's ids.
        rows: what the pipeline said of each finding.
        drawn: findings that were drawn into an example; None for uploads.
    """

    name: str
    values: NDArray[Any]
    mask: NDArray[np.uint8] | None
    affine: NDArray[np.float64]
    spacing_mm_dhw: tuple[float, float, float]
    anatomies: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    drawn: tuple[str, ...] | None = None


def plane_picture(scan: Scan, axis: int, place: int, window: str, has_outlines: bool, box: Box | None, alt: str) -> str:
    """HTML of one slice, as radiologists look: from the feet, from the front, from the patient's left."""
    place = min(max(int(place), 0), scan.values.shape[axis] - 1)
    pixels = _grey(_slice(scan.values, axis, place), HU_WINDOWS.get(window, DISPLAY_WINDOW_HU))
    height, width = _size_of_view(scan, axis)
    shown = np.asarray(Image.fromarray(pixels).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)).copy()
    if has_outlines and scan.mask is not None:
        ids = _slice(scan.mask, axis, place)
        large = np.asarray(Image.fromarray(np.ascontiguousarray(ids)).resize((width, height), Image.Resampling.NEAREST))
        _draw_outlines(shown, large)
    if box is not None and box[axis][0] <= place < box[axis][1]:
        _draw_box(shown, _box_in_view(box, scan.values.shape, axis))
    left, right = SIDES[axis]
    letters = f'<span class="mc-side mc-left">{left}</span><span class="mc-side mc-right">{right}</span>'
    caption = f"{PLANES[axis]} slice {place + 1} of {scan.values.shape[axis]}"
    return markup.picture(shown, f"{caption}. {alt}", extra=letters)


def box_on_grid(window: Mapping[str, Any], scan: Scan) -> Box:
    """The window of a finding, which is told on the model's grid, on the grid of the scan that is shown."""
    if window.get("affine") is None:
        raise ValueError("the window has no place in the patient: it was made of an array, not of a file.")
    starts = np.array(window["start_dhw"][::-1], float)  # (x, y, z)
    ends = starts + np.array(window["size_dhw"][::-1], float)
    corners = np.stack([starts - 0.5, ends - 0.5], axis=1)  # outer faces of the outermost voxels
    to_index = np.linalg.inv(scan.affine) @ np.asarray(window["affine"], float)
    places = (to_index[:3, :3] @ corners + to_index[:3, 3:]) + 0.5
    low, high = np.floor(places.min(axis=1) + 0.5)[::-1], np.floor(places.max(axis=1) + 0.5)[::-1]
    (d, h, w) = (
        (max(0, int(first)), min(size, max(int(last), int(first) + 1)))
        for first, last, size in zip(low, high, scan.values.shape, strict=True)
    )
    return d, h, w


def colours_of(anatomies: Sequence[str]) -> list[tuple[str, str]]:
    """(colour, name) of each anatomy; colours come again where there are many."""
    return [(ANATOMY_COLOURS[place % len(ANATOMY_COLOURS)], name) for place, name in enumerate(anatomies)]


def _slice(volume: NDArray[Any], axis: int, place: int) -> NDArray[Any]:
    """Rows from top to bottom: front to back for axial slices, head to feet for the others."""
    if axis == AXIAL:
        return volume[place]
    return volume[::-1, place] if axis == CORONAL else volume[::-1, :, place]


def _grey(values: NDArray[Any], window: tuple[float, float]) -> NDArray[np.uint8]:
    low, high = window
    return (np.clip((values.astype(np.float32) - low) / (high - low), 0.0, 1.0) * 255.0).astype(np.uint8)


def _size_of_view(scan: Scan, axis: int) -> tuple[int, int]:
    """(height, width) in pixels: millimetres are square."""
    depth, height, width = (size * step for size, step in zip(scan.values.shape, scan.spacing_mm_dhw, strict=True))
    rows, columns = (height, width) if axis == AXIAL else (depth, width if axis == CORONAL else height)
    scale = _VIEW_SIDE / max(rows, columns)
    return max(1, round(rows * scale)), max(1, round(columns * scale))


def _draw_outlines(shown: NDArray[np.uint8], ids: NDArray[np.uint8]) -> None:
    """The inner border of each anatomy, two pixels wide."""
    border = np.zeros(ids.shape, bool)
    for step in (1, 2):
        for axis in (0, 1):
            for shift in (step, -step):
                border |= np.roll(ids, shift, axis) != ids
    border &= ids > 0
    table = np.array([[0, 0, 0], *[_rgb(ANATOMY_COLOURS[i % len(ANATOMY_COLOURS)]) for i in range(255)]], np.uint8)
    shown[border] = table[ids[border]]


def _box_in_view(box: Box, shape: tuple[int, ...], axis: int) -> tuple[float, float, float, float]:
    """(top, bottom, left, right) as shares of the view."""
    row_axis, column_axis = (1, 2) if axis == AXIAL else (0, 2 if axis == CORONAL else 1)
    top, bottom = (place / shape[row_axis] for place in box[row_axis])
    left, right = (place / shape[column_axis] for place in box[column_axis])
    return (top, bottom, left, right) if axis == AXIAL else (1.0 - bottom, 1.0 - top, left, right)


def _draw_box(shown: NDArray[np.uint8], shares: tuple[float, float, float, float]) -> None:
    """A dashed frame, white on black."""
    height, width = shown.shape[:2]
    top, bottom = (min(max(round(share * height), 0), height - 1) for share in shares[:2])
    left, right = (min(max(round(share * width), 0), width - 1) for share in shares[2:])
    rows, columns = np.arange(top, bottom + 1), np.arange(left, right + 1)
    for inset in (0, 1):
        for row in (min(top + inset, height - 1), max(bottom - inset, 0)):
            shown[row, columns] = _dashes(columns)
        for column in (min(left + inset, width - 1), max(right - inset, 0)):
            shown[rows, column] = _dashes(rows)


def _dashes(places: NDArray[np.int_]) -> NDArray[np.uint8]:
    is_white = (places // _DASH) % 2 == 0
    return np.where(is_white[:, None], np.uint8(255), np.uint8(0)).repeat(3, axis=1)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
