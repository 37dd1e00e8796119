"""Language and length of captions."""

import pytest

from medclip_hf.data.engine.language import check_caption, clean_caption, guess_language
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Drop


@pytest.mark.parametrize(
    "caption",
    [
        "Axial CT of the chest shows a mass in the right upper lobe.",
        "Chest radiograph. Arrow: consolidation.",
        "H&E, ×400",
        "TGF-β1 and α-SMA expression; scale bar 50 µm. (a) De novo, (b) en face view.",
    ],
)
def test_english_captions_pass(caption):
    assert guess_language(caption) == "English"


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("Radiographie du thorax montrant une opacité dans le lobe supérieur avec un épanchement", "French"),
        ("Röntgenbild der Lunge mit einem Rundherd und nicht im Mediastinum", "German"),
        ("La radiografía del tórax muestra una masa en el lóbulo superior con derrame", "Spanish"),
        ("صورة شعاعية للصدر تظهر كتلة في الفص العلوي الأيمن", "another script"),
        ("胸部CT显示右肺上叶肿块", "another script"),
    ],
)
def test_other_languages_are_told(caption, language):
    assert guess_language(caption) == language


def test_a_name_in_another_script_leaves_a_caption_english():
    assert guess_language("Portrait of the physician Ибн Сина with the book that he wrote on the pulse") == "English"


def test_control_and_direction_marks_leave_the_caption():
    assert clean_caption("a\x00 mass\u202e in\u200b the\r\n\tlung\x07 ") == "a mass in the lung"


def test_words_are_not_glued_where_white_space_is_unusual():
    assert clean_caption("left\u00a0lung\u2028right\u3000lung") == "left lung right lung"


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "caption empty"),
        ("12 (3)", "caption empty"),
        ("Chest CT", "caption too short"),
        ("word " * 10_001, "caption too long"),
        ("Röntgenbild der Lunge mit einem Rundherd und nicht im Mediastinum", "caption not English"),
    ],
)
def test_captions_that_are_not_fit_are_dropped_with_their_reason(caption, reason):
    outcome = check_caption(FigureRow("r", caption), min_words=3, max_chars=50_000, language="English")
    assert isinstance(outcome, Drop)
    assert (outcome.reason, outcome.row_id) == (reason, "r")


def test_any_language_may_be_asked_for():
    row = FigureRow("r", "Röntgenbild der Lunge mit einem Rundherd")
    assert check_caption(row, 3, 100, "any") is row
