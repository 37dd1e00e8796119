"""Text in the pixels: found by Tesseract, which is optional, and masked or a reason to set the picture aside.

The picture goes to the program through a pipe and the words come back through one: no file with a patient's name lies
in a temporary folder, not even for a moment.
"""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from medclip_hf.data.hospital.folding import WORDS

BurnedIn = Literal["refuse", "mask", "keep"]

MIN_CONFIDENCE = 60  # of 100, as Tesseract judges a word
MIN_CHARACTERS = 3
_SECONDS = 120
_LEGIBLE_SIDE = 1200  # pixels; smaller pictures are enlarged, since letters of 10 pixels are not read
_BLUR_PART = 40  # of the longest side: wider than a letter's stroke, narrower than what organs shade
_LETTER_CONTRAST = 40  # grey levels of 256
_MARGIN = 0.35  # of the height of a word, masked around it
# What technicians put on films, and no patient is known by.
_MARKERS = WORDS["film_markers"]

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class TextInPixels:
    """Where words were found; what they say is forgotten at once."""

    boxes: tuple[Box, ...]

    def __bool__(self) -> bool:
        return bool(self.boxes)


def require_tesseract() -> str:
    """The program.

    Raises:
        ValueError: where it is not installed.
    """
    program = _program()
    if program is None:
        raise ValueError(
            "text that is burned into pictures is found by the program tesseract, which is not installed (on Debian: "
            "apt install tesseract-ocr). Without it, say that pictures are to be kept unread (--burned-in keep)."
        )
    return program


def find_text(image: Image.Image) -> TextInPixels:
    """Words in a picture that are more than a marker of side or position.

    Raises:
        RuntimeError: where Tesseract fails; the picture then counts as unread.
    """
    scale = max(1.0, min(4.0, _LEGIBLE_SIDE / max(image.size)))
    size = (round(image.width * scale), round(image.height * scale))
    boxes = []
    for letters in _letters_on_paper(image.resize(size, Image.Resampling.BICUBIC) if scale > 1 else image):
        for line in _tesseract(letters).splitlines()[1:]:
            cells = line.split("\t")
            if len(cells) == 12 and _is_word(cells[11], float(cells[10])):
                left, top, width, height = (int(cell) / scale for cell in cells[6:10])
                boxes.append(_box(left, top, width, height, image))
    return TextInPixels(tuple(boxes))


def _letters_on_paper(image: Image.Image) -> Iterator[Image.Image]:
    """What is brighter than its surroundings as black on white, then what is darker.

    On an X-ray or cells Tesseract reads nothing as they are, though a name stands there in bright letters: its own
    threshold is one for the whole picture.
    """
    channels = np.asarray(image.convert("RGB"))
    for extreme, sign in ((channels.max(axis=-1), 1.0), (channels.min(axis=-1), -1.0)):
        blurred = Image.fromarray(extreme).filter(ImageFilter.BoxBlur(max(image.size) // _BLUR_PART))
        difference = sign * (extreme.astype(np.float32) - np.asarray(blurred, np.float32))
        yield Image.fromarray(np.where(difference > _LETTER_CONTRAST, 0, 255).astype(np.uint8))


def _box(left: float, top: float, width: float, height: float, image: Image.Image) -> Box:
    margin = _MARGIN * height
    right, bottom = left + width + margin + 1, top + height + margin + 1
    return (
        max(0, int(left - margin)),
        max(0, int(top - margin)),
        min(image.width, int(right)),
        min(image.height, int(bottom)),
    )


def masked(image: Image.Image, found: TextInPixels) -> Image.Image:
    """The picture with every box filled by the median of the pixels around it."""
    values = np.array(image)
    for left, top, right, bottom in found.boxes:
        rim = max(2, (bottom - top) // 4)
        around = values[max(0, top - rim) : bottom + rim, max(0, left - rim) : right + rim]
        values[top:bottom, left:right] = np.median(around.reshape(-1, *values.shape[2:]), axis=0)
    return Image.fromarray(values)


def _is_word(text: str, confidence: float) -> bool:
    word = re.sub(r"[\W_]+", "", text).casefold()
    return confidence >= MIN_CONFIDENCE and len(word) >= MIN_CHARACTERS and word not in _MARKERS


@functools.cache
def _program() -> str | None:
    return shutil.which("tesseract")


def _tesseract(image: Image.Image) -> str:
    """Tesseract's table of words ("sparse text": anywhere, in no order)."""
    sink = io.BytesIO()
    image.save(sink, "BMP")
    command = [require_tesseract(), "stdin", "stdout", "--psm", "11", "tsv"]
    try:
        done = subprocess.run(  # noqa: S603 - a program by its full path, without a shell
            command,
            input=sink.getvalue(),
            capture_output=True,
            timeout=_SECONDS,
            check=True,
            env=os.environ | {"OMP_THREAD_LIMIT": "1"},
        )
    except (OSError, subprocess.SubprocessError):
        raise RuntimeError("tesseract failed") from None  # its words may quote the picture's
    return done.stdout.decode("utf-8", "replace")
