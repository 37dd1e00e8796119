"""Compound figures: captions and pictures are taken apart where they agree, and kept whole where they do not."""

import io

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.articles.panel_captions import names_panels, split_caption
from medclip_hf.data.articles.panels import find_panels, take_apart
from medclip_hf.data.phantoms.compounds import draw_compound
from medclip_hf.data.records import FigureRow


def parts(caption):
    return [(part.letter, part.text) for part in split_caption(caption)]


def boxes_drawn(size, boxes, background=255, file_format="PNG"):
    """A picture of noise in boxes (left, top, right, bottom) on an even background, and its file."""
    noise = np.random.default_rng(0).integers(30, 220, (size[1], size[0], 3), dtype=np.uint8)
    pixels = np.full((size[1], size[0], 3), background, np.uint8)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = noise[top:bottom, left:right]
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(buffer, file_format)
    return image, buffer.getvalue()


def row(caption, content):
    return FigureRow("article/F1", caption, image_bytes=content)


TWO = [(0, 0, 100, 90), (110, 0, 210, 90)]


# --- captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("(A) Axial CT. (B) Coronal CT.", [("A", "Axial CT."), ("B", "Coronal CT.")]),
        ("Chest. (a) CT, (b) MRI.", [("A", "Chest. CT"), ("B", "Chest. MRI.")]),
        ("A, Axial CT. B, Coronal CT.", [("A", "Axial CT."), ("B", "Coronal CT.")]),
        ("A: Before. B: After.", [("A", "Before."), ("B", "After.")]),
        ("a) before; b) after", [("A", "before"), ("B", "after")]),
        ("(A–C) Slices. (D) Reformat.", [("A", "Slices."), ("B", "Slices."), ("C", "Slices."), ("D", "Reformat.")]),
        ("（A‐B）Slices. [C] Reformat.", [("A", "Slices."), ("B", "Slices."), ("C", "Reformat.")]),
        ("(A/B) Slices. (C) Reformat.", [("A", "Slices."), ("B", "Slices."), ("C", "Reformat.")]),
        ("(A, B) Slices. (C) Reformat.", [("A", "Slices."), ("B", "Slices."), ("C", "Reformat.")]),
        ("A, One. B through C, Two.", [("A", "One."), ("B", "Two."), ("C", "Two.")]),
        ("(A) A mass. (B) The mass in (A) enlarged.", [("A", "A mass."), ("B", "The mass in (A) enlarged.")]),
        ("(a, b) MRI. (a) Axial. (b) Coronal.", [("A", "MRI. Axial."), ("B", "MRI. Coronal.")]),
        ("CT showing (A) a mass and (B) a cyst.", [("A", "CT showing a mass"), ("B", "CT showing a cyst.")]),
    ],
)  # fmt: skip
def test_letters_that_open_a_text_take_a_caption_apart(caption, expected):
    assert parts(caption) == expected


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "A chest radiograph.",
        "Axial (A) and coronal CT (B).",
        "(A) Axial CT.",
        "(B) Coronal CT. (C) Sagittal CT.",
        "(A) Axial CT. (C) Sagittal CT.",
        "Hepatitis A, B and C. Vitamin A, D and E.",
        "(A) (B)",
        "(A) Axial. (B) ",
    ],
)
def test_captions_without_opening_letters_stay_whole(caption):
    assert parts(caption) == []


def test_trailing_letters_are_noticed():
    assert names_panels("Axial (A) and coronal CT (B).")
    assert names_panels("Left: axial CT. Right panel: coronal CT.")
    assert not names_panels("A chest radiograph (A).")
    assert not names_panels("Left: kidney of the left side.")


def test_a_caption_of_endless_markers_is_read_in_time_that_does_not_grow():
    assert parts("(A) x " * 100_000) == []


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [255, 0, 130])
def test_panels_lie_between_gutters_of_any_even_colour(background):
    boxes = [(5, 5, 100, 90), (105, 5, 200, 90), (5, 95, 100, 180), (105, 95, 200, 180)]
    assert find_panels(boxes_drawn((205, 185), boxes, background)[0]) == boxes


def test_a_large_panel_beside_small_ones_comes_first():
    boxes = [(0, 0, 150, 200), (160, 0, 250, 95), (160, 105, 250, 200)]
    assert find_panels(boxes_drawn((250, 200), boxes)[0]) == boxes


def test_letters_and_titles_are_no_panels():
    title, left, right = (20, 2, 180, 10), (0, 20, 100, 220), (110, 20, 210, 220)
    assert find_panels(boxes_drawn((210, 220), [title, left, right])[0]) == [left, right]


