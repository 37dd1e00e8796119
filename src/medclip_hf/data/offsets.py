"""Where the characters of a caption that BERT's tokenizer took apart and put together again lie in the raw caption.

Published concept offsets count characters of a *decoded* caption: split into words as BERT does it (lower-cased,
accents removed, every punctuation mark a word of its own), joined by spaces, spaces before some punctuation taken out
again. No vocabulary is needed to repeat this, since pieces of a word are joined again; the exception is a word that the
vocabulary lacks, which decodes to "[UNK]" and shifts what follows.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache

from medclip_hf.data.stages import Drop

Span = tuple[int, int]

MAX_WORD_CHARS = 100  # a longer word decodes to "[UNK]" whatever the vocabulary
UNKNOWN = "[UNK]"

# transformers' clean_up_tokenization_spaces: these replacements one after another, over the whole text.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class DecodedCaption:
    """A caption as BERT's tokenizer decodes it, each character with its place in the raw caption.

    Args:
        caption: as in the row.

    Attributes:
        text: the decoded caption.
        letters: `text` without its spaces, the form in which mentions are compared.
    """

    def __init__(self, caption: str) -> None:
        self.caption = caption
        characters, spans, word_starts = _decode(caption)
        self.text, self._spans = _clean_up(characters, spans)
        self.letters = "".join(character for character in self.text if character != " ")
        self._letter_spans = [span for span in self._spans if span is not None]
        self._word_starts = word_starts  # indices into letters, ascending
        self._letters_before = [0]
        for character in self.text:
            self._letters_before.append(self._letters_before[-1] + (character != " "))

    def raw_span(self, start_char: int, end_char: int, tokens: Sequence[str] | None = None) -> Span | Drop:
        """[start, end) in the raw caption of a mention at [start_char, end_char) of the decoded caption.

        Three ways are tried: the offsets as those of the decoded caption; as those of the raw caption (rows that
        somebody repaired before us); and, for offsets shifted by an unknown word, the nearest place with the same
        words.

        Args:
            start_char: first character of the mention.
            end_char: the one after the last.
            tokens: the mention's WordPiece tokens, which every result must agree with; None where they are unknown,
                then the offsets are trusted.

        Returns:
            the span, or a `Drop` where no place agrees.
        """
        # An unknown word lengthens the decoded caption by at most four characters.
        if not 0 <= start_char < end_char <= len(self.text) + 4 * len(self._word_starts):
            return Drop(
                "concept span outside the caption", f"[{start_char}, {end_char}) of {len(self.text)} characters"
            )
        first, last = self._letter_range(start_char, end_char)
        if tokens is None or UNKNOWN in tokens:
            return self._raw_span_of_letters(first, last) if first < last else Drop("concept without words", "")
        letters = "".join(token.removeprefix("##") for token in tokens)
        if not letters:
            return Drop("concept without words", f"[{start_char}, {end_char})")
        if self.letters[first:last] == letters:
            return self._raw_span_of_letters(first, last)
        if DecodedCaption(self.caption[start_char:end_char]).letters == letters:
            return start_char, end_char
        place = self._nearest(letters, first, starts_a_word=not tokens[0].startswith("##"))
        if place is None:
            return Drop("concept not found in the caption", f"[{start_char}, {end_char})")
        return self._raw_span_of_letters(place, place + len(letters))

    def _letter_range(self, start_char: int, end_char: int) -> Span:
        limit = len(self.text)
        return self._letters_before[min(start_char, limit)], self._letters_before[min(end_char, limit)]

    def _raw_span_of_letters(self, first: int, last: int) -> Span:
        return self._letter_spans[first][0], self._letter_spans[last - 1][1]

    def _nearest(self, letters: str, expected: int, starts_a_word: bool) -> int | None:
        places = [
            place
            for place in _occurrences(self.letters, letters)
            if self._is_boundary(place + len(letters)) and (not starts_a_word or self._is_boundary(place))
        ]
        return min(places, key=lambda place: abs(place - expected), default=None)

    def _is_boundary(self, letter: int) -> bool:
        index = bisect_left(self._word_starts, letter)
        return letter == len(self.letters) or (index < len(self._word_starts) and self._word_starts[index] == letter)


def _decode(caption: str) -> tuple[list[str], list[Span | None], list[int]]:
    """Characters of the words joined by spaces, the raw span of each (None: a space), and where words start."""
    characters: list[str] = []
    spans: list[Span | None] = []
    word_starts: list[int] = []
    num_letters = 0
    for word in _words(caption):
        if characters:
            characters.append(" ")
            spans.append(None)
        if len(word) > MAX_WORD_CHARS:
            whole = (word[0][1][0], word[-1][1][1])
            word = [(character, whole) for character in UNKNOWN]
        word_starts.append(num_letters)
        num_letters += len(word)
        for character, span in word:
            characters.append(character)
            spans.append(span)
    return characters, spans, word_starts


def _words(caption: str) -> Iterator[list[tuple[str, Span]]]:
    """BERT's words; each character with its span in the raw caption, to which accents that follow it belong."""
    word: list[tuple[str, Span]] = []
    for index, raw in enumerate(caption):
        kind, characters = _normalise(raw)
        if kind == "letter" and characters:
            word.extend((character, (index, index + 1)) for character in characters)
        elif kind == "letter" and word:  # a combining accent
            word[-1] = (word[-1][0], (word[-1][1][0], index + 1))
        elif kind in ("space", "alone"):
            if word:
                yield word
                word = []
            if kind == "alone":
                yield [(character, (index, index + 1)) for character in characters]
    if word:
        yield word


@cache  # at most as many entries as Unicode has characters
def _normalise(raw: str) -> tuple[str, str]:
    """(kind, characters) of one raw character: "letter", "alone" (a word of its own), "space" or "removed"."""
    if raw not in "\t\n\r" and (raw in "\0\ufffd" or unicodedata.category(raw).startswith("C")):
        return "removed", ""
    if raw.isspace():
        return "space", ""
    characters = "".join(c for c in unicodedata.normalize("NFD", raw.lower()) if unicodedata.category(c) != "Mn")
    is_alone = len(characters) == 1 and (_is_punctuation(characters) or _is_cjk(characters))
    return "alone" if is_alone else "letter", characters


def _is_punctuation(character: str) -> bool:
    if character.isascii():
        return 33 <= ord(character) <= 126 and not character.isalnum()  # "$" and "^" too, which Unicode calls symbols
    return unicodedata.category(character).startswith("P")


def _is_cjk(character: str) -> bool:
    code = ord(character)
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x2CEAF
        or 0xF900 <= code <= 0xFAFF
        or 0x2F800 <= code <= 0x2FA1F
    )


def _clean_up(characters: list[str], spans: list[Span | None]) -> tuple[str, list[Span | None]]:
    """`_CLEAN_UP` applied; every replacement only takes spaces out, so each other character keeps its span."""
    text = "".join(characters)
    for pattern, replacement in _CLEAN_UP:
        if pattern not in text:
            continue
        removed = {
            place + offset
            for place in _occurrences(text, pattern, step=len(pattern))
            for offset, character in enumerate(pattern)
            if character == " "
        }
        spans = [span for index, span in enumerate(spans) if index not in removed]
        text = text.replace(pattern, replacement)
    return text, spans


def _occurrences(text: str, pattern: str, step: int = 1) -> Iterator[int]:
    """Where `pattern` starts in `text`; with `step` its length, without overlaps as `str.replace` sees it."""
    place = text.find(pattern)
    while place >= 0:
        yield place
        place = text.find(pattern, place + step)
