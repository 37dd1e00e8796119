"""What is read of a DICOM header: by an allow list what many patients share, and apart from it what must not stay.

Nothing of a header is copied. Of the few elements on the allow list each value must be one of the words that DICOM
defines, or, for the model of the scanner, look like one; whatever else stands there is left out. What identifies a
patient is read as well, for one purpose: to find it in texts and uploads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

from medclip_hf.data.hospital.folding import WORDS
from medclip_hf.data.hospital.rows import PatientGroups

if TYPE_CHECKING:
    from pydicom import Dataset

_SEXES = {
    **dict.fromkeys(("f", "female", "w", "weiblich"), "F"),
    **dict.fromkeys(("m", "male", "männlich"), "M"),
    **dict.fromkeys(("o", "other", "d", "divers"), "O"),
}
OLDEST_BAND = 90  # ages above 89 identify: HIPAA's safe harbour, 45 CFR 164.514(b)(2)(i)(C)
# Vendor's model names are short; longer or odd values are what somebody typed.
_SCANNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+()/-]{0,39}")
# Of PS3.16 Annex L: those that occur in practice. A value outside of the list may be free text.
_BODY_PARTS = WORDS["body_parts"]
_VIEWS = WORDS["views"]
_MODALITIES = WORDS["modalities"]  # of PS3.16 CID 29 and those that were retired
OTHER_MODALITY = "other"
_HEADS = WORDS["heads"]

# Elements whose values identify, beside every element that holds a person's name, an address or a number.
_IDENTIFYING_KEYWORDS = WORDS["identifying_keywords"]
_MAX_NESTING = 8
_MAX_IDENTIFYING = 2000  # of one header: enhanced objects repeat theirs in every frame


def groups_of_header(header: Dataset) -> PatientGroups:
    """What the allow list lets through; empty where a value is missing or not one of the words it lists."""
    birth, examined = _date(header.get("PatientBirthDate")), _date(header.get("StudyDate"))
    return PatientGroups(
        sex=sex_of(_text(header, "PatientSex")),
        age_band=age_band_of(_text(header, "PatientAge")) or _band_between(birth, examined),
        scanner=scanner_of(_text(header, "ManufacturerModelName")),
        modality=_listed(_text(header, "Modality"), _MODALITIES),
        body_part=_listed(_text(header, "BodyPartExamined"), _BODY_PARTS),
        view=_listed(_text(header, "ViewPosition"), _VIEWS),
    )


def modality_of(header: Dataset) -> str:
    """DICOM's code of the modality, "other" for anything else that stands there, empty where nothing does."""
    text = _text(header, "Modality")
    return _listed(text, _MODALITIES) or (OTHER_MODALITY if text else "")


def sex_of(text: str) -> str:
    """One of "F", "M" and "O"; empty for anything else."""
    return _SEXES.get(text.strip().casefold(), "")


def age_band_of(text: str) -> str:
    """Ten years ("60-69", "90+") out of years ("64", "64.5") or DICOM's form ("064Y", "018M"); empty if neither."""
    match = re.fullmatch(r"\s*(\d{1,4})(?:[.,]\d+)?\s*([YMWDymwd]?)\s*", text)
    if match is None:
        return ""
    years = int(match[1]) // {"M": 12, "W": 52, "D": 365}.get(match[2].upper(), 1)
    if years > 125:
        return ""
    low = min(years // 10 * 10, OLDEST_BAND)
    return f"{low}+" if low == OLDEST_BAND else f"{low}-{low + 9}"


def scanner_of(text: str) -> str:
    """The model of a scanner where it looks like one: short, plain characters, no long number."""
    text = " ".join(text.split())
    return "" if re.search(r"\d{5,}", text) else _matching(text, _SCANNER)


def shows_head(groups: PatientGroups) -> bool:
    """Whether the examination may show a face, which a volume gives back in three dimensions."""
    return groups.body_part in _HEADS


def identifying_values(header: Dataset) -> tuple[str, ...]:
    """Every value of a header that identifies, of nested sequences as well: to be searched for, never to be kept.

    Private elements are not among them, since nobody knows which of their values identify; none of them is kept.
    """
    found: dict[str, None] = {}
    for value in _identifying(header, 0):
        found.setdefault(value)
        if len(found) >= _MAX_IDENTIFYING:
            break
    return tuple(found)


def _identifying(dataset: Dataset, depth: int) -> Iterator[str]:
    """The patient's own elements first, then those of sequences, which may name thousands of other objects."""
    sequences = []
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        except Exception:  # noqa: S112 - a damaged element gives nothing to search for, and is never kept
            continue
        if element.VR == "SQ":
            sequences.append(element)
        elif element.VR == "PN" or element.keyword in _IDENTIFYING_KEYWORDS:
            values = element.value if isinstance(element.value, Sequence | list) else [element.value]
            for value in [values] if isinstance(values, str) else values:
                for part in filter(None, (part.strip() for part in str(value or "").split("="))):
                    yield part
                    yield from _repaired(part)
    for element in sequences if depth < _MAX_NESTING else ():
        for item in element.value or ():
            yield from _identifying(item, depth + 1)


def _repaired(text: str) -> Iterator[str]:
    """The name that was meant, where a device wrote UTF-8 without saying so: "MÃ¼ller"."""
    try:
        repaired = text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return
    if repaired != text:
        yield repaired


def _text(header: Dataset, keyword: str) -> str:
    value: Any = header.get(keyword)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if len(value) else ""
    return str(value if value is not None else "").strip()


def _listed(text: str, words: frozenset[str]) -> str:
    word = re.sub(r"[ _/-]+", "", text.upper())
    return word if word in words else ""


def _matching(text: str, pattern: re.Pattern[str]) -> str:
    return text if pattern.fullmatch(text) else ""


def _date(value: Any) -> date | None:
    try:
        return datetime.strptime(str(value), "%Y%m%d").date()
    except ValueError:
        return None


def _band_between(birth: date | None, examined: date | None) -> str:
    if birth is None or examined is None or examined < birth:
        return ""
    years = examined.year - birth.year - ((examined.month, examined.day) < (birth.month, birth.day))
    return age_band_of(str(years))
