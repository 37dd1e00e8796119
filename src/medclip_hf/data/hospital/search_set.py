"""What must not leave: identifiers of table and headers as keyed hashes, and the search for them in any text.

The set can be kept and used on another machine without the table. Its hashes need the key of the data set: numbers of
patients are few, and a plain hash of each could be tried.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from hashlib import blake2b
from itertools import combinations, product
from pathlib import Path
from typing import Any

from medclip_hf.data.hospital.folding import (
    WORDS,
    closed_up,
    compact,
    fold_with_places,
    folded,
    is_caseless,
    name_parts,
    names_beside_numbers,
    number_forms,
    spellings,
)
from medclip_hf.data.hospital.months import MONTH_NUMBERS
from medclip_hf.data.hospital.pseudonyms import Pseudonyms
from medclip_hf.data.parquet import write_text_atomically

FORMAT_VERSION = 1
MIN_NUMBER = 4  # letters and digits
MIN_PLAIN_NUMBER = 6  # digits of a number without letters; shorter ones are searched for as a whole value alone
MIN_DIGITS = 6  # of a number whose letters are left out: "MRN-123456" as "123456"
MIN_NAME_PART = 4
MIN_RUN_TOGETHER = 6  # letters of two parts of a name in one word
MIN_CASELESS = 2  # characters of a name in a script without capitals, which stand in a row of others
MAX_CASELESS = 6
MAX_JOINED = 16  # pieces that a number may be written in; DICOM's unique identifiers have a dozen
_MAX_LETTERS = 8  # of one piece of such a number
_MAX_NAME_PARTS = 8
_HASH_BYTES = 12
_SHORT_VALUE = 100  # characters of a text that may be nothing but a number

_QUOTED = re.compile(r"[\"'>]([^\W_]{4,5})[\"'<](?!:)")  # a value alone, of JSON or HTML
_TOKEN = re.compile(r"[^\W_]+")
_DATE_LIKE = re.compile(
    r"(?<!\d)(?:(?P<y>(?:19|20)\d\d)(?P<s>[-./ ]?)(?P<m>\d{1,2})(?P=s)(?P<d>\d{1,2})"
    r"|(?P<a>\d{1,2})(?P<t>[-./] ?| )(?P<b>\d{1,2})(?P=t)(?P<c>(?:19|20)\d\d)"
    r"|(?P<e>\d\d)(?P<f>\d\d)(?P<g>(?:19|20)\d\d)"
    r"|(?<!\d[-./])(?P<h>\d{1,2})(?P<u>[-./] ?)(?P<i>\d{1,2})(?P=u)(?P<j>\d\d)(?![-./]?\d))(?!\d)"
)
_MONTH = "|".join(map(re.escape, sorted(MONTH_NUMBERS, key=len, reverse=True)))
_NAMED_DATE = re.compile(
    rf"(?<![^\W_])(?:(?P<d1>\d{{1,2}})(?:st|nd|rd|th|er)?[ .-]{{0,2}}(?:(?:of|de|del) )?(?P<m1>{_MONTH})"
    rf"|(?P<m2>{_MONTH})[ .]{{1,2}}(?P<d2>\d{{1,2}})(?:st|nd|rd|th)?)[ ,.-]{{0,2}}(?:(?:of|de|del) )?"
    r"(?P<y>(?:19|20)\d\d|\d\d)(?!\d)"
)
_EASTERN_DATE = re.compile(r"(?<!\d)(?P<y>(?:19|20)\d\d) ?[年년] ?(?P<m>\d{1,2}) ?[月월] ?(?P<d>\d{1,2})")
_PREFIXES = frozenset(
    {"mac", "mc", "o", "d", "al", "el", "de", "le", "la", "van", "von", "st"}
)  # of names in two words


@dataclass(frozen=True)
class Hit:
    """An identifier found: where it begins (in characters) and of what kind it is; never what it says."""

    place: int
    kind: str


@dataclass
class SearchSet:
    """Hashed identifiers.

    Args:
        pseudonyms: of the key that hashes them.
        hashes: of all forms.
        num_values: how many identifiers were added.
        num_too_short: how many of them are so short that they would be found everywhere, and are not searched for.
    """

    pseudonyms: Pseudonyms
    hashes: set[bytes] = field(default_factory=set, repr=False)
    num_values: int = 0
    num_too_short: int = 0
    _lengths: set[int] = field(default_factory=set, repr=False)
    _known: dict[str, bool] = field(default_factory=dict, repr=False)

    def add(self, values: Iterable[str]) -> None:
        """Add identifiers as they stand in a cell or header element."""
        for value in values:
            forms = list(_forms(value))
            self.num_values += bool(compact(value))
            self.num_too_short += bool(compact(value)) and not forms
            for form in forms:
                self.hashes.add(self._hash(form))
                self._lengths.add(len(form))

    def merge(self, hashes: Iterable[bytes], lengths: Iterable[int]) -> None:
        """Add what another set of the same key holds."""
        self.hashes.update(hashes)
        self._lengths.update(lengths)

    def lengths(self) -> list[int]:
        """Of the forms, which spares most look-ups."""
        return sorted(self._lengths)

    def __len__(self) -> int:
        return len(self.hashes)

    def search(self, text: str, *, with_name_parts: bool = True) -> Iterator[Hit]:
        """Every identifier in a text, as far as it is written with the same letters and digits.

        Found are numbers however they are separated, dates in the usual forms, two parts of a name side by side in
        either order, and single parts of names of 4 letters or more.

        Args:
            text: any.
            with_name_parts: whether single parts count; in a tokenizer's list of words every common name stands.
        """
        plain, places = fold_with_places(text)
        if len(text) < _SHORT_VALUE and self._has("value", compact(text)):
            yield Hit(0, "identifier")
        if with_name_parts:
            for match in _QUOTED.finditer(text):
                if self._has("value", compact(match[1])):
                    yield Hit(match.start(1), "identifier")
        yield from self._search(plain, places, with_name_parts)
        if with_name_parts and (closed := closed_up(plain, places)) is not None:
            known = {(hit.place, hit.kind) for hit in self._search(plain, places, with_name_parts)}
            yield from (h for h in self._search(*closed, with_name_parts) if (h.place, h.kind) not in known)

    def _search(self, plain: str, places: list[int], with_name_parts: bool) -> Iterator[Hit]:
        yield from (Hit(places[place], "date") for place in self._dates(plain))
        tokens = list(_TOKEN.finditer(plain))
        end_of_number = 0
        for number, token in enumerate(tokens):
            word = token[0]
            if number >= end_of_number and (length := self._number_at(plain, tokens, number)):
                end_of_number = number + length
                yield Hit(places[token.start()], "identifier")
            if word.isdigit():
                continue
            following = tokens[number + 1] if number + 1 < len(tokens) else None
            between = plain[token.end() : following.start()] if following is not None else "\n"
            is_beside = len(between) <= 3 and (with_name_parts or "\n" not in between)
            if following is not None and is_beside:
                pair = " ".join(sorted((word, following[0])))
                if self._has("name", pair):
                    yield Hit(places[token.start()], "name")
                elif word in _PREFIXES and with_name_parts and self._has("part", word + following[0]):
                    yield Hit(places[token.start()], "part of a name")
            if with_name_parts and any(self._has("part", part) for part in _parts_of_word(word)):
                yield Hit(places[token.start()], "part of a name")

    def _number_at(self, plain: str, tokens: list[re.Match[str]], number: int) -> int:
        """In how many pieces an identifier with digits begins at a token; 0 where none does."""
        first = tokens[number]
        start = first.start()
        if start >= 2 and plain[start - 1] == "." and plain[start - 2].isdigit() and first[0].isdigit():
            return 0  # digits behind a decimal point, of which logs and configurations are full
        joined = ""
        for place in range(number, min(number + MAX_JOINED, len(tokens))):
            piece = tokens[place][0]
            if place > number:
                between = plain[tokens[place - 1].end() : tokens[place].start()]
                if len(between) > 3 or "\n" in between or '"' in between:
                    return 0
            has_digit = not piece.isalpha()
            if not has_digit and len(piece) > _MAX_LETTERS:  # a word, not a part of a number
                return 0
            if not has_digit and place > number and tokens[place - 1][0].isalpha():  # two words in a row
                return 0
            joined += piece
            if not joined.isalpha() and self._has("number", joined):
                return place - number + 1
        return 0

    def _dates(self, plain: str) -> Iterator[int]:
        for match in _dates_like(plain):
            if any(self._has("date", day.isoformat()) for day in _days(match)):
                yield match.start()

    def _has(self, kind: str, form: str) -> bool:
        if len(kind) + 1 + len(form) not in self._lengths:
            return False
        tagged = f"{kind}\x1f{form}"
        known = self._known.get(tagged)
        if known is None:
            if len(self._known) > 1_000_000:
                self._known.clear()
            known = self._known[tagged] = self._hash(tagged) in self.hashes
        return known

    def _hash(self, form: str) -> bytes:
        return blake2b(form.encode("utf-8", "replace"), key=self.pseudonyms.key, digest_size=_HASH_BYTES).digest()

    def save(self, path: Path) -> None:
        """Write the set, mode 0600."""
        values = {
            "format_version": FORMAT_VERSION,
            "key_check": self.pseudonyms.key_check,
            "num_values": self.num_values,
            "num_too_short": self.num_too_short,
            "lengths": self.lengths(),
            "hashes": sorted(value.hex() for value in self.hashes),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        old = os.umask(0o077)
        try:
            write_text_atomically(path, json.dumps(values) + "\n")
        finally:
            os.umask(old)

    @classmethod
    def load(cls, path: Path, pseudonyms: Pseudonyms) -> SearchSet:
        """The set that `save` wrote.

        Raises:
            ValueError: another key, another version, or no such file.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values["format_version"] != FORMAT_VERSION:
                raise ValueError(f"{path} has version {values['format_version']}, this code reads {FORMAT_VERSION}")
            if values["key_check"] != pseudonyms.key_check:
                raise ValueError(
                    f"{path} was made with another key: nothing would be found. Name the key it belongs to."
                )
            hashes = {bytes.fromhex(value) for value in values["hashes"]}
            counts = (int(values["num_values"]), int(values["num_too_short"]))
            return cls(pseudonyms, hashes, *counts, set(values["lengths"]))
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is no search set of scripts/prepare_hospital.py ({type(error).__name__})"
            ) from error


