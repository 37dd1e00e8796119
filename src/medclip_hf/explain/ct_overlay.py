"""CT as pictures: the slices on which to look, the outline of the anatomy that was scored, maps on three planes."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from medclip_hf.explain.overlay import draw_colour_bar, drawn, overlay_map

Pixels = NDArray[np.uint8]

DISPLAY_WINDOW_HU = (-1150.0, 350.0)  # the published model's own: lungs and soft tissue in one picture
ANATOMY_COLOUR, FINDING_COLOUR = "#00e5ff", "#ffd400"
# Of the anatomy and the finding, which may share a border.
_STYLES: tuple[Literal["solid", "dashed"], ...] = ("solid", "dashed")
_VIEW_INCHES, _MAX_VIEW_RATIO, _DPI = 3.6, 2.0, 110  # width of a view, and its height against that at most
_AXIAL, _CORONAL, _SAGITTAL = 0, 1, 2  # the axis that a view is a slice of
_PLANES = {_AXIAL: "axial", _CORONAL: "coronal", _SAGITTAL: "sagittal"}
_SIDES = {_AXIAL: ("R", "L"), _CORONAL: ("R", "L"), _SAGITTAL: ("A", "P")}
_CROSS_COLOUR = "#ffffff"


@dataclass(frozen=True)
class ScoredFinding:
    """A finding in a scan and what the model says of it.

    Args:
        name: of the finding.
        anatomy: name of the anatomy that was scored.
        probability: in [0, 1]; None where the anatomy does not occur.
        is_present: the truth, where it is known.
    """

    name: str
    anatomy: str
    probability: float | None
    is_present: bool | None = None

    def headline(self) -> str:
        """What stands above the picture."""
        score = "not scored" if self.probability is None else f"probability {self.probability:.2f}"
        truth = {True: ", truth: present", False: ", truth: absent", None: ""}[self.is_present]
        return f"{self.name} ({self.anatomy}): {score}{truth}"


def draw_ct_finding(
    image_hu: NDArray[np.generic],
    anatomy: NDArray[np.bool_],
    finding: ScoredFinding,
    *,
    spacing_mm_dhw: Sequence[float],
    finding_mask: NDArray[np.bool_] | None = None,
    window_hu: tuple[float, float] = DISPLAY_WINDOW_HU,
) -> Pixels:
    """A drawing (h, w, 3), uint8: an axial and a coronal slice with the anatomy's outline, and score and truth above.

    The slices are those through most of the finding where its mask is given, else of the anatomy, else of the middle.
    As radiologists look: from the feet, and from the front, the patient's right on the left.

    Args:
        image_hu: (D, H, W) in LPS orientation, Hounsfield units.
        anatomy: (D, H, W), the anatomy that was scored.
        finding: named and scored.
        spacing_mm_dhw: voxel size.
        finding_mask: (D, H, W), where the finding is; drawn in another colour.
        window_hu: shown black and white.

    Raises:
        ValueError: arrays that do not share one grid, a window or spacing that makes no sense.
    """
    shape = _checked(image_hu, anatomy, finding_mask, spacing_mm_dhw, window_hu)
    guide = next((mask for mask in (finding_mask, anatomy) if mask is not None and mask.any()), np.ones(shape, bool))
    depth_mm, height_mm, width_mm = (
        size * step for size, step in zip(shape, (float(step) for step in spacing_mm_dhw), strict=True)
    )
    height_inches = _VIEW_INCHES * min(max(height_mm, depth_mm) / width_mm, _MAX_VIEW_RATIO)
    figure = Figure(figsize=(2 * _VIEW_INCHES, height_inches + 0.9), dpi=_DPI, layout="constrained")
    tiles = figure.subplots(1, 2)
    for tile, axis, name in zip(tiles, (_AXIAL, _CORONAL), ("axial", "coronal"), strict=True):
        place = best_slice(guide, axis)
        _show_slice(tile, _view(image_hu, axis, place), _view_extent_mm(shape, spacing_mm_dhw, axis), window_hu)
        tile.set_title(f"{name} slice {place + 1} of {shape[axis]}", fontsize=9)
        extent = _view_extent_mm(shape, spacing_mm_dhw, axis)
        _outline(tile, _view(anatomy, axis, place), extent, ANATOMY_COLOUR, _STYLES[0])
        if finding_mask is not None:
            _outline(tile, _view(finding_mask, axis, place), extent, FINDING_COLOUR, _STYLES[1])
    figure.suptitle(textwrap.fill(finding.headline(), 76), fontsize=11, parse_math=False)
    _legend(figure, finding, finding_mask is not None)
    return drawn(figure)


def draw_ct_map(
    image_hu: NDArray[np.generic],
    values: NDArray[np.generic],
    *,
    spacing_mm_dhw: Sequence[float],
    title: str,
    value_label: str = "similarity",
    value_range: tuple[float, float] | None = None,
    outline: NDArray[np.bool_] | None = None,
    window_hu: tuple[float, float] = DISPLAY_WINDOW_HU,
) -> Pixels:
    """A drawing (h, w, 3), uint8: a map over three planes through its highest value; below, maximum projections.

    Below stand the greatest values along each axis, of the scan and of the map apart: what is bright there lies
    somewhere on the line of sight. As radiologists look: from the feet, from the front, from the patient's left.

    Args:
        image_hu: (D, H, W) in LPS orientation, Hounsfield units.
        values: (D, H, W), or coarser where it covers the same box (a patch grid): brought to the scan's grid
            trilinearly.
        spacing_mm_dhw: voxel size of the scan.
        title: above.
        value_label: what the colour bar measures.
        value_range: values drawn transparent and fully; None: least and greatest of this map.
        outline: (D, H, W), drawn on the planes (the anatomy, the true region), or None.
        window_hu: shown black and white.

    Raises:
        ValueError: arrays that do not fit, a map that is not finite, a window, range or spacing that makes no sense.
    """
    shape = _checked(image_hu, np.ones(image_hu.shape, bool), outline, spacing_mm_dhw, window_hu)
    fine = _on_scan_grid(values, shape)
    # A flat map stays transparent, as in overlay_map.
    low, high = value_range or (float(fine.min()), float(fine.max()) if np.ptp(fine) > 0 else float(fine.min()) + 1.0)
    peak = tuple(int(place) for place in np.unravel_index(int(fine.argmax()), shape))
    figure, tiles = _lay_out_planes(shape, spacing_mm_dhw)
    for column, (axis, plane) in enumerate(_PLANES.items()):
        extent = _view_extent_mm(shape, spacing_mm_dhw, axis)
        upper, lower = tiles[:, column]
        sliced = [_view(array, axis, peak[axis]) for array in (image_hu, fine)]
        _show_map(upper, sliced[0], sliced[1], window_hu, (low, high), extent)
        upper.set_title(f"{plane} slice {peak[axis] + 1} of {shape[axis]}", fontsize=9)
        _cross(upper, peak, shape, axis, extent)
        if outline is not None:
            _outline(upper, _view(outline, axis, peak[axis]), extent, ANATOMY_COLOUR, _STYLES[0])
        projected = [_view(array.max(axis=axis, keepdims=True), axis, 0) for array in (image_hu, fine)]
        _show_map(lower, projected[0], projected[1], window_hu, (low, high), extent)
        lower.set_title(f"{plane} maximum projection", fontsize=9)
        for tile in (upper, lower):
            _letter_sides(tile, axis)
    figure.suptitle(textwrap.fill(title, 100), fontsize=11, parse_math=False)
    draw_colour_bar(figure, list(tiles.flat), (low, high), value_label)
    return drawn(figure)


def best_slice(mask: NDArray[np.bool_], axis: int) -> int:
    """The slice along an axis that holds most of a mask; of equal ones, the middle."""
    counts = np.asarray(mask, dtype=bool).sum(axis=tuple(other for other in range(mask.ndim) if other != axis))
    places = np.flatnonzero(counts == counts.max())
    return int(places[len(places) // 2])


def _checked(
    image_hu: NDArray[np.generic],
    anatomy: NDArray[np.bool_],
    finding_mask: NDArray[np.bool_] | None,
    spacing_mm_dhw: Sequence[float],
    window_hu: tuple[float, float],
) -> tuple[int, int, int]:
    masks = [mask for mask in (anatomy, finding_mask) if mask is not None]
    if image_hu.ndim != 3 or 0 in image_hu.shape or any(mask.shape != image_hu.shape for mask in masks):
        shapes = [image_hu.shape, *(mask.shape for mask in masks)]
        raise ValueError(f"image and masks must be (depth, height, width) on one grid, got shapes {shapes}")
    if not window_hu[0] < window_hu[1]:
        raise ValueError(f"window_hu must be (lowest, highest), got {window_hu}")
    if len(spacing_mm_dhw) != 3 or min(spacing_mm_dhw) <= 0:
        raise ValueError(f"spacing_mm_dhw must be three positive numbers of millimetres, got {spacing_mm_dhw}")
    depth, height, width = image_hu.shape
    return depth, height, width


def _view(volume: NDArray[np.generic], axis: int, place: int) -> NDArray[np.generic]:
    """A slice with its rows from top to bottom: front to back for axial ones, head to feet for the others."""
    if axis == _AXIAL:
        return volume[place]
    return volume[::-1, place] if axis == _CORONAL else volume[::-1, :, place]


def _view_extent_mm(
    shape: tuple[int, int, int], spacing_mm_dhw: Sequence[float], axis: int
) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) of a view, rows growing downwards."""
    rows = 1 if axis == _AXIAL else 0
    columns = 1 if axis == _SAGITTAL else 2
    return 0.0, shape[columns] * float(spacing_mm_dhw[columns]), shape[rows] * float(spacing_mm_dhw[rows]), 0.0