def test_narrow_gaps_inside_a_panel_give_way_to_the_number_of_captions():
    boxes = [(0, 0, 50, 90), (53, 0, 100, 90), (120, 0, 220, 90)]
    image = boxes_drawn((220, 90), boxes)[0]
    assert len(find_panels(image)) == 3
    assert find_panels(image, 2) == [(0, 0, 100, 90), (120, 0, 220, 90)]


def test_panels_that_touch_are_cut_at_their_seam_when_the_caption_names_them():
    pixels = np.full((100, 200, 3), 90, np.uint8)
    pixels[:, 80:] = 170
    assert find_panels(Image.fromarray(pixels), 2) == [(0, 0, 80, 100), (80, 0, 200, 100)]


def test_a_thin_line_that_was_drawn_is_no_seam():
    pixels = np.full((100, 200, 3), 90, np.uint8)
    pixels[:, 80:83] = 170
    assert len(find_panels(Image.fromarray(pixels), 2)) == 1


@pytest.mark.parametrize("pixels", [np.zeros((1, 1, 3)), np.full((60, 60, 3), 255), np.zeros((3, 500, 3))])
def test_empty_and_tiny_pictures_are_one_panel(pixels):
    height, width = pixels.shape[:2]
    assert find_panels(Image.fromarray(pixels.astype(np.uint8)), 4) == [(0, 0, width, height)]


# --- both ---------------------------------------------------------------------------------------------------------


def test_panels_are_paired_with_their_captions():
    image, content = boxes_drawn((210, 90), TWO)
    first, second = take_apart(row("Chest. (A) CT. (B) MRI.", content))
    assert (first.row_id, first.panel, first.caption) == ("article/F1.A", "A", "Chest. CT.")
    assert (second.row_id, second.panel, second.caption) == ("article/F1.B", "B", "Chest. MRI.")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(second.image_bytes))), np.asarray(image)[:, 110:])


def test_a_jpeg_stays_a_jpeg():
    content = boxes_drawn((210, 90), TWO, file_format="JPEG")[1]
    panels = list(take_apart(row("(A) CT. (B) MRI.", content)))
    assert [Image.open(io.BytesIO(panel.image_bytes)).format for panel in panels] == ["JPEG", "JPEG"]


@pytest.mark.parametrize(
    ("caption", "is_compound"),
    [("A radiograph.", False), ("(A) CT. (B) MRI. (C) PET.", True), ("CT (A) and MRI (B).", True)],
)
def test_where_caption_and_picture_disagree_the_figure_stays_whole(caption, is_compound):
    figure = row(caption, boxes_drawn((210, 90), TWO)[1])
    (whole,) = take_apart(figure)
    assert whole.is_compound is is_compound
    assert (whole.image_bytes, whole.caption, whole.row_id) == (figure.image_bytes, caption, "article/F1")


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0"])
def test_a_picture_that_cannot_be_read_stays_for_the_stage_that_drops_it(content):
    (whole,) = take_apart(row("(A) CT. (B) MRI.", content))
    assert whole.image_bytes == content
    assert whole.is_compound


def test_an_animated_gif_is_not_taken_apart():
    image = boxes_drawn((210, 90), TWO)[0]
    buffer = io.BytesIO()
    image.save(buffer, "GIF", save_all=True, append_images=[image.rotate(180)])
    assert len(list(take_apart(row("(A) CT. (B) MRI.", buffer.getvalue())))) == 1


def test_panels_too_small_to_be_used_are_left_together():
    content = boxes_drawn((85, 40), [(0, 0, 40, 40), (45, 0, 85, 40)])[1]
    assert len(list(take_apart(row("(A) CT. (B) MRI.", content)))) == 1


# --- drawn compound figures -----------------------------------------------------------------------------------------


def test_a_drawn_compound_figure_is_the_same_every_time():
    first, second = draw_compound(3, 5), draw_compound(3, 5)
    assert first.content == second.content
    assert first == second


def test_drawn_figures_on_white_are_taken_apart_into_their_panels_and_captions():
    drawn = [draw_compound(5, index) for index in range(24)]
    chosen = [figure for figure in drawn if figure.gutter == "white" and figure.style in ("(A)", "(a)", "a)")]
    rows = [list(take_apart(row(figure.caption, figure.content))) for figure in chosen]
    right = [[part.caption for part in found] == list(figure.texts) for found, figure in zip(rows, chosen, strict=True)]
    assert len(chosen) >= 5
    assert sum(right) >= 0.9 * len(right)


def test_negative_numbers_of_figures_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        draw_compound(-1, 0)
