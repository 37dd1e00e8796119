"""Image files of articles, good and hostile, made fit for training or refused with a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.engine.figure_images import prepare_image
from medclip_hf.data.engine.settings import ImageRules
from medclip_hf.data.images import UnreadableImage

RULES = ImageRules()


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def gradient(mode="RGB", size=(80, 70)):
    return Image.radial_gradient("L").resize(size).convert(mode)


@pytest.mark.parametrize(("mode", "file_format"), [("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("L", "PNG")])
def test_plain_files_stay_byte_for_byte(mode, file_format):
    content = encoded(gradient(mode), file_format)
    kept, image = prepare_image(content, "a", RULES)
    assert kept == content
    assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "TIFF"), ("RGB", "BMP")],
)
def test_other_files_become_png_of_plain_pixels(mode, file_format):
    kept, image = prepare_image(encoded(gradient(mode), file_format), "a", RULES)
    again = Image.open(io.BytesIO(kept))
    assert (again.format, again.mode, again.size) == ("PNG", "RGB", (80, 70))
    assert np.array_equal(np.asarray(again), np.asarray(image))


@pytest.mark.parametrize("file_format", ["TIFF", "PNG"])
def test_sixteen_bits_are_spread_over_eight(file_format):
    values = np.linspace(1000, 5000, 80 * 70).reshape(70, 80).astype(np.uint16)
    kept, _ = prepare_image(encoded(Image.fromarray(values), file_format), "a", RULES)
    levels = np.asarray(Image.open(io.BytesIO(kept)))
    assert levels.min() == 0
    assert levels.max() == 255


def test_transparent_becomes_white():
    image = Image.new("RGBA", (80, 70), (0, 0, 0, 0))
    kept, _ = prepare_image(encoded(image, "PNG"), "a", RULES)
    assert np.all(np.asarray(Image.open(io.BytesIO(kept))) == 255)


def test_a_large_picture_is_reduced_where_that_is_asked_for():
    kept, image = prepare_image(encoded(gradient(size=(400, 200)), "PNG"), "a", ImageRules(max_side=100))
    assert image.size == Image.open(io.BytesIO(kept)).size == (100, 50)


def animated():
    frames = [gradient("L").rotate(90 * turn) for turn in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def declared_gigapixels():
    content = bytearray(encoded(gradient(), "PNG"))
    content[16:24] = (20_000).to_bytes(4, "big") + (15_000).to_bytes(4, "big")  # the header alone
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "image file empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n", "image not recognised"),
        (b"%PDF-1.4\n", "image not recognised"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image not recognised"),
        (encoded(gradient(), "JPEG")[:400], "image damaged"),
        (animated(), "image animated"),
        (encoded(gradient(size=(80, 20)), "PNG"), "image too small"),
        (encoded(gradient(size=(900, 100)), "PNG"), "image too elongated"),
        (encoded(Image.new("1", (20_000, 15_000)), "TIFF", compression="group4"), "image has too many pixels"),
    ],
    ids=["0 bytes", "EPS", "PDF", "SVG", "cut off", "animated", "small", "long", "300 megapixels"],
)
def test_bad_files_are_refused_with_their_reason(content, reason):
    with pytest.raises(UnreadableImage) as caught:
        prepare_image(content, "a", RULES)
    assert caught.value.reason == reason


def test_a_header_that_declares_gigapixels_is_refused_before_decoding():
    with pytest.raises(UnreadableImage) as caught:
        prepare_image(declared_gigapixels(), "a", RULES)
    assert caught.value.reason in ("image has too many pixels", "image not recognised", "image damaged")
