"""Concept maps laid over the picture they belong to, as arrays and as PNG."""

import io
import textwrap
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray
from PIL import Image

COLOUR_MAP = "inferno"  # perceptually uniform, and ordered in grey and for colour-blind readers
MAX_OPACITY = 0.75
_PNG_LEVEL = 3  # of zlib: a third of the time of the usual 6, an eighth more bytes
_SHARPNESS = 2.0  # pixels of a picture for each pixel of the tile in which it is drawn, at most
_ROWS_AT_ONCE = 32  # of a picture under a map: what is computed of them stays near the processor
_BACKDROP = 0.5  # grey behind the colours of the bar
_OUTLINE_COLOURS = ("#00e5ff", "#000000")  # line and its border: visible on any picture
TILE_INCHES, _DPI, _MAX_COLUMNS = 2.4, 130, 5
# Okabe and Ito, 2008, without black: told apart by colour-blind readers.
_BOX_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_BOXES_INCHES = 5.0
_MAX_ASPECT = 2.0  # of a tile
_NEAR = 0.05  # of the picture's width: corners whose numbers would cover each other

Pixels = NDArray[np.uint8]


def overlay_map(
    image: Image.Image | ArrayLike,
    concept_map: ArrayLike | torch.Tensor,
    *,
    value_range: tuple[float, float] | None = None,
    max_opacity: float = MAX_OPACITY,
) -> Pixels:
    """The picture (H, W, 3), uint8, with a map over it: the higher the value, the brighter and the more opaque.

    Args:
        image: PIL image, or (H, W), (H, W, 3) uint8.
        concept_map: (rows, columns), one value per patch; brought to the picture's size bilinearly.
        value_range: values drawn transparent and fully; None: least and greatest of this map. Give the same range to
            maps that are to be compared.
        max_opacity: of the greatest value, in [0, 1].

    Raises:
        ValueError: a picture or map of another shape, a map that is not finite, a range that is not rising.
    """
    pixels, values = _as_rgb(image), _as_maps(concept_map, is_stack=False)[0]
    if not 0.0 <= max_opacity <= 1.0:
        raise ValueError(f"max_opacity must lie in [0, 1], got {max_opacity}")
    low, high = _checked_range(values, value_range)
    upsampled = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size=pixels.shape[:2], mode="bilinear", align_corners=False
    )[0, 0].numpy()
    blended = np.empty_like(pixels)
    for first in range(0, len(pixels), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        share = np.clip((upsampled[rows] - low) / (high - low), 0.0, 1.0)
        blended[rows] = _blend(pixels[rows].astype(np.float32) / 255.0, share, max_opacity)
    return blended


def draw_concept_panel(
    image: Image.Image | ArrayLike,
    concept_maps: ArrayLike | torch.Tensor,
    concept_names: Sequence[str],
    *,
    outlines: Sequence[ArrayLike | None] | None = None,
    value_range: tuple[float, float] | None = None,
    value_label: str = "cosine similarity",
    title: str = "",
    tile_inches: float = TILE_INCHES,
) -> Pixels:
    """A drawing (h, w, 3), uint8: the picture, then one tile per concept with its name, and a colour bar.

    All tiles share one range, so a concept that is not in the picture stays pale beside one that is.

    Args:
        image: PIL image, or (H, W), (H, W, 3) uint8.
        concept_maps: (C, rows, columns), as `get_concept_maps` gives them for one image.
        concept_names: C names; long ones are wrapped.
        outlines: per concept a mask (H, W) whose border is drawn (the true region, a reader's contour), or None.
        value_range: of the colours; None: least and greatest value of all maps.
        value_label: what the colour bar measures.
        title: above everything; may be empty.
        tile_inches: height of a tile at 130 pixels an inch; more for a picture with small detail, such as a slide.

    Raises:
        ValueError: as `overlay_map`; numbers of maps, names and outlines that differ.
    """
    pixels, maps = _as_rgb(image), _as_maps(concept_maps)
    masks = list(outlines) if outlines is not None else [None] * len(maps)
    if not len(maps) == len(concept_names) == len(masks):
        raise ValueError(f"got {len(maps)} maps, {len(concept_names)} names and {len(masks)} outlines")
    low, high = _checked_range(maps, value_range)
    figure, tiles = _lay_out(len(maps), pixels.shape[1] / pixels.shape[0], title, tile_inches)
    small, size = _reduced(pixels, tile_inches), (pixels.shape[0], pixels.shape[1])
    _show(tiles[0], small, "image", size)
    for tile, values, name, mask in zip(tiles[1 : len(maps) + 1], maps, concept_names, masks, strict=True):
        _show(tile, overlay_map(small, values, value_range=(low, high)), name, size)
        if mask is not None:
            _draw_outline(tile, np.asarray(mask, dtype=bool), pixels, name)
    draw_colour_bar(figure, tiles, (low, high), value_label)
    return drawn(figure)


def draw_boxes(
    image: Image.Image | ArrayLike,
    boxes: Sequence[tuple[int, int, int, int]],
    names: Sequence[str],
    *,
    title: str = "",
) -> Pixels:
    """A drawing (h, w, 3), uint8: the picture with numbered boxes, and beside it which number is what.

    Args:
        image: PIL image, or (H, W), (H, W, 3) uint8.
        boxes: (left, top, right, bottom) in pixels of the picture, right and bottom exclusive.
        names: one per box, in the order they are numbered.
        title: above everything; may be empty.

    Raises:
        ValueError: a picture of another shape, a number of names that differs, a box outside the picture.
    """
    pixels = _as_rgb(image)
    height, width = pixels.shape[:2]
    if len(boxes) != len(names):
        raise ValueError(f"got {len(boxes)} boxes and {len(names)} names")
    for left, top, right, bottom in boxes:
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"box {(left, top, right, bottom)} does not lie in a picture of {width} × {height} pixels")
    tall = _BOXES_INCHES * min(max(height / width, 0.4), 2.5)
    figure = Figure(figsize=(_BOXES_INCHES + 3.0, tall + (0.5 if title else 0.1)), dpi=_DPI, layout="constrained")
    tile, legend = figure.subplots(1, 2, width_ratios=(_BOXES_INCHES, 3.0))
    _show(tile, _reduced(pixels, tall), "", (height, width))
    for axes in (tile, legend):
        axes.set_axis_off()
    if title:
        figure.suptitle(textwrap.fill(title, 80), fontsize=11, parse_math=False)
    step = min(0.09, 1.0 / max(len(names), 1))
    corners: list[tuple[int, int]] = []
    for number, ((left, top, right, bottom), name) in enumerate(zip(boxes, names, strict=True), 1):
        colour = _BOX_COLOURS[(number - 1) % len(_BOX_COLOURS)]
        for line_colour, line_width in (("#000000", 3.2), (colour, 1.8)):
            x, y = left - 0.5, top - 0.5
            tile.add_patch(
                Rectangle((x, y), right - left, bottom - top, fill=False, edgecolor=line_colour, linewidth=line_width)
            )
        # Side by side where corners are near, so that each keeps its number; from the corner that is further from the
        # picture's border, so that they stay on the picture.
        corner, direction = ((left, top), 1) if left < 0.5 * width else ((right, top), -1)
        near = [one for one in corners if np.hypot(*np.subtract(one, corner)) < _NEAR * width]
        corners.append(corner)
        across = direction * (len(near) * 16 + 8)
        down = -8 if top < 0.9 * height else 8
        tile.annotate(
            str(number), corner, xytext=(across, down), textcoords="offset points", **_tag(colour), fontsize=8
        )
        line = 1.0 - (number - 0.5) * step
        legend.text(0.0, line, str(number), transform=legend.transAxes, **_tag(colour), fontsize=9)
        text = textwrap.shorten(name, 44, placeholder=" …")
        legend.text(0.1, line, text, transform=legend.transAxes, va="center", fontsize=9, parse_math=False)
    return drawn(figure)


