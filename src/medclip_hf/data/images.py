"""Opening image files that nobody has vetted: every way in which one can be bad has its own short reason."""

from __future__ import annotations

import io
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image, UnidentifiedImageError

# Decoders without an interpreter or a network behind them: EPS, for one, would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "JPEG2000", "PPM")
MAX_PIXELS = 80_000_000  # 240 MB as RGB; below Pillow's own warning at 89 million
MAX_FILE_BYTES = 256 * 2**20


class UnreadableImage(ValueError):
    """An image that cannot be used.

    Args:
        reason: short and countable, fit for `data.stages.Drop`.
        detail: which file, and what the decoder said.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def path_inside(folder: Path, relative: str) -> Path:
    """The file that `relative` names below `folder`.

    Raises:
        UnreadableImage: where it is absolute, climbs out with ``..`` or leaves the folder through a symbolic link.
    """
    outside = UnreadableImage("image path outside its folder", f"{relative!r} does not stay below {folder}")
    windows = PureWindowsPath(relative)  # splits at both kinds of slash
    if not relative or "\0" in relative or PurePosixPath(relative).is_absolute() or windows.anchor:
        raise outside
    if ".." in windows.parts:
        raise outside
    path = folder / relative
    try:
        stays = path.resolve().is_relative_to(folder.resolve())
    except (OSError, UnicodeEncodeError) as error:  # a name that is too long, a loop of links, half a surrogate pair
        raise UnreadableImage("image missing", f"{relative[:200]!r}: {error}") from error
    if not stays:
        raise outside
    return path


def read_file(path: Path, max_file_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        UnreadableImage: where there is no regular file (a pipe or device would block), or it is empty, too large, or
            may not be read.
    """
    try:
        if not path.is_file():
            raise UnreadableImage("image missing", f"{path} is no file")
        size = path.stat().st_size
        if size > max_file_bytes:
            raise UnreadableImage(
                "image file too large", f"{path} has {size:,} bytes, at most {max_file_bytes:,} allowed"
            )
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableImage("image file unreadable", f"{path}: {error.strerror}") from error
    if not content:
        raise UnreadableImage("image file empty", f"{path} has 0 bytes")
    return content


def open_image(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image, its header read and its size allowed, its pixels not decoded yet.

    Args:
        content: the encoded file.
        name: for messages.
        max_pixels: limit of width × height, checked before anything is decoded: a few kilobytes can declare gigapixels.

    Raises:
        UnreadableImage: where the file is no image of a known format, or has no pixels or too many.
    """
    if not content:
        raise UnreadableImage("image file empty", f"{name} has 0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise UnreadableImage("image has too many pixels", f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        detail = f"{name}: another format than {', '.join(IMAGE_FORMATS)}, a damaged header, or a size of zero"
        raise UnreadableImage("image not recognised", detail) from error
    except Exception as error:  # decoders raise any type on hostile bytes; each is the file's fault
        raise UnreadableImage("image damaged", f"{name}: {type(error).__name__}: {error}") from error
    width, height = image.size
    if width < 1 or height < 1:
        raise UnreadableImage("image has no pixels", f"{name} is {width}×{height}")
    if width * height > max_pixels:
        raise UnreadableImage(
            "image has too many pixels", f"{name} is {width}×{height}, at most {max_pixels:,} pixels allowed"
        )
    return image


def decode_image(image: Image.Image, name: str) -> Image.Image:
    """The same image with its pixels decoded to the last row.

    Raises:
        UnreadableImage: where the file ends early or is damaged.
    """
    try:
        image.load()
    except Exception as error:  # as above
        raise UnreadableImage("image damaged", f"{name}: {type(error).__name__}: {error}") from error
    return image