def _show_slice(
    tile: Axes, pixels: NDArray[np.generic], extent: tuple[float, float, float, float], window: tuple[float, float]
) -> None:
    tile.imshow(pixels, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="antialiased")
    tile.set_axis_off()
    _letter_sides(tile, _AXIAL)


def _letter_sides(tile: Axes, axis: int) -> None:
    for letter, place, side in zip(_SIDES[axis], (0.02, 0.98), ("left", "right"), strict=True):
        tile.text(place, 0.97, letter, color="white", fontsize=9, ha=side, va="top", transform=tile.transAxes)


def _lay_out_planes(shape: tuple[int, int, int], spacing_mm_dhw: Sequence[float]) -> tuple[Figure, NDArray[Any]]:
    """Two rows of tiles, as wide as the planes are in millimetres."""
    depth_mm, height_mm, width_mm = (size * float(step) for size, step in zip(shape, spacing_mm_dhw, strict=True))
    widths = [width_mm, width_mm, height_mm]
    inches = _VIEW_INCHES * min(max(height_mm, depth_mm) / max(widths), _MAX_VIEW_RATIO)
    figure = Figure(figsize=(3 * _VIEW_INCHES + 0.8, 2 * inches + 1.3), dpi=_DPI, layout="constrained")
    return figure, figure.subplots(2, 3, width_ratios=widths)


