"""Whether a caption is English and of a length worth training on."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from medclip_hf.data.records import FigureRow
from medclip_hf.data.reports.lexicon import function_words
from medclip_hf.data.stages import Drop

_WORD = re.compile(r"[^\W\d_]+")
# Articles and prepositions that captions use and reports hardly do; none is a word of another language in the table.
_CAPTION_WORDS = {
    *("an", "and", "are", "as", "at", "between", "by", "each", "for", "from", "has", "have", "is", "of", "on", "or"),
    *("our", "showing", "shows", "that", "the", "their", "these", "this", "to", "using", "was", "were", "which"),
    "with",
}
MIN_LATIN_SHARE = 0.7  # of the letters; Greek letters and names leave an English caption well above
MAX_FOREIGN_WORDS = 2  # "de novo", "en face" and names stand in English captions
LANGUAGE_CHARS = 4000  # of a longer caption, the beginning tells the language


def clean_caption(text: str) -> str:
    """The caption on one line: control and format characters out, white space of any kind as single spaces.

    Marks of writing direction are format characters as well; in an English caption they only hide in offsets.
    """
    if not text.isascii() or not text.isprintable():
        text = "".join(_plain(character) for character in text)
    return " ".join(text.split())


def check_caption(row: FigureRow, min_words: int, max_chars: int, language: str) -> FigureRow | Drop:
    """The row as it is, or why its caption is not fit.

    Args:
        row: a figure.
        min_words: captions of fewer words say nothing of the picture.
        max_chars: longer ones are no captions (whole tables and boxes of text stand in some caption elements).
        language: ``"English"``, or ``"any"``.
    """
    num_words = sum(1 for _ in _WORD.finditer(row.caption[: max_chars + 1]))
    if not num_words:
        return Drop("caption empty", "", row.row_id)
    if len(row.caption) > max_chars:
        return Drop("caption too long", f"{len(row.caption):,} characters, at most {max_chars:,}", row.row_id)
    if num_words < min_words:
        return Drop("caption too short", f"{num_words} words, at least {min_words}", row.row_id)
    if language == "any":
        return row
    found = guess_language(row.caption)
    return row if found == language else Drop(f"caption not {language}", f"looks {found}", row.row_id)


def guess_language(text: str) -> str:
    """The language of a caption: ``"English"``, another one with a Latin script, or ``"another script"``.

    Function words decide. Captions are telegrams ("Axial CT, arrow: mass"): where no language has any, the caption
    passes for English.
    """
    text = text[:LANGUAGE_CHARS]
    letters = [character for character in text if character.isalpha()]
    if not text.isascii() and sum(map(_is_latin, letters)) < MIN_LATIN_SHARE * len(letters):
        return "another script"
    words = [word for word in _WORD.findall(text.lower()) if len(word) > 1]  # one letter is a panel ("a, b, e")
    english, foreign = _word_lists()
    counts = {language: sum(map(known.__contains__, words)) for language, known in foreign.items()}
    best = max(counts, key=lambda language: counts[language])
    num_english = sum(map(english.__contains__, words))
    return best if counts[best] > max(num_english, MAX_FOREIGN_WORDS) else "English"


@cache
def _word_lists() -> tuple[frozenset[str], dict[str, frozenset[str]]]:
    """Function words of English, and of every other language those that English has not."""
    tables = function_words()
    english = tables["English"] | _CAPTION_WORDS
    return english, {language: known - english for language, known in tables.items() if language != "English"}


@cache
def _is_latin(character: str) -> bool:
    return character.isascii() or unicodedata.name(character, "").startswith(("LATIN", "MICRO SIGN", "GREEK"))


@cache
def _plain(character: str) -> str:
    if character.isspace():
        return " "
    return "" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") else character
