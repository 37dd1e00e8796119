"""Drawn compound figures: panels in known places under captions of known parts, to measure how they are taken apart."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from medclip_hf.data.phantoms.figures import draw_figure

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last two exclusive

GUTTERS = ("white", "black", "grey", "touching")
LETTER_PLACES = ("inside", "above", "none")
CAPTION_STYLES = ("(A)", "(a)", "A,", "a)", "grouped", "trailing")
PANEL_KINDS = ("picture", "pair", "chart")  # a pair: two bodies on black, as both legs in one image
_LEADS = ("", "Findings in one patient.", "Follow-up of a drawn lesion over three weeks:", "Images at admission.")
_GREY = (190, 196, 204)


@dataclass(frozen=True)
class CompoundPhantom:
    """A compound figure and the truth about it.

    Args:
        content: the encoded picture.
        caption: of the whole figure.
        boxes: of the panels, in the order of their letters.
        texts: what the caption says of each panel, words for all of them first.
        gutter: one of `GUTTERS`.
        letters: one of `LETTER_PLACES`.
        style: one of `CAPTION_STYLES`; the letters of ``"trailing"`` stand behind their text.
        kinds: of each panel, one of `PANEL_KINDS`.
    """

    content: bytes
    caption: str
    boxes: tuple[Box, ...]
    texts: tuple[str, ...]
    gutter: str
    letters: str
    style: str
    kinds: tuple[str, ...]


def draw_compound(seed: int, index: int) -> CompoundPhantom:
    """The compound figure number `index`: the same for the same arguments.

    Raises:
        ValueError: negative seed or index.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    rng = np.random.default_rng((seed, index, 77))
    gutter = GUTTERS[rng.choice(4, p=(0.55, 0.2, 0.15, 0.1))]
    letters = LETTER_PLACES[rng.choice(3, p=(0.5, 0.3, 0.2))]
    style = CAPTION_STYLES[rng.choice(6, p=(0.35, 0.2, 0.15, 0.1, 0.1, 0.1))]
    width = int(rng.integers(420, 900))
    space = 0 if gutter == "touching" else int(rng.integers(3, 22))
    margin = int(rng.integers(0, 16)) if gutter != "touching" else 0
    header = int(rng.integers(14, 24)) if letters == "above" and gutter != "touching" else 0
    cells, height = _layout(rng, width - 2 * margin, space, header)
    boxes = tuple((left + margin, top + margin, right + margin, bottom + margin) for left, top, right, bottom in cells)
    colour = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": _GREY, "touching": (255, 255, 255)}[gutter]
    canvas = Image.new("RGB", (width, height + 2 * margin), colour)
    rows = [draw_figure(seed, "train", 1000 * index + number, 128) for number in range(len(boxes))]
    kinds = [PANEL_KINDS[kind] for kind in rng.choice(3, len(boxes), p=(0.8, 0.1, 0.1))]
    for number, (box, row) in enumerate(zip(boxes, rows, strict=True)):
        if kinds[number] == "chart":
            _draw_chart(canvas, box, rng)
        else:
            _paste(canvas, box, row.image if kinds[number] == "picture" else _pair(row.image))
        _letter(canvas, box, chr(ord("A") + number), letters, header, colour)
    caption, texts = _caption([row.row.caption for row in rows], style, rng)
    return CompoundPhantom(_encoded(canvas, rng), caption, boxes, texts, gutter, letters, style, tuple(kinds))


