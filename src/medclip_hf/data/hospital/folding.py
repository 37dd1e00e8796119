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

# Any letter but the small ones of the alphabets in use: a class of all capitals would be slow to compile.
CAPITAL = "[^\\W\\d_a-zß-öø-ÿа-яёα-ωά-ώąćęłńśźżčďěňřšťůžđğışșţțőűāēģīķļņū]"

# Letters that look alike, or have no accent to take off, and signs that one types for another.
_ALIKE = str.maketrans(
    dict(zip("авекмнорстухіјѕһԁԛԝαβεηικμνορτυχζ", "abekmhopctyxijshdqwabenikmvoptuxz", strict=True))
    | {"ł": "l", "đ": "d", "ø": "o", "ı": "i", "ħ": "h", "ŧ": "t"}
    | dict.fromkeys("’‘ʼ´′", "'")
    | dict.fromkeys("‐‑‒–—―−", "-")
)
_BROKEN_WORD = re.compile(r"(?<=[^\W_])-(?:[ \t]*\r?\n[ \t]*|[ \t]{1,8})(?=[^\W_])")
_SPACED_WORD = re.compile(r"(?<![^\W_])(?:[^\W_] ){3,}[^\W_](?![^\W_.])")
_MAC = re.compile(r"(?:ma?c|m')[ ']?(?=[^\W\d_]{4})")
_MIN_NATIONAL_DIGITS = 7  # of a phone number without its country code
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe", "æ": "ae"})

# Forms of one name in Latin letters, in groups: each word to its group.
_TRANSLITERATIONS = {word: frozenset(group.split()) for group in WORDS["transliterations"] for word in group.split()}


def folded(text: str) -> str:
    """Small letters without accents; full-width forms and look-alikes as plain ones, invisible characters left out."""
    return fold_with_places(text)[0]


def fold_with_places(text: str) -> tuple[str, list[int]]:
    """The folded text, and for each of its characters the place in `text` it comes from; one more for the end."""
    if text.isascii():  # as most reports are
        return text.lower(), list(range(len(text) + 1))
    characters: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character).casefold():
            category = unicodedata.category(part)
            if category in ("Mn", "Cf"):
                continue
            if category == "Nd":  # digits of any script
                part = str(unicodedata.decimal(part))
            characters.append(" " if part.isspace() and part not in "\r\n" else part.translate(_ALIKE))
            places.append(place)
    places.append(len(text))
    return "".join(characters), places


def closed_up(plain: str, places: list[int]) -> tuple[str, list[int]] | None:
    """A folded text with words that were broken at the end of a line, or spaced out, in one piece; None without any.

    Args:
        plain: folded text.
        places: of its characters, as `fold_with_places` gives them.
    """
    gaps = {place for match in _BROKEN_WORD.finditer(plain) for place in range(*match.span())}
    gaps |= {place for match in _SPACED_WORD.finditer(plain) for place in range(match.start() + 1, match.end(), 2)}
    if not gaps:
        return None
    kept = [place for place in range(len(plain)) if place not in gaps]
    return "".join(plain[place] for place in kept), [*(places[place] for place in kept), places[-1]]


def is_caseless(word: str) -> bool:
    """Whether a word is of a script without capitals (山田), in which no space separates words."""
    return word.lower() == word.upper() and word.isalpha()


def spellings(word: str) -> set[str]:
    """The folded forms of a word, without apostrophes: Müller is also Mueller and Muller, and the other way round."""
    plain = folded(word).replace("'", "")
    spelled_out = folded(unicodedata.normalize("NFC", word).casefold().translate(_UMLAUTS)).replace("'", "")
    found = {plain, spelled_out, re.sub(r"([aou])e", r"\1", plain)} - {""}
    if match := _MAC.match(folded(word)):  # MacDonald is also McDonald
        found |= {prefix + folded(word)[match.end() :].replace("'", "") for prefix in ("mac", "mc")}
    return found | _TRANSLITERATIONS.get(plain, frozenset())


def number_forms(value: str) -> set[str]:
    """The letters and digits of a number in the ways it is written: with and without leading zeros or country code."""
    whole = compact(value)
    forms = {whole, whole.lstrip("0")}
    if value.strip().startswith("+") and whole.isdigit():
        nationals = {whole[length:].lstrip("0") for length in (1, 2, 3)}
        for national in (number for number in nationals if len(number) >= _MIN_NATIONAL_DIGITS):
            forms |= {national, f"0{national}", f"00{whole}"}
    return forms - {""}


def name_parts(value: str) -> Iterator[str]:
    """The words of a name or institution, separated by anything that is no letter ("DOE^JANE", "Smith-Jones, Ann")."""
    yield from (part for part in re.split(r"[^\w'’]+|_", value) if part and not part.isdigit())


def names_beside_numbers(value: str) -> list[str]:
    """The names in a cell that also holds numbers ("Doe, Jane, *1950"); none in a mere number ("CT-1234")."""
    if not re.search(r"[\s,^;]", value.strip()):
        return []
    parts = [part for part in name_parts(value) if part.replace("'", "").replace("’", "").isalpha()]
    return [part for part in parts if len(part) >= 4 and folded(part) not in WORDS["everyday"] | WORDS["not_names"]]


def compact(value: str) -> str:
    """The letters and digits of a folded identifier alone: "AB-12 34" and "ab1234" are the same."""
    return re.sub(r"[\W_]+", "", folded(value))
