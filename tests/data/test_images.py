"""Opening untrusted image files: every kind of badness has its reason."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.images import UnreadableImage, decode_image, open_image, path_inside, read_file


def encoded(format_name="JPEG", size=(40, 30), mode="RGB"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, format_name)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that declares a size and holds no pixels: 60 bytes whatever the size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def reason_of(action, *arguments, **options):
    with pytest.raises(UnreadableImage) as caught:
        action(*arguments, **options)
    return caught.value.reason


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_common_formats_open(format_name):
    image = decode_image(open_image(encoded(format_name), "x"), "x")
    assert image.size == (40, 30)


def test_a_truncated_jpeg_opens_but_does_not_decode():
    image = open_image(encoded()[:-200], "cut.jpg")
    assert reason_of(decode_image, image, "cut.jpg") == "image damaged"


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    assert reason_of(open_image, png_header(100_000, 100_000), "bomb.png") == "image has too many pixels"


def test_the_limit_of_pixels_is_the_callers():
    assert reason_of(open_image, encoded(), "x", max_pixels=1199) == "image has too many pixels"
    assert open_image(encoded(), "x", max_pixels=1200).size == (40, 30)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(UnreadableImage, match=r"x.png: .*a size of zero"):
        open_image(png_header(0, 10), "x.png")


def test_text_is_no_image():
    assert reason_of(open_image, b"<html>404</html>", "x.jpg") == "image not recognised"


def test_postscript_is_not_even_tried():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    assert reason_of(open_image, eps, "x.eps") == "image not recognised"


def test_no_bytes_are_an_empty_file(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    assert reason_of(read_file, tmp_path / "x.jpg") == "image file empty"
    assert reason_of(open_image, b"", "x.jpg") == "image file empty"


def test_a_missing_file_and_a_folder_are_missing(tmp_path):
    assert reason_of(read_file, tmp_path / "x.jpg") == "image missing"
    assert reason_of(read_file, tmp_path) == "image missing"


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    assert reason_of(read_file, tmp_path / "x.jpg") == "image missing"


def test_a_file_beyond_the_size_limit_is_not_read(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"0" * 11)
    assert reason_of(read_file, tmp_path / "x.jpg", max_file_bytes=10) == "image file too large"


@pytest.mark.parametrize("relative", ["/etc/passwd", "../x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "", "a\0b"])
def test_paths_cannot_leave_their_folder(tmp_path, relative):
    assert reason_of(path_inside, tmp_path, relative) == "image path outside its folder"


def test_a_link_cannot_leave_its_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.jpg").write_bytes(encoded())
    (tmp_path / "inside" / "x.jpg").symlink_to(tmp_path / "secret.jpg")
    assert reason_of(path_inside, tmp_path / "inside", "x.jpg") == "image path outside its folder"


def test_a_name_too_long_for_the_disk_is_missing(tmp_path):
    assert reason_of(read_file, path_inside(tmp_path, "x" * 5000)) in {"image missing", "image file unreadable"}


def test_a_path_below_the_folder_is_found(tmp_path):
    assert path_inside(tmp_path, "a/b.jpg") == tmp_path / "a" / "b.jpg"


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImage("image missing", "x.jpg")))
    assert (error.reason, error.detail) == ("image missing", "x.jpg")