def _on_scan_grid(values: NDArray[np.generic], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    coarse = np.asarray(values, dtype=np.float32)
    if coarse.ndim != 3 or 0 in coarse.shape or any(few > many for few, many in zip(coarse.shape, shape, strict=True)):
        raise ValueError(f"the map must be (depth, height, width), at most the scan's {shape}, got {coarse.shape}")
    if not np.isfinite(coarse).all():
        raise ValueError("the map holds values that are not finite")
    if coarse.shape == shape:
        return coarse
    grown = torch.nn.functional.interpolate(torch.from_numpy(coarse)[None, None], size=shape, mode="trilinear")
    return np.asarray(grown[0, 0].numpy())


def _show_map(
    tile: Axes,
    pixels: NDArray[np.generic],
    values: NDArray[np.generic],
    window: tuple[float, float],
    value_range: tuple[float, float],
    extent: tuple[float, float, float, float],
) -> None:
    grey = np.clip((pixels.astype(np.float32) - window[0]) / (window[1] - window[0]), 0.0, 1.0)
    map_slice = np.ascontiguousarray(values)  # views from head to feet run backwards, which torch does not take
    picture = overlay_map(np.rint(255.0 * grey).astype(np.uint8), map_slice, value_range=value_range)
    tile.imshow(picture, extent=extent, interpolation="antialiased")
    tile.set_axis_off()


def _cross(
    tile: Axes,
    peak: tuple[int, ...],
    shape: tuple[int, int, int],
    axis: int,
    extent: tuple[float, float, float, float],
) -> None:
    """Thin lines through the peak, with a gap around it."""
    rows, columns = 1 if axis == _AXIAL else 0, 1 if axis == _SAGITTAL else 2
    left, right, bottom, top = extent
    x = left + (peak[columns] + 0.5) / shape[columns] * (right - left)
    share = (peak[rows] + 0.5) / shape[rows]
    y = top + (share if axis == _AXIAL else 1.0 - share) * (bottom - top)
    gap = 0.06 * (right - left)
    style: dict[str, Any] = {"color": _CROSS_COLOUR, "linewidth": 0.7, "alpha": 0.8}
    for start, end in ((left, x - gap), (x + gap, right)):
        if start < end:
            tile.plot([start, end], [y, y], **style)
    for start, end in ((top, y - gap), (y + gap, bottom)):
        if start < end:
            tile.plot([x, x], [start, end], **style)
    tile.set_xlim(left, right)
    tile.set_ylim(bottom, top)


def _outline(
    tile: Axes, mask: NDArray[np.generic], extent: tuple[float, float, float, float], colour: str, style: str
) -> None:
    """The border of a mask in colour, a solid one on black, so that it shows on any ground and below a dashed one."""
    if not mask.any():
        return
    rows, columns = mask.shape
    left, right, bottom, top = extent
    padded = np.pad(mask.astype(np.float32), 1)  # so that what reaches the border is closed
    x = left + (np.arange(-1, columns + 1) + 0.5) * (right - left) / columns
    y = top + (np.arange(-1, rows + 1) + 0.5) * (bottom - top) / rows
    for shade, width in (("#000000", 2.4), (colour, 1.3)) if style == "solid" else ((colour, 1.3),):
        tile.contour(x, y, padded, levels=[0.5], colors=[shade], linewidths=[width], linestyles=[style])
    tile.set_xlim(left, right)
    tile.set_ylim(bottom, top)


def _legend(figure: Figure, finding: ScoredFinding, has_finding_mask: bool) -> None:
    entries = [(ANATOMY_COLOUR, finding.anatomy)]
    if has_finding_mask:
        entries.append((FINDING_COLOUR, "true region of the finding"))
    lines = [
        Line2D([], [], color=colour, linestyle=style) for (colour, _), style in zip(entries, _STYLES, strict=False)
    ]
    figure.legend(lines, [name for _, name in entries], loc="outside lower center", ncols=len(entries), fontsize=8)
