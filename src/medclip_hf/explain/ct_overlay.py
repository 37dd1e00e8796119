"""CT findings as pictures: the slices on which to look, the outline of the anatomy that was scored, the score."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

DISPLAY_WINDOW_HU = (-1150.0, 350.0)  # the published model's own: lungs and soft tissue in one picture
ANATOMY_COLOUR, FINDING_COLOUR = "#00e5ff", "#ffd400"
# Of the anatomy and the finding, which may share a border.
_STYLES: tuple[Literal["solid", "dashed"], ...] = ("solid", "dashed")
_VIEW_INCHES, _MAX_VIEW_RATIO, _DPI = 3.6, 2.0, 110  # width of a view, and its height against that at most
_AXIAL, _CORONAL = 0, 1  # the axis that a view is a slice of


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
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


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
    """A slice with its rows from top to bottom: front to back for axial ones, head to feet for coronal ones."""
    return volume[place] if axis == _AXIAL else volume[::-1, place]


def _view_extent_mm(
    shape: tuple[int, int, int], spacing_mm_dhw: Sequence[float], axis: int
) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) of a view, rows growing downwards."""
    rows = 1 if axis == _AXIAL else 0
    return 0.0, shape[2] * float(spacing_mm_dhw[2]), shape[rows] * float(spacing_mm_dhw[rows]), 0.0


def _show_slice(
    tile: Axes, pixels: NDArray[np.generic], extent: tuple[float, float, float, float], window: tuple[float, float]
) -> None:
    tile.imshow(pixels, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="antialiased")
    tile.set_axis_off()
    for letter, place, side in (("R", 0.02, "left"), ("L", 0.98, "right")):
        tile.text(place, 0.97, letter, color="white", fontsize=9, ha=side, va="top", transform=tile.transAxes)


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
