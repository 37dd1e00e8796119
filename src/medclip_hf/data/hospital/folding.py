"""One spelling for letters that look or sound the same, so that an identifier is found however it was typed."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

# Lists of words by name: of DICOM, and of everyday language.
WORDS: dict[str, frozenset[str]] = {
    name: frozenset(words)
    for name, words in json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8")).items()
}

_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe", "æ": "ae"})


def folded(text: str) -> str:
    """Small letters without accents; full-width forms as plain ones, invisible characters left out."""
    return fold_with_places(text)[0]


def fold_with_places(text: str) -> tuple[str, list[int]]:
    """The folded text, and for each of its characters the place in `text` it comes from; one more for the end."""
    if text.isascii():  # as most reports are
        return text.lower(), list(range(len(text) + 1))
    characters: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character).casefold():
            if unicodedata.category(part) in ("Mn", "Cf"):
                continue
            characters.append(" " if part.isspace() and part not in "\r\n" else part)
            places.append(place)
    places.append(len(text))
    return "".join(characters), places


def spellings(word: str) -> set[str]:
    """The folded forms of a word: Müller is also Mueller and Muller, and the other way round."""
    plain = folded(word)
    spelled_out = folded(unicodedata.normalize("NFC", word).casefold().translate(_UMLAUTS))
    return {plain, spelled_out, re.sub(r"([aou])e", r"\1", plain)} - {""}


def name_parts(value: str) -> Iterator[str]:
    """The words of a name or institution, separated by anything that is no letter ("DOE^JANE", "Smith-Jones, Ann")."""
    yield from (part for part in re.split(r"[^\w'’]+|_", value) if part and not part.isdigit())


def compact(value: str) -> str:
    """The letters and digits of a folded identifier alone: "AB-12 34" and "ab1234" are the same."""
    return re.sub(r"[\W_]+", "", folded(value))