def _tag(colour: str) -> dict[str, Any]:
    """How a box's number is written."""
    frame = {"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "#000000", "linewidth": 0.5}
    return {"ha": "center", "va": "center", "color": "#000000", "bbox": frame}


def drawn(figure: Figure) -> Pixels:
    """A figure as pixels (h, w, 3), uint8."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; tables and JSON hold the name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def encode_png(pixels: ArrayLike) -> bytes:
    """The bytes of a PNG file of (H, W, 3) or (H, W), uint8."""
    buffer = io.BytesIO()
    Image.fromarray(_as_rgb(pixels)).save(buffer, format="PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def save_png(pixels: ArrayLike, path: str | Path) -> Path:
    """Path of the PNG written; its folder is made if missing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(encode_png(pixels))
    return target


def _blend(picture: NDArray[np.float32], share: NDArray[np.float32], max_opacity: float) -> Pixels:
    colours = _palette()[np.minimum((share * 256.0).astype(np.uint16), 255)]
    opacity = (max_opacity * share)[..., None]
    return np.rint(255.0 * (picture * (1.0 - opacity) + colours * opacity)).astype(np.uint8)


@lru_cache(maxsize=1)
def _palette() -> NDArray[np.float32]:
    """(256, 3) of the map's colours, from the least value to the greatest."""
    return matplotlib.colormaps[COLOUR_MAP](np.arange(256))[:, :3].astype(np.float32)


def _lay_out(num_maps: int, aspect: float, title: str, tile_inches: float) -> tuple[Figure, list[Any]]:
    rows = -(-(num_maps + 1) // _MAX_COLUMNS)
    columns = -(-(num_maps + 1) // rows)
    tile_width = tile_inches * min(max(aspect, 0.4), _MAX_ASPECT)
    # Of a wide strip, so that its names stay legible beside it, and the bar has room for its label.
    tile_height = min(tile_inches, max(tile_width / aspect, 0.6 * TILE_INCHES))
    width, height = columns * tile_width + 1.1, rows * (tile_height + 0.6)
    figure = Figure(figsize=(width, height + (0.4 if title else 0.0)), dpi=_DPI, layout="constrained")
    tiles = list(figure.subplots(rows, columns, squeeze=False).flat)
    for tile in tiles:
        tile.set_axis_off()
    if title:
        figure.suptitle(textwrap.fill(title, 22 * columns), fontsize=11, parse_math=False)
    return figure, tiles


def _reduced(pixels: Pixels, inches: float) -> Pixels:
    """A picture of no more pixels than a drawing of that height can show: a slide has ten times as many."""
    scale = _SHARPNESS * inches * _DPI / max(pixels.shape[:2])
    if scale >= 1.0:
        return pixels
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))


def _show(tile: Any, pixels: Pixels, name: str, size_hw: tuple[int, int]) -> None:
    """Draw a picture, which may be reduced, so that its places are those of its full size."""
    interpolation = "nearest" if min(size_hw) < 200 else "antialiased"
    tile.imshow(pixels, interpolation=interpolation, extent=(-0.5, size_hw[1] - 0.5, size_hw[0] - 0.5, -0.5))
    tile.set_title(textwrap.fill(name, 24) or " ", fontsize=10, parse_math=False)


def _draw_outline(tile: Any, mask: NDArray[np.bool_], pixels: Pixels, name: str) -> None:
    if mask.shape != pixels.shape[:2]:
        raise ValueError(f"the outline of {name!r} has shape {mask.shape}, the picture {pixels.shape[:2]}")
    if mask.any() and not mask.all():
        padded = np.pad(mask.astype(np.float32), 1)  # so that a region at the border is closed
        x, y = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
        for colour, line_width in zip(reversed(_OUTLINE_COLOURS), (2.6, 1.3), strict=True):
            tile.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=[line_width])
        tile.set_xlim(-0.5, mask.shape[1] - 0.5)
        tile.set_ylim(mask.shape[0] - 0.5, -0.5)


