"""Figures as training examples: random access, crops that depend on the key alone, bad rows set aside."""

import io
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from medclip_hf.data.parquet import write_figure_rows
from medclip_hf.data.records import ConceptMention, FigureRow
from medclip_hf.data.stages import Drop
from medclip_hf.training.datasets import FigureDataset, FigureExample, random_crop_box


def encode(image, format_name="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def ramp(width=64, height=48):
    """Red grows to the right, green downwards: every pixel tells where it comes from."""
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))


GOOD = FigureRow("good", "a mass", (ConceptMention("C0000005", "mass", 2, 6),), image_bytes=encode(ramp()))


@pytest.fixture
def open_rows(tmp_path):
    """A data set of the given rows."""

    def make(rows, **options):
        write_figure_rows(rows, tmp_path, "train", rows_per_shard=2)
        return FigureDataset(tmp_path, "train", **({"image_size": 32} | options))

    return make


def test_an_example_holds_caption_concepts_and_an_image_of_the_models_size(open_rows):
    dataset = open_rows([GOOD], image_size=(32, 40))
    example = dataset[0]
    assert (example.row_id, example.caption, example.concepts) == ("good", "a mass", GOOD.concepts)
    assert (example.image.mode, example.image.size) == ("RGB", (40, 32))


def test_the_crop_depends_on_seed_epoch_and_index_alone(open_rows, tmp_path):
    dataset = open_rows([GOOD, GOOD, GOOD], seed=1)

    def pixels(key, source=dataset):
        return source[key].image.tobytes()

    first = pixels((0, 1))
    assert pixels((5, 2)) != first
    assert pixels((0, 2)) != first
    assert pixels((0, 1)) == first  # whatever was read between
    assert pixels(1) == first  # epoch 0
    assert pixels((0, 1), pickle.loads(pickle.dumps(dataset))) == first
    assert pixels((0, 1), FigureDataset(tmp_path, seed=2, image_size=32)) != first


def test_workers_give_what_one_process_gives(open_rows):
    dataset = open_rows([replace(GOOD, row_id=str(number)) for number in range(6)])
    keys = [(3, index) for index in (5, 0, 3, 1, 4, 2)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=keys, num_workers=2, collate_fn=list)
    examples = [example for batch in loader for example in batch]
    assert [example.row_id for example in examples] == ["5", "0", "3", "1", "4", "2"]
    assert [e.image.tobytes() for e in examples] == [dataset[key].image.tobytes() for key in keys]


def test_without_a_crop_the_whole_image_is_squashed_as_the_processor_would(open_rows):
    image = open_rows([GOOD], crop_scale=None)[(7, 0)].image
    assert image.tobytes() == ramp().resize((32, 32), Image.Resampling.BICUBIC).tobytes()


def test_a_crop_of_the_whole_area_is_the_image_itself(open_rows):
    image = open_rows([GOOD], crop_scale=(1.0, 1.0), crop_ratio=(64 / 48, 64 / 48))[0].image
    assert image.tobytes() == ramp().resize((32, 32), Image.Resampling.BICUBIC).tobytes()


def test_a_large_jpeg_decoded_at_a_fraction_shows_the_same_crop(open_rows, monkeypatch):
    row = replace(GOOD, image_bytes=encode(ramp(1024, 768), "JPEG", quality=95))
    dataset = open_rows([row])
    fast = np.asarray(dataset[0].image, dtype=int)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda self, mode, size: None)
    exact = np.asarray(dataset[0].image, dtype=int)
    assert abs(fast - exact).max() <= 3
    assert abs(fast - exact).max() > 0  # the fraction was used


def test_exif_rotation_is_applied_before_the_crop(open_rows):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    row = replace(GOOD, image_bytes=encode(ramp(), "JPEG", quality=100, exif=exif))
    image = np.asarray(open_rows([row], crop_scale=None)[0].image, dtype=int)
    assert image[16, 2, 1] > 200 > 50 > image[16, 29, 1]  # green, once downwards, now grows to the left


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_images_of_any_mode_become_rgb(open_rows, mode):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(ramp().convert("L")).astype(np.uint16) * 257)
    else:
        image = ramp().convert(mode)
    row = replace(GOOD, image_bytes=encode(image, "TIFF" if mode == "CMYK" else "PNG"))
    example = open_rows([row])[0]
    assert example.image.mode == "RGB"
    assert np.asarray(example.image).std() > 10


PNG = GOOD.image_bytes or b""
BAD_ROWS = {
    "image missing": replace(GOOD, image_bytes=None, image_path="nowhere.jpg"),
    "image path outside its folder": replace(GOOD, image_bytes=None, image_path="../x.jpg"),
    "image damaged": replace(GOOD, image_bytes=encode(ramp(), "JPEG")[:-300]),
    "image not recognised": replace(GOOD, image_bytes=b"<html>"),
    "image file empty": replace(GOOD, image_bytes=b""),
    "image has too many pixels": replace(GOOD, image_bytes=encode(ramp(200, 200))),
    "caption empty": replace(GOOD, caption="  "),
    "concept span outside the caption": replace(GOOD, concepts=(ConceptMention("C1", "mass", 2, 7),)),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_set_aside_by_name_and_never_replaced(open_rows, reason):
    dataset = open_rows([GOOD, replace(BAD_ROWS[reason], row_id="bad")], max_pixels=64 * 48)
    assert isinstance(dataset[0], FigureExample)
    drop = dataset[1]
    assert isinstance(drop, Drop)
    assert (drop.reason, drop.row_id) == (reason, "bad")


def test_images_named_by_path_are_read_below_the_folder(open_rows, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PNG)
    dataset = open_rows([replace(GOOD, image_bytes=None, image_path="images/a.png")], crop_scale=None)
    assert dataset[0].image.tobytes() == ramp().resize((32, 32), Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize("index", [-1, 1])
def test_an_index_beyond_the_rows_is_an_index_error(open_rows, index):
    with pytest.raises(IndexError, match="1 rows"):
        open_rows([GOOD])[(0, index)]


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.5), (0.5, 1.5)])
def test_a_crop_scale_without_meaning_is_refused(open_rows, scale):
    with pytest.raises(ValueError, match="crop_scale must be"):
        open_rows([GOOD], crop_scale=scale)


def test_a_size_without_pixels_is_refused(open_rows):
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        open_rows([GOOD], image_size=0)


def test_crops_stay_inside_and_keep_to_scale_and_ratio():
    generator = np.random.default_rng(0)
    for _ in range(500):
        left, top, right, bottom = random_crop_box((400, 300), (0.5, 1.0), (3 / 4, 4 / 3), generator)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        assert 0.49 <= (right - left) * (bottom - top) / 120_000 <= 1
        assert 0.74 <= (right - left) / (bottom - top) <= 1.35


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506))])
def test_an_image_too_narrow_for_any_crop_gives_its_middle(size, box):
    assert random_crop_box(size, (0.5, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == box


def test_an_image_of_one_pixel_has_a_crop():
    assert random_crop_box((1, 1), (0.5, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == (0, 0, 1, 1)


def test_crop_areas_are_spread_evenly():
    generator = np.random.default_rng(0)
    boxes = [random_crop_box((1000, 1000), (0.2, 0.5), (1.0, 1.0), generator) for _ in range(2000)]
    areas = [(right - left) * (bottom - top) / 1e6 for left, top, right, bottom in boxes]
    assert math.isclose(float(np.mean(areas)), 0.35, abs_tol=0.01)
