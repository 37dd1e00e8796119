"""From a figure's file to an image worth keeping: readable, large enough, in a form that every trainer reads."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from medclip_hf.data.engine.settings import ImageRules
from medclip_hf.data.images import UnreadableImage, decode_image, open_image

KEPT_FORMATS = ("JPEG", "PNG", "WEBP")  # their bytes stay as they are where the pixels are plain
KEPT_MODES = ("RGB", "L")
JPEG_QUALITY = 95
UNUSED_TAIL = 0.1  # per cent of a 16-bit image's values at either end that its 8 bits leave out


def prepare_image(content: bytes, name: str, rules: ImageRules) -> tuple[bytes, Image.Image]:
    """The file to keep and its pixels as RGB.

    JPEG, PNG and WebP of 8-bit grey or RGB stay byte for byte; everything else (CMYK, palettes, transparency over
    white, 16 bits scaled to 8, TIFF, BMP) becomes a PNG, and a picture above `max_side` a smaller JPEG.

    Args:
        content: the file.
        name: for messages.
        rules: which images are good enough.

    Raises:
        UnreadableImage: with the reason to drop it.
    """
    image = open_image(content, name, rules.max_pixels)
    _check_size(image, name, rules)
    if getattr(image, "n_frames", 1) > 1 and image.format in ("GIF", "WEBP", "PNG"):
        raise UnreadableImage("image animated", f"{name} has {image.n_frames} frames")  # type: ignore[attr-defined]
    is_plain = image.format in KEPT_FORMATS and image.mode in KEPT_MODES
    decode_image(image, name)
    try:
        pixels = plain_rgb(image)
    except (ValueError, OSError, MemoryError) as error:
        raise UnreadableImage("image cannot become RGB", f"{name}: {error}") from error
    if rules.max_side is not None and max(pixels.size) > rules.max_side:
        pixels.thumbnail((rules.max_side, rules.max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        return _encoded(pixels, "JPEG"), pixels
    return (content if is_plain else _encoded(pixels, "PNG")), pixels


def plain_rgb(image: Image.Image) -> Image.Image:
    """Any decoded image as 8-bit RGB; what is transparent becomes white, as on the page."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled_to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """A 16-bit or float image with its own range of values, extreme ones apart, spread over 0 to 255."""
    values = np.asarray(image, dtype=np.float32)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("no finite value")
    low, high = np.percentile(finite, (UNUSED_TAIL, 100 - UNUSED_TAIL))
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(float(high - low), 1e-6)
    return Image.fromarray((np.clip(scaled, 0.0, 1.0) * 255).round().astype(np.uint8))


def _check_size(image: Image.Image, name: str, rules: ImageRules) -> None:
    shorter, longer = sorted(image.size)
    if shorter < rules.min_side:
        raise UnreadableImage(
            "image too small", f"{name} is {image.width}×{image.height}, at least {rules.min_side} a side"
        )
    if longer > rules.max_aspect * shorter:
        raise UnreadableImage("image too elongated", f"{name} is {image.width}×{image.height}")


def _encoded(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **({"quality": JPEG_QUALITY} if file_format == "JPEG" else {}))
    return buffer.getvalue()
