"""Overlays: where the map is high the colour shows, the names and the bar are drawn, bad input is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from medclip_hf.explain.overlay import draw_boxes, draw_concept_panel, encode_png, overlay_map, save_png

GREY = np.full((40, 60, 3), 128, np.uint8)
CORNER = np.array([[1.0, 0.0], [0.0, 0.0]])


def test_colour_appears_where_the_map_is_high_and_nowhere_else():
    pixels = overlay_map(GREY, CORNER)
    assert pixels.shape == (40, 60, 3)
    assert np.abs(pixels[3, 3].astype(int) - 128).max() > 60
    assert np.array_equal(pixels[-1, -1], GREY[-1, -1])


def test_a_map_that_is_flat_leaves_the_picture_as_it_is():
    assert np.array_equal(overlay_map(GREY, np.full((3, 3), 0.4)), GREY)


def test_no_opacity_leaves_the_picture_as_it_is():
    assert np.array_equal(overlay_map(GREY, CORNER, max_opacity=0.0), GREY)


def test_one_range_makes_maps_comparable():
    weak = overlay_map(GREY, 0.2 * CORNER, value_range=(0.0, 1.0))
    strong = overlay_map(GREY, CORNER, value_range=(0.0, 1.0))
    change = [np.abs(pixels.astype(int) - 128).sum() for pixels in (weak, strong)]
    assert change[0] < 0.5 * change[1]


def test_grey_pictures_pil_images_and_tensors_are_taken():
    from_array = overlay_map(GREY[..., 0], CORNER)
    from_image = overlay_map(Image.fromarray(GREY[..., 0]), torch.from_numpy(CORNER).bfloat16())
    assert np.array_equal(from_array, from_image)


def test_the_picture_given_is_not_changed():
    before = GREY.copy()
    overlay_map(GREY, CORNER)
    assert np.array_equal(GREY, before)


def test_a_large_picture_is_drawn_as_a_small_one_and_its_boxes_stay_in_place():
    large = GREY.repeat(40, axis=0).repeat(40, axis=1)
    small = draw_boxes(GREY, [(10, 10, 30, 30)], ["cyst"])
    drawn = draw_boxes(large, [(400, 400, 1200, 1200)], ["cyst"])
    assert drawn.shape == small.shape
    assert np.abs(drawn.astype(int) - small).mean() < 1.0
    panels = [draw_concept_panel(picture, CORNER[None], ["cyst"]).astype(int) for picture in (GREY, large)]
    assert np.abs(panels[1] - panels[0]).mean() < 1.0


def test_a_panel_has_a_tile_per_concept_and_a_bar():
    one = draw_concept_panel(GREY, CORNER[None], ["cyst"])
    three = draw_concept_panel(GREY, np.stack([CORNER, 1 - CORNER, CORNER]), ["cyst", "nodule", "clip"])
    assert one.dtype == np.uint8
    assert three.shape[1] > 1.7 * one.shape[1]
    assert (three < 60).any()  # letters


def test_six_tiles_wrap_into_two_rows_of_three():
    wide = draw_concept_panel(GREY, np.stack([CORNER] * 2), list("ab"))
    wrapped = draw_concept_panel(GREY, np.stack([CORNER] * 5), list("abcde"))
    assert wrapped.shape[0] > 1.5 * wide.shape[0]
    assert abs(wrapped.shape[1] - wide.shape[1]) < 0.1 * wide.shape[1]


def test_a_strip_has_tiles_no_wider_than_their_names_need():
    maps, names = np.random.default_rng(0).random((3, 2, 12)), ["a", "b", "c"]
    strip = draw_concept_panel(np.zeros((50, 600, 3), np.uint8), maps, names)
    twice_as_wide = draw_concept_panel(np.zeros((50, 1200, 3), np.uint8), maps, names)
    assert strip.shape[1] == twice_as_wide.shape[1] < 3000


def test_an_outline_is_drawn_on_its_own_tile():
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:30] = True
    plain = draw_concept_panel(GREY, np.stack([CORNER] * 2), ["cyst", "nodule"])
    outlined = draw_concept_panel(GREY, np.stack([CORNER] * 2), ["cyst", "nodule"], outlines=[None, mask])
    changed = np.nonzero((plain != outlined).any(axis=2))[1]
    assert len(changed) > 50
    assert changed.min() > plain.shape[1] / 2


@pytest.mark.parametrize("mask", [np.zeros((40, 60), bool), np.ones((40, 60), bool)])
def test_an_outline_without_a_border_draws_nothing(mask):
    plain = draw_concept_panel(GREY, CORNER[None], ["cyst"])
    assert np.array_equal(draw_concept_panel(GREY, CORNER[None], ["cyst"], outlines=[mask]), plain)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "name", ["$\\frac{1$", "<b>", "", "病变", "a very long name of a finding that needs several lines"]
)
def test_any_name_can_be_written(name):
    assert draw_concept_panel(GREY, CORNER[None], [name]).shape[2] == 3


def test_a_png_holds_the_same_pixels(tmp_path):
    pixels = overlay_map(GREY, CORNER)
    path = save_png(pixels, tmp_path / "new" / "overlay.png")
    with Image.open(path) as saved:
        assert saved.format == "PNG"
        assert np.array_equal(np.asarray(saved), pixels)
    with Image.open(io.BytesIO(encode_png(GREY[..., 0]))) as grey:
        assert grey.mode == "RGB"


@pytest.mark.parametrize(
    ("image", "maps", "options", "message"),
    [
        (GREY.astype(float), CORNER, {}, "uint8"),
        (GREY[..., :2], CORNER, {}, "uint8 of shape"),
        (GREY, CORNER[0], {}, "rows, columns"),
        (GREY, CORNER * np.nan, {}, "not finite"),
        (GREY, CORNER, {"value_range": (1.0, 1.0)}, "must rise"),
        (GREY, CORNER, {"max_opacity": 2.0}, "max_opacity"),
    ],
)
def test_pictures_and_maps_that_do_not_fit_are_refused(image, maps, options, message):
    with pytest.raises(ValueError, match=message):
        overlay_map(image, maps, **options)


def test_names_and_outlines_must_match_the_maps():
    with pytest.raises(ValueError, match="1 maps, 2 names"):
        draw_concept_panel(GREY, CORNER[None], ["cyst", "nodule"])
    with pytest.raises(ValueError, match="outline of 'cyst'"):
        draw_concept_panel(GREY, CORNER[None], ["cyst"], outlines=[np.ones((2, 2), bool)])


def test_boxes_are_drawn_where_they_lie_and_named_beside():
    picture = np.full((100, 150, 3), 200, np.uint8)
    none = draw_boxes(picture, [], [])
    drawn = draw_boxes(picture, [(10, 20, 60, 90), (70, 10, 140, 50)], ["mass 0.91", "a very long name " * 9])
    assert drawn.shape == none.shape
    changed = np.argwhere((drawn != none).any(axis=2))
    assert len(changed) > 500
    assert changed[:, 1].max() > drawn.shape[1] * 0.65  # the names


def test_numbers_of_boxes_at_the_border_stay_on_the_picture():
    image, boxes = np.zeros((200, 300, 3), np.uint8), [(280, 0, 299, 20)] * 6
    drawn, named = draw_boxes(image, boxes, ["x"] * 6), draw_boxes(image, boxes[:1], ["x"])
    is_black = (named < 50).all(axis=2)
    right = int(is_black[len(named) // 2].nonzero()[0].max())
    top = int(is_black[:, right - 200].nonzero()[0].min())
    beside = np.s_[: top + 30, right + 4 :]  # of the names it holds the first alone
    assert (drawn[beside] == named[beside]).all()


def test_boxes_that_cannot_be_drawn_are_refused():
    picture = np.zeros((10, 10, 3), np.uint8)
    with pytest.raises(ValueError, match="2 boxes and 1 names"):
        draw_boxes(picture, [(0, 0, 5, 5)] * 2, ["a"])
    for box in ((0, 0, 11, 5), (5, 0, 5, 5), (-1, 0, 5, 5)):
        with pytest.raises(ValueError, match="does not lie in a picture of 10 × 10"):
            draw_boxes(picture, [box], ["a"])
