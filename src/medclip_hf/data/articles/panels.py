"""Compound figures taken apart: panels are found between their gutters, and paired with the parts of the caption.

A picture is cut along every row and column of pixels that has the colour of the background all along; what is cut is
trimmed and cut again, until nothing divides it. Gutters of white, of black and of the colour of the corners are tried.
Where the caption names more panels, pieces are also cut along seams: straight lines at which the picture changes almost
everywhere. Where the numbers of panels and of captions still differ, the figure is kept whole.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_hf.data.articles.panel_captions import names_panels, split_caption
from medclip_hf.data.images import MAX_PIXELS, UnreadableImage, decode_image, open_image
from medclip_hf.data.records import FigureRow

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last two exclusive

MAX_SIDE = 2000  # larger pictures are searched at reduced size; a gutter has 2 pixels there at least
COLOUR_TOLERANCE = 22  # of a white or black gutter's pixels in any channel: JPEG rings beside edges
CORNER_TOLERANCE = 10  # of a gutter that has the colour of the corners; even tissue varies more
MAX_FOREIGN_SHARE = 0.004  # of the pixels along a gutter that may have another colour
MIN_GUTTER = 2  # pixels
MIN_SIDE_SHARE = 0.06  # of the figure's side; smaller pieces are letters and titles
MIN_AREA_SHARE = 0.012  # of the figure
SEAM_STEP = 14  # grey levels between the two sides of a seam
SEAM_BLOCK = 8  # pixels along a seam that are averaged
SEAM_DEPTH = 4  # pixels beside a seam that are averaged
SEAM_REACH = 11  # pixels on either side that are looked at
MIN_SEAM_SHARE = 0.85  # of a seam along which the picture changes
MIN_SEAM_PROMINENCE = 0.4  # of that share over the usual one of lines in that direction
MIN_SEAM_SIDE_SHARE = 0.15  # of the figure's side, on either side of a seam
MIN_SIDE = 48  # pixels of a panel worth keeping
_MAX_DEPTH = 6
JPEG_QUALITY = 95
_MODES = ("RGB", "RGBA", "L", "LA", "P", "I;16", "1", "CMYK", "YCbCr")  # a part of others would lose their range
_PNG_MODES = ("RGB", "RGBA", "L", "LA", "P", "I;16", "1")


@dataclass(frozen=True)
class _Region:
    """A part of the picture still to be cut: rows and columns, ends exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def box(self) -> Box:
        return self.left, self.top, self.right, self.bottom