def _parts_of_word(word: str) -> Iterator[str]:
    """What a word of a text may hide: itself, its form without the s of "Millers", names in a row of signs (山田)."""
    if not word.isascii() and any(map(is_caseless, word)):
        for start in range(len(word)):
            yield from (word[start : start + length] for length in range(MIN_CASELESS, MAX_CASELESS + 1))
    if len(word) >= MIN_NAME_PART:
        yield word
    if len(word) > MIN_NAME_PART and word.endswith("s"):
        yield word[:-1]


def _forms(value: str) -> Iterator[str]:
    """The spellings by which an identifier is found, each tagged by its kind."""
    whole = compact(value)
    if not any(map(str.isdigit, whole)):
        yield from _forms_of_name([part for part in name_parts(value) if folded(part) not in WORDS["not_names"]])
        return
    plain = folded(value).strip()
    for match in _dates_like(plain):
        if match[0] == plain or re.search(r"\d{4}", match[0]):  # three small numbers within others are no date
            yield from {f"date\x1f{day.isoformat()}" for day in _days(match)}
    digits = re.sub(r"\D", "", whole)
    for form in number_forms(value) | ({digits} if len(digits) >= MIN_DIGITS else set()):
        if len(form) >= (MIN_PLAIN_NUMBER if form.isdigit() else MIN_NUMBER):
            yield f"number\x1f{form}"
        elif len(form) >= MIN_NUMBER:
            yield f"value\x1f{form}"
    yield from _forms_of_name(names_beside_numbers(value))


