"""Offsets of decoded captions brought back to the raw caption."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer

from medclip_hf.data.offsets import DecodedCaption
from medclip_hf.data.stages import Drop

# Every printable character alone and as a continuation, so that no word is unknown, and some whole words.
CHARACTERS = [
    chr(code) for code in (*range(33, 127), *range(0xA1, 0x250), *range(0x391, 0x3CA), 0x2013, 0x2019, 0x2212)
]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *("##" + c for c in CHARACTERS), "breast", "mass"]
TOKENIZER = BertTokenizer(vocab={piece: number for number, piece in enumerate(dict.fromkeys(PIECES))})


def decoded_by_transformers(caption):
    ids = TOKENIZER(caption, add_special_tokens=False)["input_ids"]
    return TOKENIZER.decode(ids, clean_up_tokenization_spaces=True)


def clean_up(text):
    """What transformers 4 did after decoding, as its documentation of clean_up_tokenization_spaces has it."""
    pairs = [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"]
    for pattern in pairs:
        text = text.replace(pattern, pattern.replace(" ", ""))
    return text


@pytest.mark.parametrize(
    "caption",
    [
        "Breast mass (arrow), T1-weighted; 13 cm.",
        "It's the patient's; don't: we've  seen\tit!\nNext?",
        "Étude à 5\u2009µm – β-cell’s café 3.5 ± 0.2",
        "' quoted ' ... (a),(b) A.B.",
        "Naïve İstanbul Å Δ",
    ],
)
def test_the_decoded_caption_is_that_of_a_tokenizer(caption):
    assert DecodedCaption(caption).text == clean_up(decoded_by_transformers(caption))


@given(st.text(alphabet=[*"aB é.,'s-(!?", "\u0301", "\u2009", "β", "n", "t", "m"], max_size=40))
def test_any_caption_is_decoded_as_by_a_tokenizer(caption):
    assert DecodedCaption(caption).text == clean_up(decoded_by_transformers(caption))


@given(st.text(max_size=60), st.data())
def test_every_span_of_a_decoded_caption_has_a_place_in_the_raw_caption(caption, data):
    decoded = DecodedCaption(caption)
    if not decoded.text:
        return
    start = data.draw(st.integers(0, len(decoded.text) - 1))
    end = data.draw(st.integers(start + 1, len(decoded.text)))
    span = decoded.raw_span(start, end)
    if isinstance(span, Drop):
        assert decoded.text[start:end].isspace()
    else:
        assert 0 <= span[0] < span[1] <= len(caption)


def test_a_mention_after_punctuation_moves_back_by_the_spaces_put_in():
    caption = "T1-weighted (a) Breast Mass."
    start = DecodedCaption(caption).text.index("breast")
    assert start == 20  # "t1 - weighted ( a ) breast mass."
    assert DecodedCaption(caption).raw_span(start, start + 11, ["breast", "mass"]) == (16, 27)


def test_pieces_of_a_word_are_joined():
    assert DecodedCaption("Mammogram").raw_span(0, 9, ["mamm", "##ogram"]) == (0, 9)


def test_an_accent_in_the_raw_caption_belongs_to_its_letter():
    assert DecodedCaption("cafe\u0301 x").raw_span(0, 4, ["cafe"]) == (0, 5)


def test_offsets_that_already_count_raw_characters_are_kept():
    assert DecodedCaption("(a) Mass").raw_span(4, 8, ["mass"]) == (4, 8)  # decoded, "mass" starts at 6


def test_an_unknown_word_shifts_the_offsets_and_the_nearest_place_is_taken():
    caption = "mass ⟡ and then one more Mass here"  # decoded with "[UNK]" for the symbol: four characters more
    start = "mass [UNK] and then one more mass here".rindex("mass")
    assert DecodedCaption(caption).raw_span(start, start + 4, ["mass"]) == (25, 29)


def test_the_nearest_place_is_a_whole_word():
    assert isinstance(DecodedCaption("massive lesion").raw_span(1, 5, ["mass"]), Drop)


def test_a_word_too_long_for_the_tokenizer_is_one_unknown_word():
    caption = "a" * 101 + " mass"
    assert DecodedCaption(caption).text == "[UNK] mass"
    assert DecodedCaption(caption).raw_span(6, 10, ["mass"]) == (102, 106)


@pytest.mark.parametrize("span", [(-1, 3), (3, 3), (5, 2), (0, 10**6), (10**30, 10**31)])
def test_a_span_outside_the_caption_is_dropped(span):
    drop = DecodedCaption("a mass").raw_span(*span, ["mass"])
    assert isinstance(drop, Drop)
    assert drop.reason == "concept span outside the caption"


def test_words_that_the_caption_does_not_have_are_dropped():
    drop = DecodedCaption("a mass").raw_span(0, 4, ["tumour"])
    assert isinstance(drop, Drop)
    assert drop.reason == "concept not found in the caption"


@pytest.mark.parametrize(("caption", "tokens"), [("a mass", []), ("", None), ("\u0301", None)])
def test_a_mention_without_words_is_dropped(caption, tokens):
    assert isinstance(DecodedCaption(caption).raw_span(0, 1, tokens), Drop)


def test_unknown_tokens_leave_the_offsets_to_be_trusted():
    assert DecodedCaption("a mass").raw_span(2, 6, ["[UNK]"]) == (2, 6)


def test_a_long_caption_takes_time_in_proportion_to_its_length():
    caption = "mass, " * 20_000
    assert len(DecodedCaption(caption).text) == len(re.sub(" $", "", caption))