def draw_colour_bar(figure: Figure, tiles: list[Any], value_range: tuple[float, float], label: str) -> None:
    """Put the colours of the maps beside the tiles, with the values that they stand for."""
    share = np.linspace(0.0, 1.0, 256, dtype=np.float32)[None]
    shown = _blend(np.full((1, 256, 3), _BACKDROP, np.float32), share, MAX_OPACITY)[0] / 255.0
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(*value_range), ListedColormap(shown))
    bar = figure.colorbar(scale, ax=tiles, shrink=0.85, pad=0.02, aspect=25)
    bar.set_label(label, fontsize=10)
    bar.ax.tick_params(labelsize=9)


def _as_rgb(image: Image.Image | ArrayLike) -> Pixels:
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(f"expected a picture (H, W) or (H, W, 3) of uint8, got {pixels.dtype} of shape {pixels.shape}")
    return pixels


def _as_maps(concept_maps: ArrayLike | torch.Tensor, is_stack: bool = True) -> NDArray[np.float32]:
    if isinstance(concept_maps, torch.Tensor):
        concept_maps = concept_maps.detach().float().cpu().numpy()
    maps = np.asarray(concept_maps, dtype=np.float32)
    if maps.ndim != (3 if is_stack else 2) or 0 in maps.shape:
        axes = "at least one map, stacked (C, rows, columns)" if is_stack else "one map (rows, columns)"
        raise ValueError(f"expected {axes}, got shape {maps.shape}")
    maps = maps if is_stack else maps[None]
    if not np.isfinite(maps).all():
        raise ValueError("a concept map holds values that are not finite")
    return maps


def _checked_range(maps: NDArray[np.float32], value_range: tuple[float, float] | None) -> tuple[float, float]:
    if value_range is None:
        low, high = float(maps.min()), float(maps.max())
        return low, high if high > low else low + 1.0  # a flat map stays transparent
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range must rise, got {value_range}")
    return float(low), float(high)
