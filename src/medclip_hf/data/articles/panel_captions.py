"""Captions of compound figures in parts: the text of each panel letter, with the words that hold for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_PANELS = 26
_MAX_CHARS = 20_000  # of a caption; longer ones are tables, and are not searched

_DASHES = "‐‑‒–—−-"
_LETTERS = rf"[A-Za-z](?:\s*(?:,\s*and|[,;&/{_DASHES}]|and|to|through)\s*[A-Za-z]){{0,{MAX_PANELS}}}"
_BRACKETED = re.compile(rf"[(\[（](?:[Pp]anels?\s+)?({_LETTERS})[)\]）]\s*[:.,]?\s*")
_BARE = re.compile(rf"(?<![\w(])(?:[Pp]anels?\s+)?({_LETTERS})\s?([,:.)])\s+")
_SEPARATOR = re.compile(rf"\s*(,\s*and|[,;&/{_DASHES}]|and|to|through)\s*")
_RANGE = {"to", "through", *_DASHES}
_POSITION = re.compile(r"\b(left|right|top|bottom|upper|lower|middle|cent(?:er|re))(?: (?:panel|image|row)s?)?:", re.I)

# A marker opens its text: it stands at the beginning, behind a mark, or behind one of these words.
_OPENING = re.compile(r"(?:^|[.;:,?!)\]]|\b(?:and|showing|shows|show|with|of|including|are|is)|[—–])\s*$")
_SENTENCE_START = re.compile(r"(?:^|[.;:?!)\]])\s*$")


@dataclass(frozen=True)
class PanelCaption:
    """What a caption says of one panel.

    Args:
        letter: of the panel, upper case.
        text: words for all panels, then those for this one.
    """

    letter: str
    text: str


@dataclass(frozen=True)
class _Marker:
    letters: tuple[str, ...]
    start: int
    end: int


def split_caption(caption: str) -> tuple[PanelCaption, ...]:
    """The parts of a caption whose panel letters open their text; empty where it has no such letters.

    ``(A) Axial CT. (B) Coronal CT.``, ``A, Axial … B, Coronal …``, ``(a–c) Slices. (d) Reformat.`` are taken apart:
    letters begin with A and none is left out. ``Axial (A) and coronal CT (B)`` is not, since the words between two
    letters may belong to either.

    Args:
        caption: plain text.
    """
    if len(caption) > _MAX_CHARS:
        return ()
    bracketed = _in_sequence(_bracketed(caption))
    markers = bracketed if _count(bracketed) > 1 else _in_sequence(_bare(caption))
    if _count(markers) < 2 or _count(markers) > MAX_PANELS:
        return ()
    shared = _BRACKETED.sub("", caption[: markers[0].start]).strip()
    ends = [marker.start for marker in markers[1:]] + [len(caption)]
    texts = [_own_text(caption[marker.end : end]) for marker, end in zip(markers, ends, strict=True)]
    if not all(texts):
        return ()
    parts = zip(markers, texts, strict=True)
    return tuple(
        PanelCaption(letter, f"{shared} {text}".strip()) for marker, text in parts for letter in marker.letters
    )


def names_panels(caption: str) -> bool:
    """Whether a caption speaks of several panels, in whatever order of letter and text."""
    text = caption[:_MAX_CHARS]
    letters = {letter for match in _BRACKETED.finditer(text) for letter in _letters(match[1])}
    positions = {match[1].lower() for match in _POSITION.finditer(text)}  # "Left: CT. Right: MRI."
    return {"A", "B"} <= letters or len(positions) > 1 or _count(_in_sequence(_bare(text))) > 1


def _bracketed(caption: str) -> Iterator[_Marker]:
    for match in _BRACKETED.finditer(caption):
        follows_text = bool(_OPENING.search(caption[max(0, match.start() - 12) : match.start()]))
        next_character = caption[match.end() : match.end() + 1]
        precedes_text = next_character.isalnum() or next_character in ("'", '"', "“", "(")
        if follows_text and precedes_text:
            yield _Marker(_letters(match[1]), match.start(), match.end())


def _bare(caption: str) -> Iterator[_Marker]:
    for match in _BARE.finditer(caption):
        if _SENTENCE_START.search(caption[max(0, match.start() - 4) : match.start()]) and match.end() < len(caption):
            yield _Marker(_letters(match[1]), match.start(), match.end())


def _in_sequence(markers: Iterator[_Marker]) -> list[_Marker]:
    """Those markers that name the next letters, from A on; all others refer back.

    Where A is named more than once, as in ``(a, b) MRI. (a) Axial. (b) Coronal.``, the start from which most panels
    are told apart.
    """
    all_markers = list(markers)
    starts = [number for number, marker in enumerate(all_markers) if marker.letters[:1] == ("A",)]
    sequences = [_sequence(all_markers[start:]) for start in starts[:MAX_PANELS]]
    return max(sequences, key=lambda sequence: (_count(sequence), len(sequence)), default=[])


def _sequence(markers: list[_Marker]) -> list[_Marker]:
    found: list[_Marker] = []
    expected = ord("A")
    for marker in markers:
        if marker.letters and all(ord(letter) == expected + n for n, letter in enumerate(marker.letters)):
            found.append(marker)
            expected += len(marker.letters)
    return found


def _count(markers: list[_Marker]) -> int:
    return sum(len(marker.letters) for marker in markers)


def _letters(text: str) -> tuple[str, ...]:
    """``"A, B"`` and ``"a–c"`` as upper-case letters; empty where the list is none."""
    parts = _SEPARATOR.split(text.strip())
    letters = [parts[0].upper()]
    for separator, letter in zip(parts[1::2], parts[2::2], strict=True):
        if separator.strip() in _RANGE:
            letters += [chr(code) for code in range(ord(letters[-1]) + 1, ord(letter.upper()) + 1)]
        else:
            letters.append(letter.upper())
    return tuple(letters)


def _own_text(text: str) -> str:
    """The text of a panel without the words that lead to the next letter."""
    text = re.sub(r"[\s,;]+(?:and|while|whereas)?\s*$", "", text.strip())
    return text if any(character.isalpha() for character in text) else ""