def _layout(rng: np.random.Generator, width: int, space: int, header: int) -> tuple[list[Box], int]:
    """Cells in the order of their letters, and the height of all: a grid, or a large panel beside small ones."""
    if rng.random() < 0.75:
        num_rows, num_columns = (int(number) for number in rng.integers(1, 4, 2))
        num_columns = max(num_columns, 2) if num_rows == 1 else num_columns
        cell_width = (width - (num_columns - 1) * space) // num_columns
        cell_height = int(cell_width * rng.uniform(0.65, 1.1))
        cells = []
        for number in range(num_rows * num_columns):
            left = (number % num_columns) * (cell_width + space)
            top = header + (number // num_columns) * (cell_height + space + header)
            cells.append((left, top, left + cell_width, top + cell_height))
        return cells, cells[-1][3]
    num_small = int(rng.integers(2, 4))
    large_width = int((width - space) * rng.uniform(0.5, 0.7))
    small_height = int(width * rng.uniform(0.2, 0.28))
    height = header + num_small * small_height + (num_small - 1) * (space + header)
    cells = [(0, header, large_width, height)]
    for number in range(num_small):
        top = header + number * (small_height + space + header)
        cells.append((large_width + space, top, width, top + small_height))
    return cells, height


def _paste(canvas: Image.Image, box: Box, pixels: NDArray[np.uint8]) -> None:
    """The middle of a picture in the shape of the box, filling it."""
    width, height = box[2] - box[0], box[3] - box[1]
    picture = Image.fromarray(pixels)
    scale = max(width, height) / 128
    picture = picture.resize(
        (max(width, round(128 * scale)), max(height, round(128 * scale))), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    canvas.paste(picture.crop((left, top, left + width, top + height)), box[:2])


def _pair(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two narrow copies of a picture on black, with black between them."""
    half = np.asarray(Image.fromarray(pixels).resize((52, 112), Image.Resampling.BILINEAR))
    canvas = np.zeros_like(pixels)
    canvas[8:120, 6:58] = half
    canvas[8:120, 70:122] = half[:, ::-1]
    return canvas


def _draw_chart(canvas: Image.Image, box: Box, rng: np.random.Generator) -> None:
    """Bars over axes on white, with marks beside and below them."""
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), fill="white")
    x_axis, y_axis = bottom - 18, left + 26
    draw.line((y_axis, top + 4, y_axis, x_axis, right - 5, x_axis), fill="black", width=2)
    num_bars = int(rng.integers(3, 6))
    step = (right - 10 - y_axis) / num_bars
    for number in range(num_bars):
        start = y_axis + step * (number + 0.2)
        height = rng.uniform(0.3, 0.95) * (x_axis - top - 8)
        draw.rectangle((start, x_axis - height, start + 0.6 * step, x_axis), fill=(60, 90, 150))
        draw.text((start, x_axis + 3), f"g{number + 1}", fill="black", font_size=11)
        draw.text(
            (left + 2, x_axis - (number + 1) * (x_axis - top) / (num_bars + 1)),
            f"{number}0",
            fill="black",
            font_size=11,
        )


def _letter(
    canvas: Image.Image, box: Box, letter: str, place: str, header: int, background: tuple[int, int, int]
) -> None:
    draw = ImageDraw.Draw(canvas)
    if place == "inside":
        draw.text((box[0] + 5, box[1] + 4), letter, fill="white", stroke_fill="black", stroke_width=1, font_size=16)
    elif place == "above" and header:
        colour = "white" if sum(background) < 200 else "black"
        draw.text((box[0] + 1, box[1] - header), letter, fill=colour, font_size=12)


def _caption(parts: list[str], style: str, rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """The caption of the figure, and its part for each panel."""
    parts = [re.sub(r"^\([a-f]\) | \(arrow\)", "", part).strip(". ") + "." for part in parts]
    lead = _LEADS[rng.integers(len(_LEADS))]
    letters = [chr(ord("A") + number) for number in range(len(parts))]
    if style == "trailing":
        joined = ", ".join(f"{part.rstrip('.')} ({letter})" for part, letter in zip(parts, letters, strict=True))
        return f"{lead} {joined}.".strip(), tuple(parts)
    if style == "grouped" and len(parts) > 2:
        parts[1] = parts[0]
        marked = [
            f"(A, B) {parts[0]}",
            *(f"({letter}) {part}" for letter, part in zip(letters[2:], parts[2:], strict=True)),
        ]
    else:
        forms = {"(a)": "({}) ", "A,": "{}, ", "a)": "{}) "}
        form = forms.get(style, "({}) ")
        shown = [letter.lower() if style in ("(a)", "a)") else letter for letter in letters]
        marked = [form.format(letter) + part for letter, part in zip(shown, parts, strict=True)]
    return f"{lead} {' '.join(marked)}".strip(), tuple(f"{lead} {part}".strip() for part in parts)


def _encoded(canvas: Image.Image, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    if rng.random() < 0.7:
        canvas.save(buffer, "JPEG", quality=int(rng.integers(70, 96)))
    else:
        canvas.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