def _forms_of_name(parts: list[str]) -> Iterator[str]:
    """Two parts side by side or in one word, and single parts that are long enough."""
    forms = [spellings(part) for part in parts[:_MAX_NAME_PARTS]]
    for first, second in combinations(forms, 2):
        if first <= WORDS["everyday"] and second <= WORDS["everyday"]:  # "University Hospital" names nobody
            continue
        for one, other in product(first, second):
            yield f"name\x1f{' '.join(sorted((one, other)))}"
            if len(one + other) >= MIN_RUN_TOGETHER:
                yield from (f"part\x1f{one}{other}", f"part\x1f{other}{one}")
    for part in parts[:_MAX_NAME_PARTS]:
        if "'" in folded(part):  # a text's words end at the apostrophe
            before, _, after = folded(part).partition("'")
            yield f"name\x1f{' '.join(sorted((before, after)))}"
    for part in (spelling for spelling_set in forms for spelling in spelling_set):
        enough = MIN_CASELESS if is_caseless(part) else MIN_NAME_PART
        if len(part) >= enough and part not in WORDS["everyday"]:
            yield f"part\x1f{part}"


def _dates_like(plain: str) -> Iterator[re.Match[str]]:
    """Everything in a folded text that is written as a date."""
    for pattern in (_DATE_LIKE, _NAMED_DATE, _EASTERN_DATE):
        yield from pattern.finditer(plain)


def _days(match: re.Match[str]) -> Iterator[date]:
    """The dates that a match can mean: 03/04/20 is four."""
    found = match.groupdict()
    if "m1" in found:
        month = str(MONTH_NUMBERS[found["m1"] or found["m2"]])
        orders = [(found["y"], month, found["d1"] or found["d2"])]
    elif found["y"]:
        orders = [(found["y"], found["m"], found["d"])]
    else:
        one, other, year = (found[x] or found[y] or found[z] for x, y, z in ("aeh", "bfi", "cgj"))
        orders = [(year, one, other), (year, other, one)]
    for year, month, day in orders:
        for century in ("",) if len(year) == 4 else ("19", "20"):
            with suppress(ValueError):
                yield date(int(century + year), int(month), int(day))
