"""What captions deny and doubt."""

import pytest

from medclip_hf.data.concepts.negation import Certainty, CertaintyRules, shipped_rules
from medclip_hf.data.concepts.words import split_words


def judge(caption: str, *mentions: str) -> list[str]:
    words = split_words(caption)
    places = []
    for mention in mentions:
        parts = mention.split()
        first = next(n for n in range(len(words)) if list(words.texts[n : n + len(parts)]) == parts)
        places.append((first, first + len(parts) - 1))
    return [certainty.value[0] for certainty in shipped_rules().judge(caption, words, places)]


@pytest.mark.parametrize(
    ("caption", "mention"),
    [
        ("There is no pneumothorax.", "pneumothorax"),
        ("Without signs of thrombosis", "thrombosis"),
        ("No evidence of acute fracture", "fracture"),
        ("Fracture was excluded.", "Fracture"),
        ("The nodule is no longer visible.", "nodule"),
        ("Neither effusion nor edema", "edema"),
        ("negative for tumor", "tumor"),
        ("Absence of a mass", "mass"),
        ("No radiographic evidence of fracture", "fracture"),
        ("no recent history of trauma", "trauma"),
    ],
)
def test_denials_are_seen(caption: str, mention: str) -> None:
    assert judge(caption, mention) == ["n"]


@pytest.mark.parametrize(
    ("caption", "mention"),
    [
        ("Possible pneumothorax", "pneumothorax"),
        ("Findings suggestive of edema", "edema"),
        ("Effusion cannot be excluded.", "Effusion"),
        ("melanoma versus nevus", "nevus"),
        ("CT to exclude fracture", "fracture"),
        ("r/o fracture", "fracture"),
        ("Fracture unlikely", "Fracture"),
    ],
)
def test_doubts_are_seen(caption: str, mention: str) -> None:
    assert judge(caption, mention) == ["u"]


@pytest.mark.parametrize(
    ("caption", "mention"),
    [
        ("with or without edema", "edema"),
        ("not only edema", "edema"),
        ("No significant change of the nodule", "nodule"),
        ("HER2 negative carcinoma", "carcinoma"),
        ("Ultrasound showing a mass is not shown.", "mass"),
        ("No pneumothorax. Nodule", "Nodule"),
        ("No pneumothorax; nodule", "nodule"),
        ("No pneumothorax but a nodule", "nodule"),
        ("No pneumothorax and a nodule", "nodule"),
        ("No effusion in this patient with a nodule", "nodule"),
        ("No fracture (arrow) edema", "edema"),
    ],
)
def test_what_only_stands_near_a_cue_is_affirmed(caption: str, mention: str) -> None:
    assert judge(caption, mention) == ["a"]


def test_a_denial_runs_through_a_list_to_its_end() -> None:
    assert judge("No fracture, edema or effusion", "fracture", "edema", "effusion") == ["n", "n", "n"]


def test_a_comma_without_a_list_ends_a_denial() -> None:
    assert judge("No fracture, edema persists", "fracture", "edema") == ["n", "a"]


def test_a_cue_inside_a_mention_is_none() -> None:
    assert judge("not otherwise specified edema", "not otherwise specified", "edema") == ["a", "a"]


def test_denial_goes_before_doubt() -> None:
    assert judge("no possible fracture", "fracture") in (["n"], ["u"])


def test_a_long_caption_takes_time_in_proportion() -> None:
    assert set(judge("no fracture, " * 5000, "fracture")) == {"n"}


def test_cues_of_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="keys"):
        CertaintyRules({"reach": 5, "denied": ["no"]})


def test_there_are_three_certainties() -> None:
    assert [certainty.value for certainty in Certainty] == ["affirmed", "uncertain", "negated"]