def find_panels(image: Image.Image, count: int | None = None) -> list[Box]:
    """The panels of a picture in reading order, rows first; the whole picture where nothing divides it.

    Args:
        image: decoded.
        count: of panels that the caption names. Where narrow gutters divide the picture into more, those at least
            so wide that `count` panels result are taken.
    """
    scale = max(1, -(-max(image.size) // MAX_SIDE))
    pixels = np.asarray(image.convert("RGB").reduce(scale) if scale > 1 else image.convert("RGB"))
    panels = _panels(pixels, count)
    width, height = image.size
    return [
        (left * scale, top * scale, min(right * scale, width), min(bottom * scale, height))
        for left, top, right, bottom in panels
    ]


def take_apart(row: FigureRow) -> Iterator[FigureRow]:
    """The panels of a figure as rows with their own captions, or the figure as it is.

    A figure whose caption names panels, but whose picture shows another number of them, or cannot be read, stays whole
    with `is_compound` set.

    Args:
        row: a figure with `image_bytes`.
    """
    parts = split_caption(row.caption)
    if not parts:
        yield replace(row, is_compound=row.is_compound or names_panels(row.caption))
        return
    try:
        image = decode_image(open_image(row.image_bytes or b"", row.row_id, MAX_PIXELS), row.row_id)
        boxes = find_panels(image, len(parts))
    except (UnreadableImage, ValueError, OSError):  # whoever looks at the picture next gives the reason
        yield replace(row, is_compound=True)
        return
    is_agreed = len(boxes) == len(parts) and min(min(box[2] - box[0], box[3] - box[1]) for box in boxes) >= MIN_SIDE
    if not is_agreed or image.mode not in _MODES or getattr(image, "n_frames", 1) > 1:
        yield replace(row, is_compound=True)
        return
    for part, box in zip(parts, boxes, strict=True):
        yield replace(
            row,
            row_id=f"{row.row_id}.{part.letter}",
            caption=part.text,
            image_bytes=_cropped(image, box),
            panel=part.letter,
        )


def _panels(pixels: NDArray[np.uint8], count: int | None) -> list[Box]:
    """Panels between gutters of the first colour that divides the picture, into `count` parts where that is given."""
    several: list[list[Box]] = []
    for colour, tolerance in _backgrounds(pixels):
        is_foreign = _differs(pixels, colour, tolerance)
        for boxes in _cuts(is_foreign, count):
            if len(boxes) == count:
                return boxes
            if len(boxes) > 1 and (count is None or colour.any()):
                several.append(boxes)
    boxes = several[0] if several else [(0, 0, pixels.shape[1], pixels.shape[0])]
    return boxes if count is None or len(boxes) > count else _cut_seams(pixels, boxes, count)


# --- cutting ----------------------------------------------------------------------------------------------------------


def _backgrounds(pixels: NDArray[np.uint8]) -> list[tuple[NDArray[np.int16], int]]:
    """Colours that gutters may have, with tolerance: white, that of the corners where three of them agree, black."""
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].astype(np.int16)
    white, black = np.full(3, 255, np.int16), np.zeros(3, np.int16)
    common = np.median(corners, axis=0).astype(np.int16)
    agree = np.count_nonzero(np.abs(corners - common).max(axis=1) <= CORNER_TOLERANCE) >= 3
    is_new = all(np.abs(common - colour).max() > COLOUR_TOLERANCE for colour in (white, black))
    middle = [(common, CORNER_TOLERANCE)] if agree and is_new else []
    return [(white, COLOUR_TOLERANCE), *middle, (black, COLOUR_TOLERANCE)]


def _differs(pixels: NDArray[np.uint8], colour: NDArray[np.int16], tolerance: int) -> NDArray[np.bool_]:
    low = np.clip(colour - tolerance, 0, 255).astype(np.uint8)
    high = np.clip(colour + tolerance, 0, 255).astype(np.uint8)
    is_foreign = np.zeros(pixels.shape[:2], np.bool_)
    for channel in range(3):
        values = np.ascontiguousarray(pixels[:, :, channel])
        is_foreign |= (values < low[channel]) | (values > high[channel])
    return is_foreign


def _cut(is_foreign: NDArray[np.bool_], min_gutter: int) -> list[Box]:
    """Pieces between gutters of at least `min_gutter` pixels, in reading order, letters and titles left out."""
    height, width = is_foreign.shape
    pieces = _pieces(is_foreign, _Region(0, height, 0, width), min_gutter, 0)
    return [piece.box for piece in pieces if _is_panel(piece, height, width)]


def _pieces(is_foreign: NDArray[np.bool_], region: _Region, min_gutter: int, depth: int) -> list[_Region]:
    inside = is_foreign[region.top : region.bottom, region.left : region.right]
    height, width = inside.shape
    rows = _runs(np.count_nonzero(inside, axis=1) > MAX_FOREIGN_SHARE * width, min_gutter)
    columns = _runs(np.count_nonzero(inside, axis=0) > MAX_FOREIGN_SHARE * height, min_gutter)
    if not rows or not columns:
        return []
    if depth < _MAX_DEPTH and len(rows) > 1:  # rows first: panels are lettered along them
        parts = [replace(region, top=region.top + start, bottom=region.top + end) for start, end in rows]
    elif depth < _MAX_DEPTH and len(columns) > 1:
        parts = [replace(region, left=region.left + start, right=region.left + end) for start, end in columns]
    else:
        (top, bottom), (left, right) = (rows[0][0], rows[-1][1]), (columns[0][0], columns[-1][1])
        trimmed = _Region(region.top + top, region.top + bottom, region.left + left, region.left + right)
        return (
            [trimmed] if trimmed == region or depth >= _MAX_DEPTH else _pieces(is_foreign, trimmed, min_gutter, depth)
        )
    return [piece for part in parts for piece in _pieces(is_foreign, part, min_gutter, depth + 1)]


def _runs(is_content: NDArray[np.bool_], min_gutter: int) -> list[tuple[int, int]]:
    """Stretches of content; gaps narrower than a gutter belong to them."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_content, [False])).astype(np.int8)))
    runs: list[tuple[int, int]] = []
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if runs and start - runs[-1][1] < min_gutter:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def _is_panel(piece: _Region, height: int, width: int) -> bool:
    rows, columns = piece.bottom - piece.top, piece.right - piece.left
    return (
        rows >= MIN_SIDE_SHARE * height
        and columns >= MIN_SIDE_SHARE * width
        and rows * columns >= MIN_AREA_SHARE * height * width
    )


def _cuts(is_foreign: NDArray[np.bool_], count: int | None) -> Iterator[list[Box]]:
    """The finest cut, then those by ever wider gutters, as long as there are more panels than named."""
    min_gutter = MIN_GUTTER
    while min_gutter < max(is_foreign.shape) // 4:
        boxes = _cut(is_foreign, min_gutter)
        yield boxes
        if count is None or len(boxes) <= count:
            return
        min_gutter += max(1, min_gutter // 2)


# --- seams ------------------------------------------------------------------------------------------------------------


def _cut_seams(pixels: NDArray[np.uint8], boxes: list[Box], count: int) -> list[Box]:
    """The boxes cut along their clearest seams until there are `count`; fewer where no seam is clear enough."""
    grey = pixels.mean(axis=2, dtype=np.float32)
    while len(boxes) < count:
        seams = [_clearest_seam(grey, box) for box in boxes]
        number = max(range(len(boxes)), key=lambda number: seams[number][0])
        share, parts = seams[number]
        if share < MIN_SEAM_SHARE:
            break
        boxes = boxes[:number] + parts + boxes[number + 1 :]
    return _in_reading_order(boxes)


def _clearest_seam(grey: NDArray[np.float32], box: Box) -> tuple[float, list[Box]]:
    """Share of the best seam along which the picture changes, 0 where none stands out, and the parts beside it."""
    left, top, right, bottom = box
    inside = grey[top:bottom, left:right]
    best: tuple[float, list[Box]] = (0.0, [box])
    for axis in (0, 1):
        margin = max(SEAM_REACH, round(MIN_SEAM_SIDE_SHARE * grey.shape[axis]))
        if inside.shape[axis] <= 2 * margin or inside.shape[1 - axis] < SEAM_BLOCK:
            continue
        shares, steps = (values[margin:-margin] for values in _change_along(np.moveaxis(inside, axis, 0)))
        candidates = np.flatnonzero(shares >= 0.97 * shares.max())  # lines beside the seam see it as well
        sharpest = candidates[steps[candidates] >= 0.999 * steps[candidates].max()]
        place = int(sharpest[len(sharpest) // 2]) + margin
        if shares.max() - np.median(shares) >= MIN_SEAM_PROMINENCE and shares.max() > best[0]:
            if axis == 0:
                parts = [(left, top, right, top + place), (left, top + place, right, bottom)]
            else:
                parts = [(left, top, left + place, bottom), (left + place, top, right, bottom)]
            best = float(shares.max()), parts
    return best


def _change_along(lines: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each line, the share of its pixels where the picture before it differs from that behind it, and how much.

    Grey levels are averaged over blocks, against noise and texture, and compared close to the line and away from it: a
    thin line that was drawn differs from both its sides, but these do not differ from each other.
    """
    num_lines, length = lines.shape
    blocks = lines[:, : length // SEAM_BLOCK * SEAM_BLOCK].reshape(num_lines, -1, SEAM_BLOCK).mean(axis=2)
    sums = np.concatenate((np.zeros((1, blocks.shape[1])), blocks.cumsum(axis=0)))
    shares, sizes = np.zeros(num_lines), np.zeros(num_lines)
    places = np.arange(SEAM_REACH, num_lines - SEAM_REACH)
    steps = []
    for gap in (1, SEAM_REACH - SEAM_DEPTH):
        behind = sums[places + gap + SEAM_DEPTH] - sums[places + gap]
        before = sums[places - gap] - sums[places - gap - SEAM_DEPTH]
        steps.append((behind - before) / SEAM_DEPTH)
    close, away = steps
    changes = (np.minimum(np.abs(close), np.abs(away)) > SEAM_STEP) & (close * away > 0)
    shares[places], sizes[places] = changes.mean(axis=1), np.abs(close).mean(axis=1)
    return shares, sizes


def _in_reading_order(boxes: list[Box]) -> list[Box]:
    """Rows from above, each from the left; what stands beside a tall panel belongs to its row."""
    remaining, ordered = list(boxes), []
    while remaining:
        first = min(remaining, key=lambda box: (box[1], box[0]))
        row = [box for box in remaining if _is_beside(box, first)]
        ordered += sorted(row, key=lambda box: (box[0], box[1]))
        remaining = [box for box in remaining if box not in row]
    return ordered


def _is_beside(box: Box, other: Box) -> bool:
    shared = min(box[3], other[3]) - max(box[1], other[1])
    return shared > 0.5 * min(box[3] - box[1], other[3] - other[1])


def _cropped(image: Image.Image, box: Box) -> bytes:
    """A panel as a file: JPEG where the figure is one, else PNG."""
    buffer = io.BytesIO()
    panel = image.crop(box)
    if image.format == "JPEG":
        panel.convert("RGB" if panel.mode != "L" else "L").save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        (panel if panel.mode in _PNG_MODES else panel.convert("RGB")).save(buffer, "PNG")
    return buffer.getvalue()
