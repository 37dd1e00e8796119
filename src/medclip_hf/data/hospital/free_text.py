"""Free text without what identifies a patient: every such place becomes the word for its kind, and is counted.

Four finders work side by side: what this patient's headers and table say of him (names, numbers), rules for what looks
like a date, number, address or institution (`text_rules`), signs that a person is named (`persons`), and the pattern
recognisers of Presidio (phones by the numbering plans of countries, numbers with check digits). None of them
understands the text: a surname in the middle of a sentence, in no header and behind no sign, is found only by a
language model of names, which `ner_model` can name. The rules lean to replacing too much.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from medclip_hf.data.hospital.persons import person_spans
from medclip_hf.data.hospital.text_rules import Span, rule_spans

logger = logging.getLogger(__name__)

KINDS = ("NAME", "DATE", "TIME", "ID", "PHONE", "EMAIL", "URL", "ADDRESS", "INSTITUTION", "AGE")
MAX_CHARACTERS = 50_000  # of one text, 20 times a long report; what is beyond is cut off, and counted as
CUT_OFF = "CUT OFF"
WRAPPED_LINE = 60  # characters: a line break after so many is no end of a sentence
PHONE_REGIONS = ("US", "GB", "DE", "FR")  # each costs time on every text; numbers with "+" are known everywhere

# Words that are names of some and everyday language in reports: in small letters they are left alone.
_EVERYDAY = WORDS["everyday"]
_NOT_NAMES = WORDS["not_names"]
_MIN_LONE_NAME = 3  # letters; shorter parts of a name are replaced beside another part, or with one capital
_MIN_NUMBER = 4  # letters and digits; shorter numbers are in every measurement
_MIN_DIGITS = 5  # of a number whose letters are left out: "MRN-12345" as "12345"
_MIN_CASELESS = 2  # characters of a name in a script without capitals
_MIN_SPACED = 4  # letters of a name with a space behind each: "M I L L E R"
_MIN_HYPHENED = 6  # letters of a name with a hyphen or a space somewhere in it: "Zebu-lonsky", "Min Jun"
_MIN_RUN_TOGETHER = 6  # letters of names in one word: "MillerAnn"
_CYRILLIC = re.compile(r"[а-яё]", re.IGNORECASE)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


class TextDeidentifier:
    """Replaces what identifies; a callable that workers can share.

    Args:
        use_presidio: also ask Presidio's pattern recognisers.
        ner_model: name or folder of a spaCy model with persons and places, loaded through Presidio. It must be
            installed; nothing is downloaded.
        regions: countries whose phone numbers are known.

    Raises:
        ValueError: where Presidio or the model is missing.

    Examples:
        >>> deidentify = TextDeidentifier(use_presidio=False)
        >>> deidentify("Seen on 12.03.2021 by Dr. Miller.").text
        'Seen on [DATE] by Dr. [NAME].'
    """

    def __init__(
        self, use_presidio: bool = True, ner_model: str | None = None, regions: tuple[str, ...] = PHONE_REGIONS
    ) -> None:
        self.use_presidio = use_presidio or ner_model is not None
        self.ner_model = ner_model
        self.regions = regions
        if self.use_presidio:
            self._recognisers()

    def __call__(self, text: str, identifying: Sequence[str] = ()) -> Deidentified:
        """The text with every finding replaced by its kind.

        Args:
            text: a report or caption.
            identifying: what is known of this patient: names, numbers, addresses, institutions, as typed anywhere.
        """
        is_long = len(text) > MAX_CHARACTERS
        if is_long:
            text = text[:MAX_CHARACTERS].rpartition(" ")[0]  # half a name would not be found
        text = _without_invisible(text)
        flowing = _without_wrapping(text)  # as long as the text: places are the same
        spans = [*_known_spans(flowing, identifying), *rule_spans(flowing), *person_spans(flowing)]
        if self.use_presidio:
            spans += _presidio_spans(flowing, self._recognisers())
        if self.ner_model is not None:
            spans += _model_spans(flowing, _model_engine(self.ner_model))
        result = _replaced(text, spans)
        if is_long:
            result.counts[CUT_OFF] += 1
        return result

    def _recognisers(self) -> Sequence[Any]:
        return _presidio_recognisers(self.regions)


@dataclass(frozen=True)
class Deidentified:
    """A text without what identifies, and how much of each kind was replaced."""

    text: str
    counts: Counter[str]


def _without_invisible(text: str) -> str:
    """The text without characters of no width, which would hide a name from every pattern."""
    if text.isascii():
        return text
    import unicodedata

    kept = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFC", kept).replace("\xa0", " ").replace("\u202f", " ").translate(_FULL_WIDTH)


def _without_wrapping(text: str) -> str:
    """The text with a space for each line break that only wraps a long line: names are broken there as well."""
    return re.sub(rf"(?<=[^\n]{{{WRAPPED_LINE}}})\n(?=[^\s])", " ", text)


def _known_spans(text: str, identifying: Sequence[str]) -> Iterator[Span]:
    """Where the text names what is known of the patient."""
    if not identifying:
        return
    plain, places = fold_with_places(text)
    for folded_text in filter(None, ((plain, places), closed_up(plain, places))):
        for value in identifying:
            yield from _spans_of_value(text, *folded_text, value)


def _spans_of_value(text: str, plain: str, places: list[int], value: str) -> Iterator[Span]:
    if re.search(r"\d", value):
        spans = list(_spans_of_number(plain, value))
        parts = names_beside_numbers(value)
    else:
        spans = []
        parts = [part for part in name_parts(value) if folded(part) not in _NOT_NAMES]
    spans += _spans_of_name(plain, text, places, parts)
    spans += _spans_of_initials(plain, text, places, parts)
    for start, end, kind in spans:
        yield places[start], places[end - 1] + 1, kind


def _spans_of_number(plain: str, value: str) -> Iterator[Span]:
    """Places of a number or address, whatever separates its characters, and of its digits without its letters."""
    forms = number_forms(value)
    digits = re.sub(r"\D", "", compact(value))
    if len(digits) >= _MIN_DIGITS:
        forms.add(digits)
    for form in forms:
        if len(form) >= _MIN_NUMBER:
            pattern = r"[\s\-_/.,:]{0,3}".join(map(re.escape, form))
            for match in re.finditer(rf"(?<![^\W_]){pattern}(?![^\W_])", plain):
                yield match.start(), match.end(), "ID"


def _spans_of_name(plain: str, text: str, places: list[int], parts: Sequence[str]) -> Iterator[Span]:
    """Places of the parts of a name: long ones anywhere, short and everyday ones beside another part."""
    words = {spelling for part in parts for spelling in spellings(part)}
    caseless = {word for word in words if is_caseless(word)}
    for found in caseless:
        if len(found) >= _MIN_CASELESS:
            yield from ((match.start(), match.end(), "NAME") for match in re.finditer(re.escape(found), plain))
    if not words:
        return
    # Wherever the name has, or could have, an apostrophe, the text may have another sign or none: O'Brien, O Brien.
    apostrophes = {folded(part) for part in parts if "'" in folded(part)}
    patterns = {re.escape(word) for word in words} | {re.escape(word).replace("'", r"['`\s]?") for word in apostrophes}
    patterns |= {" ".join(map(re.escape, word)) for word in words if len(word) >= _MIN_SPACED}
    patterns |= {"[ -]?".join(map(re.escape, word)) for word in words if len(word) >= _MIN_HYPHENED}
    patterns |= {rf"(?:ma?c|m')[ ']?{re.escape(word[2:])}" for word in words if word.startswith("mc")}
    ending = r"[^\W\d_]{0,3}" if any(map(_CYRILLIC.search, parts)) else "s?"  # "Иванову", "Millers"
    word = "|".join(sorted(patterns, key=len, reverse=True))
    initials = "[" + "".join(sorted({re.escape(part[0]) for part in words})) + "]"
    pattern = (
        rf"(?<![^\W_])(?:{initials}\.[ \t]?){{0,3}}(?:{word})(?:[\s,.^'`_-]{{0,3}}(?:{word})){{0,5}}{ending}(?![^\W_])"
        rf"(?:,?[ \t](?:{initials}\.[ \t]?){{1,3}}(?![^\W_]))?"
    )
    for match in re.finditer(pattern, plain):
        start, end = match.span()
        original = text[places[start] : places[end - 1] + 1]
        base = match[0] if match[0] in words else match[0].removesuffix("s")  # "Müllers Befund"
        if base in words and not _may_stand_alone(base, original):
            continue
        if match[0].isalpha() and base not in words and len(match[0]) < _MIN_RUN_TOGETHER:
            continue
        yield start, end, "NAME"


def _may_stand_alone(base: str, original: str) -> bool:
    """Whether a part of a name counts by itself: of two letters it has to be written as a name, "Li" and not "LI"."""
    if len(base) < _MIN_LONE_NAME:
        return len(base) > 1 and original[0].isupper() and original[1:].islower()
    return not (base in _EVERYDAY and original.islower())


def _spans_of_initials(plain: str, text: str, places: list[int], parts: Sequence[str]) -> Iterator[Span]:
    """Places of two capital initials of a name or more, each with its full stop: "M.Z."."""
    letters = sorted({re.escape(spelling[0]) for part in parts for spelling in spellings(part)})
    if len(letters) > 1:
        pattern = rf"(?<![^\W_.])[{''.join(letters)}]\.(?:[ \t]?[{''.join(letters)}]\.){{1,3}}(?![^\W_])"
        for match in re.finditer(pattern, plain):
            original = text[places[match.start()] : places[match.end() - 1] + 1]
            if original == original.upper():
                yield match.start(), match.end(), "NAME"


def _replaced(text: str, spans: Sequence[Span]) -> Deidentified:
    """The text with the union of overlapping spans replaced once, by the kind of the longest."""
    counts: Counter[str] = Counter()
    pieces: list[str] = []
    end_of_last = 0
    for start, end, kind in _merged(spans):
        counts[kind] += 1
        pieces += [text[end_of_last:start], f"[{kind}]"]
        end_of_last = end
    pieces.append(text[end_of_last:])
    return Deidentified("".join(pieces), counts)


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[tuple[int, int, str, int]] = []
    for start, end, kind in sorted(spans, key=lambda span: (span[0], -span[1])):
        if merged and start < merged[-1][1]:
            last_start, last_end, last_kind, longest = merged[-1]
            if end - start > longest:
                last_kind, longest = kind, end - start
            merged[-1] = (last_start, max(last_end, end), last_kind, longest)
        elif end > start:
            merged.append((start, end, kind, end - start))
    return [span[:3] for span in merged]


# --- Presidio ---------------------------------------------------------------------------------------------------------

_PRESIDIO_KINDS = {
    "PHONE_NUMBER": "PHONE",
    "CREDIT_CARD": "ID",
    "IBAN_CODE": "ID",
    "US_SSN": "ID",
    "US_MBI": "ID",
    "UK_NHS": "ID",
    "UK_NINO": "ID",
    "MEDICAL_LICENSE": "ID",
    "MAC_ADDRESS": "ID",
    "IP_ADDRESS": "URL",
    "PERSON": "NAME",
    "LOCATION": "ADDRESS",
    "ORGANIZATION": "INSTITUTION",
    "DATE_TIME": "DATE",
}
_MIN_SCORE = 0.4
_MANY_DIGITS = re.compile(r"[\dA-Za-z](?:[ ()/.+:-]{0,3}[\dA-Fa-f]){5}")  # without them no recogniser finds anything


@functools.cache
def _presidio_recognisers(regions: tuple[str, ...]) -> tuple[Any, ...]:
    """Those that need neither a model nor the network (the one for e-mail addresses asks it for a list of domains)."""
    try:
        from presidio_analyzer import predefined_recognizers as recognisers
    except ImportError as error:
        raise ValueError(
            "texts are de-identified with the help of Presidio: pip install 'medclip-hf[hospital]'. Without it, rules "
            "and the names of table and headers alone are used when you ask for that (--without-presidio)."
        ) from error
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    return (
        recognisers.PhoneRecognizer(supported_regions=regions),
        recognisers.CreditCardRecognizer(),
        recognisers.IbanRecognizer(),
        recognisers.UsSsnRecognizer(),
        recognisers.UsMbiRecognizer(),
        recognisers.NhsRecognizer(),
        recognisers.UkNinoRecognizer(),
        recognisers.MedicalLicenseRecognizer(),
        recognisers.MacAddressRecognizer(),
        recognisers.IpRecognizer(),
    )


def _presidio_spans(text: str, recognisers: Sequence[Any]) -> list[Span]:
    spans = []
    for recogniser in recognisers if _MANY_DIGITS.search(text) else ():
        for result in recogniser.analyze(text, recogniser.supported_entities, None):
            if result.score >= _MIN_SCORE:
                spans.append((result.start, result.end, _PRESIDIO_KINDS[result.entity_type]))
    return spans


@functools.cache
def _model_engine(ner_model: str) -> Any:
    """Presidio with a spaCy model that is installed."""
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import SpacyRecognizer

        nlp = spacy.load(ner_model)
    except (ImportError, OSError) as error:
        raise ValueError(
            f"the language model {ner_model!r} is not installed. Install it first; nothing is downloaded from here."
        ) from error

    language = str(nlp.lang)

    class LoadedEngine(SpacyNlpEngine):
        """An engine of a model in memory: Presidio's own would offer to download it."""

        def __init__(self) -> None:
            super().__init__(models=[{"lang_code": language, "model_name": ner_model}])
            self.nlp: Any = {language: nlp}

        def load(self) -> None:
            """Nothing to do: the model is in memory."""

    registry = RecognizerRegistry(
        recognizers=[SpacyRecognizer(supported_language=language)], supported_languages=[language]
    )
    return AnalyzerEngine(registry=registry, nlp_engine=LoadedEngine(), supported_languages=[language])


def _model_spans(text: str, engine: Any) -> list[Span]:
    language = engine.supported_languages[0]
    results = engine.analyze(text, language, entities=["PERSON", "LOCATION"], score_threshold=_MIN_SCORE)
    return [(result.start, result.end, _PRESIDIO_KINDS[result.entity_type]) for result in results]
